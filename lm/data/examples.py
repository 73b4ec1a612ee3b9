"""Raw records to model examples: one function a task, each counting what it cut or left out."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lm.config import DataConfig
from lm.data.records import DataError, Record
from lm.data.tokenizer import ROLES, Tokenizer
from lm.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class Example:
    """One sequence, already shifted: position i reads `tokens[i]` and predicts `targets[i]`.

    Attributes:
      tokens: int32 [n].
      targets: int32 [n].
      loss_weights: float32 [n], 0 = not trained on.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray


def make(records: Iterable[Record], tokenizer: Tokenizer, cfg: DataConfig, counts: Counter[str]) -> Iterator[Example]:
    """Yields the examples of `records` by the task `cfg.task`, adding to `counts` what became of them.

    Counted: documents, examples; cut_in_pieces (text longer than seq_len); prompt_cut, answer_cut (chat longer than
    seq_len, by data.overlong); dropped_overlong, dropped_empty, dropped_no_target (nothing in it to train on).

    Raises:
      ConfigError: a record is not of the kind that the task reads.
      DataError: a role is unknown.
    """
    for record in records:
        counts["documents"] += 1
        for example in TASKS[cfg.task](record, tokenizer, cfg, counts):
            if not example.loss_weights.any():
                counts["dropped_no_target"] += 1
                continue
            counts["examples"] += 1
            yield example


def text(record: Record, tokenizer: Tokenizer, cfg: DataConfig, counts: Counter[str]) -> list[Example]:
    """BOS, the text, EOS, all trained on. Worked: ids a b -> tokens [BOS a b], targets [a b EOS].

    Longer than seq_len: pieces that go on where the last one stopped, so that no target is lost. Packing `concat`
    splits by itself, at the ends of rows.
    """
    ids = tokenizer.encode(_field(record, "text", cfg))
    if not ids:
        counts["dropped_empty"] += 1
        return []
    whole = _example([tokenizer.bos_id, *ids, tokenizer.eos_id], [True] * (len(ids) + 2))
    if len(whole.tokens) <= cfg.seq_len or cfg.packing == "concat":
        return [whole]
    counts["cut_in_pieces"] += 1
    return [
        Example(*(array[start : start + cfg.seq_len] for array in (whole.tokens, whole.targets, whole.loss_weights)))
        for start in range(0, len(whole.tokens), cfg.seq_len)
    ]


def chat(record: Record, tokenizer: Tokenizer, cfg: DataConfig, counts: Counter[str]) -> list[Example]:
    """BOS, then for each turn: role symbol, content, end of turn. Trained on: assistant content and its end of turn.

    Worked, <u> <a> role symbols and . the end of turn, for user 'hi', assistant 'yo':

        tokens   BOS <u> hi  .  <a> yo
        targets  <u> hi  .  <a> yo  .
        weights   0   0  0   0  1   1

    Turns after the last assistant turn are left out. Longer than seq_len, and data.overlong=truncate: the prompt (all
    before the last assistant turn) loses its left end, BOS kept; if the answer alone is too long its end goes too.
    """
    ids, trained, answer_start = [tokenizer.bos_id], [False], 1
    length = 1  # up to the end of the last assistant turn
    for message in _field(record, "messages", cfg):
        turn = _turn(message, tokenizer, str(record["source"]))
        is_answer = message["role"] == "assistant"
        if is_answer:
            answer_start = len(ids)
        ids += turn
        trained += [False] + [is_answer] * (len(turn) - 1)
        length = len(ids) if is_answer else length
    ids, trained = ids[:length], trained[:length]
    excess = len(ids) - 1 - cfg.seq_len
    if excess > 0 and cfg.overlong == "drop":
        counts["dropped_overlong"] += 1
        return []
    if excess > 0:
        cut = min(excess, answer_start - 1)
        counts["prompt_cut" if cut == excess else "answer_cut"] += 1
        keep = slice(1 + cut, 1 + cut + cfg.seq_len)
        ids, trained = ids[:1] + ids[keep], trained[:1] + trained[keep]
    return [_example(ids, trained)]


# data.task -> (record, tokenizer, config, counts) -> its examples, each at most seq_len long (`concat` apart).
TASKS: dict[str, Callable[[Record, Tokenizer, DataConfig, Counter[str]], list[Example]]] = {"text": text, "chat": chat}


def prompt_ids(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> list[int]:
    """Ids of a conversation up to where the assistant speaks: as in `chat`, then the assistant's role symbol."""
    ids = [tokenizer.bos_id]
    for message in messages:
        ids += _turn(message, tokenizer, "prompt")
    return [*ids, tokenizer.role_ids["assistant"]]


def texts(records: Iterable[Record]) -> Iterator[str]:
    """Every text in the records, to train a tokenizer on."""
    for record in records:
        if "text" in record:
            yield record["text"]
        else:
            yield from (message["content"] for message in record["messages"])


def _turn(message: Mapping[str, str], tokenizer: Tokenizer, source: str) -> list[int]:
    if message["role"] not in tokenizer.role_ids:
        raise DataError(f"{source}: unknown role {message['role']!r}, expected one of {', '.join(ROLES)}")
    return [tokenizer.role_ids[message["role"]], *tokenizer.encode(message["content"]), tokenizer.end_of_turn_id]


def _example(ids: list[int], trained: list[bool]) -> Example:
    return Example(np.array(ids[:-1], np.int32), np.array(ids[1:], np.int32), np.array(trained[1:], np.float32))


def check_task(records: Iterable[Record], cfg: DataConfig) -> None:
    """Raises ConfigError, naming the first record that `data.task` cannot read."""
    for record in records:
        _field(record, {"text": "text", "chat": "messages"}[cfg.task], cfg)


def _field(record: Record, name: str, cfg: DataConfig) -> Any:
    if name not in record:
        other = "chat" if cfg.task == "text" else "text"
        raise ConfigError(
            f"{record['source']}: 'data.task' is {cfg.task}, which reads '{name}', but the record has "
            f"{', '.join(sorted(set(record) - {'source'}))}; set data.task={other} or other data"
        )
    return record[name]
