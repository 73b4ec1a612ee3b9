"""Batched beam search with a key/value cache, compiled once per shape."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import losses
from lm.config import Config, GenerateConfig
from lm.data.tokenizer import Tokenizer
from lm.decoding import sampling
from lm.decoding.sampling import Generated
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
    count: int = 1,
    rows_multiple: int = 1,
) -> list[list[Generated]]:
    """Finds likely continuations of each prompt by beam search.

    Each step extends the live hypotheses and takes the `beams` likeliest extensions. Those that end are finished; the
    `beams` likeliest of the others stay live. A row stops when it has `beams` finished hypotheses, or after
    `cfg.generate.max_new_tokens`, when live ones count too. The best has the highest log P / ((5 + n) / 6)^alpha,
    where n counts its new ids including the stop id (Wu et al. 2016, equation 14). A repetition penalty changes the
    log-probabilities that log P is the sum of, as in `transformers`.

    Args:
      model, params, prompts, cfg, tokenizer, rows_multiple: as for `lm.decoding.sampling.sample`.
      beams: 1 = greedy.
      alpha: length penalty; 0 = none, larger values favour longer texts.
      count: of continuations of each prompt, at most `beams`.

    Returns:
      The `count` best continuations of each prompt, best first; fewer if there are not so many texts.

    Raises:
      ValueError: an empty prompt; more continuations than beams.
      ConfigError: the learned positions have no room for a prompt and its continuation; stop strings.
    """
    if not 1 <= count <= beams:
        raise ValueError(f"{count} texts of a prompt by a search with {beams} beams; expected 1 to {beams}")
    sampling.check_options(cfg, (), beams=beams)
    prompt = sampling.prompt_batch(prompts, cfg, tokenizer, rows_multiple)
    stops, allowed_V = sampling.stop_ids(tokenizer, cfg), sampling.allowed_ids(tokenizer, cfg)
    sizes = (dataclasses.replace(cfg.generate, prompts=()), cfg.model.logit_softcap, stops, beams, count)
    params = model.for_decoding(params)
    found = jax.device_get(_search(model, *sizes, jnp.float32(alpha), params, prompt, allowed_V))
    return [
        [
            _until_stop(ids_T, log_probs_T, stops)
            for ids_T, log_probs_T, score in zip(*hypotheses, strict=True)
            if score > _NONE / 2
        ]
        for hypotheses in zip(*(x[: len(prompts)] for x in found), strict=True)
    ]


def _until_stop(ids_T: np.ndarray, log_probs_T: np.ndarray, stops: tuple[int, ...]) -> Generated:
    """A hypothesis up to its first stop id, and with it."""
    n = 1 + next(iter(np.flatnonzero(np.isin(ids_T, stops))), len(ids_T) - 1)
    return Generated(ids_T[:n].tolist(), log_probs_T[:n].tolist())


# Shape letters besides those of `lm.types`: K beams (no key/value heads here), C candidates, T new ids, N results.


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _search(
    model: ModelFns,
    cfg: GenerateConfig,
    softcap: float,
    stop_ids: tuple[int, ...],
    beams: int,
    count: int,
    alpha: jax.Array,
    params: Params,
    prompt: Batch,
    allowed_V: jax.Array,
) -> "Hypotheses":
    """The `count` best hypotheses of each row; ids [B, N, T] are padded with a stop id."""
    vocab_size, max_new = allowed_V.shape[0], cfg.max_new_tokens
    rows, prompt_len = prompt["tokens"].shape
    length_B = prompt["segment_ids"].sum(axis=1)

    def next_log_probs(batch: Any, cache: Any) -> tuple[jax.Array, Any]:
        out = model.apply(params, batch, cache=cache)
        logits_xV = losses.logits(out.pre_logits_BxLxD[:, -1], out.unembed_DxV, vocab_size=vocab_size, softcap=softcap)
        return jax.nn.log_softmax(logits_xV[:, :vocab_size]), out.cache

    def step(live: Hypotheses, done: Hypotheses, log_probs_RxV: jax.Array, seen_RxV: Any, at: jax.Array) -> Any:
        # Adjusted after the softmax, so that the score of a text is its log-probability under the model.
        scores_RxV = sampling.adjust(log_probs_RxV, seen_RxV, at, allowed_V, stop_ids, cfg)
        log_probs_BxKxV, scores_BxKxV = (x.reshape(rows, beams, vocab_size) for x in (log_probs_RxV, scores_RxV))
        return _step(live, done, log_probs_BxKxV, scores_BxKxV, at, stop_ids=stop_ids, alpha=alpha)

    log_probs_BxV, cache = next_log_probs(prompt, model.init_cache(rows, prompt_len + max_new))
    seen_BxV = sampling.seen_ids(prompt, vocab_size, cfg)
    log_probs_RxV, seen_RxV, cache = _take_rows((log_probs_BxV, seen_BxV, cache), jnp.repeat(jnp.arange(rows), beams))
    none_BxK = jnp.full((rows, beams), _NONE)
    empty_BxKxT, zero_BxKxT = (jnp.full((rows, beams, max_new), x) for x in (jnp.int32(stop_ids[0]), jnp.float32(0)))
    # At first all beams are the prompt, so only the first one counts.
    live = Hypotheses(empty_BxKxT, zero_BxKxT, none_BxK.at[:, 0].set(0.0))
    done = Hypotheses(empty_BxKxT, zero_BxKxT, none_BxK)
    live, done, _ = step(live, done, log_probs_RxV, seen_RxV, jnp.int32(0))

    def running(carry: Any) -> jax.Array:
        at, _, done, *_ = carry
        return (at < max_new) & ~_is_full(done).all()

    def body(carry: Any) -> Any:
        at, live, done, seen_RxV, cache = carry
        tokens_Rx1 = jax.lax.dynamic_index_in_dim(live.ids_BxKxT, at - 1, axis=2, keepdims=False).reshape(-1, 1)
        positions_Rx1 = jnp.repeat(length_B + at - 1, beams)[:, None]
        batch = {"tokens": tokens_Rx1, "segment_ids": jnp.ones_like(tokens_Rx1), "positions": positions_Rx1}
        log_probs_RxV, cache = next_log_probs(batch, cache)
        seen_RxV = sampling.mark(seen_RxV, tokens_Rx1)
        live, done, parent_BxK = step(live, done, log_probs_RxV, seen_RxV, at)
        parent_R = (jnp.arange(rows)[:, None] * beams + parent_BxK).reshape(-1)
        return at + 1, live, done, *_take_rows((seen_RxV, cache), parent_R)

    _, live, done, *_ = jax.lax.while_loop(running, body, (jnp.int32(1), live, done, seen_RxV, cache))
    counts_BxK = ~_is_full(done)[:, None] & (live.score_BxK > _NONE / 2)
    cut_BxK = jnp.where(counts_BxK, live.score_BxK / _penalty(max_new, alpha), _NONE)
    found, _ = _best(_joined(done, live._replace(score_BxK=cut_BxK)), count)
    # Replicated: every process reads all of it.
    return Hypotheses(*(sharding.constrain(x, *[None] * x.ndim) for x in found))


class Hypotheses(NamedTuple):
    """Ids int32, their log-probabilities under the model float32, and the score of each hypothesis float32."""

    ids_BxKxT: jax.Array
    log_probs_BxKxT: jax.Array
    score_BxK: jax.Array


def _step(
    live: Hypotheses,
    done: Hypotheses,
    log_probs_BxKxV: jax.Array,
    scores_BxKxV: jax.Array,
    at: jax.Array,
    *,
    stop_ids: tuple[int, ...],
    alpha: jax.Array,
) -> tuple[Hypotheses, Hypotheses, jax.Array]:
    """Live (by log P) and finished (length-penalised) hypotheses after new id `at`, and the parent of each live one.

    `scores_BxKxV` are the log-probabilities that count, `log_probs_BxKxV` the model's own.
    """
    rows, beams, vocab_size = log_probs_BxKxV.shape
    total_BxKV = (live.score_BxK[..., None] + scores_BxKxV).reshape(rows, -1)
    # Each beam has one ending candidate per stop id, so at least `beams` of this many candidates do not end.
    count = min(beams * (1 + len(stop_ids)), beams * vocab_size)
    score_BxC, flat_BxC = jax.lax.top_k(total_BxKV, count)
    beam_BxC, token_BxC = flat_BxC // vocab_size, (flat_BxC % vocab_size).astype(jnp.int32)
    log_prob_BxC = jnp.take_along_axis(log_probs_BxKxV.reshape(rows, -1), flat_BxC, axis=1)
    ids_BxCxT, log_probs_BxCxT = (
        jax.lax.dynamic_update_slice(
            jnp.take_along_axis(before_BxKxT, beam_BxC[..., None], axis=1), new_BxC[..., None], (0, 0, at)
        )
        for before_BxKxT, new_BxC in ((live.ids_BxKxT, token_BxC), (live.log_probs_BxKxT, log_prob_BxC))
    )
    ends_BxC = functools.reduce(jnp.logical_or, [token_BxC == stop for stop in stop_ids])
    is_done_BxC = ends_BxC & (jnp.arange(count) < beams)[None] & (score_BxC > _NONE / 2) & ~_is_full(done)[:, None]
    done_BxC = jnp.where(is_done_BxC, score_BxC / _penalty(at + 1, alpha), _NONE)
    done, _ = _best(_joined(done, Hypotheses(ids_BxCxT, log_probs_BxCxT, done_BxC)), beams)
    live_BxC = jnp.where(ends_BxC, _NONE, score_BxC)
    live, chosen_BxK = _best(Hypotheses(ids_BxCxT, log_probs_BxCxT, live_BxC), beams)
    return live, done, jnp.take_along_axis(beam_BxC, chosen_BxK, axis=1)


def _best(found: Hypotheses, count: int) -> tuple[Hypotheses, jax.Array]:
    """The `count` best hypotheses, best first, and their indices."""
    score_BxK, place_BxK = jax.lax.top_k(found.score_BxK, count)
    ids_BxKxT, log_probs_BxKxT = (jnp.take_along_axis(x, place_BxK[..., None], axis=1) for x in found[:2])
    return Hypotheses(ids_BxKxT, log_probs_BxKxT, score_BxK), place_BxK


def _joined(one: Hypotheses, other: Hypotheses) -> Hypotheses:
    return Hypotheses(*(jnp.concatenate(both, 1) for both in zip(one, other, strict=True)))


def _is_full(done: Hypotheses) -> jax.Array:
    return (done.score_BxK > _NONE / 2).all(axis=1)


def _penalty(length: jax.Array | int, alpha: jax.Array) -> jax.Array:
    return ((5 + length) / 6) ** alpha


def _take_rows(cache: Any, rows: jax.Array) -> Any:
    """Gathers rows of a cache."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0) if x.ndim else x, cache)
