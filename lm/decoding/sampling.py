"""Batched sampling for prompts of different lengths, with a key/value cache, compiled once per shape."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import losses
from lm.config import Config, GenerateConfig, schema
from lm.config.schema import ConfigError
from lm.data.tokenizer import Tokenizer
from lm.parallel import sharding
from lm.tasks import TASKS, build_config, task_of
from lm.types import Batch, ModelFns, Params

# Prompts are padded to a multiple of this, so that prompts of similar length share a compilation.
PROMPT_STEP = 32
# The lowest temperature used: dividing by a smaller one overflows float32.
_LEAST_TEMPERATURE = 1e-30
# Tolerance with which a sum of probabilities reaches top_p: logits and their softmax are float32.
_ROUNDING = 1e-6
# With stop strings, the texts are looked at each time they have grown by this many ids.
_STOP_STEP = 16


class Generated(NamedTuple):
    """New ids of one prompt.

    Attributes:
      ids: with the id that ended the text: a stop id, or the one that completed a stop string.
      log_probs: log P of each id given those before it, in nats: the model's own, before the repetition penalty,
        temperature and masks. Of `sample`, only if asked for.
    """

    ids: list[int]
    log_probs: list[float]


class SoFar(NamedTuple):
    """New ids of one prompt up to some step, and whether a stop id or string has ended them."""

    made: Generated
    is_ended: bool


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


def sample(
    model: ModelFns,
    params: Params,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    cfg: Config,
    tokenizer: Tokenizer,
    *,
    rows_multiple: int = 1,
    log_probs: bool = False,
) -> list[Generated]:
    """Continues each prompt until a stop id or string ends it, or for `cfg.generate.max_new_tokens` ids.

    Args:
      model: its functions.
      params: its parameters.
      prompts: ids, none empty.
      key: random key; the samples of a row are a function of it and the row's index.
      cfg: `generate`, `model` and `task.name` are read.
      tokenizer: defines which ids are text, and which end it.
      rows_multiple: the number of rows is padded to a multiple of it, for the mesh.
      log_probs: whether to return them.

    Raises:
      ValueError: an empty prompt.
      ConfigError: a prompt that leaves no room in the learned positions; a stop string that is a control symbol.
    """
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(prompts)))
    options: dict[str, Any] = {"rows_multiple": rows_multiple, "log_probs": log_probs}
    every = _STOP_STEP if cfg.generate.stop else cfg.generate.max_new_tokens
    *_, made = sample_in_steps(model, params, prompts, row_keys, cfg, tokenizer, every=every, **options)
    return [each.made for each in made]


def sample_in_steps(
    model: ModelFns,
    params: Params,
    prompts: Sequence[Sequence[int]],
    row_keys: jax.Array,
    cfg: Config,
    tokenizer: Tokenizer,
    *,
    every: int,
    rows_multiple: int = 1,
    log_probs: bool = False,
    cache_len: int = 0,
) -> Iterator[list[SoFar]]:
    """As `sample`, and yields what there is each time the texts have grown by `every` ids, and at the end.

    Args:
      model, params, prompts, cfg, tokenizer, rows_multiple, log_probs: as for `sample`.
      row_keys: random keys [N]; the samples of a row are a function of its own.
      every: number of ids.
      cache_len: new ids that the cache has room for; 0 = `cfg.generate.max_new_tokens`, the least. Prompts with another
        `max_new_tokens` and the same `cache_len` share a compilation.

    Raises:
      ValueError, ConfigError: as `sample`, at the first step.
    """
    prompt = prompt_batch(prompts, cfg, tokenizer, rows_multiple)
    stops, allowed_V = stop_ids(tokenizer, cfg), allowed_ids(tokenizer, cfg)
    _check_stop_strings(tokenizer, cfg)
    max_new = cfg.generate.max_new_tokens
    # Those that the compiled function reads.
    options = dataclasses.replace(cfg.generate, prompts=(), stop=(), max_new_tokens=max(cache_len, max_new))
    sizes = (model, options, cfg.model.logit_softcap, stops, log_probs)
    count, rows = len(prompts), len(prompt["tokens"])
    keys_Bx2 = np.asarray(jax.random.key_data(row_keys))[np.minimum(np.arange(rows), count - 1)]
    is_ended_B = np.arange(rows) >= count  # rows that pad the batch
    lengths, seen = [0] * count, 0
    params = model.for_decoding(params)
    state: _State | None = None
    for until in [*range(every, max_new, every), max_new]:
        state = _sample(*sizes, params, prompt, keys_Bx2, allowed_V, np.int32(until), is_ended_B, state)
        ids_BxT = np.array(jax.device_get(state.ids_BxT))
        log_probs_BxT = np.array(jax.device_get(state.log_probs_BxT))[:, :max_new] if log_probs else np.zeros((rows, 0))
        for row in np.flatnonzero(~is_ended_B[:count]):
            lengths[row], is_ended_B[row] = _end(ids_BxT[row, :until].tolist(), seen, stops, tokenizer, cfg)
        each_row = zip(ids_BxT, log_probs_BxT, lengths, is_ended_B, strict=False)
        yield [SoFar(Generated(ids_T[:n].tolist(), log_T[:n].tolist()), bool(end)) for ids_T, log_T, n, end in each_row]
        if is_ended_B.all():
            return
        seen = until


def _end(ids: list[int], seen: int, stops: tuple[int, ...], tokenizer: Tokenizer, cfg: Config) -> tuple[int, bool]:
    """(number of ids up to the end of the text, whether it has ended), where no end is among the first `seen` ids."""
    stop = next((n for n in range(seen, len(ids)) if ids[n] in stops), len(ids))
    for n in range(seen + 1, stop + 1) if cfg.generate.stop else ():
        # A character may need several ids; until it is whole, the text ends in U+FFFD.
        text = tokenizer.decode(ids[:n]).rstrip("\ufffd")
        if any(string in text for string in cfg.generate.stop):
            return n, True
    return min(stop + 1, len(ids)), stop < len(ids)


def text_of(ids: Sequence[int], tokenizer: Tokenizer, cfg: Config) -> str:
    """The text of new ids without the id that ended it, cut before the stop string that is complete first, whatever the
    ids' borders are."""
    text = tokenizer.decode(without_stop_id(ids, tokenizer, cfg))
    found = [(at + len(string), at) for string in cfg.generate.stop if (at := text.find(string)) >= 0]
    return text[: min(found)[1]] if found else text


