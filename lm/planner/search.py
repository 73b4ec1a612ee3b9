"""Looks for the fastest setting of a run that fits a TPU slice.

Of all settings (`lm.planner.candidates`) those that cannot fit by arithmetic are left out, and the compiler is asked
about the most promising ones (`lm.planner.train_compile`, in processes of their own: `tools/plan.py`). What it says
corrects the arithmetic for settings alike, by a Gaussian process; next is the one that may be fastest (Srinivas et al.
2010, with those still running taken to be as expected: Desautels et al. 2014).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from lm.planner import topology
from lm.planner.candidates import Candidate, Guess, keeps_more

# How alike two settings are that differ in one thing (of `Candidate`, in order), in time and in memory; and how far off
# the arithmetic is taken to be: of the logarithm of time, and of memory in parts of the chip's.
_ALIKE_IN_TIME, _ALIKE_IN_MEMORY = np.array([0.6, 0.8, 0.8, 0.9, 0.6]), np.array([0.5, 0.7, 0.7, 0.9, 0.9])
_TIME_ERROR, _MEMORY_ERROR, _NOISE = 0.25, 0.15, 0.01


class Found(NamedTuple):
    """What is known of a candidate.

    Attributes:
      ms: of a step, as the plan estimates it; None where the step does not fit, or is not known yet.
      peak: bytes of a chip; where it does not fit, those it needs; 0 = unknown.
      fits: in the chip's memory.
      failed: the compiler said nothing of use.
      note: why it does not fit, or what failed.
      host: bytes of the host's memory that it takes for a chip.
    """

    ms: float | None
    peak: float
    fits: bool
    failed: bool = False
    note: str = ""
    host: float = 0.0


def read(figures: Mapping[str, Any]) -> Found:
    """Of the JSON that `tools/plan.py` writes."""
    host, of = float(figures.get("host_memory", 0)), float(figures.get("host_capacity", math.inf))
    if host > of:
        why = f" for {host / topology.GIB:,.1f} GiB of the host's memory, a chip's share being {of / topology.GIB:,.1f}"
        return Found(None, 0.0, False, note=why, host=host)
    if not figures.get("fits"):
        why = str(figures.get("why", "its peak is above the chip's memory")).splitlines()[0]
        return Found(None, float(figures.get("hbm_needed") or figures.get("hbm_peak") or 0), False, note=why)
    return Found(float(figures["estimated_step_ms"]), float(figures["hbm_peak"]), True, host=host)


def choose(
    candidates: Sequence[Candidate], guesses: Sequence[Guess], capacity: float, known: Mapping[int, Found | None]
) -> int | None:
    """Index of the candidate to compile next; None = none that is left can fit.

    Args:
      candidates: all of them.
      guesses: of each.
      capacity: bytes of a chip.
      known: index -> what is known of it; None = it is being compiled.
    """
    columns = zip(*candidates, strict=True)
    codes = np.array([np.unique([str(value) for value in column], return_inverse=True)[1] for column in columns]).T
    at_least, peak, ms = np.array(guesses).T
    unfit = [candidates[i] for i, each in known.items() if each and not each.fits and not each.failed]
    with_memory = {i: (each.peak - peak[i]) / capacity for i, each in known.items() if each and each.peak}
    with_time = {i: math.log(each.ms / ms[i]) for i, each in known.items() if each and each.ms}
    pending = [i for i, each in known.items() if each is None]
    more, unsure = _predict(codes, with_memory, _ALIKE_IN_MEMORY, _MEMORY_ERROR, pending)
    factor, unsure_ms = _predict(codes, with_time, _ALIKE_IN_TIME, _TIME_ERROR, pending)
    score = np.log(ms) + factor - unsure_ms
    score[(peak / capacity + more - unsure > 1) | (at_least > capacity)] = np.inf
    score[list(known)] = np.inf
    for index in np.argsort(score, kind="stable"):
        if np.isinf(score[index]):
            return None
        if not any(keeps_more(candidates[index], each) for each in unfit):
            return int(index)
    return None


def _predict(
    codes: Any, seen: Mapping[int, float], factors: Any, error: float, pending: Sequence[int]
) -> tuple[Any, Any]:
    """Mean and standard deviation of a Gaussian process of mean 0 at all rows of `codes`, after some were seen."""
    at = list(seen)

    def alike(rows: list[int]) -> Any:
        return np.prod(np.where(codes[:, None] == codes[rows][None], 1.0, factors), axis=-1)

    def spread(rows: list[int]) -> Any:
        return np.linalg.inv(alike(rows)[rows] + _NOISE * np.eye(len(rows)))

    mean = alike(at) @ (spread(at) @ np.array(list(seen.values()))) if at else np.zeros(len(codes))
    both = [*at, *(i for i in pending if i not in seen)]
    known = ((alike(both) @ spread(both)) * alike(both)).sum(axis=1) if both else 0.0
    return mean, error * np.sqrt(np.maximum(1.0 - known, 0.0) * np.ones(len(codes)))


def run(
    candidates: Sequence[Candidate],
    guesses: Sequence[Guess],
    capacity: float,
    measure: Callable[[Candidate], Found],
    *,
    compiles: int,
    workers: int,
    note: Callable[[int, Candidate, Found], None],
) -> dict[int, Found]:
    """Measures up to `compiles` candidates, `workers` of them at a time.

    What is chosen depends on results in the order of choosing, not of finishing, so that a search that is started
    again goes the same way, through results that `measure` remembers.

    Returns:
      Index -> what was found, in the order of choosing.
    """
    known: dict[int, Found | None] = {}
    running: list[tuple[int, Any]] = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                chosen = choose(candidates, guesses, capacity, known) if len(known) < compiles else None
                if chosen is not None:
                    known[chosen] = None
                    running.append((chosen, pool.submit(measure, candidates[chosen])))
                if len(running) == workers or (running and chosen is None):
                    index, future = running.pop(0)
                    known[index] = found = future.result()
                    note(sum(each is not None for each in known.values()), candidates[index], found)
                elif not running and chosen is None:
                    break
        finally:
            for _, future in running:
                future.cancel()
    return {index: found for index, found in known.items() if found is not None}


def frontier(found: Mapping[int, Found]) -> list[int]:
    """Those that fit and to which no other is at once faster and smaller, fastest first."""
    fitting = sorted((each.ms, each.peak, index) for index, each in found.items() if each.fits and each.ms)
    best, kept = math.inf, []
    for _, peak, index in fitting:
        if peak < best:
            best = peak
            kept.append(index)
    return kept


def _on_host(found: Found) -> str:
    return f", {found.host / topology.GIB:.2f} GiB in the host's memory" if found.host else ""


def flag_file(candidate: Candidate, found: Found, usual_flags: str) -> str:
    """A file for --flagfile that sets a candidate; what sets the compiler's flags, where it is not the usual, is said
    in a comment of it."""
    memory = f"{found.peak / topology.GIB:.2f} GiB at the peak{_on_host(found)}"
    lines = [f"# {candidate}: an estimated {found.ms:,.1f} ms a step, {memory}."]
    if candidate.flags != usual_flags:
        lines.append(f"# Needs the compiler's flags in the environment: LIBTPU_INIT_ARGS='{candidate.flags}'")
    return "\n".join([*lines, *(f"--config.{key}={value}" for key, value in candidate.overrides().items())]) + "\n"
