"""lm/eval_sets.py: named sets in a run, which of them decides, what is never read, and what is refused."""

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from lm import checkpoint, config, eval_sets, input_pipeline, predict, scoring, train
from lm import run as run_lib
from lm.checkpoint import CheckpointError, resume
from lm.checkpoint.hf import card
from lm.config import MeshConfig, schema
from lm.config.schema import ConfigError
from lm.corpus import pipeline, workers
from lm.data.readers import python_stdlib, registry
from lm.data.record import DataError
from lm.evaluation import metrics
from lm.evaluator import Evaluator
from lm.parallel import mesh as mesh_lib
from lm.tasks import build_config, build_saved_config, task_config
from lm.tracking import report
from lm.tracking.tracker import Tracker
from tests import small_sets, tool_modules, toys, used_runs

LM, CLASSES = used_runs.KINDS["causal_lm"], used_runs.KINDS["classification"]
LINES = {"format": "text", "separator": "\n"}
TASK = task_config("prompting", labels=("neg", "pos"), templates=("{text} It is {label:bad|good}.",)).to_dict()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Texts to train on, four other texts, and labelled sentences."""
    folder = tmp_path_factory.mktemp("data")
    texts = {f"text{seed}": LM.write(folder / str(seed), seed, 12) for seed in range(1, 5)}
    return {"train": LM.write(folder / "train", 0, 40), "labelled": CLASSES.write(folder / "labelled", 9, 16)} | texts


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    toys.use_one_device(monkeypatch)
    monkeypatch.setattr(report, "write_report", lambda workdir: workdir / "report.html")


def one_device():
    return mesh_lib.make_mesh(MeshConfig(), jax.devices()[:1])


def recipe(files, sets=None, **changes):
    settings = {"data__separator": "\n", "train__total_steps": 4, "eval__every_steps": 2, "eval__max_tokens": 0}
    return toys.recipe(files["train"], eval__sets=sets or {}, **settings | changes)


def text(files, number: int) -> dict[str, str]:
    return {"path": str(files[f"text{number}"])}


def labelled(files) -> dict[str, Any]:
    """A set of another task than the run's."""
    return {"path": str(files["labelled"]), "format": "jsonl", "task": TASK}


def evaluations(workdir: Path) -> list[dict]:
    """The evaluations of a run, without their times."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "crc32")} for row in rows if row["split"] == "eval"]


def losses(workdir: Path) -> list[float]:
    """The training losses of a run."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


def of_set(row: dict, name: str) -> dict:
    """The metrics of a set by their own names."""
    if name == "valid":
        return {key: value for key, value in row.items() if "/" not in key and key not in ("step", "split")}
    return {key.removeprefix(f"{name}/"): value for key, value in row.items() if key.startswith(f"{name}/")}


class Whole(NamedTuple):
    """A run with sets of all kinds. The file of `test` is no text; `opened` are the files that Python opened."""

    cfg: config.Config
    workdir: Path
    broken: Path
    opened: list[str]


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    broken = folder / "test.txt"
    broken.write_bytes(b"\xff\xfe\xff")
    sets = {"valid": text(files, 1), "second": text(files, 2), "third": text(files, 3) | LINES}
    sets |= {"labelled": labelled(files), "test": {"path": str(broken)}}
    cfg, names, is_on = recipe(files, sets, checkpoint__every_steps=2), [], [True]  # a hook cannot be removed
    sys.addaudithook(lambda event, args: names.append(str(args[0])) if is_on and event == "open" else None)
    with pytest.MonkeyPatch.context() as patch:
        toys.use_one_device(patch)
        train.train(cfg, folder / "run")
        is_on.clear()
    return Whole(cfg, folder / "run", broken, names)