def without_stop_id(ids: Sequence[int], tokenizer: Tokenizer, cfg: Config) -> Sequence[int]:
    """New ids without the one that ended them, which a published tokenizer may take for text."""
    return ids[:-1] if ids and ids[-1] in stop_ids(tokenizer, cfg) else ids


def changed(cfg: Config, changes: Mapping[str, Any]) -> Config:
    """The config with other values of keys of `generate`. Raises ConfigError for an unknown key or a wrong value."""
    values = schema.to_dict(cfg)
    return build_config(values | {"generate": values["generate"] | changes}) if changes else cfg


def check_options(
    cfg: Config, changes: Collection[str], *, beams: int, samples: int | None = None, alpha: float | None = None
) -> None:
    """Raises ConfigError for options that contradict each other, or that have no effect together.

    Args:
      cfg: with the changes.
      changes: keys of `generate` that were set for this use.
      beams: of beam search; 0 = sampling.
      samples: texts of each prompt; None = one.
      alpha: length penalty of beam search; None = its default.
    """
    idle = [name for name in ("temperature", "top_k", "top_p") if name in changes]
    if beams < 0 or (samples is not None and samples < 1):
        raise ConfigError(f"expected 'beams' of at least 0 and 'samples' of at least 1, got {beams} and {samples}")
    if beams and idle:
        raise ConfigError(f"'{idle[0]}' is of sampling and has no effect on a search with {beams} beams: set beams=0")
    if beams and cfg.generate.stop:
        raise ConfigError(
            "'generate.stop' is not read by beam search: set it to () (--stop='' of the tools), or sample with beams=0"
        )
    if not beams and alpha is not None:
        raise ConfigError("'alpha' is of beam search and has no effect on sampling: set beams=4, say")
    if beams and (samples or 1) > beams:
        raise ConfigError(f"'samples' ({samples}) are the best of 'beams' ({beams}): raise beams, or set it to 0")
    if not beams and (samples or 1) > 1 and cfg.generate.temperature == 0.0:
        raise ConfigError(f"'samples' is {samples}, but they are all alike at temperature 0: raise it, or set beams")


