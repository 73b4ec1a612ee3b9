"""Beam search and greedy decoding of each kind of model against plain loops over a table of all short continuations."""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import losses
from lm.config import Config, GenerateConfig
from lm.config.schema import ConfigError
from lm.decoding import beam_search, sampling
from lm.types import ModelFns, ModelOutput
from tests import toys

VOCAB, STOPS, NEW = 5, (1, 2), 4
GOING_ON = [token for token in range(VOCAB) if token not in STOPS]
WORDS = SimpleNamespace(
    vocab_size=VOCAB,
    eos_id=STOPS[0],
    end_of_turn_id=STOPS[1],
    bos_id=7,
    chat_template="",
    may_generate=lambda ends, symbols: np.isin(np.arange(VOCAB), [*GOING_ON, *ends]),
)
PROMPTS = ((9,), (5, 11, 4), (30, 2, 9, 41, 17, 8), (3,), (8, 8), (40, 3, 21, 7), *((n, n + 1) for n in range(10, 40)))
KINDS = {"decoder": toys.LLAMA, "prefix_decoder": toys.PREFIX} | toys.ENCODER_DECODERS
MAX_LEN = 12


@functools.cache
def history():
    """A model whose next id depends on all earlier ids equally, so that a wrong cache gives a wrong answer."""
    rng = np.random.default_rng(0)
    embedding = jnp.asarray(rng.standard_normal((toys.VOCAB, MAX_LEN, 16)), jnp.float32)
    unembed_DxV = jnp.asarray(0.25 * rng.standard_normal((16, 128)), jnp.float32)

    def apply(params, batch, *, rng=None, cache=None):
        x_BxLxD = embedding[batch["tokens"], batch["positions"]] * (batch["segment_ids"] > 0)[..., None]
        before_BxD = cache["sum"] if cache else jnp.zeros_like(x_BxLxD[:, 0])
        hidden_BxLxD = jnp.tanh(before_BxD[:, None] + jnp.cumsum(x_BxLxD, axis=1))
        return ModelOutput(hidden_BxLxD, unembed_DxV, {"sum": before_BxD + x_BxLxD.sum(axis=1)})

    cfg = dataclasses.replace(toys.GPT2, max_len=MAX_LEN)
    return cfg, ModelFns(None, apply, None, lambda rows, length: {"sum": jnp.zeros((rows, 16))}), {}


def model_of(kind: str):
    return history() if kind == "history" else toys.decoder(KINDS[kind], MAX_LEN)


@functools.cache
def table(kind: str) -> dict[tuple[int, tuple[int, ...]], np.ndarray]:
    """(prompt, continuation) -> log-probabilities of the next id, by a full forward pass without a cache."""
    _, model, params = model_of(kind)
    ways = [way for n in range(NEW) for way in itertools.product(GOING_ON, repeat=n)]
    keys = list(itertools.product(range(len(PROMPTS)), ways))
    length = max(map(len, PROMPTS)) + NEW
    batch = {key: np.zeros((len(keys), length), np.int32) for key in ("tokens", "segment_ids", "is_prefix")}
    inputs = {key: np.zeros((len(keys), length), np.int32) for key in ("inputs", "input_segment_ids")}
    ends = []
    for row, (number, way) in enumerate(keys):
        prompt = PROMPTS[number]
        start = prompt
        if kind in toys.ENCODER_DECODERS:
            inputs["inputs"][row, : len(prompt)], inputs["input_segment_ids"][row, : len(prompt)] = prompt, 1
            start = (WORDS.bos_id,)
        ids = [*start, *way]
        batch["tokens"][row, : len(ids)], batch["segment_ids"][row, : len(ids)] = ids, 1
        batch["is_prefix"][row, : len(start)] = 1
        ends.append(len(ids) - 1)
    batch["positions"] = np.tile(np.arange(length, dtype=np.int32), (len(keys), 1))
    if kind in toys.ENCODER_DECODERS:
        batch |= inputs | {"input_positions": batch["positions"]}
    if kind != "prefix_decoder":
        del batch["is_prefix"]

    @jax.jit
    def log_probs(batch):
        out = model.apply(params, batch)
        hidden_BxD = jnp.take_along_axis(out.hidden_BxLxD, jnp.array(ends)[:, None, None], axis=1)[:, 0]
        softcap = model_of(kind)[0].logit_softcap
        logits_BxV = losses.logits(hidden_BxD, out.unembed_DxV, vocab_size=VOCAB, softcap=softcap)
        return jax.nn.log_softmax(logits_BxV[:, :VOCAB])

    return dict(zip(keys, np.asarray(log_probs(batch), np.float64), strict=True))


