"""Tagging and span question answering end to end: reported scores equal those of the saved model, row by row."""

import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import checks, train
from lm import run as run_lib
from lm.config import Config
from lm.config.schema import ConfigError
from lm.data.readers import registry
from lm.tasks import TASKS, build_config, default_config, span_qa, tagging, task_config, task_of
from lm.types import ModelOutput
from tests import toys

DRUGS, PLACES = ("aspirin", "selegiline", "naloxone"), ("Rome", "New Delhi", "Kraków")


def write_sentences(path, count=60):
    """Sentences of ten or more words, so that rows of 32 positions split some; a word determines its tag."""
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(count):
        for _ in range(int(rng.integers(3, 8))):
            drug, place = rng.choice(DRUGS), rng.choice(PLACES)
            lines += [f"{drug}\tB-Drug", "was\tO", "in\tO"]
            lines += [f"{word}\t{'I' if i else 'B'}-Place" for i, word in enumerate(place.split())]
        lines.append("")
    path.write_text("\n".join(lines))
    return path


def write_questions(path, count=60):
    rng = np.random.default_rng(0)
    asked = []
    for number in range(count):
        filler = " ".join(rng.choice(["so", "it", "was", "not"], int(rng.integers(2, 25))))
        context = f"{filler} in {rng.choice(PLACES)} {filler}"
        answer = next(place for place in PLACES if place in context)
        answers = [{"text": answer, "answer_start": context.index(answer)}]
        asked.append({"context": context, "qas": [{"id": str(number), "question": "Where?", "answers": answers}]})
    path.write_text(json.dumps({"data": [{"paragraphs": asked}]}))
    return path


def run(tmp_path, data, **changes):
    cfg = toys.recipe(
        data,
        model__kind="encoder",
        model__dropout=0.0,
        data__packing="pad",
        data__eval_fraction=0.3,
        eval__at_start=False,
        train__total_steps=40,
        train__micro_batches=2,
        optim__learning_rate=2e-2,
        optim__ema_decay=0.0,
        **changes,
    )
    train.train(cfg, tmp_path / "run")
    trained, model, params, words = run_lib.load_model(str(tmp_path / "run"))
    valid = registry.load(cfg.data, task_of(cfg).wanted(cfg)).valid
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    reported = [line for line in lines if line["split"] == "eval"][-1]

    apply = jax.jit(lambda row: model.apply(params, row).head[0])

    def head(columns):
        """Computed on a single row, independent of any batch."""
        real = np.arange(cfg.data.seq_len) < len(columns["tokens"])
        row = {key: np.resize(columns[key], real.shape) * real for key in ("tokens", "type_ids") if key in columns}
        row |= {"segment_ids": real.astype(np.int32), "positions": np.arange(len(real), dtype=np.int32) * real}
        row["example_index"] = np.int32(0)
        return np.asarray(apply({key: jnp.asarray(x)[None] for key, x in row.items()}), np.float64)

    return trained, valid, words, head, reported


@pytest.mark.slow
def test_tagging_scores_of_a_run_match_the_saved_model_row_by_row(tmp_path):
    pytest.importorskip("seqeval")
    labels = ("O", "B-Drug", "I-Drug", "B-Place", "I-Place")
    rename = (("1", "token"), ("2", "tag"))
    changes = {"data__format": "conll", "task__name": "tagging", "task__labels": labels, "data__rename": rename}
    data = write_sentences(tmp_path / "a.tsv")
    cfg, valid, words, head, reported = run(tmp_path, data, **changes)
    right, nll, total, whole = 0, 0.0, 0, []
    counts: Counter[str] = Counter()
    for record in valid:
        said = []
        for example in tagging.tagged_words(record, words, cfg, counts):
            logits = head(example.columns)
            for position in np.flatnonzero(example.columns["labels"] >= 0):
                said.append(labels[logits[position].argmax()])
                nll += np.log(np.exp(logits[position]).sum()) - logits[position, example.columns["labels"][position]]
        right, total = right + sum(map(str.__eq__, said, record["tags"])), total + len(said)
        whole.append((record["tags"], said))
    assert counts["sentence_cut"] > 0 and total == sum(len(record["words"]) for record in valid)
    assert reported["token_accuracy"] == pytest.approx(right / total) == pytest.approx(reported["accuracy"])
    assert reported["loss"] == pytest.approx(nll / total, rel=1e-3)
    from seqeval.metrics import f1_score

    assert reported["entity_f1"] == pytest.approx(f1_score(*map(list, zip(*whole, strict=True))))
    assert reported["entity_f1"] > 0.9, "the tag follows from the word: this can be learnt"


