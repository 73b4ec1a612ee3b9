"""Prints a batch token by token: what is trained on, who speaks, and where one document ends and the next begins.

python tools/inspect_batch.py --config=configs/NAME.py [--config.a.b=v] [--split=valid] [--rows=4] [--html=FILE]
"""

import html
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # recipes import `configs`, which is not installed

from lm import config
from lm import flags as lm_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: configs/NAME.py, or configs/NAME.py:argument.")
_ROWS = flags.DEFINE_integer("rows", 4, "Rows to show.", lower_bound=1)
_EXAMPLE = flags.DEFINE_integer("example", 0, "First example to show, by the index that errors name.", lower_bound=0)
_SPLIT = flags.DEFINE_enum("split", "train", ["train", "valid"], "Which half of the data.")
_HTML = flags.DEFINE_string("html", "", "Also write the batch to this file, as a web page.")

ROLE_COLOURS = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow", "": "default"}
SEGMENT_COLOURS = ("blue", "yellow", "red")
LEGEND = "A token is trained when the model learns to predict it from those before it."


class Token(NamedTuple):
    """One token of a row; `position` is the one it has as an input, `weight` that of predicting it."""

    text: str
    id: int
    role: str
    weight: float
    position: int


class Row(NamedTuple):
    """One row: its segments' tokens, in order."""

    example_index: int
    segments: list[list[Token]]
    padding: int


def main(argv: list[str]) -> None:
    """Turns flags into text, and an expected error into one clear message and exit status 1."""
    if len(argv) > 1 or _CONFIG.value is None:
        sys.exit("error: --config=configs/NAME.py is needed, and all options are --flag=value; --help explains them")
    try:
        cfg = config.build(_CONFIG.value)
        tokenizer, data = load(cfg)
        rows = list(read(batch_from(cfg, data, _SPLIT.value, _EXAMPLE.value, _ROWS.value), tokenizer))
    except (ValueError, RuntimeError, OSError) as error:
        if type(error).__module__.startswith("lm."):
            sys.exit(f"error: {error}")
        raise
    report = "\n".join(
        f"{name}: " + ", ".join(f"{key} {round(value, 4):,}" for key, value in counts.items())
        for name, counts in data.report.items()
        if name.endswith(_SPLIT.value)
    )
    print_rows(rows, report)
    if _HTML.value:
        Path(_HTML.value).write_text(to_html(rows, report), encoding="utf-8")
        print(f"written to {_HTML.value}")


def load(cfg: Any) -> tuple[Any, Any]:
    """(tokenizer, packed data) of a run of this config that has not begun."""
    from lm import build, replay
    from lm.data import pipeline

    planned = build.plan(cfg, None)
    found = pipeline.load(cfg.data)
    words = build.tokenizer_for(planned, found)
    return words, pipeline.build(cfg, words, *found, replayed=replay.load(planned.replay, planned.cfg))


def batch_from(cfg: Any, data: Any, split: str, example: int, rows: int) -> dict[str, Any]:
    """The rows that a run is given from the index `example` on, in training or in evaluation."""
    import numpy as np

    from lm.data import feed

    one: dict[str, Any] = {"batch_size": 1, "local_rows": np.arange(1)}
    if split == "train":  # no more rows than are shown
        stream: Iterator[feed.HostBatch] = feed.train_batches(
            data, start_example=example, seed=cfg.seed, threads=0, **one
        )
    else:
        limits = {"max_tokens": cfg.eval.max_tokens, "seq_len": cfg.data.seq_len}
        evaluation = feed.eval_batches(data.valid, **limits, **one)
        stream = itertools.islice(evaluation, example, None)
    found = list(itertools.islice(stream, rows))
    if not found:
        sys.exit(f"error: --example={example}: an evaluation has only {len(data.valid)} examples")
    return {key: np.concatenate([row[key] for row in found]) for key in found[0]}


def read(batch: dict[str, Any], tokenizer: Any) -> Iterator[Row]:
    """Rows of a batch in readable form: of each segment the inputs, each with the weight of predicting it, and the
    last target."""
    for r, example_index in enumerate(batch["example_index"]):
        row = {key: array[r] for key, array in batch.items() if key != "example_index"}
        ids = row["segment_ids"]
        segments = [_segment(row, ids == segment, tokenizer) for segment in range(1, ids.max() + 1)]
        if segments:
            yield Row(int(example_index), segments, int((ids == 0).sum()))


