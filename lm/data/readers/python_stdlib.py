"""The built-in corpus: Python's language reference, and the docstrings and comments of its standard library.

It comes with every CPython: about 2.5 MB of English technical prose, and some 5,000 instruction pairs, in which the
signature of a function is the request and the first sentence of its docstring the answer. A document is a topic of
`pydoc_data.topics`, or the docstrings and comment blocks of one source file in order. Documents are split into train
and valid by a hash of their names; text and pairs share the split, so that what one holds out the other does not train
on.

A paragraph that occurs in several documents is kept only in the first, training documents first, so that no paragraph
of valid (of `_MIN_REPEAT` characters or more) is trained on. No answer of valid occurs anywhere in train.
"""

import gzip
import hashlib
import importlib
import inspect
import json
import os
import platform
import re
import sysconfig
import tokenize
import types
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lm.data.readers.prose import Document, first_sentence, is_prose, read_source
from lm.data.record import Record

BUILDER_VERSION = 1  # increase it with every change of what is built, so that older caches are not used
VALID_FRACTION = 0.08  # of documents; fixed, so that pre-training and fine-tuning hold out the same files
PARTS = ("text", "instructions")

_MIN_SOURCES = 100  # with fewer source files (a stripped or zipped library), modules are imported instead
_MIN_REPEAT = 40  # characters; repetitions of shorter paragraphs are kept
_MIN_DOCUMENT = 200  # characters; once repetitions are dropped, shorter documents consist of headings
_MAX_SIGNATURE = 300  # characters
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
_SKIPPED_FILES = re.compile(r"(sitecustomize|usercustomize|_sysconfigdata.*|.*_topics)\.py$")
_FALLBACK_MODULES = (
    "builtins argparse array ast asyncio base64 bisect bz2 calendar cmath codecs collections concurrent.futures "
    "configparser contextlib copy csv dataclasses datetime decimal difflib email.message enum fractions functools "
    "gettext glob gzip hashlib heapq http.client inspect io ipaddress itertools json json.decoder json.encoder logging "
    "math mimetypes operator optparse os pathlib pickle pprint queue random re sched shelve shlex shutil socket "
    "statistics string struct subprocess sys tarfile tempfile textwrap threading time timeit tokenize types typing "
    "unittest.case unittest.mock urllib.parse urllib.request uuid warnings weakref xml.etree.ElementTree zipfile"
)


class Corpus(NamedTuple):
    """The built corpus.

    Attributes:
      parts: 'text' and 'instructions' -> 'train' and 'valid' -> records.
      sha256: hex, over all records.
      report: Python version, sizes, hash, and whatever was missing.
    """

    parts: dict[str, dict[str, list[Record]]]
    sha256: str
    report: str


def load() -> Corpus:
    """Loads the corpus of the running Python from the cache, or builds and caches it.

    Only a corpus built from sources is cached. The report says if the cache was damaged or cannot be written.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    path = cache_path(stdlib)
    notes = []
    try:
        corpus = _read_cache(path)
        return corpus._replace(report=f"{corpus.report}\nread from the cache {path}")
    except FileNotFoundError:
        pass
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, RecursionError) as error:
        notes.append(f"the cache {path} was damaged and is rebuilt: {type(error).__name__}: {error}")
    corpus, cacheable = build(stdlib)
    if cacheable:
        try:
            _write_cache(path, corpus)
        except OSError as error:
            notes.append(f"the corpus is not cached: {error}")
    return corpus._replace(report="\n".join([corpus.report, *notes]))


def build(stdlib: Path) -> tuple[Corpus, bool]:
    """Builds (corpus, whether it is from sources). Without sources, docstrings of a fixed list of modules are used."""
    topics, notes = _topics()
    sources = list(_sources(stdlib))
    from_sources = len(sources) >= _MIN_SOURCES
    if from_sources:
        documents, unread = _collect(lambda item: read_source(*item), sources)
    else:
        documents, unread = _collect(_read_module, _FALLBACK_MODULES.split())
        notes.append(
            f"warning: only {len(sources)} source files of the standard library in {stdlib}; "
            f"fell back to the docstrings of {len(documents)} modules that can be imported, without comments"
        )
    if unread:
        notes.append(f"{len(unread)} could not be read: {', '.join(unread[:3])}{', ...' if len(unread) > 3 else ''}")
    parts = _assemble([*topics, *documents])
    sha256 = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    texts = [record["text"] for records in parts["text"].values() for record in records]
    size = sum(len(text.encode()) for text in texts)
    head = (
        f"built-in corpus of {platform.python_implementation()} {platform.python_version()}, "
        f"builder {BUILDER_VERSION}: {size:,} bytes in {len(texts):,} documents, sha256 {sha256}"
    )
    return Corpus(parts, sha256, "\n".join([head, *notes])), from_sources


def is_valid(name: str) -> bool:
    """Whether a document is held out, by the first 8 bytes of the sha256 of its name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) < VALID_FRACTION * 2**64


# Documents ------------------------------------------------------------------------------------------------------------


def _collect(read: Callable[[Any], Document], items: Iterable[Any]) -> tuple[list[Document], list[str]]:
    """Documents of what can be read, and the names of what cannot."""
    documents, unread = [], []
    for item in items:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old modules may warn when they are compiled or imported
                documents.append(read(item))
        except (ImportError, OSError, SyntaxError, UnicodeError, ValueError, tokenize.TokenError) as error:
            unread.append(f"{item if isinstance(item, str) else item[0]} ({type(error).__name__})")
    return documents, unread


