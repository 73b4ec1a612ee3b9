"""Which initialisation learns best, for each family of models: held-out loss, with the learning rate tuned for each.

    python experiments/initialisation/study.py [--only=encoder,mae]

For every family, size and scheme (`model.init`) the learning rate is tuned with one seed, a factor of 3 at a time,
until the best one has a worse one on either side; three other seeds at that rate give the figures of the table.
A seed decides the parameters, the order of the data and the masks. Finished trials are saved in `results.json` beside
this file, so that the same command resumes a study that was stopped. `results.md` and `results.png` are written after
each size.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm.parallel import mesh as mesh_lib
from lm.tasks import build_config, default_config, task_config, task_of

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
KEPT = HERE / "results.json"

TUNED_ON, SEEDS = 0, (1, 2, 3)
STEPS = 120
SIZES = ((32, 2), (64, 3), (128, 3), (256, 4))  # width, layers
# Learning rates are powers of sqrt(10), a factor of about 3 apart.
RATES = {step: float(f"{10 ** (step / 2):.1g}") for step in range(-9, 0)}
FIRST = (-6, -5, -4)  # 1e-3, 3e-3, 1e-2


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of model and its task.

    Attributes:
      title: its name in the table.
      recipe: (width, layers) -> the config, without seed, learning rate and scheme.
      schemes: schemes to compare; the others are tested against the first.
    """

    title: str
    recipe: Callable[[int, int], Any]
    schemes: tuple[str, ...]


def stories(width: int, layers: int) -> Any:
    """A GPT-2-like decoder on TinyStories; the other text families are derived from it."""
    from configs import common

    c = default_config()
    c.tokenizer.vocab_size = 1024
    c.data.format = "text"
    c.data.path = common.shared_data("tinystories/sample.txt")
    c.data.separator = "<|endoftext|>"
    c.data.packing = "concat"
    c.data.seq_len = 128
    c.data.batch_size = 8
    c.loss.chunk_len = 0
    c.eval.max_tokens = 16_384
    shape(c, width, layers)
    return c


def shape(c: Any, width: int, layers: int) -> None:
    """Sets what all families share: the size and the length of training."""
    c.model.num_layers, c.model.embed_dim, c.model.num_heads = layers, width, width // 32
    c.model.unroll = 0  # all layers: faster on CPU
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = STEPS // 10
    c.optim.end_lr_ratio = 0.1
    c.train.total_steps = STEPS


def llama(width: int, layers: int) -> Any:
    """A Llama-like decoder."""
    c = stories(width, layers)
    c.model.position, c.model.norm, c.model.mlp, c.model.use_bias = "rope", "rmsnorm", "swiglu", False
    c.model.mlp_dim = width * 8 // 3
    c.model.tie_embeddings = False
    return c


def encoder(width: int, layers: int) -> Any:
    """A BERT-like encoder that predicts masked tokens."""
    c = stories(width, layers)
    c.task = task_config("masked_lm", mask_rate=0.3)
    c.model.kind = "encoder"
    c.tokenizer.extra_ids = 1
    return c