def _check_stop_strings(tokenizer: Tokenizer, cfg: Config) -> None:
    controls = np.flatnonzero(tokenizer.is_control_V) if cfg.generate.stop else ()
    for symbol in {tokenizer.piece(int(i)) for i in controls}.intersection(cfg.generate.stop):
        raise ConfigError(
            f"'generate.stop' has {symbol!r}, a control symbol, which is in no text; leave it out: EOS and the end of "
            "a turn end a text by themselves"
        )


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


def adjust(
    scores_RxV: jax.Array,
    seen_RxV: jax.Array | None,
    step: jax.Array | int,
    allowed_V: jax.Array,
    stop_ids: tuple[int, ...],
    cfg: GenerateConfig,
) -> jax.Array:
    """Scores of the next id with the repetition penalty, and masked where an id must not follow.

    Args:
      scores_RxV: logits, or log-probabilities (of beam search).
      seen_RxV: from `seen_ids`, bool.
      step: number of new ids so far.
      allowed_V: ids that are ever generated.
      stop_ids: of which none follows before `min_new_tokens`.
      cfg: `repetition_penalty` p and `min_new_tokens` are read. The score s of an id that was seen becomes s / p, or
        s * p if it is negative (Keskar et al. 2019, section 4.1; the two cases are those of `transformers`).
    """
    if seen_RxV is not None:
        penalty, beyond = cfg.repetition_penalty, scores_RxV.shape[1] - allowed_V.shape[0]
        penalised_RxV = jnp.where(scores_RxV < 0, scores_RxV * penalty, scores_RxV / penalty)
        scores_RxV = jnp.where(jnp.pad(seen_RxV, ((0, 0), (0, beyond))), penalised_RxV, scores_RxV)
    scores_RxV = mask_ids(scores_RxV, allowed_V)
    if not cfg.min_new_tokens:
        return scores_RxV
    is_stop_V = jnp.isin(jnp.arange(scores_RxV.shape[1]), jnp.array(stop_ids))
    return jnp.where(is_stop_V & (step < cfg.min_new_tokens), losses.MASKED_LOGIT, scores_RxV)


def seen_ids(prompt: Batch, size: int, cfg: GenerateConfig) -> jax.Array | None:
    """bool [B, size]: the ids before the first new one; None if there is no repetition penalty."""
    if cfg.repetition_penalty == 1.0:
        return None
    tokens_BxP = jnp.where(prompt["segment_ids"] > 0, prompt["tokens"], size)  # padding is not seen
    return mark(jnp.zeros((len(tokens_BxP), size), bool), tokens_BxP)


def mark(seen_RxV: jax.Array | None, tokens_RxL: jax.Array) -> jax.Array | None:
    """`seen_RxV` with these ids; ids beyond V are ignored."""
    rows_Rx1 = jnp.arange(len(tokens_RxL))[:, None]
    return None if seen_RxV is None else seen_RxV.at[rows_Rx1, tokens_RxL].set(True, mode="drop")


class _State(NamedTuple):
    """After `step` new ids of each row.

    Attributes:
      step: int32.
      token_B: the last of them.
      cache: of the model, without the last id.
      seen_BxV: see `seen_ids`; without the last id.
      ids_BxT: int32; after a stop id a row repeats one.
      log_probs_BxT: float32; 0 if not asked for.
      done_B: whether the row has ended.
    """

    step: jax.Array
    token_B: jax.Array
    cache: Any
    seen_BxV: jax.Array | None
    ids_BxT: jax.Array
    log_probs_BxT: jax.Array
    done_B: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnames=("state",))
