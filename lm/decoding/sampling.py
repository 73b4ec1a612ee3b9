"""Batched sampling for prompts of different lengths, with a key/value cache, compiled once per shape."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import losses
from lm.config import Config, GenerateConfig
from lm.config.schema import ConfigError
from lm.data.tokenizer import Tokenizer
from lm.parallel import sharding
from lm.tasks import TASKS, task_of
from lm.types import Batch, ModelFns, Params

# Prompts are padded to a multiple of this, so that prompts of similar length share a compilation.
PROMPT_STEP = 32
# The lowest temperature used: dividing by a smaller one overflows float32.
_LEAST_TEMPERATURE = 1e-30
# Tolerance with which a sum of probabilities reaches top_p: logits and their softmax are float32.
_ROUNDING = 1e-6


class Prompting(NamedTuple):
    """How a kind of model takes prompts.

    Attributes:
      batch: (ids of each prompt, tokenizer) -> the first batch; new ids follow its `tokens`.
      positions: (length of a prompt, number of new ids) -> number of learned positions needed.
      room: (data.seq_len, number of new ids) -> the longest prompt that stays within the length trained on.
    """

    batch: Callable[[Sequence[Sequence[int]], Any], dict[str, np.ndarray]]
    positions: Callable[[int, int], int]
    room: Callable[[int, int], int]


def _left_padded(prompts: Sequence[Sequence[int]], tokenizer: Any) -> dict[str, np.ndarray]:
    """Pads prompts on the left, so that every row writes its next key at the same index of the cache."""
    del tokenizer
    padded = -(-max(map(len, prompts)) // PROMPT_STEP) * PROMPT_STEP
    tokens_BxP = np.zeros((len(prompts), padded), np.int32)
    segments_BxP = np.zeros_like(tokens_BxP)
    for row, prompt in enumerate(prompts):
        tokens_BxP[row, padded - len(prompt) :] = prompt
        segments_BxP[row, padded - len(prompt) :] = 1
    # Padding gets position 0 and is masked by its segment 0.
    positions_BxP = np.maximum(np.cumsum(segments_BxP, axis=1, dtype=np.int32) - 1, 0)
    return {"tokens": tokens_BxP, "segment_ids": segments_BxP, "positions": positions_BxP}


def _as_prefix(prompts: Sequence[Sequence[int]], tokenizer: Any) -> dict[str, np.ndarray]:
    batch = _left_padded(prompts, tokenizer)
    return batch | {"is_prefix": batch["segment_ids"]}


def _as_inputs(prompts: Sequence[Sequence[int]], tokenizer: Any) -> dict[str, np.ndarray]:
    """Prompts as the encoder's input; the decoder starts from BOS."""
    batch = _left_padded(prompts, tokenizer)
    one_Bx1 = np.ones((len(prompts), 1), np.int32)
    return {
        "inputs": batch["tokens"],
        "input_segment_ids": batch["segment_ids"],
        "input_positions": batch["positions"],
        "tokens": tokenizer.bos_id * one_Bx1,
        "segment_ids": one_Bx1,
        "positions": 0 * one_Bx1,
    }


# model.kind -> how it takes prompts; kinds that are not listed do not generate text.
PROMPTING = {
    "decoder": Prompting(_left_padded, operator.add, operator.sub),
    "prefix_decoder": Prompting(_as_prefix, operator.add, operator.sub),
    "encoder_decoder": Prompting(_as_inputs, lambda prompt, new: max(prompt, 1 + new), lambda seq_len, new: seq_len),
}


def encode_prompt(text: str, tokenizer: Tokenizer, cfg: Config) -> list[int]:
    """Ids of a prompt in the form of the run's task: the start of a document, a user's turn, a text to translate.

    Raises:
      ConfigError: the model does not generate text, or the learned positions have no room for the prompt and its
        continuation.
    """
    check_kind(cfg)
    prompt = task_of(cfg).prompt
    assert prompt is not None
    ids = prompt(text, tokenizer)
    check_room(len(ids), cfg)
    return ids


def check_kind(cfg: Config) -> None:
    """Raises ConfigError unless the model of this config generates text."""
    if cfg.model.kind not in PROMPTING or task_of(cfg).prompt is None:
        fitting = ", ".join(name for name, task in TASKS.items() if task.prompt)
        raise ConfigError(
            f"a model of task.name={cfg.task.name} and model.kind={cfg.model.kind} does not generate text; expected "
            f"one of the tasks {fitting}, and of the kinds {', '.join(PROMPTING)}"
        )


