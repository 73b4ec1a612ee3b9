"""A small copy of the shared data, for runs that shall see the real files and take no time."""

import gzip
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

from tests import small_sets

RECORDS = 64  # of a file; evenly spaced, for some are sorted by label


def spread(items: list, count: int = RECORDS) -> list:
    """`count` of the items, evenly spaced, the first one among them."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else items


def _lines(text: str) -> str:
    first, *rest = text.rstrip("\n").split("\n")  # the first one may be a header
    return "".join(f"{line}\n" for line in (first, *spread(rest)))


def _blocks(text: str) -> str:
    return "".join(f"{block}\n\n" for block in spread(re.split(r"\n[ \t]*\n+", text.strip())))


def _stories(text: str) -> str:
    return "<|endoftext|>".join(spread(text.split("<|endoftext|>")))


def _abstracts(text: str) -> str:
    return json.dumps(dict(spread(list(json.loads(text).items()))))


def _questions(text: str) -> str:
    content = json.loads(text)
    for article in content["data"]:
        article["paragraphs"] = article["paragraphs"][:1]
        article["paragraphs"][0]["qas"] = article["paragraphs"][0]["qas"][:2]
    return json.dumps(content)


# A file of the shared data -> what keeps a part of its text; a tar keeps some members.
FILES: dict[str, Callable[[str], str]] = {
    **{f"imdb/imdb_{part}.jsonl.gz": _lines for part in ("train", "test")},
    **{f"gsm8k/{part}.jsonl": _lines for part in ("train", "test")},
    **{f"{name}/{part}.tsv": _lines for name in ("sst2", "cola", "rte") for part in ("train", "dev")},
    **{f"stsb/stsb-en-{part}.csv": _lines for part in ("train", "dev", "test")},
    **{f"multi30k/{part}.{side}.gz": _lines for part in ("train", "val", "test_2016_flickr") for side in ("en", "de")},
    **{f"bc5cdr/{part}.tsv": _blocks for part in ("train", "devel")},
    "ud_ewt/en_ewt-ud-train_from_source_docs.conllu.gz": _blocks,
    "ud_ewt/en_ewt-ud-dev.conllu": _blocks,
    "tinystories/sample.txt": _stories,
    "pubmedqa/ori_pqal.json": _abstracts,
    "xquad/xquad.en.json": _questions,
    "instr_rasbt/instruction-data-with-preference.json": lambda text: json.dumps(spread(json.loads(text))),
}
WIKIPEDIA = "wikitext2/test.txt"
TARS = tuple(f"cifar10/cifar10_jpg_{part}.tar" for part in ("train_500perclass", "test_100perclass"))


def write(shared: Path, folder: Path) -> None:
    """Copies a part of each file that a recipe reads from `shared` to the same place in `folder`."""
    for name, keep in FILES.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        content, is_packed = (shared / name).read_bytes(), name.endswith(".gz")
        text = keep((gzip.decompress(content) if is_packed else content).decode())
        place.write_bytes(gzip.compress(text.encode(), 1) if is_packed else text.encode())
    for name in TARS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(shared / name) as whole, tarfile.open(folder / name, "w") as part:
            for member in spread([member for member in whole if member.isfile()]):
                part.addfile(member, whole.extractfile(member))


def write_sets(shared: Path, folder: Path) -> None:
    """TFDS sets of the names and features of the real ones, of a part of the shared data."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    articles = re.split(r"\n (?== [^=]+ = \n)", (shared / WIKIPEDIA).read_text())[1:]
    pages = [{"title": article.split(" = ")[0].strip("= "), "text": article[:2000]} for article in spread(articles)]
    small_sets.write_tfds(folder, "wikipedia/20230601.en", {"title": text, "text": text}, {"train": pages})
    splits = {"unsupervised": [{"text": "a film", "label": -1}]}
    for part in ("train", "test"):
        with gzip.open(shared / f"imdb/imdb_{part}.jsonl.gz", "rt", encoding="utf-8") as file:
            reviews = [json.loads(line) for line in spread(list(file))]
        splits[part] = [{"text": review["text"], "label": review["label"]} for review in reviews]
    features = {"text": text, "label": tfds.features.ClassLabel(names=["neg", "pos"])}
    small_sets.write_tfds(folder, "imdb_reviews/plain_text", features, splits)
