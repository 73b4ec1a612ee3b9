"""Prints a batch of any recipe: tokens, loss weights, roles, labels, tags, answers, images.

python tools/inspect_batch.py --config=configs/NAME.py [--config.a.b=v] [--split=NAME] [--rows=4] [--html=FILE]
"""

import base64
import html
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from lm import command_line, config
from lm.terminal import say, stop

_CONFIG = command_line.define_recipe()
_ROWS = flags.DEFINE_integer("rows", 4, "Number of rows.", lower_bound=1)
_EXAMPLE = flags.DEFINE_integer("example", 0, "First example, by the index that error messages name.", lower_bound=0)
_SPLIT = flags.DEFINE_string("split", "train", "train, valid, or another set of eval.sets.")
_HTML = flags.DEFINE_string("html", "", "Also write the batch as a web page to this file.")

ROLE_COLOURS = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow", "": "default"}
SEGMENT_COLOURS = ("blue", "yellow", "red")
_LONGEST_WORD = 24  # in tokens; a longer word may be broken on the page


class Token(NamedTuple):
    """One token of a row.

    Attributes:
      text: its piece, with all characters made visible.
      position: as an input.
      weight: loss weight of predicting it, or its tag.
      note: its tag, or the original token.
      begins_word: whether a line may break before it.
    """

    text: str
    id: int
    role: str
    weight: float
    position: int
    note: str = ""
    begins_word: bool = True


class Picture(NamedTuple):
    """An image, uint8 [H, W, C], and its title."""

    title: str
    pixels: Any


class Row(NamedTuple):
    """One row.

    Attributes:
      segments: the tokens of each segment.
      names: of the segments, if they are not just documents.
      facts: about the whole row, such as its label.
      has_targets: whether the row has token targets.
    """

    example_index: int
    segments: list[list[Token]]
    padding: int
    names: list[str] = []  # noqa: RUF012, never written to
    facts: list[str] = []  # noqa: RUF012
    pictures: list[Picture] = []  # noqa: RUF012
    has_targets: bool = True


def main(argv: list[str]) -> None:
    """Prints the batch, and writes it as a web page if --html asks for one."""
    if len(argv) > 1 or _CONFIG.value is None:
        stop("error: --config=configs/NAME.py is needed, and all options are --flag=value; --help explains them")
    from lm import eval_sets
    from lm.tasks import build_config, task_of

    with command_line.one_line_errors():
        cfg = build_config(_CONFIG.value)
        if _SPLIT.value not in (names := ["train", *eval_sets.to_evaluate(cfg)]):
            stop(f"error: --split={_SPLIT.value}: expected one of {', '.join(names)}")
        tokenizer, data = load(cfg)
        batch = batch_from(cfg, data, _SPLIT.value, _EXAMPLE.value, _ROWS.value)
        if _SPLIT.value in data.sets:  # it may have a task of its own
            cfg = eval_sets.config_of(cfg, _SPLIT.value)
        rows = list(read(batch, tokenizer, cfg))
    report = "\n".join(
        f"{name}: " + ", ".join(f"{key} {round(value, 4):,}" for key, value in counts.items())
        for name, counts in data.report.items()
        if name.endswith(_SPLIT.value)
    )
    legend = task_of(cfg).legend
    print_rows(rows, report, legend)
    if _HTML.value:
        Path(_HTML.value).write_text(to_html(rows, report, legend), encoding="utf-8")
        say(f"written to {_HTML.value}")


def load(cfg: Any) -> tuple[Any, Any]:
    """(tokenizer, packed data) of a new run of this config."""
    from lm import eval_sets, input_pipeline, replay
    from lm import run as run_lib
    from lm.tasks import task_of

    planned = run_lib.plan(cfg, None)
    cfg = planned.cfg  # with what init_from's run decides
    found = input_pipeline.load(cfg.data, task_of(cfg).wanted(cfg))
    words = run_lib.tokenizer_for(planned, found)
    replayed, sets = replay.load(planned.replay, cfg), eval_sets.load(cfg)
    return words, input_pipeline.build(cfg, words, *found, replayed=replayed, sets=sets)


def batch_from(cfg: Any, data: Any, split: str, example: int, rows: int) -> dict[str, Any]:
    """The rows that a run reads from the index `example` on, in training or in evaluation."""
    import numpy as np

    from lm.data import loader

    single: dict[str, Any] = {"batch_size": 1, "local_rows": np.arange(1)}
    if split == "train":  # single rows, so that only those shown are read
        stream: Iterator[loader.HostBatch] = loader.train_batches(
            data, start_example=example, seed=cfg.seed, threads=0, **single
        )
    else:
        part = next(iter(data.rows_of(split).values()))
        limits = {"max_tokens": cfg.eval.max_tokens, "seq_len": cfg.data.seq_len}
        evaluation = loader.eval_batches(part, **limits, **single)
        stream = itertools.islice(evaluation, example, None)
    found = list(itertools.islice(stream, rows))
    if not found:
        stop(f"error: --example={example}: an evaluation has only {len(part)} examples; name a smaller index")
    return {key: np.concatenate([row[key] for row in found]) for key in found[0]}


