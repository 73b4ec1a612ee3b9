"""Damages copies of a run, reads each in the ways of lm.main and the tools, and counts what goes wrong.

    python tools/faults.py [--run=DIR] [--damages=2000] [--keys=100] [--seed=0]

A damage is a bit flipped, a range set to zero, a file cut off, deleted, or exchanged with another one, at random over
all files of the run; then every key of every JSON file is renamed, removed, given another value or one nested too
deeply. Without --run a tiny run is made first. After each damage the readers of `readers` must give the values of a
step exactly as they were saved, must not pass over a step that no damage touched, and must say which steps they passed
over. A damage of a file of the whole run, such as its tokenizer, may also be refused with one message. Of the report
only tracebacks are seen: config.json has no checksum, and the page shows what stands there.

Exits with status 1 if any reader ends in a traceback, gives wrong values, misses a healthy step, or is silent.
"""

import collections
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import io
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from absl import flags

from lm import command_line
from lm.terminal import say, stop

_RUN = flags.DEFINE_string("run", "", "The run to copy, with two steps or more; '' = a tiny one is made.")
_DAMAGES = flags.DEFINE_integer("damages", 2000, "Number of random damages.", lower_bound=0)
_KEYS = flags.DEFINE_integer("keys", -1, "Number of JSON keys to change, drawn at random; -1 = each one.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the damages.")

KINDS = ("flip", "zero", "truncate", "delete", "swap")
KEY_KINDS = ("rename", "remove", "alter", "nest")
FINE = ("unharmed", "passed over", "refused")
WRONG = ("traceback", "wrong values", "healthy step not found", "silent")
_SECONDS_BETWEEN_LINES = 10.0


class Damage(NamedTuple):
    """A change of a run's folder.

    Attributes:
      kind: one of KINDS or KEY_KINDS.
      file: relative to the run's folder.
      place: of the change in the file, a share of its length in [0, 1), or the number of a JSON key in it.
      other: the file to exchange it with.
    """

    kind: str
    file: str
    place: float
    other: str = ""

    @property
    def steps(self) -> set[int]:
        """The steps that were touched."""
        parts = [Path(file).parts for file in (self.file, self.other)]
        return {int(part[1]) for part in parts if part[:1] == ("checkpoints",)}

    @property
    def touches_run(self) -> bool:
        """Whether a file that belongs to no step was touched."""
        return any(file and not file.startswith("checkpoints/") for file in (self.file, self.other))


def random_damages(run: Path, number: int, rng: random.Random) -> list[Damage]:
    """`number` damages, each of a random kind in a random file."""
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    out = []
    for _ in range(number):
        kind, file = rng.choice(KINDS), rng.choice(files)
        twins = [other for other in files if other != file and Path(other).name == Path(file).name]
        other = rng.choice(twins or [other for other in files if other != file]) if kind == "swap" else ""
        out.append(Damage(kind, file, rng.random(), other))
    return out


def key_damages(run: Path) -> list[Damage]:
    """A change of each key of each JSON file; its kinds take turns."""
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    keys = [(file, n) for file in files for n in range(len(_entries(_documents((run / file).read_bytes()))))]
    return [Damage(KEY_KINDS[i % len(KEY_KINDS)], file, n) for i, (file, n) in enumerate(keys)]


def apply(run: Path, damage: Damage) -> None:
    """Damages the run in place."""
    path = run / damage.file
    content = bytearray(path.read_bytes())
    at = int(damage.place * len(content))
    if damage.kind == "delete":
        path.unlink()
    elif damage.kind == "swap":
        path.write_bytes((run / damage.other).read_bytes())
        (run / damage.other).write_bytes(content)
    elif damage.kind in KEY_KINDS:
        path.write_bytes(_change_key(bytes(content), int(damage.place), damage.kind))
    elif damage.kind == "truncate":
        path.write_bytes(content[:at])
    elif content:
        if damage.kind == "flip":
            content[at] ^= 1 << int(damage.place * 8 * len(content)) % 8
        else:
            content[at : at + 64] = bytes(len(content[at : at + 64]))
        path.write_bytes(content)


def _documents(content: bytes) -> list[Any]:
    """The JSON of a file, or of each of its lines; [] where it is something else."""
    for texts in ([content], content.splitlines()):
        with contextlib.suppress(ValueError):
            return [json.loads(text) for text in texts]
    return []


def _entries(value: Any) -> list[tuple[dict[str, Any], str]]:
    """(object, key) of every key in a JSON value, at any depth."""
    if isinstance(value, dict):
        return [entry for key in value for entry in ((value, key), *_entries(value[key]))]
    return [entry for item in value for entry in _entries(item)] if isinstance(value, list) else []


