"""The tokenizer of this project: lossless SentencePiece BPE. Any Unicode text round-trips, and no text can produce a
control symbol. `load` also reads the tokenizers of published models, see `lm.data.published_tokenizer`.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import sentencepiece

from lm.config.schema import ConfigError
from lm.data import published_tokenizer, tokenizer_protocol
from lm.data.tokenizer_protocol import FILES, Tokenizer
from lm.files import write_atomic

__all__ = ["END_OF_TURN", "FILES", "ROLES", "SentencePiece", "Tokenizer", "find", "load", "train"]

ROLES = ("system", "user", "assistant")
END_OF_TURN = "<|end|>"

# SentencePiece writes a space as U+2581 and decodes U+2581 to a space. The character itself is therefore encoded as
# bytes, so that it round-trips.
_SPACE = "\u2581"
# The trainer silently skips sentences that contain this character, and those of more than 4192 bytes.
_SKIPPED = "\u2585"
_PIECE = re.compile(r".{1,1000}(?=\s|\Z)|.{1,1000}", re.DOTALL)  # at most 4000 bytes, cut before white space if any
_LONG = 1 << 16  # characters that SentencePiece encodes at once, if the text can be cut there
# Models of other projects often strip, collapse or normalise some of these.
_PROBE = f" a  b\r\n\t\u2460\ufb01e\u0301\u00c5\u65e5{_SPACE}<s>{END_OF_TURN} "


@dataclasses.dataclass(frozen=True)
class SentencePiece:
    """A `Tokenizer` that this project trained. Make one with `train` or `load`.

    Attributes:
      model: the serialized SentencePiece model.
      extra_ids: how many ids follow those of the model: first the mask, then the sentinels. No text can produce them.
    """

    model: bytes = dataclasses.field(repr=False)
    extra_ids: int = 0
    # The same for every tokenizer of this kind, see `Tokenizer`.
    file: ClassVar[str] = FILES[0]
    chat_template: ClassVar[str] = ""
    added_space: ClassVar[int] = 0
    changes_text: ClassVar[str] = ""
    may_generate = tokenizer_protocol.may_generate

    @functools.cached_property
    def _sp(self) -> Any:
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @functools.cached_property
    def _inside(self) -> frozenset[str] | None:
        """All pairs of adjacent characters within pieces; None if they do not tell where a text may be cut.

        BPE only merges neighbours into pieces of the vocabulary. Two characters that are adjacent in no piece are never
        merged, so a text cut between them has the same ids. This requires a model without normalization that encodes
        unknown characters as bytes.
        """
        from sentencepiece import sentencepiece_model_pb2

        proto: Any = sentencepiece_model_pb2.ModelProto.FromString(self.model)  # type: ignore[attr-defined]
        rules, trainer = proto.normalizer_spec, proto.trainer_spec
        changes_text = rules.precompiled_charsmap or rules.add_dummy_prefix or rules.remove_extra_whitespaces
        if trainer.model_type != trainer.BPE or changes_text or not trainer.byte_fallback:
            return None
        pieces = [piece.piece.replace(_SPACE, " ") for piece in proto.pieces]
        return frozenset(piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1))

    def _cut(self, text: str) -> Iterator[str]:
        """Cuts a text into parts whose ids, concatenated, are those of the whole text.

        Encoding a long text at once takes about 45 bytes of memory per character, and more than linear time.
        """
        inside, start = self._inside, 0
        while start < len(text):
            end = len(text) if inside is None else start + _LONG
            while end < len(text) and text[end - 1 : end + 1] in inside:  # type: ignore[operator]
                end += 1
            yield text[start:end]
            start = end

    @functools.cached_property
    def _space_ids(self) -> list[int]:
        return [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS and EOS. They contain no control symbol, whatever the text says."""
        return list(self.ids(text))

    def ids(self, text: str) -> Iterator[int]:
        """Like `encode`, but yields the ids: a list of them would take ten times the memory of the text."""
        return itertools.chain.from_iterable(self._encoded(text))

    def _encoded(self, text: str) -> Iterator[list[int]]:
        first, *rest = text.split(_SPACE)
        for number, part in enumerate((first, *rest)):
            if number:
                yield self._space_ids
            if len(part) <= _LONG:
                yield self._sp.encode(part)
            else:
                yield from map(self._sp.encode, self._cut(part))

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `encode`, and the character range [start, end) of `text` for each.

        The ids of a character that is encoded as bytes all have its range. Worked, with pieces 'ab' and ' c' and no
        piece for 'é', which is c3 a9 in UTF-8:

            text 'abé c'   ids  ab  <0xC3>  <0xA9>  ' c'   ranges  (0, 2) (2, 3) (2, 3) (3, 5)

        Raises:
          ValueError: the ids do not decode to this text, which may happen with models of other projects.
        """
        ids = self.encode(text)
        raw_n = np.frombuffer(text.encode(), np.uint8)
        character_n = np.cumsum((raw_n & 0xC0) != 0x80) - 1  # only the first byte of a character is not 10xxxxxx
        ends = np.cumsum(self._byte_sizes[ids])
        starts = ends - self._byte_sizes[ids]
        if ends[-1:].sum() != len(raw_n):
            raise ValueError(f"ids stand for {ends[-1:].sum()} bytes of a text of {len(raw_n)}: {text[:60]!r}")
        return ids, list(zip(character_n[starts].tolist(), (character_n[ends - 1] + 1).tolist(), strict=True))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Inverse of `encode`. Control symbols decode to '', invalid UTF-8 to U+FFFD."""
        return self._sp.decode([int(i) for i in ids if i < self._sp.vocab_size()])

    def piece(self, token_id: int) -> str:
        """The piece of one id, for display: U+2581 is a space, <0x0A> a byte, <|user|> a control symbol."""
        extra = int(token_id) - self._sp.vocab_size()
        if extra >= 0:
            return f"<|extra_{extra}|>" if extra else "<|mask|>"
        return self._sp.id_to_piece(int(token_id))

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes that each id stands for (controls: 0); over a text they sum to its bytes."""
        return self._byte_sizes.copy()

    @functools.cached_property
    def _byte_sizes(self) -> np.ndarray:
        sp = self._sp
        sizes = np.zeros(self.vocab_size, np.int32)
        for i in range(sp.vocab_size()):
            if sp.is_byte(i):
                sizes[i] = 1
            elif not sp.is_control(i) and not sp.is_unknown(i):
                sizes[i] = len(sp.id_to_piece(i).replace(_SPACE, " ").encode())
        return sizes

    def save(self, path: Any) -> None:
        """Writes the model atomically, to any path that `etils.epath` opens."""
        write_atomic(path, self.model)

    @property
    def saved_files(self) -> dict[str, bytes]:
        return {self.file: self.model}

    @property
    def vocab_size(self) -> int:
        return self._sp.vocab_size() + self.extra_ids

    def encode_rendered(self, text: str, is_start: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """Raises ValueError: turns are written with `role_ids`, not with a template."""
        raise ValueError("a tokenizer of this project has no chat template")

    @property
    def has_mask(self) -> bool:
        return self.extra_ids > 0

    @property
    def mask_id(self) -> int:
        """Id of the mask, BERT's [MASK]. Raises ConfigError if `extra_ids` is 0."""
        if not self.extra_ids:
            raise ConfigError("this task hides tokens behind a mask, which needs 'tokenizer.extra_ids' of at least 1")
        return self._sp.vocab_size()

    @property
    def sentinel_ids(self) -> np.ndarray:
        """int32 [extra_ids - 1]: T5's sentinels, each of which stands for one masked span."""
        return np.arange(self._sp.vocab_size() + 1, self.vocab_size, dtype=np.int32)

    @functools.cached_property
    def is_control_V(self) -> np.ndarray:
        """bool [vocab_size]: ids that stand for no text, extra ids included."""
        sp = self._sp
        own = [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(sp.vocab_size())]
        return np.array([*own, *[True] * self.extra_ids])

    @property
    def pad_id(self) -> int:
        return self._sp.pad_id()

    @property
    def bos_id(self) -> int:
        return self._sp.bos_id()

    @property
    def eos_id(self) -> int:
        return self._sp.eos_id()

    @property
    def separator_ids(self) -> list[int]:
        return [self.eos_id]

    @functools.cached_property
    def role_ids(self) -> dict[str, int]:
        """Role -> id of its control symbol `<|role|>`."""
        return {role: self._sp.piece_to_id(f"<|{role}|>") for role in ROLES}

    @property
    def end_of_turn_id(self) -> int:
        return self._sp.piece_to_id(END_OF_TURN)

    @functools.cached_property
    def hash(self) -> str:
        """sha256 (hex) of the model."""
        return hashlib.sha256(self.model).hexdigest()