@pytest.mark.slow
def test_span_qa_scores_of_a_run_match_the_saved_model_row_by_row(tmp_path):
    changes = {"data__format": "squad", "task__name": "span_qa", "model__pool": "mean"}
    data = write_questions(tmp_path / "a.json")
    cfg, valid, words, head, reported = run(tmp_path, data, **changes)
    exact, nll, rows = 0, 0.0, 0
    for record in valid:
        best = (-np.inf, "")
        for example in span_qa.windows(record, words, cfg, Counter()):
            logits, columns = head(example.columns), example.columns
            offsets = example.meta.offsets_Lx2
            context = np.flatnonzero(offsets[:, 1])
            allowed = [0, *context]
            for side in range(2):
                x = logits[allowed, side]
                nll += (np.log(np.exp(x).sum()) - logits[columns["labels"][side], side]) / 2
            rows += 1
            for i in context:
                for j in context[(context >= i) & (context < i + 30)]:
                    text = record["context"][offsets[i, 0] : offsets[j, 1]].strip()
                    best = max(best, (logits[i, 0] + logits[j, 1], text)) if text else best
        exact += best[1] == record["answers"][0]["text"]
    assert rows > len(valid) and reported["loss"] == pytest.approx(nll / rows, rel=1e-3)
    assert reported["exact_match"] == pytest.approx(exact / len(valid)) and reported["f1"] >= reported["exact_match"]
    assert reported["f1"] > 0.2


def test_padding_tokens_and_padding_rows_have_no_loss():
    """Padding has label 0, which is also a class; a model that is right elsewhere must have loss 0."""
    labels = np.array([[-1, 2, -1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]], np.int32)
    logits = 1e3 * np.eye(3, dtype=np.float32)[np.where(labels > 0, labels, 2)]
    batch = {
        "labels": labels,
        "segment_ids": np.array([[1, 1, 1, 1, 0, 0], [0] * 6, [1] * 6], np.int32),
        "row_weights": np.array([1.0, 0.0, 0.0], np.float32),
    }
    cfg = Config(task=toys.task("tagging", labels=("a", "b", "c")))
    apply = lambda params, batch, rng=None: ModelOutput(jnp.zeros(()), None, None, jnp.asarray(logits))  # noqa: E731
    terms = tagging.tagging_loss(apply, cfg, None)({}, jax.tree.map(jnp.asarray, batch), None)
    assert (float(terms.sum), float(terms.weight)) == (0.0, 2.0)


@pytest.mark.parametrize("task", ["tagging", "span_qa"])
@pytest.mark.parametrize("name", ["delete", "swap", "cutoff"])
def test_augmentation_that_moves_tokens_away_from_their_labels_is_refused(task, name):
    labels = ("a", "b")
    c = default_config(task)
    c.data.format, c.data.path, c.train.total_steps, c.model.kind = "jsonl", "x", 1, "encoder"
    c.data.packing = "pad"
    if task == "tagging":
        c.task.labels = labels
    checks.fit(build_config(c))
    c.data.augment = ((name, 0.1),)
    with pytest.raises(
        ConfigError, match=f"'data.augment': {name} does not fit 'task.name' {task}; use classification"
    ):
        checks.fit(build_config(c))
    c.task = task_config("classification", labels=labels)
    checks.fit(build_config(c))


def test_entities_are_scored_only_for_bio_tags():
    names = TASKS["tagging"].score_names
    assert names(Config(task=toys.task("tagging", labels=("NOUN", "VERB")))) == ("token_accuracy",)
    assert "entity_f1" in names(Config(task=toys.task("tagging", labels=("O", "B-X", "I-X"))))
