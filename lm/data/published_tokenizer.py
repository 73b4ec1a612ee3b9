"""Tokenizers of published models: tokenizer.json, SentencePiece models, vocab.json with merges.txt, vocab.txt, GGUF.

The files are read as data: nothing in them is executed. What differs between the kinds is in an `_Engine`; what a
folder's JSON files say about special tokens and chats is common to all.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from lm.config.schema import ConfigError
from lm.data import tokenizer_protocol
from lm.data.tokenizer_protocol import FILES
from lm.files import write_atomic

_SPACE = "\u2581"  # how SentencePiece writes a space, and `piece` shows one
# What decides the ids, best first: the first of these whose files are all there is read.
_ENGINES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("spiece.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
)
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_TEMPLATE = "chat_template.jinja"
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Where no JSON file names the special tokens: names that they have in published vocabularies.
_USUAL = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "unk_token": ("<unk>", "[UNK]"),
    "pad_token": ("<pad>", "[PAD]"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]", "<mask>"),
}
# Classes of transformers whose ids are those of the SentencePiece model. Others, such as XLM-R's, shift them.
_SAME_IDS = re.compile(r"(Llama|CodeLlama|T5|Gemma|Albert|PreTrained)Tokenizer(Fast)?|TokenizersBackend")
# Classes of transformers that separate the two texts of a pair by two end tokens.
_DOUBLE_SEPARATOR = re.compile(r"(Roberta|XLMRoberta|Camembert|Longformer|MPNet|Bart|Barthez)Tokenizer(Fast)?")
_SENTINEL = re.compile(r"<extra_id_(\d+)>")
_PROBE = f"a  b\r\n\t\u2460\ufb01e\u0301\u00c5 \u65e5 {_SPACE}\U0001f600 \ufeffX x"
_SPLITS = {  # regular expressions of byte-level BPE beyond GPT-2's, by the name that GGUF files have for them
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


class Encoded(NamedTuple):
    """Ids of a text, and the character range [start, end) of the text for each."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class _Engine(Protocol):
    """Encodes and decodes with the files of one kind.

    Attributes:
      spelled: id -> the bytes of text that it stands for; None for control symbols and ids that nothing has.
      names: id -> its name in the vocabulary.
      unknown: the id of what the vocabulary cannot spell; -1 = there is none.
      beside: what decides the ids beside the vocabulary's files and the special tokens, as JSON: tokens that other
        files add, and options that differ from their defaults.
    """

    spelled: list[bytes | None]
    names: dict[int, str]
    unknown: int
    beside: dict[str, Any]

    def encode(self, text: str, reads_controls: bool, is_start: bool) -> Encoded:
        """The ids of a text, in which the names of control symbols are text unless `reads_controls`; with `is_start`
        false no space is put before it, if the kind allows that."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids below the number of `spelled`, without control symbols."""


