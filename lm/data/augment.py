"""Data augmentation: small random changes to a training row, drawn anew each time the row is used.

Each augmentation is a pure function (row, rng, strength, tokenizer, config) -> row; `rng` depends only on the seed and
the global example index. `data.augment` lists them with their strengths, in the order in which they are applied.

Text augmentations take rows of one sentence or a pair. Control symbols ([CLS], [SEP]) keep their places, and a sentence
that had a token keeps at least one.
"""

import functools
import unicodedata
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lm.config import Config
from lm.config.schema import ConfigError, nearest
from lm.data.example import Row
from lm.data.record import DataError
from lm.data.tokenizer import Tokenizer


class Augmentation(NamedTuple):
    """An augmentation and what it requires.

    Attributes:
      change: (row, rng, strength, tokenizer, config) -> row; strength is in (0, 1].
      tasks: values of `task.name` that it fits: it updates every column of their rows that depends on the change.
      check: raises ConfigError for a config that it cannot be applied with.
    """

    change: Callable[[Row, np.random.Generator, float, Any, Config], Row]
    tasks: tuple[str, ...]
    check: Callable[[Config], object] = lambda cfg: None


def check(cfg: Config) -> None:
    """Checks `data.augment` against the rest of the config.

    Raises:
      ConfigError: an augmentation that is unknown or does not fit; the message names the key and what would fit.
      DataError: a file that an augmentation reads is damaged.
    """
    data = cfg.data
    for name, strength in data.augment:
        if name not in AUGMENTATIONS:
            known = ", ".join(sorted(AUGMENTATIONS))
            raise ConfigError(f"'data.augment': no '{name}'{nearest(name, AUGMENTATIONS)}; there are {known}")
        if not 0 < strength <= 1:
            raise ConfigError(f"'data.augment': the strength of {name} must be in (0, 1], got {strength}")
        fitting = AUGMENTATIONS[name].tasks
        if cfg.task.name not in fitting:
            raise ConfigError(
                f"'data.augment': {name} does not fit 'task.name' {cfg.task.name}; use {', '.join(fitting)}"
            )
        if data.packing != "pad":
            raise ConfigError(f"'data.augment' changes rows of one example; set data.packing=pad, not {data.packing}")
        AUGMENTATIONS[name].check(cfg)
    if data.synonyms and "synonyms" not in dict(data.augment):
        raise ConfigError("'data.synonyms' is read by the augmentation synonyms only; name it in data.augment")


# Text -----------------------------------------------------------------------------------------------------------------


def delete(row: Row, rng: np.random.Generator, strength: float, tokenizer: Tokenizer, cfg: Config) -> Row:
    """Deletes each token with probability `strength` (Wei and Zou 2019)."""
    del cfg
    places_M = _places(row, tokenizer)
    return _without(row, places_M, rng.random(len(places_M)) < strength, rng)


def cutoff(row: Row, rng: np.random.Generator, strength: float, tokenizer: Tokenizer, cfg: Config) -> Row:
    """Deletes one contiguous span of `strength` x the row's tokens, at least one token (Shen et al. 2020)."""
    del cfg
    places_M = _places(row, tokenizer)
    size = max(1, round(strength * len(places_M)))
    start = int(rng.integers(0, max(0, len(places_M) - size) + 1))
    rank_M = np.arange(len(places_M))
    return _without(row, places_M, (rank_M >= start) & (rank_M < start + size), rng)


def swap(row: Row, rng: np.random.Generator, strength: float, tokenizer: Tokenizer, cfg: Config) -> Row:
    """Swaps two random tokens of a sentence; done `strength` x (tokens of the row) times, at least once (Wei and Zou
    2019)."""
    del cfg
    tokens_L, places_M = row["tokens"].copy(), _places(row, tokenizer)
    sentence_L = _sentences(row)
    for i in rng.choice(places_M, max(1, round(strength * len(places_M)))) if len(places_M) else ():
        others = places_M[(sentence_L[places_M] == sentence_L[i]) & (places_M != i)]
        if len(others):
            j = rng.choice(others)
            tokens_L[[i, j]] = tokens_L[[j, i]]
    return row | {"tokens": tokens_L}


