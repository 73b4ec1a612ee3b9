"""Sampling with the cache equals the model without it, and draws from the requested distribution."""

import dataclasses
import functools
import itertools
import re
from fractions import Fraction
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from lm import evaluator, losses, param_paths
from lm.config import Config, GenerateConfig, MeshConfig
from lm.config.schema import ConfigError
from lm.data import tokenizer as tokenizers
from lm.decoding import sampling
from lm.parallel import sharding
from lm.parallel.mesh import make_mesh
from lm.tasks import build_config, default_config

NEW = 6
PROMPTS = ((7,), (5, 11, 4), (30, 2, 9, 41, 17, 8, 25, 13, 6))  # one shorter, one longer than the sliding window
MAX_LEN = 9 + NEW  # the longest prompt just fits


def words_of(*stops, forbidden=()):
    """A tokenizer whose ids are all text, except the stop ids and forbidden ones."""

    def may_generate(ends, symbols=()):
        assert set(ends) <= set(stops)
        return ~np.isin(np.arange(toys.VOCAB), [i for i in (*stops, *forbidden) if i not in ends])

    eos, end_of_turn = stops if len(stops) > 1 else (*stops, -2)
    ids = {"eos_id": eos, "end_of_turn_id": end_of_turn}
    return SimpleNamespace(vocab_size=toys.VOCAB, **ids, may_generate=may_generate, chat_template="")


NEVER = words_of(-1)  # its ids never stop


def model_of(style: str):
    return toys.decoder(toys.STYLES[style], MAX_LEN)


def make(style, prompts, *, tokenizer=NEVER, **options) -> list[list[int]]:
    """New ids without the stop id."""
    made = sample(style, prompts, tokenizer=tokenizer, **options)
    cfg = Config(task=toys.task(options.get("task", "causal_lm")))
    return [sampling.without_stop_id(each.ids, tokenizer, cfg) for each in made]


def sample(style, prompts, *, seed=0, tokenizer=NEVER, params=None, task="causal_lm", **changes):
    cfg, model, toy_params = model_of(style)
    options = {name: changes.pop(name) for name in ("rows_multiple", "log_probs") if name in changes}
    changes = {"max_new_tokens": NEW, "temperature": 0.0} | changes
    whole = Config(model=cfg, generate=GenerateConfig(**changes), task=toys.task(task))
    return sampling.sample(model, params or toy_params, prompts, jax.random.key(seed), whole, tokenizer, **options)


def penalised(logits: np.ndarray, seen: list[int], penalty: float) -> np.ndarray:
    """Keskar et al. 2019, in float64."""
    return np.array([x if i not in seen else x * penalty if x < 0 else x / penalty for i, x in enumerate(logits)])