def check_room(prompt_len: int, cfg: Config) -> None:
    """Raises ConfigError if a prompt of `prompt_len` ids and its continuation exceed the learned positions."""
    new, max_len = cfg.generate.max_new_tokens, cfg.model.max_len
    if cfg.model.position == "learned" and PROMPTING[cfg.model.kind].positions(prompt_len, new) > max_len:
        raise ConfigError(
            f"a prompt of {prompt_len} ids and 'generate.max_new_tokens' ({new}) do not fit 'model.max_len' ({max_len})"
        )


def prompt_room(cfg: Config) -> int:
    """The longest prompt, in ids, that with `generate.max_new_tokens` new ones stays within the length trained on.

    Raises:
      ConfigError: the model does not generate text.
    """
    check_kind(cfg)
    return PROMPTING[cfg.model.kind].room(cfg.data.seq_len, cfg.generate.max_new_tokens)


def prompt_batch(
    prompts: Sequence[Sequence[int]], cfg: Config, tokenizer: Tokenizer, rows_multiple: int
) -> dict[str, np.ndarray]:
    """The batch that generation starts from; copies of the first prompt pad the rows to a multiple.

    Raises:
      ValueError: an empty prompt.
      ConfigError: a prompt that leaves no room in the learned positions.
    """
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one id")
    check_room(max(map(len, prompts)), cfg)
    missing = -len(prompts) % rows_multiple
    return PROMPTING[cfg.model.kind].batch([*prompts, *[prompts[0]] * missing], tokenizer)


def generate(
    model: ModelFns,
    params: Params,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    cfg: Config,
    tokenizer: Tokenizer,
    *,
    rows_multiple: int = 1,
) -> list[list[int]]:
    """Continues each prompt until the model ends it, or for `cfg.generate.max_new_tokens` ids.

    Args:
      model: its functions.
      params: its parameters.
      prompts: ids, none empty.
      key: random key; the samples of a row are a function of it and the row's index.
      cfg: `generate`, `model` and `task.name` are read.
      tokenizer: defines which ids are text, and which end it.
      rows_multiple: the number of rows is padded to a multiple of it, for the mesh.

    Returns:
      The new ids of each prompt, without the stop id.

    Raises:
      ValueError: an empty prompt.
      ConfigError: a prompt that leaves no room in the learned positions.
    """
    prompt = prompt_batch(prompts, cfg, tokenizer, rows_multiple)
    stops, allowed_V = stop_ids(tokenizer, cfg), allowed_ids(tokenizer, cfg)
    sampled_BxT = _sample(model, cfg.generate, cfg.model.logit_softcap, stops, params, prompt, key, allowed_V)
    return until_stop(np.asarray(jax.device_get(sampled_BxT))[: len(prompts)], stops)


def stop_ids(tokenizer: Tokenizer, cfg: Config) -> tuple[int, ...]:
    """Ids that end a generated text: EOS and, for a chat model, the end of a turn."""
    return task_of(cfg).ends(tokenizer)


def allowed_ids(tokenizer: Tokenizer, cfg: Config) -> np.ndarray:
    """bool [vocab_size]: the ids that may be generated: text, stop ids, the symbols of `generate.symbols`, and those
    that the task generates, such as the sentinels of span corruption."""
    return tokenizer.may_generate(stop_ids(tokenizer, cfg), (*task_of(cfg).generates, *cfg.generate.symbols))


def mask_ids(scores_xV: jax.Array, allowed_V: jax.Array) -> jax.Array:
    """Scores [..., V] with `losses.MASKED_LOGIT` where an id is not allowed; ids beyond `allowed_V` are not."""
    allowed_V = jnp.pad(allowed_V, (0, scores_xV.shape[-1] - allowed_V.shape[0]))
    return jnp.where(jnp.broadcast_to(allowed_V, scores_xV.shape), scores_xV, losses.MASKED_LOGIT)


