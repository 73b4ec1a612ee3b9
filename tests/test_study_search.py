"""lm/study/search.py, searching.py: trials are drawn from what the run directories show, and from nothing else."""

import dataclasses
import math
import sys
import threading

import numpy as np
import pytest

from lm import study as study_lib
from lm.config import flatten, schema
from lm.config.schema import ConfigError
from lm.study import analysis, choice, integer, log_uniform, runs, searching, uniform
from lm.study.definition import Study, Table
from lm.study.search import Search, Seen, suggest
from lm.tracking import files
from tests import tool_modules
from tests.study_runs import RECIPE

SPACE = {"optim.learning_rate": log_uniform(1e-5, 1e-1), "model.dropout": uniform(0.0, 0.5)}


def search_of(sampler="random", trials=12, space=SPACE, **changes):
    return Search("nll", trials, space, sampler=sampler, **changes)


def study_of(search):
    return Study("made", "", (), (Table(search.metric),), (), RECIPE, search)


def loss_at(params):
    """Least, 1, at a learning rate of 1e-3 and a dropout of 0.1."""
    return 1 + math.log10(params["optim.learning_rate"] / 1e-3) ** 2 + (10 * (params["model.dropout"] - 0.1)) ** 2


def finished(trial, folder, nll=None):
    """Writes the run of a trial; returns how it ended."""
    config = schema.to_dict(trial.config)
    nll = loss_at(dict(flatten(config))) if nll is None else nll
    files.write_document(folder / "config.json", config)
    files.write_document(folder / "summary.json", {"nll": nll, "seconds": 1.0})
    return "done"


def drawn(study, root):
    return [trial.override for trial in searching.with_known(study, root).trials]


def test_random_draws_are_within_their_ranges_and_spread_as_they_say():
    space = {**SPACE, "model.num_layers": integer(1, 4), "optim.name": choice("adamw", "lion")}
    search = search_of(space=space)
    draws = [suggest(search, [Seen({}, "failed")] * number) for number in range(2000)]
    rates = np.array([draw["optim.learning_rate"] for draw in draws])
    assert rates.min() >= 1e-5 and rates.max() <= 1e-1 and abs(np.mean(np.log10(rates)) + 3) < 0.1
    assert abs(np.mean([draw["model.dropout"] for draw in draws]) - 0.25) < 0.01
    counts = np.bincount([draw["model.num_layers"] for draw in draws], minlength=5)[1:]
    assert counts.sum() == 2000 and (abs(counts - 500) < 100).all()
    assert {draw["optim.name"] for draw in draws} == {"adamw", "lion"}
    assert all(type(draw["model.num_layers"]) is int for draw in draws)
    assert (
        draws[7]
        == suggest(search, [Seen({}, "failed")] * 7)
        != suggest(dataclasses.replace(search, seed=1), [Seen({}, "failed")] * 7)
    )


def test_a_search_runs_as_many_trials_as_it_wants_and_a_second_start_runs_none(tmp_path):
    study, ran = study_of(search_of(trials=5)), []

    def run_one(trial, folder):
        ran.append(trial.hash)
        return finished(trial, folder)

    found = searching.run(study, tmp_path, run_one, lambda _: None)
    assert len(set(ran)) == len(ran) == len(found.trials) == 5
    searching.run(study, tmp_path, run_one, lambda _: None)
    assert len(ran) == 5
    analysed = analysis.analyse(study, tmp_path)
    assert len(analysed.tables[0].rows) == 5 and not analysed.errors


def test_fixed_values_that_json_spells_otherwise_are_known_again_when_the_trials_are_read(tmp_path):
    """A tuple is a list there."""
    fixed = {"optim.lr_rules": ((".*", 1.0),), "generate.stop": ("END",)}
    study, ran = study_of(search_of(trials=3, fixed=fixed)), []

    def run_one(trial, folder):
        ran.append(trial.hash)
        assert len(ran) <= 3, "the search does not end"
        return finished(trial, folder)

    found = searching.run(study, tmp_path, run_one, lambda _: None)
    assert len(set(ran)) == 3 and {trial.hash for trial in found.trials} == set(ran)
    assert all(fixed.items() <= trial.override.items() for trial in found.trials)
    assert drawn(study_of(search_of(fixed=fixed | {"generate.stop": ("END", "STOP")})), tmp_path) == []