def plain_greedy(kind: str) -> list[list[int]]:
    made = []
    for number in range(len(PROMPTS)):
        way: tuple[int, ...] = ()
        while len(way) < NEW and (token := int(table(kind)[number, way].argmax())) not in STOPS:
            way += (token,)
        made.append(list(way))
    return made


def best_of_all(kind: str, alpha: float, going_on=GOING_ON) -> list[list[int]]:
    """The best text by scoring every one that ends or has the maximum length."""
    made = []
    for number in range(len(PROMPTS)):
        scored = []
        for n in range(1, NEW + 1):
            for way in itertools.product(going_on, repeat=n - 1):
                before = sum(table(kind)[number, way[:i]][way[i]] for i in range(n - 1))
                for last in (*STOPS, *going_on):
                    if last in STOPS or n == NEW:
                        text = list(way) if last in STOPS else [*way, last]
                        log_p = before + table(kind)[number, way][last]
                        scored.append((log_p / ((5 + n) / 6) ** alpha, text))
        made.append(max(scored)[1])
    return made


def plain_search(
    kind: str, beams: int, alpha: float, penalty: float = 1.0, least: int = 0
) -> list[list[tuple[float, tuple[int, ...]]]]:
    """(score, ids with the stop id) of the finished hypotheses of each prompt, best first."""
    made = []
    for number in range(len(PROMPTS)):
        prompt = () if kind in toys.ENCODER_DECODERS else PROMPTS[number]
        live, done = [(0.0, ())], []
        for n in range(1, NEW + 1):
            found = [
                # A log-probability is negative: the penalty multiplies it.
                (score + log_p * (penalty if token in (*prompt, *way) else 1.0), (*way, token))
                for score, way in live
                for token, log_p in enumerate(table(kind)[number, way])
                if n > least or token not in STOPS
            ]
            found.sort(key=lambda item: -item[0])
            ended = [(s / ((5 + n) / 6) ** alpha, way) for s, way in found[:beams] if way[-1] in STOPS]
            done = sorted([*done, *ended], key=lambda item: -item[0])
            live = [item for item in found if item[1][-1] not in STOPS][:beams]
            if len(done) >= beams:
                break
        else:
            done += [(s / ((5 + NEW) / 6) ** alpha, way) for s, way in live]
        made.append(sorted(done, key=lambda item: -item[0]))
    return made


def without_stop(ids) -> list[int]:
    return [i for i in ids if i not in STOPS]


def config(kind: str, **changes) -> Config:
    generation = GenerateConfig(**{"max_new_tokens": NEW, "temperature": 0.0} | changes)
    return Config(model=model_of(kind)[0], generate=generation, task=toys.task("chat"))  # chat has both stop ids


def n_best(kind: str, prompts=PROMPTS, changes=(), words=WORDS, **options) -> list[list[sampling.Generated]]:
    _, model, params = model_of(kind)
    return beam_search.search(model, params, prompts, config(kind, **dict(changes)), words, **options)


def search(kind: str, prompts=PROMPTS, **options) -> list[list[int]]:
    return [without_stop(best.ids) for (best,) in n_best(kind, prompts, **options)]


@pytest.mark.parametrize("kind", ["prefix_decoder", "relative", "learned"])
def test_next_ids_of_prompts_of_several_lengths_match_each_alone(kind):
    cfg, model, params = model_of(kind)
    out = jax.jit(model.apply)(params, sampling.prompt_batch(PROMPTS, config(kind), WORDS, 1))
    logits_BxV = losses.logits(out.hidden_BxLxD[:, -1], out.unembed_DxV, vocab_size=VOCAB, softcap=cfg.logit_softcap)
    want = [table(kind)[number, ()] for number in range(len(PROMPTS))]
    np.testing.assert_allclose(jax.nn.log_softmax(logits_BxV[:, :VOCAB]), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["prefix_decoder", "relative"])
def test_greedy_is_the_argmax_of_the_full_forward_pass(kind):
    _, model, params = model_of(kind)
    made = sampling.sample(model, params, PROMPTS, jax.random.key(0), config(kind), WORDS)
    assert [sampling.without_stop_id(each.ids, WORDS, config(kind)) for each in made] == plain_greedy(kind)


def test_one_beam_is_greedy():
    assert search("history", beams=1) == plain_greedy("history")


