"""Checkpoints: Orbax v1 directories `checkpoints/STEP`, each complete in itself, and verified when read.

A step holds the state's arrays and, as JSON, what is needed to read them alone: format version, config, tokenizer hash,
data position, metrics, and a fingerprint of every array. Orbax writes and commits atomically; it does not notice a bit
that flips on disk, which is what the fingerprints are for. Loading runs no code from the checkpoint.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from lm.config import CheckpointConfig

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. The message names the path and what to do."""


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a committed step says of itself.

    Attributes:
      step: steps done.
      path: its folder.
      info: the JSON beside the arrays: 'config', 'tokenizer_hash', 'data', 'arrays'.
      metrics: of the evaluation at this step; empty when there was none.
    """

    step: int
    path: epath.Path
    info: dict[str, Any]
    metrics: dict[str, float]


def fingerprints(tree: Any) -> dict[str, jax.Array]:
    """Path -> uint32 [] that changes with any flipped bit of the leaf, whatever its sharding.

    The sum, modulo 2^32, of each 32-bit pattern times an odd number made from its position: a flip of bit b changes
    the sum by an odd multiple of 2^b. Integer sums do not depend on their order.
    """

    def one(x: jax.Array) -> jax.Array:
        if x.dtype.itemsize not in (1, 2, 4):
            raise TypeError(f"no fingerprint for dtype {x.dtype}")
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = (x if x.dtype == bool else jax.lax.bitcast_convert_type(x, unsigned)).astype(jnp.uint32)
        index = jnp.zeros(x.shape, jnp.uint32)
        for axis in range(x.ndim):
            index = index * jnp.uint32(x.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)

    return {name: one(leaf) for name, leaf in named_leaves(tree).items()}


def named_leaves(tree: Any) -> dict[str, Any]:
    """Name -> leaf of any pytree, for example 'params/embed/embedding' or 'opt_state/0/mu/embed/embedding'."""
    with_path = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in with_path}


class Checkpoints:
    """The checkpoints of one run, being written. Close it (or leave its `with`) before the process ends.

    At most one save is in flight. An error of a save surfaces at the next `poll`, `save` or `close`, never later.
    """

    def __init__(self, workdir: epath.PathLike, cfg: CheckpointConfig):
        from orbax.checkpoint import v1 as ocp

        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(cfg.keep_latest)]
        if cfg.keep_best:
            kept.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[cfg.best_metric],
                    reverse=cfg.best_mode == "min",
                    n=cfg.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.training.Checkpointer(
            epath.Path(workdir) / "checkpoints",
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )
        self._cfg = cfg
        self._fingerprints = jax.jit(fingerprints)
        self._in_flight: tuple[int, Any] | None = None
        self.last_good = max((c.step for c in self._manager.checkpoints), default=None)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self._finish()
        except CheckpointError:
            if kind is None:
                raise  # otherwise the error that is already on its way is the one to show
        finally:
            self._manager.close()

    def save(self, step: int, state: Any, info: Mapping[str, Any], metrics: Mapping[str, float] | None) -> None:
        """Starts saving `state` in the background; waits only for the save before it.

        Args:
          step: steps done.
          state: pytree of arrays.
          info: JSON: config, tokenizer hash, data position.
          metrics: of an evaluation of this very state, or None.

        Raises:
          CheckpointError: the save before this one failed.
        """
        self._finish()
        prints = jax.device_get(self._fingerprints(state))
        arrays = {
            name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "fingerprint": int(prints[name])}
            for name, leaf in named_leaves(state).items()
        }
        response = self._manager.save_checkpointables_async(
            step,
            {"state": state},
            force=True,
            overwrite=any(c.step == step for c in self._manager.checkpoints),  # one that could not be read
            metrics=dict(metrics) if metrics else None,
            custom_metadata={"format": FORMAT, "arrays": arrays, **info},
        )
        self._in_flight = (step, response)

    def poll(self) -> None:
        """Raises the error of a background save that has failed, without waiting for one that still runs."""
        if self._in_flight and not self._manager.is_saving_in_progress():
            self._finish()

    def _finish(self) -> None:
        if self._in_flight is None:
            return
        step, response = self._in_flight
        self._in_flight = None
        path = self._manager.directory / str(step)
        try:
            response.result()
        except Exception as error:
            last = f"last good checkpoint: step {self.last_good}" if self.last_good is not None else "none before it"
            raise CheckpointError(f"saving {path} failed: {error}; {last}. Free the disk and start again.") from error
        self.last_good = step

    def wait(self) -> None:
        """Waits until what was saved is on disk, and raises if it is not."""
        self._finish()

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation is better than that of every checkpoint that is kept; always False when none is to be."""
        name, sign = self._cfg.best_metric, 1 if self._cfg.best_mode == "max" else -1
        kept = [c.metrics[name] for c in self._manager.checkpoints if c.metrics]
        return self._cfg.keep_best > 0 and all(sign * metrics[name] > sign * value for value in kept)