@dataclasses.dataclass(frozen=True)
class Published:
    """The tokenizer of a published model, a `lm.data.tokenizer.Tokenizer`. Make one with `load`.

    Attributes:
      files: (name, content) of each file that is kept, byte for byte.
      extra_ids: ids after those of the files: the mask where the files name none, then sentinels where they have none.
    """

    files: tuple[tuple[str, bytes], ...] = dataclasses.field(repr=False)
    extra_ids: int = 0
    file = FILES[1]
    may_generate = tokenizer_protocol.may_generate

    @functools.cached_property
    def _engine(self) -> _Engine:
        files, said = dict(self.files), self._said
        if "tokenizer.json" in files:
            return _Json(files["tokenizer.json"].decode(), said)
        if "vocab.txt" in files:
            options = _changed(said, {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True})
            return _Json(_word_pieces(files["vocab.txt"].decode(), said, options), said, options)
        if "vocab.json" in files:
            merges = files["merges.txt"].decode().split("\n")
            pairs = [line for line in merges if line.strip() and not line.startswith("#version")]
            vocabulary = json.loads(files["vocab.json"])
            usual = itertools.chain.from_iterable(_USUAL.values())
            specials = [text for text in said.specials.values() or usual if text in vocabulary]
            options = _changed(said, {"add_prefix_space": False})
            return _Json(
                _byte_level(vocabulary, pairs, specials, "gpt-2", options.get("add_prefix_space", False)), said, options
            )
        return _SentencePiece(next(files[name] for (name, *_) in _ENGINES if name in files), said)

    @functools.cached_property
    def _said(self) -> "_Said":
        return _read_config(dict(self.files))

    @functools.cached_property
    def _id_of(self) -> dict[str, int]:
        return {name: i for i, name in self._engine.names.items()}

    # Special ids ------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _special(self) -> dict[str, int]:
        """Role of a special token, as `tokenizer_config.json` names it -> its id."""
        id_of, found = self._id_of, {}
        for role in _ROLES:
            given = self._said.specials.get(role)
            if given is not None and given not in id_of:
                raise ConfigError(
                    f"'tokenizer.path': {self._said.source} names the {role} {given!r}, which the vocabulary of "
                    f"{len(id_of):,} lacks; expected files of one tokenizer"
                )
            usual = [] if self._said.specials else [name for name in _USUAL[role] if name in id_of]
            if name := given or next(iter(usual), None):
                found[role] = id_of[name]
        if not {"eos_token", "sep_token"} & set(found):
            raise ConfigError(
                f"'tokenizer.path': {self.files[0][0]}: no token that ends a text is known; name one beside it in "
                'tokenizer_config.json: {"eos_token": "..."}'
            )
        return found

    def _first(self, *roles: str) -> int:
        return next(self._special[role] for role in roles if role in self._special)

    @property
    def bos_id(self) -> int:
        """[CLS], else BOS, else, as the start of T5's decoder, the padding, else EOS."""
        return self._first("cls_token", "bos_token", "pad_token", "eos_token", "sep_token")

    @property
    def eos_id(self) -> int:
        return self._first(*(("sep_token",) if "cls_token" in self._special else ()), "eos_token", "sep_token")

    @functools.cached_property
    def separator_ids(self) -> list[int]:
        """One or, as RoBERTa and its relatives have it, two of `eos_id`: as many as the template of tokenizer.json has
        between the texts of a pair; where it has none, by the tokenizer_class of tokenizer_config.json; where that is
        absent too, two if there is a mask beside vocab.json and merges.txt, as a RoBERTa's files alone have it."""
        files, kind = dict(self.files), self._said.options.get("tokenizer_class")
        template = json.loads(files.get("tokenizer.json", b"{}")).get("post_processor") or {}
        counts = filter(None, map(_separators, template.get("processors", [template])))
        if count := next(counts, 0):
            return [self.eos_id] * count
        guess = "vocab.json" in files and "mask_token" in self._special
        is_double = _DOUBLE_SEPARATOR.fullmatch(kind) if kind else guess
        return [self.eos_id] * (2 if is_double else 1)

    @property
    def pad_id(self) -> int:
        return self._first("pad_token", "eos_token", "sep_token")

    @property
    def has_mask(self) -> bool:
        return "mask_token" in self._special or self.extra_ids > 0

    @property
    def mask_id(self) -> int:
        if not self.has_mask:
            raise ConfigError(
                "this task hides tokens behind a mask, and this tokenizer has none: set 'tokenizer.extra_ids' to at "
                "least 1"
            )
        return self._special.get("mask_token", self._size)

    @functools.cached_property
    def sentinel_ids(self) -> np.ndarray:
        own = {int(match[1]): i for i, name in self._engine.names.items() if (match := _SENTINEL.fullmatch(name))}
        if own:
            return np.array([own[number] for number in sorted(own)], np.int32)
        return np.arange(self._size + ("mask_token" not in self._special), self.vocab_size, dtype=np.int32)

    @property
    def role_ids(self) -> dict[str, int]:
        """Empty: the chat template writes the turns."""
        return {}

    @property
    def end_of_turn_id(self) -> int:
        """As `eos_id`: the end of a turn is what the chat template makes of it, see `lm.tasks.chat`."""
        return self.eos_id

    @functools.cached_property
    def is_control_V(self) -> np.ndarray:
        spelled = self._engine.spelled
        return np.array([*(text is None for text in spelled), *[True] * self.extra_ids])

    @property
    def _size(self) -> int:
        return len(self._engine.spelled)

    @property
    def vocab_size(self) -> int:
        return self._size + self.extra_ids

    # Text -------------------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens, whatever the text says."""
        return self.encode_with_offsets(text)[0]

    def ids(self, text: str) -> Iterator[int]:
        """The ids of `encode`."""
        return iter(self.encode(text))

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `encode`, and the character range [start, end) of `text` for each, as `transformers` gives it."""
        parts, waiting = list[tuple[int, Encoded]](), [(0, len(text))]
        while waiting:
            at, end = waiting.pop()
            found = self._engine.encode(text[at:end], reads_controls=False, is_start=at == 0)
            # A vocabulary may hold the name of a control symbol as a piece: cut the text inside that name.
            named = [place for i, place in zip(*found, strict=True) if i in self._forbidden]
            if not named:
                parts.append((at, found))
            elif any(last - first < 2 for first, last in named):
                raise ConfigError(
                    f"'tokenizer.path': {self.files[0][0]} has a control symbol of one character, which texts contain; "
                    "expected names that texts do not spell"
                )
            else:
                places = [at, *(at + first + 1 for first, _ in named), end]
                waiting += reversed([*itertools.pairwise(places)])
        return _joined(parts)

    @functools.cached_property
    def _forbidden(self) -> frozenset[int]:
        return frozenset(i for i, text in enumerate(self._engine.spelled) if text is None and i != self._engine.unknown)

    @functools.cached_property
    def control_names(self) -> tuple[str, ...]:
        """The control symbols as a rendered template spells them, longest first."""
        names = {self._engine.names.get(i, "") for i in self._forbidden} - {""}
        return tuple(sorted(names, key=lambda name: (-len(name), name)))

    def encode_rendered(self, text: str, is_start: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode_with_offsets`, but the name of a control symbol becomes its id. With `is_start` false the text
        continues another, so that no space is put before it."""
        return self._engine.encode(text, reads_controls=True, is_start=is_start)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._engine.decode([int(i) for i in ids if i < self._size])

    def piece(self, token_id: int) -> str:
        """One id for display: its text with U+2581 for spaces, its bytes as <0xC3> where they are no text, or its name
        if it is a control symbol."""
        extra = int(token_id) - self._size
        if extra >= 0:
            return f"<|extra_{extra}|>" if extra or "mask_token" in self._special else "<|mask|>"
        text = self._engine.spelled[int(token_id)]
        if text is None:
            return self._engine.names.get(int(token_id), f"<|unused_{int(token_id)}|>")
        try:
            return text.decode().replace(" ", _SPACE)
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in text)

    def token_bytes(self) -> np.ndarray:
        sizes = [len(text or b"") for text in self._engine.spelled]
        return np.array([*sizes, *[0] * self.extra_ids], np.int32)

    @functools.cached_property
    def added_space(self) -> int:
        """1 if `encode` puts a space before a text, as SentencePiece's dummy prefix does."""
        size_V = self.token_bytes()
        pieces = (spelled.decode(errors="ignore").strip() for spelled in self._engine.spelled if spelled)
        for text in itertools.chain("a", pieces):
            ids = self.encode(text)
            more = int(size_V[ids].sum()) - len(text.encode())
            if text and self._engine.unknown not in ids and more in (0, 1):
                return more
        return 0

    @functools.cached_property
    def changes_text(self) -> str:
        back = self.decode(self.encode(_PROBE))
        return "" if back == _PROBE else f"{_PROBE!r} comes back as {back!r}"

    # Files ------------------------------------------------------------------------------------------------------------

    @property
    def chat_template(self) -> str:
        """The Jinja source: chat_template.jinja, else that of tokenizer_config.json; '' = none."""
        files = dict(self.files)
        return files[_TEMPLATE].decode() if _TEMPLATE in files else self._said.chat_template

    def special_tokens(self) -> dict[str, str]:
        """The special tokens that a template may name: 'bos_token', 'eos_token', ... -> text."""
        return {role: self._engine.names[i] for role, i in self._special.items()}

    def with_chat_template(self, source: str) -> "Published":
        """The same tokenizer with another chat template."""
        kept = tuple((name, content) for name, content in self.files if name != _TEMPLATE)
        return dataclasses.replace(self, files=(*kept, (_TEMPLATE, source.encode())))

    @functools.cached_property
    def hash(self) -> str:
        """sha256 (hex) of all that decides the ids: the vocabulary's files, the special and added tokens, the options
        of tokenizer_config.json that are read with this vocabulary, and what separates the texts of a pair if that is
        more than one `eos_id`. The chat template is not part of it."""
        names = [*itertools.chain.from_iterable(_ENGINES)]
        vocabulary = [[name, hashlib.sha256(content).hexdigest()] for name, content in self.files if name in names]
        more = [self._engine.beside, self.separator_ids if self.separator_ids != [self.eos_id] else []]
        decides = [vocabulary, sorted(self._special.items()), *filter(None, more)]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    @property
    def saved_files(self) -> dict[str, bytes]:
        return {f"{self.file}/{name}": content for name, content in self.files}

    def save(self, path: Any) -> None:
        """Writes the files into the folder `path`, which `transformers` reads too; a new folder appears complete. Of an
        old one, tokenizer files that this tokenizer does not have are removed."""
        from etils import epath

        folder = epath.Path(path)
        into = folder if folder.exists() else epath.Path(f"{path}.tmp")
        if into != folder and into.exists():  # of a save that was killed
            into.rmtree()
        into.mkdir(parents=True, exist_ok=True)
        for name, content in self.files:
            write_atomic(into / name, content)
        for name in {*itertools.chain.from_iterable(_ENGINES), *_BESIDE} - {*dict(self.files)}:
            (into / name).unlink(missing_ok=True)
        if into != folder:
            into.rename(folder)

    def check(self) -> "Published":
        """Raises ConfigError if the files contradict each other or cannot be read. Returns the tokenizer."""
        id_of = self._id_of
        for name, added in self._said.added.items():
            if id_of.get(name) != added.id:
                found = f"has it as {id_of[name]}" if name in id_of else "lacks it"
                raise ConfigError(
                    f"'tokenizer.path': {added.source} gives {name!r} the id {added.id}, but {self.files[0][0]} "
                    f"{found}; expected files of one tokenizer"
                )
        assert self._special is not None  # raises ConfigError for special tokens that are missing
        return self


