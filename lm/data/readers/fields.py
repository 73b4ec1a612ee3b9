"""Validates and normalises the fields of one record: text, conversations, labels, tags, entities, answers.

Every text is cleaned (see `clean`). Where that removes characters, offsets into the text are shifted accordingly.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm.config.schema import nearest
from lm.data.record import NOTHING, Wanted
from lm.data.tokenizer import ROLES


class BadRecord(Exception):
    """One record cannot be used. Raised with (kind, message) or (kind, message, byte offset of the fault)."""


def clean(text: str, what: str) -> str:
    """Replaces CRLF by LF. Raises BadRecord if the text contains NUL or a lone surrogate."""
    at = text.find("\0")
    if at >= 0:
        found = f"found NUL (U+0000) inside {what}; expected text without it"
        raise BadRecord("NUL", found, len(text[:at].encode(errors="replace")))
    try:
        _ = text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        found = f"found the lone surrogate U+{ord(text[error.start]):04X} in {what}; expected valid Unicode"
        raise BadRecord("lone surrogate", found) from None
    return text.replace("\r\n", "\n")


def string(value: Mapping[str, Any], field: str, name: str = "") -> str:
    """The text in a field, cleaned; error messages call it `name`. Raises BadRecord if it is empty or not a string."""
    text = value[field]
    if not isinstance(text, str):
        raise BadRecord("wrong type", f"'{name or field}' is {_shown(text)}; expected a string")
    if not text.strip():
        raise BadRecord("empty text", f"'{name or field}' is {_shown(text)}; expected text")
    return clean(text, f"'{name or field}'")


def normalise(value: Any, rename: Mapping[str, str], wanted: Wanted = NOTHING) -> dict[str, Any]:
    """Converts an object to a record, by the first of `FORMS` whose fields it has. Raises BadRecord.

    Args:
      value: the parsed object.
      rename: name of a field in the object -> field of a record. Other fields keep their names; fields of no form are
        ignored. Any record may have a 'group': records of one group stay on the same side of a split.
      wanted: forms that have its `fields` are tried before the others; fields in its `may_lack` are not required.
    """
    if not isinstance(value, dict):
        raise BadRecord("wrong type", f"found {_shown(value)}; expected a JSON object")
    renamed = _renamed(value, rename, wanted)
    record = FORMS[_form(renamed, wanted)](renamed)
    if renamed.get("group") is not None:
        record["group"] = _label(renamed["group"], "group")
    return record


def names_read(value: Mapping[str, Any], wanted: Wanted = NOTHING) -> set[str]:
    """The names that `normalise` reads of an object, in the form that it takes it for. Raises BadRecord."""
    return {*_OPTIONAL, *_form(value, wanted)}


def columns(names: Sequence[str], rename: Mapping[str, str], wanted: Wanted = NOTHING) -> list[str]:
    """The columns of a table that `normalise` reads. Raises BadRecord if they make no record."""
    _form(_renamed(dict.fromkeys(names), rename, wanted), wanted)
    read = {*_OPTIONAL, *(field for form in FORMS for field in form)}
    found = [name for name in names if name in rename or name in read]
    if twice := [name for name in found if found.count(name) > 1]:
        raise BadRecord("wrong column", f"found more than one column '{twice[0]}'; expected one")
    return found


def _renamed(value: Mapping[str, Any], rename: Mapping[str, str], wanted: Wanted) -> dict[str, Any]:
    rename = {old: new for old, new in rename.items() if old in value or new not in wanted.may_lack}
    for old, new in rename.items():
        if old not in value:
            hint = nearest(old, list(value))
            expected = f"expected '{old}', which data.rename maps to '{new}'{hint}"
            raise BadRecord("missing field", f"{_found(value)}; {expected}")
    return {k: v for k, v in value.items() if k not in rename} | {new: value[old] for old, new in rename.items()}


def _form(value: Mapping[str, Any], wanted: Wanted = NOTHING) -> tuple[str, ...]:
    preferred = [fields for fields in FORMS if wanted.fields and all(field in fields for field in wanted.fields)]
    for fields in (*preferred, *FORMS):
        if all(field in value or field in wanted.may_lack for field in fields):
            return fields
    raise BadRecord("missing field", f"{_found(value)}; expected {_EXPECTED}")


# Names of classes that are stored as numbers. For a number: the names; for a list: [those of its items]; for an object:
# {field: those of its value}; None = not a class.
Names = tuple[str, ...] | list[Any] | dict[str, Any] | None


def named(value: Any, names: Names, what: str) -> Any:
    """Replaces class numbers in a value by their names; -1, which data sets write for 'unknown', becomes None.

    Worked: {"label": 1, "text": "a"} with {"label": ("neg", "pos")} is {"label": "pos", "text": "a"}.

    Raises:
      BadRecord: a number that has no name.
    """
    if isinstance(names, dict) and isinstance(value, dict):
        return {field: named(item, names.get(field), field) for field, item in value.items()}
    if isinstance(names, list) and isinstance(value, list):
        return [named(item, names[0], f"{what}[{i}]") for i, item in enumerate(value)]
    if not isinstance(names, tuple) or value is None or isinstance(value, str | bool) or value == -1:
        return None if isinstance(names, tuple) and value == -1 else value
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise BadRecord("unknown label", f"'{what}' is {_shown(value)}; expected a number from 0 to {len(names) - 1}")
    return names[value]


# Conversations --------------------------------------------------------------------------------------------------------

_CALLS = ("function_call", "tool_call")  # speakers whose whole text is a tool call
# Values of 'role', or of ShareGPT's 'from' -> one of ROLES, or 'tool'.
SPEAKERS = {
    **{role: role for role in (*ROLES, "tool")},
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", *_CALLS), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response", "ipython"), "tool"),
}
# Keys that say whether a message is trained on: 'weight', a number, of OpenAI and SlimOrca; and these booleans of
# Axolotl and ms-swift. Other keys with similar names are refused.
_SWITCHES = ("train", "training", "train_on_turn", "loss")
_LOSS_KEY = re.compile(r"(^|_)(train|loss|weight|mask)", re.IGNORECASE)
_ASSISTANT_ONLY = ("tool_calls", "function_call", "refusal", "audio")


def _conversation(value: dict[str, Any], field: str) -> dict[str, Any]:
    """Messages in OpenAI's or ShareGPT's format as {"role", "content"}, with "weight": 0 on answers not to train on."""
    turns = _as_objects(value, field)[field]
    if not isinstance(turns, list) or not turns:
        raise BadRecord("wrong type", f"'{field}' is {_shown(turns)}; expected a list of at least one message")
    messages = [_message(turn, f"{field}[{i}]") for i, turn in enumerate(turns)]
    if any(message["role"] == "tool" for message in messages):
        messages = _results_in_call_order(messages, turns)
    return {"messages": [*_preface(value), *messages]}


def _message(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadRecord("wrong type", f"'{where}' is {_shown(turn)}; expected an object of 'role' and 'content'")
    speaker, content = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    if speaker not in turn:
        raise BadRecord("missing field", f"'{where}': {_found(turn)}; expected '{speaker}'")
    name = turn[speaker]
    if not isinstance(name, str) or name not in SPEAKERS:
        hint = nearest(name, SPEAKERS) if isinstance(name, str) else ""
        expected = ", ".join(SPEAKERS)
        raise BadRecord("unknown role", f"'{where}.{speaker}' is {_shown(name)}; expected one of {expected}{hint}")
    role = SPEAKERS[name]
    given = [key for key in _ASSISTANT_ONLY if turn.get(key)]
    if given and role != "assistant":
        raise BadRecord(
            "misplaced field", f"'{where}' is of role {name} and has '{given[0]}'; expected it on assistant"
        )
    if content not in turn and not given:
        raise BadRecord("missing field", f"'{where}': {_found(turn)}; expected '{content}'")
    text = _content(turn.get(content), f"{where}.{content}", role)
    if name in _CALLS:
        text = _call(text)
    if given:
        text = "\n".join(filter(None, [text, *_spoken_beside(turn, where)]))
    if not _is_trained(turn, where, role) and role == "assistant":
        return {"role": role, "content": text, "weight": 0}
    return {"role": role, "content": text}


def _content(value: Any, name: str, role: str) -> str:
    """The text of a message: a string, null (no text) or a list of parts, which are concatenated."""
    if value is None:
        return ""
    if isinstance(value, str):
        return clean(value, f"'{name}'")
    if not isinstance(value, list):
        raise BadRecord("wrong type", f"'{name}' is {_shown(value)}; expected a string, null or a list of parts")
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is None:
            raise BadRecord("wrong type", f"'{name}[{i}]' is {_shown(part)}; expected an object with 'type'")
        if kind != "text" and (kind, role) != ("refusal", "assistant"):
            found = f"'{name}[{i}].type' is {_shown(kind)}"
            raise BadRecord("unsupported content", f"{found}; expected text: a chat is trained on as text alone")
        if not isinstance(part.get(kind), str):
            raise BadRecord("wrong type", f"'{name}[{i}].{kind}' is {_shown(part.get(kind))}; expected a string")
        texts.append(clean(part[kind], f"'{name}[{i}].{kind}'"))
    return "".join(texts)


def _spoken_beside(turn: dict[str, Any], where: str) -> list[str]:
    """What an assistant says outside of 'content': a refusal and tool calls, as texts."""
    if turn.get("audio"):
        raise BadRecord("unsupported content", f"'{where}.audio' is set; expected text: a chat is trained on as text")
    refusal = _content(turn.get("refusal"), f"{where}.refusal", "assistant")
    legacy = [(f"{where}.function_call", turn["function_call"])] if turn.get("function_call") else []
    calls = turn.get("tool_calls") or []
    if not isinstance(calls, list):
        raise BadRecord("wrong type", f"'{where}.tool_calls' is {_shown(calls)}; expected a list of calls")
    named = [(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    return [refusal, *(_call(_function(call, name)) for name, call in [*named, *legacy])]


def _call(text: str) -> str:
    """A tool call as text, as Hermes and Qwen write it."""
    return f"<tool_call>\n{text}\n</tool_call>"


def _function(call: Any, name: str) -> str:
    """{"name": ..., "arguments": ...} of a tool call as text; arguments that are a string stay as they are."""
    if isinstance(call, dict) and call.get("type") not in (None, "function"):
        found = f"'{name}.type' is {_shown(call['type'])}"
        raise BadRecord("unsupported content", f"{found}; expected 'function', the one kind of call that is read")
    function = call.get("function") or call if isinstance(call, dict) else call
    if not isinstance(function, dict) or "name" not in function:
        raise BadRecord("wrong type", f"'{name}' is {_shown(call)}; expected a call: a function's 'name', 'arguments'")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        text = clean(arguments.strip(), f"'{name}.arguments'")
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            raise BadRecord("malformed JSON", f"'{name}.arguments' is {_shown(text)}; expected JSON") from None
    elif isinstance(arguments, dict | str | None):
        text = _json(arguments or {}, f"'{name}.arguments'")
    else:
        raise BadRecord("wrong type", f"'{name}.arguments' is {_shown(arguments)}; expected JSON, or an object")
    return f'{{"name": {_json(string(function, "name", f"{name}.name"), name)}, "arguments": {text}}}'


def _json(value: Any, what: str) -> str:
    try:
        return clean(json.dumps(value, ensure_ascii=False), what)
    except TypeError as error:  # values of table columns that JSON cannot represent: bytes, dates
        raise BadRecord("wrong type", f"{what} is {_shown(value)}: {error}; expected what JSON can write") from None


def _is_trained(turn: dict[str, Any], where: str, role: str) -> bool:
    """Whether the keys of a message allow training on it; without such keys, they do.

    Raises:
      BadRecord: a key is unknown, has an invalid value, or asks for training on a role other than assistant.
    """
    says: dict[str, bool] = {}
    for key, value in turn.items():
        if value is None or key in ("role", "content", "from", "value") or not _LOSS_KEY.search(str(key)):
            continue
        if key == "weight" and (isinstance(value, bool) or value not in (0, 1)):
            raise BadRecord("wrong weight", f"'{where}.weight' is {_shown(value)}; expected 0 or 1")
        if key in _SWITCHES and not isinstance(value, bool):
            raise BadRecord("wrong type", f"'{where}.{key}' is {_shown(value)}; expected true or false")
        if key not in ("weight", *_SWITCHES):
            known = ", ".join(_SWITCHES)
            raise BadRecord(
                "unknown weight", f"'{where}' has '{key}'; expected 'weight' (0 or 1) or a switch ({known}), or neither"
            )
        says[key] = bool(value)
    if len({*says.values()}) > 1:
        raise BadRecord("wrong weight", f"'{where}': {says} contradict each other; expected one of them")
    if role != "assistant" and any(says.values()):
        raise BadRecord(
            "wrong weight", f"'{where}' of role {role} has {says}; expected 0: only assistant messages are trained on"
        )
    return all(says.values())


def _results_in_call_order(messages: list[dict[str, Any]], turns: list[Any]) -> list[dict[str, Any]]:
    """Sorts the results of several tool calls in the order of the calls, since the text does not contain call ids."""
    group, rank, keys = 0, dict[str, int](), []
    for message, turn in zip(messages, turns, strict=True):
        if message["role"] != "tool":
            calls = [call for call in turn.get("tool_calls") or [] if isinstance(call, dict)]
            group, rank = group + 1, {str(call.get("id")): i for i, call in enumerate(calls)}
            keys.append((group, -1))
        else:
            keys.append((group, rank.get(str(turn.get("tool_call_id")), len(rank))))
    return [messages[i] for i in sorted(range(len(messages)), key=lambda i: keys[i])]


def _preface(value: dict[str, Any]) -> list[dict[str, Any]]:
    """System messages from the other fields of a record: the system prompt and the list of tools."""
    system = _content(value.get("system"), "system", "system")
    found = [system] if system.strip() else []
    for field in ("tools", "functions"):
        tools = value.get(field) or []
        if not isinstance(tools, list | str):
            raise BadRecord("wrong type", f"'{field}' is {_shown(tools)}; expected a list, or a text")
        lines = [tools] if isinstance(tools, str) else [_json(tool, f"'{field}'") for tool in tools]
        text = clean("\n".join(lines), f"'{field}'")
        if text.strip() not in ("", "[]"):
            found.append(f"<tools>\n{text}\n</tools>")
    return [{"role": "system", "content": text} for text in found]


def _prompt(value: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [*_preface(value), *_exchange(string(value, "prompt"), string(value, "response"))]}


def _instruction(value: dict[str, Any], field: str = "output") -> dict[str, Any]:
    request, answer = string(value, "instruction"), string(value, field)
    if value.get("input") not in (None, ""):
        request += "\n\n" + string(value, "input")
    history = value.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise BadRecord("wrong type", f"'history' is {_shown(history)}; expected a list of [request, answer]")
    texts = [
        [_content(text, f"history[{i}]", role) for text, role in zip(pair, ("user", "assistant"), strict=True)]
        for i, pair in enumerate(history)
    ]
    exchanges = [message for pair in [*texts, [request, answer]] for message in _exchange(*pair)]
    return {"messages": [*_preface(value), *exchanges]}


def _exchange(request: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


# Preferences ----------------------------------------------------------------------------------------------------------

_ANSWERS = ("chosen", "rejected")
# hh-rlhf's transcripts (Bai et al. 2022) -> role.
_TRANSCRIPT = {"\n\nHuman:": "user", "\n\nAssistant:": "assistant"}


def _preferred_instruction(value: dict[str, Any]) -> dict[str, Any]:
    """Alpaca's fields with two answers instead of 'output'."""
    *prompt, chosen = _instruction(value, "chosen")["messages"]
    return {"prompt": prompt, "chosen": [chosen], "rejected": _instruction(value, "rejected")["messages"][-1:]}


