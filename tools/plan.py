"""Says what a run would cost on a TPU slice, before one is rented: compiles its step for it, with no TPU at hand.

    python tools/plan.py --config=configs/bench/v5e16_1b.py [--topology=v5e:4x4] [--slices=2] [--json=FILE] \
        [--dump_hlo=FILE] [--evaluation] [--libtpu_flags='--xla_...'] [--tokens=20e9 --dollars_per_chip_hour=1.2]
    python tools/plan.py --config=configs/bench/v5e16_1b.py --search [--compiles=20] [--workers=2] [--plot=FILE.png]

Needs the TPU compiler: pip install 'lm[tpu]'. Memory, FLOPs and communication are read off the compiled program; time
is a guess, see docs/performance.md. A step that does not fit is an answer too: its largest buffers, and exit status 3.

--search looks for the fastest mesh, remat policy, micro-batches, chunks of the loss and compiler flags that fit, the
batch unchanged (`lm/search.py`). Any of these that the command line sets (--config.mesh.tensor=1, --libtpu_flags=...)
is not searched. Results are kept in --cache: the same command again goes on. The winner goes to --winner, a file for
--flagfile.
"""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # recipes import `configs`, which is not installed

from lm import aot, chips, config, hlo, traffic
from lm import flags as lm_flags
from lm.schema import ConfigError

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


def main(argv: list[str]) -> None:
    """Turns flags into a plan, and an expected error into one clear message and exit status 1."""
    if len(argv) > 1 or _CONFIG.value is None:
        sys.exit("error: --config=configs/NAME.py is needed, and all options are --flag=value; --help explains them")
    try:
        check_flags()
        where = chips.topology(_TOPOLOGY.value or topology_of_recipe(), _SLICES.value)
        cfg = without_missing_start(config.build(_CONFIG.value))
        usual = lm_flags.libtpu(where.name.partition(":")[0], cfg.model.embed_dim)
        libtpu_flags = usual if _FLAGS.value is None else _FLAGS.value
        aot.prepare(libtpu_flags)
        if _SEARCH.value:
            look_for_the_best(cfg, where, usual)
            return
        print(f"compiling for {where.slices} x {where.name} ...", file=sys.stderr, flush=True)
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
        print(f"does not fit: {found.get('why', 'the peak is above the memory of a chip')}")
        sys.exit(3)


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


def planned(cfg: config.Config, where: chips.Topology, libtpu_flags: str) -> dict[str, Any]:
    """Figures of a step, or why it does not fit; of the cache, where the same program is there already."""
    lowered = aot.lower_step(cfg, where, evaluation=_EVALUATION.value)
    cache = Path(_CACHE.value, f"{aot.key(lowered, where, libtpu_flags)}.json") if _CACHE.value else None
    if cache and cache.exists() and not _HLO.value:
        try:
            return json.loads(cache.read_text(encoding="utf-8")) | {"from_cache": True}
        except ValueError:
            print(f"{cache} is damaged: compiling again", file=sys.stderr)
    try:
        compiled = aot.compile_step(lowered)
        write(_HLO.value, compiled.text)
        found = figures(lowered, compiled, where)
    except aot.DoesNotFit as answer:
        found = {"fits": False, "hbm_needed": answer.needed, "why": str(answer)}
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