def load(path: Any) -> Published:
    """Reads the tokenizer of a published model.

    Args:
      path: an `epath.Path` of a folder with one of tokenizer.json, tokenizer.model, spiece.model, vocab.json and
        merges.txt, vocab.txt (the first of these that is there); of such a file, with other files of its folder; or of
        a .gguf file.

    Raises:
      ConfigError: no such file, a damaged one, or files that contradict each other.
    """
    try:
        return Published(_gguf_files(path) if path.suffix == ".gguf" else _files(path)).check()
    except ConfigError:
        raise
    except ImportError as error:
        raise ConfigError(f"'tokenizer.path': {path} needs {error.name}: pip install -e '.[hf]'") from None
    except Exception as error:  # the libraries raise all kinds
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise ConfigError(f"'tokenizer.path': {path} cannot be read ({reason}); expected a tokenizer's file") from None


def has_files(folder: Any) -> bool:
    """Whether a folder has the files of a tokenizer of any kind."""
    return bool(_kinds(folder))


def _kinds(folder: Any) -> list[tuple[str, ...]]:
    """The kinds of which a folder has all files, best first."""
    return [kind for kind in _ENGINES if all((folder / name).is_file() for name in kind)]


def _files(path: Any) -> tuple[tuple[str, bytes], ...]:
    """The files of a tokenizer in a folder, or of which one is given, by their standard names."""
    if path.is_dir():
        folder, named = path, dict[str, Any]()
        kinds = _kinds(path)
        if not kinds:
            known = ", ".join(" and ".join(kind) for kind in _ENGINES)
            raise ConfigError(f"'tokenizer.path': {path} has no tokenizer; expected one of {known} in it")
        names = kinds[0]
    else:
        folder = path.parent
        standard = {".json": "tokenizer.json", ".txt": "vocab.txt"}.get(path.suffix, "tokenizer.model")
        names = next((kind for kind in _ENGINES if path.name in kind), (standard,))
        named = {standard: path} if path.name not in names else {}
    files = [(name, named.get(name, folder / name)) for name in (*names, *_BESIDE)]
    return tuple((name, file.read_bytes()) for name, file in files if file.exists())


