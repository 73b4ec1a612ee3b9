"""Trials side by side in one process are, each, the run that they are alone."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lm import checkpoint, input_pipeline, lease, param_paths, program, train
from lm import run as run_lib
from lm.config import ConfigError
from lm.parallel import mesh as mesh_lib
from lm.preemption import Interrupt
from lm.study import definition, group, product, runs, seeds, sweep
from lm.study.definition import Study
from lm.tracking import files
from tests import toys
from tests.study_runs import ROOT

STEPS = 12
RATES = {"optim.learning_rate": 3e-3}, {"optim.learning_rate": 1e-2}
KEYS = ["seed", "optim.learning_rate"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    """The file of a recipe on a little text, with a tokenizer that is trained, evaluations and saves on the way."""
    folder = tmp_path_factory.mktemp("group")
    texts = toys.write_texts(folder / "texts")
    path = folder / "recipe.py"
    path.write_text(
        "from tests import toys\nfrom pathlib import Path\nfrom lm.config import schema\n"
        "from ml_collections import ConfigDict\n\ndef get_config(arg=None):\n"
        f"    changes = dict(eval__every_steps=4, checkpoint__every_steps=4, train__total_steps={STEPS})\n"
        f"    return ConfigDict(schema.to_dict(toys.recipe(Path({str(texts)!r}), **changes)))\n"
    )
    return str(path)


def study_of(recipe: str, *overrides) -> Study:
    made = product([{"arm": "all"}], overrides or RATES, seeds(2))
    return Study("made", "", definition.make_trials(recipe, made), (), ())


def prepared(study: Study, root: Path) -> list[Path]:
    folders = []
    for trial in study.trials:
        folders.append(root / trial.hash)
        folders[-1].mkdir(parents=True, exist_ok=True)
        runs.write_record(folders[-1], trial, "abc123")
    return folders


def together(study: Study, root: Path, at_once=0, stacked=0, interrupt=None, keys=KEYS) -> dict[Path, str]:
    return group.run_group(prepared(study, root), keys, at_once, lambda _: None, interrupt or Interrupt(), stacked)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """trial -> the folder of its run alone, on one device."""
    root = tmp_path_factory.mktemp("alone")

    @functools.cache
    def run(key: str, config) -> Path:
        with lease.hold_for_run(root / key) as check:
            train.start_or_resume(config, root / key, False, check, Interrupt(), OneDevice())
        return root / key

    return lambda trial: run(trial.hash, trial.config)


class OneDevice(train.Alone):
    def devices(self):
        return jax.devices()[:1]


def rows(folder: Path) -> list[dict]:
    speed = ("seconds", "tokens_per_second", "input_bound", "mfu", "mfu_causal")
    return [{k: v for k, v in row.items() if k not in speed} for row in files.read_rows(folder / "metrics.jsonl")]


def assert_as_alone(there: Path, alone: Path) -> None:
    """The same rows, within 1e-5 of each other, and the same position in the same data."""
    mine, wanted = rows(there), rows(alone)
    assert [(row["step"], row["split"]) for row in mine] == [(row["step"], row["split"]) for row in wanted]
    assert len([row for row in mine if row["split"] == "train"]) == STEPS
    for row, other in zip(mine, wanted, strict=True):
        assert row.keys() == other.keys()
        for key in row:
            if key not in ("split", "accuracy"):  # of which one token decides
                np.testing.assert_allclose(row[key], other[key], rtol=1e-5, err_msg=f"{key} at step {row['step']}")
    saved, other = (checkpoint.list_saved(folder) for folder in (there, alone))
    assert [each.step for each in saved] == [each.step for each in other]
    assert all(mine.info["data"] == theirs.info["data"] for mine, theirs in zip(saved, other, strict=True))
    assert (there / "tokenizer.model").read_bytes() == (alone / "tokenizer.model").read_bytes()
    assert files.read_document(there / "summary.json")["steps"] == STEPS and (there / "report.html").exists()
    assert "resuming" not in (there / runs.LOG).read_text()


@pytest.mark.parametrize(
    ("at_once", "stacked"),
    [
        pytest.param(2, 0, id="threads", marks=pytest.mark.slow),
        pytest.param(4, 2, id="two devices", marks=pytest.mark.slow),
        pytest.param(3, 3, id="one waits"),
    ],
)
def test_each_trial_is_as_if_it_had_run_alone(at_once, stacked, recipe, alone, tmp_path, monkeypatch):
    """Four trials: in two threads; two on each of two devices; three in a stack, of which the fourth takes a place."""
    reads = []
    load = input_pipeline.load
    monkeypatch.setattr(input_pipeline, "load", lambda *args: reads.append(1) or load(*args))
    study = study_of(recipe)
    assert set(together(study, tmp_path, at_once, stacked).values()) == {runs.DONE}
    assert len(reads) == 1
    for trial in study.trials:
        if trial in (study.trials[1], study.trials[-1]):  # in a stack: neither the first, and one that comes later
            assert_as_alone(tmp_path / trial.hash, alone(trial))
        assert runs.look(tmp_path / trial.hash).state == "done"
        assert runs.difference_from(tmp_path / trial.hash, trial.config) == ""


@pytest.mark.slow
def test_a_trial_that_diverges_or_fails_ends_alone_and_frees_its_place(recipe, alone, tmp_path):
    study = study_of(recipe, *RATES, {"optim.learning_rate": 1e30})
    spoilt = prepared(study, tmp_path)[1]
    (spoilt / "metrics.jsonl").mkdir()
    ended = together(study, tmp_path, at_once=3, stacked=3)
    for trial in study.trials:
        folder, how = tmp_path / trial.hash, ended[tmp_path / trial.hash]
        if trial.config.optim.learning_rate == 1e30:
            assert how.startswith("failed: step ") and "loss nan" in how
            assert runs.look(folder).state == "failed" and "there is no checkpoint yet" in runs.look(folder).why
        elif folder == spoilt:
            assert how.startswith("failed: ") and "metrics.jsonl" in runs.look(folder).why
        else:
            assert how == runs.DONE
            assert_as_alone(folder, alone(trial))


class StopsAfter(Interrupt):
    """As if Ctrl-C came in step 6 of the first trial that gets there."""

    def __init__(self):
        super().__init__()
        self.asked = threading.Event()

    def requested(self, step):
        if step >= 6:
            self.asked.set()
        return self.asked.is_set()


@pytest.mark.slow
def test_trials_that_were_stopped_go_on_where_they_were(recipe, alone, tmp_path):
    study = study_of(recipe)
    ended = together(study, tmp_path, at_once=2, stacked=2, interrupt=StopsAfter())
    assert sorted(ended.values()) == ["was not started", "was not started", runs.STOPPED, runs.STOPPED]
    steps = [checkpoint.list_saved(tmp_path / trial.hash) for trial in study.trials]
    assert sorted(saved[-1].step if saved else 0 for saved in steps)[:2] == [0, 0]
    assert 6 <= max(saved[-1].step for saved in steps if saved) < STEPS
    assert set(together(study, tmp_path, at_once=2, stacked=2).values()) == {runs.DONE}
    for trial in study.trials:
        mine, wanted = rows(tmp_path / trial.hash), rows(alone(trial))
        assert [row["step"] for row in mine] == [row["step"] for row in wanted]
        np.testing.assert_allclose([row["loss"] for row in mine], [row["loss"] for row in wanted], rtol=1e-5)


def test_a_trial_that_another_process_has_is_left_to_it(recipe, tmp_path):
    study = study_of(recipe, RATES[0])
    folders = prepared(study, tmp_path)
    with lease.hold(folders[0]):
        ended = together(study, tmp_path, at_once=1, keys=["seed"])
    assert list(ended.values()) == [runs.ELSEWHERE, runs.DONE]


def test_what_differs_in_more_than_numbers_is_another_group(recipe):
    base = {"optim.learning_rate": 1e-3}
    same = [{}, {"seed": 5}, {"optim.learning_rate": 1.0}, {"optim.weight_decay": 0.0}, {"optim.eps": 0.5}]
    other = [
        {"model.num_layers": 1},
        {"data.batch_size": 8},
        {"train.total_steps": 13},
        {"model.dropout": 0.2},
        {"optim.ema_decay": 0.5},
        {"optim.b2": 0.9999},  # of an argument 1 - b2 would be rounded
        {"optim.name": "lion"},
    ]
    keys = [group.key_of(definition.configure(recipe, base | override)) for override in same + other]
    assert len(set(keys[: len(same)])) == 1 and len(set(keys)) == 1 + len(other)
    for alone in ({"mesh.fsdp": 2}, {"monitor.profile.num_steps": 1}):
        assert group.key_of(definition.configure(recipe, alone)) == ""


def test_trials_of_another_group_are_refused(recipe, tmp_path):
    study = study_of(recipe, RATES[0], {"model.dropout": 0.2, "optim.learning_rate": 1e-3})
    with pytest.raises(ValueError, match="differ in more than seed"):
        together(study, tmp_path)
    with pytest.raises(ValueError, match="differ in more than seed; run them one by one"):
        together(study_of(recipe), tmp_path, keys=["seed"])


def run_of(tokenizer: str, mesh: str = "mesh"):
    return SimpleNamespace(plan=SimpleNamespace(tokenizer=SimpleNamespace(hash=tokenizer * 64)), mesh=mesh)


def test_rows_are_those_of_the_run_s_own_tokenizer(monkeypatch):
    """Steps are compiled with the bytes of each id: another tokenizer's metrics would be those of other text."""
    asked = []

    def prepare(planned, mesh, say, begun, like):
        asked.append(like)
        return like or run_of(planned.tokenizer.hash[0] if planned.tokenizer else "n")

    monkeypatch.setattr(run_lib, "prepare", prepare)
    new, old = SimpleNamespace(tokenizer=None), run_of("a").plan
    shared = group.Shared(KEYS)
    first = shared.prepare(old, "mesh", print, {"step": 3})  # it has begun, with its own
    assert shared.prepare(old, "mesh", print, {"step": 5}) is first and asked == [None, first]
    with pytest.raises(ConfigError, match=r"tokenizer is nnnn.* beside it aaaa.*--at_once=1"):
        shared.prepare(new, "mesh", print, None)
    assert asked[-1] is None, "a new run reads the data as it is now"
    shared = group.Shared(KEYS)
    first = shared.prepare(new, "mesh", print, None)
    assert shared.prepare(new, "other device", print, None) is first