def test_a_search_that_was_killed_resumes_its_trial_and_draws_what_it_would_have_drawn(tmp_path):
    study = study_of(search_of(trials=6))
    searching.run(study, tmp_path / "whole", finished, lambda _: None)
    ran = []

    def killed(trial, folder):
        ran.append(trial.hash)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return finished(trial, folder)

    with pytest.raises(KeyboardInterrupt):
        searching.run(study, tmp_path / "cut", killed, lambda _: None)
    searching.run(study, tmp_path / "cut", killed, lambda _: None)
    assert ran[2] == ran[3] and len(set(ran)) == 6
    assert drawn(study, tmp_path / "cut") == drawn(study, tmp_path / "whole")


def test_a_trial_that_fails_or_diverges_counts_and_is_told_as_failed(tmp_path):
    study, ran = study_of(search_of(trials=4)), []

    def run_one(trial, folder):
        ran.append(trial.hash)
        if len(ran) == 1:
            files.write_document(folder / runs.FAILURE, {"error": "step 3: loss nan"})
            return "failed"
        return finished(trial, folder, None if len(ran) > 2 else math.nan)

    found = searching.run(study, tmp_path, run_one, lambda _: None)
    seen = searching.seen_of(found, runs.find(found, tmp_path)[0])
    by_hash = {trial.hash: each for trial, each in zip(found.trials, seen, strict=True)}
    assert [by_hash[name].state for name in ran] == ["failed", "failed", "done", "done"]
    assert [by_hash[name].value is None for name in ran] == [True, True, False, False]


def test_a_metric_that_no_run_has_ends_the_search_after_its_first_trial(tmp_path):
    study, ran = study_of(dataclasses.replace(search_of(), metric="nl")), []
    with pytest.raises(
        ConfigError, match=r"is done and has no metric 'nl' \(did you mean 'nll'\?\); there are nll, sec"
    ):
        searching.run(study, tmp_path, lambda trial, folder: ran.append(trial) or finished(trial, folder), print)
    assert len(ran) == 1


def test_a_trial_that_is_killed_each_time_does_not_keep_the_search_busy(tmp_path):
    study = study_of(search_of(trials=3))
    ran = []
    searching.run(study, tmp_path, lambda trial, folder: ran.append(trial.hash) or "was killed", lambda _: None)
    assert len(ran) == len(set(ran)) == 3