def _change_key(content: bytes, number: int, kind: str) -> bytes:
    """A JSON file with one key changed."""
    documents, deep = _documents(content), "nested too deeply"
    inside, key = _entries(documents)[number]
    value = inside.pop(key)
    if kind == "rename":
        inside[key[:-1] + chr(ord(key[-1]) ^ 1)] = value
    elif kind == "nest":
        inside[key] = deep
    elif kind == "alter":
        inside[key] = value + 1 if isinstance(value, int | float) else f"{value}?" if isinstance(value, str) else 0
    text = "\n".join(json.dumps(document) for document in documents)
    return text.replace(json.dumps(deep), "[" * 100_000 + "]" * 100_000).encode()


class Reader(NamedTuple):
    """A way to read a run.

    Attributes:
      read: folder -> all values that were read.
      truth: step -> the values that it gives for that step undamaged, in the order in which it prefers the steps.
      reads_steps: whether it reads files of checkpoints.
    """

    read: Callable[[Path], Any]
    truth: dict[int, Any]
    reads_steps: bool = True


def readers(run: Path, scratch: Path) -> dict[str, Reader]:
    """Name -> reader, for an undamaged run.

    lm.main is called in this process until its first step would start: it has restored its state, and saves it anew.
    The other ways are those of tools/chat.py, translate.py, merge_adapters.py and show_reconstructions.py
    (`load_checkpoint`), and of everything that `init_from` starts from: lm.main, tools/plan.py and inspect_batch.py.

    Args:
      run: its folder, which is not changed.
      scratch: a folder to make copies in.
    """
    from lm import checkpoint, train
    from lm import run as run_lib
    from lm.tasks import build_saved_config
    from lm.tracking import report

    best, newest = checkpoint.choose(f"{run}@best"), checkpoint.choose(f"{run}@latest")
    cfg = build_saved_config(newest.info["config"])
    summaries: list[Any] = []  # the first one is that of the undamaged run

    def resume(folder: Path) -> Any:
        found: list[Any] = []

        def restore(*args: Any) -> Any:
            found.extend(original(*args))
            return tuple(found)

        def loop(run: Any, workdir: Path, state: Any, position: Any, tracker: Any, checkpoints: Any, *_: Any) -> Any:
            checkpoints.save(int(state.step) + 1, state, {}, None)
            checkpoints.wait()
            raise _ReachedError

        original, summary = train.restore, None
        with (
            mock.patch.object(train, "restore", restore),
            mock.patch.object(train, "loop", loop),
            contextlib.suppress(_ReachedError),
        ):
            summary = train.train(cfg, folder)
        summaries.append(summary)
        state, position, _ = found
        return digest(state), position, summary or summaries[0]

    def load(name: str) -> Any:
        saved, (its_cfg, _, params, tokenizer) = run_lib.load_checkpoint(name)
        return digest(params), saved.info, saved.metrics, its_cfg, tokenizer and tokenizer.hash

    def start_from(folder: Path) -> Any:
        planned, _, params = run_lib.init_model(dataclasses.replace(cfg, init_from=str(folder)))
        return digest(params), planned.tokenizer and planned.tokenizer.hash

    def true(read: Callable[[Path], Any], first: Any) -> Reader:
        """Reads each step where those that are preferred to it are not there."""
        order, out, folder = [first.step, *(saved.step for saved in first.fallbacks)], {}, scratch / "copy"
        shutil.copytree(run, folder)
        for step in order:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                out[step] = read(folder)
            shutil.rmtree(folder / "checkpoints" / str(step))
        shutil.rmtree(folder)
        return Reader(read, out)

    return {
        "RUN": true(lambda folder: load(str(folder)), newest),
        "RUN@best": true(lambda folder: load(f"{folder}@best"), best),
        "init_from": true(start_from, newest),
        "report": Reader(lambda folder: report.write_report(folder).name, {newest.step: "report.html"}, False),
        "lm.main": true(resume, newest),  # the last one, as it writes
    }


class _ReachedError(Exception):
    """The first step would start."""


def digest(tree: Any) -> str:
    """Hash of all arrays of a tree, with their names, dtypes and shapes."""
    import numpy as np

    from lm import checkpoint

    out = hashlib.sha256()
    for name, leaf in checkpoint.named_leaves(tree).items():
        out.update(f"{name} {leaf.dtype} {leaf.shape} ".encode() + np.asarray(leaf).tobytes())
    return out.hexdigest()