class _Added(NamedTuple):
    """A token that a JSON file adds to the vocabulary.

    Attributes:
      id: the id that the file gives it.
      is_special: whether it is a control symbol.
      matching: 'lstrip', 'rstrip', 'single_word', 'normalized', as `tokenizers.AddedToken` takes them.
      source: the file.
    """

    id: int
    is_special: bool
    matching: dict[str, bool]
    source: str


class _Said(NamedTuple):
    """What a folder's JSON files say beside the vocabulary.

    Attributes:
      options: the keys of tokenizer_config.json.
      specials: role -> text of the special token.
      added: text of an added token -> what is said of it.
      chat_template: of tokenizer_config.json.
      source: the file that names the special tokens, for messages.
    """

    options: dict[str, Any]
    specials: dict[str, str]
    added: dict[str, _Added]
    chat_template: str
    source: str


def _read_config(files: Mapping[str, bytes]) -> _Said:
    parsed: dict[str, dict[str, Any]] = {}
    for name in _BESIDE[:3]:
        try:
            parsed[name] = json.loads(files.get(name, b"{}"))
        except ValueError as error:
            raise ConfigError(f"'tokenizer.path': {name} is not JSON: {error}") from None
        if not isinstance(parsed[name], dict):
            raise ConfigError(f"'tokenizer.path': {name} is a {type(parsed[name]).__name__}; expected an object")
    options, mapped, extra = parsed.values()
    specials: dict[str, str] = {}
    source = _BESIDE[0]
    for name, place in ((_BESIDE[0], options), (_BESIDE[1], mapped)):
        for role in _ROLES:
            value = place.get(role)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and role not in specials:
                specials[role], source = text, name
    more = options.get("additional_special_tokens") or []
    is_special = {*specials.values(), *(token["content"] if isinstance(token, dict) else token for token in more)}
    told: list[tuple[Any, dict[str, Any], str]] = [(i, {"content": text}, _BESIDE[2]) for text, i in extra.items()]
    told += [(i, token, _BESIDE[0]) for i, token in (options.get("added_tokens_decoder") or {}).items()]
    added: dict[str, _Added] = {}
    for i, token, file in told:
        text, special = token["content"], token.get("special", False) or token["content"] in is_special
        matching = {key: bool(token.get(key, False)) for key in ("lstrip", "rstrip", "single_word")}
        matching["normalized"] = bool(token.get("normalized", not special))
        added[text] = _Added(int(i), special, matching, file)
    templates = options.get("chat_template") or ""
    if isinstance(templates, list):  # several, by name
        named = {each["name"]: each["template"] for each in templates}
        templates = named.get("default", "")
    return _Said(options, specials, added, templates, source)


