"""Fields of one record, checked: text, conversations, labels, tags, entities, answers.

Every text is cleaned alike (see `clean`). Where that takes characters away, offsets into the text are moved with it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm.data.tokenizer import ROLES
from lm.schema import nearest


class BadRecord(Exception):
    """Raised with (kind, message), or (kind, message, byte offset of the fault), while one record is parsed."""


def clean(text: str, what: str) -> str:
    """Text with CRLF as LF. Raises BadRecord on NUL, or a surrogate that UTF-8 cannot write."""
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
    """A field that holds text, cleaned; `name` is what messages call it. Raises BadRecord."""
    text = value[field]
    if not isinstance(text, str):
        raise BadRecord("wrong type", f"'{name or field}' is {_shown(text)}; expected a string")
    if not text.strip():
        raise BadRecord("empty text", f"'{name or field}' is {_shown(text)}; expected text")
    return clean(text, f"'{name or field}'")


def normalise(value: Any, rename: Mapping[str, str]) -> dict[str, Any]:
    """An object as the record of the first of `FORMS` of which it has all fields. Raises BadRecord.

    Args:
      value: anything.
      rename: field it has -> field expected. Other fields are ignored.
    """
    if not isinstance(value, dict):
        raise BadRecord("wrong type", f"found {_shown(value)}; expected a JSON object")
    renamed = _renamed(value, rename)
    return FORMS[_form(renamed)](renamed)


def columns(names: Sequence[str], rename: Mapping[str, str]) -> list[str]:
    """Those of a table's columns that `normalise` reads in its rows. Raises BadRecord where no record can be made."""
    _form(_renamed(dict.fromkeys(names), rename))
    read = {*_OPTIONAL, *(field for form in FORMS for field in form)}
    found = [name for name in names if name in rename or name in read]
    if twice := [name for name in found if found.count(name) > 1]:
        raise BadRecord("wrong column", f"found more than one column '{twice[0]}'; expected one")
    return found


def _renamed(value: Mapping[str, Any], rename: Mapping[str, str]) -> dict[str, Any]:
    for old, new in rename.items():
        if old not in value:
            raise BadRecord("missing field", f"{_found(value)}; expected '{old}', which data.rename maps to '{new}'")
    return {k: v for k, v in value.items() if k not in rename} | {new: value[old] for old, new in rename.items()}


def _form(value: Mapping[str, Any]) -> tuple[str, ...]:
    for fields in FORMS:
        if all(field in value for field in fields):
            return fields
    raise BadRecord("missing field", f"{_found(value)}; expected {_EXPECTED}")


# The names of the classes that numbers stand for: of a number its names, of a list [that of an item], of an object
# {field: that of its value}; None = the value is no class.
Names = tuple[str, ...] | list[Any] | dict[str, Any] | None


def named(value: Any, names: Names, what: str) -> Any:
    """A value with the names of its classes in place of their numbers; -1 is what data sets write for 'unknown': None.

    Worked: {"label": 1, "text": "a"} with {"label": ("neg", "pos")} is {"label": "pos", "text": "a"}.

    Raises:
      BadRecord: a number that has no name.
    """
    if isinstance(names, dict) and isinstance(value, dict):
        return {field: named(item, names.get(field), field) for field, item in value.items()}
    if isinstance(names, list) and isinstance(value, list):
        return [named(item, names[0], f"{what}[{i}]") for i, item in enumerate(value)]
    if not isinstance(names, tuple) or value is None or isinstance(value, str) or value == -1:
        return None if isinstance(names, tuple) and value == -1 else value
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise BadRecord("unknown label", f"'{what}' is {_shown(value)}; expected a number from 0 to {len(names) - 1}")
    return names[value]


def _conversation(value: dict[str, Any]) -> dict[str, Any]:
    turns = value["messages"]
    if not isinstance(turns, list) or not turns:
        raise BadRecord("wrong type", f"'messages' is {_shown(turns)}; expected a list of at least one message")
    messages = []
    for i, turn in enumerate(turns):
        where = f"messages[{i}]"
        if not isinstance(turn, dict):
            raise BadRecord("wrong type", f"'{where}' is {_shown(turn)}; expected an object of 'role' and 'content'")
        for field in ("role", "content"):
            if field not in turn:
                raise BadRecord("missing field", f"'{where}': {_found(turn)}; expected '{field}'")
        role = turn["role"]
        if role not in ROLES:
            hint = nearest(role, ROLES) if isinstance(role, str) else ""
            expected = ", ".join(ROLES)
            raise BadRecord("unknown role", f"'{where}.role' is {_shown(role)}; expected one of {expected}{hint}")
        messages.append({"role": role, "content": string(turn, "content", f"{where}.content")})
    return {"messages": messages}


def _prompt(value: dict[str, Any]) -> dict[str, Any]:
    return _one_turn(string(value, "prompt"), string(value, "response"))


def _instruction(value: dict[str, Any]) -> dict[str, Any]:
    request, answer = string(value, "instruction"), string(value, "output")
    return _one_turn(request + ("\n\n" + string(value, "input") if value.get("input", "") != "" else ""), answer)


def _one_turn(request: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]}


