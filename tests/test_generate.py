"""Sampling from the cache equals the model without a cache, and draws from the distribution that was asked for."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from lm import generate, losses, trees
from lm.config import Config, DataConfig, GenerateConfig
from lm.schema import ConfigError

NEW = 6
PROMPTS = ((7,), (5, 11, 4), (30, 2, 9, 41, 17, 8, 25, 13, 6))  # one shorter, one longer than the sliding window
MAX_LEN = 9 + NEW  # the longest prompt just fits
NEVER = SimpleNamespace(vocab_size=toys.VOCAB, eos_id=-1, end_of_turn_id=-2)  # a tokenizer whose ids never stop


def model_of(style: str):
    return toys.decoder(toys.STYLES[style], MAX_LEN)


def make(style, prompts, *, seed=0, tokenizer=NEVER, params=None, rows_multiple=1, **changes):
    cfg, model, toy_params = model_of(style)
    changes = {"max_new_tokens": NEW, "temperature": 0.0} | changes
    whole = Config(model=cfg, generate=GenerateConfig(**changes))
    return generate.generate(
        model, params or toy_params, prompts, jax.random.key(seed), whole, tokenizer, rows_multiple=rows_multiple
    )


@functools.cache
def greedy(style: str) -> list[list[int]]:
    """Token by token, each from a full forward pass without a cache; every prompt starts at column 0."""
    cfg, model, params = model_of(style)

    @jax.jit
    def logits(tokens, segments):
        positions = jnp.broadcast_to(jnp.arange(MAX_LEN), tokens.shape)
        out = model.apply(params, {"tokens": tokens, "segment_ids": segments, "positions": positions})
        return losses.logits(out.hidden_BxLxD, out.unembed_DxV, vocab_size=toys.VOCAB, softcap=cfg.logit_softcap)

    rows = [list(prompt) for prompt in PROMPTS]
    for _ in range(NEW):
        tokens = np.zeros((len(rows), MAX_LEN), np.int32)
        segments = np.zeros_like(tokens)
        for number, row in enumerate(rows):
            tokens[number, : len(row)], segments[number, : len(row)] = row, 1
        found = np.asarray(logits(tokens, segments))
        for number, row in enumerate(rows):
            row.append(int(found[number, len(row) - 1, : toys.VOCAB].argmax()))
    return [row[len(prompt) :] for row, prompt in zip(rows, PROMPTS, strict=True)]


@pytest.mark.parametrize("style", toys.STYLES)
def test_greedy_is_the_argmax_of_the_full_forward_pass(style):
    """Prompts of different lengths in one batch, with learned positions and with rope, with and without a window."""
    assert make(style, PROMPTS) == greedy(style)


def test_a_batch_of_prompts_is_each_prompt_alone():
    assert [make("llama", [prompt])[0] for prompt in PROMPTS] == greedy("llama")


def test_a_row_ends_at_either_stop_id_and_the_others_go_on():
    want = greedy("llama")

    def ends_of(stops) -> list[int]:
        return [next((n for n, token in enumerate(row) if token in stops), NEW) for row in want]

    # Row 1 ends at one of them, row 2 at the other and not together, row 0 never.
    pairs = ((a, b) for a in want[1] for b in want[2] if a not in want[2] and b not in want[1])
    stops = next(pair for pair in pairs if len(set(ends_of(pair))) == 3 and ends_of(pair)[0] == NEW)
    ends = ends_of(stops)
    words = SimpleNamespace(vocab_size=toys.VOCAB, eos_id=stops[0], end_of_turn_id=stops[1])
    assert make("llama", PROMPTS, tokenizer=words) == [row[:end] for row, end in zip(want, ends, strict=True)]


def test_one_new_token():
    assert make("gpt2", PROMPTS, max_new_tokens=1) == [row[:1] for row in greedy("gpt2")]


def test_samples_are_a_function_of_the_key_and_the_row():
    first = make("llama", PROMPTS, temperature=1.0)
    assert make("llama", PROMPTS, temperature=1.0) == first
    assert make("llama", PROMPTS, temperature=1.0, seed=1) != first
    same_prompt = make("llama", [PROMPTS[0]] * 3, temperature=1.0)
    assert same_prompt[0] == first[0], "whatever the other rows are"
    assert same_prompt[1] != same_prompt[0] and same_prompt[2] != same_prompt[1]


def with_head(scale: float):
    flat = trees.flatten(model_of("llama")[2])
    return trees.unflatten(flat | {"lm_head/kernel": scale * flat["lm_head/kernel"]})


def test_each_step_draws_anew():
    """From a model to which all ids are alike at every step."""
    for row in make("llama", PROMPTS, temperature=1.0, params=with_head(0.0)):
        assert len(set(row)) > 1


def test_the_models_soft_cap_holds_in_sampling_too():
    """At a cap of 30 and huge logits, about half of all ids are equally likely; without it, one is certain."""
    cfg = model_of("llama")[0]
    assert cfg.logit_softcap == 30
    made = make("llama", [PROMPTS[0]] * 3, temperature=1.0, params=with_head(1e5))
    assert len({row[0] for row in made}) > 1


def test_rows_are_filled_up_for_the_mesh_and_change_nothing():
    sampled = make("llama", PROMPTS, temperature=1.0)
    assert make("llama", PROMPTS[:2], temperature=1.0, rows_multiple=3) == sampled[:2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padded_rows_of_the_vocabulary_are_never_produced(temperature):
    """Even where the model would make them by far the most likely."""
    cfg, _, params = model_of("llama")
    flat = trees.flatten(params)
    kernel = np.array(flat["lm_head/kernel"])
    kernel[:, toys.VOCAB :] = 1e3 * np.where(np.arange(cfg.vocab_size - toys.VOCAB) % 2, 1, -1)
    made = make("llama", PROMPTS, temperature=temperature, params=trees.unflatten(flat | {"lm_head/kernel": kernel}))
    assert [len(row) for row in made] == [NEW] * 3
    assert all(0 <= token < toys.VOCAB for row in made for token in row)


def test_prompts_that_cannot_be_continued_are_refused():
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(ValueError, match="every prompt needs at least one id"):
            make("gpt2", prompts)
    message = f"a prompt of 10 ids and 'generate.max_new_tokens' ({NEW}) do not fit 'model.max_len' ({MAX_LEN})"
    with pytest.raises(ConfigError, match=re.escape(message)):
        make("gpt2", [[1], [1] * 10])


PROBS = np.array([0.15, 0.5, 0.05, 0.3])
DRAWS = 4000


def frequencies(logits, **changes) -> np.ndarray:
    """How often each id is chosen, over many keys."""
    keys = jax.random.split(jax.random.key(3), DRAWS)
    many = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (DRAWS, len(logits)))
    return np.bincount(generate.choose(many, keys, GenerateConfig(**changes)), minlength=len(logits)) / DRAWS


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"temperature": 1.0}, PROBS),
        ({"temperature": 2.0}, PROBS**0.5 / (PROBS**0.5).sum()),
        ({"temperature": 0.5}, PROBS**2 / (PROBS**2).sum()),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 0.0, "top_k": 3, "top_p": 0.9}, [0, 1, 0, 0]),
        ({"temperature": 1e-3}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_k": 1}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_k": 2}, [0, 5 / 8, 0, 3 / 8]),
        ({"temperature": 1.0, "top_k": 4}, PROBS),
        ({"temperature": 1.0, "top_k": 99}, PROBS),
        ({"temperature": 1.0, "top_p": 1e-6}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.49}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.51}, [0, 5 / 8, 0, 3 / 8]),
        ({"temperature": 1.0, "top_p": 0.79}, [0, 5 / 8, 0, 3 / 8]),
        ({"temperature": 1.0, "top_p": 0.81}, [3 / 19, 10 / 19, 0, 6 / 19]),
        ({"temperature": 1.0, "top_p": 0.999}, PROBS),
        # The temperature comes first: at 0.5 the largest has 0.68 of the mass, and 0.93 with the next.
        ({"temperature": 0.5, "top_p": 0.6}, [0, 1, 0, 0]),
        # top_k comes before top_p: of the two that it leaves, the first has 5/8.
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_frequencies(changes, want):
    want = np.asarray(want, float)
    got = frequencies(np.log(PROBS), **changes)
    assert np.all((got > 0) == (want > 0)), got
    error = np.sqrt(want * (1 - want) / DRAWS)
    assert np.all(np.abs(got - want) <= 4 * error), (got, want)


def test_ties_at_the_border_are_kept():
    assert np.all(frequencies([2.0, 2.0, 2.0, 0.0], temperature=1.0, top_k=2)[:3] > 0.25)
    assert np.all(frequencies([2.0, 2.0, 2.0, -9.0], temperature=1.0, top_p=0.5)[:3] > 0.25)


def test_rows_are_filtered_each_by_itself():
    logits = jnp.log(jnp.asarray([PROBS, PROBS[::-1], [0.58, 0.14, 0.14, 0.14]], jnp.float32))
    seen = [set(), set(), set()]
    for seed in range(40):
        for row, token in enumerate(
            generate.choose(
                logits, jax.random.split(jax.random.key(seed), 3), GenerateConfig(temperature=1.0, top_p=0.6)
            )
        ):
            seen[row].add(int(token))
    assert seen == [{1, 3}, {0, 2}, {0, 1, 2, 3}]


def test_prompts_are_encoded_as_the_task_sees_them():
    words = SimpleNamespace(
        bos_id=1, encode=lambda text: [ord(c) for c in text], role_ids={"user": 4, "assistant": 5}, end_of_turn_id=6
    )
    text = Config(model=model_of("gpt2")[0], generate=GenerateConfig(max_new_tokens=MAX_LEN - 3))
    chat = dataclasses.replace(text, data=DataConfig(task="chat"), generate=GenerateConfig(max_new_tokens=NEW))
    assert generate.encode_prompt("ab", words, text) == [1, 97, 98]
    assert generate.encode_prompt("ab", words, chat) == [1, 4, 97, 98, 6, 5]
    with pytest.raises(ConfigError, match=f"a prompt of 4 ids .* do not fit 'model.max_len' .{MAX_LEN}"):
        generate.encode_prompt("abc", words, text)
