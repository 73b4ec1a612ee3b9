"""Says what a run would cost on a TPU slice, before one is rented: compiles its step for it, with no TPU at hand.

    python tools/plan.py --config=configs/bench/v5e16_1b.py [--topology=v5e:4x4] [--slices=2] [--json=FILE] \
        [--dump_hlo=FILE] [--evaluation] [--libtpu_flags='--xla_...'] [--tokens=20e9 --dollars_per_chip_hour=1.2]

Needs the TPU compiler: pip install 'lm[tpu]'. Memory, FLOPs and communication are read off the compiled program; time
is a guess, see docs/performance.md. A step that does not fit is an answer too: its largest buffers, and exit status 3.
"""

import json
import sys
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # recipes import `configs`, which is not installed

from lm import aot, config, hlo
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


def main(argv: list[str]) -> None:
    """Turns flags into a plan, and an expected error into one clear message and exit status 1."""
    if len(argv) > 1 or _CONFIG.value is None:
        sys.exit("error: --config=configs/NAME.py is needed, and all options are --flag=value; --help explains them")
    try:
        where = aot.topology(_TOPOLOGY.value or topology_of_recipe(), _SLICES.value)
        aot.prepare(lm_flags.libtpu(where.name.partition(":")[0]) if _FLAGS.value is None else _FLAGS.value)
        cfg = config.build(_CONFIG.value)
        print(f"compiling for {where.slices} x {where.name} ...", file=sys.stderr, flush=True)
        compiled = aot.compile_step(cfg, where, evaluation=_EVALUATION.value)
    except aot.DoesNotFit as answer:
        print(f"does not fit: {answer}")
        write(_JSON.value, json.dumps({"fits": False, "why": str(answer)}, indent=1))
        sys.exit(3)
    except ValueError as error:
        if type(error).__module__.startswith("lm."):
            sys.exit(f"error: {error}")
        raise
    write(_HLO.value, compiled.text)
    found = figures(compiled, where, _TOKENS.value, _DOLLARS.value)
    write(_JSON.value, json.dumps(found, indent=1))
    show(found)


def topology_of_recipe() -> str:
    """TOPOLOGY of the recipe's file.

    Raises:
      ConfigError: it has none.
    """
    import importlib.util

    path = Path(config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0])
    spec = importlib.util.spec_from_file_location("recipe", path)
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    if not hasattr(recipe, "TOPOLOGY"):
        raise ConfigError(f"{path} has no TOPOLOGY: expected --topology=CHIP:AxB, such as v5e:4x4")
    return str(recipe.TOPOLOGY)


def figures(compiled: aot.Compiled, where: aot.Topology, tokens: float, dollars: float) -> dict[str, Any]:
    """All that is known of a compiled step, as JSON takes it. Bytes and FLOPs are of one chip and one step."""
    program = hlo.parse(compiled.text)
    guess = aot.estimate(program, where)
    sent: dict[str, dict[str, Any]] = {}
    for each in hlo.collectives(program):
        how = "async" if each.is_async else "sync"
        row = sent.setdefault(f"{each.kind} {each.dtype} over {each.devices} {how}", {"times": 0, "bytes": 0})
        row["times"] += each.times
        row["bytes"] += each.times * each.bytes
    seconds = guess.total / 1e3
    found: dict[str, Any] = {
        "fits": compiled.memory["peak"] <= where.chip.hbm_bytes,
        "topology": where.name,
        "slices": where.slices,
        "chips": compiled.chips,
        "parameters": compiled.parameters,
        "trained_parameters": compiled.trained,
        "largest_replicated": {"bytes": compiled.largest_replicated[0], "path": compiled.largest_replicated[1]},
        "tokens_per_step": compiled.tokens,
        "hbm_capacity": where.chip.hbm_bytes,
        **{f"hbm_{name}": size for name, size in compiled.memory.items()},
        **{f"state_{name}": size for name, size in compiled.state.items()},
        "host_bytes_to_save": sum(compiled.state.values()) * compiled.chips,
        "model_flops": compiled.model_flops,
        "hlo_flops": hlo.flops(program),
        "collectives": sent,
        "compile_seconds": round(compiled.seconds, 1),
        "estimated_ms": {name: round(value, 2) for name, value in guess._asdict().items()},
        "estimated_step_ms": round(guess.total, 2),
    }
    if compiled.model_flops:
        found["model_over_hlo_flops"] = compiled.model_flops / found["hlo_flops"]
        found["estimated_mfu"] = compiled.model_flops / seconds / where.chip.peak_flops
    if tokens:
        hours = tokens / compiled.tokens * seconds / 3600
        found["estimated_hours"] = hours
        found["estimated_dollars"] = hours * compiled.chips * dollars
    return found


def show(found: dict[str, Any]) -> None:
    """The figures as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, title=f"{found['slices']} x {found['topology']}: {found['chips']} chips")

    def gib(key: str) -> str:
        return f"{found[key] / aot.GIB:,.2f} GiB"

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
        rows["estimated for the tokens"] = f"{found['estimated_hours']:,.1f} h, ${found['estimated_dollars']:,.0f}"
    for name, value in rows.items():
        table.add_row(name, value)
    Console(width=140).print(table)
    if not found["fits"]:
        print("does not fit: the peak is above the chip's memory")


def write(path: str, text: str) -> None:
    """A file, where one is asked for."""
    if path:
        Path(path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app.run(main, flags_parser=lm_flags.parse)
