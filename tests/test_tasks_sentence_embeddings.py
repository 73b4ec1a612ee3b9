"""lm/tasks/sentence_embeddings.py: the sentences of a record as views of a row."""

import dataclasses

import pytest

from lm import input_pipeline
from lm.config import Config, DataConfig, ModelConfig
from lm.data import tokenizer
from lm.data.readers import registry
from lm.tasks import TASKS
from tests import toys

TEXTS = [" ".join(f"{chr(97 + i % 26)}{7 * i + j * j}" for j in range(9)) + "\n" for i in range(40)]
TOK = dataclasses.replace(tokenizer.train(TEXTS, 330, 100_000), extra_ids=1)


def build(task, seq_len):
    records = [
        {"text": text, "text_pair": f"pair {text}", "negative": f"not {text}", "source": f"f:{i}"}
        for i, text in enumerate(TEXTS)
    ]
    cfg = Config(task=toys.task(task), model=ModelConfig(dropout=0.1), data=DataConfig(seq_len=seq_len, packing="pad"))
    return input_pipeline.build(cfg, TOK, registry.Split(records, records, "", ""))


@pytest.mark.parametrize(
    ("task", "fields"), [("contrastive_sentences", 1), ("contrastive_pairs", 2), ("contrastive_triples", 3)]
)
def test_the_sentences_of_a_record_are_views_of_one_row(task, fields):
    data = build(task, seq_len=40)
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
