"""tools/launch.py: what it would run, word by word; nothing is run but programs of our own in its place."""

import ast
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lm import preemption
from lm.parallel import xla_flags as lm_flags
from tools import launch

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ("--config=configs/tinystories.py", "--workdir=/mnt/runs/a", "--config.data.path=my texts/*.txt")
SLICE = ("--on=slice", "--name=pod", "--zone=us-west4-a", "--repository=https://example.org/lm.git")
# --go without a cloud: what would become of the process is printed.
GO = "import os, sys; os.execvp = lambda *command: print('BECOMES', command); sys.argv[0] = 'launch.py'; "
GO += "from absl import app; from tools import launch; app.run(launch.main)"


def run(*arguments, code=0, train=TRAIN, program=("tools/launch.py",)):
    """What was printed: a script, or after it what was said of an error."""
    command = [sys.executable, *program, *arguments, "--", *train]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def document(script):
    """The JSON that the script gives to a program."""
    return json.loads(script.split("<<'END'\n")[1].split("\nEND\n")[0])


def words(script, start):
    """Words of the line that starts so, in the shell's reading."""
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
def test_all_of_a_slice_follows_from_its_name(accelerator, runtime, topology, chips, hosts):
    found = launch.slice_of(accelerator)
    assert (found.kind.runtime, found.topology, found.chips, found.hosts) == (runtime, topology, chips, hosts)


def test_a_slice_is_made_and_its_run_is_told_all_it_needs():
    script = run(*SLICE, "--accelerator=v5p-32", "--spot")
    create = words(script, "create()")
    assert {"--accelerator-type=v5p-32", "--runtime-version=v2-alpha-tpuv5", "--node-id=pod"} <= set(create)
    assert "--spot;" in create and "hosts=4" in words(script, "name=")
    start = words(script, "(while true")
    assert {"TPU_ACCELERATOR_TYPE=v5p-32", "--distributed", TRAIN[-1]} <= {word.rstrip(";") for word in start}
    assert words(script, "[ -d lm ]")[-3:] == ["clone", "https://example.org/lm.git", "lm"]
    assert "--distributed" not in run(*SLICE, "--accelerator=v5litepod-8")


def test_several_slices_are_one_queued_resource():
    script = run(*SLICE, "--slices=2", "--accelerator=v5litepod-8", train=(*TRAIN, "--config.mesh.dcn_data=2"))
    assert "--node-prefix=pod --node-count=2" in script and "--node-id" not in script
    assert "--distributed" in script and "hosts=2" in words(script, "name=")


def test_a_job_set_has_a_pod_a_host_and_is_started_again_when_preempted_only():
    train = (*TRAIN, "--config.mesh.dcn_data=2")
    script = run("--on=gke", "--name=pod", "--image=example.org/lm", "--slices=2", "--accelerator=v6e-16", train=train)
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
    assert rule["action"] == "FailJob" and preemption.Preempted.exit_status in rule["onExitCodes"]["values"]


def test_sky_gets_a_task(tmp_path):
    script = run("--on=sky", "--name=job", "--accelerator=v6e-8", "--spot")
    fake(tmp_path, "sky", 'echo "$@"; cat "${@: -1}"')
    done = subprocess.run(["bash", "-c", script], env=path_of(tmp_path), capture_output=True, text=True, timeout=60)
    said, _, task = done.stdout.partition("\n")
    assert said.startswith("jobs launch --yes --name=job ") and said.endswith("/job.yaml")
    resources = {"accelerators": "tpu-v6e-8", "accelerator_args": {"runtime_version": "v2-alpha-tpuv6e"}}
    assert json.loads(task)["resources"] == resources | {"use_spot": True} and json.loads(task)["workdir"] == str(ROOT)
    assert "TPU_ACCELERATOR_TYPE=v6e-8 python -m lm.main" in json.loads(task)["run"]


@pytest.mark.parametrize(("statuses", "ends"), [([75, 75, 0], 0), ([75, 1], 1), ([0], 0)])
def test_a_preempted_run_is_started_again_and_no_other(tmp_path, statuses, ends):
    """The real shell line, with a program in the run's place that ends as told."""
    assert preemption.Preempted.exit_status == launch.PREEMPTED
    (tmp_path / "left").write_text("\n".join(map(str, statuses)))
    program = fake(tmp_path, "train", 'cd "$(dirname "$0")"\nn=$(head -1 left); sed -i 1d left; exit $n')
    done = subprocess.run(["bash", "-c", launch.until_done(str(program))], timeout=60)
    assert done.returncode == ends and (tmp_path / "left").read_text() == ""


