"""What tasks, decoding and runs need of a tokenizer, whatever made it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from lm.config.schema import ConfigError

# Names in a run's folder: the file of a tokenizer trained by this project, or the folder of a published model's.
FILES = ("tokenizer.model", "tokenizer")


class Tokenizer(Protocol):
    """Text to ids and back. `lm.data.tokenizer.load` reads one.

    Attributes:
      extra_ids: how many ids follow those of its files: the mask, if these have none, then sentinels.
      file: the one of `FILES` that `save` writes in a run's folder.
      saved_files: path in that folder -> content, of each file that `save` writes.
      chat_template: Jinja source that renders conversations; '' = turns are written with `role_ids`.
      added_space: 1 if `encode` puts a space before a text, which the bytes of its first id then include; else 0.
      changes_text: how decode(encode(text)) differs from a text with all kinds of characters; '' = it does not.
      hash: sha256 (hex) of all that decides the ids.
      vocab_size: number of ids, extra ones included.
      bos_id: the start of a document, of a decoder's input or, in an encoder, [CLS].
      eos_id: the end of a document or, in an encoder, [SEP]; may equal `pad_id` and `bos_id`.
      separator_ids: what stands between the two texts of a pair: [`eos_id`], of RoBERTa two of them.
      has_mask: whether `mask_id` exists; reading it raises ConfigError otherwise.
      sentinel_ids: int32 [n], T5's sentinels, each of which stands for one hidden span.
      role_ids: role -> the symbol that begins its turn; {} where a template writes the turns.
      is_control_V: bool [vocab_size], ids that stand for no text, extra ids included.
    """

    @property
    def extra_ids(self) -> int: ...
    @property
    def file(self) -> str: ...
    @property
    def saved_files(self) -> dict[str, bytes]: ...
    @property
    def chat_template(self) -> str: ...
    @property
    def added_space(self) -> int: ...
    @property
    def changes_text(self) -> str: ...
    @property
    def hash(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def separator_ids(self) -> list[int]: ...
    @property
    def has_mask(self) -> bool: ...
    @property
    def mask_id(self) -> int: ...
    @property
    def sentinel_ids(self) -> np.ndarray: ...
    @property
    def role_ids(self) -> dict[str, int]: ...
    @property
    def end_of_turn_id(self) -> int: ...
    @property
    def is_control_V(self) -> np.ndarray: ...

    def __hash__(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS and EOS. They contain no control symbol, whatever the text says."""

    def ids(self, text: str) -> Iterator[int]:
        """The ids of `encode`, one by one."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `encode`, and the character range [start, end) of `text` for each."""

    def encode_rendered(self, text: str, is_start: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode_with_offsets`, for the output of a chat template: the text of a control symbol becomes its id.
        With `is_start` false the text continues another, so that no space is put before it."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids. Control symbols decode to '', invalid UTF-8 to U+FFFD."""

    def piece(self, token_id: int) -> str:
        """One id for display: U+2581 is a space, <0x0A> a byte; a piece that begins with a space begins a word."""

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes of the text that each id stands for; control symbols have 0."""

    def may_generate(self, ends: Iterable[int], symbols: Iterable[str] = ()) -> np.ndarray:
        """bool [vocab_size], see `may_generate` below."""

    def save(self, path: Any) -> None:
        """Writes the file, or the folder, to any path that `etils.epath` opens."""


def target_bytes(tokenizer: Any, bytes_of_id_V: Any, tokens: Any, targets: Any) -> Any:
    """UTF-8 bytes of text of each target, arrays of numpy or JAX of one shape.

    Args:
      tokenizer: a `Tokenizer`. If it puts a space before a text, the id after BOS has a byte that is not in the text.
      bytes_of_id_V: its `token_bytes()`.
      tokens: the ids before `targets`.
      targets: ids.
    """
    bytes_of_target = bytes_of_id_V[targets]
    if not tokenizer.added_space:
        return bytes_of_target
    return bytes_of_target - ((tokens == tokenizer.bos_id) & (bytes_of_target > 0))


def may_generate(tokenizer: Any, ends: Iterable[int], symbols: Iterable[str] = ()) -> np.ndarray:
    """bool [vocab_size]: ids that a model may generate: all that stand for text, bytes included, and those below.

    Args:
      tokenizer: a `Tokenizer`.
      ends: ids that end the generation.
      symbols: control symbols to allow as well, see `lm.config.GenerateConfig`.

    Raises:
      ConfigError: a symbol that the tokenizer does not have.
    """
    allowed_V = ~tokenizer.is_control_V
    allowed_V[list(ends)] = True
    ids_of: dict[str, list[int]] = {
        "sentinels": tokenizer.sentinel_ids.tolist(),
        "mask": [tokenizer.mask_id] if tokenizer.has_mask else [],
        "roles": list(tokenizer.role_ids.values()),
        "bos": [tokenizer.bos_id],
    }
    for symbol in symbols:
        if not ids_of[symbol]:
            advice = (
                "leave it out: a chat template writes the turns" if symbol == "roles" else "raise 'tokenizer.extra_ids'"
            )
            raise ConfigError(f"'generate.symbols' has {symbol}, but there is none: {advice}")
        allowed_V[ids_of[symbol]] = True
    return allowed_V
