"""tools/launch.py: the scripts that it prints, run with fake cloud programs in place of the real ones."""

import ast
import json
import os
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from lm import lease, preemption
from tests import tool_modules

launch = tool_modules.load("launch")
ROOT = Path(__file__).resolve().parents[1]
TRAIN = ("--config=configs/tinystories.py", "--workdir=/mnt/runs/a", "--config.data.path=my texts/*.txt")
STORAGE = "--storage=10.0.0.2:/share:/mnt/runs"
SLICE = ("--on=slice", "--name=pod", "--zone=us-west4-a", "--repository=https://example.org/lm.git", STORAGE)
GKE = ("--on=gke", "--name=pod", "--image=example.org/lm", STORAGE)
SKY = ("--on=sky", "--name=job", STORAGE)
# --go with os.execvp replaced by a function that prints its arguments.
GO = "import os, sys; os.execvp = lambda *command: print('BECOMES', command); sys.argv[0] = 'launch.py'; "
GO += "from absl import app; from tools import launch; app.run(launch.main)"


def run(*arguments, code=0, train=TRAIN, program=("tools/launch.py",)):
    """The output: a script, or an error message."""
    command = [sys.executable, *program, *arguments, "--", *train]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def document(script):
    """The JSON document in a script."""
    return json.loads(script.split("<<'END'\n")[1].split("\nEND\n")[0])


def words(script, start):
    """Arguments of the one line that starts with `start`, as the shell splits it."""
    (line,) = [line for line in script.splitlines() if line.strip().startswith(start)]
    return shlex.split(line)


@pytest.mark.parametrize(
    ("accelerator", "runtime", "topology", "chips", "hosts"),
    [
        ("v5litepod-1", "v2-alpha-tpuv5-lite", "1x1", 1, 1),
        ("v5litepod-8", "v2-alpha-tpuv5-lite", "2x4", 8, 1),
        ("v5litepod-256", "v2-alpha-tpuv5-lite", "16x16", 256, 64),
        ("v6e-16", "v2-alpha-tpuv6e", "4x4", 16, 4),
        ("v5p-8", "v2-alpha-tpuv5", "2x2x1", 4, 1),
        ("v5p-32", "v2-alpha-tpuv5", "2x2x4", 16, 4),
        ("v4-16", "tpu-ubuntu2204-base", "2x2x2", 8, 2),
    ],
)
def test_the_accelerator_name_defines_the_slice(accelerator, runtime, topology, chips, hosts):
    found = launch.slice_of(accelerator)
    assert (found.kind.runtime, found.topology, found.chips, found.hosts) == (runtime, topology, chips, hosts)


def test_a_slice_is_created_and_every_host_runs_the_same_quoted_command():
    script = run(*SLICE, "--accelerator=v5p-32", "--spot")
    create = words(script, "create()")
    assert {"--accelerator-type=v5p-32", "--runtime-version=v2-alpha-tpuv5", "--node-id=pod"} <= set(create)
    assert "--spot;" in create and "hosts=4" in words(script, "name=")
    start = words(script, "(for start in")
    assert {"TPU_ACCELERATOR_TYPE=v5p-32", "--distributed", TRAIN[-1]} <= {word.rstrip(";") for word in start}
    assert words(script, "[ -d lm ]")[-3:] == ["clone", "https://example.org/lm.git", "lm"]
    assert "--distributed" not in run(*SLICE, "--accelerator=v5litepod-8")


def test_several_slices_are_one_queued_resource():
    script = run(*SLICE, "--slices=2", "--accelerator=v5litepod-8", train=(*TRAIN, "--config.mesh.dcn_data=2"))
    assert "--node-prefix=pod --node-count=2" in script and "--node-id" not in script
    assert "--distributed" in script and "hosts=2" in words(script, "name=")


