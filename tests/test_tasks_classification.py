"""lm/tasks/classification.py: rows of sentences and pairs, how they are cut, and their labels."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm import config, input_pipeline
from lm.data import packing, tokenizer
from lm.data.record import DataError
from lm.tasks import TASKS
from lm.tasks.classification import encode_pair
from tests import toys

TEXTS = [f"a film of {n} plots, and good ones {n * n}." for n in range(40)]
TOK = tokenizer.train(TEXTS, 330, 100_000)


def cut_by_hand(a, b, room):
    """BERT's rule: until both fit, remove the last id of the longer one; of the second if they are equally long."""
    a, b = list(a), list(b)
    while len(a) + len(b) > room:
        (a if len(a) > len(b) else b).pop()
    return a, b


some_text = st.lists(st.sampled_from(["a film", " of", " plots", ",", "x", " good ones"]), max_size=12).map("".join)


@given(first=some_text, second=st.none() | some_text, seq_len=st.integers(5, 40))
def test_a_long_pair_is_cut_as_in_bert(first, second, seq_len):
    counts = Counter()
    made = encode_pair(first, second, TOK, seq_len, counts)
    whole_a, whole_b = TOK.encode(first), TOK.encode(second or "")
    a, b = cut_by_hand(whole_a, whole_b, seq_len - (2 if second is None else 3))
    tokens, types = [TOK.bos_id, *a, TOK.eos_id], [0] * (len(a) + 2)
    if second is not None:
        tokens, types = [*tokens, *b, TOK.eos_id], types + [1] * (len(b) + 1)
    assert made["tokens"].tolist() == tokens and made["type_ids"].tolist() == types
    assert made["tokens"].dtype == made["type_ids"].dtype == np.int32
    assert counts == ({"sentence_cut": 1} if len(a) + len(b) < len(whole_a) + len(whole_b) else {})


def rows(name, records, **options):
    cfg = config.Config(task=toys.task(name, **options), data=config.DataConfig(packing="pad", seq_len=12))
    counts = Counter()
    made = input_pipeline.make_examples(TASKS[name], records, TOK, cfg, counts)
    return packing.pack(made, TASKS[name].columns(cfg), cfg.data)[0], counts


def test_classification_rows_have_the_index_of_their_label():
    records = [{"text": "a film", "label": label, "source": "f:1"} for label in ("no", "yes", "maybe", "no")]
    records[1]["text_pair"] = "good ones"
    made, counts = rows("classification", records, labels=("maybe", "no", "yes"))
    assert made["labels"].tolist() == [1, 2, 0, 1] and counts == {"documents": 4, "examples": 4}
    assert [set(types.tolist()) for types in made["type_ids"]] == [{0}, {0, 1}, {0}, {0}]
    lengths = (made["segment_ids"] > 0).sum(axis=1)
    assert lengths[0] == len(TOK.encode("a film")) + 2 < lengths[1]
    assert made["positions"][0].tolist() == [*range(lengths[0]), *[0] * (12 - lengths[0])]


def test_regression_rows_have_the_value_of_their_label():
    records = [{"text": "a film", "label": label, "source": "f:1"} for label in ("0.25", "-3", "5e-1")]
    assert rows("regression", records)[0]["labels"].tolist() == [0.25, -3.0, 0.5]


def test_an_unknown_label_is_refused_with_the_record_named():
    record = {"text": "a film", "label": "Yes", "source": "f:7"}
    with pytest.raises(DataError, match=r"f:7: unknown label 'Yes' \(did you mean 'yes'\?\); task\.labels has no, yes"):
        rows("classification", [record], labels=("no", "yes"))
    for label in ("high", "nan", "inf", ""):
        with pytest.raises(DataError, match=rf"f:7: found the label '{label}'; expected a finite number"):
            rows("regression", [record | {"label": label}])
