"""lm/data/pairs.py: stretches of documents and what spoils them, and sentences side by side."""

import dataclasses
import itertools

import numpy as np
import pytest

from lm import config
from lm.config import Config, CorruptConfig, DataConfig
from lm.data import pipeline, sources, tokenizer
from lm.data.tasks import TASKS

TEXTS = [" ".join(f"{chr(97 + i % 26)}{7 * i + j * j}" for j in range(9)) + "\n" for i in range(40)]
TOK = dataclasses.replace(tokenizer.train(TEXTS, 330, 100_000), extra_ids=1)


def build(**options):
    data = DataConfig(**({"seq_len": 16, "packing": "pad"} | options.pop("data")))
    records = [{"text": text, "source": f"f:{i}"} for i, text in enumerate(TEXTS)]
    if data.task != "masked_pairs":
        records = [r | {"text_pair": f"pair {r['text']}", "negative": f"not {r['text']}"} for r in records]
    split = sources.Split(records, records, "", "")
    return pipeline.build(
        dataclasses.replace(Config(**options), data=data, tokenizer=config.TokenizerConfig()), TOK, split
    )


def take(data, count):
    stream = pipeline.train_batches(data, batch_size=64, start_example=0, local_rows=np.arange(64), seed=0)
    batches = list(itertools.islice(stream, count))
    stream.close()
    return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}


@pytest.mark.parametrize("how", ["next", "order"])
def test_half_of_the_pairs_are_as_in_the_document_and_the_label_says_which(how):
    """Unmasked (targets), a pair that is not spoilt reads on; a spoilt one does not, or does the other way round."""
    batch = take(build(data={"task": "masked_pairs"}, corrupt=CorruptConfig(pairs=how)), 4)
    documents = [tuple(TOK.encode(text)) for text in TEXTS]
    where = {ids[i : i + 13]: d for d, ids in enumerate(documents) for i in range(0, len(ids), 13)}
    assert set(batch["labels"].tolist()) == {0, 1} and 0.4 < batch["labels"].mean() < 0.6
    for row in range(len(batch["labels"])):
        real = batch["segment_ids"][row] > 0
        ids, types = batch["targets"][row][real], batch["type_ids"][row][real]
        assert ids[0] == TOK.bos_id and ids[-1] == TOK.eos_id and (np.diff(types) >= 0).all()
        first, second = ids[(types == 0)][1:-1], ids[types == 1][:-1]
        straight, swapped = tuple([*first, *second]), tuple([*second, *first])
        if batch["labels"][row] == 0:
            assert straight in where
        elif how == "order":
            assert swapped in where
        else:
            assert straight not in where or len(straight) < 6, "the ends of documents may be alike"
        chosen = batch["loss_weights"][row] > 0
        assert chosen.any() and not TOK.is_control_V[batch["targets"][row][chosen]].any()
    again = take(build(data={"task": "masked_pairs"}, corrupt=CorruptConfig(pairs=how)), 4)
    for key, x in batch.items():
        np.testing.assert_array_equal(x, again[key])


@pytest.mark.parametrize(("task", "fields"), [("lone_sentences", 1), ("sentence_pairs", 2), ("sentence_triples", 3)])
def test_sentences_lie_side_by_side(task, fields):
    data = build(data={"task": task, "seq_len": 40})
    names = ("text", "text_pair", "negative")[:fields]
    assert data.valid.rows["tokens"].shape == (len(TEXTS), fields, 40)
    for row, text in enumerate(TEXTS):
        said = {"text": text, "text_pair": f"pair {text}", "negative": f"not {text}"}
        for place, name in enumerate(names):
            real = data.valid.rows["segment_ids"][row, place] > 0
            want = [TOK.bos_id, *TOK.encode(said[name])[:38], TOK.eos_id]
            assert data.valid.rows["tokens"][row, place][real].tolist() == want
            assert data.valid.rows["positions"][row, place][real].tolist() == list(range(len(want)))
    assert list(TASKS[task].texts(said)) == [said[name] for name in names]