def encoder_decoder(width: int, layers: int) -> Any:
    """A T5-like encoder-decoder (tied, as configs/t5_tinystories.py) that fills in spans; `layers` over both sides."""
    c = llama(width, (layers + 1) // 2)
    c.task = task_config("span_corruption")
    c.model.kind = "encoder_decoder"
    c.tokenizer.extra_ids = 33
    c.data.target_len = 36
    c.model.position, c.model.tie_embeddings = "relative", True
    return c


def mae(width: int, layers: int) -> Any:
    """A masked autoencoder on CIFAR-10, as configs/mae_cifar10.py."""
    from configs import mae_cifar10

    c = mae_cifar10.get_config()
    c.data.batch_size = 64
    shape(c, width, layers)
    c.model.decoder_dim = 32
    c.optim.weight_decay = 0.05
    return c


FAMILIES = {
    "mae": Family("ViT, masked autoencoder", mae, ("gpt2", "fan_in", "vit")),
    "encoder": Family("Encoder, masked tokens", encoder, ("gpt2", "fan_in", "bert")),
    "encoder_decoder": Family("Encoder-decoder, spans", encoder_decoder, ("gpt2", "fan_in", "t5")),
    "llama": Family("Llama-like decoder", llama, ("gpt2", "fan_in", "llama")),
    "gpt2": Family("GPT-2-like decoder", stories, ("gpt2", "fan_in", "bert")),
}


def main() -> None:
    """Runs the requested trials in order, and writes the table after each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = {
        "only": list(FAMILIES),
        "widths": [str(width) for width, _ in SIZES],
        "schemes": list(dict.fromkeys(scheme for family in FAMILIES.values() for scheme in family.schemes)),
    }
    for option, known in choices.items():
        parser.add_argument(f"--{option}", default="", help=f"some of {', '.join(known)} (default: all)")
    args = parser.parse_args()
    wanted = {option: getattr(args, option).split(",") for option in choices if getattr(args, option)}
    for option, words in wanted.items():
        if unknown := [word for word in words if word not in choices[option]]:
            sys.exit(f"error: --{option}: no '{unknown[0]}'; there are {', '.join(choices[option])}")
    wanted = choices | wanted
    os.chdir(ROOT)  # recipes name data relative to the root
    for size in SIZES:
        for name in wanted["only"]:
            if str(size[0]) in wanted["widths"]:
                run(name, size, [scheme for scheme in FAMILIES[name].schemes if scheme in wanted["schemes"]])
                write()


def run(name: str, size: tuple[int, int], schemes: list[str]) -> None:
    """Runs every unfinished trial of a family at a size."""
    made: list[Callable[[str, float, int], float]] = []
    same = fingerprint(name, size)
    times: list[float] = []

    def loss_of(scheme: str, step: int, seed: int) -> float:
        key = key_of(name, size, scheme, step, seed)
        kept = read()
        if kept.get(key, {}).get("config") == same:
            return as_number(kept[key]["loss"])
        if not made:
            made.append(trials(FAMILIES[name].recipe(*size)))
        began = time.monotonic()
        loss = made[0](scheme, RATES[step], seed)
        times.append(time.monotonic() - began)
        figures = {"loss": round(loss, 5) if math.isfinite(loss) else None, "seconds": round(times[-1], 1)}
        KEPT.write_text(json.dumps(dict(sorted((read() | {key: figures | {"config": same}}).items())), indent=1) + "\n")
        print(f"{key}: {loss:.4f}, {times[-1]:.0f} s", flush=True)
        return as_number(figures["loss"])

    for number, scheme in enumerate(schemes):
        best = tuned(functools.partial(loss_of, scheme, seed=TUNED_ON))
        for seed in SEEDS:
            loss_of(scheme, best, seed)
        if times:
            left = (len(schemes) - number - 1) * (len(FIRST) + len(SEEDS)) * statistics.median(times)
            print(f"{name} {size[0]}: about {left / 60:.0f} min left at this size", flush=True)


def tuned(loss_of: Callable[[int], float]) -> int:
    """Index in `RATES` of the learning rate whose two neighbours are both worse."""
    losses = {step: loss_of(step) for step in FIRST}
    while True:
        best = min(losses, key=lambda step: (losses[step], step))
        missing = [step for step in (best - 1, best + 1) if step not in losses and step in RATES]
        if not missing:
            return best
        losses[missing[0]] = loss_of(missing[0])


def trials(recipe: Any) -> Callable[[str, float, int], float]:
    """Returns a function (scheme, learning rate, seed) -> held-out loss, whose calls share one compiled program."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lm import optim, program, step
    from lm import run as run_lib
    from lm.evaluation import evaluate, metrics

    cfg = build_config(recipe)
    mesh = mesh_lib.make_mesh(cfg.mesh, jax.devices()[:1])
    prepared = run_lib.prepare(run_lib.plan(cfg, None), mesh, lambda _: None)
    cfg = prepared.cfg
    row_ids, held_out = run_lib.eval_rows(prepared, prepared.data.valid)
    held_out = list(held_out)
    loss_fn = task_of(cfg).loss(prepared.program.model.apply, cfg, prepared.plan.tokenizer)

    @functools.cache
    def batches(seed: int) -> Any:
        plan = prepared.plan._replace(cfg=dataclasses.replace(cfg, seed=seed))
        stream = run_lib.train_batches(prepared._replace(plan=plan))
        taken = [next(stream) for _ in range(STEPS)]
        stream.close()
        return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *taken)

    @jax.jit
    def train(params: Any, rate: Any, stacked: Any, seed: Any) -> Any:
        options = dataclasses.replace(cfg.optim, learning_rate=rate)
        warmup = cfg.optim.warmup.steps
        optimizer = optim.build(options, params, total_steps=STEPS, warmup_steps=warmup, decay_steps=0)
        one = functools.partial(
            step.train_step, loss_fn=loss_fn, optimizer=optimizer, seed=seed, micro_batches=1, ema_decay=0.0
        )
        state, _ = jax.lax.scan(
            lambda state, batch: (one(state, batch)[0], None),
            step.init_state(params, optimizer, use_ema=False),
            stacked,
        )
        return state.params

    @functools.cache
    def init(scheme: str) -> Any:
        model_cfg = dataclasses.replace(cfg.model, init=scheme)
        model = program.make_model(dataclasses.replace(cfg, model=model_cfg), jnp.float32)
        return jax.jit(lambda seed: model.init(jax.random.key(seed)))

    def trial(scheme: str, rate: float, seed: int) -> float:
        with jax.set_mesh(mesh):
            params = train(init(scheme)(seed), rate, batches(seed), seed)
            eval_step = prepared.program.eval_step
            sums, _ = evaluate.evaluate(eval_step, params, lambda batch: batch, iter(held_out), len(row_ids))
        return metrics.finalize(sums, has_perplexity=False)["loss"]

    return trial


