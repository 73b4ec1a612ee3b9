"""Entity tags of words (IOB, IOBES, BILOU): which labels are such tags, and which scheme they follow.

scheme   New   York  Paris  is  in    Paris    an entity of several words, of one word
IOB1     I-L   I-L   B-L    O   O     I-L      B- only directly after an entity of the same type
IOB2     B-L   I-L   B-L    O   O     B-L      BIO: B- begins every entity
IOBES    B-L   E-L   S-L    O   O     S-L      also BIOES; with M- for I- (BMES) and W- for S-
BILOU    B-L   L-L   U-L    O   O     U-L      IOBES with other letters
"""

import functools
import itertools
import re
from collections.abc import Iterable, Mapping

from lm.config.schema import ConfigError

OUTSIDE = "O"
# Scheme -> its letters, and those of IOBES that they are read as.
_FAMILIES = {
    "IOB1": {"B": "B", "I": "I"},
    "IOB2": {"B": "B", "I": "I"},
    "IOBES": {"B": "B", "I": "I", "E": "E", "S": "S"},
    "BILOU": {"B": "B", "I": "I", "L": "E", "U": "S"},
    "BMES": {"B": "B", "M": "I", "E": "E", "S": "S"},
    "BMEW": {"B": "B", "M": "I", "E": "E", "W": "S"},
}
_PREFIX = re.compile(r"(?P<letter>[BIELMSUW])(?:[-_](?P<type>.+))?")
_SUFFIX = re.compile(r"(?:(?P<type>.+)[-_])?(?P<letter>[BIELMSUW])")
_LOOKS_LIKE_ONE = re.compile(r"[BIbi]-.+|.+-[BI]")  # small letters are recognised in order to refuse them


@functools.lru_cache(maxsize=8)
def read(labels: tuple[str, ...], scheme: str = "auto") -> Mapping[str, str]:
    """Label -> its tag in the letters of IOBES, such as 'B-PER'; empty if the labels are not entity tags.

    The type may be missing ('B', read as 'B-_') or come before the letter ('PER-B').

    Args:
      labels: all labels that a word may have.
      scheme: `task.entity_scheme`; 'none' = the labels are not entity tags, even if they look like it.

    Raises:
      ConfigError: the labels do not follow `scheme`; or some look like entity tags and others do not.
    """
    if scheme == "none":
        return {}
    others = [label for label in labels if label != OUTSIDE]
    for form in (_PREFIX, _SUFFIX):
        found = {label: form.fullmatch(label) for label in others}
        if others and all(found.values()):
            break
    else:
        odd = [label for label in others if not _PREFIX.fullmatch(label)]
        if scheme != "auto" or any(map(_LOOKS_LIKE_ONE.fullmatch, others)):
            found_instead = f"{odd[0]!r} is not an entity tag" if odd else "no label is an entity tag"
            raise ConfigError(_refusal(found_instead, scheme))
        return {}
    parts = {label: (match["letter"], match["type"]) for label, match in found.items() if match}
    letters = {letter for letter, _ in parts.values()}
    is_bare = not any(type_ for _, type_ in parts.values())
    if scheme == "auto" and is_bare and OUTSIDE not in labels and not ("B" in letters and len(letters) > 1):
        return {}  # single letters may mean anything
    fitting = [family for name, family in _FAMILIES.items() if scheme in ("auto", name) and letters <= set(family)]
    if scheme == "IOBES":
        fitting += [family for name, family in _FAMILIES.items() if name.startswith("BM") and letters <= set(family)]
    if not fitting:
        raise ConfigError(_refusal(f"they have the letters {', '.join(sorted(letters))}", scheme))
    return {OUTSIDE: OUTSIDE} | {
        label: f"{fitting[0][letter]}-{type_ or '_'}" for label, (letter, type_) in parts.items()
    }


def _refusal(found: str, scheme: str) -> str:
    expected = "of IOB1, IOB2, IOBES or BILOU" if scheme == "auto" else f"of 'task.entity_scheme' {scheme}"
    return (
        f"'task.labels': {found}; expected 'O' and tags such as 'B-PER' with the letters {expected}, or set "
        "task.entity_scheme=none, which scores words alone"
    )


def strict_schemes(tags: Iterable[str], scheme: str) -> tuple[str, ...]:
    """The schemes that these tags may follow, for strict scores; if there are two, `tell` decides by the data.

    Args:
      tags: values of `read`.
      scheme: of `task.entity_scheme`.
    """
    if scheme != "auto":
        return ("IOBES" if scheme == "BILOU" else scheme,)
    letters = {tag[0] for tag in tags if tag != OUTSIDE}
    if letters <= {"B", "I"}:
        return ("IOB2", "IOB1") if len(letters) == 2 else ("IOB2",) if "B" in letters else ("IOB1",)
    return ("IOBES",) if "B" in letters or letters == {"S"} else ()  # I- and E- alone: IOE1 or IOE2


def tell(schemes: tuple[str, ...], sentences: Iterable[list[str]]) -> str:
    """The scheme, IOB2 or IOB1, that fewer tags of the sentences violate; IOB2 in a tie."""
    if len(schemes) == 1:
        return schemes[0]
    broken = {"IOB1": 0, "IOB2": 0}
    for sentence in sentences:
        for before, tag in zip([OUTSIDE, *sentence], sentence, strict=False):
            follows_same = before[1:] == tag[1:]
            broken["IOB2"] += tag[0] == "I" and not follows_same
            broken["IOB1"] += tag[0] == "B" and not follows_same
    return min(schemes, key=broken.__getitem__)


def faults(sentence: list[str], schemes: tuple[str, ...]) -> dict[str, int]:
    """Counts the tags of a sentence (values of `read`) that continue no entity, and the entities without an end."""
    pairs = list(itertools.pairwise([OUTSIDE, *sentence, OUTSIDE]))
    strays = sum(tag[0] in "IE" and (before[0] not in "BI" or before[1:] != tag[1:]) for before, tag in pairs)
    left_open = sum(tag[0] in "BI" and (behind[0] not in "IE" or behind[1:] != tag[1:]) for tag, behind in pairs)
    return {
        "tag_continues_nothing": strays if schemes != ("IOB1",) else 0,  # where I- begins entities
        "entity_not_ended": left_open if schemes == ("IOBES",) else 0,
    }