def _sample(
    model: ModelFns,
    cfg: GenerateConfig,
    softcap: float,
    stop_ids: tuple[int, ...],
    log_probs: bool,
    params: Params,
    prompt: Batch,
    keys_Bx2: jax.Array,
    allowed_V: jax.Array,
    until: jax.Array,
    is_ended_B: jax.Array,
    state: _State | None,
) -> _State:
    """The state after `until` new ids, or when all rows have ended; from `state`, or from the prompt if it is None."""
    rows, prompt_len = prompt["tokens"].shape
    keys_B = jax.random.wrap_key_data(keys_Bx2)
    length_B = prompt["segment_ids"].sum(axis=1)
    size = allowed_V.shape[0]

    def next_token(batch: Any, cache: Any, seen_BxV: Any, step: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        out = model.apply(params, batch, cache=cache)
        logits_BxV = losses.logits(out.pre_logits_BxLxD[:, -1], out.unembed_DxV, vocab_size=size, softcap=softcap)
        step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
        token_B = choose(adjust(logits_BxV, seen_BxV, step, allowed_V, stop_ids, cfg), step_keys_B, cfg)
        if not log_probs:
            return token_B, jnp.zeros(rows), out.cache
        log_probs_BxV = jax.nn.log_softmax(logits_BxV[:, :size].astype(jnp.float32))
        return token_B, jnp.take_along_axis(log_probs_BxV, token_B[:, None], axis=1)[:, 0], out.cache

    def is_stop(token_B: jax.Array) -> jax.Array:
        return functools.reduce(jnp.logical_or, [token_B == stop for stop in stop_ids])

    if state is None:
        cache = model.init_cache(rows, prompt_len + cfg.max_new_tokens)
        seen_BxV = seen_ids(prompt, size, cfg)
        token_B, log_prob_B, cache = next_token(prompt, cache, seen_BxV, jnp.int32(0))
        ids_BxT = jnp.full((rows, cfg.max_new_tokens), stop_ids[0], jnp.int32).at[:, 0].set(token_B)
        log_probs_BxT = jnp.zeros(ids_BxT.shape).at[:, 0].set(log_prob_B)
        state = _State(jnp.int32(1), token_B, cache, seen_BxV, ids_BxT, log_probs_BxT, is_stop(token_B))
    state = state._replace(done_B=state.done_B | is_ended_B)

    def running(now: _State) -> jax.Array:
        return (now.step < until) & ~now.done_B.all()

    def body(now: _State) -> _State:
        one_Bx1 = jnp.ones((rows, 1), jnp.int32)
        positions_Bx1 = (length_B + now.step - 1)[:, None]
        batch = {"tokens": now.token_B[:, None], "segment_ids": one_Bx1, "positions": positions_Bx1}
        seen_BxV = mark(now.seen_BxV, now.token_B[:, None])
        new_B, log_prob_B, cache = next_token(batch, now.cache, seen_BxV, now.step)
        new_B = jnp.where(now.done_B, stop_ids[0], new_B)
        ids_BxT = now.ids_BxT.at[:, now.step].set(new_B)
        log_probs_BxT = now.log_probs_BxT.at[:, now.step].set(log_prob_B)
        return _State(now.step + 1, new_B, cache, seen_BxV, ids_BxT, log_probs_BxT, now.done_B | is_stop(new_B))

    state = jax.lax.while_loop(running, body, state)
    # Replicated: every process reads all of them.
    ids_BxT, log_probs_BxT = (sharding.constrain(x, None, None) for x in (state.ids_BxT, state.log_probs_BxT))
    return state._replace(ids_BxT=ids_BxT, log_probs_BxT=log_probs_BxT)


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
