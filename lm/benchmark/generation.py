"""Speed of generating text (`tools/bench.py --generate`), and of `transformers` with the same weights beside it."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lm.benchmark import training
from lm.config import Config
from lm.config.schema import ConfigError

ROWS = (1, 16)  # batch sizes
PROMPT, NEW = 64, 128  # ids


def measure(cfg: Config, rounds: int, *, peer: bool = False, activation: str = "gelu_new") -> dict[str, Any]:
    """Measures greedy decoding of `NEW` ids after prompts of `PROMPT` ids, drawn at random, from initial weights.

    Args:
      cfg: from `lm.config.build`, of a decoder.
      rounds: number of timed calls for each batch size.
      peer: whether to alternate with `generate` of `transformers`.
      activation: of the peer's MLP.

    Raises:
      ConfigError: the model does not generate, its positions do not suffice, or it is not one of the peer.
      Disagree: the two do not generate the same ids.
    """
    import jax

    from lm import run as run_lib
    from lm.benchmark import transformers_gpt2
    from lm.decoding import sampling
    from lm.parallel import mesh as mesh_lib

    generate = dataclasses.replace(cfg.generate, max_new_tokens=NEW, min_new_tokens=NEW, temperature=0.0, stop=())
    planned = run_lib.plan(dataclasses.replace(cfg, generate=generate), None)
    if planned.cfg.model.kind != "decoder":
        raise ConfigError(f"--generate measures a decoder, and 'model.kind' is {planned.cfg.model.kind}")
    if peer:
        transformers_gpt2.check(planned.cfg, jax.default_backend())
    run = run_lib.prepare(planned, mesh_lib.make_mesh(planned.cfg.mesh), lambda _: None)
    cfg, model, tokenizer = run.cfg, run.program.model, run.plan.tokenizer
    assert tokenizer is not None  # a decoder's task has one
    params = jax.jit(model.init)(jax.random.key(cfg.seed))
    allowed_V = sampling.allowed_ids(tokenizer, cfg)
    device = jax.devices()[0]
    figures: dict[str, Any] = {
        "device": device.device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": training.processor(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "prompt": PROMPT,
        "new": NEW,
        "rounds": rounds,
        "rows": {},
    }
    sides: dict[str, Callable[[Sequence[Sequence[int]]], list[list[int]]]] = {
        "own": lambda prompts: [
            each.ids for each in sampling.sample(model, params, prompts, jax.random.key(0), cfg, tokenizer)
        ]
    }
    if peer:
        theirs = transformers_gpt2.gpt2(cfg, jax.device_get(params), tokenizer.vocab_size, activation)
        stop = sampling.stop_ids(tokenizer, cfg)
        sides["peer"] = transformers_gpt2.generator(theirs, NEW, stop, np.flatnonzero(~np.asarray(allowed_V)).tolist())
        figures["peer"] = {"name": "transformers", **transformers_gpt2.about()}
    text_ids = np.setdiff1d(np.flatnonzero(allowed_V), list(sampling.stop_ids(tokenizer, cfg)))
    for rows in ROWS:
        prompts = np.random.default_rng(0).choice(text_ids, (rows, PROMPT)).tolist()
        figures["rows"][rows] = _compare(sides, prompts, rounds)
    return figures


def _compare(sides: Any, prompts: Sequence[Sequence[int]], rounds: int) -> dict[str, Any]:
    """Figures of each side for one batch of prompts, and the ratios of their times."""
    first, ids = {}, {}
    for name, generate in sides.items():
        began = time.perf_counter()
        ids[name] = generate(prompts)
        first[name] = time.perf_counter() - began
    if differ := [n for n, row in enumerate(ids["own"]) if row != ids.get("peer", ids["own"])[n]]:
        raise training.Disagree(f"the peer does not generate the same ids for {len(differ)} of {len(prompts)} prompts")
    timings: dict[str, list[training.Round]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, generate in sides.items():
            timings[name].append(training.timed(functools.partial(_call, generate, prompts), 1))
    tokens = len(prompts) * NEW
    found: dict[str, Any] = {
        name: {**training.speeds(timings[name], tokens), "seconds_of_first_call": first[name]} for name in sides
    }
    if "peer" in sides:
        pairs = list(zip(timings["own"], timings["peer"], strict=True))
        found["ratio"] = training.spread([theirs.wall / ours.wall for ours, theirs in pairs])
        found["ratio_of_cpu_time"] = training.spread([theirs.cpu / ours.cpu for ours, theirs in pairs])
    return found


def _call(generate: Any, prompts: Sequence[Sequence[int]], times: int) -> None:
    for _ in range(times):
        generate(prompts)


def show(figures: dict[str, Any]) -> None:
    """Prints the figures as a table."""
    from rich.console import Console
    from rich.table import Table

    title = "{device}, {cores} cores, {processor}; {parameters:,} parameters; {prompt} + {new} ids".format(**figures)
    peer = figures.get("peer")
    table = Table(title=title)
    beside = (f"{peer['name']} {peer['transformers']}", "ratio", "its first call, s") if peer else ()
    for name in ("rows", "tokens/s", "first call, s", *beside):
        table.add_column(name, justify="right")
    for rows, found in figures["rows"].items():
        cells = [f"{found['own']['tokens_per_second']:,.0f}", f"{found['own']['seconds_of_first_call']:.1f}"]
        if peer:
            theirs, ratio = found["peer"], "{median:.2f} ({min:.2f} to {max:.2f})".format(**found["ratio"])
            cells += [f"{theirs['tokens_per_second']:,.0f}", ratio, f"{theirs['seconds_of_first_call']:.1f}"]
        table.add_row(str(rows), *cells)
    Console(width=120).print(table)
