"""The few types that all packages of `lm` share.

Shape letters, used in array names throughout the code (`logits_BxLxV`):

    B batch rows    L positions in a row    D embedding width    V vocabulary
    N layers        H query heads           K key/value heads    E width of one head
    F MLP width     S positions in a key/value cache
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypedDict

import jax
from jaxtyping import Array, Float32, Int32, UInt8


class Batch(TypedDict, total=False):
    """The arrays of B rows; which of them are present depends on the task.

    A row may have several views: text [B, views, L], images [B, views, H, W, C]. In an encoder-decoder, S is the length
    of an encoder row and L that of a decoder row.
    """

    tokens: Int32[Array, "B *views L"]  # input ids
    targets: Int32[Array, "B *views L"]  # the id that each position predicts; never across a segment boundary
    loss_weights: Float32[Array, "B *views L"]  # 0 = not trained on
    segment_ids: Int32[Array, "B *views L"]  # 0 = padding, documents of a row numbered from 1
    positions: Int32[Array, "B *views L"]  # restart at 0 in each segment
    type_ids: Int32[Array, "B L"]  # 0 = first sentence, 1 = second one (encoders)
    is_prefix: Int32[Array, "B L"]  # 1 = visible to every position of its segment (prefix LM)
    inputs: Int32[Array, "B S"]
    input_segment_ids: Int32[Array, "B S"]
    input_positions: Int32[Array, "B S"]
    images: UInt8[Array, "B *views H W C"]
    visible_patches: Int32[Array, "B seen"]  # indices of patches
    masked_patches: Int32[Array, "B hidden"]
    # A class, a number, the tag of each position (-1 = none), or the first and the last position of a span.
    labels: Int32[Array, " B"] | Float32[Array, " B"] | Int32[Array, "B 2"] | Int32[Array, "B L"]
    part: Int32[Array, " B"]  # index of the row's task in a mixture of tasks
    example_index: Int32[Array, " B"]  # global index of the row in the stream: names it in errors, seeds its dropout
    row_weights: Float32[Array, " B"]  # 0 = padding row in the last batch of an evaluation


# Keys whose last axis is positions.
LENGTH_KEYS = (
    *("tokens", "targets", "loss_weights", "segment_ids", "positions", "type_ids", "is_prefix"),
    *("inputs", "input_segment_ids", "input_positions"),
)

# Name -> numpy array [R, ...]: outputs of a task for each of R held-out rows.
Outputs = dict[str, Any]

# A nested dict of arrays; its leaves are named by paths such as 'decoder/layers/mlp/up/kernel'.
Params = dict[str, Any]


class LossTerms(NamedTuple):
    """The result of a loss function. Sums are added over micro-batches and devices and divided once, globally.

    Attributes:
      sum: float32 [], the weighted sum of the per-token (or per-example) loss, see `lm.tasks.Task.loss_unit`.
      weight: float32 [], the sum of the weights.
      metrics: name -> (sum, weight), float32 [] each; reported as sum / weight.
      outputs: name -> [B, ...], per-row values that evaluation collects to score all rows at once.
    """

    sum: jax.Array
    weight: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]]
    outputs: dict[str, jax.Array] = {}  # noqa: RUF012, never written to


class TrainState(NamedTuple):
    """The state that a step passes to the next; a checkpoint of it is enough to continue bitwise identically.

    Attributes:
      step: int32 [], steps done. The learning rate and all randomness are functions of it and the seed.
      params: the parameters, float32.
      opt_state: optax state of the trained part of the parameters; frozen ones have none.
      ema: exponential moving average of the trained part, or None when it is off.
      skipped: int32 [], steps whose batch had weight 0 and so changed nothing but `step` and this count.
      start: initial values of trained parameters, used by `optim.l2_sp`, `optim.mixout` and the loss of tasks with
        `Task.needs_start`; None if nothing needs them.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params | None
    skipped: jax.Array
    start: Params | None = None


class ModelOutput(NamedTuple):
    """What `ModelFns.apply` returns.

    Attributes:
      hidden_BxLxD: last hidden states, after the final norm, in the compute dtype.
      unembed_DxV: the output projection in the compute dtype, so that the loss can compute logits in chunks; None if
        the model has another head instead.
      cache: the updated key/value cache when one was passed, else None.
      head: float32, the output of the model's `Head`, or None when it has none.
      routing_2xB: float32, means over layers of `lm.models.moe.load_balance`; None in a model without experts.
      transformed_BxLxD: what `unembed_DxV` multiplies where that is not the hidden states, see `model.lm_transform`.
    """

    hidden_BxLxD: jax.Array
    unembed_DxV: Any
    cache: Any = None
    head: Any = None
    routing_2xB: Any = None
    transformed_BxLxD: Any = None

    @property
    def pre_logits_BxLxD(self) -> jax.Array:
        """What `unembed_DxV` multiplies."""
        return self.hidden_BxLxD if self.transformed_BxLxD is None else self.transformed_BxLxD


class Head(NamedTuple):
    """An output layer for a task, on top of the last hidden states; its parameters are 'head/...'.

    Attributes:
      kind: 'pooled' = [B, size] from one vector a row; 'token' = [B, L, size]; 'projection' = [B, size] by an MLP.
      size: width of the output.
      keeps_unembed: whether the model also predicts tokens.
    """

    kind: Literal["pooled", "token", "projection"]
    size: int
    keeps_unembed: bool = False


def _no_cache(rows: int, length: int) -> Any:
    raise NotImplementedError("this model does not generate: it has no cache")


def _identity(params: Params) -> Params:
    return params


class ModelFns(NamedTuple):
    """A model as pure functions; code outside `lm/models` does not depend on how it is implemented.

    Attributes:
      init: key -> params.
      apply: (params, batch, *, rng=None, cache=None) -> ModelOutput. `rng` turns dropout on.
      logical_axes: () -> tree like params; each leaf a tuple with one logical axis name (or None) a dimension.
      init_cache: (rows, length) -> an empty key/value cache for `apply`, in models that generate. Its leaves, and those
        of the cache that `apply` returns, are [B, ...] or [].
      for_decoding: params -> the same for `apply`, as a program that calls it for one position after another reads them
        fastest; called outside of the program, with arrays.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[..., ModelOutput]
    logical_axes: Callable[[], Any]
    init_cache: Callable[[int, int], Any] = _no_cache
    for_decoding: Callable[[Params], Params] = _identity


Apply = Callable[..., ModelOutput]  # `ModelFns.apply`
LossFn = Callable[[Params, Batch, jax.Array | None], LossTerms]  # (params, batch, rng)
# (params, batch, rng, all parameters with their initial values)
LossFnWithStart = Callable[[Params, Batch, jax.Array | None, Params], LossTerms]
