"""Weak scaling by the TPU compiler's figures: one model on ever larger slices, with the same rows on each chip.

    python experiments/scaling/study.py [--cache=plans/scaling] [--set=--config.model.num_layers=2 ...]

Writes `results.md`, beside this file. Compiled plans are saved in --cache, from which the same command resumes.
--set changes the recipe for an experiment; then nothing is written.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
RECIPE = "configs/bench/v5e16_7b.py"
ROWS = 1  # rows of 2,048 positions on each chip
SLICES = (("4x4", 1), ("8x8", 1), ("16x16", 1), ("16x16", 2))
GIB = 2.0**30


def plan(shape: str, slices: int, cache: str, more: list[str]) -> dict[str, Any]:
    """Figures of tools/plan.py: ZeRO-3 over each slice, data parallel over slices."""
    rows, columns = map(int, shape.split("x"))
    chips = rows * columns
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch, "plan.json")
        command = [sys.executable, "tools/plan.py", f"--config={RECIPE}", *more, f"--config.mesh.fsdp={chips}"]
        command += [f"--config.mesh.dcn_data={slices}", f"--config.data.batch_size={ROWS * chips * slices}"]
        command += [f"--topology=v5e:{shape}", f"--slices={slices}", f"--cache={cache}", f"--json={answer}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"failed: {' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return json.loads(answer.read_text(encoding="utf-8"))


def sent(figures: dict[str, Any], between_slices: bool) -> float:
    """Bytes that a chip sends in a step, over the network between slices or within them."""
    rows = figures["collectives"].items()
    return sum(row["bytes"] for name, row in rows if ("over dcn_data" in name) == between_slices)


def report(found: list[dict[str, Any]]) -> str:
    """The text of results.md."""
    first = found[0]
    head = ("slices", "chips", "peak GiB", "parameters and optimizer, GiB", "collectives, GB", "between slices, GB")
    lines = [" | ".join(("", *head, "guessed ms", "compile s", "")).strip(), "|" + "---|" + "---:|" * 7]
    for each in found:
        state = each["state_parameters"] + each["state_optimizer"]
        cells = (
            f"{each['slices']} x {each['topology']}",
            f"{each['chips']}",
            f"{each['hbm_peak'] / GIB:.2f}",
            f"{state / GIB:.2f}",
            f"{sent(each, False) / 1e9:.2f} ({sent(each, False) / sent(first, False):.3f}x)",
            f"{sent(each, True) / 1e9:.3f}",
            f"{each['estimated_step_ms']:,.0f}",
            f"{each['compile_seconds']:.0f} ({each['compile_seconds'] / first['compile_seconds']:.2f}x)",
        )
        lines.append("| " + " | ".join(cells) + " |")
    kinds = ["", "What is sent, GB of a chip and step:", ""]
    for each in found:
        rows = sorted(each["collectives"].items(), key=lambda item: -item[1]["bytes"])
        listed = ", ".join(f"{name} {row['bytes'] / 1e9:.2f}" for name, row in rows if row["bytes"] > 1e7)
        kinds.append(f"- {each['slices']} x {each['topology']}: {listed}")
    return "\n".join(["# Weak scaling on paper: results", "", *lines, *kinds]) + "\n"


def main() -> None:
    """Runs the study with the given flags, and writes results.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", default="plans/scaling")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    found = []
    for shape, slices in SLICES:
        found.append(plan(shape, slices, args.cache, args.set))
        print(report(found[:1] + found[-1:]).splitlines()[-5], flush=True)
    text = report(found)
    if not args.set:
        (HERE / "results.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
