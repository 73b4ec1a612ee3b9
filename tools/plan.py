"""Says what a run would cost on a TPU slice, before one is rented: compiles its step for it, with no TPU at hand.

    python tools/plan.py --config=configs/bench/v5e16_1b.py [--topology=v5e:4x4] [--slices=2] [--json=FILE] \
        [--dump_hlo=FILE] [--evaluation] [--libtpu_flags='--xla_...'] [--tokens=20e9 --dollars_per_chip_hour=1.2]
    python tools/plan.py --config=configs/bench/v5e16_1b.py --search [--compiles=20] [--workers=2] [--plot=FILE.png]

Needs the TPU compiler: pip install -e '.[tpu]'. Memory, FLOPs and communication are read off the compiled program; time
is a guess, see docs/performance.md. A step that does not fit is an answer too: its largest buffers, and exit status 3.

--search looks for the fastest mesh, remat policy, micro-batches, chunks of the loss and compiler flags that fit, the
batch unchanged (`lm/planner/search.py`). What the command line sets of these (--config.mesh.tensor=1,
--libtpu_flags=...) is not searched. Results are kept in --cache: the same command again goes on. The winner goes to
--winner, a file for --flagfile.
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

from absl import app, flags
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # recipes import `configs`, which is not installed

from lm import config
from lm.config.schema import ConfigError
from lm.parallel import xla_flags as lm_flags
from lm.planner import collectives, hlo, topology, train_compile
from lm.tasks import build_config

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: configs/NAME.py, or configs/NAME.py:argument.")
_TOPOLOGY = flags.DEFINE_string("topology", "", "Slice, as v5e:4x4 or v5p:2x4x4; '' = TOPOLOGY of the recipe.")
_SLICES = flags.DEFINE_integer("slices", 1, "Slices, joined by the data-centre network.", lower_bound=1)
_EVALUATION = flags.DEFINE_bool("evaluation", False, "The step of an evaluation instead of training.")
_HLO = flags.DEFINE_string("dump_hlo", "", "Write the compiled program to this file.")
_JSON = flags.DEFINE_string("json", "", "Write all figures to this file.")
_FLAGS = flags.DEFINE_string("libtpu_flags", None, "For the compiler; default: those that training sets.")
_TOKENS = flags.DEFINE_float("tokens", 0.0, "Training tokens to price.", lower_bound=0.0)
_DOLLARS = flags.DEFINE_float("dollars_per_chip_hour", 0.0, "Price of a chip.", lower_bound=0.0)
_CACHE = flags.DEFINE_string("cache", "", "Folder of compiled results; search: '' = plans/ and the recipe's name.")
_SEARCH = flags.DEFINE_bool("search", False, "Look for the fastest setting that fits.")
_COMPILES = flags.DEFINE_integer("compiles", 20, "Search: candidates to compile, those in the cache included.", 1)
_WORKERS = flags.DEFINE_integer("workers", 2, "Search: compilers side by side, of some 3 GB each.", lower_bound=1)
_WINNER = flags.DEFINE_string("winner", "", "Search: file to write the winner to; '' = winner.flags in the cache.")
_PLOT = flags.DEFINE_string("plot", "", "Search: PNG to draw, memory against time.")


LEGEND = """Peak: the most that is alive at once, which not all temporaries are. Estimated are milliseconds of matrix \
products, of custom kernels (attention, experts), of other passes over memory, of what is waited for: communication \
(exposed; between slices) and copies to and from the host's memory (host); and of what goes on beside all that \
(hidden): docs/performance.md."""


def main(argv: list[str]) -> None:
    """Turns flags into a plan, and an expected error into one clear message and exit status 1."""
    if len(argv) > 1 or _CONFIG.value is None:
        sys.exit("error: --config=configs/NAME.py is needed, and all options are --flag=value; --help explains them")
    try:
        check_flags()
        where = topology.topology(_TOPOLOGY.value or topology_of_recipe(), _SLICES.value)
        cfg = without_missing_start(build_config(_CONFIG.value))
        usual = lm_flags.libtpu(where.name.partition(":")[0], cfg.model.embed_dim)
        libtpu_flags = usual if _FLAGS.value is None else _FLAGS.value
        train_compile.prepare(libtpu_flags)
        if _SEARCH.value:
            from tools import plan_search  # imports JAX, which reads then what was prepared

            plan_search.look_for_the_best(cfg, where, usual, Path(_CACHE.value or f"plans/{recipe_path().stem}"))
            return
        with said_each_half_minute(f"compiling for {where.slices} x {where.name}"):
            found = planned(cfg, where, libtpu_flags)
    except (ValueError, RuntimeError) as error:
        if type(error).__module__.startswith("lm."):
            sys.exit(f"error: {error}")
        raise
    if "why" not in found:
        price(found, _TOKENS.value, _DOLLARS.value)
    write(_JSON.value, json.dumps(found, indent=1))
    if "why" not in found:
        show(found)
    if not found["fits"]:
        print(f"does not fit: {found.get('why') or too_much(found)}")
        print("less memory: model.remat=full, more train.micro_batches, a loss.chunk_len, a finer mesh; see --search")
        sys.exit(3)


