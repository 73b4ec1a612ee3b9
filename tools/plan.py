"""Plans a run on a TPU slice without a TPU: compiles its step, and reports memory, FLOPs, communication and time.

    python tools/plan.py --config=configs/bench/v5e16_1b.py [--topology=v5e:4x4] [--slices=2] [--json=FILE] \
        [--dump_hlo=FILE] [--evaluation] [--libtpu_flags='--xla_...'] [--tokens=20e9 --dollars_per_chip_hour=1.2]
    python tools/plan.py --config=configs/bench/v5e16_1b.py --search [--compiles=20] [--workers=2] [--plot=FILE.png]

Needs the TPU compiler: pip install -e '.[tpu]'. Memory, FLOPs and communication are those of the compiled program; the
time is an estimate, see docs/performance.md. For a step that does not fit, the plan lists its largest buffers and exits
with status 3.

--search looks for the fastest combination of mesh, remat policy, micro-batches, loss chunk and compiler flags that
fits, with the batch unchanged (`lm/planner/search.py`). Settings given on the command line (--config.mesh.tensor=1,
--libtpu_flags=...) stay fixed. Results are cached in --cache, so that the same command resumes a search. The fastest
setting is written to --winner, a file for --flagfile.
"""

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from lm import command_line, config
from lm.config.schema import ConfigError
from lm.parallel import xla_flags
from lm.planner import collectives, hlo, train_compile
from lm.planner import topology as topology_lib
from lm.planner.topology import GIB
from lm.terminal import say, stop, visible

_CONFIG = command_line.define_recipe()
_TOPOLOGY = flags.DEFINE_string("topology", "", "Slice, such as v5e:4x4 or v5p:2x4x4; '' = TOPOLOGY of the recipe.")
_SLICES = flags.DEFINE_integer("slices", 1, "Number of slices, connected by the data-centre network.", lower_bound=1)
_EVALUATION = flags.DEFINE_bool("evaluation", False, "Plan the evaluation step instead of the training step.")
_HLO = flags.DEFINE_string("dump_hlo", "", "Write the compiled program (HLO text) to this file.")
_JSON = flags.DEFINE_string("json", "", "Write all figures to this file.")
_FLAGS = flags.DEFINE_string("libtpu_flags", None, "Flags of the TPU compiler; default: those that training sets.")
_TOKENS = flags.DEFINE_float("tokens", 0.0, "Number of training tokens, for hours and price.", lower_bound=0.0)
_DOLLARS = flags.DEFINE_float("dollars_per_chip_hour", 0.0, "Price of a chip.", lower_bound=0.0)
_CACHE = flags.DEFINE_string("cache", "", "Folder that caches results; search: '' = plans/RECIPE.")
_SEARCH = flags.DEFINE_bool("search", False, "Search for the fastest setting that fits.")
_COMPILES = flags.DEFINE_integer("compiles", 20, "Search: candidates to compile, cached ones included.", 1)
_WORKERS = flags.DEFINE_integer("workers", 2, "Search: compiler processes at a time, about 3 GB each.", lower_bound=1)
_WINNER = flags.DEFINE_string("winner", "", "Search: file for the fastest setting; '' = winner.flags in the cache.")
_PLOT = flags.DEFINE_string("plot", "", "Search: write a plot of memory against time to this PNG.")


LEGEND = """Peak: the most memory that is alive at once; not all temporaries are alive together. The estimate, in \
milliseconds: matmul = matrix products; kernel = custom kernels (attention, experts); other = other passes over \
memory; exposed, between, host = waits for collectives inside a slice, for transfers between slices, and for copies \
to and from host memory; hidden = communication and copies that overlap with computation: docs/performance.md."""


