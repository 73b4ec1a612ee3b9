"""A small run of each task, on made-up data of the task's own format, and new records for it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lm import train
from lm.tracking import report
from tests import toys

WORDS = ("alpha", "beta", "gamma", "delta", "of", "the", "run", "step", "loss", "is", "not", "model", "data")
PLACES = ("Rome", "New Delhi", "Oslo")
TAGS = ("O", "B-Place", "I-Place")
SEQ_LEN = 32


def sentence(rng: np.random.Generator, most: int = 10) -> str:
    return " ".join(rng.choice(WORDS, int(rng.integers(2, most))))


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def _jsonl(one: Callable[[np.random.Generator], dict[str, Any]]) -> Callable[[Path, int, int], Path]:
    def write(folder: Path, seed: int, count: int) -> Path:
        rng = np.random.default_rng(seed)
        return write_lines(folder / "records.jsonl", [one(rng) for _ in range(count)])

    return write


def _label(rng: np.random.Generator) -> dict[str, Any]:
    label = str(rng.choice(["neg", "pos"]))
    return {"text": f"{sentence(rng)} {label} {sentence(rng)}", "label": label}


def _mixed(rng: np.random.Generator) -> dict[str, Any]:
    number = float(rng.integers(0, 5))
    return _label(rng) | {"label": str(rng.choice([f"a/{rng.choice(['no', 'yes'])}", f"b/{number}"]))}


def _entity(rng: np.random.Generator) -> dict[str, Any]:
    before, place = sentence(rng), str(rng.choice(PLACES))
    start = len(before) + 1
    entity = {"start": start, "end": start + len(place), "label": "Place"}
    return {"text": f"{before} {place} {sentence(rng)}", "entities": [entity]}


def _preference(rng: np.random.Generator) -> dict[str, Any]:
    return {"prompt": sentence(rng, 4), "chosen": sentence(rng, 5), "rejected": sentence(rng, 5)}


def _chat(rng: np.random.Generator) -> dict[str, Any]:
    return {"prompt": sentence(rng, 4), "response": sentence(rng, 5)}


def write_conll(folder: Path, seed: int, count: int) -> Path:
    """Sentences of which some are longer than a row."""
    rng, lines = np.random.default_rng(seed), list[str]()
    for _ in range(count):
        for _ in range(int(rng.integers(1, 9))):
            lines += [f"{word}\tO" for word in sentence(rng, 4).split()]
            lines += [f"{word}\t{'I' if i else 'B'}-Place" for i, word in enumerate(str(rng.choice(PLACES)).split())]
        lines.append("")
    return write_lines(folder / "words.tsv", lines)


def write_squad(folder: Path, seed: int, count: int, without_answer: bool = False) -> Path:
    """Questions about contexts of which some need several windows."""
    rng, asked = np.random.default_rng(seed), list[Any]()
    for number in range(count):
        place = str(rng.choice(PLACES))
        context = f"{sentence(rng, 30)} in {place} {sentence(rng, 30)}"
        answers = [{"text": place, "answer_start": context.index(place)}]
        if without_answer and number % 3 == 0:
            answers = []
        asked.append({"context": context, "qas": [{"id": str(number), "question": "Where?", "answers": answers}]})
    path = folder / "questions.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"data": [{"paragraphs": asked}]}))
    return path


def write_parallel(folder: Path, seed: int, count: int) -> Path:
    rng = np.random.default_rng(seed)
    lines = [sentence(rng, 7) for _ in range(count)]
    write_lines(folder / "text.en", lines)
    write_lines(folder / "text.de", [line.upper() for line in lines])
    return folder / "text.{en,de}"


def write_interactions(folder: Path, seed: int, count: int) -> Path:
    rng, rows = np.random.default_rng(seed), ["user,item,time"]
    for user in range(count):
        rows += [f"u{user},i{rng.integers(0, 12)},{time}" for time in range(int(rng.integers(3, 9)))]
    return write_lines(folder / "clicks.csv", rows)


def write_images(folder: Path, seed: int, count: int) -> Path:
    rng = np.random.default_rng(seed)
    for number in range(count):
        label = ("cat", "dog")[number % 2]
        place = folder / "pictures" / label / f"{number:04}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)).save(place)
    return folder / "pictures"


def write_texts(folder: Path, seed: int, count: int) -> Path:
    """Documents of one line each, of which some are longer than a row."""
    rng = np.random.default_rng(seed)
    return write_lines(folder / "documents.txt", [f"{sentence(rng, 12)}. {sentence(rng, 40)}." for _ in range(count)])


def write_short_sentences(folder: Path, seed: int, count: int) -> Path:
    """Documents of one line each, of four sentences, of which two fit in a row."""
    rng = np.random.default_rng(seed)
    documents = [" ".join(f"{sentence(rng, 4)}." for _ in range(4)) for _ in range(count)]
    return write_lines(folder / "documents.txt", documents)


@dataclasses.dataclass(frozen=True)
class Kind:
    """How the data of a task is written, (folder, seed, records) -> path, its format, and keys of the config."""

    write: Callable[[Path, int, int], Path]
    format: str = "jsonl"
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


ENCODER = {"model__kind": "encoder", "data__packing": "pad"}
DOCUMENTS = {"data__separator": "\n"}
IMAGES = {
    "model__kind": "vit",
    "model__position": "sincos",
    "data__packing": "pad",
    "model__patch_size": 4,
    "task__image_shape": (8, 8, 3),
}
CONLL = {"task__labels": TAGS, "data__rename": (("1", "token"), ("2", "tag"))}
MASKED = ENCODER | {"tokenizer__extra_ids": 1, "task__mask_rate": 0.3}
PADDED_WITH_SENTINELS = {"data__packing": "pad", "tokenizer__extra_ids": 20}
ITEMS = {"tokenizer__vocab_size": 20, "data__packing": "pad"}
TEMPLATE = {"task__labels": ("neg", "pos"), "task__templates": ("{text} It is {label:bad|good}.",)}
TRIPLE = _jsonl(lambda rng: {"text": sentence(rng), "text_pair": sentence(rng), "negative": sentence(rng)})
KINDS: dict[str, Kind] = {
    "causal_lm": Kind(write_texts, "text", DOCUMENTS),
    "prefix_lm": Kind(write_texts, "text", DOCUMENTS | {"model__kind": "prefix_decoder"}),
    "chat": Kind(_jsonl(_chat)),
    "preferences": Kind(_jsonl(_preference), changes={"data__packing": "pad"}),
    "masked_lm": Kind(write_texts, "text", DOCUMENTS | MASKED),
    "masked_lm_pairs": Kind(write_short_sentences, "text", DOCUMENTS | MASKED),
    "span_corruption": Kind(
        write_texts,
        "text",
        DOCUMENTS | {"model__kind": "encoder_decoder", "model__position": "relative"} | PADDED_WITH_SENTINELS,
    ),
    "translation": Kind(
        write_parallel,
        "parallel",
        {"model__kind": "encoder_decoder", "model__position": "relative", "data__packing": "pad"},
    ),
    "contrastive_sentences": Kind(TRIPLE, changes=ENCODER),
    "contrastive_pairs": Kind(TRIPLE, changes=ENCODER),
    "contrastive_triples": Kind(TRIPLE, changes=ENCODER),
    "classification": Kind(_jsonl(_label), changes=ENCODER | {"task__labels": ("neg", "pos")}),
    "regression": Kind(_jsonl(lambda rng: _label(rng) | {"label": float(rng.integers(0, 9))}), changes=ENCODER),
    "multitask": Kind(_jsonl(_mixed), changes=ENCODER | {"task__labels": ("a/no", "a/yes", "b/")}),
    "prompting": Kind(_jsonl(_label), changes={"data__packing": "pad"} | TEMPLATE),
    "tagging": Kind(write_conll, "conll", ENCODER | CONLL),
    "entities": Kind(_jsonl(_entity), changes=ENCODER | {"task__labels": TAGS}),
    "span_qa": Kind(write_squad, "squad", ENCODER),
    "masked_autoencoding": Kind(write_images, "images", IMAGES | {"model__kind": "mae", "model__decoder_dim": 16}),
    "contrastive_images": Kind(write_images, "images", IMAGES | {"data__augment": (("flip", 0.5),)}),
    "image_classification": Kind(write_images, "images", IMAGES | {"task__labels": ("cat", "dog")}),
    "next_item": Kind(write_interactions, "interactions", ITEMS),
    "masked_item": Kind(
        write_interactions, "interactions", ITEMS | {"model__kind": "encoder", "tokenizer__extra_ids": 1}
    ),
}


def make(task: str, folder: Path, **changes: Any) -> Path:
    """Trains a run of a few steps, on one device; its folder."""
    kind = KINDS[task]
    data = kind.write(folder / "train", 0, 40)
    settings = {"data__format": kind.format, "data__eval_fraction": 0.25, "data__seq_len": SEQ_LEN}
    settings |= {"train__total_steps": 3, "data__batch_size": 8, "eval__at_start": False, "generate__max_new_tokens": 6}
    cfg = toys.recipe(data, task__name=task, **settings | kind.changes | changes)
    with pytest.MonkeyPatch.context() as patch:
        toys.use_one_device(patch)
        patch.setattr(report, "write_report", lambda workdir: workdir / "report.html")
        train.train(cfg, folder / "run")
    return folder / "run"