def too_much(found: dict[str, Any]) -> str:
    """Which memory a step that the compiler accepted has too little of."""
    where = [("hbm_peak", "hbm_capacity", "a chip"), ("host_memory", "host_capacity", "its host, of a chip's share")]
    return ", and ".join(
        f"{found[needs] / topology.GIB:,.1f} of {found[has] / topology.GIB:,.1f} GiB of the memory of {what}"
        for needs, has, what in where
        if found[needs] > found[has]
    )


@contextlib.contextmanager
def said_each_half_minute(what: str) -> Iterator[None]:
    """How long it has taken; the compiler does not say how far it is."""
    ended, began = threading.Event(), time.monotonic()

    def say() -> None:
        while True:
            print(f"{what}, {time.monotonic() - began:,.0f} s ...", file=sys.stderr, flush=True)
            if ended.wait(30):
                return

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def check_flags() -> None:
    """Refuses, before anything is compiled, flags that would be of no use and files that could not be written.

    Raises:
      ConfigError: naming the flag.
    """
    of_one = {"dump_hlo": _HLO.value, "json": _JSON.value, "tokens": _TOKENS.value}
    if _SEARCH.value and any(of_one.values()):
        given = ", ".join(f"--{name}" for name, value in of_one.items() if value)
        raise ConfigError(f"{given} with --search: expected without; plan the winner with its --flagfile for that")
    if _DOLLARS.value and not _TOKENS.value:
        raise ConfigError("--dollars_per_chip_hour without --tokens: expected the number of training tokens to price")
    for name, path in {
        "dump_hlo": _HLO.value,
        "json": _JSON.value,
        "winner": _WINNER.value,
        "plot": _PLOT.value,
    }.items():
        lm_flags.check_output(name, path)


def without_missing_start(cfg: config.Config) -> config.Config:
    """A config whose `init_from` is not there yet is planned without, and this is said: its cost is the same, if the
    vocabulary is."""
    from lm import checkpoint

    try:
        if cfg.init_from:
            checkpoint.choose(cfg.init_from)
    except checkpoint.CheckpointError as missing:
        size = cfg.tokenizer.vocab_size + cfg.tokenizer.extra_ids
        print(f"{missing}; planned without it, for a vocabulary of tokenizer.vocab_size={size:,}", file=sys.stderr)
        return dataclasses.replace(cfg, init_from="", data=dataclasses.replace(cfg.data, replay=0.0))
    return cfg


def planned(cfg: config.Config, where: topology.Topology, libtpu_flags: str) -> dict[str, Any]:
    """Figures of a step, or why it does not fit; of the cache, where the same program is there already."""
    lowered = train_compile.lower_step(cfg, where, evaluation=_EVALUATION.value)
    cache = Path(_CACHE.value, f"{train_compile.key(lowered, where, libtpu_flags)}.json") if _CACHE.value else None
    if cache and cache.exists() and not _HLO.value:
        try:
            return json.loads(cache.read_text(encoding="utf-8")) | {"from_cache": True}
        except ValueError:
            print(f"{cache} is damaged: compiling again", file=sys.stderr)
    try:
        compiled = train_compile.compile_step(lowered)
        write(_HLO.value, compiled.text)
        found = figures(lowered, compiled, where)
    except train_compile.DoesNotFit as answer:
        found = {"fits": False, "hbm_needed": answer.needed, "why": str(answer), **identity(lowered, where)}
    if cache:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}.tmp")
        write(str(partial), json.dumps(found, indent=1))
        partial.rename(cache)
    return found


