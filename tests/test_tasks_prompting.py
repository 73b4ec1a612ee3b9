"""Prompting: rows made by hand, balanced shots, refused templates, and the choice of the likeliest word."""

import dataclasses
import itertools
import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import config, input_pipeline, losses, train
from lm.config.schema import ConfigError
from lm.data import tokenizer
from lm.data.readers import registry
from lm.data.record import DataError
from lm.tasks import TASKS, prompting
from tests import toys

LABELS = ("0", "1", "2")
TEMPLATES = (
    "{text} It was {label:bad|good|so so}.",
    "Review: {text}\nThis is {label}",
    "{{x}} {text}{label:a| b|c} end",
)
TEXTS = [f"a film of {n} plots, and good ones {n * n}, bad it was." for n in range(40)]
TOK = tokenizer.train(TEXTS, 330, 100_000)


def records(count, first=0):
    return [{"text": TEXTS[i], "label": LABELS[i * i % 3], "source": f"f:{i}"} for i in range(first, first + count)]


def make_config(templates=TEMPLATES, seq_len=96, shots=0, labels=LABELS):
    task = toys.task("prompting", templates=templates, shots=shots, labels=labels)
    return config.Config(task=task, data=config.DataConfig(seq_len=seq_len, packing="pad"))


def spelled(row):
    """(prompt, weighted word) of each label, as text."""
    out = []
    for c in range(len(LABELS)):
        n = int(row["segment_ids"][c].sum())
        ids = [*row["tokens"][c][:n], row["targets"][c][n - 1]]
        assert ids[0] == TOK.bos_id and ids[1:n] == row["targets"][c][: n - 1].tolist()
        weights = row["loss_weights"][c].tolist()
        word = sum(weights)
        assert weights == [*[0] * int(n - word), *[1] * int(word), *[0] * (len(weights) - n)]
        assert row["positions"][c].tolist() == [*range(n), *[0] * (len(weights) - n)]
        assert not row["tokens"][c][n:].any() and not row["targets"][c][n:].any()
        at = len(ids) - int(word)
        out.append((TOK.decode(ids[:at]), TOK.decode(ids[at:])))
    return out


def make(record, cfg):
    counts = Counter()
    (example,) = prompting.prompted_sentences(record, TOK, cfg, counts)
    return example.columns, counts


@pytest.mark.parametrize(
    ("template", "stem", "words"),
    [
        (TEMPLATES[0], "{} It was", (" bad", " good", " so so")),
        (TEMPLATES[1], "Review: {}\nThis is", (" 0", " 1", " 2")),
        (TEMPLATES[2], "{{x}} {}", ("a", " b", "c")),
    ],
)
def test_a_row_is_the_template_filled_in_for_each_label(template, stem, words):
    for record in records(3):
        row, counts = make(record, make_config((template,)))
        assert spelled(row) == [(stem.format(record["text"]), word) for word in words]
        assert row["labels"] == LABELS.index(record["label"]) and not counts["prompt_cut"]
        whole = TOK.encode(stem.format(record["text"])) + TOK.encode(words[1])
        assert row["targets"][1][: len(whole)].tolist() == whole


def test_all_templates_are_used_and_a_record_always_gets_the_same_one():
    cfg = make_config()
    used = Counter()
    for record in records(40):
        row, _ = make(record, cfg)
        again, _ = make(dict(reversed(record.items())) | {"source": "elsewhere"}, cfg)
        np.testing.assert_equal(row, again)
        prompt = spelled(row)[0][0]
        used[
            next(
                i
                for i, mark in enumerate(("It was", "Review: ", "{x} "))
                if mark in (prompt[-6:], prompt[:8], prompt[:4])
            )
        ] += 1
    assert set(used) == {0, 1, 2} and min(used.values()) >= 6


