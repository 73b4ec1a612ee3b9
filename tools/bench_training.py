"""What `tools/bench.py` measures of training: the project's own, and the same model in `transformers` beside it."""

# ruff: noqa: E402 (the clock starts before anything is imported)
import time

_BEGAN = time.perf_counter()

import functools
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
from lm.parallel import mesh as mesh_lib

# Losses of one batch in float32, by other sums: from the same weights, and after a step of the same optimizer.
AGREE_AT_START, AGREE_AFTER = 1e-5, 1e-4


class Disagree(RuntimeError):
    """The peer does not compute the same: what follows would compare two models."""


class Round(NamedTuple):
    """Seconds of wall time, and of CPU time over all threads of the process; pages that it took from the kernel."""

    wall: float
    cpu: float
    page_faults: int


class Training(NamedTuple):
    """The project's own training, compiled, its first step done.

    Attributes:
      advance: steps -> loss of the last of them; each call goes on.
      run: see `lm.run.Run`.
      start: parameters before the first step, on the host; None where no peer needs them.
      loss: of the first step.
      seconds: what the time to the first step went to.
    """

    advance: Callable[[int], float]
    run: Any
    start: Any
    loss: float
    seconds: dict[str, float]


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

    from lm import run as run_lib
    from tools import bench_peer

    if peer:
        cfg = run_lib.plan(cfg, None).cfg
        bench_peer.check(cfg, jax.default_backend())
    own = prepare(cfg, folder, keep_start=peer)
    cfg, device, devices = own.run.cfg, own.run.mesh.devices.flat[0], own.run.mesh.devices.size
    sides = {"own": own.advance}
    compared: dict[str, Any] = {}
    if peer:
        rates = map(float, map(jax.jit(own.run.program.optimizer.learning_rate), itertools.count()))
        batches, size = run_lib.train_batches(own.run), own.run.plan.tokenizer.vocab_size
        sides["peer"] = bench_peer.make(cfg, own.start, rates, batches, size, activation)
        compared = {"loss_at_start": agree(own.loss, sides["peer"](1), AGREE_AT_START)}
        compared["loss_after_a_step"] = agree(own.advance(1), sides["peer"](1), AGREE_AFTER)
    own.advance(2)  # caches, allocators
    steps = max(1, round(seconds / timed(own.advance, 1).wall))
    tokens = cfg.data.batch_size * cfg.data.seq_len * steps
    found: dict[str, list[Round]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, advance in sides.items():
            if peer:
                advance(1)  # not timed: it takes from the kernel what memory the other has given back
            found[name].append(timed(advance, steps))

    per_second = statistics.median(tokens / each.wall for each in found["own"])
    is_counted = own.run.plan.tokenizer is not None and run_lib.predicts_tokens(cfg)
    words = own.run.plan.tokenizer.vocab_size if is_counted else 0
    per_token = functools.partial(flops.train_flops_per_token, cfg.model, cfg.data.seq_len, words)
    full, causal = (per_token(causal_half=half) if is_counted else None for half in (False, True))
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
        **speeds(found["own"], tokens),
        "page_faults_per_step": statistics.median(each.page_faults for each in found["own"]) / steps,
        "seconds_to_first_step": sum(own.seconds.values()),
        "seconds_of_it": own.seconds,
        "model_flops_per_token": full,
        "mfu": flops.mfu(per_second, full, device.device_kind, devices),
        "mfu_causal": flops.mfu(per_second, causal, device.device_kind, devices),
    }
    if full and figures["mfu"] is None:  # no peak is known: beside what one large matrix product reaches
        ceiling = matmul_flops(jax_product)
        figures |= {"matmul_flops_per_second": ceiling, "share_of_matmul": per_second * full / ceiling}
    if peer:
        pairs = list(zip(found["own"], found["peer"], strict=True))
        compared |= {"name": "transformers", "activation": activation, **bench_peer.about()}
        compared |= {**speeds(found["peer"], tokens), "matmul_flops_per_second": matmul_flops(bench_peer.product)}
        compared["ratio"] = spread([theirs.wall / ours.wall for ours, theirs in pairs])
        compared["ratio_of_cpu_time"] = spread([theirs.cpu / ours.cpu for ours, theirs in pairs])
        figures["peer"] = compared
    return figures


