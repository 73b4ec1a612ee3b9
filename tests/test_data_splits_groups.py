"""Identity of records, groups that no split tears apart, splits told by names, and data that cannot teach its task."""

import io
import json
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lm import input_pipeline
from lm.config import DataConfig
from lm.data import splits, tokenizer
from lm.data.readers import paths, registry
from lm.data.record import DataError, Wanted
from lm.tasks import task_of
from tests import toys
from tests.test_data_readers_text import write

STORIES = [[f"Tale {n} begins here. ", f"Then number {n} goes on! ", f"And {n} ends."] for n in range(60)]


@given(st.lists(st.sampled_from("abc"), max_size=12), st.randoms())
def test_identities_are_unique_and_those_of_different_records_do_not_depend_on_order_or_place(texts, random):
    records = [{"text": text, "source": "one:1"} for text in texts]
    splits.identify(records)
    assert len({record["identity"] for record in records}) == len(records)
    again = [{"text": text, "source": f"other:{n}"} for n, text in enumerate(texts)]
    random.shuffle(again)
    splits.identify(again)
    assert {r["identity"] for r in again} == {r["identity"] for r in records}
    firsts = {r["text"]: r["identity"] for r in records[::-1]}
    assert {r["text"]: r["identity"] for r in again[::-1]} == firsts


@pytest.fixture(scope="module")
def words():
    trained = tokenizer.train([text for story in STORIES for text in story], 300, 10_000)
    return tokenizer.SentencePiece(trained.model, extra_ids=1)


def pairs_config(path, **changes):
    base = {"task__name": "masked_lm_pairs", "model__kind": "encoder", "data__packing": "pad"}
    base |= {"tokenizer__extra_ids": 1, "data__format": "jsonl", "data__path": str(path), "data__seq_len": 64}
    return toys.recipe(path.parent, **base | changes)


@pytest.mark.parametrize("indent", [None, 1])
def test_documents_of_one_line_are_told_apart(tmp_path, words, indent):
    """Half of the next-sentence pairs are wrong ones, however the file is laid out."""
    path = tmp_path / "all.json"
    path.write_text(json.dumps([{"text": "".join(story)} for story in STORIES], indent=indent))
    cfg = pairs_config(path)
    part = input_pipeline.build(cfg, words, registry.load(cfg.data)).train
    rows = part.rows
    labels = []
    for number in range(200):
        row = {key: column[number % len(part)] for key, column in rows.items()}
        labels.append(part.finish(row, np.random.default_rng(number))["labels"])
    assert 0.35 < np.mean(labels) < 0.6


def test_texts_split_within_a_line_are_documents_of_their_own(tmp_path, words):
    path = write(tmp_path / "a.txt", "<|end|>".join("".join(story) for story in STORIES).encode())
    cfg = pairs_config(path, data__format="text", data__separator="<|end|>")
    data = input_pipeline.build(cfg, words, registry.load(cfg.data))
    assert len(np.unique(data.train.rows["document"])) == data.report["train"]["documents"] > 40


def labelled_config(path, **changes):
    base = {"task__name": "classification", "model__kind": "encoder", "data__packing": "pad"}
    return toys.recipe(path.parent, **base | {"data__format": "jsonl", "data__path": str(path)} | changes)


@pytest.mark.parametrize(
    ("records", "changes", "says"),
    [
        (
            [{"text": "One text. Of two."}] * 9 + [{"text": "Held out. Or not."}],
            "pairs",
            "all rows are of one document",
        ),
        ([{"text": f"text {n}", "label": "a"} for n in range(20)], {"task__labels": ("a", "b")}, "have the label 'a'"),
        (
            [{"text": f"text {n}", "label": 2.5} for n in range(20)],
            {"task__name": "regression"},
            "have the label 2.5",
        ),
        (
            [{"text": f"text {n}", "text_pair": f"text {n}"} for n in range(20)],
            {"task__name": "contrastive_pairs"},
            "'text' and 'text_pair' are equal in every row",
        ),
        (
            [{"text": "same", "text_pair": f"text {n}"} for n in range(20)] + [{"text": "x", "text_pair": "y"}],
            {"task__name": "contrastive_pairs"},
            "all rows have the same sentence",
        ),
        (
            [{"text": f"text {n}", "label": "t/a"} for n in range(20)],
            {"task__name": "multitask", "task__labels": ("t/a", "t/b")},
            "all .* rows of task 't' have one label",
        ),
        (
            [{"words": [f"w{n}", "goes"], "tags": ["O", "O"]} for n in range(20)],
            {"task__name": "tagging", "task__labels": ("O", "B-X", "I-X")},
            "all words have the tag 'O'",
        ),
        (
            [{"question": f"q{n}", "context": f"c{n}", "answers": []} for n in range(20)],
            {"task__name": "span_qa", "data__seq_len": 32},
            "no window holds an answer",
        ),
    ],
)
def test_data_that_cannot_teach_its_task_is_refused(tmp_path, words, records, changes, says):
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)).encode())
    cfg = pairs_config(path) if changes == "pairs" else labelled_config(path, **changes)
    split = registry.load(cfg.data, task_of(cfg).wanted(cfg))
    if changes == "pairs":
        split.train = [record for record in split.train + split.valid if "One text" in record["text"]]
    if "same sentence" in says:
        split.train = [record for record in split.train + split.valid if record["text"] == "same"]
    with pytest.raises(DataError, match=f"the train data cannot teach task.name=.*: .*{says}"):
        input_pipeline.build(cfg, words, split)