def test_enough_beams_find_the_best_text_of_all():
    for alpha in (0.0, 3.0):
        assert search("history", beams=140, alpha=alpha) == best_of_all("history", alpha)


def test_the_examples_distinguish_the_cases():
    assert best_of_all("history", 0.0) != best_of_all("history", 3.0)
    assert best_of_all("history", 0.0) != plain_greedy("history")


@pytest.mark.parametrize(("kind", "beams"), [("history", 2), ("history", 3), ("relative", 3)])
def test_few_beams_match_a_plain_loop(kind, beams):
    for alpha in (0.0, 0.6, 3.0):
        want = plain_search(kind, beams, alpha)
        assert search(kind, beams=beams, alpha=alpha) == [without_stop(found[0][1]) for found in want]


@pytest.mark.parametrize("kind", ["history", "relative", "decoder"])
@pytest.mark.parametrize("changes", [{}, {"repetition_penalty": 1.8}, {"min_new_tokens": 3}])
def test_the_n_best_and_their_log_probs_match_a_plain_loop(kind, changes):
    """Of an encoder-decoder, the penalty is on what the decoder reads; a minimum delays the stop ids."""
    beams, alpha = 3, 0.6
    plain = {"penalty": changes.get("repetition_penalty", 1.0), "least": changes.get("min_new_tokens", 0)}
    want = plain_search(kind, beams, alpha, **plain)
    assert not changes or want != plain_search(kind, beams, alpha)
    made = n_best(kind, changes=changes, beams=beams, alpha=alpha, count=3)
    for number, (hypotheses, found) in enumerate(zip(made, want, strict=True)):
        assert [tuple(each.ids) for each in hypotheses] == [ids for _, ids in found[:3]]
        for each, (score, ids) in zip(hypotheses, found, strict=False):
            log_probs = [table(kind)[number, ids[:n]][ids[n]] for n in range(len(ids))]
            np.testing.assert_allclose(each.log_probs, log_probs, rtol=0, atol=1e-4)
            if plain["penalty"] == 1.0:
                assert sum(each.log_probs) / ((5 + len(ids)) / 6) ** alpha == pytest.approx(score, abs=1e-4)


def test_there_are_only_as_many_texts_as_there_are():
    """The stop ids, and of two ids those that do not begin with one."""
    made = n_best("history", PROMPTS[:2], {"max_new_tokens": 2}, beams=20, alpha=6.0, count=20)
    want = sorted([*([i] for i in STOPS), *([i, k] for i in GOING_ON for k in range(VOCAB))])
    assert [sorted(each.ids for each in found) for found in made] == [want] * 2


def test_more_texts_than_beams_and_stop_strings_are_refused():
    with pytest.raises(ValueError, match="3 texts of a prompt by a search with 2 beams; expected 1 to 2"):
        n_best("history", beams=2, count=3)
    with pytest.raises(ConfigError, match=r"'generate.stop' is not read by beam search"):
        n_best("history", changes={"stop": ("a",)}, beams=2)


def test_a_batch_of_prompts_gives_the_same_as_each_prompt_alone():
    together = search("history", beams=3)
    assert [search("history", [prompt], beams=3)[0] for prompt in PROMPTS[:4]] == together[:4]
    assert search("history", PROMPTS[:2], beams=3, rows_multiple=len(PROMPTS)) == together[:2]


def test_forbidden_ids_are_in_no_text():
    """The result is the best text of all that contain no forbidden id."""
    free = search("history", beams=140, alpha=3.0)
    forbidden = next(token for row in free for token in row)
    others = [token for token in GOING_ON if token != forbidden]
    words = SimpleNamespace(
        **vars(WORDS) | {"may_generate": lambda ends, symbols: np.isin(np.arange(VOCAB), [*others, *ends])}
    )
    made = search("history", words=words, beams=140, alpha=3.0)
    assert made == best_of_all("history", 3.0, others)


def test_learned_positions_need_room_only_for_the_longer_side():
    cfg = dataclasses.replace(config("learned"), generate=GenerateConfig(max_new_tokens=11))
    sampling.check_room(MAX_LEN, cfg)
    for prompt_len, new in ((MAX_LEN + 1, 1), (1, MAX_LEN)):
        with pytest.raises(ConfigError, match=r"do not fit 'model\.max_len'"):
            sampling.check_room(prompt_len, dataclasses.replace(cfg, generate=GenerateConfig(max_new_tokens=new)))
