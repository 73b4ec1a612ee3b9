"""lm/corpus/pipeline.py: damaged data, data that changes while it is read, and settings that cannot be prepared."""

import hashlib
import json

import numpy as np
import pytest

from lm.config.schema import ConfigError
from lm.corpus import stages, workers
from lm.data.record import DataError
from tests.test_corpus_pipeline import contents, interrupted, recipe, removed, run


def fuzzed(rng, good):
    """1,000 lines of JSON, most of them damaged."""
    lines = []
    for i in range(1000):
        line = json.dumps({"text": good[i % len(good)] + f" line {i} é日"}, ensure_ascii=False).encode()
        kind = i % 12
        cut = int(rng.integers(1, len(line)))
        values = (
            "null",
            "3",
            "[]",
            '{"text": 3}',
            '{"text": null}',
            '{"text": ""}',
            '{"text": "\\ud800"}',
            "{}",
            "NaN",
        )
        damaged = {
            1: line[:cut],
            2: line[:-3],  # in the middle of a character
            3: line.replace(b"line", b"\0"),
            4: line.replace(b"line", b"\xff\xfe"),
            5: values[i // 12 % len(values)].encode(),
            6: b"[" * 100_000 if i < 100 else b"{" * cut,
            7: json.dumps({"text": "x" * 200_000}).encode() if i < 100 else b'{"text": "' + b"\\u0000" + b'"}',
            8: bytes(rng.integers(0, 256, cut).astype(np.uint8)).replace(b"\n", b""),
            9: json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode(),
            10: b'{"text": "' + b"9" * cut + b'", "n": ' + b"9" * 5000 + b"}",
            11: json.dumps({"text": "\u3000\u3000"}).encode(),
        }
        lines.append(damaged.get(kind, line))
    return lines


def test_fuzzed_lines_are_read_or_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "MOST_BYTES", 100_000)
    rng = np.random.default_rng(0)
    lines = fuzzed(rng, [" ".join(f"word{n}" for n in rng.integers(0, 5000, 60)) for _ in range(50)])
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    cfg = recipe(tmp_path / "a.jsonl", max_bad_records=1000)
    index = run(cfg, tmp_path / "out", filters=["words"])
    found = index["statistics"]
    total = sum(1 for line in lines if line.strip())
    bad, gone = sum(found["faults"].values()), sum(count for count, _ in found["dropped"].values())
    kept = sum(part["documents"] for part in found["kept"].values())
    assert found["records"] == total == bad + gone + kept
    assert len(removed(tmp_path / "out")) == bad + gone
    assert kept > 20
    kinds = ("malformed JSON", "invalid UTF-8", "NUL", "wrong type", "missing field", "empty text", "document too long")
    assert set(found["faults"]) >= set(kinds)
    with pytest.raises(DataError, match=r"a\.jsonl:\d+: .*more than data\.max_bad_records=3"):
        run(recipe(tmp_path / "a.jsonl", max_bad_records=3), tmp_path / "strict")


def test_bad_records_of_all_files_count_together(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:2: wrong type: .*more than data\.max_bad_records=1"):
        run(recipe(tmp_path, max_bad_records=1), tmp_path / "out", shard_bytes=2)


def test_input_that_changed_before_a_resume_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(KeyboardInterrupt):
        run(recipe(path), tmp_path / "out", interrupted(after=1))
    path.write_text('{"text": "one"}\n{"text": "two, and more"}\n')
    with pytest.raises(ConfigError, match=r"files\..*a\.jsonl: \[32, "):
        run(recipe(path), tmp_path / "out")


def test_input_that_changes_while_it_is_prepared_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = [f"one and {i}: {hashlib.sha256(bytes([i])).hexdigest()}" for i in range(200)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def changes(work, units):
        with path.open("a") as file:
            file.write('{"text": "one more"}\n')
        return workers.in_process(work, units)

    with pytest.raises(DataError, match=r"a\.jsonl changed while it was prepared"):
        run(recipe(path), tmp_path / "out", changes)
    assert not (tmp_path / "out" / "index.json").exists()


def test_unsupported_settings_are_refused_before_anything_is_written(tmp_path):
    raw, other = tmp_path / "raw.jsonl", tmp_path / "other"
    raw.write_text('{"text": "one"}\n')
    (other / "work").mkdir(parents=True)
    (other / "work" / "mine.txt").write_text("mine")
    cases = [
        (recipe(raw), {}, other, "holds other files"),
        (recipe(raw, task="chat"), {}, tmp_path / "out", "'task.name' is chat"),
        (recipe(raw, max_records=5), {}, tmp_path / "out", "'data.max_records' is 5"),
        (recipe(raw), {"filters": ["wrods"]}, tmp_path / "out", r"no filter 'wrods' \(did you mean 'words'"),
        (recipe(raw), {"evaluation": ["gone"]}, tmp_path / "out", "'gone': no such file"),
        (recipe(tmp_path / "gone"), {}, tmp_path / "out", "gone': no such file"),
        (recipe("", format="builtin_text"), {}, tmp_path / "out", "'data.format' is builtin_text"),
        (recipe("", mixture=((0.0, "a", 1.0),)), {}, tmp_path / "out", "'data.mixture' names several sources"),
    ]
    for cfg, options, out, message in cases:
        with pytest.raises((ConfigError, DataError), match=message):
            run(cfg, out, **options)
    assert not (tmp_path / "out").exists() and contents(other) == {"work/mine.txt": b"mine"}


def test_an_empty_part_is_an_error_with_the_counts(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(DataError, match=r"no valid document is left of 2 \(dropped: words 2\)"):
        run(recipe(tmp_path / "a.jsonl"), tmp_path / "out", filters=["words"])
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"no valid document is left of 0 \(dropped: none\)"):
        run(recipe(tmp_path / "b.jsonl", max_bad_records=1), tmp_path / "empty")