def test_options_that_only_scoring_reads_leave_the_data_what_it_is(tmp_path, words):
    """A resumed run may change them, see `lm.config.schema.scoring_only`."""
    records = [{"words": [f"w{n}", "goes"], "tags": ["B-X", "O"]} for n in range(20)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)).encode())
    prints = []
    for changes in ({}, {"task__entity_scheme": "none"}, {"task__labels": ("O", "I-X", "B-X")}):
        cfg = labelled_config(path, **{"task__name": "tagging", "task__labels": ("O", "B-X", "I-X")} | changes)
        prints.append(input_pipeline.build(cfg, words, registry.load(cfg.data, task_of(cfg).wanted(cfg))).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_held_out_data_of_one_label_is_counted(tmp_path, words):
    records = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(40)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)).encode())
    cfg = labelled_config(path, task__labels=("a", "b"))
    split = registry.load(cfg.data, task_of(cfg).wanted(cfg))
    split.valid = [record for record in split.train if record["label"] == "a"][:5]
    report = input_pipeline.build(cfg, words, split).report
    assert report["valid"]["nothing_to_tell_apart"] == 5
    assert "nothing_to_tell_apart" not in report["train"]


# Groups ---------------------------------------------------------------------------------------------------------------


def held(tmp_path, records, **options):
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)).encode())
    return registry.load(DataConfig(format="jsonl", path=str(path), eval_fraction=0.3, **options))


def answer(text):
    return [{"text": text, "answer_start": 0}]


@pytest.mark.parametrize(
    ("records", "key", "kind"),
    [
        (
            [{"question": f"q{n}", "context": f"c{n % 20}", "answers": answer("c")} for n in range(200)],
            lambda record: record["context"],
            "context",
        ),
        ([{"text": f"t{n % 20}", "label": n // 20} for n in range(60)], lambda record: record["text"], "text"),
        ([{"text": f"t{n % 20}", "text_pair": f"p{n}"} for n in range(60)], lambda record: record["text"], "text"),
        ([{"words": [f"w{n % 20}"], "tags": [f"T{n}"]} for n in range(60)], lambda r: r["words"][0], "sentence"),
        (
            [{"prompt": f"p{n % 20}", "response": f"r{n}"} for n in range(60)],
            lambda record: record["messages"][0]["content"],
            "prompt",
        ),
        ([{"text": f"t{n}", "group": n % 20} for n in range(60)], lambda record: record["group"], "group"),
    ],
)
def test_records_of_one_group_are_on_one_side_of_the_split(tmp_path, records, key, kind):
    split = held(tmp_path, records)
    train, valid = (set(map(key, part)) for part in (split.train, split.valid))
    assert not train & valid and len(train) + len(valid) == 20
    assert f"split by {kind}: {len(train)} distinct to train on, {len(valid)} held out" in split.report


def test_a_user_of_several_texts_can_be_the_group(tmp_path):
    records = [{"text": f"t{n}", "author": f"a{n % 9}"} for n in range(90)]
    split = held(tmp_path, records, rename=(("author", "group"),))
    assert not {r["group"] for r in split.train} & {r["group"] for r in split.valid}


def test_the_group_of_a_plain_text_is_its_content():
    """By which prepared data is split too, so that both hold the same documents out."""
    assert splits.group({"text": "a", "source": "x"}) == splits.digest({"text": "a"})


def test_held_out_files_that_share_texts_with_training_are_reported(tmp_path):
    train = write(tmp_path / "one.jsonl", b"\n".join(b'{"text": "t%d", "label": "a"}' % n for n in range(9)))
    valid = write(tmp_path / "two.jsonl", b"\n".join(b'{"text": "t%d", "label": "b"}' % n for n in range(7, 12)))
    split = registry.load(DataConfig(format="jsonl", path=str(train), eval_path=str(valid)))
    assert "warning: 2 of 5 held-out records share their text with training" in split.report


# Splits by name -------------------------------------------------------------------------------------------------------


def by_split(root, names):
    for name in names:
        write(root / name, b"x")
    found = paths.find_files(str(root), (".txt",))
    return {key: [str(p.relative_to(root)) for p in part] for key, part in paths.by_split(root, found).items()}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.txt", "b/c.txt"], {"": 2}),
        (["train.txt", "test.txt"], {"train": 1, "test": 1}),
        (["train/cat/1.txt", "val/cat/1.txt", "val/test/1.txt"], {"train": 1, "validation": 2}),
        (["Train/1.txt", "Valid/1.txt", "TEST/1.txt"], {"train": 1, "validation": 1, "test": 1}),
        (["train2017/1.txt", "val2017/1.txt"], {"train": 1, "validation": 1}),
        (["cifar_train_5.txt", "cifar_test_1.txt"], {"train": 1, "test": 1}),
        (["en_ewt-ud-train.txt", "en_ewt-ud-dev.txt"], {"train": 1, "validation": 1}),
        (["train-00000-of-00002.txt", "train-00001-of-00002.txt", "unsupervised-00000-of-00001.txt"], None),
        (["train/1.txt", "bus/1.txt"], {"": 2}),  # a class called train
        (["valid.txt", "test.txt"], {"validation": 1, "test": 1}),
        (["test/1.txt", "test/2.txt"], {"": 2}),  # all of one split: what the user asked for
        (["training_set/cat/1.txt", "test_set/cat/2.txt"], {"train": 1, "test": 1}),
        (["train/1.txt", "val_images/1.txt", "held_out/1.txt"], {"train": 1, "validation": 2}),
        (["train.txt", "held-out.txt"], {"train": 1, "validation": 1}),
        (["eng.train.txt", "eng.testa.txt", "eng.testb.txt"], {"train": 1, "validation": 1, "test": 1}),
        (["wnut17train.txt", "emerging.dev.txt"], {"train": 1, "validation": 1}),
        (["trainData.txt", "testData.txt"], {"train": 1, "test": 1}),
        (["wiki.valid.txt", "wiki.test.txt"], {"validation": 1, "test": 1}),
        (["how_to_test.txt", "unit-tests.txt", "development.txt"], {"": 3}),
        (["books-00000-of-00001.txt", "web-00000-of-00001.txt"], {"": 2}),
    ],
)
def test_the_usual_names_of_splits_are_recognised(tmp_path, names, expected):
    found = by_split(tmp_path, names)
    expected = expected or {"train": 2, "unsupervised": 1}
    assert {key: len(part) for key, part in found.items()} == expected


@pytest.mark.parametrize("names", [["data.txt", "test.txt"], ["train/a.txt", "val/a.txt", "more.txt"]])
def test_files_of_a_split_beside_others_are_refused(tmp_path, names):
    with pytest.raises(DataError, match=r"holds files of the split .* beside others, such as .*by a glob"):
        by_split(tmp_path, names)


def test_a_table_whose_name_has_a_split_among_its_words_is_not_trained_on(tmp_path):
    for name in ("reviews.csv", "reviews_val.csv", "reviews_test.csv"):
        write(tmp_path / name, b"text,label\na,b\nc,d\n")
    with pytest.raises(DataError, match=r"holds files of the split 'test', 'validation' beside others, .*reviews\.csv"):
        registry.load(DataConfig(format="table", path=str(tmp_path)))


def test_one_file_under_two_names_is_not_on_both_sides(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "d" / f"{name}.jsonl", b"\n".join(b'{"text": "%s%d"}' % (name.encode(), n) for n in range(4)))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "d" / "b.jsonl")
    for other in (f"{tmp_path}/d/../d/b.jsonl", f"{tmp_path}/link.jsonl"):
        with pytest.raises(DataError, match=r"b\.jsonl: named by both"):
            registry.load(DataConfig(format="jsonl", path=f"{tmp_path}/d", eval_path=other))


