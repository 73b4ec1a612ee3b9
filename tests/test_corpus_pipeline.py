"""lm/corpus/pipeline.py: shards hold what plain Python keeps, with every runner and however often the job is killed."""

import collections
import dataclasses
import gzip
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from lm import config, input_pipeline, lease
from lm.config.schema import ConfigError
from lm.corpus import pipeline, workers
from lm.data import packing as rows_of
from lm.data import shards, splits, tokenizer
from lm.tasks import TASKS
from tests import toys

ROOT = Path(__file__).resolve().parents[1]
SHARD_BYTES = 20_000


def recipe(path, task="causal_lm", **data):
    made = config.Config(task=toys.task(task))
    settings = {"format": "jsonl", "path": str(path), "seq_len": 64, "packing": "concat", "eval_fraction": 0.1} | data
    return dataclasses.replace(
        made,
        data=dataclasses.replace(made.data, **settings),
        tokenizer=dataclasses.replace(made.tokenizer, vocab_size=400, train_bytes=20_000),
    )


def run(cfg, out, runner=workers.in_process, **options):
    return pipeline.run(pipeline.plan(cfg, out, **{"shard_bytes": SHARD_BYTES, **options}), runner, lambda *_: None)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def removed(folder):
    return [json.loads(line) for line in (folder / "removed.jsonl").read_text().splitlines()]