def _preference(value: dict[str, Any]) -> dict[str, Any]:
    """Two answers to one prompt: {"prompt", "chosen", "rejected"}, each a list of messages.

    Answers are texts, messages that follow the prompt, or whole conversations (messages, or transcripts as in hh-rlhf)
    of which they share all before the first difference; a prompt that is given beside those must be in what they share.

    Raises:
      BadRecord: an answer that does not begin with an assistant's message; conversations that do not begin with the
        prompt; texts without a prompt that are no transcripts.
    """
    prompt = _messages(value, "prompt", "user") if "prompt" in value else []
    chosen, rejected = (_messages(value, field, "assistant", is_whole=not prompt) for field in _ANSWERS)
    if not prompt or chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        longest = min(len(chosen), len(rejected)) - 1  # equal conversations differ in nothing: their last one answers
        at = next((i for i in range(longest) if chosen[i] != rejected[i]), longest)
        shared, chosen, rejected = chosen[:at], chosen[at:], rejected[at:]
        if not any(shared[i:][: len(prompt)] == prompt for i in range(len(shared) + 1)):
            found = f"they share {_shown([message['content'] for message in shared])}"
            raise BadRecord("wrong prompt", f"'chosen' and 'rejected': {found}; expected 'prompt' in it")
        prompt = shared
    for field, answer in zip(_ANSWERS, (chosen, rejected), strict=True):
        if answer[0]["role"] != "assistant":
            found = f"'{field}' differs from the other answer in a message of role {answer[0]['role']}"
            raise BadRecord("different prompts", f"{found}; expected one prompt, and an answer of role assistant")
    return {"prompt": [*_preface(value), *prompt], "chosen": chosen, "rejected": rejected}


