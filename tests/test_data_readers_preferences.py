"""Published forms of preference pairs, each read as the same record: a prompt and two answers, lists of messages."""

import json

import pytest

from lm.config import DataConfig
from lm.data import splits
from lm.data.readers import fields, registry
from lm.data.readers.fields import BadRecord
from lm.data.record import Wanted
from tests import small_sets

WANTED = Wanted("preferences", fields=("chosen", "rejected"))
SYSTEM, ASK = {"role": "system", "content": "S"}, {"role": "user", "content": "Q"}
GOOD, BAD = {"role": "assistant", "content": "A"}, {"role": "assistant", "content": "B"}
PAIR = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}
MORE = [ASK, GOOD, {"role": "user", "content": "R"}]


def fault(value):
    with pytest.raises(BadRecord) as error:
        fields.normalise(value, {}, WANTED)
    return error.value.args[:2]


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Q", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        # ultrafeedback_binarized; 'messages' are the chosen answer once more
        {"prompt": "Q", "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "messages": [ASK, GOOD], "score_chosen": 8.5},
        # hh-rlhf
        {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
        {"instruction": "Q", "input": "", "output": "C", "chosen": "A", "rejected": "B"},
        {"prompt": [{"from": "human", "value": "Q"}], "chosen": [{"from": "gpt", "value": "A"}], "rejected": "B"},
    ],
)
def test_every_published_form_of_a_pair_is_the_same_record(value):
    assert fields.normalise(value, {}, WANTED) == PAIR


