"""Checkpoints: Orbax v1 directories `checkpoints/STEP`, each self-contained, and verified when read.

A checkpoint holds the arrays of the state and, as JSON, everything else that is needed to use them: format version,
config, tokenizer hash, position in the data, metrics, and a fingerprint of every array. Orbax writes and commits
atomically, but does not notice bits that flip on disk; the fingerprints, and a hash of the JSON itself, do. Loading
executes no code from the checkpoint.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lm.config import CheckpointConfig
from lm.evaluation.metrics import gain

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. The message names the path and what to do."""


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

    def mix(x: jax.Array) -> jax.Array:  # the finalizer of MurmurHash3, a bijection
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    def one(x: jax.Array) -> jax.Array:
        if x.dtype.itemsize not in (1, 2, 4):
            raise TypeError(f"no fingerprint for dtype {x.dtype}")
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = (x if x.dtype == bool else jax.lax.bitcast_convert_type(x, unsigned)).astype(jnp.uint32)
        index = jnp.zeros(x.shape, jnp.uint32)
        for axis in range(x.ndim):
            index = index * jnp.uint32(x.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(mix(bits ^ mix(index)), dtype=jnp.uint32)

    return {name: one(leaf) for name, leaf in named_leaves(tree).items()}


def named_leaves(tree: Any) -> dict[str, Any]:
    """Name -> leaf of any pytree, for example 'params/embed/embedding' or 'opt_state/0/mu/embed/embedding'."""
    with_path = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in with_path}


@dataclasses.dataclass
class _Retention:
    """Preservation policy for Orbax: keeps the latest and the best steps. Unreadable ones are not counted nor deleted.

    Attributes:
      cfg: `keep_latest`, `keep_best` and `best_metric` are read.
      metrics: step -> metrics of its evaluation, for every step that can be read.
    """

    cfg: CheckpointConfig
    metrics: dict[int, Mapping[str, float]]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        counted = {c.step: self.metrics[c.step] for c in checkpoints if c.step in self.metrics}
        kept = sorted(counted)[-self.cfg.keep_latest :]
        kept += _best_first(counted, self.cfg.best_metric)[: self.cfg.keep_best]
        return [c.step in kept or c.step not in counted for c in checkpoints]


class Checkpoints:
    """Writes the checkpoints of one run, in the background; a context manager that waits for the last save.

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
        self._retention = _Retention(cfg, trusted)
        context = ocp.Context()
        context.asynchronous.create_directories_asynchronously = False  # else errors take 5 minutes
        self._manager = ocp.training.Checkpointer(
            _root(workdir),
            context=context,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=self._retention,
            cleanup_tmp_directories=True,
        )
        self._fingerprints = jax.jit(fingerprints)
        self._in_flight: tuple[int, Any] | None = None
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

    def save(self, step: int, state: Any, info: Mapping[str, Any], metrics: Mapping[str, float] | None) -> None:
        """Starts saving `state` in the background, after waiting for the previous save.

        Args:
          step: steps done.
          state: pytree of arrays.
          info: JSON: config, tokenizer hash, position in the data.
          metrics: of an evaluation of the same state, or None.

        Raises:
          CheckpointError: the previous save failed, or this one cannot start.
        """
        self._finish()
        prints = jax.device_get(self._fingerprints(state))
        arrays = {
            name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "fingerprint": int(prints[name])}
            for name, leaf in named_leaves(state).items()
        }
        about = {"format": FORMAT, "arrays": arrays, "metrics": dict(metrics or {}), **info}
        self._retention.metrics[step] = dict(metrics or {})
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
        self._in_flight = (step, response)

    def poll(self) -> None:
        """Raises the error of a background save that has failed; does not wait for one that is still running."""
        if self._in_flight and not self._manager.is_saving_in_progress():
            self._finish()

    def _finish(self) -> None:
        if self._in_flight is None:
            return
        step, response = self._in_flight
        self._in_flight = None
        try:
            response.result()
        except Exception as error:
            raise self._failed(step, error) from error
        self.last_good = step

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
        cfg = self._retention.cfg
        ranked = _best_first({**self._retention.metrics, None: metrics}, cfg.best_metric)
        return cfg.keep_best > 0 and ranked[:1] == [None]


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
    found = jax.device_get(jax.jit(fingerprints)(state))
    if changed := [name for name in wanted if int(found[name]) != known[name]["fingerprint"]]:
        raise CheckpointError(
            f"{saved.path} is damaged: '{changed[0]}' changed since it was saved ({len(changed)} arrays); "
            "use another step"
        )
    return state


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