def _messages(value: dict[str, Any], field: str, role: str, is_whole: bool = False) -> list[dict[str, Any]]:
    """Messages, cleaned; a text is one message of `role`, or where it is to be a whole conversation a transcript."""
    found = value[field]
    if not isinstance(found, str):
        return list(_conversation({field: found}, field)["messages"])
    text = string(value, field)
    if not is_whole:
        return [{"role": role, "content": text}]
    first, *parts = re.split(f"({'|'.join(_TRANSCRIPT)})", text)
    if first.strip() or not parts:
        expected = "expected 'prompt' beside it, messages, or a transcript that begins with '\\n\\nHuman:'"
        raise BadRecord("missing field", f"'{field}' is {_shown(text)}; {expected}")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _TRANSCRIPT[mark], "content": content.strip()} for mark, content in turns]


def question(value: Any, wanted: Wanted) -> dict[str, Any]:
    """A question of SQuAD with its context, see `_question`; `wanted.may_lack` may have 'answers'. Raises BadRecord."""
    if not isinstance(value, dict):
        raise BadRecord("wrong type", f"found {_shown(value)}; expected a question, an object")
    needed = [field for field in _QUESTION if field not in wanted.may_lack]
    if missing := [field for field in needed if field not in value]:
        raise BadRecord("missing field", f"{_found(value)}; expected '{missing[0]}'")
    return _question(value)