def synonyms(row: Row, rng: np.random.Generator, strength: float, tokenizer: Tokenizer, cfg: Config) -> Row:
    """Replaces each word of `data.synonyms` by one of its synonyms with probability `strength` (Wei and Zou 2019).

    Words are matched as token ids: case-sensitively, never inside a longer word, and the longest match wins. A synonym
    that does not fit in the row is not used.
    """
    table = _synonym_table(cfg.data.synonyms, tokenizer)
    length = int(np.count_nonzero(row["segment_ids"]))
    ids = row["tokens"][:length].tolist()
    room = len(row["tokens"]) - length
    tokens: list[int] = []
    origins: list[int] = []  # of each new token, the place whose sentence it belongs to
    at = 0
    while at < length:
        entry = table.match(ids, at)
        old = entry.word if entry else (ids[at],)
        new = old
        if entry and rng.random() < strength:
            new = entry.synonyms[int(rng.integers(len(entry.synonyms)))]
            new = new if len(new) - len(old) <= room else old
        tokens += new
        origins += [at] * len(new)
        room -= len(new) - len(old)
        at += len(old)
    return _rebuilt(row, np.array(tokens, np.int32), np.array(origins, np.int64))


def _places(row: Row, tokenizer: Tokenizer) -> np.ndarray:
    """Positions of the tokens that an augmentation may change: neither padding nor control symbols."""
    return np.flatnonzero((row["segment_ids"] > 0) & ~tokenizer.is_control_V[row["tokens"]])


def _sentences(row: Row) -> np.ndarray:
    return row["type_ids"] if "type_ids" in row else np.zeros_like(row["tokens"])


def _without(row: Row, places_M: np.ndarray, is_dropped_M: np.ndarray, rng: np.random.Generator) -> Row:
    """The row without the given positions; a sentence that would lose all its tokens keeps a random one."""
    is_kept_L = row["segment_ids"] > 0
    is_kept_L[places_M[is_dropped_M]] = False
    sentence_M = _sentences(row)[places_M]
    for sentence in np.unique(sentence_M):
        if is_dropped_M[sentence_M == sentence].all():
            is_kept_L[rng.choice(places_M[sentence_M == sentence])] = True
    origins = np.flatnonzero(is_kept_L)
    return _rebuilt(row, row["tokens"][origins], origins)


def _rebuilt(row: Row, tokens: np.ndarray, origins: np.ndarray) -> Row:
    """The row with new tokens. Each gets the segment and sentence of its origin; positions are numbered again."""
    out, length = dict(row), len(tokens)
    filled = {"tokens": tokens, "positions": np.arange(length)}
    filled |= {name: row[name][origins] for name in ("segment_ids", "type_ids") if name in row}
    for name, values in filled.items():
        out[name] = np.zeros_like(row[name])
        out[name][:length] = values
    return out


class _Entry(NamedTuple):
    word: tuple[int, ...]
    synonyms: list[tuple[int, ...]]


class _Synonyms(NamedTuple):
    """Synonyms as token ids: first id -> entries, longest first; and which ids begin or end with a word character."""

    entries: dict[int, list[_Entry]]
    begins_in_word_V: np.ndarray
    ends_in_word_V: np.ndarray

    def match(self, ids: list[int], at: int) -> _Entry | None:
        for entry in self.entries.get(ids[at], ()):
            end = at + len(entry.word)
            if tuple(ids[at:end]) != entry.word:
                continue
            inside = at > 0 and self.ends_in_word_V[ids[at - 1]] and self.begins_in_word_V[ids[at]]
            if not inside and not (end < len(ids) and self.begins_in_word_V[ids[end]]):
                return entry
        return None


@functools.lru_cache(maxsize=4)
def _synonym_table(path: str, tokenizer: Tokenizer) -> _Synonyms:
    """The words of the file as token ids, both at the beginning of a text and after a space."""
    by_word: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for word, others in read_synonyms(path).items():
        for space in ("", " "):
            spelled = [tuple(tokenizer.encode(space + text)) for text in (word, *others)]
            by_word[spelled[0]] = spelled[1:]
    entries: dict[int, list[_Entry]] = {}
    for ids in sorted(by_word, key=len, reverse=True):
        entries.setdefault(ids[0], []).append(_Entry(ids, by_word[ids]))
    # A byte that is not ASCII is usually part of a letter.
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    begins = np.array([_is_of_word(text[:1]) for text in texts])
    ends = np.array([_is_of_word(text[-1:]) for text in texts])
    return _Synonyms(entries, begins, ends)


def _is_of_word(character: str) -> bool:
    return unicodedata.category(character or " ")[0] in "LMN" or character == "\ufffd"


