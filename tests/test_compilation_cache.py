"""The compilation cache: on by default, bounded, and out of the way where it cannot be."""

import dataclasses
import os
import subprocess
import sys

import pytest

from lm import compilation_cache, train
from lm import run as run_lib
from lm.config import TrainConfig
from tests import toys
from tests.study_runs import ROOT

SCRIPT = """
import sys
import jax, jax.numpy as jnp
from lm import compilation_cache
compilation_cache._MIN_COMPILE_SECONDS = 0.0
compilation_cache.use(sys.argv[1])
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
print(jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None)
"""


def run(setting, home, script=SCRIPT, **more):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    env = kept | {"HOME": str(home), "XDG_CACHE_HOME": "", "PYTHONPATH": str(ROOT)} | more
    return subprocess.run([sys.executable, "-c", script, setting], env=env, capture_output=True, text=True, check=True)


def test_programs_are_kept_in_the_home_by_default(tmp_path):
    assert TrainConfig().compilation_cache == "auto"
    used = run("auto", tmp_path).stdout.strip()
    assert used.startswith(f"{tmp_path}/.cache/lm/compiled/") and len(os.listdir(used)) >= 1
    there = set(os.listdir(used))
    assert run("auto", tmp_path).stdout.strip() == used and set(os.listdir(used)) == there


def test_a_folder_of_ones_own_none_and_what_jax_is_told_are_respected(tmp_path):
    assert run(str(tmp_path / "own"), tmp_path).stdout.strip() == str(tmp_path / "own")
    assert run("", tmp_path).stdout.strip() == "None"
    told = run("auto", tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "jax"))
    assert told.stdout.strip() == str(tmp_path / "jax")
    assert run("", tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "none")).stdout.strip() == "None"
    assert not (tmp_path / ".cache").exists() and not (tmp_path / "none").exists()


def test_another_folder_is_used_from_then_on(tmp_path):
    """JAX goes on with the folder that it has opened unless it is told."""
    twice = (
        SCRIPT
        + """
compilation_cache.use(sys.argv[1] + "-two")
jax.jit(lambda x: jnp.cos(x) @ x)(jnp.ones((8, 8)))
"""
    )
    run(str(tmp_path / "one"), tmp_path, script=twice)
    assert any("lambda" in name for name in os.listdir(tmp_path / "one-two"))


def test_a_process_without_a_home_runs_without_a_cache(tmp_path):
    """As in a container whose user is in no list of users."""
    homeless = """
import pathlib
def expanduser(self):
    raise RuntimeError("Could not determine home directory.")
pathlib.Path.expanduser = expanduser
"""
    ran = run("auto", tmp_path, script=homeless + SCRIPT)
    assert ran.stdout.strip() == "None" and "not kept: Could not determine home" in ran.stderr


@pytest.mark.slow
def test_a_saved_config_does_not_say_where_code_is_read_from(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(compilation_cache, "use", used.append)
    cfg = toys.recipe(toys.write_texts(tmp_path / "texts"), train__total_steps=1)
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, compilation_cache=str(tmp_path / "other")))
    train.train(cfg, tmp_path / "run")
    run_lib.load_model(str(tmp_path / "run"))
    assert used == [str(tmp_path / "other"), "auto"]


def test_a_home_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / ".cache").write_text("a file")
    ran = run("auto", tmp_path)
    assert ran.stdout.strip() == "None" and "note: programs that are compiled are not kept" in ran.stderr


@pytest.mark.parametrize(("most", "left"), [(100, 3), (25, 2), (10, 1), (9, 0)])
def test_the_oldest_programs_go_first(most, left, tmp_path):
    for age in range(3):
        (tmp_path / f"{age}").write_bytes(b"x" * 10)
        os.utime(tmp_path / f"{age}", (1000 - age, 1000 - age))
    (tmp_path / "link").symlink_to(tmp_path / "0")
    compilation_cache.prune(tmp_path, most)
    assert sorted(os.listdir(tmp_path)) == [*map(str, range(left)), "link"]
