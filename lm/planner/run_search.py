"""`tools/plan.py --search`: compiles candidates in processes of their own, reports them, and writes the fastest."""

import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from lm.config import Config
from lm.config.schema import ConfigError
from lm.planner import candidates as candidates_lib
from lm.planner import search as search_lib
from lm.planner.candidates import Candidate
from lm.planner.search import Result
from lm.planner.topology import GIB, Topology
from lm.terminal import say, visible


class Options(NamedTuple):
    """What the command line says of a search.

    Attributes:
      recipe: file of --config.
      overrides: config key -> value given on the command line; these are not searched.
      libtpu_flags: the only flags of the TPU compiler to try; None = search over sets of flags.
      compiles: candidates to compile, cached ones included.
      workers: compiler processes at a time.
      cache: folder of compiled results.
      winner: file for the fastest setting; '' = winner.flags in the cache.
      plot: PNG of memory against time; '' = none.
    """

    recipe: str
    overrides: dict[str, Any]
    libtpu_flags: str | None
    compiles: int
    workers: int
    cache: Path
    winner: str
    plot: str


def search(cfg: Config, topology: Topology, usual_flags: str, options: Options) -> bool:
    """Searches and prints progress and results; writes the fastest setting. Returns whether any setting fits.

    Args:
      cfg: from `lm.config.build`.
      topology: the slices.
      usual_flags: flags of the TPU compiler that training sets by itself.
      options: see `Options`.

    Raises:
      ConfigError: there is no candidate, or no candidate fits and some could not be compiled.
    """
    pinned = [key for key in candidates_lib.KEYS if key in options.overrides]
    model = candidates_lib.model_sizes(cfg)
    chip = topology.name.partition(":")[0]
    flag_sets = candidates_lib.flag_sets(chip, model) if options.libtpu_flags is None else [options.libtpu_flags]
    candidates = candidates_lib.search_space(cfg, topology, flag_sets, pinned)
    guesses = [candidates_lib.guess(cfg, model, topology, candidate) for candidate in candidates]
    may_fit = sum(guess.at_least <= topology.chip.hbm_bytes for guess in guesses)
    say(f"{len(candidates):,} settings, of which {may_fit:,} may fit; compiling up to {options.compiles}")
    durations: list[float] = []

    def measure(candidate: Candidate) -> Result:
        began = time.monotonic()
        result = compile_in_process(candidate, options.cache)
        durations.append(time.monotonic() - began)
        return result

    def progress(number: int, candidate: Candidate, result: Result) -> None:
        minutes = max(durations) / 60 * (options.compiles - number) / options.workers
        count = f"[{number}/{options.compiles}]"
        say(f"{count} {format_result(result)}  {candidate}  (at most {minutes:,.0f} min left)")

    results = search_lib.run(
        candidates,
        guesses,
        topology.chip.hbm_bytes,
        measure,
        compiles=options.compiles,
        workers=options.workers,
        progress=progress,
    )
    recipe = candidates_lib.index_of_config(cfg, candidates)
    if recipe is not None and recipe not in results:
        results[recipe] = measure(candidates[recipe])
        say(f"the recipe's own setting: {format_result(results[recipe])}  {candidates[recipe]}")
    frontier = search_lib.pareto_frontier(results)
    report(candidates, results, frontier, recipe)
    failed = [result for result in results.values() if result.failed]
    if not frontier and failed:
        raise ConfigError(
            f"no setting fits, and {len(failed)} of {len(results)} could not be compiled; the first: {failed[0].note}"
        )
    if not frontier:
        say(f"none of {len(results)} settings fits")
        return False
    fastest = candidates[frontier[0]]
    winner = Path(options.winner or options.cache / "winner.flags")
    winner.write_text(search_lib.flag_file(fastest, results[frontier[0]], usual_flags), encoding="utf-8")
    arguments = [f"--config={options.recipe}", *(f"--config.{key}={value}" for key, value in options.overrides.items())]
    environment = "" if fastest.flags == usual_flags else f"LIBTPU_INIT_ARGS={shlex.quote(fastest.flags)} "
    command = shlex.join([*arguments, f"--flagfile={winner}"])
    say(f"the fastest: {environment}python -m lm.main {command} --workdir=DIR")
    if options.plot:
        plot(options.plot, results, frontier, topology)
    return True


def compile_in_process(candidate: Candidate, cache: Path) -> Result:
    """Plans a candidate by this same command in a new process, because the compiler reads its flags once a process.

    The new process gets all flags of this one; where a flag is given twice, the last value counts.
    """
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch, "plan.json")
        command = [sys.executable, *sys.orig_argv[1:], "--nosearch", f"--cache={cache}", f"--json={answer}"]
        command += [f"--libtpu_flags={candidate.flags}"]
        command += [f"--config.{key}={value}" for key, value in candidate.overrides().items()]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if not answer.exists():
            message = (process.stderr.strip() or "no message").splitlines()[-1]
            return Result(None, 0.0, False, failed=True, note=f"failed: {message}")
        return search_lib.parse_result(json.loads(answer.read_text(encoding="utf-8")))


def format_result(result: Result) -> str:
    """Time and memory of a candidate, or why there is neither."""
    if result.failed:
        return result.note
    memory = f"{result.peak / GIB:6.2f} GiB" if result.peak else " " * 10
    if not result.fits:
        return f"does not fit {memory}{'' if result.peak else result.note}"
    host = f" and {result.host / GIB:.2f} of the host's" if result.host else ""
    return f"{result.ms:8,.1f} ms {memory}{host}"


def report(candidates: list[Candidate], results: dict[int, Result], frontier: list[int], recipe: int | None) -> None:
    """Prints all results, fastest first, with a star at the Pareto frontier. `recipe`: index of its own setting."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="estimated step time and peak memory per chip; * = no other setting is faster and smaller")
    for name in ("", "result", "setting"):
        table.add_column(name)
    for index, result in sorted(results.items(), key=lambda item: item[1].ms or float("inf")):
        setting = f"{candidates[index]}{' (the recipe)' if index == recipe else ''}"
        table.add_row("*" if index in frontier else "", Text(visible(format_result(result))), setting)
    Console(width=140).print(table)


def plot(path: str, results: dict[int, Result], frontier: list[int], topology: Topology) -> None:
    """Writes a plot of memory against time, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    fitting = [result for result in results.values() if result.fits and result.ms]
    axes.scatter([result.peak / GIB for result in fitting], [result.ms or 0 for result in fitting], color="0.6")
    best = [results[i] for i in frontier]
    axes.plot([result.peak / GIB for result in best], [result.ms or 0 for result in best], "o-", color="C0")
    axes.axvline(topology.chip.hbm_bytes / GIB, color="C3", linestyle="--")
    axes.set_xlabel("peak memory of a chip, GiB (dashed: capacity)")
    axes.set_ylabel("estimated step, ms")
    axes.set_title(f"{topology.slices} x {topology.name}: line = Pareto frontier", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
