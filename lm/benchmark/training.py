"""Throughput of training (`tools/bench.py`), and of the same model in `transformers` in the same run."""

# ruff: noqa: E402 (the clock starts before anything is imported)
import time

_BEGAN = time.perf_counter()

import itertools
import os
import platform
import resource
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from lm.config import Config
from lm.evaluation import flops

# Relative tolerances of float32 losses: from the same weights, and after one step of the same optimizer.
AGREE_AT_START, AGREE_AFTER = 1e-5, 1e-4


class Disagree(RuntimeError):
    """The two systems do not compute the same losses, so that their speeds cannot be compared."""


class Round(NamedTuple):
    """Seconds of wall time, CPU seconds of all threads of the process, and page faults."""

    wall: float
    cpu: float
    page_faults: int


class Training(NamedTuple):
    """Training after its first step.

    Attributes:
      advance: number of steps -> loss of the last one; each call continues the training.
      run: see `lm.run.Run`.
      start: initial parameters, on the host; None if there is no peer.
      loss: of the first step.
      seconds: the time to the first step, by phase.
    """

    advance: Callable[[int], float]
    run: Any
    start: Any
    loss: float
    seconds: dict[str, float]


def measure(
    cfg: Config, rounds: int, seconds: float, *, peer: bool = False, activation: str = "gelu_new"
) -> dict[str, Any]:
    """Measures training.

    Args:
      cfg: from `lm.config.build`.
      rounds: number of timed rounds.
      seconds: approximate length of a round of our own training; the peer runs the same number of steps.
      peer: whether to alternate with training in `transformers`.
      activation: of the peer's MLP.

    Raises:
      ConfigError: the config is inconsistent, or not a model of the peer.
      Disagree: the losses of the two differ.
    """
    import jax

    from lm import run as run_lib
    from lm.benchmark import transformers_gpt2

    if peer:
        cfg = run_lib.plan(cfg, None).cfg
        transformers_gpt2.check(cfg, jax.default_backend())
    own = prepare(cfg, keep_start=peer)
    cfg, device, devices = own.run.cfg, own.run.mesh.devices.flat[0], own.run.mesh.devices.size
    sides = {"own": own.advance}
    compared: dict[str, Any] = {}
    if peer:
        rates = map(float, map(jax.jit(own.run.program.optimizer.learning_rate), itertools.count()))
        batches, size = run_lib.train_batches(own.run), own.run.plan.tokenizer.vocab_size
        sides["peer"] = transformers_gpt2.make(cfg, own.start, rates, batches, size, activation)
        compared = {"loss_at_start": agree(own.loss, sides["peer"](1), AGREE_AT_START)}
        compared["loss_after_a_step"] = agree(own.advance(1), sides["peer"](1), AGREE_AFTER)
    own.advance(2)  # warm up caches and allocators
    steps = max(1, round(seconds / timed(own.advance, 1).wall))
    tokens = cfg.data.batch_size * cfg.data.seq_len * steps
    timings: dict[str, list[Round]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, advance in sides.items():
            if peer:
                advance(1)  # not timed: reallocates the memory that the other has returned to the kernel
            timings[name].append(timed(advance, steps))

    per_second = statistics.median(tokens / each.wall for each in timings["own"])
    per_token = run_lib.flops_per_token(own.run)
    full, causal = per_token.get("mfu"), per_token.get("mfu_causal")
    figures: dict[str, Any] = {
        "device": device.device_kind,
        "devices": devices,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": processor(),
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(own.run.program.abstract_state.params)),
        "tokens_per_step": tokens // steps,
        "rounds": rounds,
        "steps_per_round": steps,
        **speeds(timings["own"], tokens),
        "page_faults_per_step": statistics.median(each.page_faults for each in timings["own"]) / steps,
        "seconds_to_first_step": sum(own.seconds.values()),
        "seconds_of_it": own.seconds,
        "model_flops_per_token": full,
        "mfu": flops.mfu(per_second, full, device.device_kind, devices),
        "mfu_causal": flops.mfu(per_second, causal, device.device_kind, devices),
    }
    if full and figures["mfu"] is None:  # no known peak: compare with one large matrix product
        ceiling = matmul_flops(jax_product)
        figures |= {"matmul_flops_per_second": ceiling, "share_of_matmul": per_second * full / ceiling}
    if peer:
        pairs = list(zip(timings["own"], timings["peer"], strict=True))
        compared |= {"name": "transformers", "activation": activation, **transformers_gpt2.about()}
        compared |= {
            **speeds(timings["peer"], tokens),
            "matmul_flops_per_second": matmul_flops(transformers_gpt2.product),
        }
        compared["ratio"] = spread([theirs.wall / ours.wall for ours, theirs in pairs])
        compared["ratio_of_cpu_time"] = spread([theirs.cpu / ours.cpu for ours, theirs in pairs])
        figures["peer"] = compared
    return figures


