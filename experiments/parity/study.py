"""Parity of training with another implementation: one GPT-2 on the same batches, here and in PyTorch's transformers.

    pip install -e '.[peer]'
    python experiments/parity/study.py

Three runs of configs/gpt2_tinystories.py: ours; transformers from our initial weights; transformers from its own.
They share the batches, the learning rates, AdamW (betas, epsilon, decay, clipping of the global norm as in the recipe)
and the parameters with weight decay, which are those of two dimensions. Finished runs are saved in `results.json`;
`results.md` and `results.png` are written after each run.
"""

import argparse
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lm.parallel import mesh as mesh_lib
from lm.tasks import build_config

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
KEPT = HERE / "results.json"

EVERY = 40  # steps between two evaluations
ACTIVATION = "gelu_new"  # the tanh form, as here
RUNS = {
    "lm": "this project",
    "same": "transformers, our weights at the start",
    "own": "transformers, its own initialisation",
}


def main() -> None:
    """Runs each unfinished run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"runs: {', '.join(RUNS)} (default: all)")
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else list(RUNS)
    if unknown := [name for name in wanted if name not in RUNS]:
        sys.exit(f"error: --only: no run '{unknown[0]}'; there are {', '.join(RUNS)}")
    os.chdir(ROOT)  # recipes name data relative to the root
    missing = [name for name in wanted if name not in read()]
    if missing:
        sides = prepare()
        for name in missing:
            advance, held_out = sides(name)
            figures = learn(name, advance, held_out)
            KEPT.write_text(json.dumps(read() | {name: figures}, indent=1) + "\n")
    write()


def prepare() -> Callable[[str], tuple[Callable[[], float], Callable[[], float]]]:
    """Run -> (function that trains one step and returns its loss, function that returns the held-out loss)."""
    import jax

    from configs import gpt2_tinystories
    from lm import run as run_lib
    from lm.benchmark import transformers_gpt2
    from lm.checkpoint import init_from
    from lm.evaluation import evaluate, metrics

    cfg = build_config(gpt2_tinystories.get_config())
    planned = run_lib.plan(cfg, None)
    transformers_gpt2.check(planned.cfg, jax.default_backend())
    mesh = mesh_lib.make_mesh(planned.cfg.mesh, jax.devices()[:1])
    run = run_lib.prepare(planned, mesh, lambda _: None)
    row_ids, held_out = run_lib.eval_rows(run, run.data.valid)
    held_out = list(held_out)
    params, _ = init_from.initialize(run.program.model, run.program.abstract_state.params, run.cfg.seed, None, {})
    start = jax.device_get(params)

    def ours() -> tuple[Callable[[], float], Callable[[], float]]:
        state = jax.jit(run.program.init_state, out_shardings=run.program.state_shardings)(jax.device_put(start))
        batches, place = run_lib.train_batches(run), run_lib.placer(mesh, run.cfg.data.batch_size)

        def advance() -> float:
            nonlocal state
            with jax.set_mesh(mesh):
                state, figures = run.program.train_step(state, place(next(batches)))
            return float(figures["loss"])

        def loss() -> float:
            with jax.set_mesh(mesh):
                sums, _ = evaluate.evaluate(run.program.eval_step, state.params, place, iter(held_out), len(row_ids))
            return metrics.finalize(sums, has_perplexity=False)["nll"]

        return advance, loss

    def theirs(weights: Any) -> tuple[Callable[[], float], Callable[[], float]]:
        import torch

        torch.manual_seed(run.cfg.seed)
        model = transformers_gpt2.gpt2(run.cfg, weights, run.plan.tokenizer.vocab_size, ACTIVATION)
        rates: Iterator[float] = map(float, map(jax.jit(run.program.optimizer.learning_rate), itertools.count()))
        advance = transformers_gpt2.training(run.cfg, model, rates, run_lib.train_batches(run))
        return functools.partial(advance, 1), functools.partial(transformers_gpt2.held_out_loss, model, held_out)

    return lambda name: ours() if name == "lm" else theirs(start if name == "same" else None)


def learn(name: str, advance: Callable[[], float], held_out: Callable[[], float]) -> dict[str, Any]:
    """Losses of a run: 'train', one a step, and 'held_out', number of steps -> loss."""
    from configs import gpt2_tinystories

    total = gpt2_tinystories.get_config().train.total_steps
    train, evaluated, began = [], {0: held_out()}, time.monotonic()
    for step in range(1, total + 1):
        train.append(advance())
        if step % EVERY == 0:
            evaluated[step] = held_out()
            left = (time.monotonic() - began) / step * (total - step)
            print(f"{name} step {step}/{total} · held out {evaluated[step]:.4f} · ETA {left:.0f} s", flush=True)
    return {"train": [round(loss, 5) for loss in train], "held_out": {k: round(v, 5) for k, v in evaluated.items()}}


def read() -> dict[str, Any]:
    """Run -> its figures, for the finished runs."""
    return json.loads(KEPT.read_text()) if KEPT.exists() else {}


def write() -> None:
    """Writes the table and the plot of the finished runs."""
    (HERE / "results.md").write_text(results(), encoding="utf-8")
    plot(HERE / "results.png")


def results() -> str:
    """The table, as Markdown."""
    kept = read()
    ours = kept.get("lm")
    lines = [
        "# Parity with transformers: results",
        "",
        "Written by `python experiments/parity/study.py`. Losses in nats a token. Distance: between a run's training "
        "loss and ours on the same batch, the largest of all steps and the mean of the last 20.",
        "",
        "| run | first batch | held out at the start | at the end | distance, largest | mean of the last 20 |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in RUNS.items():
        if name not in kept:
            lines.append(f"| {title} | not run | | | | |")
            continue
        own = kept[name]
        held_out = list(own["held_out"].values())
        line = f"| {title} | {own['train'][0]:.5f} | {held_out[0]:.5f} | {held_out[-1]:.3f} |"
        if name == "lm" or not ours:
            lines.append(f"{line} | |")
            continue
        apart = [abs(a - b) for a, b in zip(own["train"], ours["train"], strict=True)]
        lines.append(f"{line} {max(apart):.4f} | {sum(apart[-20:]) / 20:.4f} |")
    return "\n".join(lines) + "\n"


def plot(path: Path) -> None:
    """Top: training loss, with held-out losses as points. Bottom: distance to our training loss."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    kept = read()
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 8), sharex=True, height_ratios=(2, 1))
    for number, (name, title) in enumerate(RUNS.items()):
        if name not in kept:
            continue
        own, look = kept[name], {"color": f"C{number}", "linestyle": ("-", "--", ":")[number]}
        steps = range(1, len(own["train"]) + 1)
        above.plot(steps, own["train"], linewidth=1, label=title, **look)
        above.plot([int(step) for step in own["held_out"]], list(own["held_out"].values()), "o", color=look["color"])
        if name != "lm" and "lm" in kept:
            apart = [max(abs(a - b), 1e-5) for a, b in zip(own["train"], kept["lm"]["train"], strict=True)]
            below.plot(steps, apart, linewidth=1, label=title, **look)
    above.set_ylabel("nats a token (points: held out)")
    above.legend()
    below.set_yscale("log")
    below.set_ylabel("distance to this project's loss\n(kept to 0.00001)")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