def read_synonyms(path: str) -> dict[str, list[str]]:
    """Reads a UTF-8 file of lines 'word<TAB>synonym' as word -> synonyms; {} for the path ''.

    Raises:
      DataError: the file cannot be read, or a line is malformed; the message names file and line.
    """
    if not path:
        return {}
    try:
        lines = epath.Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'data.synonyms': {path} cannot be read: {error}") from None
    table: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        cells = [cell.strip() for cell in line.split("\t")]
        if line.strip() and (len(cells) != 2 or not all(cells)):
            raise DataError(f"{path}:{number}: found {line!r}; expected a word, a tab and a synonym (data.synonyms)")
        if line.strip():
            table.setdefault(cells[0], []).append(cells[1])
    if not table:
        raise DataError(f"{path}: found no synonym; expected lines of a word, a tab and a synonym (data.synonyms)")
    return table


def _check_synonyms(cfg: Config) -> None:
    if not cfg.data.synonyms:
        raise ConfigError("'data.synonyms' is empty, but data.augment names synonyms; give a file")
    read_synonyms(cfg.data.synonyms)


# Images ---------------------------------------------------------------------------------------------------------------

_ASPECTS = 3 / 4, 4 / 3  # smallest and largest width / height of a crop of a square image


_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def crop(row: Row, rng: np.random.Generator, strength: float, tokenizer: Any, cfg: Config) -> Row:
    """Random resized crop: a random rectangle, resized to the image's size (Szegedy et al. 2014, section 6).

    Its area is uniform in [1 - strength, 1] of the image's; its aspect ratio is log-uniform in [3/4, 4/3].
    """
    del tokenizer, cfg
    from PIL import Image

    pixels = row["images"]
    height, width, channels = pixels.shape
    area = rng.uniform(1 - strength, 1)
    # A rectangle of that area and aspect fits in the image if the aspect is in [area, 1 / area].
    aspect = np.exp(rng.uniform(np.log(max(_ASPECTS[0], area)), np.log(min(_ASPECTS[1], 1 / area))))
    h, w = height * np.sqrt(area / aspect), width * np.sqrt(area * aspect)
    top, left = rng.uniform(0, height - h), rng.uniform(0, width - w)
    picture = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    part = picture.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
    return row | {"images": np.asarray(part).reshape(pixels.shape)}


def flip(row: Row, rng: np.random.Generator, strength: float, tokenizer: Any, cfg: Config) -> Row:
    """Flips the image horizontally with probability `strength`."""
    del tokenizer, cfg
    return row | {"images": row["images"][:, ::-1]} if rng.random() < strength else row


def color(row: Row, rng: np.random.Generator, strength: float, tokenizer: Any, cfg: Config) -> Row:
    """Scales brightness, contrast and saturation, each by a uniform factor in [1 - strength, 1 + strength]."""
    del tokenizer, cfg
    pixels = row["images"].astype(np.float32)
    brightness, contrast, saturation = rng.uniform(max(0.0, 1 - strength), 1 + strength, 3).astype(np.float32)
    pixels = np.clip(pixels * brightness, 0, 255)
    mean = _grey(pixels).mean()
    pixels = np.clip(mean + contrast * (pixels - mean), 0, 255)
    grey = _grey(pixels)
    pixels = np.clip(grey + saturation * (pixels - grey), 0, 255)
    return row | {"images": np.rint(pixels).astype(np.uint8)}


def _grey(pixels: np.ndarray) -> np.ndarray:
    """[H, W, C] -> [H, W, 1]."""
    return pixels if pixels.shape[-1] == 1 else (pixels @ _GREY)[..., None]


_TEXT_TASKS = ("classification", "regression", "masked_lm")  # one sentence or a pair, without a label for each token
_IMAGE_TASKS = ("image_classification", "masked_autoencoding", "contrastive_images")

AUGMENTATIONS: dict[str, Augmentation] = {
    "delete": Augmentation(delete, _TEXT_TASKS),
    "swap": Augmentation(swap, _TEXT_TASKS),
    "cutoff": Augmentation(cutoff, _TEXT_TASKS),
    "synonyms": Augmentation(synonyms, _TEXT_TASKS, _check_synonyms),
    "crop": Augmentation(crop, _IMAGE_TASKS),
    "flip": Augmentation(flip, _IMAGE_TASKS),
    "color": Augmentation(color, _IMAGE_TASKS),
}