def test_a_trial_that_another_process_has_ended_meanwhile_is_not_run_again(recipe, tmp_path):
    study = study_of(recipe)
    folders = prepared(study, tmp_path)
    runs.fail(folders[0], "before")
    trials = group.Trials({folder: folder.name for folder in folders}, print)
    assert [trials.taken(folder) for folder in folders] == [""] * 4
    os.utime(folders[0] / runs.FAILURE, (1, 1))
    files.write_document(folders[1] / "summary.json", {"loss": 1.0})
    with lease.hold(folders[2]):
        found = [trials.taken(folder) for folder in folders]
    assert found == ["failed, by another process", "done, by another process", runs.ELSEWHERE, ""]


def test_a_step_that_fails_for_all_ends_the_device_and_fails_no_trial(recipe, tmp_path, monkeypatch):
    def step(self, run, batch_size):
        def fail(*_):
            raise MemoryError("RESOURCE_EXHAUSTED")

        return fail

    monkeypatch.setattr(group.Shared, "step", step)
    study = study_of(recipe)
    ended = together(study, tmp_path, at_once=2, stacked=2)
    assert len(ended) == 2 and all(
        "interrupted: the step of all trials on this device failed" in how for how in ended.values()
    )
    states = [runs.look(tmp_path / trial.hash).state for trial in study.trials]
    assert states == ["interrupted"] * 4