def main(argv: list[str]) -> None:
    """Prints the plan of a step, or searches; exit status 3 where the step does not fit."""
    if len(argv) > 1 or _CONFIG.value is None:
        stop("error: --config=configs/NAME.py is needed, and all options are --flag=value; --help explains them")
    with command_line.one_line_errors():
        check_flags()
        from lm.tasks import build_config  # imports JAX

        topology = topology_lib.parse(_TOPOLOGY.value or topology_of_recipe(), _SLICES.value)
        cfg = without_missing_start(build_config(_CONFIG.value))
        usual_flags = xla_flags.libtpu(topology.name.partition(":")[0], cfg.model.embed_dim)
        libtpu_flags = usual_flags if _FLAGS.value is None else _FLAGS.value
        train_compile.prepare(libtpu_flags)
        if _SEARCH.value:
            search(cfg, topology, usual_flags)
            return
        with progress_every_half_minute(f"compiling for {topology.slices} x {topology.name}"):
            result = planned(cfg, topology, libtpu_flags)
    if "why" not in result:
        price(result, _TOKENS.value, _DOLLARS.value)
    write(_JSON.value, json.dumps(result, indent=1))
    if "why" not in result:
        show(result)
    if not result["fits"]:
        say(f"does not fit: {result.get('why') or exceeded(result)}")
        say("less memory: model.remat=full, more train.micro_batches, a loss.chunk_len, a finer mesh; see --search")
        sys.exit(3)


def search(cfg: config.Config, topology: topology_lib.Topology, usual_flags: str) -> None:
    """Searches and reports; exit status 3 if no setting fits."""
    from lm.planner import run_search

    fits = run_search.search(
        cfg,
        topology,
        usual_flags,
        run_search.Options(
            recipe=config_flags.get_config_filename(flags.FLAGS["config"]),
            overrides=config_flags.get_override_values(flags.FLAGS["config"]),
            libtpu_flags=_FLAGS.value,
            compiles=_COMPILES.value,
            workers=_WORKERS.value,
            cache=Path(_CACHE.value or f"plans/{recipe_path().stem}"),
            winner=_WINNER.value,
            plot=_PLOT.value,
        ),
    )
    if not fits:
        sys.exit(3)


def exceeded(result: dict[str, Any]) -> str:
    """Which memory is too small for a step that the compiler accepted."""
    memories = [
        ("hbm_peak", "hbm_capacity", "a chip's memory"),
        ("host_memory", "host_capacity", "a chip's share of its host's memory"),
    ]
    return ", and ".join(
        f"it needs {result[needed] / GIB:,.1f} GiB of {name}, which is {result[capacity] / GIB:,.1f} GiB"
        for needed, capacity, name in memories
        if result[needed] > result[capacity]
    )


@contextlib.contextmanager
def progress_every_half_minute(task: str) -> Iterator[None]:
    """Prints the elapsed time every 30 s; the compiler reports no progress."""
    ended, began = threading.Event(), time.monotonic()

    def report() -> None:
        while True:
            say(f"{task}, {time.monotonic() - began:,.0f} s ...", file=sys.stderr)
            if ended.wait(30):
                return

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def check_flags() -> None:
    """Refuses, before anything is compiled, flags that would have no effect and files that could not be written.

    Raises:
      ConfigError: naming the flag.
    """
    single_plan = {"dump_hlo": _HLO.value, "json": _JSON.value, "tokens": _TOKENS.value}
    if _SEARCH.value and any(single_plan.values()):
        given = ", ".join(f"--{name}" for name, value in single_plan.items() if value)
        raise ConfigError(f"{given} has no effect with --search: leave it out, and plan the winner with its --flagfile")
    if _DOLLARS.value and not _TOKENS.value:
        raise ConfigError("--dollars_per_chip_hour needs --tokens, the number of training tokens to price")
    for name, path in {
        "dump_hlo": _HLO.value,
        "json": _JSON.value,
        "winner": _WINNER.value,
        "plot": _PLOT.value,
    }.items():
        command_line.check_output(name, path)


def without_missing_start(cfg: config.Config) -> config.Config:
    """The config without its `init_from` if that run does not exist yet, with a note on stderr.

    The cost of a step is the same as long as the vocabulary is. A published model has to be there, as its shape is the
    run's.

    Raises:
      CheckpointError: `init_from` names a published model that cannot be read.
    """
    from lm import checkpoint
    from lm.checkpoint import hf, init_from

    try:
        if cfg.init_from:
            init_from.choose(cfg.init_from, cfg.model)
    except checkpoint.CheckpointError as missing:
        if cfg.init_from.startswith(hf.PREFIX):
            raise
        size = cfg.tokenizer.vocab_size + cfg.tokenizer.extra_ids
        say(f"{missing}; planned without it, for a vocabulary of tokenizer.vocab_size={size:,}", file=sys.stderr)
        return dataclasses.replace(cfg, init_from="", data=dataclasses.replace(cfg.data, replay=0.0))
    return cfg