@pytest.mark.parametrize("shots", [1, 3, 5, 9])
def test_shots_are_balanced_and_the_same_for_all(shots):
    cfg = make_config(TEMPLATES[:1], seq_len=1024, shots=shots)
    train_records = records(20)
    more = prompting.shots(train_records, cfg)
    assert prompting.shots(train_records[::-1], cfg) == more
    chosen = more["shots"]
    assert len({shot["text"] for shot in chosen}) == shots and all(shot in train_records for shot in chosen)
    by_label = [sum(shot["label"] == label for shot in chosen) for label in ("0", "1")]  # squares modulo 3
    assert sum(by_label) == shots and abs(by_label[0] - by_label[1]) <= 1
    words = dict(zip(LABELS, ("bad", "good", "so so"), strict=True))
    before = "".join(f"{shot['text']} It was {words[shot['label']]}.\n\n" for shot in chosen)
    for record in records(6, first=30):
        assert spelled(make(record | more, cfg)[0])[1] == (before + f"{record['text']} It was", " good")


def test_only_held_out_rows_have_shots():
    data = [
        input_pipeline.build(
            make_config(TEMPLATES[:1], 256, n), TOK, registry.Split(records(20), records(6, 30), "", "")
        )
        for n in (0, 2)
    ]
    np.testing.assert_equal(data[0].train.rows, data[1].train.rows)
    filled = [(d.valid.rows["segment_ids"] > 0).sum() for d in data]
    assert filled[1] > 2 * filled[0]


def test_a_long_prompt_is_cut_at_the_left_equally_for_all_words():
    record = records(1)[0]
    whole = spelled(make(record, make_config(TEMPLATES[:1]))[0])
    row, counts = make(record, make_config(TEMPLATES[:1], seq_len=12))
    assert counts["prompt_cut"] == 1
    cut = spelled(row)
    assert len({prompt for prompt, _ in cut}) == 1 and whole[0][0].endswith(cut[0][0])
    assert [word for _, word in cut] == [word for _, word in whole]
    assert max(int(ids.sum()) for ids in row["segment_ids"]) == 12
    with pytest.raises(DataError, match=r"f:0: the words of .* no room for the text in data\.seq_len=1"):
        make(record, make_config(TEMPLATES[:1], seq_len=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"templates": ("{text} {label}", "{txt} {label}")},
            r"'task\.templates\[1\]': '\{txt\} \{label\}' has the field \{txt\} \(did you mean 'text'\?\); "
            r"known are \{text\}, \{text_pair\}, \{label\}",
        ),
        ({"templates": ("{label} is {text}",)}, r"must have \{text\}, and \{label\} once, after all other fields"),
        ({"templates": ("{text} {label} {label}",)}, r"\{label\} once"),
        ({"templates": ("It was {label}",)}, r"must have \{text\}"),
        ({"templates": ("{text} {label",)}, r"'task\.templates\[0\]': .*expected '}'"),
        ({"templates": ("{text:>9} {label}",)}, r"only \{label:\.\.\.\} may have text after its name"),
        (
            {"templates": ("{text} {label:bad|good}",)},
            r"has the words bad, good; expected one for each of task\.labels",
        ),
        ({"templates": ("{text} {label:a|b|a}",)}, r"has the words a, b, a; .* all different"),
        ({"templates": ()}, r"'task\.templates' is empty"),
        ({"labels": ("1",)}, r"'task\.labels' is \('1',\)"),
        ({"shots": -1}, r"'task\.shots' must not be negative, got -1"),
    ],
)
def test_templates_that_cannot_be_filled_in_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        prompting.check(make_config(**changes))


def test_invalid_records_are_refused_by_name():
    cfg = make_config(("{text} {text_pair} {label}",))
    with pytest.raises(
        DataError, match=r"f:0: a template of task\.templates has \{text_pair\}, which the record lacks"
    ):
        make(records(1)[0], cfg)
    with pytest.raises(DataError, match="f:0: unknown label '7'"):
        make(records(1)[0] | {"label": "7"}, make_config())