def _topics() -> tuple[list[Document], list[str]]:
    """The language reference, longest topic first, since many topics are sections of others and then dropped."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return [], ["warning: this Python has no pydoc_data.topics; the corpus lacks the language reference"]
    longest_first = sorted(topics, key=lambda topic: (-len(topics[topic]), topic))
    return [Document(f"pydoc_data/topics.py:{topic}", [topics[topic]], []) for topic in longest_first], []


def _sources(stdlib: Path) -> Iterator[tuple[str, Path]]:
    """(path within the library, path) of source files, sorted; no tests, generated tables or installed packages."""
    for path in sorted(stdlib.rglob("*.py")):
        inside = path.relative_to(stdlib)
        folders = inside.parts[:-1]
        generated = _SKIPPED_FILES.match(inside.name) or (folders and folders[0].startswith("config-"))
        if not generated and not _SKIPPED_FOLDERS & set(folders):
            yield inside.as_posix(), path


def _read_module(name: str) -> Document:
    """The docstrings of an imported module whose source is missing, as a document named like its source file."""
    module = importlib.import_module(name)
    prose, functions = [], []
    for qualified, value in _members(name, module):
        docstring = getattr(value, "__doc__", None)
        if isinstance(docstring, str) and docstring.strip():
            prose.append(inspect.cleandoc(docstring))
            if not isinstance(value, type | types.ModuleType):
                functions.append((0, qualified + _signature(value), docstring))
    file = name.replace(".", "/") + ("/__init__.py" if hasattr(module, "__path__") else ".py")
    return Document(file, prose, functions)


def _members(name: str, module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """(qualified name, value) of a module, of the names it defines, and of the methods of its classes, sorted."""
    yield name, module
    for key, value in sorted(vars(module).items()):
        is_definition = isinstance(value, type | types.FunctionType | types.BuiltinFunctionType)
        if is_definition and getattr(value, "__module__", None) == name:
            yield f"{name}.{key}", value
            methods = sorted(vars(value).items()) if isinstance(value, type) else []
            yield from ((f"{name}.{key}.{k}", v) for k, v in methods if callable(v) and not isinstance(v, type))


def _signature(value: Any) -> str:
    try:
        return re.sub(r" at 0x\w+", "", str(inspect.signature(value)))
    except (TypeError, ValueError):
        return "(...)"


# Documents to records -------------------------------------------------------------------------------------------------


def _assemble(documents: list[Document]) -> dict[str, dict[str, list[Record]]]:
    """Text and instruction records of both splits, without repetitions."""
    train_first = sorted(documents, key=lambda document: is_valid(document.name))  # stable
    parts: dict[str, dict[str, list[Record]]] = {part: {"train": [], "valid": []} for part in PARTS}
    seen: set[str] = set()
    for document in train_first:
        text = _unrepeated(document.prose, seen)
        if len(text) >= _MIN_DOCUMENT:
            parts["text"][_split_of(document)].append({"text": text, "source": document.name})
    trained_on = "\n".join(" ".join(record["text"].split()) for record in parts["text"]["train"])
    used: set[str] = set()
    for document in train_first:
        held_out = is_valid(document.name)
        for line, signature, docstring in document.functions:
            answer = first_sentence(docstring)
            known = {answer, signature} & used or (held_out and answer in trained_on)
            if answer and not known and len(signature) <= _MAX_SIGNATURE:
                used |= {answer, signature}
                record = _instruction(signature, answer) | {"source": f"{document.name}:{line}"}
                parts["instructions"][_split_of(document)].append(record)
    return parts


def _split_of(document: Document) -> str:
    return "valid" if is_valid(document.name) else "train"


def _unrepeated(prose: list[str], seen: set[str]) -> str:
    """The paragraphs not yet in `seen`, to which they are added, joined by blank lines."""
    kept = []
    for paragraph in (p for piece in prose for p in re.split(r"\n\s*\n", piece)):
        normalised = " ".join(paragraph.split())
        repeated = len(normalised) >= _MIN_REPEAT and normalised in seen
        if repeated or ">>>" in normalised or not is_prose(normalised, 0.6):  # examples and tables are not prose
            continue
        seen.add(normalised)
        kept.append("\n".join(line.rstrip() for line in paragraph.strip("\n").split("\n")))
    return "\n\n".join(kept)


def _instruction(signature: str, answer: str) -> Record:
    question = f"Summarise this function: {signature}"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


# Cache ----------------------------------------------------------------------------------------------------------------


def cache_path(stdlib: Path) -> Path:
    """Where the corpus of this Python is kept: under $XDG_CACHE_HOME/lm, or ~/.cache/lm."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    library = hashlib.sha256(str(stdlib).encode()).hexdigest()[:8]  # two builds of one version may differ
    return root / "lm" / f"builtin-{platform.python_version()}-{library}-v{BUILDER_VERSION}.json.gz"


def _read_cache(path: Path) -> Corpus:
    """Raises ValueError, KeyError, TypeError, RecursionError, OSError, EOFError or zlib.error on any other file."""
    corpus = Corpus(**json.loads(gzip.decompress(path.read_bytes())))
    found = hashlib.sha256(json.dumps(corpus.parts, sort_keys=True).encode()).hexdigest()
    if found != corpus.sha256:
        raise ValueError(f"its records have sha256 {found[:12]}..., expected {corpus.sha256[:12]}...")
    return corpus


def _write_cache(path: Path, corpus: Corpus) -> None:
    """Writes the cache atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(gzip.compress(json.dumps(corpus._asdict()).encode(), mtime=0))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