def until_stop(ids_BxT: np.ndarray, stops: tuple[int, ...]) -> list[list[int]]:
    """Each row up to its first stop id, without it."""
    ended = [np.flatnonzero(np.isin(row, stops)) for row in ids_BxT]
    return [row[: end[0] if len(end) else len(row)].tolist() for row, end in zip(ids_BxT, ended, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _sample(
    model: ModelFns,
    cfg: GenerateConfig,
    softcap: float,
    stop_ids: tuple[int, ...],
    params: Params,
    prompt: Batch,
    key: jax.Array,
    allowed_V: jax.Array,
) -> jax.Array:
    """New ids, int32 [B, max_new_tokens]; after a stop id a row repeats it."""
    rows, prompt_len = prompt["tokens"].shape
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    length_B = prompt["segment_ids"].sum(axis=1)

    def next_token(batch: Any, cache: Any, step: jax.Array) -> tuple[jax.Array, Any]:
        out = model.apply(params, batch, cache=cache)
        size = allowed_V.shape[0]
        logits_BxV = losses.logits(out.pre_logits_BxLxD[:, -1], out.unembed_DxV, vocab_size=size, softcap=softcap)
        step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
        return choose(mask_ids(logits_BxV, allowed_V), step_keys_B, cfg), out.cache

    cache = model.init_cache(rows, prompt_len + cfg.max_new_tokens)
    token_B, cache = next_token(prompt, cache, jnp.int32(0))
    out_BxT = jnp.full((rows, cfg.max_new_tokens), stop_ids[0], jnp.int32).at[:, 0].set(token_B)

    def is_stop(token_B: jax.Array) -> jax.Array:
        return functools.reduce(jnp.logical_or, [token_B == stop for stop in stop_ids])

    def running(carry: Any) -> jax.Array:
        step, _, _, _, done_B = carry
        return (step < cfg.max_new_tokens) & ~done_B.all()

    def body(carry: Any) -> Any:
        step, token_B, cache, out_BxT, done_B = carry
        one_Bx1 = jnp.ones((rows, 1), jnp.int32)
        batch = {"tokens": token_B[:, None], "segment_ids": one_Bx1, "positions": (length_B + step - 1)[:, None]}
        new_B, cache = next_token(batch, cache, step)
        new_B = jnp.where(done_B, stop_ids[0], new_B)
        return step + 1, new_B, cache, out_BxT.at[:, step].set(new_B), done_B | is_stop(new_B)

    carry = (jnp.int32(1), token_B, cache, out_BxT, is_stop(token_B))
    out_BxT = jax.lax.while_loop(running, body, carry)[3]
    return sharding.constrain(out_BxT, None, None)  # replicated: every process reads all of it


def choose(logits_BxV: jax.Array, keys_B: jax.Array, cfg: GenerateConfig) -> jax.Array:
    """Next ids, int32 [B]: the most likely (temperature 0), or drawn from the softmax over `candidates`."""
    if cfg.temperature == 0.0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits_BxK, ids_BxK = candidates(logits_BxV, cfg)
    place_B = jax.vmap(jax.random.categorical)(keys_B, logits_BxK)
    return jnp.take_along_axis(ids_BxK, place_B[:, None], axis=1)[:, 0].astype(jnp.int32)


def candidates(logits_BxV: jax.Array, cfg: GenerateConfig) -> tuple[jax.Array, jax.Array]:
    """The distribution of the next id: logits / temperature, -inf for excluded ids, and the ids; both [B, K].

    top_k keeps the k most likely ids; top_p keeps the fewest of these, most likely first, whose probability reaches p
    (Holtzman et al. 2020), at least one. Ties go to the lower id. `losses.MASKED_LOGIT` is never drawn. Worked,
    temperature 1, probabilities .1 .5 .1 .3 and top_p .8: ids 1 3 0 2, where 0 and 2 have -inf.
    """
    is_masked_BxV = logits_BxV <= losses.MASKED_LOGIT / 2
    # Relative to the largest, which stays 0 at any temperature.
    logits_BxV = (logits_BxV - logits_BxV.max(axis=-1, keepdims=True)) / max(cfg.temperature, _LEAST_TEMPERATURE)
    logits_BxV = jnp.where(is_masked_BxV, -jnp.inf, logits_BxV)
    vocab_size = logits_BxV.shape[1]
    top_k = min(cfg.top_k or vocab_size, vocab_size)
    if top_k == vocab_size and cfg.top_p == 1.0:  # no sorting needed
        return logits_BxV, jax.lax.broadcasted_iota(jnp.int32, logits_BxV.shape, 1)
    sorted_BxK, ids_BxK = jax.lax.top_k(logits_BxV, top_k)  # ties: the lower index first
    if cfg.top_p == 1.0:
        return sorted_BxK, ids_BxK
    probs_BxK = jax.nn.softmax(sorted_BxK, axis=-1)
    before_BxK = jnp.cumsum(probs_BxK, axis=-1) - probs_BxK  # probability of all ids before each
    is_in_BxK = cfg.top_p - before_BxK > jnp.minimum(_ROUNDING, probs_BxK / 4)
    return jnp.where(is_in_BxK.at[:, 0].set(True), sorted_BxK, -jnp.inf), ids_BxK
