"""lm/main.py: flags are parsed without JAX, and configs that cannot run are refused before a device is touched."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "configs/quickstart_pretrain.py"


def run(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """(finished process, its CPU seconds). JAX_PLATFORMS names no platform, so that touching a device would fail."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "no_such_platform"},
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_flags_are_parsed_without_importing_heavy_packages():
    heavy = ("jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "tensorflow", "matplotlib", "numpy")
    result, _ = run("-c", f"import sys, lm.main; print([name for name in {heavy!r} if name in sys.modules])")
    assert result.stdout.strip() == "[]", f"import these where they are used:\n{result.stderr}"


def test_help_names_the_flags():
    result, _ = run("-m", "lm.main", "--help")
    missing = [flag for flag in ("--config", "--workdir", "--[no]print_config") if flag not in result.stdout]
    assert not missing, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("override", "named"),
    [
        (["--config.optim.learning_ratee=1"], ["learning_ratee", '"learning_rate"']),
        (["--config.optm.learning_rate=1"], ["optm", '"optim"']),
        (["--config.optim.learning_rate=fast"], ["optim.learning_rate", "fast"]),
        (["--config.model.num_layers=1.5"], ["model.num_layers", "1.5"]),
        (["--config.optim.name=adamx"], ["'optim.name'", "'adamx'", "'adamw'"]),
        (
            ["--config.train.total_steps=7", "--config.train.total_tokens=9000"],
            ["two durations at once: train.total_steps=7 and train.total_tokens=9,000"],
        ),
        (
            ["--config.optim.lr_rules=(('decodr/.*', 0.0), ('.*', 1.0))"],
            ["'optim.lr_rules'", "'decodr/.*'", "nearest name 'decoder'"],
        ),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)
def test_configs_that_cannot_run_are_refused_at_once(override, named, tmp_path):
    result, seconds = run("-m", "lm.main", f"--config={RECIPE}", f"--workdir={tmp_path}/run", *override)
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-3:]
    assert [part for part in named if part not in "\n".join(message)] == [], result.stderr
    assert "no_such_platform" not in result.stderr
    assert seconds < 5, "CPU seconds"
    assert not (tmp_path / "run").exists(), "nothing is written for a run that cannot start"


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("UNKNOWN: Gloo all-reduce failed: pair.cc:538] Read error [127.0.0.1]:33166: Connection reset by peer", True),
        ("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited or there was a network error", True),
        ("UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats): task_id: 1", True),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.", False),
        ("RESOURCE_EXHAUSTED: Out of memory allocating NCCL buffers", False),
        ("INTERNAL: NCCL operation ncclCommInitRank failed: unhandled cuda error.\n'out of memory'", False),
        ("INTERNAL: Failed to load gloo library", False),
        ("INVALID_ARGUMENT: heartbeat_timeout must be positive", False),
        ("INTERNAL: Mosaic failed to compile TPU kernel", False),
    ],
)
def test_a_lost_process_is_told_from_an_error_that_would_come_again(message, lost):
    code = (
        "from jax.errors import JaxRuntimeError; from lm import main; from lm.checkpoint import CheckpointError\n"
        f"error = JaxRuntimeError({message!r})\n"
        "saving = CheckpointError('saving failed'); saving.__cause__ = error\n"
        "print([main.is_lost_host(each) for each in (error, saving, RuntimeError(str(error)))])"
    )
    result, _ = run("-c", code)
    assert result.stdout.strip() == str([lost, lost, False]), result.stderr