def test_a_tar_of_several_splits_is_refused(tmp_path):
    pixels = io.BytesIO()
    Image.new("RGB", (8, 8)).save(pixels, "png")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for name in ("train/cat/1.png", "train/dog/2.png", "val/cat/3.png"):
            member = tarfile.TarInfo(name)
            member.size = len(pixels.getvalue())
            tar.addfile(member, io.BytesIO(pixels.getvalue()))
    with pytest.raises(DataError, match=r"images\.tar: holds the splits 'train', 'validation' in one \.tar"):
        registry.load(DataConfig(format="images", path=f"{tmp_path}/images.tar"), Wanted(image_shape=(8, 8, 3)))


def test_a_folder_of_splits_is_trained_on_train_and_evaluated_on_validation(tmp_path):
    for name in ("train", "dev", "test"):
        write(tmp_path / f"{name}.jsonl", b"\n".join(b'{"text": "%s %d"}' % (name.encode(), n) for n in range(4)))
    split = registry.load(DataConfig(format="jsonl", path=str(tmp_path)))
    assert {r["text"].split()[0] for r in split.train} == {"train"}
    assert {r["text"].split()[0] for r in split.valid} == {"dev"}
    assert "'train' is trained on, 'validation' is held out" in split.report and "not read: 'test'" in split.report
    (tmp_path / "dev.jsonl").unlink()
    split = registry.load(DataConfig(format="jsonl", path=str(tmp_path), eval_fraction=0.5))
    assert {r["text"].split()[0] for r in split.train + split.valid} == {"train"}
    split = registry.load(DataConfig(format="jsonl", path=str(tmp_path), eval_path=str(tmp_path / "test.jsonl")))
    assert {r["text"].split()[0] for r in split.valid} == {"test"}
    (tmp_path / "train.jsonl").rename(tmp_path / "valid.jsonl")
    with pytest.raises(DataError, match="holds 'test', 'validation' and no 'train'"):
        registry.load(DataConfig(format="jsonl", path=str(tmp_path)))
