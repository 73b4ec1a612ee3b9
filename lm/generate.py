"""Sampling from a model: prompts of different lengths in one batch, a key/value cache, one compilation per shape."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import losses, sharding
from lm.config import Config, GenerateConfig
from lm.data import examples
from lm.data.tokenizer import Tokenizer
from lm.schema import ConfigError
from lm.types import ModelFns, Params

# Prompts are padded to a multiple of this, so that prompts of like length share a compilation.
PROMPT_STEP = 32


def encode_prompt(text: str, tokenizer: Tokenizer, cfg: Config) -> list[int]:
    """Ids of a prompt as the run's task would see it: a user's turn for 'chat', the start of a document for 'text'.

    Raises:
      ConfigError: it and `generate.max_new_tokens` do not fit the learned positions.
    """
    if cfg.data.task == "chat":
        ids = examples.prompt_ids([{"role": "user", "content": text}], tokenizer)
    else:
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    check_room(len(ids), cfg)
    return ids


def check_room(prompt_len: int, cfg: Config) -> None:
    """Raises ConfigError when a prompt of so many ids and its continuation do not fit the learned positions."""
    new, max_len = cfg.generate.max_new_tokens, cfg.model.max_len
    if cfg.model.position == "learned" and prompt_len + new > max_len:
        raise ConfigError(
            f"a prompt of {prompt_len} ids and 'generate.max_new_tokens' ({new}) do not fit 'model.max_len' ({max_len})"
        )


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
    """Continues each prompt until the model ends it or `cfg.generate.max_new_tokens` are made.

    Args:
      model: its functions.
      params: its parameters.
      prompts: ids, none empty.
      key: a row's samples are a function of it and the row's index.
      cfg: `generate`, `model.logit_softcap` and, for learned positions, `model.max_len` are read.
      tokenizer: says which ids end a text or a turn.
      rows_multiple: rows are filled up to a multiple of it, for the mesh.

    Returns:
      The new ids of each prompt, without the one that ended it.

    Raises:
      ValueError: an empty prompt.
      ConfigError: a prompt that leaves no room in the learned positions.
    """
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one id")
    longest = max(map(len, prompts))
    padded = -(-longest // PROMPT_STEP) * PROMPT_STEP
    check_room(longest, cfg)
    rows = -(-len(prompts) // rows_multiple) * rows_multiple
    filled = [*prompts, *[prompts[0]] * (rows - len(prompts))]
    # Prompts end at the same column, so that every row writes its next key at the same place of the cache.
    tokens_BxP = np.zeros((rows, padded), np.int32)
    segments_BxP = np.zeros((rows, padded), np.int32)
    for row, prompt in enumerate(filled):
        tokens_BxP[row, padded - len(prompt) :] = prompt
        segments_BxP[row, padded - len(prompt) :] = 1
    stop_ids = (tokenizer.eos_id, tokenizer.end_of_turn_id)
    sampled_BxT = _sample(
        model,
        cfg.generate,
        tokenizer.vocab_size,
        cfg.model.logit_softcap,
        stop_ids,
        params,
        tokens_BxP,
        segments_BxP,
        key,
    )
    out = []
    for row in np.asarray(jax.device_get(sampled_BxT))[: len(prompts)]:
        ended = np.flatnonzero(np.isin(row, stop_ids))
        out.append(row[: ended[0] if len(ended) else len(row)].tolist())
    return out


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _sample(
    model: ModelFns,
    cfg: GenerateConfig,
    vocab_size: int,
    softcap: float,
    stop_ids: tuple[int, ...],
    params: Params,
    tokens_BxP: jax.Array,
    segments_BxP: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """New ids, int32 [B, max_new_tokens]; after a stop id a row repeats it."""
    rows, prompt_len = tokens_BxP.shape
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    length_B = segments_BxP.sum(axis=1)
    # Padding on the left gets position 0; segment 0 keeps it out of sight.
    positions_BxP = jnp.maximum(jnp.cumsum(segments_BxP, axis=1) - 1, 0)

    def next_token(batch: Any, cache: Any, step: jax.Array) -> tuple[jax.Array, Any]:
        out = model.apply(params, batch, cache=cache)
        logits_BxV = losses.logits(out.hidden_BxLxD[:, -1], out.unembed_DxV, vocab_size=vocab_size, softcap=softcap)
        step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
        return choose(logits_BxV, step_keys_B, cfg), out.cache

    prompt = {"tokens": tokens_BxP, "segment_ids": segments_BxP, "positions": positions_BxP}
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
    return sharding.constrain(out_BxT, None, None)  # every process reads all of it


def choose(logits_BxV: jax.Array, keys_B: jax.Array, cfg: GenerateConfig) -> jax.Array:
    """Next ids, int32 [B]: the most likely (temperature 0), or drawn from the top-k, then the top-p, of the softmax.

    top_k keeps the k most likely ids; top_p keeps the fewest whose probability reaches p (Holtzman et al. 2020), at
    least one. Ties at the border are kept.
    """
    if cfg.temperature == 0.0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits_BxV /= cfg.temperature
    if 0 < cfg.top_k < logits_BxV.shape[1]:
        kth_Bx1 = jax.lax.top_k(logits_BxV, cfg.top_k)[0][:, -1:]
        logits_BxV = jnp.where(logits_BxV < kth_Bx1, losses.MASKED_LOGIT, logits_BxV)
    if cfg.top_p < 1.0:
        sorted_BxV = jnp.sort(logits_BxV, axis=-1, descending=True)
        probs_BxV = jax.nn.softmax(sorted_BxV, axis=-1)
        before_BxV = jnp.cumsum(probs_BxV, axis=-1) - probs_BxV  # probability of all that is more likely
        last_Bx1 = jnp.min(jnp.where(before_BxV < cfg.top_p, sorted_BxV, jnp.inf), axis=-1, keepdims=True)
        logits_BxV = jnp.where(logits_BxV < last_Bx1, losses.MASKED_LOGIT, logits_BxV)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BxV).astype(jnp.int32)
