"""Tables and verdicts from run directories: planted differences are found, what is missing or damaged is shown."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from scipy import stats

from lm import run
from lm.config import schema
from lm.study import Table, analysis, arms, better, chain, definition, product, report, runs, seeds
from lm.study.analysis import analyse
from lm.tracking import files
from tests.study_runs import ROOT, make_study, write_run, write_runs

THREE = arms({"old": {}, "new": {"model.mlp_dim": 8}, "same": {"model.mlp_dim": 16}})
LUCK = (2, -1, 0.5, -1.5, 0, 1, -2)  # of a seed, whatever the arm
OWN = {"old": (1, -1, 1, -1, 0, 0, 0), "new": (1, 1, -1, -1, 0, 0, 0), "same": (-1, 1, 1, -1, 0, 0, 0)}
EFFECT = {"old": 0.0, "new": 0.04, "same": 0.0}


def accuracy(trial, effect=EFFECT):
    """Arms share the luck of a seed, which is larger than the difference of 'new', and have a little of their own."""
    return {"accuracy": 0.7 + effect[trial.arm] + 0.04 * LUCK[trial.seed] + 0.004 * OWN[trial.arm][trial.seed]}


def of(study, root, figures=accuracy):
    write_runs(root, study, figures)
    return analyse(study, root)


def three(number=5, **changes):
    changes = {"tables": (Table("accuracy", baseline="old"),), **changes}
    return make_study(product(THREE, seeds(number)), **changes)


def test_arms_that_share_their_seeds_are_compared_in_pairs(tmp_path):
    (table,) = of(three(), tmp_path).tables
    old, new, same = table.rows
    values = [list(row.values.values()) for row in table.rows]
    wanted = stats.ttest_rel(values[1], values[0])
    found = new.comparison
    assert found.difference.test == "paired" and found.difference.p == pytest.approx(wanted.pvalue)
    assert found.p == pytest.approx(2 * wanted.pvalue)  # the smaller of two
    assert (old.comparison, found.verdict, same.comparison.verdict) == (None, "better", "undecided")
    assert stats.ttest_ind(values[1], values[0], equal_var=False).pvalue > 0.05  # the pairs make it
    assert [row.is_best for row in table.rows] == [False, True, False]
    assert abs(same.comparison.difference.mean) < same.comparison.detectable


def test_arms_of_other_seeds_are_compared_by_welch(tmp_path):
    overrides = chain(product(THREE[:1], seeds(4)), [{**THREE[1], "seed": seed} for seed in (4, 5, 6)])
    study = make_study(overrides, tables=(Table("accuracy", baseline="old"),))
    (table,) = of(study, tmp_path).tables
    first, second = (list(row.values.values()) for row in table.rows)
    assert table.rows[1].comparison.difference.test == "Welch" and table.rows[1].comparison.seeds == (3, 4)
    wanted = stats.ttest_ind(second, first, equal_var=False)
    assert table.rows[1].comparison.p == pytest.approx(wanted.pvalue)


def test_a_failed_seed_is_shown_and_the_others_are_still_compared_in_pairs(tmp_path):
    study = three()
    lost = [next(t for t in study.trials if (t.arm, t.seed) == key) for key in (("new", 1), ("old", 3))]
    found = of(study, tmp_path, lambda trial: None if trial in lost else accuracy(trial))
    old, new, _ = found.tables[0].rows
    assert new.lacking == {1: "missing"} and old.lacking == {3: "missing"}
    assert new.comparison.difference.test == "paired" and new.comparison.seeds == (3, 3)
    values = [[row.values[seed] for seed in (0, 2, 4)] for row in (new, old)]
    assert new.comparison.difference.p == pytest.approx(stats.ttest_rel(*values).pvalue)
    text = report.markdown(found)
    assert "| old, 3 pairs |" in text and "new,4,5," in report.table_csv(found)
    assert "| new | 4 of 5: missing 1 |" in text and f"- new, seed 1: missing ({lost[0].hash})" in text


def test_less_is_better_where_the_metric_says_so(tmp_path):
    study = three(tables=(Table("nll", baseline="old"),), claims=(better("new", "old", "nll"),))
    found = of(study, tmp_path, lambda trial: {"nll": accuracy(trial)["accuracy"]})
    assert found.tables[0].rows[1].comparison.verdict == "worse" and found.tables[0].less_is_better
    assert found.claims[0].verdict == "contradicted"


@pytest.mark.parametrize(
    ("effect", "verdict"), [(0.04, "reproduced"), (-0.04, "contradicted"), (0.0, "undecided"), (0.001, "undecided")]
)
def test_a_claim_has_the_verdict_of_the_data(tmp_path, effect, verdict):
    study = three(claims=(better("new", "old", "accuracy"),))
    found = of(study, tmp_path, lambda t: accuracy(t, {"old": 0.0, "new": effect, "same": 0.0}))
    assert found.claims[0].verdict == verdict
    assert (f"- **{verdict}**: new is better than old by accuracy: difference") in report.markdown(found)


def test_claims_are_corrected_together(tmp_path):
    one, two = better("new", "old", "accuracy"), better("same", "old", "accuracy")
    found = of(three(claims=(one, two, two)), tmp_path)
    assert found.claims[0].comparison.p == pytest.approx(3 * found.claims[0].comparison.difference.p)


def test_a_single_seed_decides_nothing(tmp_path):
    found = of(three(1, claims=(better("new", "old", "accuracy"),)), tmp_path)
    assert found.claims[0].verdict == "undecided" and found.claims[0].comparison.why == "1 seed"
    assert "undecided: 1 seed" in report.markdown(found) and "nan" not in report.markdown(found)


def test_figures_without_spread_decide_nothing(tmp_path):
    found = of(three(), tmp_path, lambda trial: {"accuracy": {"old": 0.5, "new": 0.6, "same": 0.5}[trial.arm]})
    assert found.tables[0].rows[1].comparison.verdict == "undecided"
    assert "undecided: no spread over seeds" in report.markdown(found) and "nan" not in report.markdown(found)
    assert "nan" not in report.table_csv(found) and "nan" not in report.latex(found)


def test_rounding_is_no_spread(tmp_path):
    """.87 - .82 and .83 - .78 are one difference; as floats they are not."""
    figures = {"old": (0.82, 0.78), "new": (0.87, 0.83), "same": (0.82, 0.78)}
    found = of(three(2), tmp_path, lambda trial: {"accuracy": figures[trial.arm][trial.seed]})
    assert found.tables[0].rows[1].comparison.why == "no spread over seeds"
    assert not any(row.is_best for row in found.tables[0].rows)


def test_an_arm_some_of_whose_seeds_diverged_is_not_better(tmp_path):
    def figures(trial):
        is_lost = trial.arm == "new" and trial.seed > 2
        return {"loss": 1.0, "not_finite": ["accuracy"]} if is_lost else accuracy(trial)

    claims = better("new", "old", "accuracy"), better("same", "new", "accuracy")
    found = of(three(claims=claims), tmp_path, figures)
    assert [claim.verdict for claim in found.claims] == ["undecided"] * 2
    assert "seeds of 'new' that failed or diverged: 2; 'new' lacks seeds: not finite 2" in report.markdown(found)
    assert "| new | 3 of 5: not finite 2 |" in report.markdown(found)


def test_an_arm_some_of_whose_runs_ended_with_an_error_is_not_better(tmp_path):
    """A run that diverges ends so, see `lm.train.Diverged`."""
    study = three(claims=(better("new", "old", "accuracy"),))
    lost = [trial for trial in study.trials if trial.arm == "new" and trial.seed > 2]
    write_runs(tmp_path, study, lambda trial: None if trial in lost else accuracy(trial))
    for trial in lost:
        (tmp_path / trial.hash).mkdir()
        runs.write_record(tmp_path / trial.hash, trial, "abc123")
        files.write_document(tmp_path / trial.hash / runs.FAILURE, {"error": "step 7: loss nan", "status": 1})
    found = analyse(study, tmp_path)
    assert found.claims[0].verdict == found.tables[0].rows[1].comparison.verdict == "undecided"
    assert not any(row.is_best for row in found.tables[0].rows)
    assert "seeds of 'new' that failed or diverged: 2; 'new' lacks seeds: failed 2" in report.markdown(found)


def test_no_arm_is_best_by_a_metric_of_which_it_is_not_known_whether_more_is_better(tmp_path):
    figures = {"old": 1.0, "new": 5.0, "same": 1.5}
    study = three(tables=(Table("seconds_in_all"),))
    found = of(study, tmp_path, lambda trial: {"seconds_in_all": figures[trial.arm] + 0.1 * LUCK[trial.seed]})
    assert not any(row.is_best for row in found.tables[0].rows) and "is better;" not in report.markdown(found)


def test_runs_of_several_commits_are_named(tmp_path):
    study = three()
    of(study, tmp_path)
    record = json.loads((tmp_path / study.trials[0].hash / "trial.json").read_text())
    record.pop("crc32")
    files.write_document(tmp_path / study.trials[0].hash / "trial.json", record | {"commits": ["def456"]})
    (remark,) = analyse(study, tmp_path).remarks
    assert remark == "runs of 2 commits are compared; def456: old; abc123: old, new, same"


@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        ("eval", "max_tokens", 64, "its last start had eval.max_tokens=64, planned is 32768"),
        (None, "seed", 7, "its last start had seed=7, planned is 0"),
        ("model", "num_layers", 9, "its last start had model.num_layers=9, planned is 4"),
        ("model", "dropout", 0.5, "its last start had model.dropout=0.5, planned is 0.0"),
        ("data", "max_records", 7, "its last start had data.max_records=7, planned is 0"),
        ("checkpoint", "best_metric", "nll", "its last start had checkpoint.best_metric=nll"),
        ("model", None, None, "its config.json cannot be read (AttributeError"),
        ("model", "vocab_size", 2048, ""),  # filled in by the run
        ("model", "remat", "full", ""),  # to save memory
        ("eval", "batch_size", 4, ""),
        ("monitor", "log_every_steps", 3, ""),
    ],
)
def test_a_run_that_was_resumed_with_another_config_is_left_out(tmp_path, section, key, value, says):
    study = three(1)
    write_runs(tmp_path, study, accuracy)
    config = schema.to_dict(study.trials[0].config)
    if key:
        (config[section] if section else config)[key] = value
    else:
        config[section] = value
    files.write_document(tmp_path / study.trials[0].hash / "config.json", config)
    found = analyse(study, tmp_path)
    assert ([each.why for each in found.outcomes.values() if each.why] or [""])[0].startswith(says)
    assert bool(says) == bool(found.errors)


def test_a_folder_with_the_run_of_another_trial_is_not_run_into(tmp_path, monkeypatch):
    """`a` ran while a dropout of .25 was the default, which is now what `b` sets."""
    (a,) = make_study([{"arm": "a"}]).trials
    b = dataclasses.replace(make_study([{"arm": "b", "model.dropout": 0.25}]).trials[0], hash=a.hash)
    write_run(tmp_path, b, {"loss": 1.0})
    outcomes, _ = runs.find(make_study([{"arm": "a"}, {"arm": "b", "model.dropout": 0.25}]), tmp_path)
    first, second = outcomes.values()
    assert (first.state, second.state) == ("damaged", "done") and "has the run of another trial" in first.why


@pytest.mark.parametrize("recipe", ["quickstart_pretrain", "mae_cifar10", "ud_pos:scratch", "t5_tinystories"])
def test_what_a_run_fills_in_is_no_other_config(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file, _, argument = recipe.partition(":")
    name = f"configs/{file}.py" + (f":{argument}" if argument else "")
    config = definition.configure(name, {"init_from": "", "tokenizer.path": ""})
    resolved = run.plan(config, None).cfg
    files.write_document(tmp_path / "config.json", schema.to_dict(resolved))
    assert resolved != config and runs.difference_from(tmp_path, config) == ""


def test_a_run_is_found_when_a_default_becomes_what_the_study_sets(tmp_path, monkeypatch):
    study = make_study([{"model.dropout": 0.25}])
    write_run(tmp_path, study.trials[0], {"loss": 1.0})
    usual = definition.defaults(study.trials[0].config.task.name)
    monkeypatch.setattr(definition, "defaults", lambda task: {**usual, "model.dropout": 0.25})
    study = make_study([{"model.dropout": 0.25}])
    outcomes, remarks = runs.find(study, tmp_path)
    assert [each.state for each in outcomes.values()] == ["done"] and not remarks


def test_a_test_set_can_be_added_to_a_study_that_has_runs(tmp_path):
    def study_with(*names):
        recipe, sets = tmp_path / f"{'_'.join(names)}.py", {name: {"path": "x.txt", "format": "text"} for name in names}
        recipe.write_text(
            "from configs import quickstart_pretrain\n\n\ndef get_config():\n"
            f"    c = quickstart_pretrain.get_config()\n    c.eval.sets = {sets}\n    return c\n"
        )
        return make_study([{"arm": "a"}], recipe=str(recipe))

    write_run(tmp_path, study_with("wiki").trials[0], {"loss": 1.0})
    for names, state in ((("wiki", "test"), "done"), (("wiki", "other"), "missing")):
        outcomes, _ = runs.find(study_with(*names), tmp_path)
        assert [each.state for each in outcomes.values()] == [state]


# --- what is wrong is named, and the rest reported ----------------------------------------------------------------


def test_a_metric_that_no_run_has_is_named_and_the_other_table_is_there(tmp_path):
    study = three(tables=(Table("acuracy"), Table("accuracy", baseline="old")), claims=(better("new", "old", "f1"),))
    found = of(study, tmp_path)
    assert [bool(table.rows) for table in found.tables] == [False, True]
    assert "no run has a metric 'acuracy' (did you mean 'accuracy'?)" in found.errors[0]
    assert "claim 'new is better than old by f1': no run has a metric 'f1'" in found.errors[1]
    assert "did you mean 'accuracy'" in report.markdown(found) and "did you mean" in report.page(found)


def test_two_runs_of_one_config_with_different_results_are_an_error(tmp_path):
    study = three()
    write_runs(tmp_path, study, accuracy)
    copy = write_run(tmp_path / "other machine", study.trials[0], {"accuracy": 0.1})
    copy.rename(tmp_path / "copy")
    found = analyse(study, tmp_path)
    assert found.tables[0].rows[0].lacking == {0: "damaged"} and len(found.tables[0].rows[0].values) == 4
    assert "two runs of one config differ: accuracy is 0.1 in" in found.errors[0] and "copy" in found.errors[0]


def test_a_copy_with_the_same_results_counts_once(tmp_path):
    study = three()
    write_runs(tmp_path, study, accuracy)
    copy = write_run(tmp_path / "other machine", study.trials[0], accuracy(study.trials[0]))
    files.write_document(copy / "summary.json", {**accuracy(study.trials[0]), "seconds": 99.0, "mfu": 0.1})
    copy.rename(tmp_path / "copy")
    found = analyse(study, tmp_path)
    assert not found.errors and len(found.tables[0].rows[0].values) == 5
    assert "has the same config" in found.remarks[0]


def damaged_row(folder):
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"step": 10', b'"step": 11', 1))


def damaged_summary(folder):
    path = folder / "summary.json"
    path.write_bytes(path.read_bytes()[:-20])


def damaged_record(folder):
    (folder / "trial.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "says"),
    [(damaged_row, "metrics.jsonl:2"), (damaged_summary, "summary.json is damaged"), (damaged_record, "trial.json")],
)
def test_a_damaged_file_costs_its_own_cell_only(tmp_path, damage, says):
    study = three()
    write_runs(tmp_path, study, accuracy)
    damage(tmp_path / study.trials[0].hash)
    found = analyse(study, tmp_path)
    assert len(found.errors) == 1 and says in found.errors[0] and "old, seed 0" in found.errors[0]
    assert found.tables[0].rows[0].lacking == {0: "damaged"}
    assert found.tables[0].rows[1].comparison.verdict == "better"


def test_a_run_whose_config_the_study_no_longer_has_is_named_and_left_out(tmp_path):
    before = three(6)
    write_runs(tmp_path, before, accuracy)
    found = analyse(three(5), tmp_path)
    assert len(found.remarks) == 3
    assert any("is a run of 'old', seed 5, with a config that the study no" in remark for remark in found.remarks)
    assert not found.errors and len(found.tables[0].rows[0].values) == 5


def test_a_default_that_has_changed_since_is_an_error(tmp_path):
    study = three()
    write_runs(tmp_path, study, accuracy)
    path = tmp_path / study.trials[0].hash / "trial.json"
    content = json.loads(path.read_text())
    content["config"]["optim"]["weight_decay"] = 0.123
    del content["crc32"]
    files.write_document(path, content)
    (error,) = analyse(study, tmp_path).errors
    assert "its config has optim.weight_decay=0.123, the trial" in error


def test_a_metric_that_was_not_finite_is_said(tmp_path):
    study = three(2)
    write_runs(
        tmp_path,
        study,
        lambda t: {"accuracy": None, "loss": 1.0, "not_finite": ["accuracy"]} if t.seed else accuracy(t),
    )
    assert analyse(study, tmp_path).tables[0].rows[0].lacking == {1: "not finite"}


# --- formats ------------------------------------------------------------------------------------------------------


def test_csv_has_the_unrounded_figures_and_every_trial(tmp_path):
    found = of(three(), tmp_path)
    rows = list(csv.DictReader(io.StringIO(report.table_csv(found))))
    values = list(found.tables[0].rows[1].values.values())
    assert float(rows[1]["mean"]) == pytest.approx(np.mean(values), rel=1e-15)
    assert rows[1]["verdict"] == "better" and rows[1]["test"] == "paired" and rows[0]["p"] == ""
    trials = list(csv.DictReader(io.StringIO(report.trials_csv(found))))
    assert [float(row["accuracy"]) for row in trials[5:10]] == values
    assert {row["state"] for row in trials} == {"done"} and {row["commits"] for row in trials} == {"abc123"}


def test_the_best_is_bold_only_where_it_beats_each_other_arm(tmp_path):
    found = of(three(), tmp_path)
    assert report.markdown(found).count("| **0.7") == 1 and report.latex(found).count("\\textbf") == 1
    tied = of(three(), tmp_path / "tied", lambda t: accuracy(t, {"old": 0.0, "new": 0.04, "same": 0.04}))
    assert "**" not in report.markdown(tied).split("Bold")[0] and "textbf" not in report.latex(tied)


def test_names_of_arms_are_escaped(tmp_path):
    odd = "50%_<b>|&$\\q$"
    study = make_study(product(arms({odd: {}, "b": {"model.mlp_dim": 8}}), seeds(3)), tables=(Table("accuracy", "b"),))
    found = of(study, tmp_path, lambda trial: {"accuracy": 0.1 * trial.seed + (trial.arm == odd) * 0.01 * trial.seed})
    assert r"50\%\_$<$b$>$|\&\$\textbackslash{}q\$" in report.latex(found)
    assert "50%_<b>\\|&$\\q$" in report.markdown(found) and "<b>|" not in report.page(found)


def test_all_files_are_written_and_the_page_needs_no_other(tmp_path):
    found = of(three(claims=(better("new", "old", "accuracy"),)), tmp_path / "runs")
    written = report.write(found, tmp_path / "out")
    assert [path.name for path in written] == ["results.md", "results.csv", "trials.csv", "results.tex", "report.html"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 1 and "reproduced" in page and "jax 1" in page and "abc123" in page
    assert (
        "src=" not in page
        and "<link" not in page
        and "http"
        not in page.replace("http://www.w3.org", "")
        .replace("http://purl.org", "")
        .replace("http://creativecommons.org", "")
        .replace("https://matplotlib.org", "")
    )


def test_a_learning_curve_is_the_mean_at_steps_that_all_seeds_have(tmp_path):
    study = three(3)
    for trial in study.trials:
        write_run(tmp_path, trial, accuracy(trial), steps=(0, 10, 20) if trial.seed else (0, 10))
    found = analyse(study, tmp_path)
    steps, mean, low, high = report._curve(found, "old", "accuracy")
    assert steps == [0, 10] and np.all(low < mean) and np.all(mean < high)
    assert mean[0] == pytest.approx(np.mean(list(found.tables[0].rows[0].values.values())))
    assert analysis.analyse(three(3), tmp_path / "none").tables[0].rows[0].mean is None
