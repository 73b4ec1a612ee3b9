"""lm/scoring.py and tools/evaluate.py: the scores of training, equal to those of other libraries on the predictions."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import lm
from lm import eval_sets, scoring
from lm.config.schema import ConfigError
from lm.tracking import files
from tests import tool_modules, used_runs
from tests.test_evaluation_scores import f1_score, normalize_answer
from tests.test_predict import close, moved

COUNT = 40


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Task -> (model, data, scores) of a model with random parameters."""
    made: dict[str, tuple] = {}

    def make(task: str) -> tuple:
        if task not in made:
            folder = tmp_path_factory.mktemp(task)
            run = used_runs.make(task, folder)
            loaded = moved(lm.load(str(run), batch_size=8, devices=jax.devices()[:1]))
            path = used_runs.KINDS[task].write(folder / "new", 1, COUNT)
            data = eval_sets.data_at(loaded.config, str(path))
            made[task] = loaded, data, scoring.evaluate(loaded, data, resamples=20)
        return made[task]

    return make


@pytest.mark.parametrize("task", ["classification", pytest.param("causal_lm", marks=pytest.mark.slow)])
def test_scores_are_those_that_training_reported(task, tmp_path):
    """The same records, as validation of the run and as a test set."""
    held_out = used_runs.KINDS[task].write(tmp_path / "held_out", 1, COUNT)
    run = used_runs.make(task, tmp_path, data__eval_path=str(held_out), data__packing="pad")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    reported = [line for line in lines if line["split"] == "eval"][-1]
    loaded = lm.load(str(run), devices=jax.devices()[:1])
    found = scoring.evaluate(loaded, eval_sets.data_at(loaded.config, str(held_out)), resamples=2)
    for name, value in found.values.items():
        assert value == pytest.approx(reported[name], rel=1e-5, abs=1e-6), name
    assert {"loss", "nll", "accuracy"} <= found.values.keys()
    summary = files.read_document(run / "summary.json")
    assert summary["records"]["valid"]["documents"] == COUNT
    tables = {name: {key: one[key] for key in ("labels", "confusion")} for name, one in found.tables.items()}
    assert ("confusion" in summary) == bool(tables)
    if tables:
        assert summary["confusion"] == {"step": reported["step"], "tables": tables}


def test_figures_of_a_classifier_equal_scikit_learn_on_its_predictions(scored):
    metrics = pytest.importorskip("sklearn.metrics")
    _, _, found = scored("classification")
    right, said = zip(*((one["record"]["label"], one["prediction"]) for one in found.predictions), strict=True)
    assert len(set(said)) == 2
    assert found.values["accuracy"] == pytest.approx(metrics.accuracy_score(right, said))
    assert found.values["f1"] == pytest.approx(metrics.f1_score(right, said, pos_label="pos"))
    assert found.values["matthews"] == pytest.approx(metrics.matthews_corrcoef(right, said))
    shares = [list(one["probabilities"].values()) for one in found.predictions]
    assert found.values["nll"] == pytest.approx(metrics.log_loss(right, shares, labels=["neg", "pos"]), rel=1e-4)
    table = found.tables[""]
    assert table["confusion"] == metrics.confusion_matrix(right, said, labels=table["labels"]).tolist()
    assert found.calibration["ece"] > 0
    low, high = (float(edge) for edge in np.quantile(found.samples["accuracy"], [0.025, 0.975]))
    assert scoring.as_json(found)["metrics"]["accuracy"]["interval"] == [low, high] and low < high


def test_an_example_is_shown_with_its_own_prediction_also_where_places_are_shared(scored, tmp_path, monkeypatch):
    loaded, _, first = scored("classification")
    path = tmp_path / "one_line.json"  # all records of it stand in line 1
    path.write_text(json.dumps([one["record"] for one in first.predictions]))
    found = scoring.evaluate(loaded, eval_sets.data_at(loaded.config, str(path), format="jsonl"), resamples=2)
    assert len({one["source"] for one in found.predictions}) == 1
    said = {one["identity"]: one["prediction"] for one in found.predictions}
    monkeypatch.setattr(scoring, "_WORST", COUNT)
    worst = scoring.as_json(found)["worst"]
    assert [one["prediction"] for one in worst] == [said[one["identity"]] for one in worst]
    assert len({one["prediction"] for one in worst}) == 2