def _question(value: dict[str, Any]) -> dict[str, Any]:
    """{"question", "context", "answers": [{"text", "answer_start"}]} and "id" if there is one.

    No answers means that the context does not answer the question (SQuAD 2.0); `is_impossible`, if given, must agree.
    `plausible_answers` are wrong answers and are not read.
    """
    raw, answers = value["context"], list[dict[str, Any]]()
    record = {"id": str(value["id"])} if "id" in value else {}
    record |= {"question": string(value, "question"), "context": string(value, "context")}
    if "answers" not in value:
        return record
    for name, answer in _objects(_as_objects(value, "answers"), "answers", ("text", "answer_start"), least=0):
        text, start = string(answer, "text", f"{name}.text"), _moved(answer, "answer_start", raw, name)
        if record["context"][start : start + len(text)] != text:
            found = f"at {answer['answer_start']} 'context' has {_shown(raw[answer['answer_start'] :][: len(text)])}"
            raise BadRecord("misplaced answer", f"'{name}': {found}; expected the answer {_shown(text)}")
        answers.append({"text": text, "answer_start": start})
    is_impossible = value.get("is_impossible")
    if is_impossible is not None and is_impossible is not (not answers):
        found = f"'is_impossible' is {_shown(is_impossible)}, and there are {len(answers)} answers"
        raise BadRecord("contradicting answers", f"{found}; expected true for none and false for at least one")
    return {**record, "answers": answers}


