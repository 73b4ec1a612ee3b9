"""The --search of tools/plan.py, whose flags it reads: compiles settings in processes of their own, side by side."""

import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from lm import config
from lm.config.schema import ConfigError
from lm.planner import candidates as settings
from lm.planner import search, topology


def look_for_the_best(cfg: config.Config, where: topology.Topology, usual: str, cache: Path) -> None:
    """Searches, with progress; prints what was found, and writes the winner. `usual`: flags of the compiler.

    Raises:
      ConfigError: nothing that can be tried.
    """
    asked = flags.FLAGS
    given = config_flags.get_override_values(flags.FLAGS["config"])
    pinned = [key for key in settings.KEYS if key in given]
    model = settings.sizes(cfg)
    chip = where.name.partition(":")[0]
    sets = settings.flag_sets(chip, model) if asked.libtpu_flags is None else [asked.libtpu_flags]
    candidates = settings.space(cfg, where, sets, pinned)
    guesses = [settings.guess(cfg, model, where, one) for one in candidates]
    fitting = sum(each.at_least <= where.chip.hbm_bytes for each in guesses)
    print(f"{len(candidates):,} settings, of which {fitting:,} may fit; compiling up to {asked.compiles}", flush=True)
    took: list[float] = []

    def measure(one: settings.Candidate) -> search.Found:
        began = time.monotonic()
        found = compiled_elsewhere(one, cache)
        took.append(time.monotonic() - began)
        return found

    def note(number: int, one: settings.Candidate, found: search.Found) -> None:
        left = max(took) / 60 * (asked.compiles - number) / asked.workers
        print(f"[{number}/{asked.compiles}] {in_words(found)}  {one}  (at most {left:,.0f} min left)", flush=True)

    found = search.run(
        candidates,
        guesses,
        where.chip.hbm_bytes,
        measure,
        compiles=asked.compiles,
        workers=asked.workers,
        note=note,
    )
    own = settings.own(cfg, candidates)
    if own is not None and own not in found:
        found[own] = measure(candidates[own])
        print(f"the recipe's own: {in_words(found[own])}  {candidates[own]}", flush=True)
    best = search.frontier(found)
    report(candidates, found, best, own)
    failed = [each for each in found.values() if each.failed]
    if not best and failed:
        raise ConfigError(
            f"{len(failed)} of {len(found)} settings could not be compiled, no other fits: {failed[0].note}"
        )
    if not best:
        print(f"none of {len(found)} settings fits")
        sys.exit(3)
    winner = Path(asked.winner or cache / "winner.flags")
    winner.write_text(search.flag_file(candidates[best[0]], found[best[0]], usual), encoding="utf-8")
    words = [f"--config={config_flags.get_config_filename(flags.FLAGS['config'])}"]
    words += [f"--config.{key}={value}" for key, value in given.items()] + [f"--flagfile={winner}"]
    needs = candidates[best[0]].flags
    before = "" if needs == usual else f"LIBTPU_INIT_ARGS={shlex.quote(needs)} "
    print(f"the fastest: {before}python -m lm.main {shlex.join(words)} --workdir=DIR")
    if asked.plot:
        plot(asked.plot, found, best, where)


def compiled_elsewhere(one: Any, cache: Path) -> Any:
    """What a process of its own says of a candidate: the compiler reads its flags once a process. It is given all that
    this one was; of a flag the last counts."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch, "plan.json")
        command = [sys.executable, sys.argv[0], *sys.argv[1:], "--nosearch", f"--cache={cache}", f"--json={answer}"]
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
    memory = f"{found.peak / topology.GIB:6.2f} GiB" if found.peak else " " * 10
    memory += f" and {found.host / topology.GIB:.2f} of the host's" if found.fits and found.host else ""
    return f"{found.ms:8,.1f} ms {memory}" if found.fits else f"does not fit {memory}{'' if found.peak else found.note}"


def report(candidates: list[Any], found: dict[int, Any], best: list[int], own: int | None) -> None:
    """All that was found, the fastest first; a star marks the frontier of memory against time. `own`: the recipe's."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="estimated time of a step and peak memory of a chip; * = none is faster and smaller")
    for name in ("", "found", "setting"):
        table.add_column(name)
    for index, each in sorted(found.items(), key=lambda item: item[1].ms or float("inf")):
        setting = f"{candidates[index]}{' (the recipe)' if index == own else ''}"
        table.add_row("*" if index in best else "", in_words(each), setting)
    Console(width=140).print(table)


def plot(path: str, found: dict[int, Any], best: list[int], where: topology.Topology) -> None:
    """Memory against time, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    fitting = [each for each in found.values() if each.fits]
    axes.scatter([each.peak / topology.GIB for each in fitting], [each.ms for each in fitting], color="0.6")
    axes.plot([found[i].peak / topology.GIB for i in best], [found[i].ms for i in best], "o-", color="C0")
    axes.axvline(where.chip.hbm_bytes / topology.GIB, color="C3", linestyle="--")
    axes.set_xlabel("peak memory of a chip, GiB (dashed: all there is)")
    axes.set_ylabel("estimated step, ms")
    axes.set_title(f"{where.slices} x {where.name}: line = none is faster and smaller", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
