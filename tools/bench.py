"""Measures speed where it runs: the real training loop, another system beside it, or the input pipeline alone.

    python tools/bench.py --config=configs/bench/cpu_gpt2.py [--peer=transformers] [--rounds=10] [--seconds=5] \
        [--json=FILE]
    python tools/bench.py --input [--megabytes=100,1000] [--seconds=5] [--json=FILE]

Training is the project's own: its data, its batches, its compiled step, and what a run fetches of each step; without
evaluation and checkpoints. The peer (pip install -e '.[peer]') starts from the same weights and reads the same batches;
the two take turns, round by round, and their losses must agree before anything is timed. Start it as a program of its
own: the time to the first step counts from there.
"""

# ruff: noqa: E402 (the clock starts before anything is imported)
import time

_BEGAN = time.perf_counter()

import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # recipes import `configs`, which is not installed

from lm import config
from lm import flags as lm_flags
from lm.config import Config

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: configs/NAME.py, or configs/NAME.py:argument.")
_PEER = flags.DEFINE_enum("peer", "", ["", "transformers"], "What trains the same model in the same run.")
_ACTIVATION = flags.DEFINE_string("peer_activation", "gelu_new", "Its GELU: gelu_new (GPT-2's) or gelu_pytorch_tanh.")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Rounds of training to time.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 5.0, "Of a round, about; of each thing, with --input.", lower_bound=0.0)
_INPUT = flags.DEFINE_bool("input", False, "Measure the input pipeline alone.")
_MEGABYTES = flags.DEFINE_list("megabytes", ["100", "1000"], "With --input: sizes of prepared data.")
_JSON = flags.DEFINE_string("json", "", "Write all figures to this file.")

# Losses of one batch in float32, by other sums: from the same weights, and after a step of the same optimizer.
AGREE_AT_START, AGREE_AFTER = 1e-5, 1e-4


class Disagree(RuntimeError):
    """The peer does not compute the same: what follows would compare two models."""


class Round(NamedTuple):
    """Seconds of wall time, and of CPU time over all threads of the process."""

    wall: float
    cpu: float


class Training(NamedTuple):
    """The project's own training, compiled, its first step done.

    Attributes:
      advance: steps -> loss of the last of them; each call goes on.
      run: see `lm.build.Run`.
      start: parameters before the first step, on the host; None where no peer needs them.
      loss: of the first step.
      seconds: what the time to the first step went to.
    """

    advance: Callable[[int], float]
    run: Any
    start: Any
    loss: float
    seconds: dict[str, float]


