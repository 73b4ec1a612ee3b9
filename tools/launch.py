"""Starts a run on Cloud TPUs, or shows how: prints every command and file, and runs nothing unless told to.

    python tools/launch.py --on=slice --name=NAME --zone=ZONE --accelerator=v5litepod-16 -- --config=configs/X.py ...
    python tools/launch.py --on=gke ... --go

--on is `slice`: one TPU VM or all workers of a pod slice; with --slices=N several, as one queued resource; `gke`: a
JobSet; `sky`: a SkyPilot managed job. What follows `--` is given to lm.main, which needs --config and --workdir, a
folder that all workers see. A run that is preempted saves, ends with status 75, and is started again with the same
command, which resumes it. docs/launching.md has more.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import app, flags

_ON = flags.DEFINE_enum("on", None, ["slice", "gke", "sky"], "Where the run starts.", required=True)
_NAME = flags.DEFINE_string("name", None, "Of the TPU, the job set or the job.", required=True)
_ACCELERATOR = flags.DEFINE_string("accelerator", "v5litepod-16", "Type of one slice, as Cloud names it.")
_SLICES = flags.DEFINE_integer("slices", 1, "Slices, joined by the data-centre network.", lower_bound=1)
_ZONE = flags.DEFINE_string("zone", "", "slice: zone of the TPU.")
_VERSION = flags.DEFINE_string("version", "v2-alpha-tpuv5-lite", "slice and sky: runtime version of the TPU VM.")
_SPOT = flags.DEFINE_bool("spot", False, "Cheaper, and preempted at any time.")
_IMAGE = flags.DEFINE_string("image", "", "gke: container image with this repository in /lm and lm[tpu] installed.")
_TOPOLOGY = flags.DEFINE_string("topology", "4x4", "gke: shape of a slice.")
_MACHINE = flags.DEFINE_string("machine", "tpu-v5-lite-podslice", "gke: node selector of the accelerator.")
_HOST_CHIPS = flags.DEFINE_integer("host_chips", 4, "gke: chips of one host.", lower_bound=1)
_REPOSITORY = flags.DEFINE_string("repository", "", "slice: URL to clone; sky sends this folder.")
_GO = flags.DEFINE_bool("go", False, "Do it. Without this only what would be done is shown.")

PREEMPTED = 75  # exit status of a run that saved and waits to be started again
KILLED = (137, 143)  # of one that had no time to


def train_command(arguments: list[str], distributed: bool) -> str:
    """The command that every worker runs."""
    words = ["python", "-m", "lm.main", *(["--distributed"] if distributed else []), *arguments]
    return shlex.join(words)


def until_done(command: str) -> str:
    """A shell line that starts the command again as long as it was preempted, and ends as it ended."""
    return f"while true; do {command}; status=$?; [ $status -eq {PREEMPTED} ] || exit $status; done"


def chips(accelerator: str) -> int:
    """Example: 'v5litepod-16' -> 16. v4 and v5p are named after their cores, two a chip.

    Raises:
      ValueError: no such name.
    """
    kind, _, count = accelerator.partition("-")
    if not count.isdigit():
        raise ValueError(f"--accelerator={accelerator}: expected KIND-COUNT, such as v5litepod-16")
    return int(count) // (2 if kind in ("v4", "v5p") else 1)


def has_several_hosts(accelerator: str) -> bool:
    """Whether a slice is more than one machine: of v5e and v6e one has up to 8 chips, of the others 4."""
    return chips(accelerator) > (8 if accelerator.startswith(("v5lite", "v6e")) else 4)


def on_slice(arguments: list[str]) -> list[list[str]]:
    """gcloud's commands: make the TPU, install, run on every worker."""
    distributed = _SLICES.value > 1 or has_several_hosts(_ACCELERATOR.value)
    create = ["gcloud", "compute", "tpus", "queued-resources", "create", _NAME.value, f"--zone={_ZONE.value}"]
    create += [f"--accelerator-type={_ACCELERATOR.value}", f"--runtime-version={_VERSION.value}"]
    create += [f"--node-prefix={_NAME.value}", f"--node-count={_SLICES.value}"] if _SLICES.value > 1 else []
    create += [] if _SLICES.value > 1 else [f"--node-id={_NAME.value}"]
    create += ["--spot"] if _SPOT.value else []
    install = f"git clone {shlex.quote(_REPOSITORY.value)} lm && cd lm && python3 -m venv .venv"
    install += " && .venv/bin/pip install --quiet -e '.[tpu]'"
    start = f"cd lm && . .venv/bin/activate && {until_done(train_command(arguments, distributed))}"
    if _SLICES.value == 1:
        ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", _NAME.value]
    else:
        ssh = ["gcloud", "alpha", "compute", "tpus", "queued-resources", "ssh", _NAME.value, "--node=all"]
    ssh += [f"--zone={_ZONE.value}", "--worker=all"]
    return [create, *([*ssh, f"--command={command}"] for command in (install, start))]


