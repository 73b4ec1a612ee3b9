"""Published formats of conversations, each read as it is published; what cannot be trained on is refused."""

import json

import pytest
from etils import epath

from lm.config import DataConfig
from lm.data.readers import fields, registry
from lm.data.readers.fields import BadRecord
from lm.data.record import DataError
from tests import small_sets

ASK, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def read(value):
    """(role, content) of each message, and 0 behind it where an answer is not trained on."""
    found = fields.normalise(value, {})["messages"]
    assert all(list(message) in (["role", "content"], ["role", "content", "weight"]) for message in found)
    return [tuple(message.values()) for message in found]


def messages(*found):
    return read({"messages": [*found]})


def fault(value):
    with pytest.raises(BadRecord) as error:
        fields.normalise(value, {})
    return error.value.args[:2]


def call(name, arguments, number="c1"):
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def said(*calls):
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in calls)


# OpenAI's -------------------------------------------------------------------------------------------------------------


def test_weight_says_which_answers_are_trained_on():
    weighted = [ANSWER | {"weight": weight} for weight in (0, 1, None, 1.0, 0.0)]
    assert messages(ASK, *weighted) == [
        ("user", "Q"),
        ("assistant", "A", 0),
        ("assistant", "A"),
        ("assistant", "A"),
        ("assistant", "A"),
        ("assistant", "A", 0),
    ]
    for weight in (2, -1, 0.5, "0", True, False, [0]):
        assert fault({"messages": [ASK, ANSWER | {"weight": weight}]})[0] == "wrong weight"


@pytest.mark.parametrize("key", ["train", "training", "train_on_turn", "loss"])
def test_loss_keys_of_other_trainers_are_respected(key):
    assert messages(ANSWER | {key: False}, ANSWER | {key: True}) == [("assistant", "A", 0), ("assistant", "A")]
    assert fault({"messages": [ANSWER | {key: 0}]}) == (
        "wrong type",
        f"'messages[0].{key}' is int 0; expected true or false",
    )
    kind, says = fault({"messages": [ANSWER | {key: False, "weight": 1}]})
    assert kind == "wrong weight" and "contradict each other" in says


@pytest.mark.parametrize("key", ["train_detail", "loss_scale", "loss_mask", "mask", "weights", "trainable"])
def test_unknown_loss_keys_are_refused(key):
    kind, says = fault({"messages": [ASK, ANSWER | {key: [0, 1]}]})
    assert kind == "unknown weight" and f"'messages[1]' has '{key}'; expected 'weight' (0 or 1)" in says
    assert messages(ASK, ANSWER | {key: None}) == [("user", "Q"), ("assistant", "A")]


@pytest.mark.parametrize("role", ["system", "user", "tool", "developer", "function"])
def test_only_assistant_messages_can_be_trained_on(role):
    other = {"role": role, "content": "Q"}
    for no in ({"weight": 0}, {"weight": None}, {"train": False}):
        assert len(messages(other | no, ANSWER)[0]) == 2
    for yes in ({"weight": 1}, {"train": True}):
        kind, says = fault({"messages": [other | yes, ANSWER]})
        assert kind == "wrong weight" and "only assistant messages are trained on" in says


def test_names_of_roles():
    roles = ("developer", "system", "user", "tool", "function", "assistant")
    found = [role for role, _ in messages(*({"role": role, "content": "x"} for role in roles))]
    assert found == ["system", "system", "user", "tool", "tool", "assistant"]
    for role in ("robot", "User", "", None, 3, ["user"]):
        kind, says = fault({"messages": [{"role": role, "content": "x"}]})
        assert kind == "unknown role" and "expected one of system, user, assistant, tool, developer, human, gpt" in says


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ("", ""),
        (" \n", " \n"),
        ([], ""),
        ("a\r\nb", "a\nb"),
        ([{"type": "text", "text": "a, "}, {"type": "text", "text": ""}, {"type": "text", "text": "b"}], "a, b"),
        ([{"type": "text", "text": "a", "image_url": None}], "a"),  # as a column of objects has it
    ],
)
def test_content_is_a_text_null_or_parts(role, content, text):
    assert messages({"role": role, "content": content, "name": "n", "tool_call_id": "c"}) == [(role, text)]


@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "unsupported content", "[0].type' is str 'image_url'"),
        ([{"type": "text", "text": "a"}, {"type": "input_audio"}], "unsupported content", "[1].type' is str"),
        ([{"type": "file", "file": {}}], "unsupported content", "a chat is trained on as text alone"),
        ([{"type": "thinking", "thinking": "hm"}], "unsupported content", "expected text"),
        ([{"type": "refusal", "refusal": "no"}], "unsupported content", "is str 'refusal'"),  # of a user
        (["a"], "wrong type", "'messages[0].content[0]' is str 'a'; expected an object with 'type'"),
        ([{"text": "a"}], "wrong type", "expected an object with 'type'"),
        ([{"type": "text"}], "wrong type", "'messages[0].content[0].text' is NoneType None"),
        ([{"type": ["text"], "text": "a"}], "unsupported content", "is list"),
        (3, "wrong type", "'messages[0].content' is int 3; expected a string, null or a list of parts"),
        ({"text": "a"}, "wrong type", "expected a string, null or a list of parts"),
        ("a\0b", "NUL", "'messages[0].content'"),
        ([{"type": "text", "text": "a\0"}], "NUL", "'messages[0].content[0].text'"),
    ],
)
def test_content_other_than_text_is_refused(content, kind, says):
    found = fault({"messages": [{"role": "user", "content": content}, ANSWER]})
    assert found[0] == kind and says in found[1]