def read(batch: dict[str, Any], tokenizer: Any, cfg: config.Config = config.Config()) -> Iterator[Row]:  # noqa: B008
    """Rows of a batch in readable form, without rows that are all padding."""
    sizes = tokenizer.token_bytes() if tokenizer else None
    for r, example_index in enumerate(batch["example_index"]):
        row = {key: array[r] for key, array in batch.items() if key != "example_index"}
        facts = [visible(fact) for fact in facts_of(row, tokenizer, cfg)]
        if "images" in row:
            yield Row(int(example_index), [], 0, [], facts, pictures_of(row, cfg), False)
            continue
        named = [
            (name, tokens)
            for name, part in parts_of(row, cfg)
            for tokens in segments_of(part, tokenizer, cfg, sizes)
            if tokens
        ]
        ids = [part["segment_ids"] for _, part in parts_of(row, cfg)]
        padding = sum(int((part == 0).sum()) for part in ids)
        has_targets = "targets" in row or is_tagged(row)
        if named:
            names, segments = map(list, zip(*named, strict=True))
            yield Row(int(example_index), segments, padding, names if any(names) else [], facts, [], has_targets)


def parts_of(row: dict[str, Any], cfg: config.Config) -> list[tuple[str, dict[str, Any]]]:
    """(name, columns) of each sequence of a row: the sides of an encoder-decoder, or the views."""
    if "inputs" in row:
        encoder = {
            "tokens": row["inputs"],
            "segment_ids": row["input_segment_ids"],
            "positions": row["input_positions"],
        }
        return [("encoder", encoder), ("decoder", row)]
    if row["tokens"].ndim == 1:
        return [("", row)]
    from lm.tasks import task_of

    views = [{key: x[i] for key, x in row.items() if x.ndim == 2} for i in range(len(row["tokens"]))]
    names = task_of(cfg).view_names(cfg) or [f"view {i}" for i in range(1, 1 + len(views))]
    return list(zip(map(visible, names), views, strict=True))


def segments_of(row: dict[str, Any], tokenizer: Any, cfg: config.Config, sizes: Any) -> list[list[Token]]:
    """The tokens of each segment of a sequence; the sentences of a pair are separate segments."""
    segment_ids = row["segment_ids"]
    is_shifted = "targets" in row and cfg.model.kind != "encoder"
    segments = []
    for segment in range(1, segment_ids.max() + 1):
        for kind in sorted(set(row["type_ids"][segment_ids == segment].tolist())) if "type_ids" in row else [None]:
            inside = (segment_ids == segment) & (True if kind is None else row["type_ids"] == kind)
            segments.append(_shifted(row, inside, tokenizer) if is_shifted else _in_place(row, inside, tokenizer, cfg))
    return [_with_words(tokens, sizes) for tokens in segments]


def _shifted(row: dict[str, Any], inside: Any, tokenizer: Any) -> list[Token]:
    """The inputs and the last target, each with the weight of predicting it."""
    role_of = {i: role for role, i in tokenizer.role_ids.items()}
    columns = [row[key][inside].tolist() for key in ("tokens", "targets", "loss_weights", "positions")]
    columns.append(row["is_prefix"][inside].tolist() if "is_prefix" in row else [0] * len(columns[0]))
    shown: list[Token] = []
    role = ""

    def show(token_id: int, weight: float, position: int, note: str) -> None:
        nonlocal role
        role = role_of.get(token_id, role)
        shown.append(Token(visible(tokenizer.piece(token_id)), token_id, role, weight, position, note))

    for token_id, target, weight, position, is_prefix in zip(*columns, strict=True):
        if not shown or shown[-1].id != token_id:  # the first token of a document, which is not predicted
            role = ""
            show(token_id, 0.0, position, "")
        if is_prefix:
            shown[-1] = shown[-1]._replace(note="prefix")
        show(target, weight, position + 1, "")
    return shown