def prepare(cfg: Config, *, keep_start: bool) -> Training:
    """Prepares training as `lm.train` does, up to the end of the first step."""
    import jax

    from lm import program
    from lm import run as run_lib
    from lm.checkpoint import init_from
    from lm.parallel import mesh as mesh_lib

    times = [_BEGAN, time.perf_counter()]
    planned = run_lib.plan(cfg, None)
    mesh = mesh_lib.make_mesh(planned.cfg.mesh)
    run = run_lib.prepare(planned, mesh, lambda _: None)
    times.append(time.perf_counter())
    with jax.set_mesh(mesh):
        shape = program.abstract_batch(run.cfg, mesh, run.cfg.data.batch_size)
        train_step = run.program.train_step.lower(run.program.abstract_state, shape).compile()
        times.append(time.perf_counter())
        params, _ = init_from.initialize(
            run.program.model,
            run.program.abstract_state.params,
            run.cfg.seed,
            planned.init,
            planned.origin_of,
            planned.words,
        )
        start = jax.device_get(params) if keep_start else None
        state = jax.jit(run.program.init_state, out_shardings=run.program.state_shardings)(params)
    batches, place = run_lib.train_batches(run), run_lib.placer(mesh, run.cfg.data.batch_size)

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
    """Compares two losses, and returns them.

    Raises:
      Disagree: their relative difference exceeds `tolerance`.
    """
    if not abs(own - peer) <= tolerance * abs(own):
        raise Disagree(f"the peer does not compute the same: loss {own:.6f} here and {peer:.6f} there on one batch")
    return {"own": own, "peer": peer}


def timed(advance: Callable[[int], object], steps: int) -> Round:
    """Times one round."""
    wall, cpu, faults = time.perf_counter(), time.process_time(), page_faults()
    advance(steps)
    return Round(time.perf_counter() - wall, time.process_time() - cpu, page_faults() - faults)


def page_faults() -> int:
    """Minor page faults of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def speeds(rounds: list[Round], tokens: int) -> dict[str, Any]:
    """Tokens per second, and per CPU second, over rounds of `tokens` each. Other processes affect CPU time less."""
    return {
        "tokens_per_second": statistics.median(tokens / each.wall for each in rounds),
        "tokens_per_second_spread": spread([tokens / each.wall for each in rounds]),
        "tokens_per_cpu_second": statistics.median(tokens / each.cpu for each in rounds),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def jax_product(size: int) -> Callable[[], Any]:
    """A function that multiplies two float32 [size, size] matrices in JAX."""
    import jax

    square = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(lambda x: x @ x)
    return lambda: product(square).block_until_ready()


def matmul_flops(make_product: Callable[[int], Callable[[], Any]], size: int = 2048) -> float:
    """FLOP/s of a product of two float32 [size, size] matrices, the best of eight."""
    product = make_product(size)
    product()
    times = []
    for _ in range(8):
        began = time.perf_counter()
        product()
        times.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(times)


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def show(figures: dict[str, Any]) -> None:
    """Prints the figures as a table."""
    from rich.console import Console
    from rich.table import Table

    device = f"{figures['devices']} x {figures['device']}, {figures['cores']} cores, {figures['processor']}"
    table = Table(show_header=False, title=device)

    def rate(side: dict[str, Any]) -> str:
        each = side["tokens_per_second_spread"]
        return f"{each['median']:,.0f} ({each['min']:,.0f} to {each['max']:,.0f})"

    rows = {
        "parameters": f"{figures['parameters']:,}",
        "timed": "{rounds} rounds of {steps_per_round} steps of {tokens_per_step:,} tokens".format(**figures),
        "tokens/s": rate(figures),
        "tokens/CPU s": f"{figures['tokens_per_cpu_second']:,.0f}",
        "page faults per step": f"{figures['page_faults_per_step']:,.0f}",
    }
    if figures["mfu"] is not None:
        rows["MFU, attention in full"] = f"{figures['mfu']:.1%}"
        rows["MFU, attention's causal half"] = f"{figures['mfu_causal']:.1%}"
    if "share_of_matmul" in figures:
        matmul = figures["matmul_flops_per_second"] / 1e9
        rows["share of a matmul's FLOP/s"] = f"{figures['share_of_matmul']:.1%} of {matmul:,.0f} GFLOP/s"
    parts = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in figures["seconds_of_it"].items())
    rows["seconds to the end of the first step"] = f"{figures['seconds_to_first_step']:.1f}: {parts}"
    if peer := figures.get("peer"):
        name = f"{peer['name']} {peer['transformers']}, torch {peer['torch']}"
        start, after = peer["loss_at_start"], peer["loss_after_a_step"]
        rows |= {
            f"tokens/s of {name}": rate(peer),
            "its own matmul": f"{peer['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s",
            "losses of the two": f"{start['own']:.5f} and {start['peer']:.5f}; after a step "
            f"{after['own']:.5f} and {after['peer']:.5f}",
            "speed ratio": "{median:.2f} ({min:.2f} to {max:.2f})".format(**peer["ratio"]),
            "speed ratio by CPU time": "{median:.2f} ({min:.2f} to {max:.2f})".format(**peer["ratio_of_cpu_time"]),
        }
    for name, value in rows.items():
        table.add_row(name, value)
    Console(width=120).print(table)
