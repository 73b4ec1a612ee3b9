"""Texts are scored and continued for the evaluation harness as the model alone does it."""

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import lm
from lm import harness, program, train
from lm.checkpoint.hf import export
from lm.config.schema import ConfigError
from lm.models import transformer
from lm.tasks import build_config, default_config
from tests import published as published_tokenizers
from tests import tool_modules, toys, used_runs

TEXTS = ("", "The sum of 3 and x", "def add_7(x):", "a", "isn't it")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return used_runs.make("causal_lm", tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def loaded(run):
    alone = lm.load(str(run), batch_size=3, devices=jax.devices()[:1])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), alone.params)
    return dataclasses.replace(alone, params=params)


def pairs_of(loaded, *, most: int) -> list[tuple[list[int], list[int]]]:
    """Contexts and continuations of many lengths."""
    rng, size = np.random.default_rng(1), loaded.tokenizer.vocab_size
    ids = [rng.integers(0, size, n).tolist() for n in range(1, most - 1)]
    return [(row[: 1 + i % len(row)], [*row[1 + i % len(row) :], 5]) for i, row in enumerate(ids)]


def reference(loaded, context, continuation) -> tuple[float, bool]:
    """Of the logits of the row alone, in float64."""
    ids = np.array([*context, *continuation])
    logits = logits_of(loaded, ids[:-1])[-len(continuation) :]
    log_probs = logits - logits.max(1, keepdims=True)
    log_probs -= np.log(np.exp(log_probs).sum(1, keepdims=True))
    found = log_probs[np.arange(len(continuation)), continuation].sum()
    return found, bool((logits.argmax(1) == continuation).all())


def logits_of(loaded, ids) -> np.ndarray:
    """Logits after each id, float64 [L, V]."""
    tokens = np.asarray(ids, np.int32)[None]
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    out = loaded.model.apply(
        loaded.params, {"tokens": tokens, "positions": positions, "segment_ids": np.ones_like(tokens)}
    )
    logits = np.asarray(out.hidden_BxLxD, np.float64)[0] @ np.asarray(out.unembed_DxV, np.float64)
    return logits[:, : loaded.tokenizer.vocab_size]


def test_a_score_is_that_of_the_row_alone_in_float64(loaded):
    pairs, counts = pairs_of(loaded, most=loaded.config.model.max_len)[::4], Counter()
    for context, _ in pairs[:3]:  # what the model itself goes on with
        pairs.append((context, [int(logits_of(loaded, context)[-1].argmax())]))
    scored = dict(harness.score(loaded, pairs, counts))
    assert sorted(scored) == list(range(len(pairs))) and counts["context_cut"] == 0
    for number, pair in enumerate(pairs):
        log_prob, is_greedy = reference(loaded, *pair)
        assert scored[number].log_prob == pytest.approx(log_prob, rel=1e-5)
        assert scored[number].is_greedy == is_greedy
    assert {each.is_greedy for each in scored.values()} == {True, False}


def test_a_score_depends_neither_on_the_rows_beside_it_nor_on_the_number_of_devices(loaded):
    pairs = pairs_of(loaded, most=20)
    together = dict(harness.score(loaded, pairs, Counter()))
    for number in (0, 7, len(pairs) - 1):
        ((_, alone),) = harness.score(loaded, [pairs[number]], Counter())
        assert alone == together[number]
    spread = dataclasses.replace(lm.load(loaded.name, batch_size=16), params=loaded.params)
    assert spread.mesh.size == 8
    for number, each in harness.score(spread, pairs, Counter()):
        assert each.log_prob == pytest.approx(together[number].log_prob, rel=1e-5)


def test_contexts_that_are_too_long_are_cut_at_their_start_and_counted(loaded):
    most, rng, counts = loaded.config.model.max_len, np.random.default_rng(2), Counter()
    ids = rng.integers(0, loaded.tokenizer.vocab_size, most + 9).tolist()
    ((_, scored),) = harness.score(loaded, [(ids[:-4], ids[-4:])], counts)
    log_prob, _ = reference(loaded, ids[-most - 1 : -4], ids[-4:])
    assert scored.log_prob == pytest.approx(log_prob, rel=1e-5) and counts["context_cut"] == 1
    with pytest.raises(ConfigError, match=f"continuation 0 has {most + 1} ids; the model has {most} positions"):
        next(harness.score(loaded, [([1], ids[: most + 1])], counts))


