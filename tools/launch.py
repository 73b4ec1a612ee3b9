"""Starts a run on Cloud TPUs: prints the shell script that does it, and with --go runs that script.

    python tools/launch.py --on=slice --name=NAME --zone=ZONE --accelerator=v5litepod-16 --repository=URL \
        -- --config=configs/X.py --workdir=DIR ...

--on is `slice`: a TPU VM, all workers of a pod slice, or with --slices=N of several; `gke`: a JobSet; `sky`: a SkyPilot
managed job. What follows `--` is checked here, then given to lm.main, which needs --config and --workdir, a folder that
all workers see. A run that is preempted is started again and resumes. docs/launching.md has more.
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

from absl import app, flags

_ON = flags.DEFINE_enum("on", None, ["slice", "gke", "sky"], "Where the run starts.", required=True)
_NAME = flags.DEFINE_string("name", None, "Of the TPU, the job set or the job.", required=True)
_ACCELERATOR = flags.DEFINE_string("accelerator", "v5litepod-16", "Type of one slice, as Cloud names it.")
_SPOT = flags.DEFINE_bool("spot", False, "Cheaper, and preempted at any time.")
_SLICES = flags.DEFINE_integer(
    "slices", 1, "slice and gke: how many, joined by the data-centre network.", lower_bound=1
)
_ZONE = flags.DEFINE_string("zone", "", "slice: zone of the TPU.")
_REPOSITORY = flags.DEFINE_string("repository", "", "slice: URL to clone; sky sends this folder.")
_IMAGE = flags.DEFINE_string("image", "", "gke: container image with this repository in /lm and lm[tpu] installed.")
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", "gke: of the node pool, where it is not the usual one of --accelerator."
)
_GO = flags.DEFINE_bool("go", False, "Do it. Without this only what would be done is shown.")

READ = {"slice": ("zone", "repository", "slices"), "gke": ("image", "topology", "slices"), "sky": ()}
NEEDED = {"slice": ("zone", "repository"), "gke": ("image",), "sky": ()}
ROOT = Path(__file__).resolve().parents[1]
PREEMPTED = 75  # exit status of a run that saved and waits to be started again
KILLED = (137, 143)  # of one that had no time to


@dataclasses.dataclass(frozen=True)
class Kind:
    """One generation of TPUs."""

    runtime: str  # software of the TPU VM
    selector: str  # GKE's label of its nodes
    cores: int  # of a chip; the number in a slice's name counts them
    one_host: int  # chips of the largest slice that is one machine; in larger ones each has 4
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
class Slice:
    """What the name of an accelerator says of it."""

    kind: Kind
    topology: str
    chips: int
    hosts: int


def size(topology: str) -> int:
    """Example: '4x4' -> 16 chips."""
    return math.prod(map(int, topology.split("x")))


def slice_of(accelerator: str, topology: str = "") -> Slice:
    """Example: 'v5litepod-16' -> 16 chips, 4x4, on 4 hosts.

    Raises:
      ValueError: there is no such accelerator, or it does not have this topology.
    """
    name, _, count = accelerator.partition("-")
    if name not in KINDS:
        raise ValueError(f"--accelerator={accelerator}: expected KIND-COUNT, where KIND is one of {', '.join(KINDS)}")
    kind = KINDS[name]
    usual = {f"{size(one) * kind.cores}": one for one in kind.topologies}
    if count not in usual:
        raise ValueError(f"--accelerator={accelerator}: expected one of {', '.join(f'{name}-{one}' for one in usual)}")
    chips = size(usual[count])
    if topology and (
        not re.fullmatch(r"\d+(x\d+)*", topology)
        or (size(topology), topology.count("x")) != (chips, usual[count].count("x"))
    ):
        raise ValueError(
            f"--topology={topology}: --accelerator={accelerator} has {chips} chips, such as {usual[count]}"
        )
    return Slice(kind, topology or usual[count], chips, 1 if chips <= kind.one_host else chips // 4)


# What a run would refuse on its TPUs, as far as flags and config tell: no data, tokenizer or checkpoint is looked at,
# as these may be where the run is and not here.
CHECK = """
import sys
from absl import app, flags
from lm import config, main
from lm.parallel import mesh as mesh_lib
from lm.parallel.xla_flags import parse

