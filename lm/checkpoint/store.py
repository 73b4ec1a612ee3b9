"""Checkpoints: Orbax v1 directories `checkpoints/STEP`, each self-contained, and verified when read.

A checkpoint holds the arrays of the state and, as JSON, everything else that is needed to use them: format version,
config, tokenizer hash, position in the data, metrics, and a fingerprint of every array. Orbax writes and commits
atomically, but does not notice bits that flip on disk; the fingerprints, and a hash of the JSON itself, do. Loading
executes no code from the checkpoint.

A run may have damaged checkpoints. Its steps are listed and their JSON is read here and not by Orbax, which reads all
steps or none. With several processes, `list_saved`, `choose` and `load` are called by all of them together and give all
of them the same answer: what one process cannot read none of them uses.
"""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import itertools
import json
import logging
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lm import files as files_lib
from lm import lease
from lm.config import CheckpointConfig
from lm.evaluation.metrics import gain
from lm.terminal import say

FORMAT = 1
_METADATA_FILE = "_CHECKPOINT_METADATA"  # Orbax's JSON of a step; ours is its value of 'custom_metadata'
_COMMITTED_FILE = "commit_success.txt"
_ADVICE = "; use another step, or restore this one from a copy"
_LARGE, _SLICES = 1 << 20, 16  # elements; of an array that is large
_SCRATCH = ".orbax-checkpoint-tmp"  # ends the name of a step that Orbax is writing
EXPIRED = ".deleted"  # ends the name of a step that is being deleted

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. The message names the path and what to do."""


class Diverged(RuntimeError):
    """The loss, the gradient or the state is not finite. The message names the step and the last good checkpoint."""


@dataclasses.dataclass(frozen=True)
class Saved:
    """A committed checkpoint, its arrays not yet read.

    Attributes:
      step: steps done.
      path: its folder.
      info: the JSON beside the arrays: 'config', 'tokenizer_hash', 'data', 'arrays'; if it cannot be used, only
        'unreadable' -> what is wrong, a sentence about the folder.
      metrics: of the evaluation at this step; empty if there was none.
      fallbacks: from `choose`: the steps to go back to, in this order, if the arrays cannot be read; empty where the
        step was named.
    """

    step: int
    path: epath.Path
    info: dict[str, Any]
    metrics: dict[str, float]
    fallbacks: tuple["Saved", ...] = ()

    @property
    def label(self) -> str:
        """'RUN@STEP', without the folder that the run is in."""
        return f"{self.path.parent.parent.name}@{self.step}"


def fingerprints(tree: Any) -> dict[str, jax.Array]:
    """Path -> fingerprint of the leaf, uint32 [], independent of its sharding.

    The sum, modulo 2^32, of a hash of each element's bits and position. At a given position different bits have
    different hashes, so that a change of one element is always detected; a change of several is missed with probability
    2^-32. Integer sums do not depend on their order.
    """
    return {name: fingerprint for name, (fingerprint, _) in _measure(tree).items()}


def _measure(tree: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Path -> fingerprint of the leaf, see `fingerprints`, and whether all its elements are finite, bool []."""
    leaves = named_leaves(tree)
    large = [name for name, leaf in leaves.items() if _is_large_on_cpu(leaf)]
    others = {name: leaf for name, leaf in leaves.items() if name not in large}
    # One by one, so that arrays of the same shape share what is compiled.
    return _measured(others, 1) | {name: _measured({"": leaves[name]}, _SLICES)[""] for name in large}


def _is_large_on_cpu(x: jax.Array) -> bool:
    """Whether to reduce an array in slices. XLA's CPU backend does not vectorise a reduction and copies its operand; it
    does vectorise the sum of slices (500 MB of float32: 0.09 s of CPU time instead of 0.43 s)."""
    if x.size < _LARGE or isinstance(x, jax.core.Tracer):
        return False
    return [device.platform for device in x.devices()] == ["cpu"]


@functools.partial(jax.jit, static_argnums=1)
def _measured(leaves: dict[str, jax.Array], slices: int) -> dict[str, tuple[jax.Array, jax.Array]]:
    return {name: (_fingerprint(x, slices), _is_finite(x, slices)) for name, x in leaves.items()}


