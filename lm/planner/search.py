"""Looks for the fastest setting of a run that fits a TPU slice.

Candidates (`lm.planner.candidates`) that cannot fit by arithmetic are left out; the most promising others are compiled
(`lm.planner.train_compile`, in processes of their own: `lm.planner.run_search`). A Gaussian process models by how much
the compiled results differ from the arithmetic. The next candidate is the one with the best lower confidence bound of
the time (GP-UCB, Srinivas et al. 2010); for candidates that are still compiling the posterior mean stands in for the
result (GP-BUCB, Desautels et al. 2014).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from lm.planner.candidates import Candidate, Guess, needs_no_less_memory
from lm.planner.topology import GIB

# The kernel: correlation of the errors of two candidates that differ in one field of `Candidate`, in order, for time
# and for memory; the factors of all fields that differ are multiplied.
_TIME_CORRELATION, _MEMORY_CORRELATION = np.array([0.6, 0.8, 0.8, 0.9, 0.6]), np.array([0.5, 0.7, 0.7, 0.9, 0.9])
# Prior standard deviation of the arithmetic's error: in log time, and in memory as a share of the chip's; noise
# variance.
_TIME_ERROR, _MEMORY_ERROR, _NOISE = 0.25, 0.15, 0.01


class Result(NamedTuple):
    """What the compiler says of a candidate.

    Attributes:
      ms: estimated time of a step; None if the step does not fit or failed to compile.
      peak: peak bytes of a chip; if the step does not fit, the bytes it needs; 0 = unknown.
      fits: whether the step fits the chip's memory.
      failed: whether the compilation failed for another reason than memory.
      note: why it does not fit, or what failed.
      host: bytes of host memory for each chip.
    """

    ms: float | None
    peak: float
    fits: bool
    failed: bool = False
    note: str = ""
    host: float = 0.0


def parse_result(figures: Mapping[str, Any]) -> Result:
    """Result of the JSON that `tools/plan.py` writes."""
    host, capacity = float(figures.get("host_memory", 0)), float(figures.get("host_capacity", math.inf))
    if host > capacity:
        why = f": needs {host / GIB:,.1f} GiB of the host's memory, of which a chip's share is {capacity / GIB:,.1f}"
        return Result(None, 0.0, False, note=why, host=host)
    if not figures.get("fits"):
        why = str(figures.get("why", "its peak is above the chip's memory")).splitlines()[0]
        return Result(None, float(figures.get("hbm_needed") or figures.get("hbm_peak") or 0), False, note=why)
    return Result(float(figures["estimated_step_ms"]), float(figures["hbm_peak"]), True, host=host)


def choose(
    candidates: Sequence[Candidate], guesses: Sequence[Guess], capacity: float, results: Mapping[int, Result | None]
) -> int | None:
    """Index of the candidate to compile next; None if none of the remaining ones can fit.

    Args:
      candidates: the search space.
      guesses: the arithmetic of each candidate.
      capacity: bytes of a chip's memory.
      results: index -> result, or None while the candidate is being compiled.
    """
    columns = zip(*candidates, strict=True)
    codes = np.array([np.unique([str(value) for value in column], return_inverse=True)[1] for column in columns]).T
    at_least, peak, ms = np.array(guesses).T
    too_large = [candidates[i] for i, each in results.items() if each and not each.fits and not each.failed]
    memory_errors = {i: (each.peak - peak[i]) / capacity for i, each in results.items() if each and each.peak}
    time_errors = {i: math.log(each.ms / ms[i]) for i, each in results.items() if each and each.ms}
    pending = [i for i, each in results.items() if each is None]
    memory_mean, memory_std = _posterior(codes, memory_errors, _MEMORY_CORRELATION, _MEMORY_ERROR, pending)
    time_mean, time_std = _posterior(codes, time_errors, _TIME_CORRELATION, _TIME_ERROR, pending)
    score = np.log(ms) + time_mean - time_std
    score[(peak / capacity + memory_mean - memory_std > 1) | (at_least > capacity)] = np.inf
    score[list(results)] = np.inf
    for index in np.argsort(score, kind="stable"):
        if np.isinf(score[index]):
            return None
        if not any(needs_no_less_memory(candidates[index], each) for each in too_large):
            return int(index)
    return None


def _posterior(
    codes: Any, observed: Mapping[int, float], correlation: Any, prior_std: float, pending: Sequence[int]
) -> tuple[Any, Any]:
    """Mean and standard deviation, at each row of `codes`, of a zero-mean Gaussian process given the observed errors.

    Pending candidates reduce the standard deviation as if they had been observed, and leave the mean as it is.
    """
    rows = list(observed)

    def covariance(columns: list[int]) -> Any:
        return np.prod(np.where(codes[:, None] == codes[columns][None], 1.0, correlation), axis=-1)

    def precision(columns: list[int]) -> Any:
        return np.linalg.inv(covariance(columns)[columns] + _NOISE * np.eye(len(columns)))

    mean = covariance(rows) @ (precision(rows) @ np.array(list(observed.values()))) if rows else np.zeros(len(codes))
    both = [*rows, *(i for i in pending if i not in observed)]
    explained = ((covariance(both) @ precision(both)) * covariance(both)).sum(axis=1) if both else 0.0
    return mean, prior_std * np.sqrt(np.maximum(1.0 - explained, 0.0) * np.ones(len(codes)))


def run(
    candidates: Sequence[Candidate],
    guesses: Sequence[Guess],
    capacity: float,
    measure: Callable[[Candidate], Result],
    *,
    compiles: int,
    workers: int,
    progress: Callable[[int, Candidate, Result], None],
) -> dict[int, Result]:
    """Measures up to `compiles` candidates, `workers` of them at a time.

    A choice depends on the results in the order in which candidates were chosen, not in which they finished. So a
    search that is started again makes the same choices, with results that `measure` has cached.

    Args:
      candidates, guesses, capacity: see `choose`.
      measure: compiles a candidate; called from `workers` threads.
      compiles: how many candidates to measure.
      workers: how many at a time.
      progress: called with the number of results so far, a candidate and its result.

    Returns:
      Index -> result, in the order of choosing.
    """
    results: dict[int, Result | None] = {}
    running: list[tuple[int, Any]] = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                chosen = choose(candidates, guesses, capacity, results) if len(results) < compiles else None
                if chosen is not None:
                    results[chosen] = None
                    running.append((chosen, pool.submit(measure, candidates[chosen])))
                if len(running) == workers or (running and chosen is None):
                    index, future = running.pop(0)
                    results[index] = result = future.result()
                    progress(sum(each is not None for each in results.values()), candidates[index], result)
                elif not running and chosen is None:
                    break
        finally:
            for _, future in running:
                future.cancel()
    return {index: result for index, result in results.items() if result is not None}


def pareto_frontier(results: Mapping[int, Result]) -> list[int]:
    """Indices of the results that fit and than which no other is both faster and smaller, fastest first."""
    fitting = sorted((each.ms, each.peak, index) for index, each in results.items() if each.fits and each.ms)
    least, frontier = math.inf, []
    for _, peak, index in fitting:
        if peak < least:
            least = peak
            frontier.append(index)
    return frontier


def flag_file(candidate: Candidate, result: Result, usual_flags: str) -> str:
    """Text of a file for --flagfile that sets a candidate.

    Flags of the compiler cannot be set there; if they are not the usual ones, a comment says how to set them.
    """
    memory = f"{result.peak / GIB:.2f} GiB at the peak"
    memory += f", {result.host / GIB:.2f} GiB in the host's memory" if result.host else ""
    lines = [f"# {candidate}: an estimated {result.ms:,.1f} ms a step, {memory}."]
    if candidate.flags != usual_flags:
        lines.append(f"# Set the compiler's flags in the environment: LIBTPU_INIT_ARGS='{candidate.flags}'")
    return "\n".join([*lines, *(f"--config.{key}={value}" for key, value in candidate.overrides().items())]) + "\n"