@pytest.mark.parametrize(
    "value",
    [
        {"chosen": [SYSTEM, *MORE, GOOD], "rejected": [SYSTEM, *MORE, BAD]},
        {"prompt": [SYSTEM, *MORE], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": MORE, "chosen": "A", "rejected": "B", "system": "S"},
        {"prompt": "Q", "chosen": [SYSTEM, *MORE, GOOD], "rejected": [SYSTEM, *MORE, BAD]},
    ],
)
def test_conversations_share_all_before_the_first_difference(value):
    expected = {"prompt": [SYSTEM, *MORE], "chosen": [GOOD], "rejected": [BAD]}
    assert fields.normalise(value, {}, WANTED) == expected


def test_a_conversation_that_differs_early_is_an_answer_of_several_messages():
    chosen, rejected = [*MORE, GOOD], [ASK, BAD, {"role": "user", "content": "R"}, GOOD]
    record = fields.normalise({"chosen": chosen, "rejected": rejected}, {}, WANTED)
    assert record == {"prompt": [ASK], "chosen": chosen[1:], "rejected": rejected[1:]}


def test_equal_conversations_are_two_equal_answers():
    record = fields.normalise({"chosen": [*MORE, GOOD], "rejected": [*MORE, GOOD]}, {}, WANTED)
    assert record == {"prompt": MORE, "chosen": [GOOD], "rejected": [GOOD]}


def test_instructions_keep_their_input_and_system_prompt():
    value = {"instruction": "Q", "input": "X", "system": "S", "chosen": "A", "rejected": "B"}
    prompt = [SYSTEM, {"role": "user", "content": "Q\n\nX"}]
    assert fields.normalise(value, {}, WANTED) == {"prompt": prompt, "chosen": [GOOD], "rejected": [BAD]}


def test_a_task_that_does_not_ask_for_pairs_reads_what_it_read_before():
    value = {"prompt": "Q", "chosen": [ASK, GOOD], "rejected": [ASK, 7], "messages": [ASK, GOOD]}
    assert fields.normalise(value, {}) == {"messages": [ASK, GOOD]}
    value = {"instruction": "Q", "output": "A", "chosen": "A", "rejected": 7}
    assert fields.normalise(value, {}) == {"messages": [ASK, GOOD]}
    assert fields.normalise({"text": "Q", "chosen": "A", "rejected": "B"}, {}) == {"text": "Q"}
    assert fields.normalise({"prompt": "Q", "chosen": "A", "rejected": "B"}, {}) == PAIR


def test_a_task_that_asks_for_pairs_still_reads_records_of_other_forms():
    assert fields.normalise({"text": "Q"}, {}, WANTED) == {"text": "Q"}


@pytest.mark.parametrize(
    ("value", "kind", "says"),
    [
        (
            {"chosen": "A", "rejected": "B"},
            "missing field",
            "'chosen' is str 'A'; expected 'prompt' beside it, messages",
        ),
        ({"prompt": "Q", "chosen": "A"}, "missing field", "found 'prompt', 'chosen'; expected"),
        ({"prompt": "Q", "chosen": " ", "rejected": "B"}, "empty text", "'chosen' is str ' '; expected text"),
        ({"prompt": "Q", "chosen": ["A"], "rejected": "B"}, "wrong type", "'chosen[0]' is str 'A'; expected an object"),
        ({"prompt": "Q", "chosen": [ASK, GOOD], "rejected": [ASK, 7]}, "wrong type", "'rejected[1]' is int 7"),
        (
            {"prompt": "other", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
            "wrong prompt",
            "'chosen' and 'rejected': they share list ['Q']; expected 'prompt' in it",
        ),
        (
            {"chosen": [*MORE, GOOD], "rejected": [ASK, GOOD, {"role": "user", "content": "T"}, BAD]},
            "different prompts",
            "'chosen' differs from the other answer in a message of role user; expected one prompt",
        ),
    ],
)
def test_what_is_no_pair_is_refused(value, kind, says):
    found, message = fault(value)
    assert found == kind and says in message


@pytest.mark.parametrize("name", ["jsonl", "json", "csv", "parquet", "arrow", "array_record"])
def test_every_format_gives_the_pair_that_the_task_asks_for(tmp_path, name):
    rows = [{"prompt": f"Q {n}", "chosen": "A", "rejected": "B", "response": "C"} for n in range(9)]
    path = tmp_path / f"a.{name}"
    if name == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name == "json":
        path.write_text(json.dumps(rows))
    elif name == "csv":
        path.write_text("prompt,chosen,rejected,response\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    elif name == "array_record":
        small_sets.write_array_record(path, [json.dumps(row).encode() for row in rows])
    else:
        {"parquet": small_sets.write_parquet, "arrow": small_sets.write_arrow}[name](path, small_sets.table(rows))
    cfg = DataConfig(format={"json": "jsonl", "csv": "table"}.get(name, name), path=str(path), eval_fraction=0.3)
    split = registry.load(cfg, WANTED)
    found = {record["prompt"][0]["content"]: record for record in (*split.train, *split.valid)}
    assert found.keys() == {row["prompt"] for row in rows}
    assert all(record["chosen"] == [GOOD] and record["rejected"] == [BAD] for record in found.values())
    assert "split by prompt" in split.report
    of_chats = registry.load(cfg)
    assert {tuple(record) for record in of_chats.train} == {("messages", "source", "identity")}


def test_a_set_of_tfds_gives_the_pair_that_the_task_asks_for(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    names = ("prompt", "chosen", "rejected", "response")
    rows = [dict(zip(names, (f"Q {n}", "A", "B", "C"), strict=True)) for n in range(9)]
    small_sets.write_tfds(tmp_path, "pairs", dict.fromkeys(names, tfds.features.Text()), {"train": rows})
    split = registry.load(DataConfig(format="tfds", path="pairs", eval_fraction=0.3), WANTED)
    assert len(split.train) + len(split.valid) == 9
    assert all(record["chosen"] == [GOOD] and record["rejected"] == [BAD] for record in split.train)


def test_pairs_of_one_prompt_are_on_one_side_of_a_split():
    pairs = [{**PAIR, "chosen": [{**GOOD, "content": str(n)}], "source": f"f:{n}"} for n in range(8)]
    others = [{**PAIR, "prompt": [{**ASK, "content": str(n)}], "source": f"g:{n}"} for n in range(8)]
    train, valid = splits.hold_out([*pairs, *others], 0.3)
    assert sum(record in train for record in pairs) in (0, 8) and train and valid


def test_a_prompt_is_on_the_same_side_for_chats_and_for_pairs():
    asked = [[{**ASK, "content": str(n)}] for n in range(40)]
    pairs = [{**PAIR, "prompt": prompt, "source": f"f:{n}"} for n, prompt in enumerate(asked)]
    chats = [{"messages": [*prompt, GOOD], "source": f"f:{n}"} for n, prompt in enumerate(asked)]
    held_out = [{record["source"] for record in splits.hold_out(records, 0.3)[1]} for records in (pairs, chats)]
    assert held_out[0] == held_out[1] and 0 < len(held_out[0]) < 40