def _changed(said: _Said, defaults: Mapping[str, bool | None]) -> dict[str, bool]:
    """The options that differ from these defaults."""
    given = {name: said.options.get(name, default) for name, default in defaults.items()}
    meant = {name: bool(value) for name, value in given.items() if value is not defaults[name]}  # null is false
    return {name: value for name, value in meant.items() if value is not defaults[name]}


def _joined(parts: Iterable[tuple[int, Encoded]]) -> Encoded:
    """Encoded parts of a text, each with the place at which it begins, as one."""
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for at, part in parts:
        ids += part.ids
        offsets += [(at + start, at + end) for start, end in part.offsets]
    return Encoded(ids, offsets)


# tokenizer.json -------------------------------------------------------------------------------------------------------


class _Json:
    """tokenizer.json, by the library `tokenizers`; `options`: those with which it was made from other files."""

    def __init__(self, content: str, said: _Said, options: Mapping[str, bool] | None = None) -> None:
        from tokenizers import AddedToken, Tokenizer

        spec = json.loads(content)
        # Tokens that only the other JSON files have, as transformers adds them: in the order of their ids.
        has = {token["content"] for token in spec.get("added_tokens") or []}
        missing = sorted((token.id, text) for text, token in said.added.items() if text not in has)
        tokens_said = [(text, said.added[text]) for _, text in missing]
        self.beside: dict[str, Any] = {**(options or {})}
        if tokens_said:
            self.beside["added"] = [(text, token.is_special, token.matching) for text, token in tokens_said]

        def make(content: str, reads_controls: bool) -> Any:
            one = Tokenizer.from_str(content)
            # Files may ask for rows of a fixed length, and would then cut texts in silence.
            one.no_truncation()
            one.no_padding()
            one.add_tokens([AddedToken(text, special=each.is_special, **each.matching) for text, each in tokens_said])
            one.encode_special_tokens = not reads_controls
            return one

        self._of = {reads_controls: make(content, reads_controls) for reads_controls in (False, True)}
        parts = {name: spec.get(name) for name in ("normalizer", "pre_tokenizer")}
        goes_on = {name: _without_prefix(part) for name, part in parts.items()}
        # Encodes what is not the start of a text; None where that is encoded in the same way.
        self._inner = make(json.dumps(spec | goes_on), False) if goes_on != parts else None
        self._ends_word = re.compile(r"\s" if "WhitespaceSplit" in _types(parts) else r"(?!)")
        one = self._of[True]
        self.names = {i: name for name, i in one.get_vocab(with_added_tokens=True).items()}
        tokens = one.get_added_tokens_decoder()
        plain = frozenset(i for i, token in tokens.items() if not token.special)
        self._added = {False: plain, True: frozenset(tokens)}
        own = spec["model"]
        unknown = own.get("unk_token") if own.get("unk_id") is None else own["vocab"][own["unk_id"]][0]
        self.unknown = next((i for i, name in self.names.items() if name == unknown), -1)
        spell = _speller(spec)
        self.spelled: list[bytes | None] = [None] * (1 + max(self.names))
        for i, name in self.names.items():
            if i in tokens:
                self.spelled[i] = None if tokens[i].special else name.encode()
            elif i != self.unknown:
                self.spelled[i] = spell(name)

    def encode(self, text: str, reads_controls: bool, is_start: bool) -> Encoded:
        found = self._of[reads_controls].encode(text, add_special_tokens=False)
        if is_start or not self._inner:
            return Encoded(found.ids, found.offsets)
        # The prefix is left out before the first part only: those behind an added token, and words of a kind that
        # removes white space, have theirs anywhere.
        added = self._added[reads_controls]
        ends = [start for i, (start, _) in zip(found.ids, found.offsets, strict=True) if i in added]
        ends += [match.start() for match in [self._ends_word.search(text)] if match]
        cut = min(ends, default=len(text))
        head = self._inner.encode(text[:cut], add_special_tokens=False)
        rest = self._of[reads_controls].encode(text[cut:], add_special_tokens=False)
        return _joined([(0, Encoded(head.ids, head.offsets)), (cut, Encoded(rest.ids, rest.offsets))])

    def decode(self, ids: Sequence[int]) -> str:
        return self._of[True].decode(ids, skip_special_tokens=True)