def _in_place(row: dict[str, Any], inside: Any, tokenizer: Any, cfg: config.Config) -> list[Token]:
    """The tokens, each with its own target, tag or mark."""
    shown = []
    for i in inside.nonzero()[0].tolist():
        note, weight = "", 0.0
        if "targets" in row and row["loss_weights"][i]:
            note, weight = tokenizer.piece(row["targets"][i]), float(row["loss_weights"][i])
        elif is_tagged(row) and row["labels"][i] >= 0:
            note, weight = cfg.task.labels[row["labels"][i]], 1.0
        elif is_span(row) and 0 < row["labels"][0] <= i <= row["labels"][1]:
            note = "answer"
        token_id = int(row["tokens"][i])
        shown.append(
            Token(visible(tokenizer.piece(token_id)), token_id, "", weight, int(row["positions"][i]), visible(note))
        )
    return shown


def _with_words(tokens: list[Token], sizes: Any) -> list[Token]:
    """Sets `begins_word`: after a space or a line break, and at tokens that are no text, such as items."""
    begins, after = [], True
    for token in tokens:
        is_text = sizes[token.id] > 0
        begins.append(after or not is_text or token.text.startswith("\u2581"))
        after = not is_text or token.text[-1] in _NAMES.values() or token.text in ("<0x0A>", "<0x09>")
    return [token._replace(begins_word=begin) for token, begin in zip(tokens, begins, strict=True)]


def is_tagged(row: dict[str, Any]) -> bool:
    """Whether each position has a label."""
    return "labels" in row and row["labels"].shape == row["tokens"].shape


def is_span(row: dict[str, Any]) -> bool:
    """Whether the label is a first and a last position."""
    return "labels" in row and row["labels"].shape == (2,)


def facts_of(row: dict[str, Any], tokenizer: Any, cfg: config.Config) -> list[str]:
    """Facts about a whole row: its label, number or answer, the shape of its image."""
    from lm.tasks import multitask

    facts = []
    if "images" in row:
        facts.append("image " + " x ".join(map(str, row["images"].shape[-3:])))
    if "masked_patches" in row:
        seen, hidden = len(row["visible_patches"]), len(row["masked_patches"])
        facts.append(f"{hidden} of {seen + hidden} patches hidden")
    if "part" in row:
        part = multitask.parts(cfg.task.labels)[int(row["part"])]
        value = part.classes[int(row["labels"])] if part.classes else f"{float(row['labels']):g}"
        facts.append(f"{part.name}: {value}")
    elif is_span(row):
        start, end = row["labels"].tolist()
        facts.append(f"answer {tokenizer.decode(row['tokens'][start : end + 1])!r}" if start else "no answer in it")
    elif cfg.task.name == "masked_lm_pairs":
        negative = "B of another document" if cfg.task.pairs == "next" else "A and B swapped"
        facts.append(negative if row["labels"] else "A and B as in the document")
    elif "labels" in row and row["labels"].ndim == 0:
        is_class = row["labels"].dtype.kind == "i"
        facts.append(f"label {cfg.task.labels[int(row['labels'])] if is_class else format(float(row['labels']), 'g')}")
    return facts


def pictures_of(row: dict[str, Any], cfg: config.Config) -> list[Picture]:
    """The image or its views, and the visible patches of a masked autoencoder."""
    from lm.models import vision

    images = row["images"]
    if images.ndim == 4:
        return [Picture(f"view {i}", view) for i, view in enumerate(images, 1)]
    pictures = [Picture("image", images)]
    if "masked_patches" in row:
        patches_1xTxC = vision.patchify(images[None], cfg.model.patch_size).copy()
        patches_1xTxC[0, row["masked_patches"]] = 127
        pictures.append(Picture("seen", vision.unpatchify(patches_1xTxC, images.shape, cfg.model.patch_size)[0]))
    return pictures


_NAMES = {"\n": "\u23ce", "\t": "\u21e5"}


def visible(text: str) -> str:
    """Text with all characters visible. Control characters and escape sequences are spelled out.

    A space is U+2581 already, as SentencePiece writes it.
    """
    return "".join(_NAMES.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in text)


def title(row: Row) -> str:
    """A line that describes a row."""
    tokens = [token for segment in row.segments for token in segment]
    parts = list(row.facts)
    if tokens:
        parts.append(f"{len(row.segments)} segments")
        parts.append(
            f"{sum(token.weight > 0 for token in tokens)} trained" if row.has_targets else f"{len(tokens)} tokens"
        )
        parts.append(f"{row.padding} padding")
    return f"example {row.example_index}: {', '.join(parts)}"


def has_roles(rows: list[Row]) -> bool:
    """Whether any token has a role."""
    return any(token.role for row in rows for segment in row.segments for token in segment)


