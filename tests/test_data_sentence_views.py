"""lm/tasks/sentence_embeddings.py: stretches of documents and what spoils them, and sentences side by side."""

import dataclasses
import itertools

import numpy as np
import pytest

from lm import config, input_pipeline
from lm.config import Config, DataConfig
from lm.data import loader, tokenizer
from lm.data.readers import registry
from lm.tasks import TASKS

TEXTS = [" ".join(f"{chr(97 + i % 26)}{7 * i + j * j}" for j in range(9)) + "\n" for i in range(40)]
TOK = dataclasses.replace(tokenizer.train(TEXTS, 330, 100_000), extra_ids=1)


def build(**options):
    options = {"model": config.ModelConfig(dropout=0.1)} | options
    data = DataConfig(**({"seq_len": 16, "packing": "pad"} | options.pop("data")))
    records = [{"text": text, "source": f"f:{i}"} for i, text in enumerate(TEXTS)]
    if data.task != "masked_pairs":
        records = [r | {"text_pair": f"pair {r['text']}", "negative": f"not {r['text']}"} for r in records]
    split = registry.Split(records, records, "", "")
    return input_pipeline.build(
        dataclasses.replace(Config(**options), data=data, tokenizer=config.TokenizerConfig()), TOK, split
    )


def take(data, count):
    stream = loader.train_batches(data, batch_size=64, start_example=0, local_rows=np.arange(64), seed=0)
    batches = list(itertools.islice(stream, count))
    stream.close()
    return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}


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