def main(argv: list[str]) -> None:
    """Turns flags into figures, and an expected error into one clear message and exit status 1."""
    if len(argv) > 1 or (_CONFIG.value is None) == (not _INPUT.value):
        sys.exit("error: either --config=configs/NAME.py or --input, and all options are --flag=value; see --help")
    try:
        with tempfile.TemporaryDirectory() as folder:
            if _INPUT.value:
                from tools import bench_input

                found = bench_input.measure(Path(folder), list(map(int, _MEGABYTES.value)), _SECONDS.value)
                bench_input.show(found)
            else:
                cfg = config.build(_CONFIG.value)
                lm_flags.set_libtpu()
                found = measure(
                    cfg,
                    Path(folder),
                    _ROUNDS.value,
                    _SECONDS.value,
                    peer=bool(_PEER.value),
                    activation=_ACTIVATION.value,
                )
                show(found)
    except (ValueError, RuntimeError) as error:
        if type(error).__module__.startswith("lm.") or isinstance(error, Disagree):
            sys.exit(f"error: {error}")
        raise
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measure(
    cfg: Config, folder: Path, rounds: int, seconds: float, *, peer: bool = False, activation: str = "gelu_new"
) -> dict[str, Any]:
    """All figures of training.

    Args:
      cfg: from `lm.config.build`.
      folder: for what a run leaves.
      rounds: how many are timed.
      seconds: of a round of the project's own, about; the peer takes as many steps.
      peer: whether it takes turns.
      activation: of the peer's MLP.

    Raises:
      ConfigError: the config does not fit itself, or the peer.
      Disagree: the two do not compute the same.
    """
    import jax

    from lm import build, metrics
    from tools import bench_peer

    if peer:
        cfg = build.plan(cfg, None).cfg
        bench_peer.check(cfg, jax.default_backend())
    own = prepare(cfg, folder, keep_start=peer)
    cfg, device, devices = own.run.cfg, own.run.mesh.devices.flat[0], own.run.mesh.devices.size
    sides = {"own": own.advance}
    compared: dict[str, Any] = {}
    if peer:
        rates = map(float, map(jax.jit(own.run.optimizer.learning_rate), itertools.count()))
        batches, size = build.data_iterator(own.run, 0), own.run.tokenizer.vocab_size
        sides["peer"] = bench_peer.make(cfg, own.start, rates, batches, size, activation)
        compared = {"loss_at_start": agree(own.loss, sides["peer"](1), AGREE_AT_START)}
        compared["loss_after_a_step"] = agree(own.advance(1), sides["peer"](1), AGREE_AFTER)
    own.advance(2)  # caches, allocators
    steps = max(1, round(seconds / timed(own.advance, 1).wall))
    if peer:
        sides["peer"](3)
    tokens = cfg.data.batch_size * cfg.data.seq_len * steps
    found: dict[str, list[Round]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, advance in sides.items():
            found[name].append(timed(advance, steps))

    per_second = statistics.median(tokens / each.wall for each in found["own"])
    is_counted = own.run.tokenizer is not None and build.predicts_tokens(cfg)
    words = own.run.tokenizer.vocab_size if is_counted else 0
    flops = metrics.train_flops_per_token(cfg.model, cfg.data.seq_len, words) if is_counted else None
    figures: dict[str, Any] = {
        "device": device.device_kind,
        "devices": devices,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(own.run.abstract_state.params)),
        "tokens_per_step": tokens // steps,
        "rounds": rounds,
        "steps_per_round": steps,
        **speeds(found["own"], tokens),
        "seconds_to_first_step": sum(own.seconds.values()),
        "seconds_of_it": own.seconds,
        "model_flops_per_token": flops,
        "mfu": metrics.mfu(per_second, flops, device.device_kind, devices),
    }
    if flops and figures["mfu"] is None:  # no peak is known: beside what one large matrix product reaches
        ceiling = matmul_flops()
        figures |= {"matmul_flops_per_second": ceiling, "share_of_matmul": per_second * flops / ceiling}
    if peer:
        pairs = list(zip(found["own"], found["peer"], strict=True))
        compared |= {
            "name": "transformers",
            "activation": activation,
            **bench_peer.about(),
            **speeds(found["peer"], tokens),
        }
        compared["ratio"] = spread([theirs.wall / ours.wall for ours, theirs in pairs])
        compared["ratio_of_cpu_time"] = spread([theirs.cpu / ours.cpu for ours, theirs in pairs])
        figures["peer"] = compared
    return figures


def prepare(cfg: Config, folder: Path, *, keep_start: bool) -> Training:
    """Everything up to the end of the first step, as `lm.train` does it."""
    import jax

    from lm import build, program, sharding, transfer

    times = [_BEGAN, time.perf_counter()]
    planned = build.plan(cfg, None)
    mesh = sharding.make_mesh(planned.cfg.mesh)
    run = build.run(planned, folder, mesh, lambda _: None)
    times.append(time.perf_counter())
    with jax.set_mesh(mesh):
        shape = program.abstract_batch(run.cfg, mesh, run.cfg.data.batch_size)
        train_step = run.train_step.lower(run.abstract_state, shape).compile()
        times.append(time.perf_counter())
        params, _ = transfer.initialize(
            run.model, run.abstract_state.params, run.cfg.seed, planned.init, planned.origin_of
        )
        start = jax.device_get(params) if keep_start else None
        state = jax.jit(run.init_state, out_shardings=run.state_shardings)(params)
    batches, place = build.data_iterator(run, 0), build.placer(mesh, run.cfg.data.batch_size)

    def advance(steps: int) -> float:
        nonlocal state
        pending: Any = None
        for _ in range(steps):
            with jax.set_mesh(mesh):
                state, figures = train_step(state, place(next(batches)))
            if pending:
                jax.device_get(pending)  # while the next step runs
            pending = figures
        return float(jax.device_get(pending)["loss"])

    loss = advance(1)
    times.append(time.perf_counter())
    names = ("import", "data", "compile", "initialise_and_step")
    seconds = {name: end - begin for name, begin, end in zip(names, times, times[1:], strict=False)}
    return Training(advance, run, start, loss, seconds)