def test_a_continuation_is_what_the_run_generates(loaded):
    tok, counts = loaded.tokenizer, Counter()
    contexts = [[tok.bos_id, *tok.encode(text)] for text in TEXTS]
    end = tok.piece(tok.eos_id)
    found = harness.continuations(loaded, contexts, {"until": [end, "e"], "max_gen_toks": 5}, counts)
    assert (
        found == loaded.generate(list(TEXTS), max_new_tokens=5, stop=("e",), temperature=0.0)
        and not counts["context_cut"]
    )
    room = loaded.config.model.max_len - 5
    long = [tok.bos_id, *tok.encode("x y " * room)]
    cut = harness.continuations(loaded, [long, long[-room:]], {"until": "e", "max_gen_toks": 5}, counts)
    assert cut[0] == cut[1] and counts["context_cut"] == 1


def test_a_continuation_that_the_tokenizer_joins_with_its_context_is_refused_and_not_certain(loaded):
    pairs = [([1], [5]), ([1, 7], [])]
    with pytest.raises(ConfigError, match="continuation 1 has no ids of its own: the tokenizer joins it with the end"):
        next(harness.score(loaded, pairs, Counter()))


def test_scoring_holds_the_logits_of_a_chunk_and_not_of_whole_rows(loaded):
    rows, length, size = 8, 32, 2**15
    sections = {
        "model": dataclasses.replace(loaded.config.model, vocab_size=size),
        "loss": dataclasses.replace(loaded.config.loss, chunk_len=2),
    }
    cfg = dataclasses.replace(loaded.config, **sections)
    model = program.make_model(cfg, program.compute_dtype("float32", loaded.mesh))
    wide = dataclasses.replace(loaded, config=cfg, model=model, tokenizer=SimpleNamespace(vocab_size=size))
    batch = harness._batch([([1] * (length + 1), 5)], rows, length)
    with jax.set_mesh(loaded.mesh):
        compiled = jax.jit(harness._step(wide)).lower(toys.random_params(cfg.model), batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * length * size * 4


def test_settings_have_the_names_that_tasks_of_the_harness_use(loaded):
    tok = loaded.tokenizer
    contexts = [[tok.bos_id, *tok.encode(text)] for text in TEXTS]
    expected = harness.continuations(loaded, contexts, {"max_gen_toks": 5}, Counter())
    assert any(expected)
    for name in ("max_new_tokens", "max_tokens", "max_completion_tokens"):
        settings = {name: 5, "num_beams": 1, "do_sample": False, "temperature": None}
        assert harness.continuations(loaded, contexts, settings, Counter()) == expected
    both = {"max_new_tokens": 9, "max_gen_toks": 5}
    assert harness.continuations(loaded, contexts, both, Counter()) == expected


def test_settings_that_are_not_known_or_leave_no_room_are_refused(loaded):
    most = loaded.config.model.max_len
    with pytest.raises(ConfigError, match="unknown setting of generation 'num_beams'; expected some of until"):
        harness.continuations(loaded, [[1]], {"num_beams": 2}, Counter())
    with pytest.raises(ConfigError, match=f"{most} new ids .* leave no room for a context in {most} positions"):
        harness.continuations(loaded, [[1]], {"max_gen_toks": most}, Counter())


def test_a_missing_harness_and_a_run_that_is_no_decoder_are_refused(loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"needs the package lm_eval: pip install -e '\.\[harness\]'"):
        harness.check(loaded)
    monkeypatch.setitem(sys.modules, "lm_eval", type(sys)("lm_eval"))
    model = dataclasses.replace(loaded.config.model, kind="encoder")
    with pytest.raises(ConfigError, match=r"'model\.kind' of .* is encoder"):
        harness.check(dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, model=model)))


# With the harness itself ---------------------------------------------------------------------------------------------

