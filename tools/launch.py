"""Launches a run on Cloud TPUs: prints the shell script that does it, and with --go runs the script.

    python tools/launch.py --on=slice --name=NAME --zone=ZONE --accelerator=v5litepod-16 --repository=URL \
        --storage=gs://BUCKET:/mnt/runs -- --config=configs/X.py --workdir=/mnt/runs/NAME ...

--on is `slice` (a TPU VM, or all workers of a pod slice, or of several with --slices=N), `gke` (a JobSet) or `sky` (a
SkyPilot managed job). The arguments after `--` are checked here and passed to lm.main. They must include --config and
--workdir, a folder of --storage, which all workers share and which outlives them. A run that was preempted, or that has
lost one of its hosts, is restarted and resumes. See docs/launching.md.
"""

import dataclasses
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

from lm import command_line
from lm.terminal import say, stop

_ON = flags.DEFINE_enum("on", None, ["slice", "gke", "sky"], "Where to run.", required=True)
_NAME = flags.DEFINE_string("name", None, "Name of the TPU, JobSet or job.", required=True)
_ACCELERATOR = flags.DEFINE_string("accelerator", "v5litepod-16", "Cloud's name of the slice type.")
_SPOT = flags.DEFINE_bool("spot", False, "Use spot capacity: cheaper, but preempted at any time.")
_SLICES = flags.DEFINE_integer(
    "slices", 1, "slice, gke: number of slices, connected by the data-centre network.", lower_bound=1
)
_ZONE = flags.DEFINE_string("zone", "", "slice: zone of the TPU.")
_REPOSITORY = flags.DEFINE_string("repository", "", "slice: git URL to clone; sky uploads this folder.")
_IMAGE = flags.DEFINE_string("image", "", "gke: container image with this repository in /lm and lm[tpu] installed.")
_TOPOLOGY = flags.DEFINE_string("topology", "", "gke: topology of the node pool, if not the default of --accelerator.")
_STORAGE = flags.DEFINE_string(
    "storage",
    None,
    "What to mount on all machines, and where: gs://BUCKET:/FOLDER, SERVER:/PATH:/FOLDER (NFS), or mounted:/FOLDER, "
    "which the machines mount by themselves.",
    required=True,
)
_MAX_RESTARTS = flags.DEFINE_integer("max_restarts", 100, "How often a run may be restarted.", lower_bound=0)
_GO = flags.DEFINE_bool("go", False, "Run the script; without this flag it is only printed.")