def print_rows(rows: list[Row], report: str, legend: str = "") -> None:
    """Prints rows: bold = trained, dim = masked; without colours, [brackets] = trained. A note follows a slash."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    plain = console.color_system is None
    head = Text(legend)
    if any(row.has_targets for row in rows):
        marks = "[token] trained, token masked" if plain else "bold trained, dim masked"
        head.append(f" {marks}; \u2502 segment")
    if has_roles(rows):
        head.append("; roles: ")
        for role, colour in ROLE_COLOURS.items():
            head.append(f"{role or 'none'} ", colour)
    say(report)
    console.print(head)
    for row in rows:
        console.print(Text(f"\n{title(row)}", "bold underline"))
        for s, segment in enumerate(row.segments):
            line = Text()
            name = f" {row.names[s]}:" if row.names else ""
            line.append(f"\u2502{s + 1}{name} ", f"bold {SEGMENT_COLOURS[s % len(SEGMENT_COLOURS)]}")
            for token in segment:
                style = f"{'bold' if token.weight or not row.has_targets else 'dim'} {ROLE_COLOURS[token.role]}"
                text = f"{token.text}/{token.note}" if token.note else token.text
                line.append(f"[{text}]" if plain and token.weight else text, style).append(" ")
            console.print(line)


STYLE = """
body { font: 15px/1.9 system-ui, sans-serif; margin: 2em auto; max-width: 75em; color: #111; background: #fff }
.segment { margin: .4em 0; padding-left: .7em; border-left: 5px solid }
.segment:nth-child(3n+1) { border-color: #0072b2 } .segment:nth-child(3n+2) { border-color: #e69f00 }
.segment:nth-child(3n) { border-color: #cc79a7 }
.w { display: inline-block; white-space: pre; max-width: 100%; overflow-x: auto; vertical-align: bottom }
.t { font-family: ui-monospace, monospace; padding: 1px 3px; margin-right: 2px; border-radius: 3px; color: #777 }
.t.trained, .whole .t { color: #000 } .t.trained { font-weight: bold; box-shadow: inset 0 -2px #000 }
rt { font-size: 70%; font-weight: normal; color: #a33 }
.none { background: #f3f3f3 } .system { background: #f0dcf5 } .user { background: #d8ecfa }
.assistant { background: #dcf2dc } .tool { background: #fbf0c9 } .name { color: #555; margin-right: .6em }
figure { display: inline-block; margin: 0 1em 1em 0; text-align: center }
img { width: 160px; image-rendering: pixelated; display: block }
"""


def to_html(rows: list[Row], report: str, legend: str = "") -> str:
    """A self-contained web page; a tooltip on each token shows its id, position and weight."""

    def span(token: Token) -> str:
        tip = f"id {token.id}, position {token.position}, weight {token.weight:g}"
        kind = f"t {token.role or 'none'}{' trained' if token.weight else ''}"
        text = html.escape(token.text)
        noted = f"<ruby>{text}<rt>{html.escape(token.note)}</rt></ruby>" if token.note else text
        return f'<span class="{kind}" title="{tip}">{noted}</span>'

    def block(row: Row, s: int) -> str:
        name = f'<span class="name">{html.escape(row.names[s])}</span>' if row.names else ""
        boxes = "".join(f'<span class="w">{"".join(map(span, word))}</span>' for word in words(row.segments[s]))
        return f'<div class="segment">{name}{boxes}</div>'

    def section(row: Row) -> str:
        figures = "".join(
            f'<figure><img src="{data_url(picture.pixels)}" alt=""><figcaption>{picture.title}</figcaption></figure>'
            for picture in row.pictures
        )
        kind = "" if row.has_targets else ' class="whole"'
        inside = figures + "".join(block(row, s) for s in range(len(row.segments)))
        return f"<h3>{html.escape(title(row))}</h3><section{kind}>{inside}</section>"

    marks = ""
    if any(row.has_targets for row in rows):
        marks = ' <span class="t trained none">trained</span><span class="t none">masked</span>'
    if has_roles(rows):
        roles = "".join(f'<span class="t {role or "none"}">{role or "no role"}</span>' for role in ROLE_COLOURS)
        marks += f" roles: {roles}"
    bars = " Each bar at the left is one segment." if any(row.segments for row in rows) else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>batch</title><style>{STYLE}</style>'
        f"<h1>Batch</h1><p>{html.escape(report)}</p><p>{legend}{marks}{bars}</p>{''.join(map(section, rows))}"
        "</html>\n"
    )


def words(tokens: list[Token]) -> Iterator[list[Token]]:
    """Groups of tokens; lines may break between groups."""
    group: list[Token] = []
    for token in tokens:
        if group and (token.begins_word or len(group) == _LONGEST_WORD):
            yield group
            group = []
        group.append(token)
    if group:
        yield group


def data_url(pixels: Any) -> str:
    """An image, uint8 [H, W, C], as a data URL of a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


if __name__ == "__main__":
    command_line.run(main)