def job_set(arguments: list[str]) -> dict[str, Any]:
    """A JobSet (jobset.sigs.k8s.io): a job a slice, a pod a host."""
    hosts = max(1, chips(_ACCELERATOR.value) // _HOST_CHIPS.value)
    container = {
        "name": "train",
        "image": _IMAGE.value,
        "workingDir": "/lm",
        "command": ["bash", "-c", train_command(arguments, hosts * _SLICES.value > 1)],
        "resources": {kind: {"google.com/tpu": _HOST_CHIPS.value} for kind in ("requests", "limits")},
    }
    selector = {
        "cloud.google.com/gke-tpu-accelerator": _MACHINE.value,
        "cloud.google.com/gke-tpu-topology": _TOPOLOGY.value,
        **({"cloud.google.com/gke-spot": "true"} if _SPOT.value else {}),
    }
    pod = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 300, "nodeSelector": selector}
    job = {
        "parallelism": hosts,
        "completions": hosts,
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


def sky_task(arguments: list[str]) -> dict[str, Any]:
    """A SkyPilot task; a managed job is recovered from preemption by SkyPilot itself."""
    distributed = has_several_hosts(_ACCELERATOR.value)
    return {
        "name": _NAME.value,
        "workdir": ".",
        "resources": {
            "accelerators": f"tpu-{_ACCELERATOR.value}",
            "accelerator_args": {"runtime_version": _VERSION.value},
            "use_spot": _SPOT.value,
        },
        "setup": "python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[tpu]'",
        "run": f". .venv/bin/activate && {until_done(train_command(arguments, distributed))}",
    }


def commands(arguments: list[str]) -> tuple[list[list[str]], str]:
    """(commands in order, text of the file that they name as FILE or '')."""
    match _ON.value:
        case "slice":
            return on_slice(arguments), ""
        case "gke":
            return [["kubectl", "apply", "-f", "FILE"]], json.dumps(job_set(arguments), indent=2)
        case _:
            task = json.dumps(sky_task(arguments), indent=2)  # JSON is YAML
            return [["sky", "jobs", "launch", "--yes", f"--name={_NAME.value}", "FILE"]], task


def main(argv: list[str]) -> None:
    """Shows the commands, and runs them with --go; the first that fails ends it with its status."""
    arguments = argv[1:]
    given = {word.partition("=")[0] for word in arguments}
    needed = {"slice": ("zone", "repository"), "gke": ("image",), "sky": ()}[_ON.value]
    if missing := [f"--{name}" for name in needed if not flags.FLAGS[name].value]:
        sys.exit(f"error: --on={_ON.value} needs {' and '.join(missing)}")
    if missing := [f"{name}=..." for name in ("--config", "--workdir") if name not in given]:
        sys.exit(f"error: lm.main needs {' and '.join(missing)}, after ' -- '")
    try:
        todo, text = commands(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{_NAME.value}.json"
        if text:
            file.write_text(text, encoding="utf-8")
            print(f"# FILE\n{text}")
        for command in todo:
            print(shlex.join(command), flush=True)
            if _GO.value:
                status = subprocess.run([str(file) if word == "FILE" else word for word in command]).returncode
                if status:
                    sys.exit(f"error: status {status}; what comes after it was not run")


if __name__ == "__main__":
    app.run(main)