def _entities(value: dict[str, Any]) -> dict[str, Any]:
    raw, entities = value["text"], []
    text = string(value, "text")
    if "entities" not in value:
        return {"text": text}
    for name, entity in _objects(value, "entities", ("start", "end", "label"), least=0):
        start, end = (_moved(entity, field, raw, name) for field in ("start", "end"))
        if start >= end:
            found = f"'{name}' is from {entity['start']} to {entity['end']}"
            raise BadRecord("misplaced entity", f"{found}; expected its end, exclusive, behind its start")
        entities.append({"start": start, "end": end, "label": _label(entity["label"], f"{name}.label")})
    return {"text": text, "entities": entities}


def _tagged_words(value: dict[str, Any]) -> dict[str, Any]:
    for field in (field for field in ("words", "tags") if field in value):
        if not isinstance(value[field], list) or not value[field]:
            raise BadRecord("wrong type", f"'{field}' is {_shown(value[field])}; expected a list of at least one")
    words = [string({"word": word}, "word", f"words[{i}]") for i, word in enumerate(value["words"])]
    if "tags" not in value:
        return {"words": words}
    tags = [_label(tag, f"tags[{i}]") for i, tag in enumerate(value["tags"])]
    if len(words) != len(tags):
        raise BadRecord("wrong length", f"found {len(words)} words and {len(tags)} tags; expected one tag a word")
    return {"words": words, "tags": tags}