def _fingerprint(x: jax.Array, slices: int) -> jax.Array:
    if x.dtype.itemsize not in (1, 2, 4):
        raise TypeError(f"no fingerprint for dtype {x.dtype}")
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    sliced_axis, parts = _sliced(x, slices)

    def mix(x: jax.Array) -> jax.Array:  # the finalizer of MurmurHash3, a bijection
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    def hashes(part: jax.Array, start: int) -> jax.Array:
        bits = (part if x.dtype == bool else jax.lax.bitcast_convert_type(part, unsigned)).astype(jnp.uint32)
        index = jnp.zeros(part.shape, jnp.uint32)
        for axis in range(x.ndim):
            here = jax.lax.broadcasted_iota(jnp.uint32, part.shape, axis)
            index = index * jnp.uint32(x.shape[axis]) + here + jnp.uint32(start if axis == sliced_axis else 0)
        return mix(bits ^ mix(index))

    alike = functools.reduce(jnp.add, [hashes(*part) for part in parts[:slices]])
    rest = [hashes(*part) for part in parts[slices:]]
    return functools.reduce(jnp.add, [jnp.sum(part, dtype=jnp.uint32) for part in (alike, *rest)])


def _is_finite(x: jax.Array, slices: int) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.array(True)
    parts = [jnp.isfinite(part) for part, _ in _sliced(x, slices)[1]]
    alike = functools.reduce(jnp.logical_and, parts[:slices])
    return functools.reduce(jnp.logical_and, [jnp.all(part) for part in (alike, *parts[slices:])])


def _sliced(x: jax.Array, slices: int) -> tuple[int, list[tuple[jax.Array, int]]]:
    """The longest axis, and that many equal slices of it with their starts, followed by what is left over, if any."""
    if slices == 1:
        return 0, [(x, 0)]
    axis = int(np.argmax(x.shape))
    size = x.shape[axis] // slices
    starts = [*range(0, size * slices, size), size * slices]
    ends = [*starts[1:], x.shape[axis]]
    parts = [(jax.lax.slice_in_dim(x, a, b, axis=axis), a) for a, b in zip(starts, ends, strict=True) if a < b]
    return axis, parts


def named_leaves(tree: Any) -> dict[str, Any]:
    """Name -> leaf of any pytree, for example 'params/embed/embedding' or 'opt_state/0/mu/embed/embedding'."""
    with_path = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in with_path}


