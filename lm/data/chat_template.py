"""Chat templates of published models: Jinja that renders a conversation as text, in a sandbox.

A template is a program that somebody else wrote. It sees the messages and nothing else: no attribute that begins with
an underscore, no file, no import, no clock; and it stops after a bounded number of steps, seconds and characters.
"""

import contextvars
import functools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, NamedTuple

from lm.config.schema import ConfigError

Message = Mapping[str, Any]  # role, content and, of an assistant, perhaps a weight; see `lm.data.readers.fields`

MOST_STEPS = 1_000_000  # iterations of loops and calls of macros in one rendering
MOST_SECONDS = 10.0
MOST_CHARACTERS = 10_000_000  # of the output, and of any text made on the way
# Marks that are rendered with a conversation and removed again: noncharacters, which no text should contain.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_SKIPS = (0, 1)  # characters of a content that may stay before its mark, see `_wrapped`
_LONG_NUMBER = re.compile(r"\d{6,}")
_CALL = re.compile(r"\n?<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
_TOOLS = re.compile(r"<tools>\n(.*)\n</tools>", re.DOTALL)


class TemplateError(ValueError):
    """A template could not be used, or refused a conversation; the message says why."""


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
      text: what the template wrote.
      answers: for each message of the assistant, the characters [start, end) that the model writes: from behind the
        prompt to the end of the turn; None = its rendering depends on what follows it, so that there is no such place.
      has_request: for each of them, whether a part of a message that is no answer is in that place.
      breaks: places at which the text must be cut before encoding, because a message spells a control symbol there.
    """

    text: str
    answers: list[tuple[int, int] | None]
    has_request: list[bool]
    breaks: list[int]


class _Marks(NamedTuple):
    """Characters that occur neither in the template nor in the conversation."""

    answer: str  # begins what is inside {% generation %}
    answered: str
    request: str  # begins the content of a message that is no answer
    requested: str
    broken: str  # inside the name of a control symbol that a message spells


class _Budget:
    """What is left to one rendering, see `MOST_STEPS`."""

    def __init__(self) -> None:
        self.steps = MOST_STEPS
        self.deadline = time.monotonic() + MOST_SECONDS

    def spend(self) -> str:
        self.steps -= 1
        if self.steps < 0 or time.monotonic() > self.deadline:
            raise TemplateError(f"it takes more than {MOST_STEPS:,} steps or {MOST_SECONDS:g} seconds")
        return ""


_budget: contextvars.ContextVar[_Budget] = contextvars.ContextVar("budget")
_marks: contextvars.ContextVar[_Marks | None] = contextvars.ContextVar("marks", default=None)


def render(
    source: str,
    messages: Sequence[Message],
    special_tokens: dict[str, str],
    control_names: Sequence[str] = (),
    *,
    is_prompt: bool = False,
) -> Rendered:
    """Renders a conversation, and finds what in it the model writes.

    With `{% generation %}` in the template, that is what is inside it. Without, it is what the rendering up to and with
    an answer adds to the rendering of the prompt for that answer, if the rendering of the whole conversation begins
    with it. White space after the control symbol that ends a turn is not part of the answer.

    Tool calls and lists of tools, which readers write as text, are given to templates that know `tool_calls` and
    `tools` as objects.

    Args:
      source: the template.
      messages: the conversation.
      special_tokens: variables of the template: 'bos_token', 'eos_token', ...
      control_names: texts that become control symbols when the output is encoded. Where a message contains one, a break
        is put into it, so that no content can begin or end a turn.
      is_prompt: end with the beginning of an answer, for generation.

    Raises:
      TemplateError: the template cannot be compiled, fails, does what it may not, or refuses the conversation.
    """
    marks = _choose_marks(source, messages)
    given, tools = _for_template(source, messages)
    if control_names:
        given, tools = _broken((given, tools), re.compile("|".join(map(re.escape, control_names))), marks.broken)

    def text_of(some: Sequence[Message], is_prompt: bool = False, with_marks: bool = False) -> str:
        return _run(source, some, tools, special_tokens, is_prompt, marks if with_marks else None)

    def written(some: Sequence[Message]) -> tuple[str, list[tuple[int, int] | None]]:
        whole = text_of(some)
        if re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source):
            return whole, _tagged(text_of(some, with_marks=True), whole, some, marks)
        return whole, _by_prefixes(text_of, whole, some, control_names)

    if is_prompt:
        return _without_breaks(Rendered(text_of(given, is_prompt), [], [], []), marks.broken)
    whole, answers = written(given)
    found = _with_requests(text_of, written, given, Rendered(whole, answers, [], []), marks)
    return _without_breaks(found, marks.broken)


def _choose_marks(source: str, messages: Sequence[Message]) -> _Marks:
    taken = {character for text in (source, json.dumps([*messages], ensure_ascii=False)) for character in text}
    free = [character for character in _NONCHARACTERS if character not in taken]
    if len(free) < len(_Marks._fields):
        raise TemplateError("the conversation is full of noncharacters (U+FDD0 to U+FDEF); expected text")
    return _Marks(*free[: len(_Marks._fields)])


def _wrapped(messages: Sequence[Message], marks: _Marks, skip: int) -> list[Message]:
    """The messages with marks in all contents but answers, inside the outer white space, which templates strip.

    `skip`: characters of the content before the first mark and behind the last; fewer in a content of less than three.
    """

    def wrap(content: str) -> str:
        core = content.strip()
        if not core:
            return content
        first = min(skip, len(core) - 1)
        last = max(first + 1, len(core) - skip)
        inside = f"{core[:first]}{marks.request}{core[first:last]}{marks.requested}{core[last:]}"
        return content.replace(core, inside, 1)

    return [
        message if message["role"] == "assistant" else {**message, "content": wrap(message["content"])}
        for message in messages
    ]


def _with_requests(
    text_of: Callable[..., str],
    written: Callable[[Sequence[Message]], tuple[str, list[tuple[int, int] | None]]],
    messages: Sequence[Message],
    found: Rendered,
    marks: _Marks,
) -> Rendered:
    """A rendering with `has_request`, for which the contents of all other messages are rendered with marks.

    Marks may change the rendering itself, as where a template looks at how a content begins. They are then put
    elsewhere. If all of them change it, they are looked for in the answers of that other rendering; an answer that it
    does not show gets no place.
    """
    for skip in _SKIPS:
        try:
            text = text_of(_wrapped(messages, marks, skip))
        except TemplateError:  # a template may refuse a content that begins with a mark
            continue
        if (places := _places(text, marks.request, marks.requested, found.text)) is not None:
            return found._replace(
                has_request=[
                    place is not None and any(place[0] < last and first < place[1] for first, last in places)
                    for place in found.answers
                ]
            )
    seen: list[set[bool]] = [set() for _ in found.answers]
    for skip in _SKIPS:
        try:
            text, answers = written(_wrapped(messages, marks, skip))
        except TemplateError:
            continue
        if marks.request not in text and marks.requested not in text:  # as where a content is written as numbers
            continue
        for place, has_request in zip(answers, seen, strict=True):
            if place:
                answer = text[slice(*place)]
                has_request.add(marks.request in answer or marks.requested in answer)
    shown = [place if each else None for place, each in zip(found.answers, seen, strict=True)]
    return found._replace(answers=shown, has_request=[True in each for each in seen])


def _places(marked: str, begin: str, end: str, whole: str) -> list[tuple[int, int]] | None:
    """Where marked parts are in the rendering without marks; None if the marks changed the rendering itself."""
    if marked.replace(begin, "").replace(end, "") != whole:
        return None
    found, at, start = list[tuple[int, int]](), 0, -1
    for part in re.split(f"([{begin}{end}])", marked):
        if part == begin:
            start = at
        elif part == end and start >= 0:
            found.append((start, at))
            start = -1
        elif part != end:
            at += len(part)
    return found


def _tagged(marked: str, whole: str, messages: Sequence[Message], marks: _Marks) -> list[tuple[int, int] | None]:
    """The answers of a template with `{% generation %}`: one such block for each of the assistant's messages."""
    places = _places(marked, marks.answer, marks.answered, whole) or []
    number = sum(message["role"] == "assistant" for message in messages)
    if len(places) != number:
        raise TemplateError(
            f"it renders {len(places)} {{% generation %}} blocks for {number} messages of the assistant; expected one "
            f"for each. The conversation is rendered as:\n{whole}"
        )
    return [place if place[0] < place[1] else None for place in places]


def _by_prefixes(
    text_of: Callable[..., str], whole: str, messages: Sequence[Message], control_names: Sequence[str]
) -> list[tuple[int, int] | None]:
    def place(i: int) -> tuple[int, int] | None:
        try:
            prompt, answered = text_of(messages[:i], is_prompt=True), text_of(messages[: i + 1])
        except TemplateError:  # a template may refuse a conversation that stops here
            return None
        end = max((answered.rfind(name) + len(name) for name in control_names if name in answered), default=0)
        if answered[end:].strip() or end <= len(prompt):
            end = len(answered)
        is_inside = answered.startswith(prompt) and whole.startswith(answered[:end]) and len(prompt) < end
        return (len(prompt), end) if is_inside else None

    return [place(i) for i, message in enumerate(messages) if message["role"] == "assistant"]


def _without_breaks(found: Rendered, broken: str) -> Rendered:
    """Removes the marks inside spelled control symbols, and notes where they were."""
    if broken not in found.text:
        return found
    breaks = [match.start() - n for n, match in enumerate(re.finditer(broken, found.text))]

    def moved(place: tuple[int, int]) -> tuple[int, int]:
        start, end = (at - found.text.count(broken, 0, at) for at in place)
        return start, end

    answers = [place and moved(place) for place in found.answers]
    return Rendered(found.text.replace(broken, ""), answers, found.has_request, breaks)


def _broken(value: Any, names: re.Pattern[str], mark: str) -> Any:
    """A value with `mark` after the first character of each control symbol's name in its strings."""
    if isinstance(value, str):
        return names.sub(lambda match: match[0][:1] + mark + match[0][1:], value)
    if isinstance(value, dict):
        return {key: _broken(item, names, mark) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_broken(item, names, mark) for item in value]
    return value


# Tools ----------------------------------------------------------------------------------------------------------------


def _for_template(source: str, messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """(messages, tools) as the template takes them: with objects, roles and keys that it names, else as text."""
    knows_calls = "tool_calls" in source
    knows_tools = re.search(r"\btools\b", source) is not None
    knows_results = re.search(r"""['"]tool['"]""", source) is not None
    given: list[dict[str, Any]] = []
    tools: list[Any] | None = None
    pending: list[str] = []  # ids of calls that wait for their results
    number = 0
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system" and knows_tools and tools is None and (listed := _TOOLS.fullmatch(content)):
            tools = _parsed(listed[1].split("\n"))
            if tools is not None:
                tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
                continue
        made = {"role": role, "content": content}
        if role == "tool":
            if knows_results:
                made |= {"tool_call_id": pending.pop(0)} if pending else {}
            else:
                made = {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
        if role == "assistant" and knows_calls and (calls := _parsed(_CALL.findall(content))):
            pending = [f"{number + n:09}" for n in range(len(calls))]
            number += len(calls)
            made["content"] = _CALL.sub("", content)
            made["tool_calls"] = [
                {"id": i, "type": "function", "function": {"arguments": {}} | call}
                for i, call in zip(pending, calls, strict=True)
            ]
        given.append(made)
    return given, tools


def _parsed(lines: Sequence[str]) -> list[Any] | None:
    """JSON objects, one a line; None if a line is not one."""
    try:
        found = [json.loads(line) for line in lines]
    except ValueError:
        return None
    return found if all(isinstance(one, dict) for one in found) else None


# The sandbox ----------------------------------------------------------------------------------------------------------


def _run(
    source: str,
    messages: Sequence[Message],
    tools: Any,
    special_tokens: dict[str, str],
    is_prompt: bool,
    marks: _Marks | None,
) -> str:
    """The output of a template. Raises TemplateError."""
    template = compiled(source)
    given = {"messages": [*messages], "tools": tools, "add_generation_prompt": is_prompt}
    budget = _budget.set(_Budget())
    tags = _marks.set(marks)
    parts, size = [], 0
    try:
        for part in template.generate(special_tokens | given):
            size += len(part)
            _check_size(size)
            parts.append(part)
    except TemplateError:
        raise
    except RecursionError:
        raise TemplateError("it calls itself too often") from None
    except Exception as error:  # templates fail in all ways
        raise TemplateError(f"{type(error).__name__}: {error}") from None
    finally:
        _budget.reset(budget)
        _marks.reset(tags)
    return "".join(parts)


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> Any:
    """The compiled template. Raises TemplateError, or ConfigError where jinja2 is missing."""
    environment = _environment()
    import jinja2
    from jinja2 import nodes

    def spend() -> nodes.Node:
        return nodes.ExprStmt(nodes.Call(nodes.EnvironmentAttribute("spend"), [], [], None, None))

    try:
        tree = environment.parse(source)
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            node.body.insert(0, spend())
        for node in tree.find_all(nodes.Concat):
            call = nodes.Call(nodes.EnvironmentAttribute("join_as_text"), list(node.nodes), [], None, None)
            node.nodes = [call]
        tree.set_environment(environment)
        tree.set_lineno(1)  # of the nodes that are new
        return jinja2.Template.from_code(environment, environment.compile(tree), dict(environment.globals))
    except jinja2.TemplateError as error:
        raise TemplateError(f"line {getattr(error, 'lineno', 1)}: {error}") from None
    except RecursionError:
        raise TemplateError("it is nested too deeply") from None


def _check_size(size: float) -> None:
    if size > MOST_CHARACTERS:
        raise TemplateError(f"it makes a text of more than {MOST_CHARACTERS:,} characters")


def _check_product(*values: Any) -> None:
    """Raises TemplateError if a call could make something large of its arguments."""
    product = 1.0
    for value in values:
        if isinstance(value, int):
            _check_size(10 * abs(value))
        elif isinstance(value, Sized):
            product *= max(1, len(value))
    _check_size(product / 100)


def _check_format(text: Any) -> None:
    if isinstance(text, str) and (found := _LONG_NUMBER.search(text)):
        raise TemplateError(f"it formats with a width of {found[0]}")


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _check_product(*args, *kwargs.values())
        return function(*args, **kwargs)

    return call


@functools.cache
def _environment() -> Any:
    """The sandbox that templates of `transformers` expect: `{% generation %}`, loop controls, `raise_exception`."""
    try:
        import jinja2
        from jinja2 import ext, nodes, sandbox
    except ImportError:
        raise ConfigError("a chat template needs jinja2: pip install -e '.[hf]'") from None

    class Generation(ext.Extension):
        tags = {"generation"}  # noqa: RUF012, jinja2's way

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("enclose"), [], [], body).set_lineno(line)

        def enclose(self, caller: Callable[[], str]) -> str:
            marks = _marks.get()
            return f"{marks.answer}{caller()}{marks.answered}" if marks else caller()

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**", "+", "%"))

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise TemplateError(f"it reads the attribute {attribute!r} of a {type(obj).__name__}, which is not allowed")

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" and isinstance(left, int) and isinstance(right, int):
                _check_size(left.bit_length() * abs(right))
            elif operator == "*":
                sizes = [len(value) if isinstance(value, str | list | tuple) else value for value in (left, right)]
                if sizes != [left, right]:
                    _check_size(sizes[0] * sizes[1])
            elif operator == "%":
                _check_format(left)
            result = super().call_binop(context, operator, left, right)
            _check_size(result.bit_length() if isinstance(result, int) else 0)
            _check_size(len(result) if isinstance(result, Sized) else 0)
            return result

        def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
            owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
            if isinstance(owner, str):
                _check_product(owner, *args)
                if getattr(obj, "__name__", "") in ("format", "format_map"):
                    _check_format(owner)
            return super().call(context, obj, *args, **kwargs)

        def spend(self) -> str:
            return _budget.get().spend()

        def join_as_text(self, *parts: Any) -> str:
            made = "".join(map(str, parts))
            _check_size(len(made))
            return made

    def refuse(message: str) -> None:
        raise TemplateError(f"it refuses the conversation: {message}")

    def to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **more)

    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    made.globals = {
        "range": made.globals["range"],
        "namespace": jinja2.utils.Namespace,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "raise_exception": refuse,
    }
    made.filters = {
        name: _bounded(f) for name, f in made.filters.items() if name not in ("random", "pprint", "xmlattr")
    }
    made.filters["tojson"] = to_json
    made.filters["format"] = lambda text, *args, **kwargs: made.call_binop(None, "%", text, kwargs or args)
    return made