# The loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunk_len", "softcap"), [(0, 0.0), (3, 5.0)])
def test_log_likelihoods_match_float64(chunk_len, softcap):
    rng = np.random.default_rng(0)
    B, L, D, V, vocab = 3, 7, 5, 16, 11
    hidden, unembed = rng.normal(size=(B, L, D)).astype(np.float32), rng.normal(size=(D, V)).astype(np.float32)
    targets, weights = rng.integers(0, vocab, (B, L)), rng.integers(0, 2, (B, L)).astype(np.float32)
    logits = (hidden.astype(np.float64) @ unembed)[..., :vocab]
    logits = softcap * np.tanh(logits / softcap) if softcap else logits
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = (weights * np.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]).sum(axis=1)
    hidden[weights == 0] = np.nan

    def total(hidden, unembed):
        options = {"vocab_size": vocab, "softcap": softcap, "chunk_len": chunk_len}
        return losses.sequence_log_likelihood(hidden, unembed, jnp.asarray(targets), jnp.asarray(weights), **options)

    np.testing.assert_allclose(total(jnp.asarray(hidden), jnp.asarray(unembed)), expected, rtol=1e-5)
    grads = jax.grad(lambda h, u: total(h, u).sum(), (0, 1))(jnp.asarray(hidden), jnp.asarray(unembed))
    assert all(np.isfinite(grad).all() for grad in grads) and not np.asarray(grads[0])[weights == 0].any()


def test_the_prediction_is_the_likeliest_word():
    """Against a separate forward pass for each row and label."""
    cfg = make_config(seq_len=64)
    model_cfg, model, params = toys.decoder(dataclasses.replace(toys.GPT2, num_layers=1), 64)
    rows = [make(record, cfg)[0] for record in records(5)]
    batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    batch |= {key: batch[key] % toys.VOCAB for key in ("tokens", "targets")}  # the model has no more ids
    batch |= {"row_weights": np.array([1, 1, 1, 0, 1], np.float32), "example_index": np.arange(5, dtype=np.int32)}

    class Words:
        vocab_size = toys.VOCAB

    cfg = dataclasses.replace(cfg, model=model_cfg)
    apply = jax.jit(model.apply)
    terms = TASKS["prompting"].loss(apply, cfg, Words)(params, batch, None)
    likelihood = np.zeros((5, 3))
    for b, c in itertools.product(range(5), range(3)):
        alone = {key: x[b : b + 1, c] for key, x in batch.items() if x.ndim == 3}
        out = apply(params, alone)
        logits = losses.logits(out.hidden_BxLxD, out.unembed_DxV, vocab_size=toys.VOCAB)[0]
        log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
        for t in np.flatnonzero(alone["loss_weights"][0]):
            likelihood[b, c] += log_probs[t, alone["targets"][0, t]]
    assert terms.outputs["prediction"].tolist() == likelihood.argmax(axis=1).tolist()
    labels, weights = batch["labels"], batch["row_weights"]
    nll = np.log(np.exp(likelihood).sum(axis=1)) - likelihood[np.arange(5), labels]
    assert float(terms.sum) == pytest.approx((weights * nll).sum(), rel=1e-4) and float(terms.weight) == 4


@pytest.mark.slow
def test_a_run_learns_to_choose_the_word(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for _ in range(120):
            label = int(rng.integers(2))
            words = [*rng.choice(["the", "a", "film", "plot"], 3), ("dull", "fine")[label]]
            file.write(json.dumps({"text": " ".join(words), "label": str(label)}) + "\n")
    cfg = toys.recipe(
        path,
        tokenizer__vocab_size=290,
        task__name="prompting",
        data__packing="pad",
        task__labels=("0", "1"),
        task__templates=("{text}. {label:bad|good}",),
        data__seq_len=64,
        data__eval_fraction=0.3,
        model__num_layers=1,
        model__dropout=0.0,
        optim__learning_rate=1e-2,
        optim__ema_decay=0.0,
        train__total_steps=40,
        train__micro_batches=2,
        checkpoint__best_metric="f1",
    )
    summary = train.train(cfg, tmp_path / "run")
    assert summary["before"]["accuracy"] < 0.8
    assert summary["accuracy"] > 0.9 and summary["f1"] > 0.9 and summary["loss"] < 0.4