def test_the_scores_of_a_set_are_those_of_a_run_that_has_its_file_as_eval_path(files, whole, tmp_path):
    """Three texts and a set of another task in one run; and `valid` in either spelling."""
    rows, summary = evaluations(whole.workdir), json.loads((whole.workdir / "summary.json").read_text())
    assert [row["step"] for row in rows] == [0, 2, 4]
    for number, name in ((1, "valid"), (2, "second"), (3, "third")):
        train.train(recipe(files, data__eval_path=str(files[f"text{number}"])), tmp_path / name)
        alone = evaluations(tmp_path / name)
        assert [of_set(row, name) for row in rows] == [of_set(row, "valid") for row in alone]
        assert losses(whole.workdir) == losses(tmp_path / name)
        assert {"loss", "perplexity", "bits_per_byte"} <= of_set(rows[0], name).keys()
    assert {"loss", "nll", "accuracy", "f1", "matthews"} == of_set(rows[0], "labelled").keys()
    assert rows[2]["second/loss"] not in (rows[2]["loss"], rows[2]["third/loss"], rows[0]["second/loss"])
    assert summary["second/loss"] == rows[2]["second/loss"]
    assert summary["before"]["labelled/f1"] == rows[0]["labelled/f1"]


def test_a_classifier_has_the_perplexity_of_texts_and_a_language_model_started_from_it_the_same(files, tmp_path):
    """The body of a model with a head is evaluated on a task without one: an independent run has the same figures."""
    sets = {"a": text(files, 1) | LINES | {"task": {"name": "causal_lm"}}}
    as_classes = {"task__name": "classification", "task__labels": ("neg", "pos"), "model__pool": "last"}
    as_classes |= {"data__packing": "pad", "data__format": "jsonl", "data__separator": "", "optim__ema_decay": 0.0}
    classifier = recipe(files | {"train": files["labelled"]}, sets, **as_classes)
    train.train(classifier, tmp_path / "classifier")
    (*_, last) = evaluations(tmp_path / "classifier")
    assert {"accuracy", "f1"} <= of_set(last, "valid").keys()
    started = {"init_from": str(tmp_path / "classifier"), "data__eval_path": str(files["text1"])}
    model = {"optim__ema_decay": 0.0, "data__packing": "pad", "train__total_steps": 1}
    train.train(recipe(files, **started | model), tmp_path / "model")
    assert of_set(last, "a") == of_set(evaluations(tmp_path / "model")[0], "valid")


def test_training_does_not_open_the_test_set(files, whole):
    assert {str(files["text1"]), str(files["train"])} <= {*whole.opened}, "the hook sees what is opened"
    assert str(whole.broken) not in whole.opened
    assert not [key for row in evaluations(whole.workdir) for key in row if key.startswith("test/")]


def test_a_test_set_that_is_missing_is_an_error_before_the_training_data_is_read(files, tmp_path, monkeypatch):
    monkeypatch.setattr(input_pipeline, "load", lambda *_: pytest.fail("data was read"))
    cfg = recipe(files, {"test": {"path": str(tmp_path / "no.txt")}})
    with pytest.raises(DataError, match=r"'eval\.sets\.test': data path '.*no\.txt': no such file or folder"):
        train.train(cfg, tmp_path / "run")


def test_the_tool_scores_a_named_set_as_it_scores_its_file(files, whole, tmp_path):
    workdir = whole.workdir
    for out, arguments in (
        ("path", [f"--path={files['text1']}"]),
        ("set", ["--set=valid"]),
        ("own task", ["--set=labelled", f"--compare={workdir}@2"]),
    ):
        folder = f"--out={tmp_path / out}"
        tool_modules.call("evaluate", f"--run={workdir}", *arguments, folder, "--resamples=2")
    found = {out: json.loads((tmp_path / out / "scores.json").read_text()) for out in ("path", "set", "own task")}
    assert found["set"]["metrics"] == found["path"]["metrics"] and found["set"]["task"] == "causal_lm"
    assert found["own task"]["task"] == "prompting"
    last = of_set(evaluations(workdir)[-1], "labelled")
    values = {name: one["value"] for name, one in found["own task"]["metrics"].items()}
    assert {name: values[name] for name in last} == pytest.approx(last, rel=1e-5)
    with pytest.raises(SystemExit) as stopped:
        tool_modules.call("evaluate", f"--run={workdir}", "--set=test")
    assert str(whole.broken) in str(stopped.value), "the tool does read it"