class Checkpoints:
    """Writes the checkpoints of one run, in the background; a context manager that waits for the last save.

    A step that is to go is deleted after the new one is on disk, and renamed first, so that a kill never leaves half of
    one under a step's name. Call `sweep` before, once the run directory is this process's own.

    At most one save is in flight. Its error, if it fails, is raised by the next `poll`, `save` or `wait`, or at exit.

    Attributes:
      last_good: the newest step that is known to be complete on disk; None = none.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        cfg: CheckpointConfig,
        saved: Sequence[Saved] | None = None,
        resumed: int | None = None,
        check_lease: Callable[[], None] = lambda: None,
    ):
        """
        Args:
          workdir: the run's folder.
          cfg: which checkpoints to keep.
          saved: what `list_saved` found at the start of the process; None = look now, in all processes together.
          resumed: the step that the run resumes from, as later ones could not be read. None = all of them are good.
          check_lease: called before a save; raises `lm.lease.Lost` if the folder is another's now.
        """
        from orbax.checkpoint import v1 as ocp

        readable = [
            saved for saved in (list_saved(workdir) if saved is None else saved) if "unreadable" not in saved.info
        ]
        trusted: dict[int, Mapping[str, float]] = {
            saved.step: saved.metrics for saved in readable if resumed is None or saved.step <= resumed
        }
        self._cfg, self._metrics = cfg, trusted  # step -> metrics of its evaluation, for every step that is kept
        self._files: tuple[int, Mapping[str, bytes]] | None = None  # of the step in flight
        context = ocp.Context()
        context.asynchronous.create_directories_asynchronously = False  # else errors take 5 minutes
        context.asynchronous.post_finalization_callback = lambda: (
            self._add_files()
        )  # Orbax copies a method with its object
        self._manager = ocp.training.Checkpointer(
            _root(workdir),
            context=context,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            lightweight_initialize=True,  # else one damaged step is an error
        )
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._in_flight: tuple[int, Future[list[int]]] | None = None
        self._check_lease = check_lease
        self.last_good = max(trusted, default=None)
        if resumed in trusted:  # a process may have been killed between its last save and the deletion of older steps
            self._forget(self._expire(trusted))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, lease.Lost):
            return  # a save that has begun is not finished: the folder is another's
        try:
            self._finish()
        except CheckpointError:
            if kind is None:
                raise  # else the error that ended the `with` block is the one to show
        finally:
            with contextlib.suppress(Exception):  # would raise the error of a failed save again
                self._manager.close()
            self._background.shutdown()

    def save(
        self,
        step: int,
        state: Any,
        info: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Starts saving `state` in the background, after waiting for the previous save.

        Args:
          step: steps done.
          state: pytree of arrays.
          info: JSON: config, tokenizer hash, position in the data.
          metrics: of an evaluation of the same state, or None.
          files: path below the checkpoint -> content of further files, for `read_file`: the tokenizer's.

        Raises:
          CheckpointError: the previous save failed, or this one cannot start.
          Diverged: a value of the state is not finite. Nothing is saved, nothing is deleted.
          lm.lease.Lost: the folder is another's now.
        """
        self._check_lease()
        self._finish()
        leaves, files = named_leaves(state), files or {}
        measured = jax.device_get(_measure(state))
        if bad := [name for name, (_, is_finite) in measured.items() if not is_finite]:
            last = "there is no checkpoint yet" if self.last_good is None else f"step {self.last_good:,}"
            raise Diverged(
                f"step {step:,}: '{bad[0]}' has values that are not finite ({len(bad)} of {len(leaves)} arrays); the "
                f"last good checkpoint: {last}. This step was not saved. Try a lower optim.learning_rate or "
                "optim.clip_norm"
            )
        arrays = {
            name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "fingerprint": int(measured[name][0])}
            for name, leaf in leaves.items()
        }
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        more = {"format": FORMAT, "step": step, "arrays": arrays, "files": hashes, "metrics": dict(metrics or {})}
        about = {**info, **more}
        self._metrics[step], self._files = dict(metrics or {}), (step, files)
        try:
            response = self._manager.save_checkpointables_async(
                step,
                {"state": state},
                force=True,
                overwrite=True,  # one that could not be read
                custom_metadata=about | {"sha256": _sha256(about)},
            )
        except Exception as error:
            raise self._failed(step, error) from error
        kept = dict(self._metrics)
        self._in_flight = (step, self._background.submit(self._commit, step, response, kept))

    def _add_files(self) -> None:
        """Called by Orbax, on process 0, when the arrays of a step are written and before it gets its name."""
        self._check_lease()
        assert self._files is not None
        step, files = self._files
        for name, content in files.items():
            path = Path(self._manager.directory, f"{step}{_SCRATCH}", name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)

    def _commit(self, step: int, response: Any, kept: Mapping[int, Mapping[str, float]]) -> list[int]:
        """Waits until a step is on disk, and then deletes those that need not be kept. Returns them."""
        response.result()
        if jax.process_index() == 0:
            root = Path(self._manager.directory)
            files_lib.sync_tree(root / str(step))  # Orbax does so for the arrays only
            files_lib.sync(root)
        return self._expire(kept)

    def _expire(self, kept: Mapping[int, Mapping[str, float]]) -> list[int]:
        """Deletes those of the steps `kept` that need not be kept, on process 0. Returns them."""
        newest = sorted(kept)[-self._cfg.keep_latest :]
        best = _best_first(kept, self._cfg.best_metric)[: self._cfg.keep_best]
        expired = [each for each in kept if each not in newest and each not in best]
        if jax.process_index() == 0 and expired:
            self._check_lease()
            expired = [each for each in expired if _delete(Path(self._manager.directory, str(each)))]
        return expired

    def _forget(self, expired: Sequence[int]) -> None:
        for each in expired:
            del self._metrics[each]

    def poll(self) -> None:
        """Raises the error of a background save that has failed; does not wait for one that is still running."""
        if self._in_flight and self._in_flight[1].done():
            self._finish()

    def _finish(self) -> None:
        if self._in_flight is None:
            return
        step, commit = self._in_flight
        self._in_flight = None
        try:
            expired = commit.result()
        except lease.Lost:
            raise
        except Exception as error:
            raise self._failed(step, error) from error
        self.last_good = step
        self._forget(expired)

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        path = self._manager.directory / str(step)
        last = (
            f"the last good checkpoint is step {self.last_good}"
            if self.last_good is not None
            else "there is no earlier one"
        )
        if not self._manager.directory.exists():
            return CheckpointError(f"saving {path} failed: the folder was deleted or moved")
        return CheckpointError(
            f"saving {path} failed: {_reason(error)}; {last}. Remove the cause, for example by freeing disk space, and "
            "start again."
        )

    def wait(self) -> None:
        """Waits until all saves are on disk; raises CheckpointError if one failed."""
        self._finish()

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation is better than those of all checkpoints that are kept; False if `keep_best` is 0."""
        ranked = _best_first({**self._metrics, None: metrics}, self._cfg.best_metric)
        return self._cfg.keep_best > 0 and ranked[:1] == [None]


def sweep(workdir: Path, say: Callable[[str], None] = lambda _: None) -> None:
    """Removes what killed processes have left in a run directory: unfinished saves and deletions, scratch files.

    Only for the owner of the directory: another process's save that is being written would be removed too.
    """
    steps = unfinished(workdir)
    for path in steps:
        shutil.rmtree(path)
    if removed := [*(f"checkpoints/{path.name}" for path in steps), *files_lib.remove_scratch(workdir)]:
        say(f"removed what a killed process left in {workdir}: {', '.join(removed)}")


def unfinished(workdir: Path) -> list[Path]:
    """The folders of saves and deletions of checkpoints that were begun and not finished."""
    name = re.compile(rf"\d+({re.escape(_SCRATCH)}.*|{re.escape(EXPIRED)})")
    return sorted(path for path in (workdir / "checkpoints").glob("*") if name.fullmatch(path.name))


def _delete(step: Path) -> bool:
    """Deletes a step, and returns whether it no longer stands under its name. One that cannot be deleted is no reason
    to end the run: it is tried again after the next save, or by `sweep`."""
    expired = step.with_name(step.name + EXPIRED)
    try:
        step.rename(expired)
        files_lib.sync(step.parent)
        shutil.rmtree(expired)
    except OSError as error:
        warn(f"{step} could not be deleted: {error}")
    return not step.exists()


def _root(workdir: epath.PathLike) -> epath.Path:
    """The folder of a run's checkpoints; absolute, as Orbax requires."""
    is_url = "://" in str(workdir)
    return (epath.Path(workdir) if is_url else epath.Path(workdir).absolute()) / "checkpoints"