def _without_prefix(part: Any) -> Any:
    """A part of tokenizer.json, changed so that it puts no space before a text."""
    if isinstance(part, list):
        return [changed for each in part if (changed := _without_prefix(each)) is not None]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    none: dict[str, dict[str, Any]] = {
        "Metaspace": {"prepend_scheme": "never"},
        "ByteLevel": {"add_prefix_space": False},
    }
    kept = {key: _without_prefix(value) for key, value in part.items() if key != "add_prefix_space"}
    return kept | none.get(part.get("type", ""), {})


def _separators(part: Mapping[str, Any]) -> int:
    """How many end tokens, 1 or 2, a post_processor of tokenizer.json puts between the texts of a pair; 0 = it has
    nothing between them. Other tokens there count as one."""
    if part.get("type") in ("RobertaProcessing", "BertProcessing"):
        return 2 if part["type"] == "RobertaProcessing" else 1
    names = ["" if "Sequence" in each else each["SpecialToken"]["id"] for each in part.get("pair") or []]
    between = names[names.index("") + 1 :] if "" in names else []
    between = between[: between.index("")] if "" in between else []
    return 2 if len(between) == 2 and between[0] == between[1] else min(len(between), 1)


def _speller(spec: Mapping[str, Any]) -> Any:
    """name of a token -> the bytes of text that it stands for, by the kind of a tokenizer.json."""
    kinds = {*_types(spec.get("pre_tokenizer")), *_types(spec.get("decoder"))}
    if "ByteLevel" in kinds:
        byte_of = {character: byte for byte, character in _byte_alphabet().items()}
        return lambda name: bytes(byte_of[c] for c in name) if all(c in byte_of for c in name) else name.encode()
    if spec["model"].get("type") == "WordPiece" or "WordPiece" in kinds:
        mark = spec["model"].get("continuing_subword_prefix") or "##"
        return lambda name: name.removeprefix(mark).encode() if name.startswith(mark) else f" {name}".encode()
    falls_back = bool(spec["model"].get("byte_fallback"))
    return lambda name: _spell_sentencepiece(name, falls_back)


def _spell_sentencepiece(name: str, falls_back: bool) -> bytes:
    if falls_back and re.fullmatch("<0x[0-9A-F]{2}>", name):
        return bytes([int(name[3:5], 16)])
    return name.replace(_SPACE, " ").encode()


def _types(part: Any) -> Iterator[str]:
    """The values of all keys 'type' inside a part of tokenizer.json."""
    if isinstance(part, dict):
        if isinstance(part.get("type"), str):
            yield part["type"]
        part = list(part.values())
    if isinstance(part, list):
        yield from itertools.chain.from_iterable(map(_types, part))