def test_valid_alone_decides_the_best_checkpoint_and_when_to_stop(files, tmp_path, monkeypatch):
    losses = {"valid": iter([4.0, 3.0, 3.5, 3.6, 1.0]), "second": iter([1.0, 9.0, 3.0, 2.0, 1.0])}
    monkeypatch.setattr(Evaluator, "_evaluate", lambda self, params, start, name: {"loss": next(losses[name])})
    early = {"train__early_stopping__patience": 2, "train__total_steps": 10}
    cfg = recipe(files, {"second": text(files, 2)}, **early)
    summary = train.train(cfg, tmp_path / "run")
    assert checkpoint.choose(f"{tmp_path / 'run'}@best").step == 2
    assert summary["steps"] == 6, "the evaluations of steps 4 and 6 did not improve `valid`"
    assert (summary["loss"], summary["second/loss"]) == (3.0, 9.0), "those of the best checkpoint"


def test_a_resumed_run_has_the_same_rows(whole, tmp_path, monkeypatch):
    add = train.StepLog.add

    def fail(self, step, *rest):
        if step == 4:
            raise KeyboardInterrupt
        add(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train.StepLog, "add", fail)
        with pytest.raises(KeyboardInterrupt):
            train.train(whole.cfg, tmp_path / "broken")
    summary = train.train(whole.cfg, tmp_path / "broken")
    assert evaluations(tmp_path / "broken") == evaluations(whole.workdir)
    undisturbed = json.loads((whole.workdir / "summary.json").read_text())
    names = [name for name in undisturbed if "/" in name]
    assert len(names) > 10 and [summary[name] for name in names] == [undisturbed[name] for name in names]


def test_a_resumed_run_may_change_all_sets_but_valid(files, tmp_path, capsys):
    old, second = recipe(files, {"valid": text(files, 1)}), text(files, 2)
    said = []
    resume.refuse_changes(old, recipe(files, {"valid": text(files, 1), "second": second}), tmp_path, say=said.append)
    assert f"changed since the last start: eval.sets.second.path None -> {second['path']!r}" in said
    for other in ({"valid": text(files, 3)}, {}, {"valid": text(files, 1) | LINES | {"separator": "."}}):
        with pytest.raises(ConfigError, match=r"(?s)eval\.sets\.valid\..*pass --accept_changed_data"):
            resume.refuse_changes(old, recipe(files, other), tmp_path)
        resume.refuse_changes(old, recipe(files, other), tmp_path, accept_data=True)


def test_other_records_of_valid_are_refused_and_those_of_another_set_reported(files, tmp_path):
    paths = {name: tmp_path / f"{name}.txt" for name in ("valid", "second")}

    def data(**numbers):
        for name, number in numbers.items():
            paths[name].write_text(files[f"text{number}"].read_text())
        cfg = recipe(files, {name: {"path": str(path)} for name, path in paths.items()})
        return run_lib.prepare(run_lib.plan(cfg, None), one_device(), lambda _: None).data

    def check(now):
        resume.check_data(saved, now, False, said.append)

    info = {"data": resume.data_info(data(valid=1, second=2), 9, {}), "config": {}}
    saved, said = checkpoint.Saved(4, tmp_path / "run" / "checkpoints" / "4", json.loads(json.dumps(info)), {}), []
    check(data())
    assert not said
    check(data(second=3))
    assert said == ["eval.sets.second has other records than at step 4, or in another order"]
    with pytest.raises(CheckpointError, match=r"(?s)trained on other data.*\n  eval\.sets\.valid: \w+ -> \w+"):
        check(data(valid=4))


def test_a_mixture_has_one_valid_set_and_trains_on_all_records(files, tmp_path):
    mixture = ((0.0, str(files["train"]), 1.0), (0.0, str(files["labelled"]), 1.0))
    source = recipe(files, {"valid": text(files, 1)}, data__path="", data__mixture=mixture)
    run = run_lib.prepare(run_lib.plan(source, None), one_device(), lambda _: None)
    assert list(run.data.rows_of("valid")) == [""] and "records_valid" not in run.data.report
    assert run.data.report["documents_train"]["documents"] == 40
    summary = train.train(source, tmp_path / "run")
    assert "loss" in summary and not [name for name in summary if name.startswith(("documents_", "records_"))]