def list_saved(workdir: epath.PathLike) -> list[Saved]:
    """The committed checkpoints of a run, ascending by step, those that cannot be read too.

    With several processes, a step that one of them lacks or cannot read is unreadable for all.

    Raises:
      CheckpointError: the folder cannot be listed.
    """
    mine: list[Saved] = []
    with _together():
        try:
            mine = [saved for path in _step_folders(_root(workdir)) if (saved := _read_info(path))]
        except OSError as error:
            raise CheckpointError(f"{_root(workdir)} cannot be listed: {_reason(error)}") from error
    if _processes() == 1:
        return mine
    known = {saved.step: saved for saved in mine}
    told = json.dumps({step: (saved.info.get("unreadable", ""), _sha256(saved.info)) for step, saved in known.items()})
    everyones = [json.loads(text) for text in _gather(told)]
    for step in sorted({int(step) for each in everyones for step in each}):
        reasons, hashes = zip(*(each.get(str(step), ("is not there", "")) for each in everyones), strict=True)
        wrong = [f"{reason} (process {i})" for i, reason in enumerate(reasons) if reason]
        if wrong or len(set(hashes)) > 1:
            what = "; ".join(wrong) or "is not the same for all processes"
            known[step] = Saved(step, _root(workdir) / str(step), {"unreadable": what}, {})
    return [known[step] for step in sorted(known)]


