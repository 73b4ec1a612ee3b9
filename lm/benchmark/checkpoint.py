"""Saving and loading a checkpoint (`tools/bench.py --checkpoint`), side by side with Orbax alone.

The state has the parameters of a small Transformer and Adam's two moments, random, all in float32. Orbax alone saves
and loads the same arrays with its defaults: it checks nothing, and adds no metadata, no tokenizer and no retention. The
two alternate within each round, each time in another order, in the same process and on the same disk.
"""

import gc
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import checkpoint
from lm.config import CheckpointConfig, Config, schema
from lm.terminal import say

# Shares of the parameters, as in a model of 40 million: embedding, attention, MLP, norms.
_SHAPES = {
    "embed": (32_768, 512),
    "qkv": (8, 512, 1536),
    "out": (8, 512, 512),
    "up": (8, 512, 2048),
    "down": (8, 2048, 512),
    "norm": (17, 512),
}
FIGURES = ("save", "load", "blocked", "save_cpu", "load_cpu", "save_peak_megabytes", "load_peak_megabytes")


def measure(folder: Path, megabytes: int, rounds: int) -> dict[str, Any]:
    """Measures both.

    Args:
      folder: an empty folder on the disk to measure; the caller deletes it.
      megabytes: size of the state.
      rounds: timed rounds, after one that warms up.

    Returns:
      'own', 'orbax' -> medians of seconds and megabytes, see FIGURES; 'ratio' -> medians over the rounds of own /
      orbax; 'copy_seconds', of the state within the host; 'blocked_to_copy'.
    """
    state = make_state(megabytes)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    sides: dict[str, Callable[..., dict[str, float]]] = {"own": own, "orbax": orbax}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    copies = []
    for number in range(rounds + 1):
        for name in sorted(sides, reverse=number % 2 == 1):
            found[name].append(sides[name](folder / name, state, abstract))
            shutil.rmtree(folder / name)
            os.sync()
        copies.append(copy_seconds(state))
    found = {name: each[1:] for name, each in found.items()}
    copies = copies[1:]

    def median(values: Any) -> float:
        return statistics.median(values)

    return {
        **{side: {name: median(one[name] for one in found[side]) for name in FIGURES} for side in sides},
        "ratio": {
            name: median(a[name] / b[name] for a, b in zip(found["own"], found["orbax"], strict=True))
            for name in ("save", "load", "save_cpu", "load_cpu")
        },
        "copy_seconds": median(copies),
        "blocked_to_copy": median(a["blocked"] / copy for a, copy in zip(found["own"], copies, strict=True)),
        "megabytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6,
        "rounds": rounds,
    }


def make_state(megabytes: int) -> dict[str, Any]:
    """Parameters and two moments of about this size, on the default device."""
    rng = np.random.default_rng(0)
    scale = megabytes * 1e6 / (12 * sum(np.prod(shape) for shape in _SHAPES.values()))

    def one(shape: tuple[int, ...]) -> jax.Array:
        *rest, last = shape
        return jnp.asarray(rng.standard_normal((*rest, max(1, round(last * scale))), np.float32))

    return {part: {name: one(shape) for name, shape in _SHAPES.items()} for part in ("params", "mu", "nu")}


def own(folder: Path, state: Any, abstract: Any) -> dict[str, float]:
    """Seconds and peak memory of `lm.checkpoint`."""
    info = {"config": schema.to_dict(Config()), "tokenizer_hash": "", "data": {}}
    with checkpoint.Checkpoints(folder, CheckpointConfig()) as saves:
        figures = timed_save(lambda: saves.save(1, state, info, None), saves.wait)
    return figures | timed_load(lambda: checkpoint.load(checkpoint.choose(str(folder)), abstract))


def orbax(folder: Path, state: Any, abstract: Any) -> dict[str, float]:
    """Seconds and peak memory of Orbax alone."""
    from orbax.checkpoint import v1 as ocp

    with ocp.training.Checkpointer(folder) as saves:
        response: list[Any] = []
        figures = timed_save(
            lambda: response.append(saves.save_checkpointables_async(1, {"state": state})),
            lambda: response[0].result(),
        )
    return figures | timed_load(lambda: ocp.load_checkpointables(folder / "1", {"state": abstract}))


def timed_save(start: Callable[[], Any], wait: Callable[[], Any]) -> dict[str, float]:
    """'save' = seconds until it is on disk, 'blocked' = until `start` returns, 'save_cpu' = CPU time of all threads."""
    before, began, cpu = reset_peak(), time.perf_counter(), time.process_time()
    start()
    blocked = time.perf_counter() - began
    wait()
    return {
        "save": time.perf_counter() - began,
        "blocked": blocked,
        "save_cpu": time.process_time() - cpu,
        "save_peak_megabytes": peak_megabytes() - before,
    }


def timed_load(load: Callable[[], Any]) -> dict[str, float]:
    """'load' = seconds until all arrays are there, 'load_cpu' = CPU time of all threads."""
    before, began, cpu = reset_peak(), time.perf_counter(), time.process_time()
    state = jax.block_until_ready(load())
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    del state
    return {"load": seconds, "load_cpu": cpu, "load_peak_megabytes": peak_megabytes() - before}


def copy_seconds(state: Any) -> float:
    """Seconds that copying the state to the host takes."""
    began = time.perf_counter()
    copies = [np.array(leaf) for leaf in jax.tree.leaves(state)]
    seconds = time.perf_counter() - began
    del copies
    return seconds


def reset_peak() -> float:
    """Makes the peak of this process's memory the present value, and returns it (Linux; elsewhere NaN)."""
    gc.collect()
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    Path("/proc/self/clear_refs").write_text("5")
    return peak_megabytes()


def peak_megabytes() -> float:
    """The peak of this process's memory since `reset_peak` (Linux; elsewhere NaN)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM")), float("nan"))


def show(figures: dict[str, Any]) -> None:
    """Prints the figures as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "lm.checkpoint", "Orbax alone", "ratio of a round")
    lines = {"save": "save", "load": "load", "save_cpu": "save, CPU time", "load_cpu": "load, CPU time"}
    for name, text in lines.items():
        own, orbax = (f"{figures[side][name]:.2f} s" for side in ("own", "orbax"))
        table.add_row(text, own, orbax, f"{figures['ratio'][name]:.2f}")
    table.add_row("loop blocked", *(f"{figures[side]['blocked']:.3f} s" for side in ("own", "orbax")), "")
    for name in ("save", "load"):
        peaks = (f"+{figures[side][f'{name}_peak_megabytes']:,.0f} MB" for side in ("own", "orbax"))
        table.add_row(f"peak memory, {name}", *peaks, "")
    Console().print(table)
    say(
        f"{figures['megabytes']:,.0f} MB, medians of {figures['rounds']} rounds; copying the state to the host takes "
        f"{figures['copy_seconds']:.3f} s, a save blocks the loop for {figures['blocked_to_copy']:.2f} times that"
    )