def test_records_of_a_set_that_are_trained_on_are_counted_for_each_source(files):
    mixture = ((0.0, str(files["train"]), 1.0), (0.0, str(files["text2"].parent), 1.0))
    source = recipe(files, {"valid": text(files, 2), "b": text(files, 4)}, data__path="", data__mixture=mixture)
    notes = []
    run_lib.prepare(run_lib.plan(source, None), one_device(), notes.append)
    told = [line for line in notes if "trained on as well" in line]
    assert told == ["warning: 12 of 12 records of eval.sets.valid are trained on as well in 2"]


def test_a_run_replays_all_data_of_a_run_that_held_nothing_out(files, tmp_path):
    train.train(recipe(files, {"valid": text(files, 1)}), tmp_path / "first")
    again = {"init_from": str(tmp_path / "first"), "data__replay": 0.5, "train__total_steps": 1}
    source = recipe(files | {"train": files["text2"]}, **again)
    run = run_lib.prepare(run_lib.plan(source, None), one_device(), lambda _: None)
    assert run.data.report["replay_train"]["documents"] == 40 and list(run.data.rows_of("valid")) == [""]


def test_what_is_named_twice_or_trained_on_is_said(files, tmp_path):
    link = tmp_path / "link.txt"
    link.symlink_to(files["text2"])
    sets = {"a": text(files, 2), "b": {"path": str(link)}, "test": {"path": str(files["train"])}}
    sets["c"] = {"path": str(files["train"])}
    notes = []
    run_lib.prepare(run_lib.plan(recipe(files, sets), None), one_device(), notes.append)
    said = "\n".join(notes)
    assert f"warning: {files['text2']} is in eval.sets.a and in eval.sets.b" in said
    assert f"warning: {files['train']} is in eval.sets.c and in eval.sets.test and in the training data" in said
    assert re.search(r"warning: 3\d of 40 records of eval\.sets\.c are trained on as well", said)
    assert "records of eval.sets.a are" not in said


def test_a_set_that_is_also_held_out_by_the_data_is_said(files, tmp_path):
    for name, number in (("train", 2), ("dev", 3)):
        (tmp_path / f"{name}.txt").write_text(files[f"text{number}"].read_text())
    for trained, held_out, name, changes in (
        (files["train"], files["text1"], "data.eval_path", {"data__eval_path": str(files["text1"])}),
        (tmp_path, tmp_path / "dev.txt", "what data.path holds out", {}),
    ):
        cfg = recipe(files | {"train": trained}, {"a": {"path": str(held_out)}, "b": text(files, 4)}, **changes)
        assert eval_sets.find(cfg, [cfg.data]) == [f"warning: {held_out} is in eval.sets.a and in {name}"]
    both = {"valid": text(files, 1), "a": {"path": str(tmp_path / "dev.txt")}}
    cfg = recipe(files | {"train": tmp_path}, both)
    assert eval_sets.find(cfg, [cfg.data]) == [], "the set `valid` has taken its place"