@functools.cache
def _byte_alphabet() -> dict[int, str]:
    """byte -> the visible character that stands for it in byte-level BPE (GPT-2's encoder.py)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _word_pieces(vocabulary: str, said: _Said, options: Mapping[str, bool]) -> str:
    """The tokenizer.json of BERT's vocab.txt; `options`: those of its normalizer that are not the default."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    ids = {line.rstrip("\r\n"): i for i, line in enumerate(vocabulary.rstrip("\n").split("\n"))}
    made = Tokenizer(models.WordPiece(ids, unk_token=said.specials.get("unk_token", "[UNK]")))
    made.normalizer = normalizers.BertNormalizer(
        lowercase=options.get("do_lower_case", True),
        strip_accents=options.get("strip_accents"),
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    specials = said.specials.values() or [name for names in _USUAL.values() for name in names]
    made.add_special_tokens([name for name in specials if name in ids])
    return str(made.to_str())


def _byte_level(
    vocabulary: Mapping[str, int], merges: Sequence[str], specials: Sequence[str], kind: str, prefix: bool = False
) -> str:
    """The tokenizer.json of a byte-level BPE. `kind`: how text is cut before merging, as GGUF files name it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pairs: Any = [tuple(line.split(" ")) for line in merges]  # of two pieces each
    made = Tokenizer(models.BPE(dict(vocabulary), pairs, ignore_merges=kind == "llama-bpe"))
    if kind in _SPLITS:
        cut = pre_tokenizers.Split(Regex(_SPLITS[kind]), "isolated")
        steps = [cut, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)]
    else:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=prefix)]
    if kind == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if kind == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([name for name in specials if name in vocabulary])
    return str(made.to_str())


# SentencePiece --------------------------------------------------------------------------------------------------------


class _SentencePiece:
    """A SentencePiece model, with the tokens that tokenizer_config.json adds to it."""

    def __init__(self, model: bytes, said: _Said) -> None:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        kind = said.options.get("tokenizer_class", "")
        if kind and not _SAME_IDS.fullmatch(kind):
            raise ConfigError(
                f"'tokenizer.path': tokenizer_config.json has tokenizer_class {kind}, whose ids may differ from those "
                "of the SentencePiece model; give its tokenizer.json"
            )
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        proto: Any = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
        proto.normalizer_spec.add_dummy_prefix = False
        self._inner = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        sp, size = self._sp, self._sp.vocab_size()
        said_of = dict(said.added)
        if kind.startswith("T5") or "extra_ids" in said.options:
            number = int(said.options.get("extra_ids", 100))
            for n in range(number):
                said_of.setdefault(f"<extra_id_{n}>", _Added(size + number - 1 - n, True, {}, _BESIDE[0]))
        said_of = {
            text: token for text, token in said_of.items() if token.id >= size or sp.id_to_piece(token.id) != text
        }
        for text, token in said_of.items():
            if token.id < size:
                raise ConfigError(
                    f"'tokenizer.path': {token.source} gives {text!r} the id {token.id}, which is "
                    f"{sp.id_to_piece(token.id)!r} in the model; expected files of one tokenizer"
                )
        added = {text: token.id for text, token in said_of.items()}
        self.names = {i: sp.id_to_piece(i) for i in range(size)} | {i: text for text, i in added.items()}
        self.unknown = sp.unk_id()
        self.spelled: list[bytes | None] = [None] * (1 + max(self.names))
        for i in range(size):
            if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)):
                self.spelled[i] = _spell_sentencepiece(sp.id_to_piece(i), sp.is_byte(i))
        for text, token in said_of.items():
            self.spelled[token.id] = None if token.is_special or _SENTINEL.fullmatch(text) else text.encode()
        self.beside = (
            {"added": sorted((i, text, self.spelled[i] is None) for text, i in added.items())} if added else {}
        )
        controls = {text: i for i, text in self.names.items() if self.spelled[i] is None and i != self.unknown}
        plain = {text: i for text, i in added.items() if text not in controls}
        self._cut_at = {False: plain, True: plain | controls}
        words = (i for i in range(size) if not sp.is_byte(i) and b" " not in (self.spelled[i] or b" "))
        self._word = next(words, 0)  # any piece that is not a space

    def encode(self, text: str, reads_controls: bool, is_start: bool) -> Encoded:
        marks = self._cut_at[reads_controls]
        parts, at = [], 0
        for part in _pattern(tuple(marks)).split(text) if marks else [text]:
            if part in marks:
                parts.append((at, Encoded([marks[part]], [(0, len(part))])))
            elif part:
                parts.append((at, self._encode_part(part, is_start and at == 0)))
            at += len(part)
        return _joined(parts)

    def _encode_part(self, text: str, is_start: bool) -> Encoded:
        found = (self._sp if is_start else self._inner).encode(text, return_type="offset_mapping")
        # Of the bytes of one character only the last has the character's range.
        ranges = [
            (start, start + 1) if start == end and self._sp.is_byte(i) else (start, end)
            for i, (start, end) in zip(found["ids"], found["offsets"], strict=True)
        ]
        return Encoded(list(found["ids"]), ranges)

    def decode(self, ids: Sequence[int]) -> str:
        size, text = self._sp.vocab_size(), ""
        for is_own, group in itertools.groupby(ids, lambda i: i < size):
            some = list(group)
            if not is_own:
                text += b"".join(self.spelled[i] or b"" for i in some).decode()
            elif not text:
                text = self._sp.decode(some)
            else:  # behind a word, so that a space is not taken for the one that is put before a text
                text += self._sp.decode([self._word, *some])[len(self._sp.decode([self._word])) :]
        return text


@functools.lru_cache(maxsize=8)
def _pattern(texts: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


# GGUF -----------------------------------------------------------------------------------------------------------------

_GGUF_NORMAL, _GGUF_CONTROL, _GGUF_USER = 1, 3, 4  # token types; the numbers are SentencePiece's


def _gguf_files(path: Any) -> tuple[tuple[str, bytes], ...]:
    """The tokenizer in the header of a GGUF file, as the files of a folder."""
    try:
        import gguf
    except ImportError:
        raise ConfigError(f"'tokenizer.path': {path} needs gguf: pip install gguf") from None
    try:
        fields = {
            name: field.contents()
            for name, field in gguf.GGUFReader(str(path)).fields.items()
            if name.startswith("tokenizer.")
        }
    except Exception as error:  # of a damaged file, of all kinds
        raise ConfigError(f"'tokenizer.path': {path} is no GGUF file: {type(error).__name__}: {error}") from None
    model, tokens = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.tokens") or []
    kinds = fields.get("tokenizer.ggml.token_type") or [_GGUF_NORMAL] * len(tokens)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        i = fields.get(f"tokenizer.ggml.{name}_token_id")
        if i is not None:
            config[f"{role}_token"] = tokens[i]
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    beside = (_BESIDE[0], json.dumps(config, ensure_ascii=False).encode())
    if model == "gpt2":
        cut = fields.get("tokenizer.ggml.pre", "default")
        known = {"default": "gpt-2", "gpt-2": "gpt-2", "smollm": "smollm", "llama3": "llama-bpe"}
        known |= {name: name for name in _SPLITS}
        if cut not in known:
            raise ConfigError(
                f"'tokenizer.path': {path} cuts text as '{cut}'; expected one of {', '.join(known)}, or give the "
                "model's tokenizer.json"
            )
        specials = [text for text, kind in zip(tokens, kinds, strict=True) if kind == _GGUF_CONTROL]
        vocabulary = {text: i for i, text in enumerate(tokens)}
        made = json.loads(_byte_level(vocabulary, fields["tokenizer.ggml.merges"], specials, known[cut]))
        user = [text for text, kind in zip(tokens, kinds, strict=True) if kind == _GGUF_USER]
        made["added_tokens"] += [
            {"id": vocabulary[text], "content": text, "special": False, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for text in user
        ]
        made["added_tokens"].sort(key=lambda token: token["id"])
        return (("tokenizer.json", json.dumps(made, ensure_ascii=False).encode()), beside)
    if model == "llama":
        return (("tokenizer.model", _sentencepiece_of(fields, tokens, kinds)), beside)
    raise ConfigError(f"'tokenizer.path': {path} has a tokenizer of kind {model!r}; expected gpt2 or llama")


def _sentencepiece_of(fields: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]) -> bytes:
    """The SentencePiece model of a GGUF file of kind 'llama', from its pieces, scores and types."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    for text, score, kind in zip(tokens, fields["tokenizer.ggml.scores"], kinds, strict=True):
        proto.pieces.add(piece=text, score=score, type=kind)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = 6 in kinds
    proto.trainer_spec.vocab_size = len(tokens)
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        setattr(proto.trainer_spec, f"{role}_id", fields.get(f"tokenizer.ggml.{name}_token_id", -1))
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    proto.normalizer_spec.remove_extra_whitespaces = False
    return bytes(proto.SerializeToString())