def figures(lowered: aot.Lowered, compiled: aot.Compiled, where: chips.Topology) -> dict[str, Any]:
    """All that is known of a compiled step, as JSON takes it. Bytes and FLOPs are of one chip and one step."""
    program = hlo.parse(compiled.text)
    guess = aot.estimate(program, where)
    seconds = guess.total / 1e3
    memory = compiled.memory | {"peak": compiled.memory["peak"] + lowered.beside}
    found: dict[str, Any] = {
        "fits": memory["peak"] <= where.chip.hbm_bytes,
        "topology": where.name,
        "slices": where.slices,
        "chips": lowered.chips,
        "parameters": lowered.parameters,
        "trained_parameters": lowered.trained,
        "largest_replicated": {"bytes": lowered.largest_replicated[0], "path": lowered.largest_replicated[1]},
        "tokens_per_step": lowered.tokens,
        "hbm_capacity": where.chip.hbm_bytes,
        **{f"hbm_{name}": size for name, size in memory.items()},
        **{f"state_{name}": size for name, size in lowered.state.items()},
        "host_bytes_to_save": lowered.saved,
        "model_flops": lowered.model_flops,
        "hlo_flops": hlo.flops(program),
        "mesh": lowered.mesh,
        "collectives": traffic.in_table(traffic.collectives(program, lowered.mesh)),
        "compile_seconds": round(compiled.seconds, 1),
        "estimated_ms": {name: round(value, 2) for name, value in guess._asdict().items()},
        "estimated_step_ms": round(guess.total, 2),
    }
    if lowered.model_flops:
        found["model_over_hlo_flops"] = lowered.model_flops / found["hlo_flops"]
        found["estimated_mfu"] = lowered.model_flops / seconds / where.chip.peak_flops
    return found


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

    table = Table(show_header=False, title=f"{found['slices']} x {found['topology']}: {found['chips']} chips")

    def gib(key: str) -> str:
        return f"{found[key] / chips.GIB:,.2f} GiB"

    rows = {
        "parameters": f"{found['parameters']:,} ({found['trained_parameters']:,} trained)",
        "memory of a chip, peak": f"{gib('hbm_peak')} of {gib('hbm_capacity')}",
        "  arguments, temporaries": f"{gib('hbm_arguments')}, {gib('hbm_temporaries')}",
        **{f"  {key.removeprefix('state_')}": gib(key) for key in found if key.startswith("state_")},
        "largest array on every chip": "{bytes:,} bytes  {path}".format(**found["largest_replicated"]),
        "hosts' memory for a save": gib("host_bytes_to_save"),
        "FLOPs of a chip and step": f"{found['hlo_flops']:.4g}",
        **{name: f"{row['bytes'] / 1e9:,.3f} GB in {row['times']:,}" for name, row in found["collectives"].items()},
        "compile time": f"{found['compile_seconds']} s",
        "estimated step": f"{found['estimated_step_ms']:,} ms  "
        + ", ".join(f"{name} {value:,}" for name, value in found["estimated_ms"].items()),
    }
    if found["model_flops"]:
        rows["model FLOPs / compiled FLOPs"] = f"{found['model_over_hlo_flops']:.3f}"
        rows["estimated MFU"] = f"{found['estimated_mfu']:.1%}"
    if "estimated_hours" in found:
        dollars = f", ${found['estimated_dollars']:,.0f}" if "estimated_dollars" in found else ""
        rows["estimated for the tokens"] = f"{found['estimated_hours']:,.1f} h{dollars}"
    for name, value in rows.items():
        table.add_row(name, value)
    Console(width=140).print(table)


