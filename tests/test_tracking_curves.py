"""lm/tracking/curves.py: merged points are the mean, least and greatest value of their rows, in bounded memory."""

import itertools
import json
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.tracking import curves


@settings(max_examples=30)
@given(st.integers(1, 9000), st.lists(st.integers(1, 4000), min_size=1), st.integers(0, 99))
def test_a_point_is_the_mean_and_range_of_its_rows(rows, chunks, seed):
    rng = np.random.default_rng(seed)
    steps, values = np.cumsum(rng.integers(0, 3, rows)).astype(float), rng.standard_normal(rows)
    curve, start = curves.Curve(), 0
    for size in itertools.cycle(chunks):
        if start >= rows:
            break
        curve.extend(steps[start : start + size], values[start : start + size])
        start += size
    size = curve.rows_per_point
    expected = [
        (
            np.mean(steps[i : i + size]),
            np.mean(values[i : i + size]),
            values[i : i + size].min(),
            values[i : i + size].max(),
        )
        for i in range(0, rows, size)
    ]
    np.testing.assert_allclose(np.stack(curve.points(), axis=1), expected, rtol=1e-12, atol=1e-12)
    assert len(expected) <= curves.MAX_POINTS and (size == 1 or rows > size // 2 * curves.MAX_POINTS)
    assert curve.last == values[-1]


def test_curves_of_rows_keep_splits_apart_and_leave_out_null(tmp_path):
    rows = [{"step": i, "split": "train", "seconds": 1.0, "loss": float(i) if i % 2 else None} for i in range(10_000)]
    rows += [{"step": 5, "split": "eval", "seconds": 1.0, "loss": 2.0, "f1": None}]
    rows += [{"step": 6, "split": "eval", "seconds": 1.0, "loss": 3.0, "f1": 0.5}]
    rows += [{"step": 7, "split": "train", "seconds": 2.0, "grad_norm": None}]
    found = curves.gather(rows)
    assert found.of.keys() == {("train", "loss"), ("eval", "loss"), ("eval", "f1")}
    assert found.last == rows[-1] and found.last_eval == rows[-2]
    assert [points.tolist() for points in found.of["eval", "loss"].points()] == [[5, 6], [2, 3], [2, 3], [2, 3]]
    assert [points.tolist() for points in found.of["eval", "f1"].points()] == [[6], [0.5], [0.5], [0.5]]
    train = found.of["train", "loss"]
    assert train.rows_per_point == 8 and train.last == 9999  # 5,000 values in at most 1,000 points
    assert [points[0] for points in train.points()] == [8, 8, 1, 15]
    empty = curves.gather([])
    assert (empty.of, empty.last, empty.last_eval) == ({}, {}, {})


MEASURE = """
import json, pathlib, resource, sys, time
from lm.tracking import files, report
workdir, rows = pathlib.Path(sys.argv[1]), int(sys.argv[2])
began = time.process_time()
files.rewind(workdir / "metrics.jsonl", rows - 1) if sys.argv[3] == "resume" else report.write_report(workdir)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([time.process_time() - began, peak]))
"""


@pytest.mark.slow
def test_a_million_rows_are_resumed_and_drawn_in_bounded_memory_within_ten_seconds(tmp_path):
    """Seconds are of the CPU, as other processes may share it; memory is compared with that for a thousand rows."""
    names = ("loss", "weight", "grad_norm", "learning_rate", "input_bound", "tokens_per_second", "nll", "perplexity")
    peaks = {}
    for rows in (1000, 1_000_000):
        workdir = tmp_path / str(rows)
        workdir.mkdir()
        rest = json.dumps(dict.fromkeys(names, 3.14159265358979))[1:-1]
        with (workdir / "metrics.jsonl").open("w") as file:
            for step in range(1, rows + 1):
                head = f'{{"step": {step}, "split": "train", "seconds": {step / 8}, {rest}, '
                file.write(f'{head}"crc32": "{zlib.crc32(head.encode()):08x}"}}\n')
        for what in ("resume", "report"):
            command = [sys.executable, "-c", MEASURE, str(workdir), str(rows), what]
            seconds, peak = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            print(f"{rows:,} rows, {what}: {seconds:.1f} s of CPU, peak RSS {peak:.0f} MiB")
            peaks[rows, what] = peak
            assert seconds < 10
        last = json.loads((workdir / "metrics.jsonl").read_bytes().splitlines()[-1])
        assert last["step"] == rows - 1, "resume cuts the last row off"
    for what in ("resume", "report"):
        assert peaks[1_000_000, what] < peaks[1000, what] + 64, (what, peaks)