def prepare(cfg: Config, folder: Path, *, keep_start: bool) -> Training:
    """Everything up to the end of the first step, as `lm.train` does it."""
    import jax

    from lm import program
    from lm import run as run_lib
    from lm.checkpoint import init_from

    times = [_BEGAN, time.perf_counter()]
    planned = run_lib.plan(cfg, None)
    mesh = mesh_lib.make_mesh(planned.cfg.mesh)
    run = run_lib.prepare(planned, folder, mesh, lambda _: None)
    times.append(time.perf_counter())
    with jax.set_mesh(mesh):
        shape = program.abstract_batch(run.cfg, mesh, run.cfg.data.batch_size)
        train_step = run.program.train_step.lower(run.program.abstract_state, shape).compile()
        times.append(time.perf_counter())
        params, _ = init_from.initialize(
            run.program.model, run.program.abstract_state.params, run.cfg.seed, planned.init, planned.origin_of
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
    """Both losses.

    Raises:
      Disagree: they differ by more than `tolerance`, relative.
    """
    if not abs(own - peer) <= tolerance * abs(own):
        raise Disagree(f"the peer does not compute the same: loss {own:.6f} here and {peer:.6f} there on one batch")
    return {"own": own, "peer": peer}


def timed(advance: Callable[[int], float], steps: int) -> Round:
    """One round."""
    wall, cpu, faults = time.perf_counter(), time.process_time(), page_faults()
    advance(steps)
    return Round(time.perf_counter() - wall, time.process_time() - cpu, page_faults() - faults)


def page_faults() -> int:
    """Of this process so far, without those that read a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


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


def jax_product(size: int) -> Callable[[], Any]:
    """Multiplies two float32 [size, size] by JAX at each call."""
    import jax

    square = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(lambda x: x @ x)
    return lambda: product(square).block_until_ready()


def matmul_flops(make_product: Callable[[int], Callable[[], Any]], size: int = 2048) -> float:
    """FLOP/s of one product of two float32 [size, size], the best of eight."""
    product = make_product(size)
    product()
    times = []
    for _ in range(8):
        began = time.perf_counter()
        product()
        times.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(times)


def processor() -> str:
    """Name of the CPU, as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def show(found: dict[str, Any]) -> None:
    """The figures as a table."""
    from rich.console import Console
    from rich.table import Table

    device = f"{found['devices']} x {found['device']}, {found['cores']} cores, {found['processor']}"
    table = Table(show_header=False, title=device)

    def rate(figures: dict[str, Any]) -> str:
        each = figures["tokens_per_second_spread"]
        return f"{each['median']:,.0f} ({each['min']:,.0f} to {each['max']:,.0f})"

    rows = {
        "parameters": f"{found['parameters']:,}",
        "timed": f"{found['rounds']} rounds of {found['steps_per_round']} steps of {found['tokens_per_step']:,} tokens",
        "tokens/s": rate(found),
        "tokens/s of CPU time": f"{found['tokens_per_cpu_second']:,.0f}",
        "page faults a step": f"{found['page_faults_per_step']:,.0f}",
    }
    if found["mfu"] is not None:
        rows["MFU, attention in full"] = f"{found['mfu']:.1%}"
        rows["  attention's causal half"] = f"{found['mfu_causal']:.1%}"
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
            "its own matmul": f"{peer['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s",
            "losses of the two": f"{start['own']:.5f} and {start['peer']:.5f}; after a step "
            f"{after['own']:.5f} and {after['peer']:.5f}",
            "times as fast": "{median:.2f} ({min:.2f} to {max:.2f})".format(**peer["ratio"]),
            "the same in CPU time": "{median:.2f} ({min:.2f} to {max:.2f})".format(**peer["ratio_of_cpu_time"]),
        }
    for name, value in rows.items():
        table.add_row(name, value)
    Console(width=120).print(table)