def look_for_the_best(cfg: config.Config, where: chips.Topology, usual: str) -> None:
    """Searches, with progress; prints what was found, and writes the winner.

    Raises:
      ConfigError: nothing that can be tried.
    """
    from lm import search, settings

    cache = Path(_CACHE.value or f"plans/{recipe_path().stem}")
    given = config_flags.get_override_values(flags.FLAGS["config"])
    pinned = [key for key in settings.KEYS if key in given]
    model = settings.sizes(cfg)
    sets = settings.flag_sets(where.name.partition(":")[0], model) if _FLAGS.value is None else [_FLAGS.value]
    candidates = settings.space(cfg, where, sets, pinned)
    guesses = [settings.guess(cfg, model, where, one) for one in candidates]
    fitting = sum(each.at_least <= where.chip.hbm_bytes for each in guesses)
    print(f"{len(candidates):,} settings, of which {fitting:,} may fit; compiling up to {_COMPILES.value}", flush=True)
    began = time.monotonic()

    def measure(one: settings.Candidate) -> search.Found:
        return compiled_elsewhere(one, cache)

    def note(number: int, one: settings.Candidate, found: search.Found) -> None:
        each = (time.monotonic() - began) / number
        left = f"at most {each * (_COMPILES.value - number) / 60:,.0f} min left"
        print(f"[{number}/{_COMPILES.value}] {in_words(found)}  {one}  ({left})", flush=True)

    found = search.run(
        candidates,
        guesses,
        where.chip.hbm_bytes,
        measure,
        compiles=_COMPILES.value,
        workers=_WORKERS.value,
        note=note,
    )
    best = search.frontier(found)
    report(candidates, found, best)
    failed = [each for each in found.values() if each.failed]
    if not best and failed:
        raise ConfigError(
            f"{len(failed)} of {len(found)} settings could not be compiled, no other fits: {failed[0].note}"
        )
    if not best:
        print(f"none of {len(found)} settings fits")
        sys.exit(3)
    winner = Path(_WINNER.value or cache / "winner.flags")
    write(str(winner), search.flag_file(candidates[best[0]], found[best[0]], usual))
    words = [f"--config={config_flags.get_config_filename(flags.FLAGS['config'])}"]
    words += [f"--config.{key}={value}" for key, value in given.items()]
    print(f"the fastest: python -m lm.main {shlex.join(words)} --flagfile={winner}")
    if _PLOT.value:
        plot(_PLOT.value, found, best, where)


def compiled_elsewhere(one: Any, cache: Path) -> Any:
    """What a process of its own says of a candidate: the compiler reads its flags once a process. It is given all that
    this one was; of a flag the last counts."""
    from lm import search

    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch, "plan.json")
        command = [sys.executable, __file__, *sys.argv[1:], "--nosearch", f"--cache={cache}", f"--json={answer}"]
        command += [f"--libtpu_flags={one.flags}", *(f"--config.{key}={v}" for key, v in one.overrides().items())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not answer.exists():
            said = (done.stderr.strip() or "nothing").splitlines()[-1]
            return search.Found(None, 0.0, False, failed=True, note=f"failed: {said}")
        return search.read(json.loads(answer.read_text(encoding="utf-8")))


def in_words(found: Any) -> str:
    """Time and memory of a candidate."""
    if found.failed:
        return found.note
    memory = f"{found.peak / chips.GIB:6.2f} GiB" if found.peak else " " * 10
    return f"{found.ms:8,.1f} ms {memory}" if found.fits else f"does not fit {memory}{'' if found.peak else found.note}"


def report(candidates: list[Any], found: dict[int, Any], best: list[int]) -> None:
    """All that was found, the fastest first; a star marks the frontier of memory against time."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="estimated time of a step and peak memory of a chip; * = none is faster and smaller")
    for name in ("", "found", "setting"):
        table.add_column(name)
    for index, each in sorted(found.items(), key=lambda item: item[1].ms or float("inf")):
        table.add_row("*" if index in best else "", in_words(each), str(candidates[index]))
    Console(width=140).print(table)


def plot(path: str, found: dict[int, Any], best: list[int], where: chips.Topology) -> None:
    """Memory against time, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    fitting = [each for each in found.values() if each.fits]
    axes.scatter([each.peak / chips.GIB for each in fitting], [each.ms for each in fitting], color="0.6")
    axes.plot([found[i].peak / chips.GIB for i in best], [found[i].ms for i in best], "o-", color="C0")
    axes.axvline(where.chip.hbm_bytes / chips.GIB, color="C3", linestyle="--")
    axes.set_xlabel("peak memory of a chip, GiB (dashed: all there is)")
    axes.set_ylabel("estimated step, ms")
    axes.set_title(f"{where.slices} x {where.name}: line = none is faster and smaller", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def write(path: str, text: str) -> None:
    """A file, where one is asked for."""
    if path:
        Path(path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app.run(main, flags_parser=lm_flags.parse)