def _step_folders(root: epath.Path) -> list[epath.Path]:
    """The folders of steps, ascending; Orbax renames a folder to the number of its step when it is complete."""
    paths = root.iterdir() if root.is_dir() else []
    steps = [path for path in paths if re.fullmatch("0|[1-9][0-9]*", path.name) and path.is_dir()]
    return sorted(steps, key=lambda path: int(path.name))


def _read_info(path: epath.Path) -> Saved | None:
    """A step without its arrays; None if it is not committed, as on file systems where folders are not renamed."""
    step, info, is_committed = int(path.name), {}, True
    try:
        is_committed = (path / _COMMITTED_FILE).exists()
        written = json.loads((path / _METADATA_FILE).read_bytes())
        info = dict(written["custom_metadata"])
        is_committed |= written.get("commit_timestamp_nsecs") is not None
        if (version := info.get("format", FORMAT)) != FORMAT:  # first: another format may have other keys and hashes
            info = {"unreadable": f"has format {version}, this code reads {FORMAT}"}
        elif info.pop("sha256", None) != _sha256(info):
            raise ValueError("its metadata changed since it was saved, or is missing")
        elif (saved_as := info.get("step", step)) != step:
            raise ValueError(f"it was saved as step {saved_as}")
    except Exception as error:  # JSON that is cut off, of another type, or nested too deeply
        info = {"unreadable": f"is damaged: {_reason(error)}"}
    return Saved(step, path, info, info.pop("metrics", {})) if is_committed else None


def warn(message: str) -> None:
    """Prints a message on stderr."""
    say(message, file=sys.stderr)


def choose(run: str, say: Callable[[str], None] = warn) -> Saved:
    """The checkpoint that 'RUN', 'RUN@latest', 'RUN@best' or 'RUN@STEP' names.

    The best is the best by `checkpoint.best_metric` of the run's own config. 'RUN' alone is the latest one or, if the
    run had early stopping, the best. Unless a step is named, those that cannot be read are passed over.

    Args:
      run: a run's folder, perhaps with the step.
      say: called with a line for each step that was passed over.

    Raises:
      CheckpointError: no such run or step, none can be read, or the named one is damaged; the message lists the steps
        there are.
    """
    workdir, at, which = run.rpartition("@")
    if not at or "/" in which:  # the @ belongs to the path
        workdir, which = run, "default"
    saved = list_saved(workdir)
    if not saved:
        raise CheckpointError(f"no checkpoint under '{workdir}/checkpoints': expected the --workdir of a finished run")
    steps = ", ".join(str(s.step) for s in saved)
    for candidate in saved:
        if str(candidate.step) == which:
            if "unreadable" in candidate.info:
                raise CheckpointError(_damaged(candidate) + _ADVICE)
            return candidate
    if which not in ("default", "latest", "best"):
        raise CheckpointError(f"'{run}': expected latest, best or one of the steps {steps}")
    readable = [s for s in saved if "unreadable" not in s.info]
    if not readable:
        raise none_readable(saved)
    newest = readable[-1]
    wants_best = which == "best" or (which == "default" and _patience(newest.info["config"].get("train", {})) > 0)
    order = readable[::-1]
    if wants_best:
        name = newest.info["config"]["checkpoint"]["best_metric"]
        ranked = _best_first({s.step: s.metrics for s in readable}, name)
        if not ranked:
            raise CheckpointError(f"'{run}': no step was evaluated on '{name}'; there are steps {steps}")
        order = [s for step in ranked for s in readable if s.step == step]
    for passed in saved:
        if "unreadable" in passed.info and (wants_best or passed.step > newest.step):
            say(f"{_damaged(passed)}; passed over for step {order[0].step}")
    return dataclasses.replace(order[0], fallbacks=tuple(order[1:]))


