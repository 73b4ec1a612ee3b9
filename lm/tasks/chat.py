"""Conversations to rows: which tokens are trained on, and which turns of a conversation longer than a row are kept."""

import bisect
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from lm.config import Config
from lm.config.schema import ConfigError
from lm.data import chat_template
from lm.data.chat_template import Message
from lm.data.example import Example
from lm.data.record import DataError, Record
from lm.data.tokenizer import ROLES, Tokenizer
from lm.tasks.base import (
    TOKEN_LOSS,
    Task,
    shifted,
    shifted_columns,
)
from lm.tasks.language_modelling import next_token_loss

_REQUEST_ROLES = ("system", "user")


class Tokens(NamedTuple):
    """A conversation as ids.

    Attributes:
      ids: of all its turns, and what begins it.
      trained: whether each id is trained on; of a prompt, none is.
      starts: index of the first id that is trained on, for each message that is.
    """

    ids: list[int]
    trained: list[bool]
    starts: list[int]


def chat(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """The conversation as `tokens_of` writes it, up to the last trained token.

    Worked, with a tokenizer of this project: BOS, then for each turn: role symbol, content, end of turn. <u> <a> are
    role symbols and . the end of turn, for user 'hi', assistant 'yo':

        tokens   BOS <u> hi  .  <a> yo
        targets  <u> hi  .  <a> yo  .
        weights   0   0  0   0  1   1

    `data.overlong` says what happens to a chat longer than seq_len. Counts of chats: chats_shortened (the oldest turns
    were removed, see `recent_turns`), answer_cut (the last request and its answers are longer than a row; the end was
    cut), chats_truncated (data.overlong=truncate: the end was cut), dropped_long_prompt (the prompt leaves no room for
    the answer), dropped_overlong (data.overlong=drop). Counts of turns: answers_dropped (trained turns that are in no
    row, though others of their chat are), answers_as_context (the chat template renders them differently once something
    follows them, so that they cannot be trained on; others of their chat are).

    Raises:
      DataError: a role is unknown; the chat template cannot be used for this conversation.
    """
    source, room = str(record["source"]), cfg.data.seq_len
    _check_roles(record["messages"], source)
    messages = up_to_the_last_trained(record["messages"])
    whole = kept = tokens_of(messages, tokenizer, source)
    left = messages
    if size(whole) > room and cfg.data.overlong == "drop":
        counts["dropped_overlong"] += 1
        return []
    if size(whole) > room and cfg.data.overlong != "truncate":
        left = recent_turns(messages, lambda some: size(tokens_of(some, tokenizer, source)), room)
        kept = tokens_of(left, tokenizer, source)
    ids, trained = kept.ids[: 1 + room], kept.trained[: 1 + room]
    if messages and not any(trained):
        counts["dropped_long_prompt"] += 1
        return []
    seen = sum(start <= room for start in kept.starts)
    as_context = sum(map(is_trained, left)) - len(kept.starts)
    found = {
        "chats_shortened": len(left) < len(messages),
        "chats_truncated" if cfg.data.overlong == "truncate" else "answer_cut": size(kept) > room,
        "answers_dropped": sum(map(is_trained, messages)) - as_context - seen,
        "answers_as_context": as_context,
    }
    counts.update({name: int(number) for name, number in found.items() if number})
    return [Example(shifted(ids, trained))]


def is_trained(message: Message) -> bool:
    """Whether a message is trained on."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def up_to_the_last_trained(messages: Sequence[Message]) -> list[Message]:
    """The messages without those after the last one that is trained on; none if there is no such message."""
    return list(messages[: 1 + max((i for i, message in enumerate(messages) if is_trained(message)), default=-1)])


def size(tokens: Tokens) -> int:
    """Positions of a row that a conversation takes: the first id is only an input, the last only a target."""
    return len(tokens.ids) - 1


def recent_turns(messages: Sequence[Message], size: Callable[[Sequence[Message]], int], room: int) -> list[Message]:
    """The messages of a conversation that are kept when it may have a `size` of `room`: all of them if they fit.

    The oldest turns are removed first; the system turns at the start stay. The rest begins with a request, which is a
    user turn with the user and system turns directly before it, so that no answer and no tool result loses its
    request. The last request and what follows it stay, even if they are too long.

    Worked, with turns of 3 ids and room 10: system, user, assistant, user, assistant -> system, user, assistant (the
    last two).
    """
    if size(messages) <= room:
        return list(messages)
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    starts = _requests(messages, first) or [first]
    kept = [[*messages[:first], *messages[start:]] for start in starts]
    return kept[min(bisect.bisect_left(kept, True, key=lambda some: size(some) <= room), len(kept) - 1)]


def _requests(messages: Sequence[Message], first: int) -> list[int]:
    """Indices of the messages at which requests begin, from message `first` on."""
    starts: list[int] = []
    begin = first
    for i, message in enumerate(messages[first:], first):
        if message["role"] not in _REQUEST_ROLES:
            begin = i + 1
        elif message["role"] == "user" and (not starts or starts[-1] != begin):
            starts.append(begin)
    return starts


# Conversations as ids -------------------------------------------------------------------------------------------------


def tokens_of(messages: Sequence[Message], tokenizer: Tokenizer, source: str, *, is_prompt: bool = False) -> Tokens:
    """Encodes messages: by the tokenizer's chat template if it has one, else with its role symbols.

    The assistant's contents and the ends of its turns are trained on, unless the message has "weight": 0. Contents
    cannot begin or end a turn, whatever they say.

    Args:
      messages: role and content each, as readers make them.
      tokenizer: of the run.
      source: place of the record, for messages.
      is_prompt: end with what begins an answer, for generation.

    Raises:
      DataError: a role is unknown; the template fails, trains on nothing, or on what the model does not write.
    """
    _check_roles(messages, source)
    if not tokenizer.chat_template or not messages:
        return _with_role_symbols(messages, tokenizer, is_prompt)
    try:
        return _by_template(messages, tokenizer, is_prompt)
    except chat_template.TemplateError as error:
        raise DataError(f"{source}: the chat template cannot be used: {error}") from None


def _check_roles(messages: Sequence[Message], source: str) -> None:
    for message in messages:
        if message["role"] not in (*ROLES, "tool"):
            expected = ", ".join((*ROLES, "tool"))
            raise DataError(f"{source}: unknown role {message['role']!r}, expected one of {expected}")


def _with_role_symbols(messages: Sequence[Message], tokenizer: Tokenizer, is_prompt: bool) -> Tokens:
    """A tool result is written as in Qwen and Hermes: in a user turn, between `<tool_response>` and `</tool_response>`,
    so that it needs no role symbol of its own."""
    ids, trained, starts = [tokenizer.bos_id], [False], []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        turn = [tokenizer.role_ids[role], *tokenizer.encode(content), tokenizer.end_of_turn_id]
        if is_trained(message):
            starts.append(len(ids) + 1)
        ids += turn
        trained += [False, *[is_trained(message)] * (len(turn) - 1)]  # role symbols never are, because they are given
    if is_prompt:
        ids.append(tokenizer.role_ids["assistant"])
        return Tokens(ids, [False] * len(ids), [])
    return Tokens(ids, trained, starts)


def _by_template(messages: Sequence[Message], tokenizer: Any, is_prompt: bool) -> Tokens:
    """Raises TemplateError."""
    found, ids, offsets = _rendered(messages, tokenizer, is_prompt)
    trained, starts = [False] * len(ids), list[int]()
    if is_prompt:
        return Tokens(ids, trained, starts)
    answers = [message for message in messages if message["role"] == "assistant"]
    told = zip(answers, found.answers, found.has_request, strict=True)
    wanted = [(place, has_request) for message, place, has_request in told if is_trained(message)]
    begins = [start for start, _ in offsets]
    for place, has_request in wanted:
        if place is None:
            continue
        if has_request:
            raise chat_template.TemplateError(f"it trains on a message that is no answer. {_shown(found.text)}")
        first, last = (bisect.bisect_left(begins, at) for at in place)
        if first < last:
            trained[first:last] = [True] * (last - first)
            starts.append(first)
    if wanted and not starts:
        raise chat_template.TemplateError(f"it shows no place that the model writes. {_shown(found.text)}")
    end = 1 + max((i for i, is_one in enumerate(trained) if is_one), default=len(ids) - 1)
    return Tokens(ids[:end], trained[:end], starts)


def _rendered(
    messages: Sequence[Message], tokenizer: Any, is_prompt: bool = False
) -> tuple[chat_template.Rendered, list[int], list[tuple[int, int]]]:
    """(the rendering, its ids, the characters of each)."""
    specials, names = tokenizer.special_tokens(), tokenizer.control_names
    found = chat_template.render(tokenizer.chat_template, messages, specials, names, is_prompt=is_prompt)
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    places = [0, *found.breaks, len(found.text)]
    for at, end in itertools.pairwise(places):
        part_ids, part_offsets = tokenizer.encode_rendered(found.text[at:end], is_start=at == 0)
        ids += part_ids
        offsets += [(at + first, at + last) for first, last in part_offsets]
    return found, ids, offsets


def _shown(text: str) -> str:
    return f"The conversation is rendered as:\n{text[:2000]}{'...' if len(text) > 2000 else ''}"


# Prompts --------------------------------------------------------------------------------------------------------------


def prompt_ids(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Ids of a conversation as a prompt for the assistant: as in `chat`, then what begins its turn."""
    return tokens_of(messages, tokenizer, "the conversation", is_prompt=True).ids


def recent_prompt(messages: Sequence[Message], tokenizer: Tokenizer, room: int) -> list[Message]:
    """The messages that `recent_turns` keeps for a prompt (see `prompt_ids`) of at most `room` ids.

    Raises:
      ConfigError: the last request alone is longer than `room`.
    """
    kept = recent_turns(messages, lambda some: len(prompt_ids(some, tokenizer)), room)
    if (length := len(prompt_ids(kept, tokenizer))) > room:
        raise ConfigError(f"the question has {length} ids with its marks, but there is room for {room}")
    return kept


def _chat_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    return prompt_ids([{"role": "user", "content": text}], tokenizer)


def ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end an answer: EOS, and the end of a turn."""
    if not tokenizer.chat_template:
        return tokenizer.eos_id, tokenizer.end_of_turn_id
    return tuple(dict.fromkeys((tokenizer.eos_id, *_ends_by_template(tokenizer))))


_PROBE = ({"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Answer."})


@functools.lru_cache(maxsize=8)
def _ends_by_template(tokenizer: Any) -> tuple[int, ...]:
    """The control symbol that the chat template writes after an answer; () = it writes none.

    Raises:
      ConfigError: a conversation of two messages cannot be rendered or trained on.
    """
    try:
        _by_template(_PROBE, tokenizer, is_prompt=False)
        found, ids, offsets = _rendered(_PROBE, tokenizer)
    except chat_template.TemplateError as error:
        raise ConfigError(
            f"the tokenizer's chat template ('tokenizer.chat_template') cannot be used: {error}"
        ) from None
    answered = found.text.rfind(_PROBE[1]["content"])
    controls = (i for i, (start, _) in zip(ids, offsets, strict=True) if start > answered and tokenizer.is_control_V[i])
    return tuple(controls)[:1]


def check_tokenizer(cfg: Config, tokenizer: Tokenizer) -> None:
    """Raises ConfigError unless the tokenizer can write conversations."""
    if tokenizer.chat_template:
        ends(tokenizer)
    elif not tokenizer.role_ids:
        raise ConfigError(
            f"task.name={cfg.task.name} writes conversations, but the tokenizer has no chat template: set "
            "'tokenizer.chat_template' to a .jinja file"
        )


def _texts(record: Record) -> Iterator[str]:
    return (message["content"] for message in record["messages"])


CHAT = Task(
    name="chat",
    models=("decoder",),
    fields=("messages",),
    examples=chat,
    columns=shifted_columns,
    texts=_texts,
    loss=next_token_loss,
    loss_unit="nats per token",
    balances_experts=True,
    predicts_every_position=True,
    packing=("pad", "best_fit"),
    loss_options=TOKEN_LOSS,
    has_perplexity=True,
    check_tokenizer=check_tokenizer,
    prompt=_chat_prompt,
    ends=ends,
    overlong=("drop_turns", "truncate", "drop"),
)