def list_saved(workdir: epath.PathLike) -> list[Saved]:
    """The committed checkpoints of a run, ascending by step; empty when there are none."""
    root = epath.Path(workdir) / "checkpoints"
    if not root.is_dir():
        return []
    from orbax.checkpoint import v1 as ocp

    with ocp.training.Checkpointer(root) as manager:
        out = []
        for saved in manager.checkpoints:
            try:
                info = dict(manager.checkpointables_metadata(saved.step).custom_metadata or {})
            except Exception as error:  # whatever a damaged file makes Orbax raise; `load` then refuses this step
                info = {"unreadable": str(error)}
            out.append(Saved(saved.step, epath.Path(saved.path), info, dict(saved.metrics or {})))
    return out


def choose(run: str, best_metric: str = "loss", best_mode: str = "min") -> Saved:
    """The checkpoint that 'RUN', 'RUN@latest', 'RUN@best' or 'RUN@STEP' names.

    Raises:
      CheckpointError: no such run or step; the message lists what there is.
    """
    workdir, _, which = run.partition("@")
    saved = list_saved(workdir)
    if not saved:
        raise CheckpointError(f"no checkpoint under '{workdir}/checkpoints': expected the --workdir of a finished run")
    steps = ", ".join(str(s.step) for s in saved)
    if which in ("", "latest"):
        return saved[-1]
    if which == "best":
        with_metric = [s for s in saved if best_metric in s.metrics]
        if not with_metric:
            raise CheckpointError(f"'{run}': no checkpoint was evaluated on '{best_metric}'; there are steps {steps}")
        return (min if best_mode == "min" else max)(with_metric, key=lambda s: s.metrics[best_metric])
    for candidate in saved:
        if str(candidate.step) == which:
            return candidate
    raise CheckpointError(f"'{run}': expected latest, best or one of the steps {steps}")


def load(saved: Saved, abstract: Any) -> Any:
    """Reads a checkpoint's state, or the part of it that `abstract` names, and checks every array's fingerprint.

    Args:
      saved: from `list_saved` or `choose`.
      abstract: pytree of `jax.ShapeDtypeStruct` with shardings; each leaf must be in the checkpoint.

    Raises:
      CheckpointError: unreadable, another shape or dtype, a missing array, or an array that changed since it was saved.
    """
    from orbax.checkpoint import v1 as ocp

    version = saved.info.get("format")
    if "unreadable" in saved.info:
        raise CheckpointError(f"{saved.path} is damaged: {saved.info['unreadable']}; use another step")
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
        raise CheckpointError(f"{saved.path} cannot be read: {error}") from error
    found = jax.device_get(jax.jit(fingerprints)(state))
    if changed := [name for name in wanted if int(found[name]) != known[name]["fingerprint"]]:
        raise CheckpointError(
            f"{saved.path} is damaged: '{changed[0]}' changed since it was saved ({len(changed)} arrays); "
            "use another step"
        )
    return state