OPTIONS = {"slice": ("zone", "repository", "slices"), "gke": ("image", "topology", "slices"), "sky": ()}
REQUIRED = {"slice": ("zone", "repository"), "gke": ("image",), "sky": ()}
ROOT = Path(__file__).resolve().parents[1]
# Exit statuses after which a run is restarted: preempted, with everything saved; and ended by a signal, which a lost
# host gives: 134 (abort) on the hosts that survive, where JAX notices it, 137 or 143 where a host was shut down.
PREEMPTED = 75
BY_CTRL_C = 130
BY_SIGNAL = [status for status in range(128, 256) if status != BY_CTRL_C]
RESTARTED = (PREEMPTED, *BY_SIGNAL)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A generation of TPUs.

    Attributes:
      runtime: software version of the TPU VM.
      selector: GKE's node label.
      cores: per chip; the number in an accelerator's name counts cores.
      one_host: chips of the largest slice with one host; hosts of larger slices have 4 chips.
      topologies: the default topology of each slice size.
    """

    runtime: str
    selector: str
    cores: int
    one_host: int
    topologies: tuple[str, ...]


GRID = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
KINDS = {
    "v4": Kind("tpu-ubuntu2204-base", "tpu-v4-podslice", 2, 4, CUBE),
    "v5litepod": Kind("v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 1, 8, GRID),
    "v5p": Kind("v2-alpha-tpuv5", "tpu-v5p-slice", 2, 4, CUBE),
    "v6e": Kind("v2-alpha-tpuv6e", "tpu-v6e-slice", 1, 8, GRID),
}


@dataclasses.dataclass(frozen=True)
class Storage:
    """What is mounted on all machines: a bucket, a path of an NFS server, or what they mount by themselves (neither).

    Attributes:
      folder: where it is mounted.
    """

    bucket: str
    server: str
    path: str
    folder: str


# Folders that a machine takes with it.
LOCAL = ("/tmp", "/var", "/dev", "/run", "/root", "/home", "/proc", "/sys")


def storage_of(text: str) -> Storage:
    """Example: 'gs://my-runs:/mnt/runs' -> the bucket my-runs, mounted at /mnt/runs.

    Raises:
      ValueError: it has another form, or the folder is one of the machine's own.
    """
    found = re.fullmatch(
        r"(?:mounted|gs://(?P<bucket>[a-z0-9][a-z0-9._-]+)|(?P<server>[A-Za-z0-9.-]+):(?P<path>/[\w./-]*))"
        r":(?P<folder>(?:/[\w.-]+)+)",
        text,
    )
    if not found or ".." in text:
        raise ValueError(
            f"--storage={text}: expected gs://BUCKET:/FOLDER, SERVER:/PATH:/FOLDER (NFS) or mounted:/FOLDER, such as "
            "gs://my-runs:/mnt/runs"
        )
    storage = Storage(**{name: value or "" for name, value in found.groupdict().items()})
    if f"/{storage.folder.split('/')[1]}" in LOCAL:
        raise ValueError(f"--storage={text}: {storage.folder} is the machine's own; mount it elsewhere: /mnt/runs")
    return storage


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice type, as its accelerator name defines it."""

    kind: Kind
    topology: str
    chips: int
    hosts: int


def num_chips(topology: str) -> int:
    """Example: '4x4' -> 16."""
    return math.prod(map(int, topology.split("x")))