def first_readable(
    candidates: Sequence[Saved], read: Callable[[Saved], T], say: Callable[[str], None] = warn
) -> tuple[Saved, T]:
    """The first checkpoint that can be read, and what `read` returned for it.

    Args:
      candidates: in the order in which they are tried.
      read: raises CheckpointError for one that cannot be read.
      say: called with a line for each that was passed over.

    Raises:
      CheckpointError: none can be read.
    """
    for saved, following in itertools.zip_longest(candidates, candidates[1:]):
        try:
            return saved, read(saved)
        except CheckpointError as error:
            if len(candidates) == 1:
                raise
            then = f"going back to step {following.step}" if following else "there is no other step to go back to"
            say(f"{str(error).removesuffix(_ADVICE)}; {then}")
    raise none_readable(candidates)


def none_readable(saved: Sequence[Saved]) -> CheckpointError:
    """The error for a run none of whose checkpoints can be read: it is not started from scratch in their place."""
    wrong = next((f": {_damaged(s)}" for s in reversed(saved) if "unreadable" in s.info), "")
    return CheckpointError(
        f"none of the {len(saved)} checkpoints in {saved[0].path.parent} can be read{wrong}; restore one from a copy, "
        "or start a new --workdir"
    )


def load(saved: Saved, abstract: Any) -> Any:
    """Reads a checkpoint's state, or a part of it, and checks the fingerprint of every array.

    Each process reads its own part without waiting for the others. Then they agree whether all could, and on the
    fingerprints; if one fails, all raise.

    Args:
      saved: from `list_saved` or `choose`.
      abstract: the arrays to read, a pytree of `jax.ShapeDtypeStruct` with shardings.

    Raises:
      CheckpointError: the checkpoint is unreadable, lacks an array, has one of another shape or dtype, or one that has
        changed since it was saved.
    """
    state = None
    with _together():
        state = _read_arrays(saved, abstract)
    found = jax.device_get(fingerprints(state))
    with _together():
        known = saved.info["arrays"]
        if changed := [name for name, value in found.items() if int(value) != known[name]["fingerprint"]]:
            raise CheckpointError(
                f"{saved.path} is damaged: '{changed[0]}' changed since it was saved ({len(changed)} arrays){_ADVICE}"
            )
    return state


def verify(saved: Saved) -> None:
    """Reads all arrays and files of a checkpoint into the host's memory, and checks their fingerprints.

    Raises:
      CheckpointError: as `load` and `read_file`.
    """
    from orbax.checkpoint import v1 as ocp

    if "unreadable" in saved.info:
        raise CheckpointError(_damaged(saved) + _ADVICE)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    try:
        found = ocp.checkpointables_metadata(saved.path).metadata["state"]
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), found)
    except Exception as error:  # whatever Orbax finds wrong with its own files
        raise CheckpointError(f"{saved.path} cannot be read: {_reason(error)}{_ADVICE}") from None
    if absent := sorted(saved.info["arrays"].keys() - named_leaves(abstract).keys()):
        raise CheckpointError(
            f"{saved.path} is damaged: '{absent[0]}' is not there as it was saved ({len(absent)} arrays){_ADVICE}"
        )
    load(saved, abstract)
    for name in saved.info.get("files", {}):
        read_file(saved, name)


