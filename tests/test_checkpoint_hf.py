"""lm/checkpoint/hf: published models compute here what they compute in transformers, and come out as they went in."""

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="needs the extra hf: pip install -e '.[hf]'")
torch = pytest.importorskip("torch", reason="needs the extra peer: pip install -e '.[peer]'")
transformers = pytest.importorskip("transformers", reason="needs the extra peer: pip install -e '.[peer]'")

from lm import losses, param_paths  # noqa: E402
from lm.checkpoint import CheckpointError, hf  # noqa: E402
from lm.checkpoint.hf import export  # noqa: E402
from lm.config import Config, GenerateConfig, ModelConfig, schema  # noqa: E402
from lm.decoding import beam_search, sampling  # noqa: E402
from lm.models import layers, registry, transformer  # noqa: E402
from lm.models import rope as rope_lib  # noqa: E402
from lm.tasks import sentence_embeddings  # noqa: E402
from lm.types import Head  # noqa: E402
from tests import published, tool_modules  # noqa: E402

torch.set_num_threads(1)
VOCAB, LONG = 99, 8192
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
SIZES |= dict(vocab_size=VOCAB, max_position_embeddings=LONG)
GPT2 = dict(n_layer=2, n_embd=32, n_head=4, n_positions=256, vocab_size=VOCAB, bos_token_id=1, eos_token_id=1)
BERT = SIZES | dict(max_position_embeddings=128)
ROBERTA = BERT | dict(max_position_embeddings=130, type_vocab_size=1, layer_norm_eps=1e-5)
T5 = dict(num_layers=3, num_decoder_layers=2, d_model=32, num_heads=4, d_kv=16, d_ff=48, vocab_size=VOCAB)
T5 |= dict(decoder_start_token_id=0)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)


def rope(**parameters: Any) -> dict[str, Any]:
    return SIZES | {"rope_parameters": {"rope_theta": 10_000.0, **parameters}}


# A name for each family, then one for each of its variations.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "llama": ("llama", SIZES),
    "mistral": ("mistral", SIZES | dict(sliding_window=7, head_dim=16)),
    "qwen2": ("qwen2", SIZES | dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", SIZES | dict(head_dim=16)),
    "gemma2": ("gemma2", SIZES | dict(num_hidden_layers=3, head_dim=16, sliding_window=7, query_pre_attn_scalar=24)),
    "gemma3": ("gemma3_text", SIZES | dict(num_hidden_layers=7, head_dim=16, sliding_window=7)),
    "bert": ("bert", BERT),
    "roberta": ("roberta", ROBERTA),
    "t5": ("t5", T5),
    "t5 v1.1": ("t5", T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
}
FAMILIES = list(CONFIGS)
ENCODERS = ("bert", "roberta", "xlm-roberta")
GENERATING = [name for name in FAMILIES if name not in ENCODERS]
T5S = [name for name in FAMILIES if name.startswith("t5")]
CONFIGS |= {
    "bert, tanh GELU": ("bert", BERT | dict(hidden_act="gelu_new")),
    "bert, one sentence type": ("bert", BERT | dict(type_vocab_size=1)),
    "roberta, another padding id": ("roberta", ROBERTA | dict(pad_token_id=5, type_vocab_size=2)),
    "xlm-roberta": ("xlm-roberta", ROBERTA),
    "t5, a deeper decoder": ("t5", T5 | dict(num_layers=2, num_decoder_layers=3, feed_forward_proj="gated-silu")),
    "t5, as deep a decoder": ("t5", T5 | dict(num_layers=2, num_decoder_layers=None, feed_forward_proj="gelu")),
    "gpt2 untied, narrow MLP": ("gpt2", GPT2 | dict(tie_word_embeddings=False, n_inner=40)),
    "llama tied": ("llama", SIZES | dict(tie_word_embeddings=True, rms_norm_eps=1e-5)),
    "mistral without window": ("mistral", SIZES | dict(sliding_window=None)),
    "gemma2 without windows": ("gemma2", SIZES | dict(head_dim=16, layer_types=["full_attention"] * 2)),
    "qwen3 windows": ("qwen3", SIZES | dict(sliding_window=5, use_sliding_window=True, max_window_layers=0)),
    "gemma3 all windows": ("gemma3_text", SIZES | dict(head_dim=16, sliding_window=7)),
    "linear": ("llama", rope(rope_type="linear", factor=4.0)),
    "llama3": ("llama", rope(**LLAMA3, original_max_position_embeddings=1024)),
    "yarn": ("llama", rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048)),
    "yarn mscale": (
        "qwen2",
        rope(rope_type="yarn", factor=2.0, mscale=0.8, mscale_all_dim=0.5, beta_fast=16.0)
        | {"max_position_embeddings": LONG},
    ),
    "dynamic": ("llama", rope(rope_type="dynamic", factor=4.0) | {"max_position_embeddings": 512}),
}