def slice_of(accelerator: str, topology: str = "") -> Slice:
    """The slice of an accelerator name. Example: 'v5litepod-16' -> 16 chips, 4x4, on 4 hosts.

    Raises:
      ValueError: unknown accelerator, or a topology of another number of chips or dimensions.
    """
    name, _, count = accelerator.partition("-")
    if name not in KINDS:
        raise ValueError(f"--accelerator={accelerator}: expected KIND-COUNT, where KIND is one of {', '.join(KINDS)}")
    kind = KINDS[name]
    usual = {f"{num_chips(known) * kind.cores}": known for known in kind.topologies}
    if count not in usual:
        raise ValueError(
            f"--accelerator={accelerator}: expected one of {', '.join(f'{name}-{known}' for known in usual)}"
        )
    chips = num_chips(usual[count])
    if topology and (
        not re.fullmatch(r"\d+(x\d+)*", topology)
        or (num_chips(topology), topology.count("x")) != (chips, usual[count].count("x"))
    ):
        raise ValueError(
            f"--topology={topology}: expected a topology of {chips} chips for --accelerator={accelerator}, "
            f"such as {usual[count]}"
        )
    return Slice(kind, topology or usual[count], chips, 1 if chips <= kind.one_host else chips // 4)


# Checks the flags and the config as the run would on its TPUs. Data, tokenizer and checkpoints are not checked, because
# they may exist only where the run is.
CHECK = """
from absl import flags
from lm import command_line, main
from lm.terminal import stop

def check(argv):
    from lm.parallel import mesh as mesh_lib  # import JAX
    from lm.tasks import build_config
    cfg = build_config(flags.FLAGS.config)
    if argv[1:]:
        stop(f"unexpected argument {argv[1]!r}; all options are --flag=value")
    if cfg.mesh.dcn_data != slices:
        stop(f"mesh.dcn_data={cfg.mesh.dcn_data}: expected {slices}, the number of slices; change it or --slices")
    mesh_lib.mesh_sizes(cfg.mesh, devices)

command_line.run(check)
"""


def check(arguments: list[str], on: Slice, storage: Storage) -> None:
    """Checks the flags, and that lm.main would accept its arguments.

    Raises:
      ValueError: names the flag and what was expected.
    """
    target = f"--on={_ON.value}"
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", _NAME.value):
        raise ValueError(
            f"--name={_NAME.value}: expected a lower-case letter, then lower-case letters, digits and '-', at most 40"
        )
    if missing := [f"--{name}" for name in REQUIRED[_ON.value] if not flags.FLAGS[name].value]:
        raise ValueError(f"{target} needs {' and '.join(missing)}")
    others = {name for names in OPTIONS.values() for name in names} - {*OPTIONS[_ON.value]}
    if unused := sorted(f"--{name}" for name in others if flags.FLAGS[name].present):
        raise ValueError(f"{target} does not use {' and '.join(unused)}: leave it out, or choose another --on")
    given = {name: value for name, _, value in (argument.partition("=") for argument in arguments)}
    if missing := [f"{name}=..." for name in ("--config", "--workdir") if name not in given]:
        raise ValueError(f"lm.main needs {' and '.join(missing)}, after ' -- '")
    workdir, folder = given["--workdir"], storage.folder
    if not os.path.normpath(workdir).startswith(f"{folder}/"):
        raise ValueError(f"--workdir={workdir}: expected a folder below {folder}, where --storage is mounted")
    program = f"slices, devices = {_SLICES.value}, {_SLICES.value * on.chips}\n{CHECK}"
    process = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        lines = [line for line in process.stderr.splitlines() if line and not line.startswith("Pass --help")]
        said = lines[-1] if lines else f"the check of lm.main's arguments ended with status {process.returncode}"
        raise ValueError(f"after ' -- ': {re.sub('^(error|FATAL Flags parsing error|[a-zA-Z_.]+Error): ', '', said)}")


# The Python of TPU VM images is too old; uv installs a newer one.
INSTALL = (
    "python3 -m pip install --quiet uv && python3 -m uv venv --quiet --python=3.12 --allow-existing .venv && "
    "python3 -m uv pip install --quiet --python=.venv/bin/python -e '.[tpu]'"
)


def train_command(arguments: list[str], on: Slice) -> str:
    """The command that every worker runs."""
    distributed = ["--distributed"] if on.hosts * _SLICES.value > 1 else []
    command = ["python", "-m", "lm.main", *distributed, *arguments]
    # lm.main chooses the compiler's flags by this variable, which only GKE sets by itself.
    return f"TPU_ACCELERATOR_TYPE={_ACCELERATOR.value} {shlex.join(command)}"


def until_done(command: str) -> str:
    """A shell line that restarts the command on the statuses of `RESTARTED`, and exits with its last status."""
    by_signal = f"[ $status -ge {BY_SIGNAL[0]} ] && [ $status -ne {BY_CTRL_C} ]"
    again = f"[ $status -eq {PREEMPTED} ] || {{ {by_signal}; }}"
    return (
        f"for start in {{0..{_MAX_RESTARTS.value}}}; do {command}; status=$?; {again} || break; sleep 10; done; "
        "exit $status"
    )


# gcsfuse renames a folder in a bucket without a hierarchical namespace file by file, and refuses more files than this.
_RENAMED_FILES = 100_000
# From https://cloud.google.com/storage/docs/cloud-storage-fuse/install
INSTALL_GCSFUSE = (
    "curl -sS https://packages.cloud.google.com/apt/doc/apt-key.gpg | "
    "sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null && "
    'echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt '
    'gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null && '
    "sudo apt-get update -qq && sudo apt-get install -qq gcsfuse"
)


def mount(storage: Storage) -> str:
    """A shell command that mounts the storage on this machine, unless it is mounted; fails where it cannot."""
    folder = storage.folder
    if storage.bucket:  # without its cache a lease of another machine is seen as it is; a save renames a folder
        options = f"--implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit={_RENAMED_FILES}"
        how = f"{{ command -v gcsfuse || {{ {INSTALL_GCSFUSE}; }}; }} && gcsfuse {options} {storage.bucket} {folder}"
    elif storage.server:
        how = f"sudo apt-get install -qq nfs-common && sudo mount -t nfs {storage.server}:{storage.path} {folder}"
    else:
        return f"{{ mountpoint -q {folder} || {{ echo 'error: nothing is mounted at {folder}'; false; }}; }}"
    made = f'sudo mkdir -p {folder} && sudo chown "$(id -u)" {folder}'
    return f"{{ mountpoint -q {folder} || {{ {made} && {how}; }}; }}"


def volume(storage: Storage) -> dict[str, Any] | None:
    """The storage as a volume of a pod; None where the image mounts it."""
    if storage.bucket:
        how = f"implicit-dirs,metadata-cache:ttl-secs:0,file-system:rename-dir-limit:{_RENAMED_FILES}"
        options = {"bucketName": storage.bucket, "mountOptions": how}
        return {"name": "runs", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": options}}
    if storage.server:
        return {"name": "runs", "nfs": {"server": storage.server, "path": storage.path}}
    return None


WATCH = r"""
# Sent to every worker each minute: starts `work` detached from the connection, unless it is running or has ended.
poll="$(declare -f work)
export -f work
touch run.log
tail -n 1 run.log | grep -q '^ended' || { setsid nohup flock -n run.lock bash -c work >> run.log 2>&1 < /dev/null & }
tail -n 1 run.log"

queued() { gcloud compute tpus queued-resources "$@" --zone="$zone" --quiet < /dev/null; }
state() { queued describe "$name" --format='value(state.state)'; }
workers() { queued ssh "$name" --node=all --worker=all --command="$1"; }
delete() { until queued delete "$name" --force; do sleep 60; done; }

echo "If you stop this script, $name and its run go on and are billed; the same command watches them again."
if state > /dev/null 2>&1; then echo "$name exists already: watching its run"; else create || exit 1; fi
while sleep 60; do
    now=$(state)
    echo "$(date +%T) $name: ${now:-no answer}"
    if [ "$now" = SUSPENDED ] || [ "$now" = FAILED ]; then
        queued describe "$name"
        delete
        until create; do sleep 60; done
    elif [ "$now" = ACTIVE ]; then
        output=$(workers "$poll")
        echo "${output:-no worker answered}" | tail -n 1
        if [ "$(grep -c 'ended with status 0$' <<< "$output")" -eq "$hosts" ]; then
            delete
            exit 0
        elif grep -q 'ended with status [1-9]' <<< "$output"; then
            # When a host is preempted, the run fails on the others shortly before the state changes.
            sleep 120
            [ "$(state)" = ACTIVE ] || continue
            workers 'tail -n 30 run.log'
            delete
            echo "error: the run failed, see its logs above; $name is deleted" >&2
            exit 1
        fi
    fi
done
"""


def on_slice(arguments: list[str], on: Slice, storage: Storage) -> str:
    """A script that creates the TPU, runs on all workers, recreates it after preemption, and deletes it at the end."""
    nodes = ["--node-id={}"] if _SLICES.value == 1 else ["--node-prefix={}", f"--node-count={_SLICES.value}"]
    nodes = [flag.format(_NAME.value) for flag in nodes] + (["--spot"] if _SPOT.value else [])
    kind = f"--accelerator-type={_ACCELERATOR.value} --runtime-version={on.kind.runtime}"
    return f"""name={_NAME.value} zone={shlex.quote(_ZONE.value)} hosts={on.hosts * _SLICES.value}

create() {{ queued create "$name" {kind} {shlex.join(nodes)}; }}

# Runs on a worker, in its home folder; the last line of the log has the exit status.
work() {{
    [ -d lm ] || git clone {shlex.quote(_REPOSITORY.value)} lm
    {mount(storage)} && cd lm && {INSTALL} && . .venv/bin/activate &&
        ({until_done(train_command(arguments, on))})
    printf '\\nended with status %s\\n' $?
}}
{WATCH}"""


def job_set(arguments: list[str], on: Slice, storage: Storage) -> dict[str, Any]:
    """A JobSet (jobset.sigs.k8s.io) with one job for each slice and one pod for each host."""
    host_chips = on.chips // on.hosts
    container: dict[str, Any] = {
        "name": "train",
        "image": _IMAGE.value,
        "workingDir": "/lm",
        "command": ["bash", "-c", train_command(arguments, on)],
        "resources": {kind: {"google.com/tpu": host_chips} for kind in ("requests", "limits")},
    }
    selector = {
        "cloud.google.com/gke-tpu-accelerator": on.kind.selector,
        "cloud.google.com/gke-tpu-topology": on.topology,
        **({"cloud.google.com/gke-spot": "true"} if _SPOT.value else {}),
    }
    pod: dict[str, Any] = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 300, "nodeSelector": selector}
    metadata = {"annotations": {"gke-gcsfuse/volumes": "true"}} if storage.bucket else {}
    if mounted := volume(storage):
        container["volumeMounts"] = [{"name": mounted["name"], "mountPath": storage.folder}]
        pod["volumes"] = [mounted]
    job = {
        "parallelism": on.hosts,
        "completions": on.hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [{"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": list(RESTARTED)}}]
        },
        "template": {"metadata": metadata, "spec": {**pod, "containers": [container]}},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": _NAME.value,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            # An error of the run fails the JobSet; a host that is preempted or lost restarts all jobs.
            "failurePolicy": {
                "maxRestarts": _MAX_RESTARTS.value,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "slice", "replicas": _SLICES.value, "template": {"spec": job}}],
        },
    }


