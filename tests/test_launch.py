"""tools/launch.py: what it would run, word by word; nothing is run but programs of our own in its place."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lm import flags as lm_flags
from lm import interrupt
from tools import launch

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ("--config=configs/tinystories.py", "--workdir=/mnt/runs/a", "--config.data.path=my texts/*.txt")
SLICE = ("--on=slice", "--name=pod", "--zone=us-west4-a", "--repository=https://example.org/lm.git")


def run(*arguments, code=0, path=None, train=TRAIN):
    """Lines that were printed."""
    command = [sys.executable, "tools/launch.py", *arguments, "--", *train]
    environment = os.environ | ({"PATH": f"{path}:{os.environ['PATH']}"} if path else {})
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    return (done.stdout + done.stderr).splitlines()


def document(lines):
    """The JSON between '# FILE' and the commands."""
    end = next(i for i, line in enumerate(lines) if line == "}")
    return json.loads("\n".join(lines[1 : end + 1]))


@pytest.mark.parametrize(
    ("accelerator", "distributed"), [("v5litepod-8", False), ("v5litepod-16", True), ("v5p-8", False), ("v5p-16", True)]
)
def test_a_slice_is_made_installed_and_started_on_every_worker(accelerator, distributed):
    create, install, start = map(shlex.split, run(*SLICE, f"--accelerator={accelerator}", "--spot"))
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
    assert {f"--accelerator-type={accelerator}", "--zone=us-west4-a", "--node-id=pod", "--spot"} <= set(create)
    for ssh in (install, start):
        assert ssh[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"] and "--worker=all" in ssh
    assert "git clone https://example.org/lm.git lm" in install[-1] and "'.[tpu]'" in install[-1]
    assert ("--distributed" in start[-1]) == distributed
    assert "'--config.data.path=my texts/*.txt'" in start[-1], "a shell must not take the words apart"


def test_several_slices_are_one_queued_resource():
    create, _, start = map(shlex.split, run(*SLICE, "--slices=2"))
    assert {"--node-count=2", "--node-prefix=pod"} <= set(create) and "--node-id=pod" not in create
    assert "--node=all" in start and "--distributed" in start[-1]


def test_a_job_set_has_a_pod_a_host_and_is_started_again_when_preempted_only():
    lines = run("--on=gke", "--name=pod", "--image=example.org/lm", "--slices=2", "--accelerator=v5litepod-16")
    assert lines[-1] == "kubectl apply -f FILE"
    job_set = document(lines)
    (jobs,) = job_set["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    assert (jobs["replicas"], job["parallelism"], job["completions"]) == (2, 4, 4)
    (container,) = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert shlex.split(container["command"][2]) == ["python", "-m", "lm.main", "--distributed", *TRAIN]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and interrupt.Preempted.exit_status in rule["onExitCodes"]["values"]


def test_sky_gets_a_task():
    lines = run("--on=sky", "--name=job", "--accelerator=v5litepod-8", "--spot")
    assert shlex.split(lines[-1]) == ["sky", "jobs", "launch", "--yes", "--name=job", "FILE"]
    task = document(lines)
    assert task["resources"]["accelerators"] == "tpu-v5litepod-8" and task["resources"]["use_spot"]


@pytest.mark.parametrize(("statuses", "ends"), [([75, 75, 0], 0), ([75, 1], 1), ([0], 0)])
def test_a_preempted_run_is_started_again_and_no_other(tmp_path, statuses, ends):
    """The real shell line, with a program in the run's place that ends as told."""
    assert interrupt.Preempted.exit_status == launch.PREEMPTED
    (tmp_path / "left").write_text("\n".join(map(str, statuses)))
    program = tmp_path / "train"
    program.write_text('#!/bin/bash\ncd "$(dirname "$0")"\nn=$(head -1 left); sed -i 1d left; exit $n\n')
    program.chmod(0o755)
    done = subprocess.run(["bash", "-c", launch.until_done(str(program))], timeout=60)
    assert done.returncode == ends and (tmp_path / "left").read_text() == ""


def test_it_does_only_what_it_is_told_and_stops_at_the_first_failure(tmp_path):
    program = tmp_path / "gcloud"
    program.write_text(f'#!/bin/bash\necho "$3" >> {tmp_path}/said\n[ "$3" != tpu-vm ] || exit 3\n')
    program.chmod(0o755)
    run(*SLICE, path=tmp_path)
    assert not (tmp_path / "said").exists()
    lines = run(*SLICE, "--go", path=tmp_path, code=1)
    assert "status 3" in lines[-1]
    assert (tmp_path / "said").read_text().split() == ["queued-resources", "tpu-vm"]


@pytest.mark.parametrize(
    ("arguments", "train", "said"),
    [
        (("--on=slice", "--name=a"), TRAIN, "--on=slice needs --zone and --repository"),
        (("--on=gke", "--name=a"), TRAIN, "--on=gke needs --image"),
        (SLICE, ("--config=a.py",), "lm.main needs --workdir=..."),
        ((*SLICE, "--accelerator=v5e"), TRAIN, "expected KIND-COUNT"),
    ],
)
def test_what_is_missing_is_named(arguments, train, said):
    assert said in run(*arguments, code=1, train=train)[-1]


@pytest.mark.parametrize(
    ("machine", "width", "given", "expected"),
    [
        ("v5litepod-16", 2048, "", ["windowed_einsum_mib=24", f"vmem_limit_kib={28 * 1024}"]),
        ("v5litepod-16", 4096, "", ["windowed_einsum_mib=24", f"vmem_limit_kib={48 * 1024}"]),
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
    program = "import os, sys; from lm import flags; print('began'); sys.stdout.flush(); flags.use_huge_pages(); "
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
