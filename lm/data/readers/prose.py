"""Extracts English prose from Python source: docstrings, comment blocks, and first sentences of docstrings."""

import ast
import inspect
import io
import itertools
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_MIN_COMMENT_WORDS = 6
_MAX_SENTENCE = 300  # characters
_CALL_LINE = re.compile(r"[\w.]+\([^)]*\)(\s*->.*)?$")
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")
_ABBREVIATION = re.compile(r"\b((?i:e\.g|i\.e|eg|ie|cf|vs|viz|approx|resp|incl|excl|al|mr|mrs|dr|st|a\.k\.a)|[A-Z])\.$")
_NOT_PROSE = re.compile(r">>>|::|\||->|https?:|\bXXX\b|\bTODO\b")
_Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Document(NamedTuple):
    """One unit of the train/valid split.

    Attributes:
      name: path of the source file inside the library, or 'pydoc_data/topics.py:TOPIC'.
      prose: pieces of text, in order.
      functions: (line, qualified name and signature, docstring) of its functions.
    """

    name: str
    prose: list[str]
    functions: list[tuple[int, str, str]]


def read_source(name: str, path: Path) -> Document:
    """Reads the docstrings and comment blocks of a source file, in order.

    Raises:
      SyntaxError, UnicodeError, tokenize.TokenError, OSError: this version of Python cannot read the file.
    """
    with tokenize.open(path) as file:  # the encoding that the file declares
        source = file.read()
    tree = ast.parse(source)
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    placed = list(_comment_blocks(source))
    functions = []
    for node, qualified in [(tree, module), *_scopes(tree, module)]:
        if docstring := ast.get_docstring(node):
            placed.append((node.body[0].lineno, docstring))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
                functions.append((node.lineno, f"{qualified}({ast.unparse(node.args)}){returns}", docstring))
    return Document(name, [text for _, text in sorted(placed)], sorted(functions))


def _scopes(parent: ast.AST, name: str) -> Iterator[tuple[_Scope, str]]:
    """(node, qualified name) of all classes and functions below a node."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, f"{name}.{node.name}"
            yield from _scopes(node, f"{name}.{node.name}")
        elif not isinstance(node, ast.expr):  # definitions inside 'if', 'try' or 'with' belong to the enclosing scope
            yield from _scopes(node, name)


def _comment_blocks(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of comments on lines of their own that are prose; adjacent lines are one block."""
    block: list[str] = []
    start = end = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.line[: token.start[1]].strip():
            continue
        if token.start[0] != end + 1:
            yield from _prose_block(start, block)
            block, start = [], token.start[0]
        block.append(token.string.lstrip("#").removeprefix(" ").rstrip("# \t"))
        end = token.start[0]
    yield from _prose_block(start, block)


def _prose_block(line: int, block: list[str]) -> Iterator[tuple[int, str]]:
    text = "\n".join(line for line in block if not line or re.search(r"\w", line)).strip("\n")
    if len(text.split()) >= _MIN_COMMENT_WORDS and is_prose(text) and not _is_code(text):
        yield line, text


def is_prose(text: str, at_least: float = 0.75) -> bool:
    """Whether at least this share of the characters other than white space are letters; False for an empty text."""
    characters = "".join(text.split())
    return bool(characters) and sum(c.isalpha() for c in characters) >= at_least * len(characters)


def _is_code(text: str) -> bool:
    """Whether Python can parse the text, which is then code that was commented out."""
    try:
        ast.parse(inspect.cleandoc(text))
    except (SyntaxError, ValueError):
        return False
    return True


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring on one line, or '' if it does not begin with a sentence of prose.

    A full stop after an abbreviation, and '...' or 'etc.' before a lower-case letter, do not end a sentence. A first
    line without a full stop counts if it is a paragraph of its own.

    Example: 'Split the text, e.g. at\\n  blanks.  Slow.' -> 'Split the text, e.g. at blanks.'
    """
    lines = inspect.cleandoc(docstring).split("\n")
    if lines and _CALL_LINE.match(lines[0]):  # some docstrings begin with their own signature
        lines = inspect.cleandoc("\n".join(lines[1:])).split("\n")
    paragraph = list(itertools.takewhile(lambda line: line and not line[0].isspace(), lines))
    text = " ".join(" ".join(paragraph).split())
    sentence = next(_sentences(text), text if len(paragraph) == 1 else "")
    ok = (
        len(sentence.split()) >= 3
        and len(sentence) <= _MAX_SENTENCE
        and sentence[0].isalpha()
        and sentence[-1] not in ":,;"
        and not _NOT_PROSE.search(sentence)
        and is_prose(sentence, 0.8)
    )
    return sentence if ok else ""


def _sentences(text: str) -> Iterator[str]:
    """The prefixes of `text` that end at the end of a sentence, shortest first."""
    for match in _SENTENCE_END.finditer(text):
        begun, follows = text[: match.end()], text[match.end() :].lstrip()
        goes_on = follows[:1].islower() and begun.endswith(("...", "etc."))
        if not goes_on and not (follows and _ABBREVIATION.search(begun)):
            yield begun