def test_figures_of_a_tagger_equal_seqeval_on_its_predictions(scored):
    seqeval = pytest.importorskip("seqeval.metrics")
    _, _, found = scored("tagging")
    right, said = (
        [one["record"]["tags"] for one in found.predictions],
        [one["prediction"] for one in found.predictions],
    )
    assert [len(tags) for tags in right] == [len(tags) for tags in said]
    assert found.values["entity_f1"] == pytest.approx(seqeval.f1_score(right, said))
    assert found.values["entity_precision"] == pytest.approx(seqeval.precision_score(right, said))
    assert found.values["token_accuracy"] == pytest.approx(seqeval.accuracy_score(right, said))
    assert found.counts["sentence_cut"] > 0
    assert sum(map(sum, found.tables[""]["confusion"])) == sum(map(len, right))


@pytest.mark.slow
def test_figures_of_span_questions_equal_the_squad_script_on_the_predictions(scored, tmp_path):
    """Of a third of the questions the answer is what the model says, of a third a word of it."""
    loaded, _, first = scored("span_qa")
    assert first.counts["context_cut"] > 0
    asked = []
    for number, one in enumerate(first.predictions):
        record, said = one["record"], one["prediction"]
        assert record["context"][one["start"] : one["end"]] == said
        texts = [said, said.split()[0]]
        answers = [{"text": texts[number % 3], "answer_start": one["start"]}] if number % 3 < 2 else record["answers"]
        qas = [{"id": record["id"], "question": record["question"], "answers": answers}]
        asked.append({"context": record["context"], "qas": qas})
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"data": [{"paragraphs": asked}]}))
    found = scoring.evaluate(loaded, eval_sets.data_at(loaded.config, str(path)), resamples=20)
    pairs = [(one["prediction"], [a["text"] for a in one["record"]["answers"]]) for one in found.predictions]
    exact = np.mean([max(normalize_answer(said) == normalize_answer(text) for text in texts) for said, texts in pairs])
    overlap = np.mean([max(f1_score(said, text) for text in texts) for said, texts in pairs])
    assert found.values["exact_match"] == pytest.approx(exact) and found.values["f1"] == pytest.approx(overlap)
    assert 0.3 < exact <= overlap


@pytest.mark.slow
def test_a_run_that_draws_other_records_beside_each_one_is_not_scored(tmp_path):
    loaded = lm.load(str(used_runs.make("masked_lm_pairs", tmp_path)), devices=jax.devices()[:1])
    path = used_runs.KINDS["masked_lm_pairs"].write(tmp_path / "new", 1, COUNT)
    with pytest.raises(ConfigError, match="draws a random other record"):
        scoring.evaluate(loaded, eval_sets.data_at(loaded.config, str(path)), resamples=2)


def test_bad_records_that_are_left_out_are_noted(scored, tmp_path):
    loaded, _, _ = scored("classification")
    path = used_runs.KINDS["classification"].write(tmp_path / "new", 1, 4)
    path.write_text("no JSON\n" + path.read_text())
    notes = []
    data = eval_sets.data_at(loaded.config, str(path), max_bad_records=1)
    assert len(scoring.evaluate(loaded, data, resamples=2, note=notes.append).records) == 4
    assert any(note.startswith("skipped 1 bad records:") for note in notes)


def test_results_do_not_replace_those_of_an_earlier_evaluation(tmp_path):
    scoring.check_folder(tmp_path / "new")
    (tmp_path / "new" / "scores.json").write_text("{}")
    with pytest.raises(ConfigError, match="has the scores of an earlier evaluation"):
        scoring.check_folder(tmp_path / "new")