def _segment(row: dict[str, Any], inside: Any, tokenizer: Any) -> list[Token]:
    role_of = {i: role for role, i in tokenizer.role_ids.items()}
    columns = (row[key][inside].tolist() for key in ("tokens", "targets", "loss_weights", "positions"))
    shown: list[Token] = []
    role = ""

    def show(token_id: int, weight: float, position: int) -> None:
        nonlocal role
        role = role_of.get(token_id, role)
        shown.append(Token(visible(tokenizer.piece(token_id)), token_id, role, weight, position))

    for token_id, target, weight, position in zip(*columns, strict=True):
        if not shown or shown[-1].id != token_id:  # nothing predicts it: the first of a document
            role = ""
            show(token_id, 0.0, position)
        show(target, weight, position + 1)
    return shown


def visible(piece: str) -> str:
    """A piece with every character shown: U+2581 is a space already, as SentencePiece writes it."""
    names = {"\n": "\u23ce", "\t": "\u21e5"}
    return "".join(names.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in piece)


def title(row: Row) -> str:
    """One line about a row."""
    tokens = [token for segment in row.segments for token in segment]
    trained = sum(token.weight > 0 for token in tokens)
    return f"example {row.example_index}: {len(row.segments)} segments, {trained} trained, {row.padding} padding"


def print_rows(rows: list[Row], report: str) -> None:
    """To the terminal: bold = trained, dim = masked; without colours [brackets] = trained."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    plain = console.color_system is None
    marks = "[token] trained, token masked" if plain else "bold trained, dim masked"
    legend = Text(f"{LEGEND} {marks}; \u2502 segment; roles: ")
    for role, colour in ROLE_COLOURS.items():
        legend.append(f"{role or 'none'} ", colour)
    console.print(Text(report), legend, sep="\n")
    for row in rows:
        console.print(Text(f"\n{title(row)}", "bold underline"))
        for s, segment in enumerate(row.segments):
            line = Text()
            line.append(f"\u2502{s + 1} ", f"bold {SEGMENT_COLOURS[s % len(SEGMENT_COLOURS)]}")
            for token in segment:
                style = f"{'bold' if token.weight else 'dim'} {ROLE_COLOURS[token.role]}"
                line.append(f"[{token.text}]" if plain and token.weight else token.text, style).append(" ")
            console.print(line)


STYLE = """
body { font: 15px/1.9 system-ui, sans-serif; margin: 2em auto; max-width: 75em; color: #111; background: #fff }
.segment { margin: .4em 0; padding-left: .7em; border-left: 5px solid; overflow-wrap: anywhere }
.segment:nth-child(3n+1) { border-color: #0072b2 } .segment:nth-child(3n+2) { border-color: #e69f00 }
.segment:nth-child(3n) { border-color: #cc79a7 }
.t { font-family: ui-monospace, monospace; padding: 1px 3px; margin-right: 2px; border-radius: 3px; color: #777 }
.t.trained { color: #000; font-weight: bold; box-shadow: inset 0 -2px #000 }
.none { background: #f3f3f3 } .system { background: #f0dcf5 } .user { background: #d8ecfa }
.assistant { background: #dcf2dc } .tool { background: #fbf0c9 }
"""


def to_html(rows: list[Row], report: str) -> str:
    """A page that needs nothing else; the pointer over a token shows its id, position and weight."""

    def span(token: Token) -> str:
        tip = f"id {token.id}, position {token.position}, weight {token.weight:g}"
        kind = f"t {token.role or 'none'}{' trained' if token.weight else ''}"
        return f'<span class="{kind}" title="{tip}">{html.escape(token.text)}</span>'

    def block(segment: list[Token]) -> str:
        return f'<div class="segment">{"".join(map(span, segment))}</div>'

    roles = "".join(f'<span class="t {role or "none"}">{role or "no role"}</span>' for role in ROLE_COLOURS)
    legend = f'<span class="t trained none">trained</span><span class="t none">masked</span> roles: {roles}'
    body = "".join(f"<h3>{title(row)}</h3><section>{''.join(map(block, row.segments))}</section>" for row in rows)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>batch</title><style>{STYLE}</style>'
        f"<h1>Batch</h1><p>{html.escape(report)}</p><p>{LEGEND} {legend} a bar at the left is one segment.</p>{body}"
        "</html>\n"
    )


if __name__ == "__main__":
    app.run(main, flags_parser=lm_flags.parse)