def sky_task(arguments: list[str], on: Slice, storage: Storage) -> dict[str, Any]:
    """A SkyPilot task; SkyPilot itself restarts a managed job after preemption."""
    return {
        "name": _NAME.value,
        "workdir": str(ROOT),
        "resources": {
            "accelerators": f"tpu-{_ACCELERATOR.value}",
            "accelerator_args": {"runtime_version": on.kind.runtime},
            "use_spot": _SPOT.value,
        },
        "setup": INSTALL,
        "run": f"{mount(storage)} && . .venv/bin/activate && {{ {until_done(train_command(arguments, on))}; }}",
    }


def script(arguments: list[str], on: Slice, storage: Storage) -> str:
    """The bash script."""
    match _ON.value:
        case "slice":
            return on_slice(arguments, on, storage)
        case "gke":
            return f"kubectl apply -f - <<'END'\n{json.dumps(job_set(arguments, on, storage), indent=2)}\nEND\n"
        case _:
            task = json.dumps(sky_task(arguments, on, storage), indent=2)  # JSON is YAML
            launch = f'sky jobs launch --yes --name={_NAME.value} "$file"'
            return f"file=$(mktemp -d)/{_NAME.value}.yaml\ncat > \"$file\" <<'END'\n{task}\nEND\n{launch}\n"


def main(argv: list[str]) -> None:
    """Prints the script, and with --go replaces this process by it."""
    try:
        on = slice_of(_ACCELERATOR.value, _TOPOLOGY.value)
        storage = storage_of(_STORAGE.value)
        check(argv[1:], on, storage)
    except ValueError as error:
        stop(f"error: {error}")
    text = script(argv[1:], on, storage)
    say(f"#!/usr/bin/env bash\n{text}", end="")
    if _GO.value:
        os.execvp("bash", ["bash", "-c", text])


if __name__ == "__main__":
    command_line.run(main)