def _paragraphs(value: dict[str, Any], field: str) -> str:
    """A text, or a list of texts joined by newlines."""
    if not isinstance(value[field], list) or not value[field]:
        return string(value, field)
    return "\n".join(string({field: part}, field, f"{field}[{i}]") for i, part in enumerate(value[field]))


def _text(value: dict[str, Any]) -> dict[str, Any]:
    known = ("text", "text_pair", "negative")
    record: dict[str, Any] = {field: _paragraphs(value, field) for field in known if field in value}
    if "label" in value:
        record["label"] = _one_label(value["label"])
    return record


def _interaction(value: dict[str, Any]) -> dict[str, Any]:
    return {field: _label(value[field], field) for field in ("user", "item", "time")}


def _image(value: dict[str, Any]) -> dict[str, Any]:
    """The bytes of an image file, plain or in Hugging Face's {"bytes", "path"}, and the label, if any."""
    image = value["image"]
    if isinstance(image, dict) and image.get("bytes") is None:
        found = f"'image' has no 'bytes' (its 'path' is {_shown(image.get('path'))})"
        raise BadRecord(
            "no image", f"{found}; expected the content of an image file: images kept elsewhere are not read"
        )
    content = image["bytes"] if isinstance(image, dict) else image
    if not isinstance(content, bytes):
        raise BadRecord("wrong type", f"'image' is {_shown(content)}; expected the bytes of an image file")
    return {"image": content} | ({"label": _one_label(value["label"])} if "label" in value else {})