def check(argv):
    from lm.tasks import build_config  # imports JAX
    workdir, cfg = flags.FLAGS.workdir, build_config(flags.FLAGS.config)
    if argv[1:]:
        sys.exit(f"unexpected argument {argv[1]!r}; all options are --flag=value")
    if ":/" in workdir:
        sys.exit(f"--workdir={workdir}: expected a folder, local or mounted (NFS, gcsfuse)")
    if cfg.mesh.dcn_data != slices:
        sys.exit(f"mesh.dcn_data={cfg.mesh.dcn_data}: expected {slices}, the number of slices; change it or --slices")
    mesh_lib.mesh_sizes(cfg.mesh, devices)

app.run(check, flags_parser=parse)
"""


def check(arguments: list[str], on: Slice) -> None:
    """Refuses flags that do not fit together, and arguments that lm.main would refuse.

    Raises:
      ValueError: saying which flag, and what was expected.
    """
    where = f"--on={_ON.value}"
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", _NAME.value):
        raise ValueError(f"--name={_NAME.value}: expected a letter, then letters, digits and '-', small, at most 40")
    if missing := [f"--{name}" for name in NEEDED[_ON.value] if not flags.FLAGS[name].value]:
        raise ValueError(f"{where} needs {' and '.join(missing)}")
    others = {name for names in READ.values() for name in names} - {*READ[_ON.value]}
    if unread := sorted(f"--{name}" for name in others if flags.FLAGS[name].present):
        raise ValueError(f"{where} does not read {' and '.join(unread)}: leave it out, or choose another --on")
    given = {word.partition("=")[0] for word in arguments}
    if missing := [f"{name}=..." for name in ("--config", "--workdir") if name not in given]:
        raise ValueError(f"lm.main needs {' and '.join(missing)}, after ' -- '")
    program = f"slices, devices = {_SLICES.value}, {_SLICES.value * on.chips}\n{CHECK}"
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line and not line.startswith("Pass --help")]
        raise ValueError(
            f"after ' -- ': {re.sub('^(error|FATAL Flags parsing error|[a-zA-Z_.]+Error): ', '', said[-1])}"
        )


# The images of TPU VMs have a Python that is too old; uv brings its own.
INSTALL = (
    "python3 -m pip install --quiet uv && python3 -m uv venv --quiet --python=3.12 --allow-existing .venv && "
    "python3 -m uv pip install --quiet --python=.venv/bin/python -e '.[tpu]'"
)


def train_command(arguments: list[str], on: Slice) -> str:
    """The command that every worker runs."""
    distributed = ["--distributed"] if on.hosts * _SLICES.value > 1 else []
    words = ["python", "-m", "lm.main", *distributed, *arguments]
    # Only GKE sets it by itself; lm.main chooses the compiler's flags by it.
    return f"TPU_ACCELERATOR_TYPE={_ACCELERATOR.value} {shlex.join(words)}"


def until_done(command: str) -> str:
    """A shell line that starts the command again as long as it was preempted, and ends as it ended."""
    return f"while true; do {command}; status=$?; [ $status -eq {PREEMPTED} ] || exit $status; done"


LOOK_AFTER = r"""
# Sent to each worker again and again: starts `work`, apart from the connection, unless it runs or has ended.
look="$(declare -f work)
export -f work
touch run.log
tail -n 1 run.log | grep -q '^ended' || { setsid nohup flock -n run.lock bash -c work >> run.log 2>&1 < /dev/null & }
tail -n 1 run.log"

queued() { gcloud compute tpus queued-resources "$@" --zone="$zone" --quiet < /dev/null; }
state() { queued describe "$name" --format='value(state.state)'; }
workers() { queued ssh "$name" --node=all --worker=all --command="$1"; }
delete() { until queued delete "$name" --force; do sleep 60; done; }