def question(value: Any) -> dict[str, Any]:
    """{"question", "context", "answers": [{"text", "answer_start"}]} and "id" if there is one. Raises BadRecord."""
    if not isinstance(value, dict):
        raise BadRecord("wrong type", f"found {_shown(value)}; expected a question, an object")
    if missing := [field for field in ("question", "context", "answers") if field not in value]:
        raise BadRecord("missing field", f"{_found(value)}; expected '{missing[0]}'")
    raw, answers = value["context"], []
    record = {"question": string(value, "question"), "context": string(value, "context")}
    for name, answer in _objects(_as_objects(value, "answers"), "answers", ("text", "answer_start")):
        text, start = string(answer, "text", f"{name}.text"), _moved(answer, "answer_start", raw, name)
        if record["context"][start : start + len(text)] != text:
            found = f"at {answer['answer_start']} 'context' has {_shown(raw[answer['answer_start'] :][: len(text)])}"
            raise BadRecord("misplaced answer", f"'{name}': {found}; expected the answer {_shown(text)}")
        answers.append({"text": text, "answer_start": start})
    return {**({"id": str(value["id"])} if "id" in value else {}), **record, "answers": answers}


def _entities(value: dict[str, Any]) -> dict[str, Any]:
    raw, entities = value["text"], []
    text = string(value, "text")
    for name, entity in _objects(value, "entities", ("start", "end", "label"), least=0):
        start, end = (_moved(entity, field, raw, name) for field in ("start", "end"))
        if start >= end:
            found = f"'{name}' is from {entity['start']} to {entity['end']}"
            raise BadRecord("misplaced entity", f"{found}; expected its end, exclusive, behind its start")
        entities.append({"start": start, "end": end, "label": _label(entity["label"], f"{name}.label")})
    return {"text": text, "entities": entities}


def _tagged_words(value: dict[str, Any]) -> dict[str, Any]:
    for field in ("words", "tags"):
        if not isinstance(value[field], list) or not value[field]:
            raise BadRecord("wrong type", f"'{field}' is {_shown(value[field])}; expected a list of at least one")
    words = [string({"word": word}, "word", f"words[{i}]") for i, word in enumerate(value["words"])]
    tags = [_label(tag, f"tags[{i}]") for i, tag in enumerate(value["tags"])]
    if len(words) != len(tags):
        raise BadRecord("wrong length", f"found {len(words)} words and {len(tags)} tags; expected one tag a word")
    return {"words": words, "tags": tags}


def _paragraphs(value: dict[str, Any], field: str) -> str:
    """A text, or a list of them, each on a line of its own."""
    if not isinstance(value[field], list) or not value[field]:
        return string(value, field)
    return "\n".join(string({field: part}, field, f"{field}[{i}]") for i, part in enumerate(value[field]))


def _text(value: dict[str, Any]) -> dict[str, Any]:
    known = ("text", "text_pair", "negative")
    record: dict[str, Any] = {field: _paragraphs(value, field) for field in known if field in value}
    if value.get("label") is not None:
        record["label"] = _label(value["label"], "label")
    return record


def _image(value: dict[str, Any]) -> dict[str, Any]:
    """The bytes of an image file, alone or in {"bytes", "path"} as Hugging Face keeps them, and its label, if any."""
    image = value["image"]
    if isinstance(image, dict) and image.get("bytes") is None:
        found = f"'image' has no 'bytes' (its 'path' is {_shown(image.get('path'))})"
        raise BadRecord(
            "no image", f"{found}; expected the content of an image file: images kept elsewhere are not read"
        )
    content = image["bytes"] if isinstance(image, dict) else image
    if not isinstance(content, bytes):
        raise BadRecord("wrong type", f"'image' is {_shown(content)}; expected the bytes of an image file")
    label = value.get("label")
    return {"image": content} | ({} if label is None else {"label": _label(label, "label")})


# The fields that tell a kind of record -> how it is read. An object that has those of several is of the first kind.
FORMS: dict[tuple[str, ...], Callable[[dict[str, Any]], dict[str, Any]]] = {
    ("messages",): _conversation,
    ("prompt", "response"): _prompt,
    ("instruction", "output"): _instruction,
    ("question", "context", "answers"): question,
    ("words", "tags"): _tagged_words,
    ("text", "entities"): _entities,
    ("text",): _text,  # and 'text_pair', 'negative' and 'label', where it has them
    ("image",): _image,  # and 'label', where it has one
}
_OPTIONAL = ("input", "text_pair", "negative", "label", "id")  # read where they are
_EXPECTED = (
    "'text', 'messages', 'prompt' and 'response', 'instruction' and 'output', 'question' and 'context' and 'answers', "
    "'words' and 'tags', 'text' and 'entities', or 'image' (data.rename maps other names)"
)


def _label(value: Any, name: str) -> str:
    """A class, a tag or a number as text."""
    if isinstance(value, str):
        return string({"label": value}, "label", name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRecord("wrong type", f"'{name}' is {_shown(value)}; expected a string or a number")
    return str(value)


def _objects(
    value: dict[str, Any], field: str, needed: tuple[str, ...], least: int = 1
) -> list[tuple[str, dict[str, Any]]]:
    """(name, object) of a list of objects that have the fields `needed`."""
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
    """The value, where the field is an object of lists (so do TFDS and Hugging Face keep it) a list of objects there.

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
    """An offset into the text as it came, as one into the cleaned text. Raises BadRecord outside of it."""
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