_QUESTION = ("question", "context", "answers")
# Required fields of a kind of record, but for those in `Wanted.may_lack` -> how it is converted. The first kind whose
# fields an object has is used.
FORMS: dict[tuple[str, ...], Callable[[dict[str, Any]], dict[str, Any]]] = {
    ("messages",): functools.partial(_conversation, field="messages"),
    ("conversations",): functools.partial(_conversation, field="conversations"),
    ("conversation",): functools.partial(_conversation, field="conversation"),
    ("prompt", "response"): _prompt,
    ("instruction", "output"): _instruction,
    _QUESTION: _question,
    ("words", "tags"): _tagged_words,
    ("text", "entities"): _entities,
    ("text",): _text,  # and 'text_pair', 'negative' and 'label', if present
    ("user", "item", "time"): _interaction,
    ("image",): _image,  # and 'label', if present
    ("instruction", *_ANSWERS): _preferred_instruction,
    _ANSWERS: _preference,  # and 'prompt', if present
}
_OPTIONAL = (  # read if present
    *("input", "system", "history", "tools", "functions"),
    *("text_pair", "negative", "label", "id", "is_impossible", "group", "prompt"),
)
_EXPECTED = (
    "'text', 'messages' or 'conversations', 'prompt' and 'response', 'instruction' and 'output', 'question' and "
    "'context' and 'answers', 'words' and 'tags', 'text' and 'entities', 'user' and 'item' and 'time', 'image', or "
    "'chosen' and 'rejected' (data.rename maps other names)"
)


def _label(value: Any, name: str) -> str:
    """A class, a tag or a number as text."""
    if isinstance(value, str):
        return string({"label": value}, "label", name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRecord("wrong type", f"'{name}' is {_shown(value)}; expected a string or a number")
    return str(value)


def _one_label(value: Any) -> str | bool | None:
    """A label as text; booleans stay as they are; None for null, NaN and an empty cell."""
    is_nan = isinstance(value, float) and math.isnan(value)
    if value is None or is_nan or (isinstance(value, str) and not value.strip()):
        return None
    return value if isinstance(value, bool) else _label(value, "label")


def _objects(
    value: dict[str, Any], field: str, needed: tuple[str, ...], least: int = 1
) -> list[tuple[str, dict[str, Any]]]:
    """(name for messages, object) for each item of a list of objects, all of which must have the fields `needed`."""
    found = value[field]
    if not isinstance(found, list) or len(found) < least:
        raise BadRecord("wrong type", f"'{field}' is {_shown(found)}; expected a list of objects, at least {least}")
    for i, item in enumerate(found):
        if not isinstance(item, dict):
            raise BadRecord("wrong type", f"'{field}[{i}]' is {_shown(item)}; expected an object")
        if missing := [name for name in needed if name not in item]:
            raise BadRecord("missing field", f"'{field}[{i}]': {_found(item)}; expected '{missing[0]}'")
    return [(f"{field}[{i}]", item) for i, item in enumerate(found)]


def _as_objects(value: dict[str, Any], field: str) -> dict[str, Any]:
    """Turns a field that is an object of lists, as TFDS and Hugging Face store it, into a list of objects.

    Worked: {"text": ["a", "b"], "at": [1, 2]} is [{"text": "a", "at": 1}, {"text": "b", "at": 2}].
    """
    found = value[field]
    if not isinstance(found, dict) or not all(isinstance(items, list) for items in found.values()):
        return value
    if len({len(items) for items in found.values()}) > 1:
        raise BadRecord("wrong length", f"'{field}' is {_shown(found)}; expected lists of one length")
    objects = [dict(zip(found, items, strict=True)) for items in zip(*found.values(), strict=True)]
    return value | {field: objects}


def _moved(value: dict[str, Any], field: str, raw: str, name: str) -> int:
    """Converts an offset into the raw text to one into the cleaned text. Raises BadRecord if it is outside the text."""
    offset = value[field]
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise BadRecord("wrong type", f"'{name}.{field}' is {_shown(offset)}; expected a whole number")
    if not 0 <= offset <= len(raw):
        raise BadRecord("offset outside", f"'{name}.{field}' is {offset}; expected one in the text's 0 to {len(raw)}")
    return offset - raw.count("\r\n", 0, offset)


def _found(value: Mapping[str, Any]) -> str:
    return f"found {', '.join(map(repr, list(value)[:10])) or 'no fields'}"


def _shown(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown[:60]}{'...' if len(shown) > 60 else ''}"