@pytest.mark.slow
def test_translations_are_compared_with_their_own_references_where_a_pair_is_dropped(scored, tmp_path):
    loaded, _, first = scored("translation")
    pairs = [(one["record"]["text"], one["prediction"] or "x") for one in first.predictions[:8]]
    long = " ".join(text for text, _ in pairs * 20)
    for number, name in enumerate(("new.en", "new.de")):
        (tmp_path / name).write_text("".join(pair[number] + "\n" for pair in [(long, long), *pairs]))
    data = eval_sets.data_at(loaded.config, f"{tmp_path}/new.{{en,de}}")
    cfg = dataclasses.replace(loaded.config, data=dataclasses.replace(loaded.config.data, overlong="drop"))
    found = scoring.evaluate(dataclasses.replace(loaded, config=cfg), data, resamples=2)
    assert len(found.records) == len(pairs) and len(found.predictions) == len(pairs) + 1
    said = [one["prediction"] for one in found.predictions[1:]]
    assert len({*said}) > 4 and said == [target for _, target in pairs]
    assert found.values["chrf"] == pytest.approx(100.0)


@pytest.mark.slow
def test_figures_of_a_translator_equal_sacrebleu_on_its_predictions(scored):
    sacrebleu = pytest.importorskip("sacrebleu")
    _, _, found = scored("translation")
    said, right = (
        [one["prediction"] for one in found.predictions],
        [one["record"]["target"] for one in found.predictions],
    )
    assert found.values["bleu"] == pytest.approx(sacrebleu.corpus_bleu(said, [right]).score)
    assert found.values["chrf"] == pytest.approx(sacrebleu.corpus_chrf(said, [right]).score)


def test_neither_batches_nor_devices_change_a_score(scored):
    loaded, data, found = scored("classification")
    mesh = lm.load(loaded.name).mesh
    assert mesh.size == 8
    spread = dataclasses.replace(loaded, mesh=mesh, batch_size=16)
    other = scoring.evaluate(spread, data, resamples=20)
    assert close(scoring.as_json(other), scoring.as_json(found))


def test_a_run_compared_with_itself_does_not_differ_and_with_another_does(scored):
    loaded, data, found = scored("classification")
    same = scoring.compare(found, found)
    assert all(one == {"value": 0.0, "interval": [0.0, 0.0]} for one in same["differences"].values())
    assert same["mcnemar"]["p_value"] == 1.0
    other = scoring.evaluate(dataclasses.replace(moved(loaded), name="other@1"), data, resamples=20)
    differs = scoring.compare(found, other)
    expected = found.values["accuracy"] - other.values["accuracy"]
    assert differs["differences"]["accuracy"]["value"] == pytest.approx(expected)
    test = differs["mcnemar"]
    assert (test["only_first"] - test["only_second"]) / COUNT == pytest.approx(expected)
    assert "McNemar: right alone" in scoring.comparison_in_words(differs)
    fewer = dataclasses.replace(other, records=other.records[1:])
    with pytest.raises(ConfigError, match="not scored on the same records"):
        scoring.compare(found, fewer)


def test_the_tool_prints_a_report_and_writes_its_figures(scored, tmp_path, capsys):
    loaded, data, _ = scored("classification")
    arguments = [f"--run={loaded.name}", f"--path={data.path}", f"--out={tmp_path / 'out'}", "--resamples=10"]
    tool_modules.call("evaluate", *arguments, f"--compare={loaded.name}")
    said = capsys.readouterr().out
    for part in (
        "95 % interval",
        "10 resamples",
        "precision",
        "right \\ predicted",
        "ECE, 15 bins",
        "largest losses",
        "McNemar",
    ):
        assert part in said, part
    content = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert content["resamples"] == 10 and content["records"] == COUNT and len(content["worst"]) == 20
    losses = [one["loss"] for one in content["worst"]]
    assert losses == sorted(losses, reverse=True)
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == COUNT
    assert Path(tmp_path / "out" / "scores.txt").read_text() in said


@pytest.mark.slow
@pytest.mark.parametrize("task", ["next_item", "masked_item"])
def test_the_hit_rate_is_the_share_of_targets_among_the_predicted_items(task, scored):
    _, _, found = scored(task)
    hits = [one["record"]["target"] in one["prediction"] for one in found.predictions]
    assert found.values["hr_at_10"] == pytest.approx(np.mean(hits)) and 0 < np.mean(hits) < 1
