"""Batched beam search with a key/value cache, compiled once per shape."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import losses
from lm.config import Config
from lm.data.tokenizer import Tokenizer
from lm.decoding import sampling
from lm.parallel import sharding
from lm.types import Batch, ModelFns, Params

ALPHA = 0.6  # length penalty of Wu et al. 2016
_NONE = losses.MASKED_LOGIT  # score of an empty slot


def search(
    model: ModelFns,
    params: Params,
    prompts: Sequence[Sequence[int]],
    cfg: Config,
    tokenizer: Tokenizer,
    *,
    beams: int,
    alpha: float = ALPHA,
    rows_multiple: int = 1,
) -> list[list[int]]:
    """Finds a likely continuation of each prompt by beam search.

    Each step extends the live hypotheses and takes the `beams` likeliest extensions. Those that end are finished; the
    `beams` likeliest of the others stay live. A row stops when it has `beams` finished hypotheses, or after
    `cfg.generate.max_new_tokens`, when live ones count too. The result has the highest log P / ((5 + n) / 6)^alpha,
    where n counts its new ids including the stop id (Wu et al. 2016, equation 14).

    Args:
      model, params, prompts, cfg, tokenizer, rows_multiple: as for `lm.decoding.sampling.generate`.
      beams: 1 = greedy.
      alpha: length penalty; 0 = none, larger values favour longer texts.

    Returns:
      The new ids of each prompt, without the stop id.

    Raises:
      ValueError: an empty prompt.
      ConfigError: the learned positions have no room for a prompt and its continuation.
    """
    prompt = sampling.prompt_batch(prompts, cfg, tokenizer, rows_multiple)
    stops, allowed_V = sampling.stop_ids(tokenizer, cfg), sampling.allowed_ids(tokenizer, cfg)
    sizes = (cfg.generate.max_new_tokens, cfg.model.logit_softcap, stops, beams)
    best_BxT = _search(model, *sizes, jnp.float32(alpha), params, prompt, allowed_V)
    return sampling.until_stop(np.asarray(jax.device_get(best_BxT))[: len(prompts)], stops)


# Shape letters besides those of `lm.types`: K beams (no key/value heads here), C candidates, T new ids.


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _search(
    model: ModelFns,
    max_new: int,
    softcap: float,
    stop_ids: tuple[int, ...],
    beams: int,
    alpha: jax.Array,
    params: Params,
    prompt: Batch,
    allowed_V: jax.Array,
) -> jax.Array:
    """New ids of the best hypothesis, int32 [B, max_new], padded with a stop id."""
    vocab_size = allowed_V.shape[0]
    rows, prompt_len = prompt["tokens"].shape
    length_B = prompt["segment_ids"].sum(axis=1)

    def next_log_probs(batch: Any, cache: Any) -> tuple[jax.Array, Any]:
        out = model.apply(params, batch, cache=cache)
        logits_xV = losses.logits(out.pre_logits_BxLxD[:, -1], out.unembed_DxV, vocab_size=vocab_size, softcap=softcap)
        # Masked after the softmax, so that the score of a text is its log-probability under the model.
        return sampling.mask_ids(jax.nn.log_softmax(logits_xV[:, :vocab_size]), allowed_V), out.cache

    log_probs_BxV, cache = next_log_probs(prompt, model.init_cache(rows, prompt_len + max_new))
    cache = _take_rows(cache, jnp.repeat(jnp.arange(rows), beams))
    log_probs_BxKxV = jnp.broadcast_to(log_probs_BxV[:, None], (rows, beams, vocab_size))
    none_BxK = jnp.full((rows, beams), _NONE)
    empty_BxKxT = jnp.full((rows, beams, max_new), stop_ids[0], jnp.int32)
    # At first all beams are the prompt, so only the first one counts.
    live, done = (empty_BxKxT, none_BxK.at[:, 0].set(0.0)), (empty_BxKxT, none_BxK)
    step = functools.partial(_step, stop_ids=stop_ids, alpha=alpha)
    live, done, _ = step(live, done, log_probs_BxKxV, jnp.int32(0))

    def running(carry: Any) -> jax.Array:
        at, _, done, _ = carry
        return (at < max_new) & ~_is_full(done).all()

    def body(carry: Any) -> Any:
        at, live, done, cache = carry
        tokens_Rx1 = jax.lax.dynamic_index_in_dim(live[0], at - 1, axis=2, keepdims=False).reshape(-1, 1)
        positions_Rx1 = jnp.repeat(length_B + at - 1, beams)[:, None]
        batch = {"tokens": tokens_Rx1, "segment_ids": jnp.ones_like(tokens_Rx1), "positions": positions_Rx1}
        log_probs_RxV, cache = next_log_probs(batch, cache)
        live, done, parent_BxK = step(live, done, log_probs_RxV.reshape(rows, beams, vocab_size), at)
        cache = _take_rows(cache, (jnp.arange(rows)[:, None] * beams + parent_BxK).reshape(-1))
        return at + 1, live, done, cache

    _, live, done, _ = jax.lax.while_loop(running, body, (jnp.int32(1), live, done, cache))
    cut_BxK = jnp.where(_is_full(done)[:, None], _NONE, live[1] / _penalty(max_new, alpha))
    tokens_Bx1xT, _ = _best((jnp.concatenate([done[0], live[0]], 1), jnp.concatenate([done[1], cut_BxK], 1)), 1)[0]
    return sharding.constrain(tokens_Bx1xT[:, 0], None, None)  # replicated: every process reads all of it


Hypotheses = tuple[jax.Array, jax.Array]  # ids int32 [B, K, T], scores float32 [B, K]


def _step(
    live: Hypotheses,
    done: Hypotheses,
    log_probs_BxKxV: jax.Array,
    at: jax.Array,
    *,
    stop_ids: tuple[int, ...],
    alpha: jax.Array,
) -> tuple[Hypotheses, Hypotheses, jax.Array]:
    """Live (by log P) and finished (length-penalised) hypotheses after new id `at`, and the parent of each live one."""
    rows, beams, vocab_size = log_probs_BxKxV.shape
    total_BxKV = (live[1][..., None] + log_probs_BxKxV).reshape(rows, -1)
    # Each beam has one ending candidate per stop id, so at least `beams` of this many candidates do not end.
    count = min(beams * (1 + len(stop_ids)), beams * vocab_size)
    score_BxC, flat_BxC = jax.lax.top_k(total_BxKV, count)
    beam_BxC, token_BxC = flat_BxC // vocab_size, (flat_BxC % vocab_size).astype(jnp.int32)
    tokens_BxCxT = jnp.take_along_axis(live[0], beam_BxC[..., None], axis=1)
    tokens_BxCxT = jax.lax.dynamic_update_slice(tokens_BxCxT, token_BxC[..., None], (0, 0, at))
    ends_BxC = functools.reduce(jnp.logical_or, [token_BxC == stop for stop in stop_ids])
    is_done_BxC = ends_BxC & (jnp.arange(count) < beams)[None] & (score_BxC > _NONE / 2) & ~_is_full(done)[:, None]
    done_BxC = jnp.where(is_done_BxC, score_BxC / _penalty(at + 1, alpha), _NONE)
    done, _ = _best((jnp.concatenate([done[0], tokens_BxCxT], 1), jnp.concatenate([done[1], done_BxC], 1)), beams)
    live, chosen_BxK = _best((tokens_BxCxT, jnp.where(ends_BxC, _NONE, score_BxC)), beams)
    return live, done, jnp.take_along_axis(beam_BxC, chosen_BxK, axis=1)


def _best(found: Hypotheses, count: int) -> tuple[Hypotheses, jax.Array]:
    """The `count` best hypotheses, best first, and their indices."""
    score_BxK, place_BxK = jax.lax.top_k(found[1], count)
    return (jnp.take_along_axis(found[0], place_BxK[..., None], axis=1), score_BxK), place_BxK


def _is_full(done: Hypotheses) -> jax.Array:
    return (done[1] > _NONE / 2).all(axis=1)


def _penalty(length: jax.Array | int, alpha: jax.Array) -> jax.Array:
    return ((5 + length) / 6) ** alpha


def _take_rows(cache: Any, rows: jax.Array) -> Any:
    """Gathers rows of a cache; see `lm.types.ModelFns.init_cache` for the row axis of each leaf."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=1 if x.ndim > 2 else 0) if x.ndim else x, cache)
