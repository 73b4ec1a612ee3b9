"""The fingerprint that a checkpoint keeps: a file that is read as other records, in any format, is other data.

Not all formats have checksums (docs/formats.md), so a flipped bit may be read as another value. A run that is resumed
compares the records with those it began with.
"""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lm import input_pipeline
from lm.checkpoint import CheckpointError, resume
from lm.config import Config, DataConfig
from lm.data import tokenizer
from lm.data.readers import registry
from lm.data.record import DataError, Wanted
from tests import toys
from tests.test_data_readers_formats import WRITERS, written

FLIPS = 60  # of one bit, in one file
PROSE = [f"document {i} says hello {'and again ' * (i % 7)}now" for i in range(20)]
ROWS = [{"text": text, "label": i % 2} for i, text in enumerate(PROSE)]
TOK = tokenizer.train(PROSE, 300, 100_000)
QUESTIONS = [
    {"context": text, "qas": [{"id": str(i), "question": "who?", "answers": [{"text": "hello", "answer_start": 17}]}]}
    for i, text in enumerate(PROSE[10:])
]
FILES = {
    "text": ("a.txt", "|".join(PROSE), {"separator": "|"}),
    "table": ("a.csv", "text,label\n" + "".join(f"{text},{i % 2}\n" for i, text in enumerate(PROSE)), {}),
    "conll": ("a.conll", "".join(text.replace(" ", " O\n") + " B\n\n" for text in PROSE), {}),
    "squad": ("a.json", json.dumps({"data": [{"paragraphs": QUESTIONS}]}), {}),
    "interactions": ("a.csv", "user,item,time\n" + "".join(f"u{i % 4},i{i % 7},{i}\n" for i in range(60)), {}),
}


def prepare(name: str, place: Path) -> DataConfig:
    """A small data set in a format."""
    if name in WRITERS:
        return written(name, place, ROWS)
    place.mkdir()
    if name == "parallel":
        for side in ("en", "de"):
            (place / f"a.{side}").write_text("".join(f"{side} {text}\n" for text in PROSE))
        return DataConfig(format=name, path=str(place / "a.{en,de}"), eval_fraction=0.3)
    if name == "images":
        for i in range(6):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
            (place / "cat" if i % 2 else place / "dog").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(place / ("cat" if i % 2 else "dog") / f"{i}.bmp")  # has no checksum
        return DataConfig(format=name, path=str(place), eval_fraction=0.3)
    file, content, more = FILES[name]
    (place / file).write_text(content)
    rename = (("1", "token"), ("2", "tag")) if name == "conll" else ()
    return DataConfig(format=name, path=str(place), eval_fraction=0.3, rename=rename, **more)


def loaded(cfg: DataConfig) -> tuple[registry.Split, bytes]:
    """The records, and all that they hold but their places, as bytes: compared without a hash of ours."""
    images = Wanted("image_classification", "class", ("cat", "dog"), (8, 8, 3))
    split = registry.load(cfg, images if cfg.format == "images" else Wanted())
    halves = (split.train, split.valid, split.test)
    plain = [[{k: v for k, v in one.items() if k not in ("source", "identity")} for one in half] for half in halves]
    text = json.dumps(plain, default=lambda array: [array.shape, array.tolist()])
    return split, text.encode()


@pytest.mark.parametrize("name", [*WRITERS, *FILES, "parallel", "images"])
def test_a_flipped_bit_is_refused_or_read_as_the_same_or_changes_the_fingerprint(name, tmp_path, tfds_dir):
    cfg = prepare(name, tmp_path / "set")
    split, whole = loaded(cfg)
    root = tfds_dir if name == "tfds" else tmp_path / "set"
    data = {"parquet": ".parquet", "arrow": ".arrow", "array_record": ".array_record"}.get(name, "")
    files = sorted(path for path in root.rglob("*") if path.is_file() and (data in path.name or name == "tfds"))
    rng = random.Random(0)
    found = {"refused": 0, "the same": 0, "other records": 0}
    for _ in range(FLIPS):
        file = rng.choice(files)
        content = file.read_bytes()
        at = rng.choice([i for i, byte in enumerate(content) if byte])  # ArrayRecord files are mostly zeros
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
        try:
            again, now = loaded(cfg)
        except DataError:
            found["refused"] += 1
            continue
        finally:
            file.write_bytes(content)
        assert (again.fingerprint == split.fingerprint) == (now == whole)
        found["the same" if now == whole else "other records"] += 1
    has_checksums = name in ("array_record", "tfds")
    assert has_checksums or found["other records"] > 0, found
    assert loaded(cfg)[0].fingerprint == split.fingerprint


def test_a_run_does_not_resume_on_an_arrow_file_with_a_flipped_bit(tmp_path):
    cfg = Config(data=prepare("arrow", tmp_path / "set"), task=toys.task("causal_lm"))
    data = input_pipeline.build(cfg, TOK, *input_pipeline.load(cfg.data))
    saved = SimpleNamespace(path=tmp_path / "run" / "checkpoints" / "3", info={"data": resume.data_info(data, 9, {})})
    resume.check_data(saved, data, False, print)
    file = tmp_path / "set" / "data-00000-of-00002.arrow"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"says", b"sayr", 1))
    changed = input_pipeline.build(cfg, TOK, *input_pipeline.load(cfg.data))
    with pytest.raises(CheckpointError, match=r"(?s)checkpoints/3 was trained on other data .*  content: \w+ -> \w+\n"):
        resume.check_data(saved, changed, False, print)