def test_a_job_set_has_a_pod_for_each_host_and_restarts_after_preemption_and_a_lost_host():
    train = (*TRAIN, "--config.mesh.dcn_data=2")
    script = run(*GKE, "--slices=2", "--accelerator=v6e-16", "--max_restarts=7", train=train)
    assert "\nkubectl apply -f - <<'END'\n" in script
    (jobs,) = document(script)["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    assert (jobs["replicas"], job["parallelism"], job["completions"]) == (2, 4, 4)
    pod = job["template"]["spec"]
    assert {*pod["nodeSelector"].values()} == {"tpu-v6e-slice", "4x4"}
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    command = ["TPU_ACCELERATOR_TYPE=v6e-16", "python", "-m", "lm.main", "--distributed", *train]
    assert shlex.split(container["command"][2]) == command
    (rule,) = job["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert (rule["action"], codes["operator"]) == ("FailJob", "NotIn")
    assert codes["values"] == sorted({*codes["values"]}) and len(codes["values"]) <= 255, "as Kubernetes requires"
    assert {preemption.Preempted.exit_status, 134, 137, 139, 143} <= {*codes["values"]}
    assert not {1, 2, 126, 127, lease.Held.exit_status, lease.Lost.exit_status} & {*codes["values"]}
    policy = document(script)["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7 and policy["rules"][0]["action"] == "FailJobSet"


def test_a_job_set_mounts_the_storage():
    """A bucket with the driver of GKE and its annotation; a path of an NFS server; nothing that the image mounts."""

    def pod(storage):
        (jobs,) = document(run(*GKE[:-1], f"--storage={storage}"))["spec"]["replicatedJobs"]
        template = jobs["template"]["spec"]["template"]
        (container,) = template["spec"]["containers"]
        return template["metadata"], template["spec"].get("volumes"), container.get("volumeMounts")

    mounts = [{"name": "runs", "mountPath": "/mnt/runs"}]
    metadata, (volume,), mounted = pod("gs://my-runs:/mnt/runs")
    assert metadata == {"annotations": {"gke-gcsfuse/volumes": "true"}} and mounted == mounts
    assert volume["name"] == "runs" and volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "my-runs"
    nfs = {"name": "runs", "nfs": {"server": "10.0.0.2", "path": "/share"}}
    assert pod("10.0.0.2:/share:/mnt/runs") == ({}, [nfs], mounts)
    assert pod("mounted:/mnt/runs") == ({}, None, None)


@pytest.mark.parametrize(
    ("storage", "expected"),
    [
        (
            "gs://my-runs:/mnt/runs",
            "mkdir -p F;chown 7 F;"
            "gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit=100000 my-runs F",
        ),
        ("nfs.example.org:/a/b:/mnt/runs", "mkdir -p F;chown 7 F;apt-get;mount -t nfs nfs.example.org:/a/b F"),
        ("mounted:/mnt/runs", ""),
    ],
)
@pytest.mark.parametrize("there", [True, False], ids=["mounted before", "not mounted"])
def test_the_storage_is_mounted_once_before_the_run(tmp_path, storage, expected, there):
    """The real shell line, with fake programs that write down how they are called."""
    for name in ("mkdir", "chown", "gcsfuse", "mount"):
        fake(tmp_path, name, f'echo "{name} $*" >> "{tmp_path}/said"')
    fake(tmp_path, "apt-get", f'echo "apt-get" >> "{tmp_path}/said"')
    fake(tmp_path, "sudo", '"$@"')
    fake(tmp_path, "id", "echo 7")
    fake(tmp_path, "mountpoint", f"exit {int(not there)}")
    command = launch.mount(launch.storage_of(storage)) + " && echo runs"
    done = subprocess.run(["bash", "-c", command], env=path_of(tmp_path), capture_output=True, text=True, timeout=60)
    said = (tmp_path / "said").read_text().splitlines() if (tmp_path / "said").exists() else []
    if there:
        assert done.stdout == "runs\n" and not said
    elif expected:
        assert done.stdout.endswith("runs\n") and said == expected.replace("F", "/mnt/runs").split(";")
    else:
        assert done.returncode == 1 and done.stdout == "error: nothing is mounted at /mnt/runs\n"


def test_sky_launches_a_task(tmp_path):
    script = run(*SKY[:-1], "--storage=gs://my-runs:/mnt/runs", "--accelerator=v6e-8", "--spot")
    fake(tmp_path, "sky", 'echo "$@"; cat "${@: -1}"')
    done = subprocess.run(["bash", "-c", script], env=path_of(tmp_path), capture_output=True, text=True, timeout=60)
    launched, _, task = done.stdout.partition("\n")
    assert launched.startswith("jobs launch --yes --name=job ") and launched.endswith("/job.yaml")
    resources = {"accelerators": "tpu-v6e-8", "accelerator_args": {"runtime_version": "v2-alpha-tpuv6e"}}
    assert json.loads(task)["resources"] == resources | {"use_spot": True} and json.loads(task)["workdir"] == str(ROOT)
    assert "TPU_ACCELERATOR_TYPE=v6e-8 python -m lm.main" in json.loads(task)["run"]
    assert "gcsfuse" in json.loads(task)["run"] and "file_mounts" not in json.loads(task)


@pytest.mark.parametrize(
    ("statuses", "ends"),
    [
        ([75, 75, 0], 0),
        ([75, 1], 1),
        ([0], 0),
        ([134, 137, 143, 0], 0),
        ([lease.Held.exit_status], lease.Held.exit_status),
        ([127], 127),
        ([130], 130),
        ([134] * 5, 134),
    ],
)
def test_a_run_that_was_preempted_or_lost_a_host_is_restarted_and_no_other(tmp_path, monkeypatch, statuses, ends):
    """The real shell line, with a program in place of the run that exits with the given statuses. Four restarts."""
    assert preemption.Preempted.exit_status == launch.PREEMPTED
    monkeypatch.setattr(launch, "_MAX_RESTARTS", types.SimpleNamespace(value=4))
    fake(tmp_path, "sleep", "")
    (tmp_path / "left").write_text("\n".join(map(str, statuses)))
    program = fake(tmp_path, "train", 'cd "$(dirname "$0")"\nn=$(head -1 left); sed -i 1d left; exit $n')
    command = ["bash", "-c", launch.until_done(str(program))]
    done = subprocess.run(command, env=path_of(tmp_path), timeout=60)
    assert done.returncode == ends and (tmp_path / "left").read_text() == ""


def fake(folder, name, body):
    """Writes a bash program that stands in for another."""
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)
    return folder / name


def path_of(folder):
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def slice_script():
    return run(*SLICE)


# A fake gcloud. The TPU has the states in the file `states`, one for each query ('-' = no TPU); the last one stays. Its
# four workers are folders. An ssh command returns when the run has ended or is lost; the first one reaches one worker.
CLOUD = """cd "$(dirname "$0")"
case "$4" in
create) echo create >> said ;;
delete) echo delete >> said; [ ! -e lost ] || kill -KILL -- $(cat lost); rm -rf worker* lost ;;
describe)
    [[ "$*" == *--format* ]] || exit 0
    now=$(head -1 states)
    [ $(wc -l < states) -eq 1 ] || sed -i 1d states
    [ "$now" != - ] && echo "$now" ;;
ssh)
    [[ "$*" == *" --node=all --worker=all "* ]] || exit 2
    for word in "$@"; do [[ "$word" != --command=* ]] || command="${word#--command=}"; done
    echo >> polls
    for i in 1 $([ $(wc -l < polls) -eq 1 ] || echo 2 3 4); do
        mkdir -p worker$i
        (cd worker$i && N=$i bash -c "$command"
         until grep -q ended run.log || [ -e ../lost ]; do /bin/sleep 0.05; done)
    done ;;
esac
"""
# The run: exits with the next status in the file `statuses`, or is `lost` with its machine.
RUN = """echo "$TPU_ACCELERATOR_TYPE $*"
cd ../..
echo >> starts$N
status=$(cut -d' ' -f$(wc -l < starts$N) statuses)
[ "$status" != lost ] || { echo "-$(cut -d" " -f5 /proc/$$/stat)" >> lost; exec /bin/sleep 60; }
exit $status
"""


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock, as on a TPU VM (Linux)")
@pytest.mark.parametrize(
    ("states", "statuses", "done", "ends"),
    [
        ("- WAITING_FOR_RESOURCES PROVISIONING ACTIVE", "0", "create delete", 0),
        ("- ACTIVE", "75 75 0", "create delete", 0),
        ("ACTIVE", "0", "delete", 0),
        (
            "- ACTIVE - ACTIVE SUSPENDING SUSPENDED ACTIVE",
            "lost 0",
            "create delete create delete",
            0,
        ),
        ("- FAILED ACTIVE", "0", "create delete create delete", 0),
        ("- ACTIVE", "1", "create delete", 1),
        ("- ACTIVE ACTIVE SUSPENDED SUSPENDED ACTIVE", "1 0", "create delete create delete", 0),
        ("- ACTIVE", "134 137 0", "create delete", 0),
    ],
    ids=[
        "waits",
        "preempted",
        "watched again",
        "suspended",
        "not created",
        "error",
        "error before suspension",
        "lost host",
    ],
)
def test_a_slice_is_watched_until_its_run_has_ended(tmp_path, slice_script, states, statuses, done, ends):
    """The real script and the real commands on the workers, with a fake cloud and a fake run."""
    (tmp_path / "states").write_text(states.replace(" ", "\n") + "\n")
    (tmp_path / "statuses").write_text(statuses)
    fake(tmp_path, "gcloud", CLOUD)
    fake(tmp_path, "sleep", "")
    fake(tmp_path, "mountpoint", "")
    fake(tmp_path, "git", "mkdir -p $3/.venv/bin; touch $3/.venv/bin/activate")
    fake(tmp_path, "python3", "")
    fake(tmp_path, "python", RUN)
    result = subprocess.run(
        ["bash", "-c", slice_script], env=path_of(tmp_path), capture_output=True, text=True, timeout=60
    )
    assert result.returncode == ends, result.stdout + result.stderr
    assert (tmp_path / "said").read_text().split() == done.split()
    if states == "ACTIVE":
        assert len((tmp_path / "polls").read_text()) == 3, "deleted before all workers had ended"
    if ends:  # the ends of the workers' logs
        assert "v5litepod-16 -m lm.main --distributed --config=" in result.stdout
        assert result.stderr.strip().endswith("pod is deleted")
    for worker in range(1, 5):
        assert len((tmp_path / f"starts{worker}").read_text()) == len(statuses.split())


def test_the_script_is_run_only_with_go():
    shown = run(*SLICE, program=("-c", GO))
    assert "BECOMES" not in shown
    text, _, becomes = run(*SLICE, "--go", program=("-c", GO)).partition("BECOMES ")
    assert text == shown
    assert ast.literal_eval(becomes) == ("bash", ["bash", "-c", shown.removeprefix("#!/usr/bin/env bash\n")])


@pytest.mark.parametrize(
    ("arguments", "train", "message"),
    [
        (("--on=slice", "--name=a", STORAGE), TRAIN, "--on=slice needs --zone and --repository"),
        (("--on=gke", "--name=a", STORAGE), TRAIN, "--on=gke needs --image"),
        ((*SKY, "--slices=2"), TRAIN, "--on=sky does not use --slices"),
        ((*SKY, "--name=a/b"), TRAIN, "--name=a/b: expected a lower-case letter"),
        ((*SKY, "--name=My_Run '1'"), TRAIN, "--name=My_Run '1': expected a lower-case letter"),
        ((*SLICE, "--accelerator=v5e"), TRAIN, "expected KIND-COUNT"),
        ((*SLICE, "--accelerator=v5litepod-0"), TRAIN, "expected one of v5litepod-1, v5litepod-4"),
        ((*SLICE, "--accelerator=v5p-4"), TRAIN, "expected one of v5p-8, v5p-16"),
        (
            (*GKE, "--accelerator=v5litepod-256", "--topology=4x4"),
            TRAIN,
            "--topology=4x4: expected a topology of 256 chips for --accelerator=v5litepod-256, such as 16x16",
        ),
        (SLICE, ("--config=a.py",), "lm.main needs --workdir=..."),
        (SLICE, (*TRAIN, "--distribted"), "'distribted'. Did you mean: distributed"),
        (SLICE, (*TRAIN, "--config.mesh.dcn_dat=2"), "unknown config key in --config.mesh.dcn_dat=2"),
        (SLICE, (*TRAIN, "--config.optim.name=adamx"), "'optim.name' must be one of"),
        (SLICE, (*TRAIN, "go"), "unexpected argument 'go'"),
        *(
            (SLICE, (*TRAIN[:1], f"--workdir={wrong}"), f"--workdir={wrong}: expected a folder below /mnt/runs, where")
            for wrong in ("gs://a/b", "runs/a", "~/runs", "/tmp/a", "/mnt/runs", "/mnt/runs/../a", "/mnt/runs2/a", "")
        ),
        *(
            ((*SKY, f"--storage={wrong}"), TRAIN, f"--storage={wrong}: expected gs://BUCKET:/FOLDER, SERVER:/PATH:")
            for wrong in (
                "gs://my-runs",
                "/mnt/runs",
                "mounted:runs",
                "gs://a b:/mnt",
                "s:/a:/mnt/../x",
                "mounted:/",
                "",
            )
        ),
        ((*SKY, "--storage=mounted:/tmp/runs"), TRAIN, "/tmp/runs is the machine's own; mount it elsewhere"),
        ((*SKY, "--storage=mounted:/home/me/runs"), TRAIN, "/home/me/runs is the machine's own; mount it elsewhere"),
        (SLICE, (*TRAIN, "--config.mesh.tensor=3"), "does not fit 16 devices"),
        ((*SLICE, "--slices=2"), TRAIN, "mesh.dcn_data=1: expected 2, the number of slices"),
    ],
)
def test_a_run_that_would_fail_is_refused_in_one_line(arguments, train, message):
    (line,) = run(*arguments, code=1, train=train).splitlines()
    assert line.startswith("error: ") and message in line


def test_another_topology_of_the_same_size_is_accepted():
    assert launch.slice_of("v5p-64", "2x2x8").topology == "2x2x8"
    for wrong in ("2x2x4", "4x8", "2x2x8x1", "cube"):
        with pytest.raises(ValueError, match=f"--topology={wrong}"):
            launch.slice_of("v5p-64", wrong)


def test_the_commands_in_the_docs_print_a_script():
    page = (ROOT / "docs" / "launching.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line)[2:] for line in page.splitlines() if line.startswith("    python tools/launch.py")]
    assert len(commands) == 4
    for command in commands:
        split = command.index("--")
        assert run(*command[:split], train=command[split + 1 :])