def topology_of_recipe() -> str:
    """TOPOLOGY of the recipe's file.

    Raises:
      ConfigError: it has none.
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
    """File of --config."""
    return Path(config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0])


def figures(
    lowered: train_compile.Lowered, compiled: train_compile.Compiled, where: topology.Topology
) -> dict[str, Any]:
    """All that is known of a compiled step, as JSON takes it. Bytes and FLOPs are of one chip and one step."""
    program = hlo.parse(compiled.text)
    guess = train_compile.estimate(program, where, mesh=lowered.mesh, links=lowered.links, experts=lowered.experts)
    seconds = guess.total / 1e3
    memory = dict(compiled.memory)
    host = memory.pop("host")
    if host:  # then the peak is only known to be at most this, and the compiler accepts nothing larger than the chip's
        memory["peak"] = min(memory["peak"], where.chip.hbm_bytes)
    memory["peak"] += lowered.beside
    compiled_flops, not_counted = hlo.flops(program, lowered.experts), hlo.uncounted(program)
    found: dict[str, Any] = {
        "fits": memory["peak"] <= where.chip.hbm_bytes and host <= where.chip.host_bytes,
        **identity(lowered, where),
        "largest_replicated": {"bytes": lowered.largest_replicated[0], "path": lowered.largest_replicated[1]},
        **{f"hbm_{name}": size for name, size in memory.items()},
        "host_memory": host,
        **{f"state_{name}": size for name, size in lowered.state.items()},
        "host_bytes_to_save": lowered.saved,
        "host_copies": collectives.host_copies(program),
        "model_flops": lowered.model_flops,
        "model_flops_causal": lowered.model_flops_causal,
        "hlo_flops": compiled_flops,
        "not_counted": not_counted,
        "collectives": collectives.in_table(collectives.collectives(program, lowered.mesh)),
        "compile_seconds": round(compiled.seconds, 1),
        "estimated_ms": {name: round(value, 2) for name, value in guess._asdict().items()},
        "estimated_step_ms": round(guess.total, 2),
        "estimated_tokens_per_second_a_chip": lowered.tokens / lowered.chips / seconds,
    }
    if lowered.model_flops and lowered.model_flops_causal and not not_counted:
        train_compile.check_ratio(lowered, compiled_flops)
        found["model_over_hlo_flops"] = lowered.model_flops / compiled_flops
        found["estimated_mfu"] = lowered.model_flops / seconds / where.chip.peak_flops
        found["estimated_mfu_causal"] = lowered.model_flops_causal / seconds / where.chip.peak_flops
    return found


def identity(lowered: train_compile.Lowered, where: topology.Topology) -> dict[str, Any]:
    """What was compiled, for what."""
    return {
        "step": "evaluation" if _EVALUATION.value else "training",
        "topology": where.name,
        "slices": where.slices,
        "chips": lowered.chips,
        "mesh": lowered.mesh,
        "parameters": lowered.parameters,
        "trained_parameters": lowered.trained,
        "tokens_per_step": lowered.tokens,
        "hbm_capacity": where.chip.hbm_bytes,
        "host_capacity": where.chip.host_bytes,
    }


def price(found: dict[str, Any], tokens: float, dollars: float) -> None:
    """Adds hours and dollars for a number of training tokens."""
    if tokens:
        hours = tokens / found["tokens_per_step"] * found["estimated_step_ms"] / 3.6e6
        found["estimated_hours"] = hours
        if dollars:
            found["estimated_dollars"] = hours * found["chips"] * dollars


def show(found: dict[str, Any]) -> None:
    """The figures as a table."""
    from rich.console import Console
    from rich.table import Table

    title = f"a step of {found['step']} on {found['slices']} x {found['topology']}: {found['chips']} chips"
    table = Table(show_header=False, title=title, caption=LEGEND)

    offloads = bool(found["host_memory"])

    def gib(key: str) -> str:
        return f"{found[key] / topology.GIB:,.2f} GiB"

    copies = " and ".join(f"{size / 1e9:,.3f} GB" for size in found["host_copies"].values())
    rows = {
        "parameters": f"{found['parameters']:,} ({found['trained_parameters']:,} trained)",
        "memory of a chip, peak": f"{'at most ' if offloads else ''}{gib('hbm_peak')} of {gib('hbm_capacity')}",
        "  of it arguments": gib("hbm_arguments"),
        "  all temporaries": gib("hbm_temporaries"),
        **{f"  {key.removeprefix('state_')}": gib(key) for key in found if key.startswith("state_")},
        **(
            {"memory of its host, a chip's share": f"{gib('host_memory')} of {gib('host_capacity')}"}
            if offloads
            else {}
        ),
        "largest array on every chip": "{bytes:,} bytes  {path}".format(**found["largest_replicated"]),
        "hosts' memory for a save": gib("host_bytes_to_save"),
        "FLOPs of a chip and step": f"{found['hlo_flops']:.4g}",
        **{name: f"{row['bytes'] / 1e9:,.3f} GB in {row['times']:,}" for name, row in found["collectives"].items()},
        **({"copies to its host's memory, and back": copies} if offloads else {}),
        "compile time": f"{found['compile_seconds']} s",
        "estimated step": f"{found['estimated_step_ms']:,} ms  "
        + ", ".join(f"{name} {value:,}" for name, value in found["estimated_ms"].items()),
    }
    rows["estimated tokens/s a chip"] = f"{found['estimated_tokens_per_second_a_chip']:,.0f}"
    if "estimated_mfu" in found:
        rows["model FLOPs / compiled FLOPs"] = f"{found['model_over_hlo_flops']:.3f}"
        rows["estimated MFU, attention in full"] = f"{found['estimated_mfu']:.1%}"
        rows["  attention's causal half"] = f"{found['estimated_mfu_causal']:.1%}"
    if found["not_counted"]:
        calls = ", ".join(f"{name} ({times:,} times)" for name, times in found["not_counted"].items())
        rows["not counted"] = f"{calls}: FLOPs and time are more than is said here"
    if "estimated_hours" in found:
        dollars = f", ${found['estimated_dollars']:,.0f}" if "estimated_dollars" in found else ""
        rows["estimated for the tokens"] = f"{found['estimated_hours']:,.1f} h{dollars}"
    for name, value in rows.items():
        table.add_row(name, value)
    Console(width=140).print(table)


def write(path: str, text: str) -> None:
    """A file, where one is asked for."""
    if path:
        Path(path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app.run(main, flags_parser=lm_flags.parse)