def agree(own: float, peer: float, tolerance: float) -> dict[str, float]:
    """Both losses.

    Raises:
      Disagree: they differ by more than `tolerance`, relative.
    """
    if not abs(own - peer) <= tolerance * abs(own):
        raise Disagree(f"the peer does not compute the same: loss {own:.6f} here and {peer:.6f} there on one batch")
    return {"own": own, "peer": peer}


def timed(advance: Callable[[int], float], steps: int) -> Round:
    """One round."""
    wall, cpu = time.perf_counter(), time.process_time()
    advance(steps)
    return Round(time.perf_counter() - wall, time.process_time() - cpu)


def speeds(rounds: list[Round], tokens: int) -> dict[str, Any]:
    """Tokens a second over rounds of `tokens` each, and tokens a second of CPU time, which others' work moves less."""
    return {
        "tokens_per_second": statistics.median(tokens / each.wall for each in rounds),
        "tokens_per_second_spread": spread([tokens / each.wall for each in rounds]),
        "tokens_per_cpu_second": statistics.median(tokens / each.cpu for each in rounds),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def matmul_flops(size: int = 2048) -> float:
    """FLOP/s that JAX reaches on one product of two float32 [size, size], the best of eight."""
    import jax

    square = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(lambda x: x @ x)
    product(square).block_until_ready()
    times = []
    for _ in range(8):
        began = time.perf_counter()
        product(square).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(times)


def show(found: dict[str, Any]) -> None:
    """The figures as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, title=f"{found['devices']} x {found['device']}, {found['cores']} cores")

    def rate(figures: dict[str, Any]) -> str:
        each = figures["tokens_per_second_spread"]
        return f"{each['median']:,.0f} ({each['min']:,.0f} to {each['max']:,.0f})"

    rows = {
        "parameters": f"{found['parameters']:,}",
        "timed": f"{found['rounds']} rounds of {found['steps_per_round']} steps of {found['tokens_per_step']:,} tokens",
        "tokens/s": rate(found),
        "tokens/s of CPU time": f"{found['tokens_per_cpu_second']:,.0f}",
    }
    if found["mfu"] is not None:
        rows["MFU"] = f"{found['mfu']:.1%}"
    if "share_of_matmul" in found:
        flops = found["matmul_flops_per_second"] / 1e9
        rows["model FLOP/s of one matmul's"] = f"{found['share_of_matmul']:.1%} of {flops:,.0f} GFLOP/s"
    parts = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in found["seconds_of_it"].items())
    rows["seconds to the end of the first step"] = f"{found['seconds_to_first_step']:.1f}: {parts}"
    if peer := found.get("peer"):
        name = f"{peer['name']} {peer['transformers']}, torch {peer['torch']}"
        start, after = peer["loss_at_start"], peer["loss_after_a_step"]
        rows |= {
            f"tokens/s of {name}": rate(peer),
            "losses of the two": f"{start['own']:.5f} and {start['peer']:.5f}; after a step "
            f"{after['own']:.5f} and {after['peer']:.5f}",
            "times as fast": "{median:.2f} ({min:.2f} to {max:.2f})".format(**peer["ratio"]),
            "the same in CPU time": "{median:.2f} ({min:.2f} to {max:.2f})".format(**peer["ratio_of_cpu_time"]),
        }
    for name, value in rows.items():
        table.add_row(name, value)
    Console(width=120).print(table)


if __name__ == "__main__":
    app.run(main, flags_parser=lm_flags.parse)