def documents_in(folder, part):
    """The texts in the shards of a part, in order."""
    words, opened = tokenizer.load(folder / "tokenizer.model"), shards.open_folder(str(folder)).table(part)
    rows = opened.take(np.arange(len(opened)))
    ids, texts = [], []
    for tokens, targets, segments in zip(*(rows[k].ravel() for k in ("tokens", "targets", "segment_ids")), strict=True):
        if segments:
            ids.append(int(tokens))
            if targets == words.eos_id:
                texts.append(words.decode(ids))
                ids = []
    assert not ids
    return texts


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of raw files, an evaluation file, and the expected reason to drop each text ('' = kept)."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)

    def words(count):
        return [
            f"{'bcdfgh'[k % 6]}{'aeiou'[k // 6 % 5]}{'lmnrst'[k // 30 % 6]}{k}" for k in rng.integers(0, 5000, count)
        ]

    originals = [words(rng.integers(60, 150)) for _ in range(150)]
    questions = [words(20) for _ in range(8)]
    lines, expected = [], {}

    def add(text, reason, written=None):
        lines.append({"text": written or text, "label": len(lines)})
        expected.setdefault(text, reason)

    for i, original in enumerate(originals):
        add(" ".join(original), "", written="  " + " ".join(original) + "\r\n\n")
        if i % 5 == 0:
            add(" ".join(original), "exact_duplicate")
        if i % 6 == 0:
            changed = list(original)
            changed[len(original) // 2] = f"other{i}"  # 5 of at least 56 runs differ: similarity above .83
            add(" ".join(changed), "near_duplicate")
        if i % 20 == 3:
            add(" ".join(words(40) + questions[i // 20] + words(40)), "contaminated")
        if i % 10 == 4:
            add(" ".join(words(49)), "words")
    (folder / "raw").mkdir()
    thirds = [lines[: len(lines) // 3], lines[len(lines) // 3 : -9], lines[-9:]]
    for name, part in zip(("a.jsonl", "b.jsonl", "c.jsonl.gz"), thirds, strict=True):
        content = "\n".join(map(json.dumps, part)).encode()
        (folder / "raw" / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith("gz") else content)
    (folder / "questions.txt").write_text("\n".join(map(" ".join, questions)))
    return folder, expected, len(lines)


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    folder, _, _ = corpus
    out = tmp_path_factory.mktemp("prepared") / "out"
    index = run(recipe(folder / "raw"), out, evaluation=[str(folder / "questions.txt")], filters=["words"])
    return out, index


def test_shards_hold_the_documents_that_should_be_kept(corpus, prepared):
    _, expected, _ = corpus
    out, index = prepared
    found = {part: documents_in(out, part) for part in ("train", "valid")}
    kept = [text for text, reason in expected.items() if not reason]
    assert sorted(found["train"] + found["valid"]) == sorted(kept)
    # The same documents are held out as a run that reads the raw text holds out.
    _, valid = splits.hold_out([{"text": text, "source": ""} for text in kept], 0.1)
    assert sorted(found["valid"]) == sorted(record["text"] for record in valid)
    # A shard is a range of hashes, and sorted.
    digests = [hashlib.sha256(json.dumps({"text": text}).encode()).digest() for text in found["train"]]
    assert digests == sorted(digests)
    assert len(index["parts"]["train"]) > 2
    assert all(entry["documents"] > 5 for entry in index["parts"]["train"])


def test_dropped_documents_are_counted_and_listed(corpus, prepared):
    folder, expected, count = corpus
    out, index = prepared
    found, lines = index["statistics"], removed(out)
    gone = collections.Counter(line["why"] for line in lines)
    wanted = collections.Counter(reason for reason in expected.values() if reason)
    wanted["exact_duplicate"] = 150 // 5  # the texts themselves are kept, as originals
    assert gone == wanted == {why: documents for why, (documents, _) in found["dropped"].items()}
    kept = sum(part["documents"] for part in found["kept"].values())
    assert found["records"] == found["documents"] == count == kept + sum(gone.values())
    at = {line["source"]: line for line in lines}
    texts = {}
    for path in sorted((folder / "raw").iterdir()):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for number, line in enumerate(content.splitlines(), 1):
            texts[f"{path}:{number}"] = json.loads(line)["text"].strip()
    for place, line in at.items():
        assert expected[texts[place]] == line["why"] or line["why"] == "exact_duplicate"
        if line["why"] == "exact_duplicate":
            assert texts[line["of"]] == texts[place]
        if line["why"] == "near_duplicate":
            assert line["of"] not in at and len(set(texts[line["of"]].split()) ^ set(texts[place].split())) <= 2
        if line["why"] == "contaminated":
            assert line["ngrams"] == {str(folder / "questions.txt"): 20 - 13 + 1}


def test_the_folder_has_a_data_card(prepared):
    out, index = prepared
    assert set(contents(out)) == {"README.md", "index.json", "lengths.png", "removed.jsonl", "tokenizer.model"} | {
        f"{entry['name']}.npy" for part in index["parts"].values() for entry in part
    }
    card = (out / "README.md").read_text()
    assert "| near_duplicate: similar to an earlier document | -25 |" in card and "questions.txt" in card
    found = index["statistics"]
    assert sum(found["lengths"]) == sum(part["documents"] for part in found["kept"].values())
    tokens = found["kept"]["train"]["tokens"]
    table = shards.open_folder(str(out)).table("train")
    assert tokens == np.count_nonzero(table.take(np.arange(len(table)))["segment_ids"])


def interrupted(after):
    """A runner that is interrupted, as by a kill, after `after` units."""
    left = iter(range(after))

    def runner(work, units):
        for unit in units:
            if next(left, None) is None:
                raise KeyboardInterrupt
            yield from workers.in_process(work, [unit])

    return runner


def test_a_job_interrupted_anywhere_resumes_to_the_same_bytes(corpus, prepared, tmp_path):
    folder, _, _ = corpus
    options = {"evaluation": [str(folder / "questions.txt")], "filters": ["words"]}
    planned = pipeline.plan(recipe(folder / "raw"), tmp_path / "out", shard_bytes=SHARD_BYTES, **options)
    (tmp_path / "out" / ".work.1.tmp").mkdir(parents=True)  # killed while the folder was made
    starts = 0
    while not (tmp_path / "out" / "index.json").exists():
        assert (starts := starts + 1) < 100
        for scratch in (tmp_path / "out").rglob("work/read"):
            (scratch / ".00000000-00000000.1.tmp").mkdir(exist_ok=True)  # what a kill leaves
        try:
            pipeline.run(planned, interrupted(after=2), lambda *_: None)
        except KeyboardInterrupt:
            continue
    assert starts > 10
    assert contents(tmp_path / "out") == contents(prepared[0])


def test_a_folder_that_another_process_prepares_is_refused_and_nothing_in_it_is_deleted(corpus, tmp_path):
    cfg, out = recipe(corpus[0] / "raw"), tmp_path / "out"
    (out / ".work.1.tmp").mkdir(parents=True)  # which the other is just writing
    with lease.hold(out), pytest.raises(lease.Held, match=f"{out} is in use by process {os.getpid()} on "):
        run(cfg, out)
    assert [path.name for path in out.iterdir()] == [".work.1.tmp"]
    with pytest.raises(KeyboardInterrupt):
        run(cfg, out, interrupted(after=2))
    before = contents(out)
    with lease.hold(out), pytest.raises(lease.Held):
        run(cfg, out)
    assert contents(out) == before and "work/info.json" in before


def test_a_job_whose_folder_is_taken_over_stops_before_it_finishes(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_FRESH_SECONDS", -1)  # look each time
    out = tmp_path / "out"

    def displaced(work, units):
        for unit in units:
            (out / "lease.1").write_text("another's")
            yield from workers.in_process(work, [unit])

    with pytest.raises(lease.Lost, match="no longer owns"):
        run(recipe(corpus[0] / "raw"), out, displaced)
    assert not (out / "index.json").exists() and (out / "lease.1").read_text() == "another's"


def test_several_workers_that_are_killed_resume_to_the_same_bytes(corpus, prepared, tmp_path):
    """The tool is killed while all its processes are busy, then run again."""
    folder, _, _ = corpus
    script = tmp_path / "recipe.py"
    cfg = recipe(folder / "raw")
    lines = [
        f"    c.data.{key} = {getattr(cfg.data, key)!r}"
        for key in ("format", "path", "seq_len", "packing", "eval_fraction")
    ]
    lines += [f"    c.tokenizer.{key} = {getattr(cfg.tokenizer, key)!r}" for key in ("vocab_size", "train_bytes")]
    body = "\n".join(
        [
            "from lm.tasks import default_config",
            "def get_config():",
            "    c = default_config()",
            "    c.train.total_epochs = 1.0",
            *lines,
            "    return c",
        ]
    )
    script.write_text(body + "\n")
    out = tmp_path / "out"
    arguments = [f"--config={script}", f"--out={out}", "--workers=2", "--filters=words"]
    arguments += [f"--evaluation={folder / 'questions.txt'}", f"--shard_megabytes={SHARD_BYTES / 2**20}"]
    command = [sys.executable, "tools/prepare_data.py", *arguments]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **options, start_new_session=True)
    while process.poll() is None and not list(out.glob("work/measure/0*")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "index.json").exists()
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(prepared[0])


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason="Apache Beam is not installed: .[beam]")
def test_beam_gives_the_same_bytes(corpus, prepared, tmp_path):
    folder, _, _ = corpus
    with workers.beam("DirectRunner", []) as runner:
        run(
            recipe(folder / "raw"),
            tmp_path / "out",
            runner,
            evaluation=[str(folder / "questions.txt")],
            filters=["words"],
        )
    assert contents(tmp_path / "out") == contents(prepared[0])


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is not None, reason="Apache Beam is installed")
def test_a_missing_beam_is_an_error_that_names_the_extra():
    with (
        pytest.raises(ConfigError, match=r"--runner=DirectRunner needs Apache Beam: pip install -e '\.\[beam\]'"),
        workers.beam("DirectRunner", []),
    ):
        pass


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_shards_do_not_depend_on_how_documents_are_split_into_files(corpus, prepared, tmp_path, form):
    """The same records in one file."""
    folder, _, _ = corpus
    whole = b"\n".join(
        gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes()
        for p in sorted((folder / "raw").iterdir())
    )
    if form == "parquet":
        table = pyarrow.table({"text": [json.loads(line)["text"] for line in whole.splitlines()]})
        pyarrow.parquet.write_table(table, tmp_path / "all.parquet", row_group_size=100)
    else:
        (tmp_path / "all.jsonl").write_bytes(whole)
    run(
        recipe(tmp_path / f"all.{form}", format=form),
        tmp_path / "out",
        evaluation=[str(folder / "questions.txt")],
        filters=["words"],
    )
    found, expected = contents(tmp_path / "out"), contents(prepared[0])
    assert {name for name in found if name.endswith(".npy")} == {name for name in expected if name.endswith(".npy")}
    assert all(found[name] == expected[name] for name in found if name.endswith((".npy", ".model")))


def test_small_files_are_grouped_and_all_are_read(corpus, tmp_path):
    _, expected, _ = corpus
    kept = [text for text, reason in expected.items() if not reason][:60]
    (tmp_path / "raw").mkdir()
    for i in range(20):
        lines = (json.dumps({"text": text}) for text in kept[i::20])
        (tmp_path / "raw" / f"{i:02}.jsonl").write_text("\n".join(lines))
    (tmp_path / "raw" / "00-empty.jsonl").write_text("")  # the first one
    cfg = recipe(tmp_path / "raw", max_bad_records=1)
    planned = pipeline.plan(cfg, tmp_path / "out", shard_bytes=SHARD_BYTES)
    sizes = [sum(file.stat().length for file in group) for _, group in planned.groups]
    assert 1 < len(planned.groups) < 20 and max(sizes) <= SHARD_BYTES // 2
    index = pipeline.run(planned, workers.in_process, lambda *_: None)
    assert index["statistics"]["faults"] == {"empty file": 1}
    found = documents_in(tmp_path / "out", "train") + documents_in(tmp_path / "out", "valid")
    assert sorted(found) == sorted(kept)


def test_a_text_of_both_parts_is_held_out(corpus, tmp_path):
    _, expected, _ = corpus
    kept = [text for text, reason in expected.items() if not reason]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in kept))
    (tmp_path / "valid.jsonl").write_text("\n".join(json.dumps({"text": text + " more"}) for text in kept[:20]))
    cfg = recipe(tmp_path / "train.jsonl", eval_path=str(tmp_path / "valid.jsonl"))
    run(cfg, tmp_path / "out")
    assert sorted(documents_in(tmp_path / "out", "valid")) == sorted(text + " more" for text in kept[:20])
    assert sorted(documents_in(tmp_path / "out", "train")) == sorted(kept[20:])


@pytest.mark.parametrize(
    ("task", "packing"),
    [("causal_lm", "pad"), ("causal_lm", "concat"), ("masked_lm", "best_fit"), ("span_corruption", "pad")],
)
def test_rows_equal_those_of_a_run_that_reads_raw_text(corpus, tmp_path, task, packing):
    folder, _, _ = corpus
    cfg = recipe(folder / "raw" / "c.jsonl.gz", task=task, packing=packing, seq_len=32, eval_fraction=0.3)
    run(cfg, tmp_path / "out", near=0, shard_bytes=1 << 20)
    opened = shards.open_folder(str(tmp_path / "out"))
    for part in ("train", "valid"):
        texts = [d["text"] for d in sorted_documents(folder / "raw" / "c.jsonl.gz", part, 0.3)]
        made = input_pipeline.make_examples(
            TASKS[task],
            [{"text": text, "source": ""} for text in texts],
            tokenizer.load(tmp_path / "out" / "tokenizer.model"),
            cfg,
            collections.Counter(),
        )
        rows, _ = rows_of.pack(made, TASKS[task].columns(cfg), cfg.data)
        found = opened.table(part).take(np.arange(len(opened.table(part))))
        assert found.keys() == rows.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, rows[name])


def sorted_documents(path, part, fraction):
    texts = dict.fromkeys(json.loads(line)["text"].strip() for line in gzip.decompress(path.read_bytes()).splitlines())
    digests = sorted((hashlib.sha256(json.dumps({"text": text}).encode()).digest(), text) for text in texts)
    return [{"text": t} for d, t in digests if (int.from_bytes(d[:8]) < fraction * 2**64) == (part == "valid")]


def test_other_settings_are_refused_and_the_difference_is_listed(corpus, prepared):
    folder, _, _ = corpus
    options = {"evaluation": [str(folder / "questions.txt")], "filters": ["words"]}
    before = contents(prepared[0])
    with pytest.raises(ConfigError, match=r"(?s)other settings.*\n  data\.seq_len: 64 in the folder, 32 now"):
        run(recipe(folder / "raw", seq_len=32), prepared[0], **options)
    with pytest.raises(ConfigError, match=r"  prepare\.near: 0\.75 in the folder, 0\.5 now"):
        run(recipe(folder / "raw"), prepared[0], near=0.5, **options)
    assert run(recipe(folder / "raw"), prepared[0], **options) == json.loads((prepared[0] / "index.json").read_text())
    assert contents(prepared[0]) == before