ONLY_GENERATED = {"dynamic, short": ("llama", rope(rope_type="dynamic", factor=4.0) | {"max_position_embeddings": 6})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """name -> the folder of a tiny random model that transformers has saved."""
    root = tmp_path_factory.mktemp("published")

    @functools.cache
    def saved(name: str) -> Path:
        theirs(name).save_pretrained(root / name)
        return root / name

    return saved


def auto(kind: str) -> Any:
    if kind == "t5":
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForMaskedLM if kind in ENCODERS else transformers.AutoModelForCausalLM


@functools.cache
def theirs(name: str) -> Any:
    """The model in transformers, with all parameters moved, so that each one matters."""
    kind, values = (CONFIGS | ONLY_GENERATED)[name]
    torch.manual_seed(0)
    cfg = transformers.AutoConfig.for_model(kind, **values)
    model = auto(kind).from_config(cfg, attn_implementation="eager").float().eval()
    if kind == "t5" and not cfg.scale_decoder_outputs:  # of files that were published before version 5
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def read(path: Path) -> tuple[Any, Any, Any]:
    """(model config, functions, parameters) of a folder, on one device."""
    opened = hf.open_model(path)
    fns = registry.MODELS[opened.model.kind](Config(model=opened.model), None, jnp.float32)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(fns.init, jax.eval_shape(lambda: jax.random.key(0)))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes)
    return opened.model, fns, hf.load(opened, {"params": abstract})["params"]


def logits_here(cfg: Any, fns: Any, params: Any, batch: Any) -> jax.Array:
    out = fns.apply(params, batch)
    return losses.logits(out.pre_logits_BxLxD, out.unembed_DxV, vocab_size=cfg.vocab_size, softcap=cfg.logit_softcap)