def test_a_refusal_is_text_of_the_assistant():
    parts = [{"type": "refusal", "refusal": "No."}]
    for answer in ({"content": None, "refusal": "No."}, {"content": parts}, {"refusal": "No."}):
        assert messages({"role": "assistant"} | answer) == [("assistant", "No.")]
    assert messages(ANSWER | {"refusal": None, "tool_calls": None, "audio": None}) == [("assistant", "A")]


def test_tool_calls_become_text_of_the_assistant():
    rome, oslo = call("weather", '{"city": "Rome"}'), call("weather", {"city": "Tromsø"}, "c2")
    texts = (
        '{"name": "weather", "arguments": {"city": "Rome"}}',
        '{"name": "weather", "arguments": {"city": "Tromsø"}}',
    )
    for content, before in ((None, ""), ("", ""), ("Wait.", "Wait.\n")):
        answer = {"role": "assistant", "content": content, "tool_calls": [rome, oslo]}
        assert messages(answer, {"role": "tool", "content": "18"}) == [
            ("assistant", before + said(*texts)),
            ("tool", "18"),
        ]
    assert messages({"role": "assistant", "tool_calls": [rome], "weight": 0}) == [("assistant", said(texts[0]), 0)]
    legacy = {"role": "assistant", "content": None, "function_call": rome["function"]}
    assert messages(legacy) == [("assistant", said(texts[0]))]
    bare = {"role": "assistant", "content": "", "tool_calls": [rome["function"]]}
    assert messages(bare) == [("assistant", said(texts[0]))]
    compact = call("f", ' {"a":1,\n"b":[]}')  # spelled as it came
    assert messages({"role": "assistant", "tool_calls": [compact]}) == [
        ("assistant", said('{"name": "f", "arguments": {"a":1,\n"b":[]}}'))
    ]
    for none in ("", None, {}):
        assert messages({"role": "assistant", "tool_calls": [call("f", none)]}) == [
            ("assistant", said('{"name": "f", "arguments": {}}'))
        ]


@pytest.mark.parametrize(
    ("fields_of_it", "kind"),
    [
        ({"tool_calls": [call("f", "{city: Rome}")]}, "malformed JSON"),
        ({"tool_calls": [call("f", 3)]}, "wrong type"),
        ({"tool_calls": [call("f", {"a": b"1"})]}, "wrong type"),
        ({"tool_calls": [call("", "{}")]}, "empty text"),
        ({"tool_calls": ["f"]}, "wrong type"),
        ({"tool_calls": [{"type": "function", "function": {"arguments": "{}"}}]}, "wrong type"),
        ({"tool_calls": [{"type": "custom", "custom": {"name": "f", "input": "x"}}]}, "unsupported content"),
        ({"tool_calls": "f()"}, "wrong type"),
        ({"function_call": "f"}, "wrong type"),
        ({"refusal": 3}, "wrong type"),
        ({"content": "", "audio": {"id": "a"}}, "unsupported content"),
        ({}, "missing field"),
        ({"tool_calls": []}, "missing field"),
    ],
)
def test_malformed_tool_calls_are_refused(fields_of_it, kind):
    assert fault({"messages": [ASK, {"role": "assistant"} | fields_of_it]})[0] == kind


@pytest.mark.parametrize("key", ["tool_calls", "function_call", "refusal", "audio"])
def test_assistant_fields_are_refused_on_other_roles(key):
    kind, says = fault({"messages": [ASK | {key: "x"}, ANSWER]})
    assert kind == "misplaced field" and f"'messages[0]' is of role user and has '{key}'" in says
    assert messages(ASK | {key: None}) == [("user", "Q")]


def test_tool_results_are_sorted_in_the_order_of_their_calls():
    calls = {"role": "assistant", "tool_calls": [call("f", "{}", "c1"), call("f", "{}", "c2")]}
    results = [{"role": "tool", "content": text, "tool_call_id": f"c{text}"} for text in "21"]
    found = messages(ASK, calls, *results, ANSWER, calls, *results[::-1], {"role": "tool", "content": "other"}, ANSWER)
    assert [text for role, text in found if role == "tool"] == ["1", "2", "1", "2", "other"]
    assert [role for role, _ in found] == [
        *("user", "assistant", "tool", "tool", "assistant"),
        *("assistant", "tool", "tool", "tool", "assistant"),
    ]