@functools.cache
def reference(
    style: str, new: int = NEW, penalty: float = 1.0, stop: int = -1, least: int = 0
) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy continuation by a full forward pass per token, without a cache; every prompt starts at column 0.

    Returns:
      New ids with the stop id, and their log-probabilities under the model, in float64.
    """
    cfg, model, params = model_of(style)
    length = max(map(len, PROMPTS)) + new

    @jax.jit
    def logits(tokens, segments):
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        out = model.apply(params, {"tokens": tokens, "segment_ids": segments, "positions": positions})
        return losses.logits(out.hidden_BxLxD, out.unembed_DxV, vocab_size=toys.VOCAB, softcap=cfg.logit_softcap)

    rows = [list(prompt) for prompt in PROMPTS]
    log_probs: list[list[float]] = [[] for _ in rows]
    for step in range(new):
        tokens = np.zeros((len(rows), length), np.int32)
        segments = np.zeros_like(tokens)
        for number, row in enumerate(rows):
            tokens[number, : len(row)], segments[number, : len(row)] = row, 1
        found = np.asarray(logits(tokens, segments), np.float64)
        for number, row in enumerate(rows):
            if log_probs[number] and row[-1] == stop:
                continue
            own = found[number, len(row) - 1, : toys.VOCAB]
            scores = penalised(own, row, penalty)
            if stop >= 0 and step < least:
                scores[stop] = -np.inf
            row.append(int(scores.argmax()))
            log_probs[number].append(own[row[-1]] - np.log(np.exp(own - own.max()).sum()) - own.max())
    return [row[len(prompt) :] for row, prompt in zip(rows, PROMPTS, strict=True)], log_probs


def greedy(style: str) -> list[list[int]]:
    return reference(style)[0]


@pytest.mark.parametrize("style", toys.STYLES)
def test_greedy_is_the_argmax_of_the_full_forward_pass(style):
    """Prompts of different lengths in one batch, with learned positions and with rope, with and without a window."""
    assert make(style, PROMPTS) == greedy(style)


def test_a_batch_of_prompts_gives_the_same_as_each_prompt_alone():
    assert [make("llama", [prompt])[0] for prompt in PROMPTS] == greedy("llama")


def test_a_row_stops_at_either_stop_id_while_the_others_continue():
    want = greedy("llama")

    def ends_of(stops) -> list[int]:
        return [next((n for n, token in enumerate(row) if token in stops), NEW) for row in want]

    # Row 1 ends at one stop id, row 2 at the other and at another step, row 0 never.
    pairs = ((a, b) for a in want[1] for b in want[2] if a not in want[2] and b not in want[1])
    stops = next(pair for pair in pairs if len(set(ends_of(pair))) == 3 and ends_of(pair)[0] == NEW)
    ends = ends_of(stops)
    made = make("llama", PROMPTS, tokenizer=words_of(*stops), task="chat")
    assert made == [row[:end] for row, end in zip(want, ends, strict=True)]


@pytest.mark.parametrize("style", toys.STYLES)
@pytest.mark.parametrize("penalty", [0.7, 1.3, 5.0])
def test_repetition_penalty_is_that_of_float64(style, penalty):
    """Ids of the prompt count, padding does not: id 0 is in no prompt, and prompts have different lengths."""
    want = reference(style, penalty=penalty)[0]
    assert want != greedy(style) or penalty < 1
    assert make(style, PROMPTS, repetition_penalty=penalty) == want
    assert make(style, PROMPTS[:1], repetition_penalty=penalty) == want[:1]


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_penalty_and_minimum_on_scores_of_both_signs(penalty):
    """Before the third new id, no stop id; then any. Scores beyond the vocabulary stay masked."""
    rng = np.random.default_rng(0)
    scores, seen = rng.standard_normal((4, 9)).astype(np.float32), rng.random((4, 7)) < 0.5
    assert ((scores[:, :7] < 0) & seen).any() and ((scores[:, :7] > 0) & seen).any()
    cfg = GenerateConfig(repetition_penalty=penalty, min_new_tokens=2)
    for step in range(4):
        allowed_V = np.arange(7) != 5
        found = sampling.adjust(jnp.array(scores), jnp.array(seen), step, jnp.array(allowed_V), (1, 3), cfg)
        want = [
            penalised(row.astype(np.float64), np.flatnonzero(ids), penalty)
            for row, ids in zip(scores, seen, strict=True)
        ]
        masked = [5, 7, 8, *((1, 3) if step < 2 else ())]
        assert np.all(found[:, masked] == losses.MASKED_LOGIT)
        others = np.setdiff1d(np.arange(9), masked)
        np.testing.assert_allclose(found[:, others], np.array(want)[:, others], rtol=1e-6)


def test_padding_is_not_seen_and_ids_beyond_the_vocabulary_are_ignored():
    prompt = {"tokens": jnp.array([[0, 0, 4], [3, 9, 2]]), "segment_ids": jnp.array([[0, 0, 1], [1, 1, 1]])}
    found = sampling.seen_ids(prompt, 6, GenerateConfig(repetition_penalty=2.0))
    assert np.asarray(found).astype(int).tolist() == [[0, 0, 0, 0, 1, 0], [0, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("least", [1, 3, NEW])
def test_no_stop_id_before_the_minimum_of_new_tokens(least):
    """The stop id is one that ends row 1 at once; later it ends the row as soon as it is the most likely."""
    stop = greedy("llama")[1][0]
    want = reference("llama", stop=stop, least=least)[0]
    made = make("llama", PROMPTS, tokenizer=words_of(stop), min_new_tokens=least)
    assert made == [[i for i in row if i != stop] for row in want] and min(map(len, made)) >= least
    assert make("llama", PROMPTS, tokenizer=words_of(stop))[1] == []


@pytest.mark.parametrize("style", toys.STYLES)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_log_probs_are_those_of_the_model_in_float64(style, penalty):
    """Of a full forward pass over prompt and new ids, before the penalty, with the stop id."""
    stop = reference(style, penalty=penalty)[0][2][2]
    ids, log_probs = reference(style, penalty=penalty, stop=stop)
    assert len({len(row) for row in ids}) > 1
    made = sample(style, PROMPTS, tokenizer=words_of(stop), repetition_penalty=penalty, log_probs=True)
    assert [each.ids for each in made] == ids
    for each, want in zip(made, log_probs, strict=True):
        np.testing.assert_allclose(each.log_probs, want, rtol=0, atol=2e-5)


def test_log_probs_do_not_depend_on_how_an_id_was_drawn():
    """Sampled ids of any temperature have the log-probabilities that the model gives them."""
    drawn = sample("llama", PROMPTS, temperature=3.0, top_k=9, log_probs=True)
    assert [each.ids for each in drawn] == make("llama", PROMPTS, temperature=3.0, top_k=9)
    _, model, params = model_of("llama")
    for prompt, each in zip(PROMPTS, drawn, strict=True):
        tokens = np.array([[*prompt, *each.ids]])
        batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": np.arange(tokens.size)[None]}
        out = jax.jit(model.apply)(params, batch)
        logits_LxV = losses.logits(out.hidden_BxLxD[0], out.unembed_DxV, vocab_size=toys.VOCAB, softcap=30.0)
        logits_LxV = np.asarray(logits_LxV, np.float64)[len(prompt) - 1 : -1, : toys.VOCAB]
        want = logits_LxV[np.arange(NEW), each.ids] - np.log(np.exp(logits_LxV).sum(axis=1))
        np.testing.assert_allclose(each.log_probs, want, rtol=0, atol=2e-5)


LONG = 40  # new ids: more than two checks of the stop strings


def spelling(stop_id: int = -1):
    """A tokenizer of ids of one to three letters."""
    letters = [chr(97 + i % 7) + chr(97 + i % 5) * (i % 3) for i in range(toys.VOCAB)]
    words = words_of(stop_id)
    words.is_control_V = np.arange(toys.VOCAB) == stop_id
    words.piece = lambda i: "<|end|>" if i == stop_id else letters[i]
    words.decode = lambda ids: "".join(letters[i] for i in ids if i != stop_id)
    return words


def texts(words, style="llama", **changes) -> list[str]:
    cfg = Config(generate=GenerateConfig(**changes))
    return [sampling.text_of(ids, words, cfg) for ids in make(style, PROMPTS, tokenizer=words, **changes)]


def test_the_id_that_ends_a_text_is_not_part_of_it_though_its_tokenizer_spells_it():
    words, plain = spelling(stop_id=9), spelling()
    words.decode = plain.decode  # as of a published tokenizer whose EOS is no special token
    assert 9 in sampling.stop_ids(words, Config())
    assert sampling.text_of([3, 4, 9], words, Config()) == plain.decode([3, 4])
    assert sampling.text_of([9], words, Config()) == sampling.text_of([], words, Config()) == ""


def test_a_stop_string_cuts_a_text_wherever_it_is():
    """In one id or over several, overlapping, at a border of two checks, or in no text: as on the whole text."""
    words, options = spelling(), {"max_new_tokens": LONG, "repetition_penalty": 1.2}
    whole = texts(words, **options)
    rng = np.random.default_rng(0)
    found = [whole[0][:2], whole[1][-3:], "zz"]
    for row in (0, 1, 2):
        at, size = int(rng.integers(0, len(whole[row]) - 8)), int(rng.integers(1, 7))
        found.append(whole[row][at : at + size])
    cut = 0
    overlapping = (whole[2][11:14], whole[2][9:15], whole[2][30:33])
    for strings in [*((string,) for string in found), tuple(found[3:5]), overlapping, overlapping[::-1]]:
        made = texts(words, stop=strings, **options)
        ends = [[(at + len(s), at) for s in strings if (at := text.find(s)) >= 0] for text in whole]
        assert made == [text[: min(at)[1] if at else None] for text, at in zip(whole, ends, strict=True)], strings
        cut += sum(map(bool, ends))
    assert cut > 6


def test_a_stop_string_ends_its_row_at_the_id_that_completes_it():
    """While the others go on; the log-probabilities are those of these ids."""
    words, options = spelling(), {"max_new_tokens": LONG, "repetition_penalty": 1.2, "log_probs": True}
    whole = sample("llama", PROMPTS, tokenizer=words, **options)
    ends = set()
    for at in (1, 15, 16, 17, 18, 32, 33, LONG):
        string = words.decode(whole[1].ids[:at])[-5:]
        made = sample("llama", PROMPTS, tokenizer=words, stop=(string,), **options)
        for each, full in zip(made, whole, strict=True):
            n = next((n for n in range(LONG) if string in words.decode(full.ids[:n])), LONG)
            assert each.ids == full.ids[:n]
            np.testing.assert_allclose(each.log_probs, full.log_probs[:n], rtol=1e-6)
        ends.add(len(made[1].ids))
    assert {1, 16, 17, 33} <= ends


def test_of_overlapping_stop_strings_the_one_complete_first_counts():
    """Whatever the borders of the ids are: 'bc' ends before 'abcd' does, and of two that end together the longer."""
    words = SimpleNamespace(decode="".join, eos_id=-1)
    for strings, want in ((("bc", "abcd"), "xa"), (("d", "bcd"), "xa"), (("cd", "x"), ""), (("e",), "xabcd")):
        for order in (strings, strings[::-1]):
            for ids in (["xabcd"], ["x", "abcd"], ["xabc", "d"]):
                assert sampling.text_of(ids, words, Config(generate=GenerateConfig(stop=order))) == want


def test_all_rows_that_have_ended_stop_the_loop(monkeypatch):
    words, calls = spelling(), []
    string = words.decode(make("llama", PROMPTS[:1], tokenizer=words, max_new_tokens=LONG)[0][:2])
    run = sampling._sample
    monkeypatch.setattr(sampling, "_sample", lambda *given: calls.append(given) or run(*given))
    for rows_multiple in (1, 4):
        changes = {"stop": (string,), "max_new_tokens": LONG, "rows_multiple": rows_multiple}
        make("llama", PROMPTS[:1], tokenizer=words, **changes)
    assert len(calls) == 2


def test_a_stop_string_may_end_inside_a_character_of_several_ids():
    """Bytes of a character that is not whole are not taken for text; the character itself ends the text."""
    words = real_words()
    ids = words.encode("a\u00e9b\u65e5 bee")
    cfg = lambda *strings: Config(task=toys.task("causal_lm"), generate=GenerateConfig(stop=strings))  # noqa: E731
    for string, before in (("\u00e9", "a"), ("\u65e5", "a\u00e9b"), ("\u00e9b", "a"), ("\ufffd", None)):
        n, is_ended = sampling._end(ids, 0, (words.eos_id,), words, cfg(string))
        assert is_ended == (before is not None)
        want = "a\u00e9b\u65e5 bee" if before is None else before
        assert sampling.text_of(ids[:n], words, cfg(string)) == want


def test_a_stop_string_that_is_a_control_symbol_is_refused():
    with pytest.raises(ConfigError, match=r"'generate.stop' has '<\|end\|>', a control symbol"):
        make("llama", PROMPTS, tokenizer=spelling(9), stop=("a", "<|end|>"))


def test_stop_strings_penalty_and_minimum_on_a_mesh_are_those_of_one_device():
    words = spelling(9)
    changes = {"max_new_tokens": LONG, "repetition_penalty": 1.2, "min_new_tokens": 3, "log_probs": True}
    whole = sample("llama", PROMPTS, tokenizer=words, **changes)
    changes["stop"] = (words.decode(whole[0].ids)[5:8],)
    alone = sample("llama", PROMPTS, tokenizer=words, rows_multiple=8, **changes)
    assert [each.ids for each in alone] != [each.ids for each in whole]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, model, params = model_of("llama")
    with jax.set_mesh(mesh):
        where = param_paths.map_with_path(
            lambda _, axes: jax.NamedSharding(mesh, sharding.spec(axes)), model.logical_axes()
        )
        params = jax.device_put(params, where)
        spread = sample("llama", PROMPTS, tokenizer=words, rows_multiple=8, params=params, **changes)
    for one, other in zip(alone, spread, strict=True):
        assert one.ids == other.ids
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=0, atol=1e-5)


def test_samples_of_an_evaluation_are_cut_before_a_stop_string():
    words, (cfg, model, params) = spelling(), model_of("llama")
    string = texts(words)[0][3:5]
    run = SimpleNamespace(
        cfg=Config(model=cfg, generate=GenerateConfig(max_new_tokens=NEW, temperature=0.0, stop=(string,))),
        prompts={str(prompt): prompt for prompt in PROMPTS},
        plan=SimpleNamespace(tokenizer=words),
        program=SimpleNamespace(model=model),
        mesh=make_mesh(MeshConfig()),
    )
    found = evaluator.samples(run, params, 3)
    assert list(found.values()) == [text.partition(string)[0] for text in texts(words)]


def test_one_new_token_can_be_generated():
    assert make("gpt2", PROMPTS, max_new_tokens=1) == [row[:1] for row in greedy("gpt2")]


def test_samples_are_a_function_of_the_key_and_the_row():
    first = make("llama", PROMPTS, temperature=1.0)
    assert make("llama", PROMPTS, temperature=1.0) == first
    assert make("llama", PROMPTS, temperature=1.0, seed=1) != first
    same_prompt = make("llama", [PROMPTS[0]] * 3, temperature=1.0)
    assert same_prompt[0] == first[0], "whatever the other rows are"
    assert same_prompt[1] != same_prompt[0] and same_prompt[2] != same_prompt[1]


def with_head(scale: float):
    flat = param_paths.flatten(model_of("llama")[2])
    return param_paths.unflatten(flat | {"lm_head/kernel": scale * flat["lm_head/kernel"]})


def test_each_step_uses_a_new_key():
    """With a model for which all ids are equally likely at every step."""
    for row in make("llama", PROMPTS, temperature=1.0, params=with_head(0.0)):
        assert len(set(row)) > 1


def test_sampling_applies_the_models_logit_softcap():
    """At a cap of 30 and huge logits, about half of all ids are equally likely; without it, one is certain."""
    cfg = model_of("llama")[0]
    assert cfg.logit_softcap == 30
    made = make("llama", [PROMPTS[0]] * 3, temperature=1.0, params=with_head(1e5))
    assert len({row[0] for row in made}) > 1


def test_texts_in_steps_grow_to_those_of_one_step_each_by_its_own_key():
    cfg, model, params = model_of("llama")
    whole = Config(model=cfg, generate=GenerateConfig(max_new_tokens=NEW), task=toys.task("causal_lm"))
    want = sample("llama", PROMPTS, temperature=0.8)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(3))
    for order in ([0, 1, 2], [2, 0], [1]):
        prompts, options = [PROMPTS[i] for i in order], {"every": 2, "rows_multiple": 4, "cache_len": 16}
        steps = list(sampling.sample_in_steps(model, params, prompts, keys[np.array(order)], whole, NEVER, **options))
        assert [len(one.made.ids) for step in steps for one in step[:1]] == [2, 4, NEW]
        assert not any(one.is_ended for one in steps[-1])
        for i, *grown in zip(order, *steps, strict=True):
            assert all(want[i].ids[: len(one.made.ids)] == one.made.ids for one in grown)
            assert len(grown[-1].made.ids) == NEW


def test_texts_of_other_lengths_share_a_compilation_if_their_caches_are_alike():
    cfg, model, params = model_of("llama")
    keys, compiled = jax.random.split(jax.random.key(0), 1), []
    for most, cache_len in ((3, 4), (4, 4), (4, 5)):
        whole = Config(model=cfg, generate=GenerateConfig(max_new_tokens=most), task=toys.task("causal_lm"))
        options = {"every": 2, "cache_len": cache_len}
        *_, ((made, _),) = sampling.sample_in_steps(model, params, PROMPTS[:1], keys, whole, NEVER, **options)
        assert len(made.ids) == most
        compiled.append(sampling._sample._cache_size())
    assert compiled[0] == compiled[1] < compiled[2]


def test_padding_rows_for_the_mesh_changes_nothing():
    sampled = make("llama", PROMPTS, temperature=1.0)
    assert make("llama", PROMPTS[:2], temperature=1.0, rows_multiple=3) == sampled[:2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padded_rows_of_the_vocabulary_are_never_produced(temperature):
    """Even if the model makes them by far the most likely."""
    cfg, _, params = model_of("llama")
    flat = param_paths.flatten(params)
    kernel = np.array(flat["lm_head/kernel"])
    kernel[:, toys.VOCAB :] = 1e3 * np.where(np.arange(cfg.vocab_size - toys.VOCAB) % 2, 1, -1)
    made = make(
        "llama", PROMPTS, temperature=temperature, params=param_paths.unflatten(flat | {"lm_head/kernel": kernel})
    )
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
    return np.bincount(sampling.choose(many, keys, GenerateConfig(**changes)), minlength=len(logits)) / DRAWS


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
        # Temperature is applied first: at 0.5 the largest has 0.68 of the mass, and 0.93 with the next.
        ({"temperature": 0.5, "top_p": 0.6}, [0, 1, 0, 0]),
        # top_k is applied before top_p: of the two ids that it keeps, the first has 5/8.
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_sampled_frequencies_match_the_distribution(changes, want):
    want = np.asarray(want, float)
    got = frequencies(np.log(PROBS), **changes)
    assert np.all((got > 0) == (want > 0)), got
    error = np.sqrt(want * (1 - want) / DRAWS)
    assert np.all(np.abs(got - want) <= 4 * error), (got, want)


def kept(logits, **changes) -> list[int]:
    """The ids that can be drawn, the most likely first."""
    cfg = GenerateConfig(**{"temperature": 1.0} | changes)
    (found,), (ids,) = sampling.candidates(jnp.asarray(logits, jnp.float32)[None], cfg)
    return np.asarray(ids)[np.asarray(found) > -np.inf].tolist()


def fewest(weights: list[int], p: Fraction) -> list[int]:
    """The fewest ids with at least p of the total, most likely first, ties by id; in exact arithmetic."""
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    total = np.cumsum([weights[i] for i in order]).tolist()
    return order[: 1 + next(n for n, sum_n in enumerate(total) if sum_n >= p * total[-1])]


@pytest.mark.parametrize(
    "weights", [[5, 3, 1, 1], [1, 3, 5, 1], [1] * 10, [2, 1, 2, 1, 4], [7, 1], [30, 1, 1, 1, 64, 3]]
)
def test_top_p_at_exact_boundaries_keeps_the_fewest_ids_that_reach_it(weights):
    """top_p at, just below and just above every partial sum of the probabilities k/n, as float64 quotients."""
    logits = np.log(np.array(weights) / sum(weights))
    for reached in np.cumsum(sorted(weights, reverse=True)):
        border = Fraction(int(reached), sum(weights))
        for p in (border - Fraction(1, 10**4), border, border + Fraction(1, 10**4)):
            if 0 < p < 1:
                assert kept(logits, top_p=float(p)) == fewest(weights, p), p
                assert kept(logits + 17.3, top_p=float(p)) == fewest(weights, p), p


@pytest.mark.parametrize("size", [1_000, 50_257])
def test_top_p_at_exact_boundaries_of_large_vocabularies(size):
    rng = np.random.default_rng(size)
    for weights in (np.ones(size, int), rng.integers(1, 4, size), 1_000_000 // np.arange(1, size + 1)):
        logits = np.log(weights / weights.sum())
        total = np.cumsum(np.sort(weights)[::-1])
        for at in (0, 1, size // 3, size // 2, size - size // 7):
            p = Fraction(int(total[at]), int(total[-1]))
            assert len(kept(logits, top_p=float(p))) == at + 1


def test_top_p_agrees_with_float64_on_random_logits():
    """Except where top_p is too close to a partial sum for float32."""
    rng = np.random.default_rng(0)
    checked = 0
    for size, scale in itertools.product((50, 2_000), (0.3, 1, 4)):
        logits = (scale * rng.standard_normal(size)).astype(np.float32)
        order = np.argsort(-logits, kind="stable")
        probs = np.exp(logits[order].astype(np.float64))
        total = np.cumsum(probs) / probs.sum()
        for p in (0.05, 0.3, 0.5, 0.9, 0.95, 0.999):
            if np.abs(total - p).min() > 2e-6:
                assert kept(logits, top_p=p) == order[: 1 + np.searchsorted(total, p)].tolist()
                checked += 1
    assert checked > 30


def test_ties_keep_the_lowest_ids():
    assert kept([2.0, 2.0, 2.0, 0.0], top_k=2) == [0, 1]
    assert kept([0.0, 2.0, 2.0, 2.0], top_k=2) == [1, 2]
    assert kept([2.0, 2.0, 2.0, -9.0], top_p=0.5) == [0, 1]
    assert kept([1.0] * 6, top_k=4, top_p=0.5) == [0, 1]


def test_top_p_near_0_and_at_1():
    logits = [0.0, -3.0, losses.MASKED_LOGIT, 1.0]
    assert kept(logits, top_p=1e-12) == [3] and kept(logits, top_p=1e-45) == [3]
    assert sorted(kept(logits, top_p=1.0)) == [0, 1, 3]
    assert kept(logits, top_p=1 - 1e-9) == [3, 0, 1]
    assert kept([-3.0, losses.MASKED_LOGIT, 1.0, losses.MASKED_LOGIT], top_k=3) == [2, 0], "masked ones fill no place"


@pytest.mark.parametrize("temperature", [1e-10, 1e-30, 1e-38, 1e-45, 5e-324])
def test_temperatures_near_0_choose_the_most_likely(temperature):
    shapes = np.array([[1.0, 3.0, 2.0], [-5.0, -3.0, -4.0], [0.0, 1.0, -np.inf], [-1.0, 0.0, -1e-3]])
    rows = np.concatenate([shapes * scale for scale in (1e-3, 1.0, 1e4, 1e20)])
    logits = jnp.asarray(np.where(np.isinf(rows), losses.MASKED_LOGIT, rows), jnp.float32)
    keys = jax.random.split(jax.random.key(0), len(rows))
    for rest in ({}, {"top_k": 2}, {"top_p": 0.5}):
        assert np.all(sampling.choose(logits, keys, GenerateConfig(temperature=temperature, **rest)) == 1)


def test_masked_ids_are_not_drawn_at_any_temperature():
    seen = frequencies([0.0, 1.0, losses.MASKED_LOGIT, -2.0], temperature=1e30)
    assert seen[2] == 0 and min(seen[[0, 1, 3]]) > 0.3


@pytest.mark.parametrize("value", [-1.0, -1e-38, float("nan"), float("inf")])
def test_invalid_temperatures_are_refused(value):
    c = default_config()
    c.train.total_steps, c.generate.temperature = 1, value
    with pytest.raises(ConfigError, match=r"'generate\.temperature' must"):
        build_config(c)


@functools.cache
def real_words():
    return dataclasses.replace(tokenizers.train(["a bee sees"] * 9, 275, 1000), extra_ids=3)


@pytest.mark.parametrize(
    ("task", "symbols", "beside_text"),
    [
        ("causal_lm", (), ["eos"]),
        ("translation", (), ["eos"]),
        ("chat", (), ["eos", "end"]),
        ("span_corruption", (), ["eos", "sentinels"]),
        ("causal_lm", ("sentinels", "bos"), ["eos", "sentinels", "bos"]),
        ("causal_lm", ("roles", "mask"), ["eos", "roles", "mask"]),
    ],
)
def test_only_text_stop_ids_and_requested_symbols_may_be_generated(task, symbols, beside_text):
    words = real_words()
    cfg = Config(task=toys.task(task), generate=GenerateConfig(symbols=symbols))
    ids = {"eos": [words.eos_id], "end": [words.end_of_turn_id], "bos": [words.bos_id], "mask": [words.mask_id]}
    ids |= {"roles": list(words.role_ids.values()), "sentinels": words.sentinel_ids.tolist()}
    allowed = set(np.flatnonzero(sampling.allowed_ids(words, cfg)).tolist())
    text = set(range(words.vocab_size)) - {i for each in ids.values() for i in each} - {words.pad_id, 3}  # 3: unknown
    assert {words.encode("\x00")[0], *words.encode("a bee")} < text, "a byte is text"
    assert allowed == text | {i for name in beside_text for i in ids[name]}


def test_symbols_that_the_tokenizer_lacks_are_refused():
    words = dataclasses.replace(real_words(), extra_ids=1)
    with pytest.raises(ConfigError, match=r"'generate\.symbols' has sentinels, but there is none"):
        words.may_generate([words.eos_id], ("sentinels",))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_that_are_not_allowed_are_never_produced(temperature):
    """Even if they are the most likely."""
    free = make("llama", PROMPTS, temperature=temperature)
    forbidden = sorted({token for row in free for token in row})
    made = make("llama", PROMPTS, temperature=temperature, tokenizer=words_of(-1, forbidden=forbidden))
    assert [len(row) for row in made] == [NEW] * 3
    assert not {token for row in made for token in row} & set(forbidden)


def test_rows_are_filtered_independently():
    logits = jnp.log(jnp.asarray([PROBS, PROBS[::-1], [0.58, 0.14, 0.14, 0.14]], jnp.float32))
    seen = [set(), set(), set()]
    for seed in range(40):
        for row, token in enumerate(
            sampling.choose(
                logits, jax.random.split(jax.random.key(seed), 3), GenerateConfig(temperature=1.0, top_p=0.6)
            )
        ):
            seen[row].add(int(token))
    assert seen == [{1, 3}, {0, 2}, {0, 1}]


def test_prompts_are_encoded_in_the_form_of_the_task():
    words = SimpleNamespace(
        chat_template="",
        bos_id=1,
        encode=lambda text: [ord(c) for c in text],
        role_ids={"user": 4, "assistant": 5},
        end_of_turn_id=6,
    )
    text = Config(model=model_of("gpt2")[0], generate=GenerateConfig(max_new_tokens=MAX_LEN - 3))
    chat = dataclasses.replace(text, task=toys.task("chat"), generate=GenerateConfig(max_new_tokens=NEW))
    assert sampling.encode_prompt("ab", words, text) == [1, 97, 98]
    assert sampling.encode_prompt("ab", words, chat) == [1, 4, 97, 98, 6, 5]
    with pytest.raises(ConfigError, match=f"a prompt of 4 ids .* do not fit 'model.max_len' .{MAX_LEN}"):
        sampling.encode_prompt("abc", words, text)
