"""Predictions of trained runs: every record once, in order, whatever the size of a batch and the number of devices."""

import dataclasses
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import lm
from lm import eval_sets, predict, scoring
from lm.config import Config, DataConfig, schema
from lm.config.schema import ConfigError
from lm.data.readers import registry
from lm.data.record import DataError, Wanted
from lm.decoding import sampling
from lm.tasks import TASKS, base, build_config, default_config
from tests import tool_modules, used_runs

ROOT = Path(__file__).resolve().parents[1]
COUNT = 21


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Task -> its run, trained once."""
    made: dict[str, Path] = {}

    def make(task: str) -> Path:
        if task not in made:
            made[task] = used_runs.make(task, tmp_path_factory.mktemp(task))
        return made[task]

    return make


def new_records(task: str, folder: Path, cfg, to_predict: bool = True) -> list:
    path = used_runs.KINDS[task].write(folder / "new", 1, COUNT)
    wanted = predict.wanted_to_predict(cfg) if to_predict else TASKS[task].wanted(cfg)
    return list(registry.stream(eval_sets.data_at(cfg, str(path)), wanted))


def close(one, other):
    """Equal but for the rounding of floats."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return one == pytest.approx(other, rel=1e-4, abs=1e-4) if isinstance(one, float) else one == other


QUICK = ("causal_lm", "classification")


@pytest.mark.parametrize(
    "task", [task if task in QUICK else pytest.param(task, marks=pytest.mark.slow) for task in TASKS]
)
def test_each_record_is_predicted_once_alike_on_one_and_on_eight_devices(task, run_of, tmp_path):
    alone = lm.load(str(run_of(task)), batch_size=3, devices=jax.devices()[:1])
    spread = lm.load(str(run_of(task)), batch_size=16)
    assert (alone.mesh.size, spread.mesh.size) == (1, 8)
    records = new_records(task, tmp_path, alone.config)
    said = list(predict.predictions(alone, records))
    assert [one["number"] for one in said] == list(range(COUNT))
    assert [one["source"] for one in said] == [record["source"] for record in records]
    assert all(one["prediction"] is not None for one in said)
    json.dumps(said, allow_nan=False)
    for one, other in zip(said, predict.predictions(spread, records), strict=True):
        assert close(one, other), (one, other)