def _read_arrays(saved: Saved, abstract: Any) -> Any:
    """Reads this process's part of the arrays. Raises CheckpointError, as `load`, but for their fingerprints."""
    from orbax.checkpoint import v1 as ocp

    if "unreadable" in saved.info:
        raise CheckpointError(_damaged(saved) + _ADVICE)
    known = saved.info["arrays"]
    wanted = named_leaves(abstract)
    if missing := [name for name in wanted if name not in known]:
        raise CheckpointError(f"{saved.path} lacks '{missing[0]}' ({len(missing)} of {len(wanted)} arrays missing)")
    for name, leaf in wanted.items():
        saved_as = (tuple(known[name]["shape"]), known[name]["dtype"])
        if saved_as != (leaf.shape, str(leaf.dtype)):
            raise CheckpointError(f"{saved.path}: '{name}' is {saved_as}, expected {(leaf.shape, str(leaf.dtype))}")
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    if _processes() > 1:  # without Orbax's barriers, in which the others would wait for one that fails
        me = jax.process_index()
        context.multiprocessing.primary_host, context.multiprocessing.active_processes = me, {me}
        context.multiprocessing.barrier_sync_key_prefix = f"process_{me}"
    state, reason = None, ""
    with _quiet_tasks(), context:
        try:
            state = ocp.load_checkpointables(saved.path, {"state": abstract})["state"]
        except Exception as error:
            reason = _reason(error)
        if reason:
            gc.collect()  # the other reads that Orbax has begun fail too, and say so when they are collected
    if reason:
        raise CheckpointError(f"{saved.path} cannot be read: {reason}{_ADVICE}")
    # In a partial load Orbax hands back what was asked for in the place of an array that it does not find.
    read = {name: leaf for name, leaf in named_leaves(state).items() if isinstance(leaf, jax.Array)}
    if absent := [name for name, leaf in wanted.items() if name not in read or read[name].shape != leaf.shape]:
        raise CheckpointError(
            f"{saved.path} is damaged: '{absent[0]}' is not there as it was saved ({len(absent)} arrays){_ADVICE}"
        )
    return state


@contextlib.contextmanager
def _quiet_tasks() -> Iterator[None]:
    """Does not print the tracebacks of asynchronous tasks that nobody has awaited."""
    logger = logging.getLogger("asyncio")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # coroutines that were never awaited
            yield
    finally:
        logger.setLevel(level)


def _processes() -> int:
    """How many processes the run has; touches no device where there is one."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def _gather(text: str) -> list[str]:
    """What each process says, in their order. All call it together."""
    if _processes() == 1:
        return [text]
    from jax.experimental import multihost_utils

    mine = np.frombuffer(text.encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(mine))))
    padded = np.pad(mine, (0, max(lengths) - len(mine)))
    everyones = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row[:length]).decode() for row, length in zip(everyones, lengths, strict=True)]


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """If its block raises CheckpointError in one process, all processes raise it. The block itself must wait for none.

    Each names its own error, else that of the first process that has one.
    """
    failed: CheckpointError | None = None
    try:
        yield
    except CheckpointError as error:
        failed = error
    everyones = _gather(str(failed or ""))
    if failed:
        raise failed
    if others := [f"process {i}: {reason}" for i, reason in enumerate(everyones) if reason]:
        raise CheckpointError(others[0])


def read_file(saved: Saved, name: str) -> bytes:
    """The content of a file that was saved with a checkpoint.

    Raises:
      CheckpointError: the checkpoint has no such file (older versions saved none), or it is missing or damaged.
    """
    path, expected = saved.path / name, saved.info.get("files", {}).get(name)
    if expected is None:
        raise CheckpointError(f"{saved.path} has no {name}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from None
    if hashlib.sha256(content).hexdigest() != expected:
        raise CheckpointError(f"{path} is damaged: it changed since it was saved")
    return content


def _patience(written: Mapping[str, Any]) -> int:
    """`train.early_stopping.patience` of a saved section; older versions had 'patience', a number or a pair."""
    return int(np.ravel(written.get("early_stopping", written).get("patience", 0))[0])


def _best_first(evaluations: Mapping[Any, Mapping[str, float]], name: str) -> list[Any]:
    """The keys whose metrics have a value for `name`, not NaN, best first; ties in their order."""
    gains = {key: gain(name, m[name]) for key, m in evaluations.items() if name in m and m[name] == m[name]}
    return sorted(gains, key=lambda key: gains[key], reverse=True)


def _sha256(info: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()


def _damaged(saved: Saved) -> str:
    return f"{saved.path} {saved.info['unreadable']}"


def _reason(error: BaseException) -> str:
    """The root cause of an error, on one line: Orbax's own messages can contain a whole tree instead of what happened.

    Of a long message both ends are kept: TensorStore names the file first and says what happened last.
    """
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 400 else f'{text[:200]} ... {text[-200:]}'}"