def test_tools_and_system_prompt_come_before_the_messages():
    tool = {"type": "function", "function": {"name": "weather", "description": "of a city, in °C"}}
    text = '{"type": "function", "function": {"name": "weather", "description": "of a city, in °C"}}'
    tools = ("system", f"<tools>\n{text}\n</tools>")
    for field in ("tools", "functions"):
        assert read({"messages": [ANSWER], field: [tool]}) == [tools, ("assistant", "A")]
    assert read({"conversations": [ANSWER], "tools": text, "system": "Be kind."})[:2] == [("system", "Be kind."), tools]
    assert read({"prompt": "Q", "response": "A", "system": "S"}) == [("system", "S"), ("user", "Q"), ("assistant", "A")]
    for none in (None, "", [], "[]"):
        assert read({"messages": [ANSWER], "tools": none, "system": ""}) == [("assistant", "A")]
    assert fault({"messages": [ANSWER], "tools": {"name": "f"}})[0] == "wrong type"
    assert fault({"messages": [ANSWER], "system": 3})[0] == "wrong type"


# ShareGPT's, Alpaca's -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["conversations", "conversation", "messages"])
def test_sharegpt(field):
    turns = [
        *(("system", "S"), ("human", "Q"), ("gpt", "A"), ("user", "Q"), ("assistant", "A"), ("chatgpt", "A")),
        *(("bing", "A"), ("bard", "A"), ("function_call", '{"name": "f"}'), ("observation", "O"), ("tool", "O")),
        ("function", "O"),
    ]
    value = [{"from": speaker, "value": text} for speaker, text in turns]
    assert read({field: value, "id": 3}) == [
        *(("system", "S"), ("user", "Q"), ("assistant", "A"), ("user", "Q"), *[("assistant", "A")] * 4),
        *(("assistant", said('{"name": "f"}')), *[("tool", "O")] * 3),
    ]
    columns = {"from": ["human", "gpt"], "value": ["Q", "A"]}  # as TFDS keeps a list of objects
    assert read({field: columns}) == [("user", "Q"), ("assistant", "A")]
    weighted = [{"from": "human", "value": "Q", "weight": 0}, {"from": "gpt", "value": None, "weight": 0}]
    assert read({field: [{"from": "system", "value": "S", "weight": None}, *weighted]}) == [
        *(("system", "S"), ("user", "Q"), ("assistant", "", 0)),
    ]
    kind, says = fault({field: [{"from": "humn", "value": "Q"}]})
    assert kind == "unknown role" and f"'{field}[0].from' is str 'humn'" in says and "(did you mean 'human'?)" in says
    assert fault({field: [{"from": "human", "content": "Q"}]})[0] == "missing field"


def test_alpaca():
    value = {"instruction": "Q", "input": None, "output": "A", "system": "S", "history": [["q", "a"], ["r", ""]]}
    history = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "")]
    assert read(value) == [("system", "S"), *history, ("user", "Q"), ("assistant", "A")]
    assert read(value | {"system": None, "history": None, "input": "I"}) == [("user", "Q\n\nI"), ("assistant", "A")]
    for wrong in ("q", [["q"]], [["q", 1]], ["qa"]):
        assert fault(value | {"history": wrong})[0] == "wrong type"


# Files ----------------------------------------------------------------------------------------------------------------


def test_columns_of_objects_are_read_as_lines_are(tmp_path):
    """In a table every object has every field: null is none."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Q", "weight": None, "tool_calls": None},
                {"role": "assistant", "content": None, "weight": 1, "tool_calls": [call("f", "{}")]},
                {"role": "tool", "content": "O", "weight": None, "tool_calls": None},
                {"role": "assistant", "content": "A", "weight": 0, "tool_calls": None},
            ],
            "tools": '[{"name": "f"}]',
        }
    ] * 3
    small_sets.write_parquet(tmp_path / "a.parquet", small_sets.table(rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for name in ("parquet", "jsonl"):
        cfg = DataConfig(format=name, path=str(tmp_path / f"a.{name}"), eval_fraction=0.0, eval_path="")
        unit = epath.Path(cfg.path)
        found[name] = [record["messages"] for record in registry.read(unit, cfg)]
    assert found["parquet"] == found["jsonl"] and len(found["jsonl"]) == 3
    assert found["jsonl"][0] == [
        {"role": "system", "content": '<tools>\n[{"name": "f"}]\n</tools>'},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": said('{"name": "f", "arguments": {}}')},
        {"role": "tool", "content": "O"},
        {"role": "assistant", "content": "A", "weight": 0},
    ]


def test_records_that_cannot_be_trained_on_are_counted_under_max_bad_records(tmp_path):
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    lines = [{"messages": [ASK | {"content": f"Q{i}"}, ANSWER]} for i in range(20)] + [{"messages": [image, ANSWER]}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=rf"{path}:21: unsupported content: 'messages\[0\].content\[0\].type'"):
        registry.load(DataConfig(format="jsonl", path=str(path)))
    split = registry.load(DataConfig(format="jsonl", path=str(path), max_bad_records=1))
    assert len(split.train) + len(split.valid) == 20