CHOICES = """
task: toy_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}} "
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: toy_perplexity
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
ANSWERS = """
task: toy_answers
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder of three tasks on a few records."""
    folder, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)
    words = ["The", "sum", "of", "x", "and", "isn't", "naïve", "or", "not", "add", "return", "def"]

    def text(n: int) -> str:
        return " ".join(rng.choice(words, n))

    rows = [
        {"question": text(4), "choices": [text(k) for k in (1, 2, 3)], "label": i % 3, "text": text(60), "answer": "x"}
        for i in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in {"choices": CHOICES, "rolling": ROLLING, "answers": ANSWERS}.items():
        (folder / f"{name}.yaml").write_text(task.replace("FILE", str(folder / "rows.jsonl")))
    return folder


def test_the_harness_gives_the_figures_of_its_own_class_for_transformers(tasks, tmp_path, capsys, monkeypatch):
    """From the same weights: multiple choice, perplexity of texts longer than the model, and generated answers."""
    evaluator = pytest.importorskip("lm_eval.evaluator")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager

    size = published_tokenizers.make("byte_bpe").vocab_size  # more rows would be in the softmax of transformers alone
    cfg = dataclasses.replace(toys.PLAIN_LLAMA, num_layers=2, vocab_size=size, max_len=64)
    cfg = transformer.resolve(cfg, vocab_size=size, seq_len=64)
    export.export(tmp_path / "base", cfg, toys.random_params(cfg), vocab_size=size)
    published_tokenizers.folder("byte_bpe", tmp_path / "base")
    c = default_config("causal_lm")
    c.init_from = f"hf:{tmp_path / 'base'}"
    c.data.format, c.data.path = "text", str(toys.write_texts(tmp_path / "texts"))
    c.data.eval_fraction, c.data.seq_len, c.data.batch_size, c.train.total_steps = 0.2, 64, 8, 2
    train.train(build_config(c), tmp_path / "run")
    tool_modules.call("hf", "export", tmp_path / "run", tmp_path / "out")
    names = ["toy_choices", "toy_perplexity", "toy_answers"]
    loaded = lm.load(str(tmp_path / "run"), batch_size=4, devices=jax.devices()[:1])
    own, table = harness.evaluate(loaded, names, include_path=str(tasks))
    manager = TaskManager(include_path=str(tasks))
    for name in names:
        # With add_bos_token it would count BOS among the ids of a whole text, which comes after its prefix BOS.
        options = {"device": "cpu", "dtype": "float32", "batch_size": 1, "add_bos_token": name != "toy_perplexity"}
        theirs = huggingface.HFLM(str(tmp_path / "out"), **options)
        expected = evaluator.simple_evaluate(theirs, tasks=[name], task_manager=manager)["results"][name]
        for metric, value in expected.items():
            if isinstance(value, float) and "stderr" not in metric:
                assert own["results"][name][metric] == pytest.approx(value, rel=1e-5), (name, metric)
    theirs, mine = (
        huggingface.HFLM(str(tmp_path / "out"), **options | {"add_bos_token": True}),
        harness.model(loaded, Counter()),
    )
    theirs.model.generation_config.max_new_tokens = None  # the export's, which would win over the harness's max_length
    tok = loaded.tokenizer
    never = [i for i in np.flatnonzero(tok.is_control_V).tolist() if i != tok.eos_id]  # a run does not generate them
    theirs.model.generation_config.suppress_tokens = never or None
    rows = [json.loads(line) for line in (tasks / "rows.jsonl").read_text().splitlines()]
    asked = [Instance("loglikelihood", {}, (row["question"] + " ", row["choices"][2]), 0) for row in rows]
    asked.append(Instance("loglikelihood", {}, ("", "The sum"), 0))
    for (log_prob, is_greedy), expected in zip(mine.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert (pytest.approx(log_prob, rel=1e-5), is_greedy) == expected
    settings = {"until": ["\n", " x"], "max_gen_toks": 8, "do_sample": False}
    asked = [Instance("generate_until", {}, (row["question"], settings), 0) for row in rows]
    assert mine.generate_until(asked) == theirs.generate_until(asked)
    assert own["results"]["toy_perplexity"]["word_perplexity,none"] > 1 and "toy_choices" in table
    with pytest.raises(ConfigError, match="the harness has no task 'toy_choice'"):
        harness.evaluate(loaded, ["toy_choice"], include_path=str(tasks))