def test_trials_that_do_not_fit_on_a_device_have_a_process_each(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "run_together", lambda *args: group.DOES_NOT_FIT)
    alone = []
    monkeypatch.setattr(sweep, "run_one", lambda trial, *_: alone.append(trial) or "done")
    study, said = study_of(recipe), []
    sweep.run_all(study, study.trials, tmp_path, environment={}, retry_failed=False, say=said.append, at_once=0)
    assert alone == list(study.trials) and group.DOES_NOT_FIT in said
    small = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1000}, platform="tpu")
    assert group.most_stacked(study.trials[0].config, small) == 0
    monkeypatch.setattr(jax, "local_devices", lambda: [small])
    with pytest.raises(group.DoesNotFit):
        together(study, tmp_path)


def test_a_trial_whose_log_cannot_be_written_is_named(recipe, tmp_path):
    study = study_of(recipe, RATES[0])
    folders = prepared(study, tmp_path)
    for folder in folders:
        (folder / runs.LOG).mkdir()
    said = []
    ended = group.run_group(folders, ["seed"], 2, said.append, Interrupt())
    assert all(how.startswith("failed: ") and runs.LOG in how for how in ended.values())
    assert len(ended) == 2 and any("seed 1: failed" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_every_number_of_every_optimizer_may_be_an_argument(name, recipe):
    """A step with the numbers of another config is that config's step."""

    def ready(**changes):
        overrides = {"optim.name": name, "optim.schedule": "linear", "model.dropout": 0.0} | changes
        cfg = definition.configure(recipe, overrides)
        mesh = mesh_lib.make_mesh(cfg.mesh, jax.devices()[:1])
        return run_lib.prepare(run_lib.plan(cfg, None), mesh, lambda _: None)

    values = {
        "optim.learning_rate": 0.02,
        "optim.end_lr_ratio": 0.3,
        "optim.eps": 1e-3,
    }
    values |= {"optim.weight_decay": 0.4, "seed": 7}
    run = ready()
    values = {key: values[key] for key in program.NUMBERS}
    other = ready(**values)
    batch = next(batches := run_lib.train_batches(run))
    batches.close()
    place = run_lib.placer(run.mesh, run.cfg.data.batch_size)
    with jax.set_mesh(run.mesh):
        params = jax.jit(run.program.model.init)(jax.random.key(0))
        state = jax.jit(run.program.init_state)(params)
        step = jax.jit(run.program.step_with)
        for _ in range(2):
            mine, _ = step(group.values_of(other.cfg, list(values)), state, place(batch))
            unchanged, _ = step({}, state, place(batch))
            state, _ = jax.jit(other.program.step_with)({}, state, place(batch))
    found, wanted, left = (param_paths.flatten(each.params) for each in (mine, state, unchanged))
    for path in found:
        if not path.endswith("key/bias"):  # whose gradient is rounding alone, and lion takes its sign
            np.testing.assert_allclose(found[path], wanted[path], rtol=2e-6, atol=2e-7, err_msg=path)
    assert any(not np.allclose(found[path], left[path], rtol=1e-3) for path in found)


@pytest.mark.slow
def test_a_sweep_that_is_killed_again_and_again_ends_as_if_it_had_not(recipe, alone, tmp_path):
    """kill -9 of the process of four trials at six moments, most of them in training."""
    study = study_of(recipe)
    folders = prepared(study, tmp_path)
    command = [sys.executable, "-m", "lm.study.group", "--at_once=2", f"--keys={','.join(KEYS)}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    moments, died = np.random.default_rng(0).uniform(0.0, 4.0, 6), 0

    def start():
        process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment)
        process.stdin.write("".join(f"{folder}\n" for folder in folders))
        process.stdin.close()
        return process

    assert start().wait() == 0  # what is compiled is kept: the kills then hit training
    for folder in folders:
        for path in folder.iterdir():
            if path.name != runs.RECORD:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    for moment in moments:
        process, before = start(), time.monotonic()
        while process.poll() is None and not any((folder / "metrics.jsonl").exists() for folder in folders):
            time.sleep(0.01)
        while process.poll() is None and time.monotonic() - before < 60 and moment > 0:
            time.sleep(0.01)
            moment -= 0.01
        process.send_signal(signal.SIGKILL)
        died += process.wait() == -signal.SIGKILL
    assert died >= 3 and start().wait() == 0
    for trial in study.trials:
        mine, wanted = rows(tmp_path / trial.hash), rows(alone(trial))
        assert [row["step"] for row in mine] == [row["step"] for row in wanted]
        np.testing.assert_allclose([row["loss"] for row in mine], [row["loss"] for row in wanted], rtol=1e-5)


def test_a_sweep_trains_those_that_differ_in_numbers_together_and_the_others_alone(recipe, monkeypatch, tmp_path):
    made = product([{"arm": "all"}], [{"model.dropout": 0.0}, {"model.dropout": 0.1}], seeds(3))[:4]
    study = Study("made", "", definition.make_trials(recipe, made), (), ())
    batches = sweep.batches(study.trials, at_once=0)
    assert [[trial.config.seed for trial in batch] for batch in batches] == [[0, 1, 2], [0]]
    assert [len(batch) for batch in sweep.batches(study.trials, at_once=1)] == [1] * 4
    asked = []
    monkeypatch.setattr(sweep, "run_together", lambda *args: asked.append(args) or "was killed by SIGKILL")
    monkeypatch.setattr(sweep, "run_one", lambda *args: asked.append(args) or "done")
    said: list[str] = []
    how = {"environment": os.environ, "retry_failed": False, "say": said.append, "at_once": 0}
    sweep.run_all(study, study.trials, tmp_path, **how)
    (_, together, folders, *_), (one, *_) = asked
    assert [trial.config.seed for trial in together] == [0, 1, 2] and one is study.trials[3]
    assert folders == [tmp_path / trial.hash for trial in study.trials[:3]]
    assert "the process of these trials was killed by SIGKILL" in said


@pytest.mark.slow
def test_the_tool_trains_trials_together_stops_and_goes_on(recipe, alone, tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.py").write_text(
        f"from lm.study import product, seeds\nRECIPE = {recipe!r}\n"
        "def trials():\n    rates = [{'optim.learning_rate': 3e-3}, {'optim.learning_rate': 1e-2}]\n"
        "    return product([{'arm': 'all'}], rates, seeds(2))\n"
    )
    command = [sys.executable, str(ROOT / "tools" / "sweep.py"), "study", "--runs=runs"]
    how = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "text": True}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **how)
    while process.poll() is None and not any((tmp_path / "runs").glob("*/checkpoints/4")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode in (143, 1), said
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300, check=False, **how)
    assert done.returncode == 0 and "all 4 trials are done" in done.stdout, done.stdout
    assert "trials in one process" in said + done.stdout
    for trial in study_of(recipe).trials:
        losses = [[row["loss"] for row in rows(each)] for each in (tmp_path / "runs" / trial.hash, alone(trial))]
        np.testing.assert_allclose(*losses, rtol=1e-5)