def fake(folder, name, body):
    """A program of our own in the place of another."""
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)
    return folder / name


def path_of(folder):
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def slice_script():
    return run(*SLICE)


# A cloud whose TPU has the states of the file `states`, one a question ('-': there is none), the last for ever. Its
# four workers are folders; what is sent to them has ended, or is lost, when the connection ends; one answers at first.
CLOUD = """cd "$(dirname "$0")"
case "$4" in
create) echo create >> said ;;
delete) echo delete >> said; [ ! -e lost ] || kill $(cat lost); rm -rf worker* lost ;;
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
# The run: ends with the next word of the file `statuses`, or is `lost` with its machine.
RUN = """echo "$TPU_ACCELERATOR_TYPE $*"
cd ../..
echo >> starts$N
status=$(cut -d' ' -f$(wc -l < starts$N) statuses)
[ "$status" != lost ] || { echo $$ >> lost; exec /bin/sleep 60; }
exit $status
"""


@pytest.mark.skipif(shutil.which("flock") is None, reason="as on the TPU VM: Linux")
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
        ("- ACTIVE ACTIVE SUSPENDED SUSPENDED ACTIVE", "134 0", "create delete create delete", 0),
    ],
    ids=["waits", "preempted", "goes on", "taken away", "not made", "error", "error before it is taken away"],
)
def test_a_slice_is_looked_after_until_its_run_has_ended(tmp_path, slice_script, states, statuses, done, ends):
    """The real script, and the real commands on the workers, with a cloud and a run of our own."""
    (tmp_path / "states").write_text(states.replace(" ", "\n") + "\n")
    (tmp_path / "statuses").write_text(statuses)
    fake(tmp_path, "gcloud", CLOUD)
    fake(tmp_path, "sleep", "")
    fake(tmp_path, "git", "mkdir -p $3/.venv/bin; touch $3/.venv/bin/activate")
    fake(tmp_path, "python3", "")
    fake(tmp_path, "python", RUN)
    result = subprocess.run(
        ["bash", "-c", slice_script], env=path_of(tmp_path), capture_output=True, text=True, timeout=60
    )
    assert result.returncode == ends, result.stdout + result.stderr
    assert (tmp_path / "said").read_text().split() == done.split()
    if states == "ACTIVE":
        assert len((tmp_path / "polls").read_text()) == 3, "deleted when the first worker had ended"
    if ends:  # what the workers said last
        assert "v5litepod-16 -m lm.main --distributed --config=" in result.stdout
        assert result.stderr.strip().endswith("pod is deleted")
    for worker in range(1, 5):
        assert len((tmp_path / f"starts{worker}").read_text()) == len(statuses.split())


def test_it_does_what_it_shows_only_when_it_is_told():
    shown = run(*SLICE, program=("-c", GO))
    assert "BECOMES" not in shown
    text, _, becomes = run(*SLICE, "--go", program=("-c", GO)).partition("BECOMES ")
    assert text == shown
    assert ast.literal_eval(becomes) == ("bash", ["bash", "-c", shown.removeprefix("#!/usr/bin/env bash\n")])


@pytest.mark.parametrize(
    ("arguments", "train", "said"),
    [
        (("--on=slice", "--name=a"), TRAIN, "--on=slice needs --zone and --repository"),
        (("--on=gke", "--name=a"), TRAIN, "--on=gke needs --image"),
        (("--on=sky", "--name=a", "--slices=2"), TRAIN, "--on=sky does not read --slices"),
        (("--on=sky", "--name=a/b"), TRAIN, "--name=a/b: expected a letter"),
        (("--on=sky", "--name=My_Run '1'"), TRAIN, "--name=My_Run '1': expected a letter"),
        ((*SLICE, "--accelerator=v5e"), TRAIN, "expected KIND-COUNT"),
        ((*SLICE, "--accelerator=v5litepod-0"), TRAIN, "expected one of v5litepod-1, v5litepod-4"),
        ((*SLICE, "--accelerator=v5p-4"), TRAIN, "expected one of v5p-8, v5p-16"),
        (
            ("--on=gke", "--name=a", "--image=b", "--accelerator=v5litepod-256", "--topology=4x4"),
            TRAIN,
            "--topology=4x4: --accelerator=v5litepod-256 has 256 chips, such as 16x16",
        ),
        (SLICE, ("--config=a.py",), "lm.main needs --workdir=..."),
        (SLICE, (*TRAIN, "--distribted"), "'distribted'. Did you mean: distributed"),
        (SLICE, (*TRAIN, "--config.mesh.dcn_dat=2"), "unknown config key in --config.mesh.dcn_dat=2"),
        (SLICE, (*TRAIN, "--config.optim.name=adamx"), "'optim.name' must be one of"),
        (SLICE, (*TRAIN, "go"), "unexpected argument 'go'"),
        (SLICE, (*TRAIN[:1], "--workdir=gs://a/b"), "--workdir=gs://a/b: expected a folder"),
        (SLICE, (*TRAIN, "--config.mesh.tensor=3"), "does not fit 16 devices"),
        ((*SLICE, "--slices=2"), TRAIN, "mesh.dcn_data=1: expected 2, the number of slices"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line_before_anything_is_rented(arguments, train, said):
    (line,) = run(*arguments, code=1, train=train).splitlines()
    assert line.startswith("error: ") and said in line


def test_another_shape_of_as_many_chips_can_be_had():
    assert launch.slice_of("v5p-64", "2x2x8").topology == "2x2x8"
    for wrong in ("2x2x4", "4x8", "2x2x8x1", "cube"):
        with pytest.raises(ValueError, match=f"--topology={wrong}"):
            launch.slice_of("v5p-64", wrong)


@pytest.mark.parametrize(
    ("machine", "width", "given", "expected"),
    [
        ("v5litepod-16", 2048, "", ["windowed_einsum_mib=24", f"vmem_limit_kib={28 * 1024}"]),
        ("v5litepod-16", 4096, "", ["windowed_einsum_mib=24", f"vmem_limit_kib={46 * 1024}"]),
        ("v5p-64", 2048, "", ["windowed_einsum_mib=1000000", f"vmem_limit_kib={48 * 1024}"]),
        ("v6e-16", 4096, "", ["windowed_einsum_mib=1000000"]),
        ("", 2048, "", []),
        ("v5p-64", 2048, "--mine", ["--mine"]),
    ],
)
def test_training_sets_the_compilers_flags_on_a_tpu_unless_the_user_has(monkeypatch, machine, width, given, expected):
    environment = {"TPU_ACCELERATOR_TYPE": machine} | ({"LIBTPU_INIT_ARGS": given} if given else {})
    monkeypatch.setattr(os, "environ", environment)
    lm_flags.set_libtpu(width)
    found = environment.get("LIBTPU_INIT_ARGS", "").split()
    assert len(found) == len(expected)
    assert all(one.endswith(end) for one, end in zip(found, expected, strict=True))


def test_a_tpu_that_nobody_named_is_told_of_in_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "accel0").touch()
    for devices, environment, lines in (
        ("accel0", {}, 1),
        ("accel1", {}, 0),
        ("accel0", {"LIBTPU_INIT_ARGS": ""}, 0),
        ("accel0", {"TPU_ACCELERATOR_TYPE": "v5p-8"}, 0),
    ):
        monkeypatch.setattr(lm_flags, "TPU_DEVICES", (str(tmp_path / devices),))
        monkeypatch.setattr(os, "environ", environment)
        lm_flags.set_libtpu(2048)
        said = capsys.readouterr().err.splitlines()
        assert len(said) == lines and all("set TPU_ACCELERATOR_TYPE" in line for line in said)


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_a_program_starts_anew_with_huge_pages_once_and_with_its_arguments(given, found):
    program = "import os, sys; from lm.parallel import xla_flags; print('began'); sys.stdout.flush(); "
    program += "xla_flags.use_huge_pages(); "
    program += "print(os.environ['GLIBC_TUNABLES'], sys.argv[1:])"
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    environment |= {"GLIBC_TUNABLES": given} if given else {}
    command = [sys.executable, "-c", program, "--a=b c", ""]
    said = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    began = 1 if given == found else 2
    assert said.splitlines() == ["began"] * began + [f"{found} ['--a=b c', '']"]


def test_the_commands_of_the_page_are_launches():
    page = (ROOT / "docs" / "launching.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line)[2:] for line in page.splitlines() if line.startswith("    python tools/launch.py")]
    assert len(commands) == 4
    for command in commands:
        split = command.index("--")
        assert run(*command[:split], train=command[split + 1 :])
