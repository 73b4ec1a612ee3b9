"""Conversations to rows: which tokens are trained on, and which turns of a conversation longer than a row are kept."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lm.config import Config
from lm.config.schema import ConfigError
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


class Turn(NamedTuple):
    """One message.

    Attributes:
      role: system, user, assistant or tool.
      ids: the role's symbol, the content, the end of the turn.
      trained: whether its content and its end are trained on.
    """

    role: str
    ids: list[int]
    trained: bool


def chat(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """BOS, then for each turn: role symbol, content, end of turn. Assistant content and its end of turn are trained on,
    unless the message has "weight": 0. Turns after the last trained one are left out.

    Worked, <u> <a> role symbols and . the end of turn, for user 'hi', assistant 'yo':

        tokens   BOS <u> hi  .  <a> yo
        targets  <u> hi  .  <a> yo  .
        weights   0   0  0   0  1   1

    `data.overlong` says what happens to a chat longer than seq_len. Counts of chats: chats_shortened (the oldest turns
    were removed, see `recent_turns`), answer_cut (the last request and its answers are longer than a row; the end was
    cut), chats_truncated (data.overlong=truncate: the end was cut), dropped_long_prompt (the prompt leaves no room for
    the answer), dropped_overlong (data.overlong=drop). Counts of turns: answers_dropped (trained turns that are in no
    row, though others of their chat are).

    Raises:
      DataError: a role is unknown.
    """
    turns = [encode(message, tokenizer, str(record["source"])) for message in record["messages"]]
    turns = turns[: 1 + max((i for i, turn in enumerate(turns) if turn.trained), default=-1)]
    room = cfg.data.seq_len  # BOS is only an input, the last id only a target
    kept = turns
    if size(turns) > room and cfg.data.overlong == "drop":
        counts["dropped_overlong"] += 1
        return []
    if cfg.data.overlong != "truncate":
        kept = recent_turns(turns, room)
    ids = [tokenizer.bos_id, *token_ids(kept)][: 1 + room]
    trained = [False, *trained_mask(kept)][: 1 + room]
    if turns and not any(trained):
        counts["dropped_long_prompt"] += 1
        return []
    starts = itertools.accumulate((len(turn.ids) for turn in kept), initial=0)
    seen = sum(turn.trained and start + 1 < room for turn, start in zip(kept, starts, strict=False))
    found = {
        "chats_shortened": len(kept) < len(turns),
        "chats_truncated" if cfg.data.overlong == "truncate" else "answer_cut": size(kept) > room,
        "answers_dropped": sum(turn.trained for turn in turns) - seen,
    }
    counts.update({name: int(number) for name, number in found.items() if number})
    return [Example(shifted(ids, trained))]


def recent_turns(turns: Sequence[Turn], room: int) -> list[Turn]:
    """The turns of a conversation that are kept when at most `room` ids fit: whole turns, and all of them if they fit.

    The oldest turns are removed first; the system turns at the start stay. The rest begins with a request, which is a
    user turn with the user and system turns directly before it, so that no answer and no tool result loses its
    request. The last request and what follows it stay, even if they are too long.

    Worked, with turns of 3 ids and room 10: system, user, assistant, user, assistant -> system, user, assistant (the
    last two).
    """
    if size(turns) <= room:
        return list(turns)
    first = next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))
    system, starts = list(turns[:first]), _requests(turns, first) or [first]
    fitting = (start for start in starts if size(system) + size(turns[start:]) <= room)
    return [*system, *turns[next(fitting, starts[-1]) :]]


def _requests(turns: Sequence[Turn], first: int) -> list[int]:
    """Indices of the turns at which requests begin, from turn `first` on."""
    starts: list[int] = []
    begin = first
    for i, turn in enumerate(turns[first:], first):
        if turn.role not in _REQUEST_ROLES:
            begin = i + 1
        elif turn.role == "user" and (not starts or starts[-1] != begin):
            starts.append(begin)
    return starts


def encode(message: Mapping[str, Any], tokenizer: Tokenizer, source: str) -> Turn:
    """Encodes one message of a record. A tool result is written as in Qwen and Hermes: in a user turn, between
    `<tool_response>` and `</tool_response>`, so that it needs no role symbol of its own.

    Raises:
      DataError: the role is unknown; the message names `source`.
    """
    role, content = message["role"], message["content"]
    if role not in (*ROLES, "tool"):
        raise DataError(f"{source}: unknown role {role!r}, expected one of {', '.join((*ROLES, 'tool'))}")
    if role == "tool":
        content = f"<tool_response>\n{content}\n</tool_response>"
    symbol = tokenizer.role_ids["user" if role == "tool" else role]
    ids = [symbol, *tokenizer.encode(content), tokenizer.end_of_turn_id]
    return Turn(role, ids, role == "assistant" and message.get("weight", 1) != 0)


def prompt_ids(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[int]:
    """Ids of a conversation as a prompt for the assistant: as in `chat`, then the assistant's role symbol."""
    return [tokenizer.bos_id, *token_ids(turns), tokenizer.role_ids["assistant"]]


def recent_prompt(turns: Sequence[Turn], tokenizer: Tokenizer, room: int) -> list[Turn]:
    """The turns that `recent_turns` keeps for a prompt (see `prompt_ids`) of at most `room` ids.

    Raises:
      ConfigError: the last request alone is longer than `room`.
    """
    kept = recent_turns(turns, room - 2)
    if (length := len(prompt_ids(kept, tokenizer))) > room:
        raise ConfigError(f"the question has {length} ids with its marks, but there is room for {room}")
    return kept


def _chat_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    return prompt_ids([encode({"role": "user", "content": text}, tokenizer, "prompt")], tokenizer)


def _texts(record: Record) -> Iterator[str]:
    return (message["content"] for message in record["messages"])


def size(turns: Sequence[Turn]) -> int:
    """Number of ids in the turns."""
    return sum(len(turn.ids) for turn in turns)


def token_ids(turns: Sequence[Turn]) -> list[int]:
    """The ids of the turns, one after the other."""
    return [i for turn in turns for i in turn.ids]


def trained_mask(turns: Sequence[Turn]) -> list[bool]:
    """Whether each id is trained on; role symbols never are, because they are given."""
    return [trained for turn in turns for trained in (False, *[turn.trained] * (len(turn.ids) - 1))]


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
    prompt=_chat_prompt,
    ends=lambda tokenizer: (tokenizer.eos_id, tokenizer.end_of_turn_id),
    overlong=("drop_turns", "truncate", "drop"),
)