def judge(reader: Reader, folder: Path, damage: Damage) -> tuple[str, str]:
    """One of FINE or WRONG, and what the reader said, or the traceback."""
    healthy = [step for step in reader.truth if step not in damage.steps]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            values = reader.read(folder)
    except Exception as error:
        if not type(error).__module__.startswith("lm."):
            return "traceback", traceback.format_exc()
        found = "healthy step not found" if healthy and not damage.touches_run else "refused"
        return found, f"{said.getvalue()}{error}"
    order = list(reader.truth)
    step = next((step for step in order if reader.truth[step] == values), None)
    if step is None:
        return "wrong values", said.getvalue()
    passed = order[: order.index(step)]
    if any(better in healthy for better in passed):
        return "healthy step not found", said.getvalue()
    if not all(any(f"checkpoints/{better} " in line for line in said.getvalue().splitlines()) for better in passed):
        return "silent", said.getvalue()
    return "passed over" if passed else "unharmed", said.getvalue()


def main(argv: list[str]) -> None:
    """Damages copies of the run and prints the table."""
    command_line.arguments(argv)
    with command_line.one_line_errors(), tempfile.TemporaryDirectory() as scratch:
        run = Path(_RUN.value) if _RUN.value else make_run(Path(scratch))
        rng = random.Random(_SEED.value)
        keys = key_damages(run)
        damages = random_damages(run, _DAMAGES.value, rng)
        damages += keys if _KEYS.value < 0 else rng.sample(keys, min(_KEYS.value, len(keys)))
        counts, failures = measure(run, damages, Path(scratch))
    say(table(counts))
    for failure in failures[:10]:
        say(failure)
    if failures:
        stop(f"error: {len(failures)} of {len(damages):,} damages were not dealt with")
    say(f"{len(damages):,} damages, none of them lost a healthy step or gave a wrong value")


def measure(
    run: Path, damages: list[Damage], scratch: Path
) -> tuple[dict[tuple[str, str], collections.Counter[str]], list[str]]:
    """Applies each damage to a copy of the run and reads it in every way.

    Returns:
      ((kind of damage, reader) -> verdict -> number, what went wrong).
    """
    from lm import program

    counts: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    failures = []
    with mock.patch.object(program, "make_model", functools.cache(program.make_model)):  # traced once, not each time
        ways, began = readers(run, scratch), time.monotonic()
        told = began
        for number, damage in enumerate(damages, 1):
            folder = scratch / "copy"
            shutil.copytree(run, folder)
            apply(folder, damage)
            for name, reader in ways.items():
                if reader.reads_steps or damage.touches_run:
                    verdict, why = judge(reader, folder, damage)
                    counts[damage.kind, name][verdict] += 1
                    if verdict in WRONG:
                        failures.append(f"{verdict}: {name}, {damage}\n{why}")
            shutil.rmtree(folder)
            if (now := time.monotonic()) - told > _SECONDS_BETWEEN_LINES or number == len(damages):
                left = datetime.timedelta(seconds=round((now - began) / number * (len(damages) - number)))
                say(f"{number:,} of {len(damages):,} damages, {len(failures)} wrong, ETA {left}", file=sys.stderr)
                told = now
    return counts, failures


def table(counts: dict[tuple[str, str], collections.Counter[str]]) -> str:
    """Verdicts by kind of damage and by reader."""
    rows: list[tuple[str, ...]] = [("damage", "reader", "damages", *FINE, *WRONG)]
    for (kind, name), found in counts.items():
        rows.append((kind, name, *(f"{n:,}" for n in (found.total(), *(found[v] for v in (*FINE, *WRONG))))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def make_run(folder: Path) -> Path:
    """A run of four steps of a model of a few thousand parameters, with checkpoints of steps 2 and 4."""
    from lm import tasks, train

    (folder / "texts").mkdir()
    rng = random.Random(0)
    for number in range(12):
        words = " ".join(rng.choice(["a", "run", "of", "few", "steps", "and", "words"]) for _ in range(30))
        (folder / "texts" / f"{number}.txt").write_text(words)
    c = tasks.default_config("causal_lm")
    c.tokenizer.vocab_size = 290
    c.data.format, c.data.path, c.data.eval_fraction = "text", str(folder / "texts"), 0.2
    c.data.seq_len, c.data.batch_size = 16, 8
    c.model.num_layers, c.model.embed_dim, c.model.num_heads, c.model.mlp_dim = 1, 8, 1, 8
    c.model.use_bias = False
    c.train.total_steps, c.optim.warmup_steps = 4, 1
    c.eval.every_steps = c.checkpoint.every_steps = 2
    c.generate.prompts, c.generate.max_new_tokens = ("a",), 2
    c.monitor.log_every_steps = 1
    train.train(tasks.build_config(c), folder / "run")
    return folder / "run"


if __name__ == "__main__":
    command_line.run(main)