REFUSED = {
    "a test set of interactions": (
        {"test": {"path": "x"}},
        {"task__name": "next_item", "data__format": "interactions"},
        r"'eval\.sets\.test': interactions test on each user's last item, at the end of a run; give the set another",
    ),
    "a name": ({"a b": {"path": "x"}}, {}, r"'eval\.sets\.a b': expected a name of letters, digits"),
    "train": ({"train": {"path": "x"}}, {}, r"'eval\.sets\.train': expected a name .* not train"),
    "no path": ({"a": {}}, {}, r"'eval\.sets\.a\.path' is empty"),
    "no section": ({"a": "x"}, {}, r"'eval\.sets\.a' is a section of keys; expected a dict, got 'x'"),
    "an unknown key": ({"a": {"pth": "x"}}, {}, r"unknown config key 'eval\.sets\.a\.pth' \(did you mean 'path'\?\)"),
    "an unknown format": ({"a": {"path": "x", "format": "txt"}}, {}, r"'eval\.sets\.a\.format' must be one of .*'txt'"),
    "no format": ({"a": {"path": "x"}}, {"data__format": "builtin_text"}, r"'eval\.sets\.a\.format' is ''.*set it"),
    "a split": ({"a": {"path": "x", "split": "test"}}, {}, r"'eval\.sets\.a\.split' is 'test', but format text has no"),
    "no split": ({"a": {"path": "x", "format": "tfds"}}, {}, r"'eval\.sets\.a\.split' is empty"),
    "an encoding": ({"a": {"path": "x", "encoding": "utf8x"}}, {}, r"'eval\.sets\.a\.encoding' is 'utf8x'"),
    "an unknown task": (
        {"a": {"path": "x", "task": {"name": "chats"}}},
        {},
        r"'eval\.sets\.a\.task\.name' must be one of .*\(did you mean 'chat'\?\)",
    ),
    "options without a task": ({"a": {"path": "x", "task": {"shots": 1}}}, {}, r"'eval\.sets\.a\.task\.name' must be"),
    "an option": (
        {"a": {"path": "x", "task": {"name": "prompting", "shot": 1}}},
        {},
        r"unknown config key 'eval\.sets\.a\.task\.shot' \(did you mean 'shots'\?\)",
    ),
    "valid with a task": (
        {"valid": {"path": "x", "task": {"name": "chat"}}},
        {},
        r"'eval\.sets\.valid\.task\.name' is",
    ),
    "valid twice": (
        {"valid": {"path": "x"}},
        {"data__eval_path": "y"},
        r"'data\.eval_path' \('y'\) and 'eval\.sets\.val",
    ),
    "valid of interactions": (
        {"valid": {"path": "x"}},
        {"data__format": "interactions", "data__separator": ""},
        r"'eval\.sets\.valid': interactions validate on",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_set_that_cannot_be_read_is_refused(what, files):
    sets, changes, message = REFUSED[what]
    with pytest.raises(ConfigError, match=message):
        recipe(files, sets, **changes)


def one(files, name: str, **options):
    return {"a": {"path": str(files["labelled"]), "format": "jsonl", "task": {"name": name, **options}}}


UNFIT = {
    "a head": (
        ("classification", {"labels": ("neg", "pos")}),
        r"'eval\.sets\.a\.task\.name' is classification, which needs parameters that this run's model does not have "
        r"\(head/classifier/bias.*\); expected causal_lm with .* or a task without a head: causal_lm, .*prompting",
    ),
    "another kind of model": (
        ("translation", {}),
        r"'eval\.sets\.a\.task\.name' is translation, which does not support",
    ),
    "items": (("next_item", {}), r"'eval\.sets\.a\.task\.name' is next_item, which reads other data than"),
    "the start": (("preferences", {}), r"'eval\.sets\.a\.task\.name' is preferences, which compares with the param"),
    "options": (("prompting", {"labels": ("neg", "pos")}), r"'eval\.sets\.a\.task': 'task\.templates' is empty"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_task_that_does_not_fit_the_model_is_refused_before_data_is_read(what, files):
    (name, options), message = UNFIT[what]
    with pytest.raises(ConfigError, match=message):
        run_lib.plan(recipe(files, one(files, name, **options)), None)


@pytest.mark.parametrize("name", ["a", "test"])
def test_shots_need_training_records_of_the_task(files, name):
    cfg = recipe(files, {name: one(files, **TASK | {"shots": 1})["a"]})
    message = rf"'eval\.sets\.{name}\.task\.shots' is 1, but the training data has no records of"
    with pytest.raises(ConfigError, match=message):
        run_lib.plan(cfg, None)


def test_shots_without_a_training_record_are_refused_and_without_shots_none_is_needed(files):
    def cfg(shots):
        options = {f"task__{key}": value for key, value in TASK.items() if key not in ("name", "shots")}
        return recipe(files, task__name="prompting", task__shots=shots, data__packing="pad", **options)

    with pytest.raises(ConfigError, match=r"'task\.shots' is 1, but the training data has no records to take"):
        input_pipeline.fields_of_held_out([], cfg(1))
    assert input_pipeline.fields_of_held_out([], cfg(0)) == {}


@pytest.mark.parametrize("is_mixture", [False, True], ids=["one source", "mixture"])
def test_a_named_set_has_shots_of_the_training_data_in_training_and_afterwards(files, tmp_path, is_mixture):
    """Of all its sources, and not of the set itself, whose labels they would tell."""
    changes = {}
    if is_mixture:
        paths = [used_runs.KINDS["prompting"].write(tmp_path / name, seed, 16) for seed, name in enumerate("ab", 1)]
        paths = [path.rename(tmp_path / f"{path.parent.name}.jsonl") for path in paths]
        changes = {"data__path": "", "data__mixture": tuple((0.0, str(path), 0.5) for path in paths)}
    own = {"path": str(files["labelled"]), "format": "jsonl"}
    other_words = TASK | {"templates": ("{text} It was {label:no|yes}.",), "shots": 3}
    sets = {"plain": own, "own": own | {"task": other_words}, "test": own | {"task": other_words}}
    run = used_runs.make("prompting", tmp_path, task__shots=2, data__seq_len=256, eval__sets=sets, **changes)
    loaded = predict.load(str(run), devices=jax.devices()[:1])
    sources = input_pipeline.by_source(loaded.config.data).values()
    trained_on = {record["text"] for source in sources for record in registry.load(source).train}
    last, found = evaluations(run)[-1], {}
    for name in sets:
        model, data = predict.on_set(loaded, loaded.config, name)
        shots = model.shots["shots"]
        assert len(shots) == (2 if name == "plain" else 3) and {shot["text"] for shot in shots} <= trained_on
        found[name] = scoring.evaluate(model, data, resamples=2).values
    for name in ("plain", "own"):
        assert {key: found[name][key] for key in of_set(last, name)} == pytest.approx(of_set(last, name), rel=1e-5)
    assert found["test"] == found["own"] != found["plain"]


def test_nothing_held_out_and_a_metric_of_another_set_are_refused(files):
    second = {"second": text(files, 2)}
    with pytest.raises(ConfigError, match=r"nothing is held out: .* or a set 'valid' of 'eval\.sets'"):
        recipe(files, second, data__eval_fraction=0.0)
    cfg = recipe(files, second, checkpoint__best_metric="second/loss")
    with pytest.raises(ConfigError, match=r"no metric 'second/loss' of the set 'valid', which alone decides"):
        run_lib.prepare(run_lib.plan(cfg, None), one_device(), lambda _: None)


def test_a_set_is_read_in_the_format_of_the_data_unless_it_names_one(files):
    sets = {"a": text(files, 1), "b": text(files, 2) | {"format": "text"}, "c": text(files, 3) | {"separator": "."}}
    cfg = recipe(files, sets | {"d": {"path": "x", "format": "jsonl", "rename": (("a", "text"),)}})
    read = {name: eval_sets.config_of(cfg, name).data for name in "abcd"}
    assert [read[name].separator for name in "abcd"] == ["\n", "", ".", ""]
    assert (read["d"].format, read["d"].rename, read["d"].encoding) == ("jsonl", (("a", "text"),), "utf-8")
    assert {data.seq_len for data in read.values()} == {cfg.data.seq_len}
    with pytest.raises(ConfigError, match=r"no set 'e' in 'eval\.sets'.*; there are: a, b, c, d"):
        eval_sets.config_of(cfg, "e")
    own = eval_sets.config_of(recipe(files, data__eval_path=str(files["text1"])), "valid")
    assert own.data.path == str(files["text1"])
    with pytest.raises(ConfigError, match=r"what the run holds out of 'data\.path' is not a file that can be named"):
        eval_sets.config_of(recipe(files), "valid")


def test_a_saved_config_and_the_command_line_have_the_sets(files, tmp_path):
    sets = {"a": text(files, 1), "b": {"path": "x", "format": "jsonl", "task": TASK}, "test": {"path": "y"}}
    cfg = recipe(files, sets)
    assert build_saved_config(json.loads(config.to_json(cfg))) == cfg and hash(cfg)
    written = tmp_path / "recipe.py"
    written.write_text(
        "from lm.tasks import default_config\n\n\ndef get_config():\n    c = default_config()\n"
        "    c.eval.sets = {'a': {'path': 'x', 'format': 'text'}}\n    c.train.total_steps = 1\n    return c\n"
    )

    def given(*arguments):
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, flag_values=values)
        argv = ["lm.main", f"--config={written}", *arguments]
        with mock.patch.object(sys, "argv", argv):
            values(argv)
        return build_config(values.config).eval.sets

    ((name, found),) = given("--config.eval.sets.a.path=z")
    assert (name, found.path, found.format) == ("a", "z", "text")
    whole = dict(
        given("--config.eval.sets={'b': {'path': 'z', 'format': 'jsonl'}, 'test': {'path': 'y', 'format': 'text'}}")
    )
    assert {name: one.path for name, one in whole.items()} == {"b": "z", "test": "y"}


def test_metrics_of_a_set_have_the_units_of_its_task(files):
    cfg = recipe(files, {"a": text(files, 1), "b": one(files, **TASK)["a"]})
    found = {
        name: metrics.about(name, lambda prefix: eval_sets.loss_unit(cfg, prefix)) for name in ("a/loss", "b/loss")
    }
    assert [about.unit for about in found.values()] == ["nats per token", "nats per example"]
    assert found["a/loss"].title == "a: Loss" and found["a/loss"].less_is_better
    assert metrics.gain("a/loss", 2.0) == -2.0 and metrics.is_known("a/web_f1") and not metrics.is_known("a/x")
    assert metrics.about("a/web_loss", lambda prefix: prefix) == metrics.About("a: web: Loss", "a/web", True)


def test_prepared_data_of_a_recipe_with_a_valid_set_holds_nothing_out(files, tmp_path):
    source = recipe(files, {"valid": text(files, 1)})
    index = pipeline.run(pipeline.plan(source, tmp_path / "data"), workers.in_process, lambda *_: None)
    assert index["statistics"]["kept"]["valid"]["documents"] == 0
    assert "Held out: nothing." in (tmp_path / "data" / "README.md").read_text()
    prepared = {"data__format": "prepared", "data__separator": "", "data__path": str(tmp_path / "data")}
    valid = {"valid": text(files, 1) | LINES}
    run = run_lib.prepare(run_lib.plan(recipe(files, valid, **prepared), None), one_device(), lambda _: None)
    assert run.data.report["train"]["documents"] == index["statistics"]["kept"]["train"]["documents"] > 30
    assert run.data.report["eval.sets.valid"]["documents"] == 12 and len(run.data.valid) > 0
    with pytest.raises(ConfigError, match=r"'eval\.sets\.a\.format' is '', but data\.format=prepared names no file"):
        recipe(files, valid | {"a": text(files, 2)}, **prepared)


def test_a_valid_set_takes_the_place_of_a_folders_validation_split(files, tmp_path):
    for name, number in (("train", 2), ("dev", 3)):
        (tmp_path / f"{name}.txt").write_text(files[f"text{number}"].read_text())
    notes = []
    for sets, held_out in (
        ({}, "'train' is trained on, 'validation' is held out"),
        ({"valid": text(files, 1)}, "not read: 'validation'"),
    ):
        planned = run_lib.plan(recipe({"train": tmp_path}, sets), None)
        run = run_lib.prepare(planned, one_device(), notes.append)
        assert held_out in "\n".join(notes) and ("not read" in held_out) == ("valid" in sets)
        assert run.data.report["train"]["documents"] == 12
        notes.clear()


@pytest.fixture(scope="module")
def eight_devices():
    return mesh_lib.make_mesh(MeshConfig(fsdp=4, data=2), jax.devices())  # before `plain` replaces the function


def test_devices_change_no_score_of_a_set(files, eight_devices, tmp_path):
    source = recipe(files, {"valid": text(files, 1), "labelled": labelled(files)})
    found = []
    assert eight_devices.size == 8
    for mesh in (one_device(), eight_devices):
        run = run_lib.prepare(run_lib.plan(source, None), mesh, lambda _: None)
        with jax.set_mesh(mesh):
            state, _, _ = train.restore(run, [], lambda _: None)
            with Tracker(tmp_path / str(mesh.size), 1, 0, True, source.monitor) as tracker:
                found.append(Evaluator(run, tracker).validate(state, 0))
    assert found[1] == pytest.approx(found[0], rel=1e-5) and "labelled/loss" in found[0]


def test_a_model_card_has_no_private_path_of_a_set(files):
    cfg = recipe(files, {"a": text(files, 1), "test": {"path": "relative/test.txt"}})
    about = {"model_type": "gpt2", "head": None, "parameters": 1, "base": "", "is_adapter": False, "step": 2}
    page = card.card("name", cfg, metrics={"loss": 1.0, "a/loss": 2.0}, summary={}, **about)
    assert "eval.sets.a.path = 'documents.txt'" in page and "eval.sets.test.path = 'relative/test.txt'" in page
    assert str(files["text1"]) not in page and "| a/loss | 2 |" in page


def test_a_set_of_tfds_names_its_split_in_either_spelling(files, tfds_dir):
    import tensorflow_datasets

    rows = {part: [{"text": f"a {part} of number {i}"} for i in range(6)] for part in ("train", "test", "dev")}
    small_sets.write_tfds(tfds_dir, "films", {"text": tensorflow_datasets.features.Text()}, rows)
    sets = {"second": {"path": "films", "format": "tfds", "split": "dev"}}
    tfds = {"data__format": "tfds", "data__path": "films", "data__eval_path": "test", "data__separator": ""}
    cfg = recipe(files, sets, **tfds)
    found = eval_sets.load(cfg)["second"].records
    assert [record["text"] for record in found] == [row["text"] for row in rows["dev"]]
    valid = registry.stream(eval_sets.config_of(cfg, "valid").data)
    assert [record["text"] for record in valid] == [record["text"] for record in registry.load(cfg.data).valid]
    missing = {"second": {"path": "films", "format": "tfds", "split": "tset"}}
    with pytest.raises(DataError, match=r"'eval\.sets\.second': TFDS set 'films/.*no split 'tset'"):
        eval_sets.find(recipe(files, missing, **tfds), [])


def test_a_batch_of_a_set_can_be_looked_at(files, tmp_path, capsys):
    source = recipe(files, {"labelled": labelled(files), "test": text(files, 1)})
    written = tmp_path / "recipe.py"
    content = "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({})\n"
    written.write_text(content.format(schema.to_dict(source)))
    tool_modules.call("inspect_batch", f"--config={written}", "--split=labelled", "--rows=1")
    said = capsys.readouterr().out
    assert "eval.sets.labelled: documents 16" in said and re.search("label (neg|pos)", said)
    with pytest.raises(SystemExit, match="--split=test: expected one of train, valid, labelled"):
        tool_modules.call("inspect_batch", f"--config={written}", "--split=test")
    with pytest.raises(SystemExit, match=r"--config\.eval\.sets\.new\.path=x: the recipe gives no such set or key"):
        tool_modules.call("inspect_batch", f"--config={written}", "--config.eval.sets.new.path=x")


def test_a_valid_set_takes_the_place_of_the_held_out_part_of_a_built_in_corpus(files, monkeypatch):
    parts = {
        part: [{"text": f"{part} {i} of it", "source": f"{part}:{i}"} for i in range(9)] for part in ("train", "valid")
    }
    corpus = python_stdlib.Corpus({"text": parts, "instructions": parts}, "0" * 64, "corpus report")
    monkeypatch.setattr(python_stdlib, "load", lambda: corpus)
    builtin = {"data__format": "builtin_text", "data__path": "", "data__separator": ""}
    source = recipe(files, {"valid": text(files, 1) | LINES}, **builtin)
    data = run_lib.prepare(run_lib.plan(source, None), one_device(), lambda _: None).data
    assert data.report["train"]["documents"] == 9 and "valid" not in data.report
    assert data.report["eval.sets.valid"]["documents"] == 12 and list(data.rows_of("valid")) == [""]