def planned(cfg: config.Config, topology: topology_lib.Topology, libtpu_flags: str) -> dict[str, Any]:
    """Figures of a step, or why it does not fit; from the cache if the same program was compiled before."""
    lowered = train_compile.lower_step(cfg, topology, evaluation=_EVALUATION.value)
    cache = Path(_CACHE.value, f"{train_compile.key(lowered, topology, libtpu_flags)}.json") if _CACHE.value else None
    if cache and cache.exists() and not _HLO.value:
        try:
            return json.loads(cache.read_text(encoding="utf-8")) | {"from_cache": True}
        except (ValueError, TypeError, RecursionError):
            say(f"{cache} is damaged: compiling again", file=sys.stderr)
    try:
        compiled = train_compile.compile_step(lowered)
        write(_HLO.value, compiled.text)
        result = figures(lowered, compiled, topology)
    except train_compile.DoesNotFit as error:
        result = {"fits": False, "hbm_needed": error.needed, "why": str(error), **identity(lowered, topology)}
    if cache:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}.tmp")
        write(str(partial), json.dumps(result, indent=1))
        partial.rename(cache)
    return result


def topology_of_recipe() -> str:
    """The constant TOPOLOGY of the recipe's file.

    Raises:
      ConfigError: the recipe defines none.
    """
    import importlib.util

    path = recipe_path()
    spec = importlib.util.spec_from_file_location("recipe", path)
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    if not hasattr(recipe, "TOPOLOGY"):
        raise ConfigError(f"{path} has no TOPOLOGY: expected --topology=CHIP:AxB, such as v5e:4x4")
    return str(recipe.TOPOLOGY)


def recipe_path() -> Path:
    """The file named by --config."""
    return Path(config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0])


def figures(
    lowered: train_compile.Lowered, compiled: train_compile.Compiled, topology: topology_lib.Topology
) -> dict[str, Any]:
    """The figures of a compiled step, as JSON values. Bytes and FLOPs are per chip and step."""
    chip = topology.chip
    program = hlo.parse(compiled.text)
    estimate = train_compile.estimate(
        program, topology, mesh=lowered.mesh, links=lowered.links, experts=lowered.experts
    )
    seconds = estimate.total / 1e3
    memory = dict(compiled.memory)
    host = memory.pop("host")
    if host:  # the peak is then an upper bound, and the compiler accepts nothing larger than the chip's memory
        memory["peak"] = min(memory["peak"], chip.hbm_bytes)
    memory["peak"] += lowered.resident_bytes
    compiled_flops, not_counted = hlo.flops(program, lowered.experts), hlo.uncounted(program)
    result: dict[str, Any] = {
        "fits": memory["peak"] <= chip.hbm_bytes and host <= chip.host_bytes,
        **identity(lowered, topology),
        "largest_replicated": {"bytes": lowered.largest_replicated[0], "path": lowered.largest_replicated[1]},
        **{f"hbm_{name}": size for name, size in memory.items()},
        "host_memory": host,
        **{f"state_{name}": size for name, size in lowered.state.items()},
        "host_bytes_to_save": lowered.checkpoint_bytes,
        "host_copies": collectives.host_copies(program),
        "model_flops": lowered.model_flops,
        "model_flops_causal": lowered.model_flops_causal,
        "hlo_flops": compiled_flops,
        "not_counted": not_counted,
        "collectives": collectives.summarize(collectives.collectives(program, lowered.mesh)),
        "compile_seconds": round(compiled.seconds, 1),
        "estimated_ms": {name: round(value, 2) for name, value in estimate._asdict().items()},
        "estimated_step_ms": round(estimate.total, 2),
        "estimated_tokens_per_second_a_chip": lowered.tokens / lowered.chips / seconds,
    }
    if lowered.model_flops and lowered.model_flops_causal and not not_counted:
        train_compile.check_ratio(lowered, compiled_flops)
        result["model_over_hlo_flops"] = lowered.model_flops / compiled_flops
        result["estimated_mfu"] = lowered.model_flops / seconds / chip.peak_flops
        result["estimated_mfu_causal"] = lowered.model_flops_causal / seconds / chip.peak_flops
    return result