def test_several_workers_at_once_draw_each_trial_once(tmp_path):
    study, ran, lock = study_of(search_of(trials=9)), [], threading.Lock()
    barrier = threading.Barrier(3, timeout=60)

    def run_one(trial, folder):
        with lock:
            ran.append(trial.hash)
        (folder / "lease.1").write_text("{}")  # running, as far as others can tell
        if len(ran) <= 3:
            barrier.wait()  # all three are running at once
        finished(trial, folder)
        (folder / "lease.1").unlink()
        return "done"

    workers = [threading.Thread(target=searching.run, args=(study, tmp_path, run_one, print)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(set(ran)) == len(drawn(study, tmp_path)) == 9


def test_a_space_without_values_left_ends_the_search(tmp_path):
    study = study_of(search_of(trials=5, space={"model.num_layers": integer(1, 3)}))
    ran = []

    def run_one(trial, folder):
        ran.append(trial.config.model.num_layers)
        return finished(trial, folder, 1.0)

    with pytest.raises(ConfigError, match=r"3 trials, .* the space has no value left"):
        searching.run(study, tmp_path, run_one, lambda _: None)
    assert sorted(ran) == [1, 2, 3]


def test_trials_of_another_space_are_left_out(tmp_path):
    study = study_of(search_of(trials=3))
    searching.run(study, tmp_path, finished, lambda _: None)
    narrow = {**SPACE, "optim.learning_rate": log_uniform(1e-9, 1e-8)}
    assert drawn(study_of(search_of(space=narrow)), tmp_path) == []
    assert drawn(study_of(search_of(fixed={"model.num_layers": 2})), tmp_path) == []
    assert len(drawn(study, tmp_path)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SEARCH = Search('nll', 3, {'optim.learning_rat': uniform(0, 1)}, sampler='random')", "did you mean"),
        ("SEARCH = Search('nll', 3, {'model.dropout': uniform(0, 2)}, sampler='random')", "model.dropout"),
        ("SEARCH = Search('nl', 3, {'model.dropout': uniform(0, .2)}, sampler='random')", "whether more or less"),
        ("SEARCH = Search('nll', 0, {'model.dropout': uniform(0, .2)}, sampler='random')", "at least 1"),
        ("SEARCH = Search('nll', 3, {'seed': integer(0, 2)}, {'seed': 1}, sampler='random')", "in its space and fixed"),
        ("SEARCH = Search('nll', 3, {'seed': integer(0, 2)}, sampler='grid')", "expected 'random' or 'tpe'"),
        ("SEARCH = Search('nll', 3, {'seed': integer(2, 2)}, sampler='random')", "the lesser first"),
        ("SEARCH = Search('nll', 3, {'seed': integer(0, 2)}, sampler='random')\ntrials = list", "keep one of them"),
        *(
            (f"SEARCH = Search('nll', 3, {{'generate.stop': choice({values})}}, sampler='random')", message)
            for values, message in (
                ("('a',), ('b', 'c')", r"'generate\.stop' has a choice \('a',\); expected a bool, a"),
                ("'a', None", r"'generate\.stop' has a choice None; expected a bool"),
                ("1.0, float('inf')", r"'generate\.stop' has a choice inf; expected .* a finite number"),
                ("", r"'generate\.stop' has no choice"),
            )
        ),
    ],
)
def test_a_search_with_a_mistake_is_refused_before_anything_runs(tmp_path, text, message):
    head = f"from lm.study import Search, choice, integer, uniform\nRECIPE = {RECIPE!r}\n"
    (tmp_path / "study.py").write_text(head + text)
    with pytest.raises(ConfigError, match=message):
        study_lib.load(tmp_path)


def test_the_tool_runs_a_search_and_lists_the_best_first(tmp_path, capsys, monkeypatch):
    from lm.study import sweep

    monkeypatch.setattr(sweep, "run_one", lambda trial, folder, environment: finished(trial, folder))
    (tmp_path / "study.py").write_text(
        f'"""Which rate?"""\nfrom lm.study import Search, log_uniform, uniform\nRECIPE = {RECIPE!r}\n'
        "SPACE = {'optim.learning_rate': log_uniform(1e-5, .1), 'model.dropout': uniform(0, .5)}\n"
        "SEARCH = Search('nll', 4, SPACE, sampler='random')"
    )
    tool_modules.call("sweep", tmp_path, f"--runs={tmp_path / 'runs'}")
    lines = capsys.readouterr().out.splitlines()
    values = [float(line.split()[2]) for line in lines if " nll " in line]
    assert len(values) == 4 and values == sorted(values) and lines[-1].startswith("4 of 4 trials")
    tool_modules.call("report", tmp_path, f"--runs={tmp_path / 'runs'}")
    assert "4 of 4 runs are done" in capsys.readouterr().out


# --- Optuna, which is not installed everywhere ----------------------------------------------------------------------


def test_without_optuna_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"needs Optuna: pip install -e '\.\[search\]'; or set sampler='random'"):
        suggest(search_of("tpe"), [])


def test_tpe_finds_better_values_than_random_draws():
    pytest.importorskip("optuna")

    def best(sampler, seed):
        search, seen = search_of(sampler, seed=1000 * seed), []
        for _ in range(40):
            params = suggest(search, seen)
            seen.append(Seen(params, "done", loss_at(params)))
        return min(each.value for each in seen)

    tpe, random = ([best(sampler, seed) for seed in range(5)] for sampler in ("tpe", "random"))
    assert np.median(tpe) < np.median(random)


def test_tpe_draws_the_same_from_the_same_runs_and_takes_running_ones_into_account():
    pytest.importorskip("optuna")
    search, rng = search_of("tpe"), np.random.default_rng(0)
    space = [{key: values.draw(rng) for key, values in SPACE.items()} for _ in range(15)]
    seen = [Seen(params, "done", loss_at(params)) for params in space]
    seen += [Seen({"optim.learning_rate": 1e-2, "model.dropout": 0.3}, "failed")]
    assert suggest(search, seen) == suggest(search, seen)
    near = min(seen[:15], key=lambda each: each.value).params
    told = {state: suggest(search, [*seen, *[Seen(near, state)] * 6]) for state in ("running", "failed")}
    assert told["running"] != told["failed"]  # the former count, as bad ones; the seed is the same


def test_a_search_by_tpe_goes_on_from_the_run_directories(tmp_path):
    pytest.importorskip("optuna")
    study = study_of(search_of("tpe", trials=14))
    searching.run(study, tmp_path, finished, lambda _: None)
    assert len(drawn(study, tmp_path)) == 14
    more = study_of(search_of("tpe", trials=16))
    found = searching.run(more, tmp_path, finished, lambda _: None)
    assert len(found.trials) == 16