def read() -> dict[str, Any]:
    """Key -> figures of each finished trial."""
    return json.loads(KEPT.read_text()) if KEPT.exists() else {}


def as_number(loss: float | None) -> float:
    """The loss as a float; infinite if the trial diverged."""
    return math.inf if loss is None else loss


def key_of(name: str, size: tuple[int, int], scheme: str, step: int, seed: int) -> str:
    """Key of a trial in results.json."""
    return f"{name} {size[0]}x{size[1]} {scheme} {RATES[step]:g} {seed}"


def fingerprint(name: str, size: tuple[int, int]) -> str:
    """Hash of what differs from the defaults in a config, except for the paths of its data and the scheme."""
    from lm.config import schema

    usual = dict(schema.flatten(default_config().to_dict()))
    usual["task.target"] = "normalised"  # an option that a task has gained since the first trials
    given = schema.flatten(FAMILIES[name].recipe(*size).to_dict())
    values = {
        key: value for key, value in given if value != usual.get(key) and "path" not in key and key != "model.init"
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Cell:
    """Results of a scheme at a size.

    Attributes:
      tuning: learning rate -> held-out loss with the tuning seed.
      rate: the best learning rate; None if there is none yet.
      losses: held-out losses of the other seeds at that rate.
    """

    tuning: dict[float, float]
    rate: float | None
    losses: list[float]


def cell(kept: dict[str, Any], name: str, size: tuple[int, int], scheme: str) -> Cell:
    """Collects the finished trials of a scheme at a size."""

    def loss(step: int, seed: int) -> float | None:
        figures = kept.get(key_of(name, size, scheme, step, seed))
        return as_number(figures["loss"]) if figures else None

    tuning = {step: value for step in RATES if (value := loss(step, TUNED_ON)) is not None}
    if not tuning:
        return Cell({}, None, [])
    best = min(tuning, key=lambda step: (tuning[step], step))
    losses = [value for seed in SEEDS if (value := loss(best, seed)) is not None]
    return Cell({RATES[step]: value for step, value in tuning.items()}, RATES[best], losses)


def write() -> None:
    """Writes the table and the plot of the finished trials."""
    (HERE / "results.md").write_text(results(), encoding="utf-8")
    plot(HERE / "results.png")


def results() -> str:
    """The table, as Markdown."""
    kept = read()
    lines = [
        "# Initialisation: results",
        "",
        f"Written by `python experiments/initialisation/study.py`: held-out loss after {STEPS} steps, mean of "
        f"{len(SEEDS)} seeds and 95 % t-interval, at the learning rate that was best with another seed. p: Welch's "
        "test against the family's first scheme.",
        "",
        "| family | width, layers | scheme | learning rate | held-out loss | to the first | p |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, family in FAMILIES.items():
        for size in SIZES:
            first = cell(kept, name, size, family.schemes[0]).losses
            for scheme in family.schemes:
                own = cell(kept, name, size, scheme)
                place = f"| {family.title} | {size[0]}, {size[1]} | `{scheme}`"
                if len(own.losses) < len(SEEDS):
                    lines.append(f"{place} | | not run | | |")
                    continue
                shown = f"{place} | {own.rate:g} | {statistics.mean(own.losses):.3f} ± {interval(own.losses):.3f} |"
                if own.losses != first and len(first) == len(SEEDS):
                    difference = statistics.mean(own.losses) - statistics.mean(first)
                    p = welch(own.losses, first)
                    shown += f" {difference:+.3f} | {f'{p:.3f}' if p >= 0.001 else '< 0.001'} |"
                else:
                    shown += " | |"
                lines.append(shown)
    return "\n".join(lines) + "\n"


def interval(values: list[float]) -> float:
    """Half the width of the 95 % interval of the mean, by Student's t."""
    from scipy import stats

    reach = stats.t.ppf(0.975, len(values) - 1)
    return float(reach * statistics.stdev(values) / math.sqrt(len(values)))


def welch(mine: list[float], theirs: list[float]) -> float:
    """p of Welch's t-test for equal means."""
    from scipy import stats

    return float(stats.ttest_ind(mine, theirs, equal_var=False).pvalue)


def plot(path: Path) -> None:
    """Top: loss of each scheme by width. Bottom: by learning rate, at the largest width with most trials done."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    kept = read()
    figure, axes = plt.subplots(2, len(FAMILIES), figsize=(3.4 * len(FAMILIES), 6.4), squeeze=False)
    colours = {"gpt2": "C0", "fan_in": "C1", "bert": "C2", "llama": "C3", "t5": "C4", "vit": "C5"}
    for column, (name, family) in enumerate(FAMILIES.items()):
        above, below = axes[:, column]
        above.set_title(family.title, fontsize=10)
        cells = {(size, scheme): cell(kept, name, size, scheme) for size in SIZES for scheme in family.schemes}
        done = {key: own for key, own in cells.items() if len(own.losses) == len(SEEDS)}
        largest = max(SIZES, key=lambda size: (sum(key[0] == size for key in done), size))
        for shift, scheme in enumerate(family.schemes):
            look: dict[str, Any] = {"color": colours[scheme], "marker": "o", "markersize": 4, "label": scheme}
            losses = {size[0]: own.losses for (size, which), own in done.items() if which == scheme}
            if losses:
                above.errorbar(
                    [width * 1.03 ** (shift - 1) for width in losses],
                    [statistics.mean(values) for values in losses.values()],
                    yerr=[interval(values) for values in losses.values()],
                    capsize=3,
                    **look,
                )
            tuning = cells[largest, scheme].tuning
            finite = {rate: loss for rate, loss in tuning.items() if math.isfinite(loss)}
            below.plot(list(finite), list(finite.values()), **look)
        below.set_xlabel(f"learning rate (width {largest[0]})")
        above.set_xscale("log", base=2)
        above.set_xticks([width for width, _ in SIZES], [str(width) for width, _ in SIZES])
        above.set_xlabel("width")
        below.set_xscale("log")
        if above.has_data():
            above.legend(fontsize=8)
    for row in axes:
        row[0].set_ylabel("held-out loss")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