def identity(lowered: train_compile.Lowered, topology: topology_lib.Topology) -> dict[str, Any]:
    """Which step was compiled for which slices."""
    return {
        "step": "evaluation" if _EVALUATION.value else "training",
        "topology": topology.name,
        "slices": topology.slices,
        "chips": lowered.chips,
        "mesh": lowered.mesh,
        "parameters": lowered.parameters,
        "trained_parameters": lowered.trained,
        "tokens_per_step": lowered.tokens,
        "hbm_capacity": topology.chip.hbm_bytes,
        "host_capacity": topology.chip.host_bytes,
    }


def price(result: dict[str, Any], tokens: float, dollars: float) -> None:
    """Adds the estimated hours and dollars of a number of training tokens to `result`."""
    if tokens:
        hours = tokens / result["tokens_per_step"] * result["estimated_step_ms"] / 3.6e6
        result["estimated_hours"] = hours
        if dollars:
            result["estimated_dollars"] = hours * result["chips"] * dollars


def show(result: dict[str, Any]) -> None:
    """Prints the figures as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = f"a step of {result['step']} on {result['slices']} x {result['topology']}: {result['chips']} chips"
    table = Table(show_header=False, title=title, caption=LEGEND)

    offloads = bool(result["host_memory"])

    def gib(key: str) -> str:
        return f"{result[key] / GIB:,.2f} GiB"

    copies = " and ".join(f"{size / 1e9:,.3f} GB" for size in result["host_copies"].values())
    rows = {
        "parameters": f"{result['parameters']:,} ({result['trained_parameters']:,} trained)",
        "memory of a chip, peak": f"{'at most ' if offloads else ''}{gib('hbm_peak')} of {gib('hbm_capacity')}",
        "  of which arguments": gib("hbm_arguments"),
        "  all temporaries": gib("hbm_temporaries"),
        **{f"  {key.removeprefix('state_')}": gib(key) for key in result if key.startswith("state_")},
        **({"host memory, a chip's share": f"{gib('host_memory')} of {gib('host_capacity')}"} if offloads else {}),
        "largest array on every chip": "{bytes:,} bytes  {path}".format(**result["largest_replicated"]),
        "size of a checkpoint, all hosts": gib("host_bytes_to_save"),
        "FLOPs per chip and step": f"{result['hlo_flops']:.4g}",
        **{name: f"{row['bytes'] / 1e9:,.3f} GB in {row['times']:,}" for name, row in result["collectives"].items()},
        **({"copies to host memory, and back": copies} if offloads else {}),
        "compile time": f"{result['compile_seconds']} s",
        "estimated step": f"{result['estimated_step_ms']:,} ms  "
        + ", ".join(f"{name} {value:,}" for name, value in result["estimated_ms"].items()),
    }
    rows["estimated tokens/s a chip"] = f"{result['estimated_tokens_per_second_a_chip']:,.0f}"
    if "estimated_mfu" in result:
        rows["model FLOPs / compiled FLOPs"] = f"{result['model_over_hlo_flops']:.3f}"
        rows["estimated MFU, attention in full"] = f"{result['estimated_mfu']:.1%}"
        rows["  attention's causal half"] = f"{result['estimated_mfu_causal']:.1%}"
    if result["not_counted"]:
        calls = ", ".join(f"{name} ({times:,} times)" for name, times in result["not_counted"].items())
        rows["not counted"] = f"{calls}: FLOPs and time are higher than shown here"
    if "estimated_hours" in result:
        dollars = f", ${result['estimated_dollars']:,.0f}" if "estimated_dollars" in result else ""
        rows["estimated for the tokens"] = f"{result['estimated_hours']:,.1f} h{dollars}"
    for name, value in rows.items():
        table.add_row(Text(name), Text(visible(value)))
    Console(width=140).print(table)


def write(path: str, text: str) -> None:
    """Writes a file, unless `path` is empty."""
    if path:
        Path(path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    command_line.run(main)
