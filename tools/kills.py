"""Kills a small run with SIGKILL again and again, restarts it each time, and compares its end with an undisturbed run.

    python tools/kills.py --count=100 [--seed=0] [--folder=DIR]

Two of three kills come just before or just after a file operation of a write, drawn at random: of a checkpoint, its
commit, the deletion of an old one, the metrics (which a resumed run rewinds), the tokenizer, the config, the summary,
the report. The others come at a random time. A run is restarted until it is done. Then its final state must be that of
the undisturbed run bit for bit, its rows and its position in the data the same, each row there once, and no file more
or less than there. Then the next run begins, until there were that many kills.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from lm import command_line, lease
from lm.terminal import say, stop

_COUNT = flags.DEFINE_integer("count", 100, "How many kills.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of when to kill.")
_FOLDER = flags.DEFINE_string("folder", "", "Where the runs go; an empty folder, which is kept. '' = a temporary one.")

STEPS = 4  # of a run, each with a save
KINDS = (
    "checkpoint",
    "commit",
    "retention",
    "metrics",
    "tokenizer",
    "config",
    "summary",
    "report",
    "saved step",
    "lease",
)
_TIMING = ("crc32", "seconds", "tokens_per_second", "tokens_per_second_a_device", "input_bound", "mfu", "mfu_causal")


class Kill(NamedTuple):
    """When a process kills itself.

    Attributes:
      kind: of the file operations to count, one of KINDS; '' = none, only `delay` counts.
      number: which of them, from 1.
      delay: seconds after it, or after the start; 0 = before the operation is done.
    """

    kind: str
    number: int
    delay: float


def main(argv: list[str]) -> None:
    """Kills runs as the flags say; prints the counts, or how a run differs and exits with status 1."""
    command_line.arguments(argv)
    if _FOLDER.value and Path(_FOLDER.value).exists() and any(Path(_FOLDER.value).iterdir()):
        stop(f"error: --folder={_FOLDER.value} is not empty: expected a new folder")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(_FOLDER.value or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        done = kill_runs(folder, _COUNT.value, _SEED.value)
    inside = done.total() - done["any time"]
    say(f"{done.total()} kills, {inside} of them at a file operation of a write: all runs ended as the undisturbed one")
    say(", ".join(f"{name} {number}" for name, number in sorted(done.items())))


def kill_runs(folder: Path, count: int, seed: int) -> Counter[str]:
    """Kills runs in an empty folder that many times, until the last is done. Returns kind -> number of kills.

    Raises:
      SystemExit: a run failed, or ended unlike the undisturbed one.
    """
    rng = random.Random(seed)
    write_texts(folder / "texts")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lm.train"])
    began = time.monotonic()
    _start(context, folder, "undisturbed", None)
    usual_seconds, usual = time.monotonic() - began, outcome(folder / "undisturbed")
    operations = Counter(json.loads((folder / "undisturbed.operations").read_text()))
    kills: Counter[str] = Counter()
    run = 0
    while kills.total() < count:
        run += 1
        name, is_done = f"killed-{run}", False
        while not is_done:
            kill = draw(rng, operations, usual_seconds) if kills.total() < count else None
            is_done = _start(context, folder, name, kill)
            if not is_done and kill:
                kills[kill.kind or "any time"] += 1
        if differs := difference(outcome(folder / name), usual):
            stop(f"error: {folder / name} ended unlike an undisturbed run after {kills.total()} kills:\n{differs}")
        say(f"{kills.total()} kills, {run} runs")
    return kills


def draw(rng: random.Random, operations: Counter[str], usual_seconds: float) -> Kill:
    """When to kill the next process."""
    if rng.random() < 1 / 3:
        return Kill("", 0, rng.uniform(0, 0.7) * usual_seconds)
    kind = rng.choice(KINDS)
    # Of the operations of two saves, or of all; a resumed run, which rewinds the metrics, has at least three of those.
    usual = max(operations[kind], 3)
    number = rng.randint(1, usual if usual <= STEPS else usual // (STEPS // 2))
    return Kill(kind, number, rng.choice([0.0, rng.uniform(0, 0.01)]))


def write_texts(folder: Path) -> None:
    """A few small files to train on."""
    folder.mkdir()
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "of", "the", "a", "run", "step", "loss", "is", "not", "model", "data"]
    for number in range(24):
        text = " ".join(rng.choices(words, k=rng.randint(5, 60)))
        (folder / f"{number:02}.txt").write_text(f"{text.capitalize()}.\n", encoding="utf-8")


def _start(context: Any, folder: Path, name: str, kill: Kill | None) -> bool:
    """Starts or resumes a run in a process of its own. Returns whether it was done; False = it was killed.

    Raises:
      SystemExit: it ended in another way.
    """
    log = folder / f"{name}.log"
    process = context.Process(target=_train, args=(folder, name, kill))
    process.start()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        last = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        stop(f"error: {folder / name} ended with status {process.exitcode}; its log {log} ends in\n{last}")
    return process.exitcode == 0


def _train(folder: Path, name: str, kill: Kill | None) -> None:
    """What a process does: trains until it is done, or dies as `kill` says."""
    log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import jax

    from lm import train
    from lm.tasks import build_config, default_config

    # Only the undisturbed run writes what it has compiled, for all others.
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9 if kill or name != "undisturbed" else 0)
    c = default_config("causal_lm")
    c.data.format, c.data.path, c.data.eval_fraction = "text", str(folder / "texts"), 0.2
    c.tokenizer.vocab_size, c.data.seq_len, c.data.batch_size = 300, 16, 8
    c.model.num_layers, c.model.embed_dim, c.model.num_heads, c.model.mlp_dim = 1, 8, 1, 16
    c.model.dropout, c.optim.ema_decay, c.optim.warmup_steps, c.train.total_steps = 0.1, 0.9, 1, STEPS
    c.checkpoint.every_steps, c.checkpoint.keep_latest, c.checkpoint.keep_best = 1, 1, 1
    c.eval.every_steps, c.monitor.log_every_steps = 2, 1
    with _dying(folder / name, kill) as operations:
        train.train(build_config(c), folder / name)
    (folder / f"{name}.operations").write_text(json.dumps(operations), encoding="utf-8")
    os._exit(0)  # the audit hook stays, and there is nothing to wait for


@contextmanager
def _dying(workdir: Path, kill: Kill | None) -> Iterator[Counter[str]]:
    """Counts the file operations of each kind in a run directory, and kills the process when it is time."""
    operations: Counter[str] = Counter()
    is_over = False
    deleting = ""

    def die(delay: float) -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal deleting
        if is_over or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
            return
        if event == "open" and not (isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = os.fspath(args[1] if event == "os.rename" else args[0])
        if event == "shutil.rmtree":
            deleting = path
        elif not os.path.isabs(path):  # an entry of the folder that is being deleted
            path = deleting
        found = kind_of(event, path, workdir)
        operations[found] += 1
        if kill and kill.kind == found and kill.number == operations[found]:
            if kill.delay:
                threading.Thread(target=die, args=(kill.delay,), daemon=True).start()
            else:
                die(0.0)

    if kill and not kill.kind:
        threading.Thread(target=die, args=(kill.delay,), daemon=True).start()
    sys.addaudithook(hook)
    yield operations
    is_over = True


def kind_of(event: str, path: str, workdir: Path) -> str:
    """The kind of a file operation, one of KINDS; '' for another file.

    Args:
      event: of Python's audit events; of a rename, `path` is the new name.
    """
    if not path.startswith(f"{workdir}/"):
        return ""
    first, *rest = Path(path).relative_to(workdir).parts
    if first == "checkpoints" and rest:
        if rest[0].endswith(".deleted"):
            return "retention"
        return "commit" if event == "os.rename" and len(rest) == 1 else "checkpoint"
    if lease.is_lease(first):
        return "lease"
    names = {"metrics.jsonl": "metrics", "samples.jsonl": "metrics", "tokenizer.model": "tokenizer"}
    names |= {"config.json": "config", "summary.json": "summary", "report.html": "report", "saved.json": "saved step"}
    return next((kind for name, kind in names.items() if first == name or first.startswith(f".{name}.")), "")


def outcome(workdir: Path) -> dict[str, Any]:
    """All that two runs must have in common when they are done."""
    from orbax.checkpoint import v1 as ocp

    from lm import checkpoint

    saved = checkpoint.list_saved(workdir)
    with warnings.catch_warnings():  # the shardings are those it was saved with
        warnings.simplefilter("ignore")
        state = ocp.load_checkpointables(saved[-1].path)["state"]
    rows = {}
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = [json.loads(line) for line in (workdir / name).read_text(encoding="utf-8").splitlines()]
        rows[name] = [{key: value for key, value in row.items() if key not in _TIMING} for row in lines]
    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    names = sorted(str(path.relative_to(workdir)) for depth in ("*", "checkpoints/*") for path in workdir.glob(depth))
    return {
        "files": names,
        "steps": {each.step: each.metrics for each in saved},
        "info": {each.step: each.info for each in saved},
        "tokenizer": (workdir / "tokenizer.model").read_bytes(),
        **rows,
        "summary": {key: summary[key] for key in ("steps", "tokens", "loss", "before", "best")},
        "state": {name: bytes(leaf.tobytes()) for name, leaf in arrays(state)},
    }


def arrays(state: Any) -> list[tuple[str, Any]]:
    """The arrays of a state, as numpy arrays, with their names."""
    import numpy as np

    from lm import checkpoint

    return [(name, np.asarray(leaf)) for name, leaf in checkpoint.named_leaves(state).items()]


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """How two outcomes differ, a line for each part; '' if they do not."""
    lines = []
    for name, value in expected.items():
        if strip(found[name]) == strip(value):
            continue
        if isinstance(value, list):
            more, less = ([row for row in a if row not in b] for a, b in ((found[name], value), (value, found[name])))
            lines.append(f"  {name}: {len(found[name])} for {len(value)}; more: {more[:3]}; missing: {less[:3]}")
        else:
            lines.append(f"  {name}: {str(found[name])[:300]}\n    for {str(value)[:300]}")
    return "\n".join(lines)


def strip(value: Any) -> Any:
    """A value without the keys that tell time."""
    if isinstance(value, dict):
        return {key: strip(item) for key, item in value.items() if key not in _TIMING}
    return value


if __name__ == "__main__":
    command_line.run(main)