def moved(loaded: predict.LoadedModel) -> predict.LoadedModel:
    """With parameters far from their start, so that predictions differ between records."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.5 * rng.standard_normal(x.shape).astype(np.float32), loaded.params)
    return dataclasses.replace(loaded, params=params)


@pytest.fixture(scope="module")
def classifier(run_of):
    return moved(lm.load(str(run_of("classification")), batch_size=4, devices=jax.devices()[:1]))


def without(said: dict, *fields: str) -> dict:
    """A prediction without what it says of the answer, and the identity, which the answer is part of."""
    record = {key: value for key, value in said["record"].items() if key not in fields}
    return said | {"record": record, "identity": "", "source": ""}


# Records to predict -------------------------------------------------------------------------------------------------

UNANSWERED = {
    "classification": (
        "jsonl",
        (),
        '{"text": "a b"}\n{"text": "c", "label": null}\n',
        [{"text": "a b"}, {"text": "c"}],
    ),
    "regression": ("table", (), "id,text\n1,a b\n2,c\n", [{"text": "a b"}, {"text": "c"}]),
    "entities": ("jsonl", (), '{"text": "a b"}\n', [{"text": "a b"}]),
    "tagging": ("conll", (("1", "token"), ("2", "tag")), "a\nb\n\nc\n", [{"words": ["a", "b"]}, {"words": ["c"]}]),
    "span_qa": ("jsonl", (), '{"question": "q", "context": "c"}\n', [{"question": "q", "context": "c"}]),
    "translation": ("parallel", (), "a b\nc\n", [{"text": "a b"}, {"text": "c"}]),
    "next_item": (
        *("interactions", (), "user,item,time\nu,a,2\nv,c,1\nu,b,1\n"),
        [{"items": ["b", "a"], "user": "u"}, {"items": ["c"], "user": "v"}],
    ),
}


@pytest.mark.parametrize("task", UNANSWERED)
def test_what_is_to_be_predicted_may_be_missing_only_where_it_is_predicted(task, tmp_path):
    form, rename, content, expected = UNANSWERED[task]
    path = tmp_path / ("new.csv" if form in ("table", "interactions") else "new.jsonl")
    path.write_text(content)
    data = DataConfig(format=form, path=str(path), rename=rename)
    options = {"labels": ("x", "y")} if "labels" in schema.keys(TASKS[task].options) else {}
    cfg = Config(task=TASKS[task].options(name=task, **options))
    found = list(registry.stream(data, predict.wanted_to_predict(cfg)))
    assert [{key: value for key, value in one.items() if key != "source"} for one in found] == expected
    if task != "next_item":  # whose last item is the answer
        with pytest.raises((DataError, ConfigError)):
            base.check_fields(TASKS[task], registry.stream(data, TASKS[task].wanted(cfg)), TASKS)


def test_squad_without_answers(tmp_path):
    path = tmp_path / "new.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q"}]}]}]}))
    data, wanted = DataConfig(format="squad", path=str(path)), Wanted(may_lack=("answers",))
    (record,) = registry.stream(data, wanted)
    assert {key: record[key] for key in record if key != "source"} == {"id": "1", "question": "q", "context": "c"}
    with pytest.raises(DataError, match="expected 'answers'"):
        list(registry.stream(data, Wanted()))


def test_a_label_changes_no_prediction(classifier, tmp_path):
    labelled = new_records("classification", tmp_path, classifier.config)
    bare = [{key: value for key, value in record.items() if key != "label"} for record in labelled]
    said, other = ([without(one, "label") for one in classifier.predict(records)] for records in (labelled, bare))
    assert said == other and len({one["prediction"] for one in said}) == 2


def test_a_model_predicts_on_the_device_that_is_named(run_of):
    second = lm.load(str(run_of("classification")), batch_size=4, devices=jax.devices()[1:2])
    assert {device for leaf in jax.tree.leaves(second.everywhere) for device in leaf.devices()} == {jax.devices()[1]}
    first = lm.load(str(run_of("classification")), batch_size=4, devices=jax.devices()[:1])
    assert close(second.predict(["alpha beta"]), first.predict(["alpha beta"]))


def test_examples_for_prompts_are_chosen_once(tmp_path, monkeypatch):
    loaded = lm.load(str(used_runs.make("prompting", tmp_path, task__shots=2)), batch_size=1, devices=jax.devices()[:1])
    records, chosen, shots = new_records("prompting", tmp_path, loaded.config), [], TASKS["prompting"].held_out
    task = TASKS["prompting"]._replace(held_out=lambda *given: chosen.append(shots(*given)) or chosen[-1])
    monkeypatch.setitem(TASKS, "prompting", task)
    made, rows_of = [], task.predictor.examples
    predictor = task.predictor._replace(examples=lambda record, *more: made.append(record) or rows_of(record, *more))
    monkeypatch.setitem(TASKS, "prompting", task._replace(predictor=predictor))
    said = loaded.predict(records)
    assert len(said) == len(records) > 2 * predict._BATCHES_AT_ONCE and len(chosen) == 1
    assert len(chosen[0]["shots"]) == 2 and all(record["shots"] == chosen[0]["shots"] for record in made)
    assert not any("shots" in one["record"] for one in said)


def test_a_record_that_makes_no_row_is_a_prediction_too(run_of):
    loaded = lm.load(str(run_of("causal_lm")), batch_size=2, devices=jax.devices()[:1])
    records = [{"text": text, "source": f"f:{i}"} for i, text in enumerate(["alpha", "", "beta gamma", ""])]
    said = list(predict.predictions(loaded, records))
    assert [one["prediction"] is None for one in said] == [False, True, False, True]
    assert said[1]["counts"] == {"dropped_empty": 1}


def test_records_are_taken_a_few_batches_at_a_time(classifier):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield {"text": f"alpha {taken}", "source": ""}

    said = predict.predictions(classifier, endless())
    for _ in range(50):
        next(said)
    assert taken <= 50 + 4 * classifier.batch_size


def test_what_is_left_out_of_a_stream_is_noted(tmp_path):
    (tmp_path / "new.csv").write_text("user,item,time\nu,a,1\nu,b,2\nu,c,3\nv,a,1\nv,b,2\nw,a,x\n")
    (tmp_path / "new.txt").write_text("x")
    data, notes = DataConfig(format="interactions", path=str(tmp_path), max_bad_records=1), []
    assert len(list(registry.stream(data, Wanted(), notes.append))) == 1
    users, files, bad = notes
    assert users == "left out: 1 users of fewer than 3 items, with 2 items" and "new.txt" in files
    assert bad.startswith("skipped 1 bad records:") and "'time' is 'x'" in bad
    notes.clear()
    assert len(list(registry.stream(data, Wanted(may_lack=("target",)), notes.append))) == 2
    assert notes == [files, bad]


def test_files_of_an_archive_that_are_no_records_are_noted(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "readme.pdf").write_text("x")
    with tarfile.open(tmp_path / "new.tar", "w") as archive:
        for name in ("a.png", "readme.pdf"):
            archive.add(tmp_path / name, f"class/{name}")
    notes = []
    data = DataConfig(format="images", path=str(tmp_path / "new.tar"))
    assert len(list(registry.stream(data, Wanted(image_shape=(4, 4, 3)), notes.append))) == 1
    assert len(notes) == 1 and "readme.pdf" in notes[0] and "new.tar" in notes[0]


def test_what_is_left_out_is_noted_where_records_are_predicted(classifier, tmp_path):
    path = used_runs.KINDS["classification"].write(tmp_path / "new", 1, 3)
    path.write_text(path.read_text() + "no JSON\n")
    data, notes = eval_sets.data_at(classifier.config, str(path), max_bad_records=1), []
    counts = predict.write_predictions(classifier, data, tmp_path / "out.jsonl", note=notes.append)
    assert counts["records"] == 3 and sum(note.startswith("skipped 1 bad records:") for note in notes) == 1


def test_a_folder_of_several_splits_is_refused(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="name one of them"):
        list(registry.stream(DataConfig(format="jsonl", path=str(tmp_path)), Wanted()))


# Files --------------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


@pytest.fixture
def written(classifier, tmp_path):
    """(data, predictions of it in one go)."""
    path = used_runs.KINDS["classification"].write(tmp_path / "new", 1, 2 * COUNT)
    data = eval_sets.data_at(classifier.config, str(path))
    predict.write_predictions(classifier, data, tmp_path / "whole.jsonl")
    return data, (tmp_path / "whole.jsonl").read_bytes()


def stop_after(monkeypatch, count: int) -> None:
    """`predict.predictions` stops behind this many."""
    predictions = predict.predictions

    def some(*args, **more):
        for number, one in enumerate(predictions(*args, **more)):
            if number == count:
                raise Stopped
            yield one

    monkeypatch.setattr(predict, "predictions", some)


def test_a_stopped_tool_goes_on_where_it_was(classifier, written, tmp_path, monkeypatch):
    data, whole = written
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    for stop in (17, 9):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_after(patch, stop)
            predict.write_predictions(classifier, data, out)
        part.write_bytes(part.read_bytes()[:-5])  # the last line was not finished
    assert not out.exists() and whole.startswith(part.read_bytes())
    assert part.read_bytes().count(b"\n") == 24
    computed = []
    predictions = predict.predictions
    monkeypatch.setattr(
        predict, "predictions", lambda *args, **more: (computed.append(1) or one for one in predictions(*args, **more))
    )
    counts = predict.write_predictions(classifier, data, out)
    assert len(computed) == 2 * COUNT - 24 and counts["records"] == 2 * COUNT
    # The rows that are computed together are others.
    said, other = ([json.loads(line) for line in content.splitlines()] for content in (out.read_bytes(), whole))
    assert close(said, other)
    assert [path.name for path in tmp_path.glob("out*")] == ["out.jsonl"]
    with pytest.raises(ConfigError, match="there already"):
        predict.write_predictions(classifier, data, out)


def test_a_part_of_other_records_or_another_model_is_refused(classifier, written, tmp_path, monkeypatch):
    data, _ = written
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 9)
        predict.write_predictions(classifier, data, out)
    with pytest.raises(ConfigError, match="another model, file or option"):
        predict.write_predictions(dataclasses.replace(classifier, fingerprint="other"), data, out)
    path = Path(data.path)
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n" for line in [*lines[1:], lines[0]]))
    with pytest.raises(ConfigError, match=r"out.jsonl.part:1: not the prediction of record 0"):
        predict.write_predictions(classifier, data, out)


def test_a_table_has_the_same_predictions(classifier, written, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    data, whole = written
    predict.write_predictions(classifier, data, tmp_path / "out.parquet")
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    said = [json.loads(line) for line in whole.splitlines()]
    assert 0 < sum("counts" in one for one in said) < len(said)
    for row, one in zip(rows, said, strict=True):
        assert {key: value for key, value in row.items() if value is not None} == one
    assert [path.name for path in tmp_path.glob("out*")] == ["out.parquet"]


def test_the_tool_predicts_in_the_order_of_the_file(run_of, tmp_path, capsys):
    path = used_runs.KINDS["classification"].write(tmp_path, 1, COUNT)
    out = tmp_path / "said.jsonl"
    tool_modules.call("predict", f"--run={run_of('classification')}", f"--path={path}", f"--out={out}")
    assert f"{COUNT} predictions by" in capsys.readouterr().out
    said = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["record"] for one in said] == [json.loads(line) for line in path.read_text().splitlines()]
    with pytest.raises(SystemExit, match="--run=RUN, --path=FILE and --out=FILE"):
        tool_modules.call("predict", f"--run={run_of('classification')}")
    with pytest.raises(SystemExit, match=r"error: .*expected FIELD:EXPECTED"):
        tool_modules.call("predict", "--run=a", "--path=b", f"--out={tmp_path}/c", "--rename=x")


# Python -------------------------------------------------------------------------------------------------------------


def test_import_lm_is_light_and_names_the_interface():
    code = "import lm, sys; assert not {'jax', 'numpy', 'absl'} & set(sys.modules); print(*dir(lm))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"load", "train", "LoadedModel", "__version__"} <= set(done.stdout.split())
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        lm.lode  # noqa: B018


def test_train_is_a_function_of_a_recipe_and_a_folder(monkeypatch):
    given = []
    monkeypatch.setattr(lm.train, "train", lambda cfg, workdir: given.append((cfg, workdir)))
    recipe = default_config("causal_lm")
    recipe.train.total_steps = 1
    lm.train(recipe, "runs/a")
    lm.train(build_config(recipe), "runs/a")
    assert given == [(build_config(recipe), "runs/a")] * 2


def test_texts_logits_and_embeddings_of_a_language_model(run_of):
    loaded = lm.load(str(run_of("causal_lm")), batch_size=2, devices=jax.devices()[:1])
    texts = ["alpha beta", "the", "gamma is not model"]
    greedy = loaded.generate(texts, temperature=0.0, max_new_tokens=4)
    assert greedy == [loaded.generate([text], temperature=0.0, max_new_tokens=4)[0] for text in texts]
    for text, logits_LxV in zip(texts, loaded.logits(texts), strict=True):
        ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(text)]
        row = {"tokens": ids, "segment_ids": [1] * len(ids), "positions": list(range(len(ids)))}
        batch = {key: jax.numpy.asarray([value], "int32") for key, value in row.items()}
        out = loaded.model.apply(loaded.params, batch)
        expected = np.asarray(out.hidden_BxLxD[0] @ out.unembed_DxV)[:, : loaded.tokenizer.vocab_size]
        np.testing.assert_allclose(logits_LxV, expected, rtol=1e-4, atol=1e-4)
        (said,) = loaded.predict([text])
        log_probs = expected - np.log(np.exp(expected).sum(axis=1, keepdims=True))
        targets = [*ids[1:], loaded.tokenizer.eos_id]
        assert said["prediction"] == pytest.approx(log_probs[np.arange(len(ids)), targets].mean(), rel=1e-4)
    embedded = loaded.embed(texts)
    assert embedded.shape == (3, loaded.config.model.embed_dim)
    np.testing.assert_allclose(loaded.embed(texts[1:2])[0], embedded[1], rtol=1e-4, atol=1e-5)


def test_samples_and_beams_of_texts_with_their_log_probs(run_of):
    """Prompts of different lengths, over several batches: a list for each text, alike when each is given alone."""
    loaded = moved(lm.load(str(run_of("causal_lm")), batch_size=2, devices=jax.devices()[:1]))
    texts = ["alpha beta", "the", "gamma is not model of the data", "loss"]
    options = {"samples": 3, "log_probs": True, "max_new_tokens": 6}
    drawn = loaded.generate(texts, temperature=1.5, **options)
    assert [len(each) for each in drawn] == [3] * 4
    assert len({one.text for each in drawn for one in each}) > 8
    assert loaded.generate(texts, temperature=1.5, samples=3, max_new_tokens=6) == [
        [one.text for one in each] for each in drawn
    ]
    assert loaded.generate(texts[:1], temperature=1.5, **options)[0] == drawn[0]

    best = loaded.generate(texts, beams=4, **options)
    for text, found in zip(texts, best, strict=True):
        (alone,) = loaded.generate([text], beams=4, **options)
        assert [one.token_ids for one in alone] == [one.token_ids for one in found]
        scores = [sum(one.log_probs) / ((5 + len(one.token_ids)) / 6) ** 0.6 for one in found]
        assert scores == sorted(scores, reverse=True) and len({tuple(one.token_ids) for one in found}) == 3
    assert loaded.generate(texts, beams=4, max_new_tokens=6) == [found[0].text for found in best]
    apply = jax.jit(loaded.model.apply)
    for text, each in zip(texts * 2, drawn + best, strict=True):
        for one in each:
            start = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(text)]
            tokens, segments = np.zeros((2, 1, 32), np.int32)
            tokens[0, : len(start) + len(one.token_ids)] = [*start, *one.token_ids]
            segments[0, : len(start) + len(one.token_ids)] = 1
            batch = {"tokens": tokens, "segment_ids": segments, "positions": np.arange(32)[None]}
            out = apply(loaded.params, batch)
            logits_LxV = np.asarray(out.hidden_BxLxD[0] @ out.unembed_DxV, np.float64)
            logits_TxV = logits_LxV[len(start) - 1 :][: len(one.token_ids), : loaded.tokenizer.vocab_size]
            log_probs_TxV = logits_TxV - np.log(np.exp(logits_TxV).sum(axis=1, keepdims=True))
            want = log_probs_TxV[np.arange(len(one.token_ids)), one.token_ids]
            np.testing.assert_allclose(one.log_probs, want, rtol=1e-4, atol=1e-4)


def test_stop_strings_cut_generated_texts(run_of):
    loaded = moved(lm.load(str(run_of("causal_lm")), batch_size=4, devices=jax.devices()[:1]))
    texts, options = ["alpha beta", "the"], {"temperature": 0.0, "max_new_tokens": 20}
    whole = loaded.generate(texts, **options)
    string = whole[0][5:7]
    made = loaded.generate(texts, stop=(string,), log_probs=True, **options)
    assert [each.text for each in made] == [text.partition(string)[0] for text in whole]
    assert len(made[0].log_probs) == len(made[0].token_ids) < 20


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beams": 2, "temperature": 0.5}, "'temperature' is of sampling and has no effect on a search with 2 beams"),
        ({"beams": 2, "stop": ("a",)}, "'generate.stop' is not read by beam search"),
        ({"beams": 2, "samples": 3}, "'samples' (3) are the best of 'beams' (2)"),
        ({"samples": 3, "temperature": 0.0}, "'samples' is 3, but they are all alike at temperature 0"),
        ({"samples": 0}, "expected 'beams' of at least 0 and 'samples' of at least 1"),
        ({"alpha": 1.0}, "'alpha' is of beam search and has no effect on sampling"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "'generate.min_new_tokens' (9) is above"),
        ({"stop": ("</s>",)}, "'generate.stop' has '</s>', a control symbol"),
    ],
)
def test_options_of_generation_without_effect_are_refused(run_of, options, says):
    loaded = lm.load(str(run_of("causal_lm")), batch_size=2, devices=jax.devices()[:1])
    with pytest.raises(ConfigError) as error:
        loaded.generate(["alpha"], **options)
    assert says in str(error.value)


@pytest.mark.slow
def test_translations_are_predicted_with_the_options_of_decoding(run_of, tmp_path):
    """Flags of tools/predict.py; a part file of other options is not gone on with."""
    run = run_of("translation")
    path = used_runs.KINDS["translation"].write(tmp_path / "new", 1, 3)
    arguments = (f"--run={run}", f"--path={path}")
    out = tmp_path / "out.jsonl"
    tool_modules.call("predict", *arguments, f"--out={out}", "--max_new_tokens=5", "--min_new_tokens=5")
    said = [json.loads(line)["prediction"] for line in out.read_text().splitlines()]
    sources = [json.loads(line)["record"]["text"] for line in out.read_text().splitlines()]
    loaded = lm.load(str(run))
    assert said == loaded.generate(sources, max_new_tokens=5, min_new_tokens=5)
    made = loaded.generate(sources, max_new_tokens=5, min_new_tokens=5, samples=2, log_probs=True)
    assert [[len(one.token_ids) for one in each] for each in made] == [[5, 5]] * 3
    assert len(loaded.generate(sources, beams=0, samples=5, temperature=1.0)) == 3
    with pytest.raises(ConfigError, match="'beams' is 0: predictions are searched for"):
        loaded.predict([{"text": sources[0]}], beams=0)
    stopping = dataclasses.replace(loaded, config=sampling.changed(loaded.config, {"stop": ("a",)}))
    data = eval_sets.data_at(loaded.config, str(path))
    with pytest.raises(ConfigError, match=r"'generate\.stop' is not read by beam search"):
        predict.write_predictions(stopping, data, tmp_path / "never.jsonl")
    with pytest.raises(ConfigError, match=r"'generate\.stop' is not read by beam search"):
        scoring.evaluate(stopping, data)
    assert not list(tmp_path.glob("never*"))
    part = tmp_path / "other.jsonl.part"
    data = eval_sets.data_at(loaded.config, str(path))
    about = {"model": loaded.name, "checkpoint": loaded.fingerprint, "beams": 4, "data": schema.to_dict(data)}
    part.write_text("")
    part.with_name(f"{part.name}.json").write_text(
        json.dumps(about | {"generate": schema.to_dict(loaded.config.generate)})
    )
    with pytest.raises(SystemExit, match="was begun with another model, file or option"):
        tool_modules.call("predict", *arguments, f"--out={tmp_path}/other.jsonl", "--repetition_penalty=1.5")
    tool_modules.call("predict", *arguments, f"--out={tmp_path}/other.jsonl")


def test_options_of_decoding_are_refused_for_tasks_that_do_not_generate(run_of, tmp_path):
    with pytest.raises(
        SystemExit, match=r"--min_new_tokens is of translations, but this is a run of task\.name=causal"
    ):
        tool_modules.call(
            *("predict", f"--run={run_of('causal_lm')}", "--path=x.txt", f"--out={tmp_path}/out.jsonl"),
            "--min_new_tokens=3",
        )


def test_a_classifier_has_logits_of_classes_and_generates_nothing(classifier):
    said = classifier.predict(["alpha pos", {"text": "neg beta", "label": "neg"}])
    for one, logits_C in zip(said, classifier.logits(["alpha pos", "neg beta"]), strict=True):
        shares = np.exp(logits_C - logits_C.max())
        assert list(one["probabilities"].values()) == pytest.approx((shares / shares.sum()).tolist(), rel=1e-5)
    assert classifier.embed(["alpha"]).shape == (1, classifier.config.model.embed_dim)
    with pytest.raises(ConfigError, match="does not generate text"):
        classifier.generate(["alpha"])
    with pytest.raises(DataError, match="record 1: wrong type"):
        classifier.predict([{"text": "a"}, {"text": 3}])


@pytest.mark.slow
def test_a_resumed_run_predicts_the_same(run_of, tmp_path):
    settings = {"checkpoint__every_steps": 1, "checkpoint__keep_latest": 5}
    run = used_runs.make("classification", tmp_path, **settings)
    texts = ["alpha pos", "neg beta", "the run is"]
    at = {step: lm.load(f"{run}@{step}", devices=jax.devices()[:1]).predict(texts) for step in (2, 3)}
    assert at[2] != at[3]
    shutil.rmtree(run / "checkpoints" / "3")
    (run / "summary.json").unlink()
    used_runs.make("classification", tmp_path, **settings)  # goes on from step 2
    for step, said in at.items():
        assert lm.load(f"{run}@{step}", devices=jax.devices()[:1]).predict(texts) == said
