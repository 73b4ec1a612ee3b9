"""lm/checks.py: rows that could not hold what a task trains on are refused before data is read."""

import dataclasses
from collections import Counter

import pytest

from lm import checks
from lm.config import Config, DataConfig, GenerateConfig, ModelConfig, TokenizerConfig
from lm.config.schema import ConfigError
from lm.data import tokenizer
from lm.data.record import DataError
from lm.tasks import TASKS
from lm.tasks.recommendation import ItemVocabulary
from tests import toys

TEXT = "alpha beta. gamma delta. alpha gamma."
TOK = tokenizer.train([TEXT] * 9, 285, 10_000)
ITEMS = ItemVocabulary((("a", 3), ("b", 2), ("c", 1)), 8, 1)
TURNS = [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": "beta"}]
RECORD = {
    **{"text": TEXT, "target": TEXT, "negative": "delta", "label": "a", "source": "f:1", "identity": "1"},
    **{"words": ["alpha", "beta"], "tags": ["a", "b"], "entities": [{"start": 0, "end": 5, "label": "x"}]},
    **{"question": "alpha", "context": TEXT, "answers": [{"text": "beta", "answer_start": 6}]},
    **{"items": ["a", "b", "c"], "messages": TURNS},
}
OPTIONS = {
    "classification": {"labels": ("a", "b")},
    "multitask": {"labels": ("a/x", "a/y")},
    "tagging": {"labels": ("a", "b")},
    "entities": {"labels": ("O", "B-x", "I-x")},
    "prompting": {"labels": ("a", "b"), "templates": ("{text} so {label}",)},
}
LABELS = {"regression": "1.5", "multitask": "a/x"}
OF_TEXT = [name for name, task in TASKS.items() if task.least_len]
# Whether these hold text depends on the record: those that do not are dropped and counted, or refused by their place.
BY_RECORD = ("chat", "preferences", "prompting", "masked_lm_pairs")


def config(name: str, seq_len: int, **data) -> Config:
    task = TASKS[name]
    return Config(
        task=toys.task(name, **OPTIONS.get(name, {})),
        data=DataConfig(seq_len=seq_len, packing="pad", **data),
        model=ModelConfig(kind=task.models[0], pool="last" if task.models[0] == "decoder" else "first", dropout=0.1),
        tokenizer=TokenizerConfig(extra_ids=4),
    )


@pytest.mark.parametrize("name", OF_TEXT)
def test_rows_too_short_for_any_text_are_refused_by_every_task(name):
    least = TASKS[name].least_len
    for seq_len in range(1, least):
        with pytest.raises(ConfigError, match=rf"'data.seq_len' is {seq_len}: .*task.name={name} .* at least {least}"):
            checks.fit(config(name, seq_len))


@pytest.mark.parametrize("name", [name for name in OF_TEXT if name not in BY_RECORD])
def test_rows_of_the_least_length_hold_text(name):
    cfg = config(name, max(TASKS[name].least_len, 3 if name == "span_corruption" else 0))
    checks.fit(cfg)
    words = ITEMS if name.endswith("item") else TOK
    pair = {"text_pair": "beta"} if name.startswith("contrastive") else {}
    examples = TASKS[name].examples(RECORD | pair | {"label": LABELS.get(name, "a")}, words, cfg, Counter())
    for column in ("tokens", "inputs"):
        found = [example.columns[column] for example in examples if column in example.columns]
        assert not found or any((~words.is_control_V[ids]).any() for ids in found), (column, found)
    assert examples


@pytest.mark.parametrize("name", ["classification", "regression", "multitask"])
def test_a_pair_of_sentences_needs_room_for_both(name):
    record = RECORD | {
        "text_pair": TEXT,
        "label": "a/x" if name == "multitask" else "1" if name == "regression" else "a",
    }
    with pytest.raises(ConfigError, match=r"'data.seq_len' is 4; expected at least 5, to hold text between its marks"):
        TASKS[name].examples(record, TOK, config(name, 4), Counter())
    (example,) = TASKS[name].examples(record, TOK, config(name, 5), Counter())
    assert TOK.is_control_V[example.columns["tokens"]].tolist() == [True, False, True, False, True]


def test_translations_need_room_for_text_on_both_sides():
    for target_len in (0, 2):
        checks.fit(config("translation", 2, target_len=target_len))
    with pytest.raises(ConfigError, match=r"'data.target_len' is 1: rows would hold no text; expected at least 2"):
        checks.fit(config("translation", 2, target_len=1))


def test_stop_strings_of_translations_are_refused_since_beam_search_does_not_read_them():
    cfg = dataclasses.replace(config("translation", 8), generate=GenerateConfig(stop=("a",), min_new_tokens=2))
    with pytest.raises(
        ConfigError, match=r"'generate\.stop' is set, but the texts of task\.name=translation are found"
    ):
        checks.fit(cfg)
    checks.fit(dataclasses.replace(cfg, generate=GenerateConfig(min_new_tokens=2)))


def test_a_prompt_without_room_for_its_text_is_refused_by_place():
    room = len(TOK.encode(" so")) + len(TOK.encode(" a"))
    with pytest.raises(DataError, match=rf"^f:1: .* leave no room for the text in data\.seq_len={room}"):
        TASKS["prompting"].examples(RECORD, TOK, config("prompting", room), Counter())
    (example,) = TASKS["prompting"].examples(RECORD, TOK, config("prompting", room + 1), Counter())
    assert TOK.decode(example.columns["tokens"][0]).startswith(". so")
