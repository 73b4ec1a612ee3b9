"""Shared fixtures, and the strict switches that every test runs under."""

import atexit
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import hypothesis
import pytest

from tests import small_data

# Environment variables and not jax.config: they must be set before jax is imported, and reach the processes that
# tests start. A test that starts several processes sets its own JAX_NUM_CPU_DEVICES.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# From host to device is not guarded everywhere: even jnp.ones would be refused. A test of a loop guards its steps.
os.environ["JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE"] = "disallow"
# Most of the tests' time is compilation, of the same few programs. The cache lives as long as the session, and is
# shared by its workers, who find it set, and by the processes that tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lm-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
# Tests compile far more than they compute: unoptimised code halves the suite's time. The quickstart, which CI runs too,
# is compiled as users compile.
# jaxlib 0.10 compiles a step in a third of the time without its fusion emitters. Later ones have no such flag, and end
# on one that they do not know.
_FLAGS = ["--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))

ROOT = Path(__file__).resolve().parents[1]

# No deadline: the first example of a test may compile. In CI the same examples every time, so that a failure there is
# the change's own; elsewhere new ones, to find more.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def batches_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch that a step is traced with is what `lm.types.Batch` says."""
    from lm import step
    from tests import batch_types

    for name in ("train_step", "eval_step"):
        monkeypatch.setattr(step, name, batch_types.checked(getattr(step, name)))


@pytest.fixture(scope="module", autouse=True)
def programs_are_dropped() -> Iterator[None]:
    """After each file, what JAX has lowered and compiled is dropped: with what a process has lowered before, each
    further lowering takes longer (three times as long at the end of the suite)."""
    yield
    import gc

    import jax

    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """name -> that folder of the shared data; skips the test, saying so, where it is absent."""
    base = Path(os.environ.get("LM_SHARED_DATA") or ROOT.parent / "shared" / "data")

    def find(name: str) -> Path:
        if not (base / name).exists():
            pytest.skip(f"no shared data at {base / name}: set LM_SHARED_DATA to the folder that holds '{name}'")
        return base / name

    return find


@pytest.fixture(scope="session")
def small_world(tmp_path_factory, shared_data) -> Path:
    """A folder to run the commands of the documentation in: '../shared/data' is a small copy of the shared data, and
    '../tensorflow_datasets' has sets of TFDS, which `TFDS_DATA_DIR` must name."""
    folder = tmp_path_factory.mktemp("small_world")
    for name in (*small_data.FILES, *small_data.TARS, small_data.WIKIPEDIA):
        shared_data(name)
    small_data.write(shared_data("."), folder / "shared" / "data")
    small_data.write_sets(shared_data("."), folder / "tensorflow_datasets")
    (folder / "work").mkdir()
    return folder / "work"


@pytest.fixture
def tfds_dir(tmp_path, monkeypatch) -> Path:
    """Where sets of TFDS are looked for; nothing is there yet."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty folder on a file system of 4 MiB of its own; skips the test, saying so, where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs a file system of its own: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)
