"""The data card of a prepared folder: README.md, and a histogram of document lengths."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.corpus.filters import FILTERS

# Why documents are dropped, apart from the quality filters, which are counted in `statistics` under their own names.
_OTHER_REASONS = {
    "contaminated": "overlaps an evaluation file",
    "exact_duplicate": "same content as an earlier document",
    "near_duplicate": "similar to an earlier document",
}


def write(folder: Path, index: Mapping[str, Any]) -> None:
    """Writes README.md and lengths.png from the index that `lm.corpus.pipeline` made."""
    _plot(folder / "lengths.png", index["statistics"]["lengths"])
    (folder / "README.md").write_text(text(index), encoding="utf-8")


def text(index: Mapping[str, Any]) -> str:
    """The data card, in Markdown."""
    settings, statistics = index["settings"], index["statistics"]
    data, how, length = settings["data"], settings["prepare"], index["layout"]["length"]
    rows = [("read", statistics["documents"], statistics["bytes"])]
    rows += [(_reason(why), -documents, -size) for why, (documents, size) in statistics["dropped"].items()]
    rows += [(f"kept: {part}", kept["documents"], kept["bytes"]) for part, kept in statistics["kept"].items()]
    parts = [
        (
            part,
            f"{len(index['parts'][part]):,}",
            *(f"{kept[key]:,}" for key in ("rows", "tokens")),
            f"{kept['tokens'] / kept['rows'] / length:.1%}",
        )
        for part, kept in statistics["kept"].items()
        if kept["rows"]
    ]
    bad = ", ".join(f"{kind} {count:,}" for kind, count in statistics["faults"].items()) or "none"
    near = f"similarity of at least {how['near']}" if how["near"] else "not removed"
    share = f"a share of {data['eval_fraction']}, by the hash of the content" if data["eval_fraction"] else "nothing"
    held = "data.eval_path" if data["eval_path"] else share
    sections = [
        "# Prepared data",
        f"Rows of {length} tokens for `task.name={settings['task']['name']}`, `data.packing={settings['packing']}`.",
        "    python -m lm.main --config=RECIPE --workdir=RUN --config.data.format=prepared --config.data.path=FOLDER",
        "## Source",
        f"`data.format={data['format']}`, `{data['path']}`: {len(settings['files']):,} files, "
        f"{statistics['records']:,} records, bad ones: {bad}. Licence, languages and personal data are not known to "
        "the tool; add them here.",
        "## What was kept",
        _table(("", "documents", "bytes"), [(name, f"{count:,}", f"{size:,}") for name, count, size in rows]),
        f"Held out: {held}. Near duplicates: {near}. Text was normalised to NFC and stripped of surrounding white "
        f"space, which changed {statistics['normalised']:,} documents. `removed.jsonl` lists the dropped records.",
        "## Rows",
        _table(("part", "shards", "rows", "tokens", "fill"), parts),
        f"Tokenizer: in this folder, sha256 {index['tokenizer_hash']}.",
        "![Tokens of a document](lengths.png)",
        "## Decontamination: evaluation files",
        "\n".join(f"- `{name}`" for name in settings["evaluation"]) or "None.",
        *(
            [f"A document that shares {how['ngram']} words in a row with one of them is dropped."]
            if settings["evaluation"]
            else []
        ),
    ]
    return "\n\n".join(sections) + "\n"


def _reason(why: str) -> str:
    if why in _OTHER_REASONS:
        return f"{why}: {_OTHER_REASONS[why]}"
    return f"{why}: outside {FILTERS[why].least:g} to {FILTERS[why].most:g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plot(path: Path, counts: Sequence[int]) -> None:
    """Histogram of document lengths; bin i counts documents of 2^(i - 1) to 2^i - 1 tokens."""
    from matplotlib.figure import Figure

    used = [i for i, count in enumerate(counts) if count]
    shown = range(used[0], used[-1] + 1) if used else range(1)
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.bar([str(2**i // 2) for i in shown], [counts[i] for i in shown])
    axes.set_xlabel("tokens in a document (lower bound of the bin)")
    axes.set_ylabel("documents")
    figure.savefig(path, dpi=100, metadata={"Software": None})  # reproducible: no matplotlib version
