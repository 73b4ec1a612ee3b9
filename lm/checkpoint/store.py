"""Checkpoints: Orbax v1 directories `checkpoints/STEP`, each self-contained, and verified when read.

A checkpoint holds the arrays of the state and, as JSON, everything else that is needed to use them: format version,
config, tokenizer hash, position in the data, metrics, and a fingerprint of every array. Orbax writes and commits
atomically, but does not notice bits that flip on disk; the fingerprints, and a hash of the JSON itself, do. Loading
executes no code from the checkpoint.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lm import files as files_lib
from lm.config import CheckpointConfig
from lm.evaluation.metrics import gain

FORMAT = 1
_LARGE, _SLICES = 1 << 20, 16  # elements; of an array that is large
_SCRATCH = ".orbax-checkpoint-tmp"  # ends the name of a step that Orbax is writing
_EXPIRED = ".deleted"  # ends the name of a step that is being deleted


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
      info: the JSON beside the arrays: 'config', 'tokenizer_hash', 'data', 'arrays'; if it is damaged, only
        'unreadable' -> the reason.
      metrics: of the evaluation at this step; empty if there was none.
    """

    step: int
    path: epath.Path
    info: dict[str, Any]
    metrics: dict[str, float]


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
    ):
        """
        Args:
          workdir: the run's folder.
          cfg: which checkpoints to keep.
          saved: what `list_saved` found at the start of the process; None = look now, in all processes together.
          resumed: the step that the run resumes from, as later ones could not be read. None = all of them are good.
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
        )
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._in_flight: tuple[int, Future[list[int]]] | None = None
        self.last_good = max(trusted, default=None)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
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
          files: name -> content of further files, for `read_file`: the tokenizer.

        Raises:
          CheckpointError: the previous save failed, or this one cannot start.
          Diverged: a value of the state is not finite. Nothing is saved, nothing is deleted.
        """
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
        about = {**info, "format": FORMAT, "arrays": arrays, "files": hashes, "metrics": dict(metrics or {})}
        self._metrics[step], self._files = dict(metrics or {}), (step, files)
        try:
            response = self._manager.save_checkpointables_async(
                step,
                {"state": state},
                force=True,
                overwrite=any(c.step == step for c in self._manager.checkpoints),  # one that could not be read
                custom_metadata=about | {"sha256": _sha256(about)},
            )
        except Exception as error:
            raise self._failed(step, error) from error
        kept = dict(self._metrics)
        self._in_flight = (step, self._background.submit(self._commit, step, response, kept))

    def _add_files(self) -> None:
        """Called by Orbax, on process 0, when the arrays of a step are written and before it gets its name."""
        assert self._files is not None
        step, files = self._files
        for name, content in files.items():
            Path(self._manager.directory, f"{step}{_SCRATCH}", name).write_bytes(content)

    def _commit(self, step: int, response: Any, kept: Mapping[int, Mapping[str, float]]) -> list[int]:
        """Waits until a step is on disk, and then deletes those that need not be kept. Returns them."""
        response.result()
        newest = sorted(kept)[-self._cfg.keep_latest :]
        best = _best_first(kept, self._cfg.best_metric)[: self._cfg.keep_best]
        expired = [each for each in kept if each not in newest and each not in best]
        if jax.process_index() == 0:
            root = Path(self._manager.directory)
            files_lib.sync_tree(root / str(step))  # Orbax does so for the arrays only
            files_lib.sync(root)
            for each in expired:
                _delete(root / str(each))
        return expired

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
        except Exception as error:
            raise self._failed(step, error) from error
        self.last_good = step
        for each in expired:
            del self._metrics[each]

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        path = self._manager.directory / str(step)
        last = (
            f"the last good checkpoint is step {self.last_good}"
            if self.last_good is not None
            else "there is no earlier one"
        )
        return CheckpointError(f"saving {path} failed: {_reason(error)}; {last}. Free disk space and start again.")

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
    root = workdir / "checkpoints"
    unfinished = re.compile(rf"\d+({re.escape(_SCRATCH)}.*|{re.escape(_EXPIRED)})")
    steps = sorted(path for path in root.glob("*") if unfinished.fullmatch(path.name))
    for path in steps:
        shutil.rmtree(path)
    if removed := [*(f"checkpoints/{path.name}" for path in steps), *files_lib.remove_scratch(workdir)]:
        say(f"removed what a killed process left in {workdir}: {', '.join(removed)}")