echo "Stopping this leaves $name and its run as they are, at its price; started again, this looks after them again."
if state > /dev/null 2>&1; then echo "$name is there already: going on with the run on it"; else create || exit 1; fi
while sleep 60; do
    now=$(state)
    echo "$(date +%T) $name: ${now:-no answer}"
    if [ "$now" = SUSPENDED ] || [ "$now" = FAILED ]; then
        queued describe "$name"
        delete
        until create; do sleep 60; done
    elif [ "$now" = ACTIVE ]; then
        said=$(workers "$look")
        echo "${said:-no worker answered}" | tail -n 1
        if [ "$(grep -c 'ended with status 0$' <<< "$said")" -eq "$hosts" ]; then
            delete
            exit 0
        elif grep -q 'ended with status [1-9]' <<< "$said"; then
            # A host that is taken away breaks the run on the others, a little before the state says so.
            sleep 120
            [ "$(state)" = ACTIVE ] || continue
            workers 'tail -n 30 run.log'
            delete
            echo "error: the run failed, as its logs above say; $name is deleted" >&2
            exit 1
        fi
    fi
done
"""


def on_slice(arguments: list[str], on: Slice) -> str:
    """A script that makes the TPU, waits for it, runs on all workers, makes it again when preempted, and deletes it."""
    nodes = ["--node-id={}"] if _SLICES.value == 1 else ["--node-prefix={}", f"--node-count={_SLICES.value}"]
    nodes = [word.format(_NAME.value) for word in nodes] + (["--spot"] if _SPOT.value else [])
    kind = f"--accelerator-type={_ACCELERATOR.value} --runtime-version={on.kind.runtime}"
    return f"""name={_NAME.value} zone={shlex.quote(_ZONE.value)} hosts={on.hosts * _SLICES.value}

create() {{ queued create "$name" {kind} {shlex.join(nodes)}; }}

# What a worker does, in its home; the log's last line says how it ended.
work() {{
    [ -d lm ] || git clone {shlex.quote(_REPOSITORY.value)} lm
    cd lm && {INSTALL} && . .venv/bin/activate &&
        ({until_done(train_command(arguments, on))})
    printf '\\nended with status %s\\n' $?
}}
{LOOK_AFTER}"""


def job_set(arguments: list[str], on: Slice) -> dict[str, Any]:
    """A JobSet (jobset.sigs.k8s.io): a job a slice, a pod a host."""
    host_chips = on.chips // on.hosts
    container = {
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
    pod = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 300, "nodeSelector": selector}
    job = {
        "parallelism": on.hosts,
        "completions": on.hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [{"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": [PREEMPTED, *KILLED]}}]
        },
        "template": {"spec": {**pod, "containers": [container]}},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": _NAME.value,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            # An error of the run's own ends it; a preempted host has all of them started again.
            "failurePolicy": {
                "maxRestarts": 1_000,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "slice", "replicas": _SLICES.value, "template": {"spec": job}}],
        },
    }


def sky_task(arguments: list[str], on: Slice) -> dict[str, Any]:
    """A SkyPilot task; a managed job is recovered from preemption by SkyPilot itself."""
    return {
        "name": _NAME.value,
        "workdir": str(ROOT),
        "resources": {
            "accelerators": f"tpu-{_ACCELERATOR.value}",
            "accelerator_args": {"runtime_version": on.kind.runtime},
            "use_spot": _SPOT.value,
        },
        "setup": INSTALL,
        "run": f". .venv/bin/activate && {until_done(train_command(arguments, on))}",
    }


def script(arguments: list[str], on: Slice) -> str:
    """What --go runs, in bash."""
    match _ON.value:
        case "slice":
            return on_slice(arguments, on)
        case "gke":
            return f"kubectl apply -f - <<'END'\n{json.dumps(job_set(arguments, on), indent=2)}\nEND\n"
        case _:
            task = json.dumps(sky_task(arguments, on), indent=2)  # JSON is YAML
            launch = f'sky jobs launch --yes --name={_NAME.value} "$file"'
            return f"file=$(mktemp -d)/{_NAME.value}.yaml\ncat > \"$file\" <<'END'\n{task}\nEND\n{launch}\n"


def main(argv: list[str]) -> None:
    """Shows the script, and with --go becomes it."""
    try:
        on = slice_of(_ACCELERATOR.value, _TOPOLOGY.value)
        check(argv[1:], on)
    except ValueError as error:
        sys.exit(f"error: {error}")
    text = script(argv[1:], on)
    print(f"#!/usr/bin/env bash\n{text}", end="", flush=True)
    if _GO.value:
        os.execvp("bash", ["bash", "-c", text])


if __name__ == "__main__":
    app.run(main)