def batch_of(cfg: Any, tokens: np.ndarray, segments: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
    """A batch; the encoder of an encoder-decoder reads the ids of the decoder, with their padding, in reverse."""
    batch = {"tokens": tokens, "segment_ids": segments, "positions": positions}
    if cfg.kind == "encoder_decoder":
        batch |= {"inputs": tokens[:, ::-1], "input_segment_ids": segments[:, ::-1], "input_positions": positions}
    return batch


def there_positions(model: Any, positions: np.ndarray) -> np.ndarray:
    """Positions as transformers takes them: a RoBERTa counts them from the row after that of its padding."""
    is_roberta = model.config.model_type in ("roberta", "xlm-roberta")
    return positions + (model.config.pad_token_id + 1 if is_roberta else 0)


def logits_there(model: Any, tokens: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(**given_there(model, tokens, mask, positions), use_cache=False).logits.numpy()


def given_there(model: Any, tokens: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> dict[str, Any]:
    """What transformers takes, as `batch_of`."""
    ids, mask = (torch.from_numpy(np.asarray(x)).long() for x in (tokens, mask))
    if model.config.is_encoder_decoder:
        given = {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        return given | {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}
    positions = torch.from_numpy(there_positions(model, positions)).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def assert_equal(mine: np.ndarray, theirs: np.ndarray) -> None:
    """Logits [n, V] within 1e-5 of the largest; KL divergence at most 1e-9 at every position."""
    mine, theirs = mine.astype(np.float64), theirs.astype(np.float64)
    assert np.abs(mine - theirs).max() <= 1e-5 * np.abs(theirs).max()
    log_p, log_q = (np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True))) for x in (theirs, mine))
    assert (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).max() <= 1e-9


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name, folder):
    """Padded on the left and on the right, from the first to the last positions of the family, packed as unpacked."""
    cfg, fns, params = read(folder(name))
    rng, length = np.random.default_rng(0), 48
    tokens = rng.integers(0, VOCAB, (4, length)).astype(np.int32)
    mask = np.ones_like(tokens)
    mask[0, :13], mask[1, -17:] = 0, 0
    positions = np.maximum(np.cumsum(mask, axis=1, dtype=np.int32) - 1, 0)
    last = min(cfg.max_len, LONG) if name != "dynamic" else 1500
    positions[3] = [*range(8), *range(last - length + 8, last)]
    apply = jax.jit(functools.partial(logits_here, cfg, fns))
    mine = np.asarray(apply(params, batch_of(cfg, tokens, mask, positions)))
    for row in range(4):  # one by one: with dynamic scaling, rows of a batch change each other in transformers
        if name == "dynamic":  # transformers keeps the frequencies of the longest row so far
            theirs(name).model.rotary_emb.__init__(theirs(name).config)
        wanted = logits_there(theirs(name), tokens[row : row + 1], mask[row : row + 1], positions[row : row + 1])
        assert_equal(mine[row][mask[row] > 0], wanted[0][mask[row] > 0])

    packed = batch_of(
        cfg,
        np.concatenate([tokens[2, :20], tokens[3, :28]])[None],
        np.repeat([[1, 2]], [20, 28], axis=1).astype(np.int32),
        np.concatenate([np.arange(20), positions[3, :28]]).astype(np.int32)[None],
    )
    both = np.asarray(apply(params, packed))[0]
    mask[2, 20:], mask[3, 28:] = 0, 0
    alone = np.asarray(apply(params, batch_of(cfg, tokens, mask, positions)))
    assert_equal(both[:20], alone[2, :20])
    assert_equal(both[20:], alone[3, :28])


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_of_distances_are_those_of_t5(bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = np.arange(-1000, 1001)
    want = T5Attention._relative_position_bucket(torch.from_numpy(distances), bidirectional).numpy()
    np.testing.assert_array_equal(layers.relative_buckets(jnp.asarray(distances), bidirectional), want)


@pytest.mark.parametrize("theta", [10_000.0, 100_000.0, 500_000.0, 1_000_000.0])
@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_frequencies_are_those_of_transformers_up_to_the_last_bits(kind, theta):
    """torch's own powers are one bit off the nearest float32 in places; Llama 3's mean makes up to four of it."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    more = {"default": {}, "linear": dict(factor=8.0), "llama3": LLAMA3, "yarn": dict(factor=4.0)}[kind]
    parameters = {"rope_theta": theta, "rope_type": kind, **more}
    if kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = 8192
    sizes = SIZES | dict(head_dim=128, max_position_embeddings=8192 * 4)
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**sizes, rope_parameters=parameters))
    given = hf.families._rope(parameters, 8192 * 4)
    section = schema.build_section(ModelConfig, given, "model.").rope_scaling
    mine = rope_lib.frequencies(theta, 128, section)
    np.testing.assert_array_max_ulp(mine, theirs.inv_freq.numpy(), 4)
    assert rope_lib.attention_magnitude(section) == theirs.attention_scaling


@pytest.mark.parametrize("name", [*GENERATING, "dynamic, short"])
def test_greedy_generation_is_that_of_transformers(name, folder):
    """64 ids after prompts of different lengths, from the cache; with dynamic scaling beyond the original length."""
    cfg, fns, params = read(folder(name))
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [3, 4]]
    words = SimpleNamespace(eos_id=1, bos_id=0, may_generate=lambda ends, symbols: np.ones(VOCAB, bool))
    config = Config(model=cfg, generate=GenerateConfig(max_new_tokens=64, temperature=0.0))
    mine = sampling.sample(fns, params, prompts, jax.random.key(0), config, words)
    for prompt, made in zip(prompts, mine, strict=True):
        ids = sampling.without_stop_id(made.ids, words, config)
        if name == "dynamic, short":  # transformers keeps the frequencies of the longest row so far
            theirs(name).model.rotary_emb.__init__(theirs(name).config)
        out = theirs(name).generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=1, pad_token_id=1
        )
        start = 1 if cfg.kind == "encoder_decoder" else len(prompt)
        assert ids == [i for i in out[0, start:].tolist() if i != 1] and ids


@pytest.mark.parametrize("name", GENERATING[:2])
def test_repetition_penalty_and_minimum_length_are_those_of_transformers(name, folder):
    """Greedy, and the three best of beam search, whose texts a minimum gives the same length."""
    cfg, fns, params = read(folder(name))
    prompts = [[5, 6, 7, 8, 9, 5, 11, 12], [3, 4]]
    words = SimpleNamespace(eos_id=1, may_generate=lambda ends, symbols: np.ones(VOCAB, bool))
    shared = {"max_new_tokens": 24, "repetition_penalty": 1.3}
    common = shared | {"do_sample": False, "eos_token_id": 1, "pad_token_id": 1}

    def config(least: int) -> Config:
        return Config(model=cfg, generate=GenerateConfig(min_new_tokens=least, temperature=0.0, **shared))

    greedy = sampling.sample(fns, params, prompts, jax.random.key(0), config(20), words)
    searched = beam_search.search(fns, params, prompts, config(24), words, beams=3, alpha=0.0, count=3)
    for prompt, ids, best in zip(prompts, greedy, searched, strict=True):
        given, n = torch.tensor([prompt]), len(prompt)
        out = theirs(name).generate(given, min_new_tokens=20, **common)
        assert ids.ids == out[0, n:].tolist()
        plain = theirs(name).generate(given, **common | {"repetition_penalty": 1.0})
        assert ids.ids != plain[0, n:].tolist()
        beams = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0, "min_new_tokens": 24}
        out = theirs(name).generate(given, **common | beams)
        assert [each.ids for each in best] == out[:, n:].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_transformers(name, folder, tmp_path):
    """Of the mean cross-entropy of the next ids, of BERT and T5 of the same; exported, so that they have its names."""
    cfg, fns, params = read(folder(name))
    tokens = np.random.default_rng(1).integers(2, VOCAB, (2, 24)).astype(np.int32)  # torch gives padding no gradient
    mask = np.ones_like(tokens)
    positions = np.tile(np.arange(24, dtype=np.int32), (2, 1))

    def loss(params: Any) -> jax.Array:
        chances = jax.nn.log_softmax(logits_here(cfg, fns, params, batch_of(cfg, tokens, mask, positions)))
        chances, targets = (chances, tokens) if name in (*ENCODERS, *T5S) else (chances[:, :-1], tokens[:, 1:])
        return -jnp.take_along_axis(chances, targets[..., None], axis=-1).mean()

    gradients = jax.jit(jax.grad(loss))(params)
    model = theirs(name)
    model.zero_grad()
    labels = torch.from_numpy(tokens).long()
    model(**given_there(model, tokens, mask, positions), labels=labels, use_cache=False).loss.backward()
    export.export(tmp_path / "gradients", cfg, gradients, vocab_size=VOCAB)
    mine = tensors_of(tmp_path / "gradients")
    wanted = {key: each.grad.numpy() for key, each in model.named_parameters() if key in mine}
    assert mine.keys() == wanted.keys()
    for key, want in wanted.items():
        largest = np.abs(want).max()
        if key.endswith("self.key.bias"):  # which changes nothing but by rounding: softmax does not see it
            assert largest < 1e-8
            largest = 1e-4
        np.testing.assert_allclose(mine[key], want, rtol=0, atol=1e-4 * largest, err_msg=key)
    model.zero_grad()


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {key: each for file in path.glob("*.safetensors") for key, each in load_file(file).items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_export_writes_the_bytes_that_were_read(name, folder, tmp_path):
    """The tensors of transformers, byte for byte; the files of a second export are those of the first."""
    cfg, _, params = read(folder(name))
    export.export(tmp_path / "one", cfg, params, vocab_size=VOCAB)
    first, there = tensors_of(tmp_path / "one"), tensors_of(folder(name))
    for each in hf.FAMILIES[CONFIGS[name][0]].repeats if cfg.tie_embeddings else ():
        there.pop(each, None)
    assert first.keys() == there.keys()
    for key in first:
        assert first[key].tobytes() == there[key].tobytes() and first[key].shape == there[key].shape, key
    again, _, params = read(tmp_path / "one")
    assert again == cfg
    export.export(tmp_path / "two", again, params, vocab_size=VOCAB)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_same_from_an_export(name, folder, tmp_path):
    """Its own config.json and ours give the same model."""
    cfg, _, params = read(folder(name))
    export.export(tmp_path / "out", cfg, params, vocab_size=VOCAB)
    back = auto(CONFIGS[name][0]).from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    if name not in ("mistral without window", "xlm-roberta"):  # which are a Llama and a RoBERTa
        assert type(back) is type(theirs(name))
    tokens = np.arange(60, dtype=np.int32)[None] % VOCAB
    positions = np.arange(60, dtype=np.int32)[None] + (cfg.max_len - 60 if name != "dynamic" else 0)
    ones = np.ones_like(tokens)
    for model in (back, theirs(name)):
        model.eval()
    same = [logits_there(model, tokens, ones, positions) for model in (back, theirs(name))]
    np.testing.assert_array_equal(*same)


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_that_are_absent_or_null_mean_what_transformers_takes(name, folder):
    config = json.loads((folder(name) / "config.json").read_text())
    family, make = hf.FAMILIES[config["model_type"]], type(theirs(name).config)
    required = family.keys.keys() - family.defaults.keys()

    def outcome(given: dict[str, Any]) -> Any:
        try:
            return hf.families.model_of(family, given, Path("c"))
        except CheckpointError as error:
            return str(error)

    for key in sorted(config.keys() - required - {"model_type", "architectures", "dtype", "transformers_version"}):
        less = {other: value for other, value in config.items() if other != key}
        assert outcome(less) == outcome(make.from_dict(less).to_dict()), key
        try:
            whole = make.from_dict(less | {key: None}).to_dict()
        except Exception:
            continue
        assert outcome(less | {key: None}) == outcome(whole), f"{key}: null"


def test_verify_reads_the_text_with_the_tokenizer_of_a_hub_cache(tmp_path, capsys):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    published.folder("byte_bpe", snapshot)
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": 420})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(snapshot)
    tool_modules.call("hf", "verify", tmp_path / "models--a--b", "--positions=32")
    said = capsys.readouterr().out
    assert "real text" in said and "no tokenizer" not in said


@pytest.mark.parametrize(
    ("name", "stack"), [("llama", "decoder"), ("bert", "encoder"), ("roberta", "encoder"), ("t5", "decoder")]
)
def test_verify_says_equal_or_names_the_layer(name, stack, folder, capsys, monkeypatch):
    tool_modules.call("hf", "verify", folder(name), "--positions=64")
    assert "equal: logits within 1e-05" in capsys.readouterr().out

    def spoil(opened: Any, abstract: Any) -> Any:
        flat = param_paths.flatten(whole(opened, abstract))
        down = f"params/{stack}/layers/mlp/down/kernel"
        return param_paths.unflatten(flat | {down: flat[down].at[1].multiply(1.01)})

    whole = hf.load
    monkeypatch.setattr(hf, "load", spoil)
    with pytest.raises(SystemExit, match="computes something else here"):
        tool_modules.call("hf", "verify", folder(name), "--positions=64")
    lines = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "after layer" in line]
    assert float(lines[0]) < 1e-5 < float(lines[1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_files_of_16_bits_are_read_as_they_are(dtype, folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder("qwen2"), dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path / dtype)
    _, _, params = read(tmp_path / dtype)
    want = model.state_dict()["model.layers.1.mlp.down_proj.weight"].float().numpy().T
    np.testing.assert_array_equal(params["decoder"]["layers"]["mlp"]["down"]["kernel"][1], want)


def test_a_model_in_shards_and_one_without_its_head_are_read(folder, tmp_path):
    theirs("qwen2").save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    theirs("qwen2").model.save_pretrained(tmp_path / "base")
    whole = param_paths.flatten(read(folder("qwen2"))[2])
    for name in ("shards", "base"):
        flat = param_paths.flatten(read(tmp_path / name)[2])
        assert flat.keys() == whole.keys() and all(np.array_equal(flat[path], whole[path]) for path in flat)


# BERT ----------------------------------------------------------------------------------------------------------------


def bert(auto: Any, **values: Any) -> Any:
    """A tiny model of transformers, BERT or RoBERTa, with all parameters moved."""
    torch.manual_seed(0)
    sizes = BERT if auto.__name__.startswith("Bert") else ROBERTA
    model = auto(auto.config_class(**sizes, **values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def sentences(types: int = 2) -> dict[str, np.ndarray]:
    """Rows of two sentences, of so many types; padded on the left, on the right, and not at all."""
    tokens = np.random.default_rng(3).integers(0, VOCAB, (3, 24)).astype(np.int32)
    mask = np.ones_like(tokens)
    mask[0, :7], mask[1, -5:] = 0, 0
    positions = np.maximum(np.cumsum(mask, axis=1, dtype=np.int32) - 1, 0)
    types_L = np.repeat([[0, types - 1]], [14, 10], axis=1).astype(np.int32)
    return {"tokens": tokens, "segment_ids": mask, "positions": positions, "type_ids": np.repeat(types_L, 3, axis=0)}


def bert_there(model: Any, batch: dict[str, np.ndarray]) -> Any:
    given = batch | {"positions": there_positions(model, batch["positions"])}
    tokens, mask, positions, types = (torch.from_numpy(given[key]).long() for key in sentences())
    with torch.no_grad():
        return model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            token_type_ids=types,
            output_hidden_states=True,
        )


def params_here(opened: hf.Published, model: Any) -> Any:
    """The parameters of `model` from the files; in files of pre-training, the classifier is that of next sentences."""
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
    classifier = "next_sentence" if "next_sentence/bias" in opened.table else "head/classifier"
    flat = param_paths.flatten(shapes)
    wanted = {path.replace("head/classifier", classifier): leaf for path, leaf in flat.items()}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), wanted)
    read = param_paths.flatten(hf.load(opened, {"params": param_paths.unflatten(abstract)})["params"])
    return param_paths.unflatten(
        {path.replace("next_sentence", "head/classifier"): leaf for path, leaf in read.items()}
    )


@pytest.mark.parametrize(
    ("auto", "head", "pool"),
    [
        (transformers.BertForMaskedLM, None, "first"),
        (transformers.BertForSequenceClassification, Head("pooled", 3), "first"),
        (transformers.BertForTokenClassification, Head("token", 3), "first"),
        (transformers.BertForPreTraining, Head("pooled", 2, keeps_unembed=True), "first"),
        (transformers.RobertaForMaskedLM, None, "first"),
        (transformers.RobertaForSequenceClassification, Head("pooled", 3), "first"),
        (transformers.RobertaForTokenClassification, Head("token", 3), "first"),
    ],
)
def test_bert_and_its_heads_are_those_of_transformers_and_exported_as_they_were(auto, head, pool, tmp_path):
    theirs = bert(auto, num_labels=3) if head and head.size == 3 else bert(auto)
    theirs.save_pretrained(tmp_path / "there")
    opened = hf.open_model(tmp_path / "there")
    batch = sentences(opened.model.sentence_types)
    cfg = dataclasses.replace(opened.model, pool=pool)
    model = transformer.text_model(cfg, jnp.float32, head)
    params = params_here(opened, model)
    whole = batch | {"segment_ids": np.ones_like(batch["tokens"])}
    for given in (batch, whole):
        if head and head.kind == "pooled" and given is batch:  # [CLS] is the first position
            given = {key: value[1:] for key, value in batch.items()}
        mine, want = jax.jit(model.apply)(params, given), bert_there(theirs, given)
        real = given["segment_ids"] > 0
        hidden = want.hidden_states[-1].numpy()[real]
        assert np.abs(np.asarray(mine.hidden_BxLxD)[real] - hidden).max() <= 1e-5 * np.abs(hidden).max()
        if head is None or head.keeps_unembed:
            logits = losses.logits(mine.pre_logits_BxLxD, mine.unembed_DxV, vocab_size=VOCAB)
            want_logits = getattr(want, "prediction_logits", None) if head else want.logits
            assert_equal(np.asarray(logits)[real], want_logits.numpy()[real])
        if head:
            their_head = (want.seq_relationship_logits if head.keeps_unembed else want.logits).numpy()
            where = real if head.kind == "token" else slice(None)
            assert_equal(np.asarray(mine.head)[where], their_head[where])

    more = {"id2label": {i: f"LABEL_{i}" for i in range(3)}} if head and head.size == 3 else {}
    export.export(tmp_path / "out", cfg, params, vocab_size=VOCAB, head=head, about=more)
    first, there = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "there")
    there = {key: value for key, value in there.items() if key not in opened.family.repeats}
    assert {key: value.tobytes() for key, value in first.items()} == {key: v.tobytes() for key, v in there.items()}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [auto.__name__]
    back, kept = auto.from_pretrained(tmp_path / "out").eval(), auto.from_pretrained(tmp_path / "there").eval()
    for one, two in zip(bert_there(back, whole).to_tuple(), bert_there(kept, whole).to_tuple(), strict=True):
        np.testing.assert_array_equal(*(x[-1].numpy() if isinstance(x, tuple) else x.numpy() for x in (one, two)))
    again = hf.open_model(tmp_path / "out")
    assert again.model == opened.model
    export.export(tmp_path / "two", cfg, params_here(again, model), vocab_size=VOCAB, head=head, about=more)
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_an_encoder_for_sentences_has_the_embeddings_of_mean_pooling(tmp_path, capsys):
    """As all-MiniLM: tensors without a prefix, a pooler that is not used, nothing that predicts ids."""
    theirs = bert(transformers.BertModel)
    theirs.save_pretrained(tmp_path / "there")
    opened, batch = hf.open_model(tmp_path / "there"), sentences()
    cfg = dataclasses.replace(opened.model, pool="mean")
    model = transformer.text_model(cfg, jnp.float32, Head("projection", 4))
    kept = {path: path for path in opened.table if path.startswith(("embed", "encoder"))}
    assert opened.table.keys() - kept.keys() == {"head/pooler/kernel", "head/pooler/bias"}
    fresh = jax.jit(model.init)(jax.random.key(0))
    flat = param_paths.flatten(fresh)
    abstract = {path: jax.ShapeDtypeStruct(flat[path].shape, np.float32, sharding=flat[path].sharding) for path in kept}
    read = hf.load(opened, {"params": param_paths.unflatten(abstract)})["params"]
    params = param_paths.unflatten(flat | param_paths.flatten(read))
    outputs = sentence_embeddings.embedding_outputs(model.apply, Config(model=cfg), None)
    hidden, mask = bert_there(theirs, batch).last_hidden_state.numpy(), batch["segment_ids"][..., None]
    want = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
    mine = np.asarray(outputs(params, batch)["embedding"])
    assert np.abs(mine - want).max() <= 1e-5 * np.abs(want).max()
    export.export(
        tmp_path / "out",
        cfg,
        {name: params[name] for name in ("embed", "encoder")},
        vocab_size=VOCAB,
        head=Head("projection", 4),
    )
    back = transformers.BertModel.from_pretrained(tmp_path / "out").eval()
    np.testing.assert_array_equal(bert_there(back, batch).last_hidden_state.numpy(), hidden)
    tool_modules.call("hf", "verify", tmp_path / "there", "--positions=64")
    assert "equal: hidden states within" in capsys.readouterr().out