def _delete(step: Path) -> None:
    """Deletes a step. A step that cannot be deleted is no reason to end the run; `sweep` tries again."""
    expired = step.with_name(step.name + _EXPIRED)
    try:
        step.rename(expired)
        files_lib.sync(step.parent)
        shutil.rmtree(expired)
    except OSError as error:
        print(f"{step} could not be deleted: {error}", file=sys.stderr, flush=True)


def _root(workdir: epath.PathLike) -> epath.Path:
    """The folder of a run's checkpoints; absolute, as Orbax requires."""
    is_url = "://" in str(workdir)
    return (epath.Path(workdir) if is_url else epath.Path(workdir).absolute()) / "checkpoints"


def list_saved(workdir: epath.PathLike) -> list[Saved]:
    """The committed checkpoints of a run, ascending by step."""
    root = _root(workdir)
    if not root.is_dir():
        return []
    from orbax.checkpoint import v1 as ocp

    with ocp.training.Checkpointer(root) as manager:
        out = []
        for saved in manager.checkpoints:
            try:
                info = dict(manager.checkpointables_metadata(saved.step).custom_metadata or {})
                if info.get("format", FORMAT) == FORMAT and info.pop("sha256", None) != _sha256(info):
                    raise ValueError("its metadata changed since it was saved, or is missing")
            except Exception as error:  # a damaged file makes Orbax raise all kinds; `load` then refuses this step
                info = {"unreadable": _reason(error)}
            metrics = info.pop("metrics", {})
            out.append(Saved(saved.step, epath.Path(saved.path), info, metrics))
    return out


def choose(run: str) -> Saved:
    """The checkpoint that 'RUN', 'RUN@latest', 'RUN@best' or 'RUN@STEP' names.

    The best is the best by `checkpoint.best_metric` of the run's own config. 'RUN' alone is the latest one or, if the
    run had early stopping, the best.

    Raises:
      CheckpointError: no such run or step, or it is damaged; the message lists the steps there are.
    """
    workdir, at, which = run.rpartition("@")
    if not at or "/" in which:  # the @ belongs to the path
        workdir, which = run, "default"
    saved = list_saved(workdir)
    if not saved:
        raise CheckpointError(f"no checkpoint under '{workdir}/checkpoints': expected the --workdir of a finished run")
    steps = ", ".join(str(s.step) for s in saved)
    readable = [s for s in saved if "unreadable" not in s.info]
    if which == "default":
        stops_early = readable and _patience(readable[-1].info["config"].get("train", {})) > 0
        which = "best" if stops_early else "latest"
    if which == "latest" or not readable:
        which = str(saved[-1].step)
    elif which == "best":
        name = readable[-1].info["config"]["checkpoint"]["best_metric"]
        ranked = _best_first({s.step: s.metrics for s in readable}, name)
        if not ranked:
            raise CheckpointError(f"'{run}': no step was evaluated on '{name}'; there are steps {steps}")
        which = str(ranked[0])
    for candidate in saved:
        if str(candidate.step) == which:
            if "unreadable" in candidate.info:
                raise CheckpointError(_damaged(candidate))
            return candidate
    raise CheckpointError(f"'{run}': expected latest, best or one of the steps {steps}")


def load(saved: Saved, abstract: Any) -> Any:
    """Reads a checkpoint's state, or a part of it, and checks the fingerprint of every array.

    Args:
      saved: from `list_saved` or `choose`.
      abstract: the arrays to read, a pytree of `jax.ShapeDtypeStruct` with shardings.

    Raises:
      CheckpointError: the checkpoint is unreadable, lacks an array, has one of another shape or dtype, or one that has
        changed since it was saved.
    """
    from orbax.checkpoint import v1 as ocp

    version = saved.info.get("format")
    if "unreadable" in saved.info:
        raise CheckpointError(_damaged(saved))
    if version != FORMAT:
        raise CheckpointError(f"{saved.path} has format {version}, this code reads {FORMAT}")
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
    try:
        with context:
            state = ocp.load_checkpointables(saved.path, {"state": abstract})["state"]
    except Exception as error:
        raise CheckpointError(f"{saved.path} cannot be read: {_reason(error)}; use another step") from error
    found = jax.device_get(fingerprints(state))
    if changed := [name for name in wanted if int(found[name]) != known[name]["fingerprint"]]:
        raise CheckpointError(
            f"{saved.path} is damaged: '{changed[0]}' changed since it was saved ({len(changed)} arrays); "
            "use another step"
        )
    return state


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
    return f"{saved.path} is damaged: {saved.info['unreadable']}; use another step"


def _reason(error: BaseException) -> str:
    """The root cause of an error: Orbax's own messages can contain the whole tree instead of what happened."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return f"{type(error).__name__}: {str(error)[:300]}"