def train(texts: Iterable[str], vocab_size: int, max_bytes: int) -> SentencePiece:
    """Trains BPE with exactly `vocab_size` ids on at most `max_bytes` of the texts. The same texts give the same model.

    If there is more text, a sample is taken with a fixed shuffle, so that all of a sorted corpus is represented.

    Raises:
      ConfigError: `vocab_size` is too large or too small for these texts, or there is no text.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_pieces(_sample(list(texts), max_bytes)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            control_symbols=[*(f"<|{role}|>" for role in ROLES), END_OF_TURN],
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            unk_surface="",
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(_explain(str(error), vocab_size)) from error
    return SentencePiece(model.getvalue())


def load(path: Any) -> Tokenizer:
    """Reads a tokenizer: one of this project, or of a published model.

    Args:
      path: a .model, tokenizer.json, vocab.txt or .gguf file, or a folder with such a file (see
        `published_tokenizer.load`); any path that `etils.epath` opens.

    Raises:
      ConfigError: there is no such file, or it cannot be used.
    """
    from etils import epath

    path = epath.Path(path)
    if not path.exists():
        raise ConfigError(
            f"'tokenizer.path': no file {path}; give a .model, tokenizer.json, vocab.txt or .gguf file, a folder with "
            "one, or '' to train a tokenizer"
        )
    own = path / FILES[0] if path.is_dir() and not (path / "tokenizer.json").exists() else path
    if own.suffix in (".json", ".txt", ".gguf") or not own.is_file():
        return published_tokenizer.load(path)
    tokenizer = SentencePiece(own.read_bytes())
    _check_readable(tokenizer, own)
    sp = tokenizer._sp
    symbols = [sp.piece_to_id(symbol) for symbol in (*(f"<|{role}|>" for role in ROLES), END_OF_TURN)]
    if min(sp.pad_id(), sp.bos_id(), sp.eos_id()) < 0 or not all(map(sp.is_control, symbols)):
        return published_tokenizer.load(path)
    back = tokenizer.decode(tokenizer.encode(_PROBE))
    if back != _PROBE:
        raise ConfigError(
            f"'tokenizer.path': {own} has the control symbols of this project, but loses text: {_PROBE!r} comes back "
            f"as {back!r}; it must have byte fallback, no normalization and no dummy prefix, and keep white space"
        )
    return tokenizer


def _check_readable(tokenizer: SentencePiece, path: Any) -> None:
    """Raises ConfigError unless every piece can be read: SentencePiece looks at most of them only when they are used.

    A damaged model that can be read is told from the right one by its hash, where that is known.
    """
    try:
        _ = tokenizer.is_control_V, tokenizer._byte_sizes, tokenizer._inside
        for token_id in (*range(tokenizer._sp.vocab_size()), *tokenizer.role_ids.values(), tokenizer.end_of_turn_id):
            tokenizer.piece(token_id)
        tokenizer.decode(tokenizer.encode(_PROBE))
    except Exception as error:  # RuntimeError, IndexError, UnicodeDecodeError, protobuf's DecodeError
        reason = str(error).partition("\n")[0][:200]
        raise ConfigError(
            f"'tokenizer.path': {path} is not a SentencePiece model, or is damaged ({type(error).__name__}: {reason}); "
            "copy it again"
        ) from error


def find(folder: Any) -> Any:
    """The tokenizer in the folder of a run or of prepared data, whether or not it exists: a path for `load`."""
    return next((folder / file for file in FILES if (folder / file).exists()), folder / FILES[0])


def _sample(texts: list[str], max_bytes: int) -> Iterator[str]:
    sizes = [len(text.encode()) for text in texts]
    order: Iterable[int] = range(len(texts))
    if sum(sizes) > max_bytes:
        order = np.random.default_rng(0).permutation(len(texts))
    left = max_bytes
    for i in order:
        if sizes[i] > left:
            yield texts[i].encode()[:left].decode(errors="ignore")
            return
        yield texts[i]
        left -= sizes[i]


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for part in text.split(_SKIPPED):
            yield from _PIECE.findall(part)


def _explain(error: str, vocab_size: int) -> str:
    if match := re.search(r"Vocabulary size too high .* <= (\d+)", error):
        return (
            f"'tokenizer.vocab_size' is {vocab_size:,}, but this text is too small for more than {int(match[1]):,}; "
            f"set tokenizer.vocab_size to at most {int(match[1])}, or give more text"
        )
    if match := re.search(r"smaller than required_chars. \d+ vs (\d+)", error):
        return (
            f"'tokenizer.vocab_size' is {vocab_size:,}, but the bytes, the control symbols and the characters of this "
            f"text need {int(match[1]):,}; set tokenizer.vocab_size to at least {match[1]}"
        )
    if "sentences_.empty()" in error:
        return "there is no text to train a tokenizer on: every document of the training split is empty"
    return f"SentencePiece could not train a tokenizer of 'tokenizer.vocab_size' {vocab_size:,}: {error}"
