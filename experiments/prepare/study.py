"""Data preparation: speed, memory, recall of planted duplicates, and equality of output after kills and across runners.

    python experiments/prepare/study.py [--megabytes=1000] [--workers=2]

Writes `results.md`, beside this file. Scratch files, about five times the text, go to a temporary folder in --scratch.
"""

import argparse
import collections
import dataclasses
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from experiments.prepare import corpus

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

KILLS = 10
SMALL_MEGABYTES = 4.0  # size of the corpus on which kills and runners are compared


@dataclasses.dataclass
class Done:
    """A finished run of the tool: CPU seconds by stage, wall seconds, and peak resident bytes of all its processes."""

    cpu: dict[str, float]
    wall: float
    peak: int


def command(raw: Path, out: Path, shared: Path, *more: str) -> list[str]:
    """Command line of the tool for a corpus."""
    recipe = f"--config=experiments/prepare/recipe.py:{raw}"
    evaluation = f"--evaluation={shared / corpus.QUESTIONS}"
    return [sys.executable, "tools/prepare_data.py", recipe, f"--out={out}", evaluation, *more]


def run(arguments: list[str]) -> Done:
    """Runs the tool to completion."""
    start, peak, ended = time.perf_counter(), 0, threading.Event()
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.2):
            peak = max(peak, resident(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(arguments)}\n{output}")
    cpu = {stage: float(seconds) for stage, seconds in re.findall(r"(?m)^(\w+): ([\d.]+) s of CPU", output)}
    return Done(cpu, time.perf_counter() - start, peak)


def resident(pid: int) -> int:
    """Resident bytes of a process and its descendants; shared memory is counted for each of them."""
    total = 0
    try:
        for process in (root := psutil.Process(pid), *root.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def found(out: Path, truth: corpus.Truth) -> list[str]:
    """Lines of results.md: the share found of the planted duplicates and test questions."""
    gone = {line["source"]: line for line in map(json.loads, (out / "removed.jsonl").read_text().splitlines())}
    quality = {place for place, line in gone.items() if not line["why"].endswith(("_duplicate", "contaminated"))}
    lines = ["| planted | documents | mean similarity | found |", "|---|---:|---:|---:|"]
    for edits in corpus.EDITS:
        near = {place: s for place, (share, s) in truth.near.items() if share == edits and place not in quality}
        hits = sum(place in gone for place in near)
        mean = sum(near.values()) / len(near)
        lines.append(f"| {edits:.2%} of the words edited | {len(near):,} | {mean:.3f} | {hits / len(near):.2%} |")
    alike = [place for place, (_, s) in truth.near.items() if s >= 0.75 and place not in quality]
    hits = sum(place in gone for place in alike)
    lines.append(f"| all of them that are alike by 0.75 | {len(alike):,} | | {hits / len(alike):.2%} |")
    exact = truth.exact - quality
    lines.append(f"| exact copies | {len(exact):,} | 1 | {sum(p in gone for p in exact) / len(exact):.2%} |")
    held = truth.contaminated - quality
    marked = sum(gone.get(place, {}).get("why") == "contaminated" for place in held)
    lines.append(f"| test questions | {len(held):,} | | {marked / len(held):.2%} |")
    planted = truth.near.keys() | truth.exact
    wrong = sum(line["why"].endswith("_duplicate") and place not in planted for place, line in gone.items())
    others = truth.documents - len(planted)
    marked = sum(line["why"] == "contaminated" and place not in truth.contaminated for place, line in gone.items())
    lines += [
        "",
        f"Of {others:,} documents that are no duplicates {wrong:,} were taken for one ({wrong / others:.3%}); ",
    ]
    lines[-1] += f"{marked:,} were taken for contaminated. The filters of quality had dropped {len(quality):,} before."
    return lines


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of every file in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kills(arguments: list[str], out: Path, whole: Path, seconds: float) -> str:
    """Kills the tool and its workers `KILLS` times, each at a random time of its run, and compares the final output."""
    rng, left, jobs, stages = random.Random(0), KILLS, 0, collections.Counter[str]()
    while True:
        process = subprocess.Popen(
            arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(rng.uniform(0.2, 1) * seconds if left else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            left -= 1
            work = out / "work"
            stages[max(work.glob("*/"), key=lambda path: path.stat().st_mtime).name if work.exists() else "plan"] += 1
            continue
        jobs += 1
        if contents(out) != contents(whole):
            raise SystemExit(f"{out} differs from {whole}, the output of a job that was not killed")
        if not left:
            where = ", ".join(f"{stage} {count}" for stage, count in stages.items())
            return f"{KILLS} kills (last stage to write: {where}) in {jobs} jobs: the same bytes each time."
        subprocess.run(["rm", "-r", str(out)], check=True)


def study(megabytes: float, workers: int, scratch: Path, shared: Path) -> str:
    """Runs the whole study, and returns the text of results.md."""
    sections = [
        "# Preparing data: results",
        f"Written by `python experiments/prepare/study.py --megabytes={megabytes:g} --workers={workers}`. CPU seconds, "
        f"which other work on the machine ({os.cpu_count()} cores) slows less than the clock.",
    ]
    rows = ["| text | documents | wall | peak resident memory, all processes |", "|---:|---:|---:|---:|"]
    for share in (0.25, 1.0):
        raw, out = scratch / f"raw-{share}", scratch / f"out-{share}"
        raw.mkdir()
        truth = corpus.write(raw, shared, megabytes * share)
        done = run(command(raw, out, shared, f"--workers={workers}"))
        rows.append(
            f"| {truth.megabytes:,.0f} MB | {truth.documents:,} | {done.wall:,.0f} s | {done.peak / 2**20:,.0f} MiB |"
        )
        print(rows[-1], flush=True)
    sections += ["\n".join(rows)]
    total = sum(done.cpu.values())
    paces = [("stage", "CPU seconds", "MB/s of a core"), ("---", "---:", "---:")]
    paces += [(stage, f"{s:,.1f}", f"{truth.megabytes / s:,.1f}" if s else "") for stage, s in done.cpu.items()]
    paces += [("all", f"{total:,.1f}", f"{truth.megabytes / total:,.1f}")]
    sections += [f"## Pace, {truth.megabytes:,.0f} MB", "\n".join(f"| {' | '.join(row)} |" for row in paces)]
    sections += ["## What was planted", "\n".join(found(out, truth))]

    raw, one = scratch / "raw-small", scratch / "one"
    raw.mkdir()
    corpus.write(raw, shared, SMALL_MEGABYTES, seed=1)
    small = ["--shard_megabytes=0.5"]
    run(command(raw, one, shared, "--workers=1", *small))
    several = run(command(raw, scratch / "several", shared, f"--workers={workers}", *small))
    same = contents(one) == contents(scratch / "several")
    lines = [f"- 1 and {workers} processes: {'the same bytes' if same else 'OTHER BYTES'}."]
    if importlib.util.find_spec("apache_beam"):
        run(command(raw, scratch / "beam", shared, "--runner=DirectRunner", *small))
        same = contents(one) == contents(scratch / "beam")
        lines.append(f"- Apache Beam, DirectRunner: {'the same bytes' if same else 'OTHER BYTES'}.")
    else:
        lines.append("- Apache Beam: not run, not installed.")
    arguments = command(raw, scratch / "killed", shared, f"--workers={workers}", *small)
    lines.append(f"- {kills(arguments, scratch / 'killed', one, several.wall)}")
    sections += [f"## Runners and kills, {SMALL_MEGABYTES:g} MB", "\n".join(lines)]
    return "\n\n".join(sections) + "\n"


def main() -> None:
    """Runs the study with the given flags, and writes results.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=1000.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scratch", default=None)
    args = parser.parse_args()
    shared = Path(os.environ.get("LM_SHARED_DATA") or ROOT.parent / "shared" / "data").resolve()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        text = study(args.megabytes, args.workers, Path(scratch), shared)
    (HERE / "results.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
