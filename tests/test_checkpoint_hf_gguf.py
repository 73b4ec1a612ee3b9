"""lm/checkpoint/hf/gguf.py: GGUF files give the parameters of the files that they were made from."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="needs the extra hf: pip install -e '.[hf]'")

from lm import param_paths  # noqa: E402
from lm.checkpoint import CheckpointError, hf  # noqa: E402
from lm.checkpoint.hf import export_adapter  # noqa: E402
from lm.checkpoint.hf import gguf as gguf_files  # noqa: E402
from lm.config import AdapterConfig, ModelConfig  # noqa: E402
from lm.models import transformer  # noqa: E402
from tests import toys  # noqa: E402
from tests.test_checkpoint_hf_files import params_of  # noqa: E402

SIZES = dict(embed_dim=256, num_heads=8, num_kv_heads=4, mlp_dim=256, vocab_size=64, max_len=128, rope_theta=5000.0)
CFG = transformer.resolve(dataclasses.replace(toys.PLAIN_LLAMA, **SIZES), vocab_size=64, seq_len=128)
TO_GGUF = {theirs: ours for ours, theirs in gguf_files._NAMES.items()}
LAYER_TO_GGUF = {theirs: ours for ours, theirs in gguf_files._LAYER_NAMES.items()}
Kind = gguf.GGMLQuantizationType


def interleave(kernel: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key kernel in the order of llama.cpp, as its converter has it."""
    return kernel.reshape(heads, 2, kernel.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(kernel.shape)


def write(
    path: Path,
    cfg: ModelConfig,
    kind: Any,
    arch: str = "llama",
    more: Mapping[str, Any] = {},
    tensors: Mapping[str, np.ndarray] = {},
) -> dict[str, np.ndarray]:
    """A file of random tensors, matrices quantised to `kind`; returns what they dequantise to, by parameter.

    `more`, `tensors`: further keys, without the name of the architecture, and further tensors.
    """
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(cfg.num_layers)
    writer.add_context_length(cfg.max_len)
    writer.add_embedding_length(cfg.embed_dim)
    writer.add_feed_forward_length(cfg.mlp_dim)
    writer.add_head_count(cfg.num_heads)
    if cfg.num_kv_heads != cfg.num_heads:
        writer.add_head_count_kv(cfg.num_kv_heads)
    for key, value in more.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{arch}.{key}", value)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_rope_freq_base(cfg.rope_theta)
    rng, expected = np.random.default_rng(0), {}
    shapes = jax.eval_shape(transformer.text_model(cfg, np.float32).init, jax.random.key(0))
    flat = param_paths.flatten(shapes)
    family = hf.FAMILIES[arch]
    for entry in family.tensors(cfg):
        shape = flat[entry.path].shape
        layers = range(shape[0]) if "{}" in entry.name else [None]
        values = []
        for layer in layers:
            own = shape if layer is None else shape[1:]
            stored = rng.normal(size=entry.file_shape(own)).astype(np.float32)
            is_head = arch == "llama" and entry.path.endswith(("query/kernel", "key/kernel"))
            heads = cfg.num_heads if "query" in entry.path else cfg.num_kv_heads
            as_file = interleave(stored, heads) if is_head else stored
            data, back, number = as_file, stored, Kind.F32
            if len(own) == 2 and kind != Kind.F32:
                data, number = gguf.quants.quantize(as_file, kind), kind
                back = gguf.quants.dequantize(data, kind)
                if is_head:  # quantised in blocks along a row, so that the order of rows does not matter
                    back = gguf.quants.dequantize(gguf.quants.quantize(stored, kind), kind)
            writer.add_tensor(name_of(entry.name, layer), data, raw_dtype=number)
            values.append(back.T if entry.transposed else back)
        expected[entry.path] = values[0] if layers == [None] else np.stack(values)
    for name, extra in tensors.items():
        writer.add_tensor(name, extra)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def name_of(name: str, layer: int | None) -> str:
    if layer is None:
        return TO_GGUF[name]
    kind, what = name.removeprefix("model.layers.{}.").rsplit(".", 1)
    return f"blk.{layer}.{LAYER_TO_GGUF[kind]}.{what}"


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_every_tensor_is_read_as_the_library_dequantises_it(kind, tmp_path):
    """Pairs of rope that lie side by side in the file lie half a head apart here."""
    expected = write(tmp_path / "a.gguf", CFG, Kind[kind])
    opened = hf.open_model(tmp_path / "a.gguf")
    assert dataclasses.replace(opened.model, norm_eps=CFG.norm_eps) == CFG
    assert np.float32(opened.model.norm_eps) == np.float32(CFG.norm_eps)
    got = param_paths.flatten(params_of(tmp_path / "a.gguf"))
    assert got.keys() == expected.keys()
    for path, leaf in got.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_as_many_key_heads_as_heads_need_no_key(tmp_path):
    expected = write(tmp_path / "a.gguf", dataclasses.replace(CFG, num_kv_heads=8), Kind.F32)
    assert hf.open_model(tmp_path / "a.gguf").model.num_kv_heads == 8
    for path, leaf in param_paths.flatten(params_of(tmp_path / "a.gguf")).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_lora_alone_belongs_to_the_file_that_it_was_trained_on(tmp_path):
    base = tmp_path / "a.gguf"
    params = write(base, CFG, Kind.Q8_0)
    rng = np.random.default_rng(0)
    query = "decoder/layers/attention/query"
    params |= {f"{query}/lora_a": rng.normal(size=(2, 256, 4)), f"{query}/lora_b": rng.normal(size=(2, 4, 256))}
    params = {path: jax.device_put(np.float32(leaf)) for path, leaf in params.items()}
    opened, lora = hf.open_model(base), AdapterConfig(kind="lora", rank=4, targets=".*query")
    export_adapter.export(tmp_path / "out", opened.model, param_paths.unflatten(params), lora, opened)
    back = hf.open_model(tmp_path / "out")
    assert back.base_path == base and back.adapter == dataclasses.replace(lora, targets=query)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {path: jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=where) for path, leaf in params.items()}
    got = param_paths.flatten(hf.load(back, {"params": param_paths.unflatten(like)})["params"])
    for path, leaf in params.items():
        np.testing.assert_array_equal(got[path], leaf, err_msg=path)


def test_keys_that_are_not_read_are_listed_with_the_name_of_the_file(tmp_path):
    known = {"rope.dimension_count": 32, "attention.value_length": 32, "vocab_size": 64}
    write(tmp_path / "a.gguf", CFG, Kind.F32, more=known | {"attention.sliding_window": 9})
    said = hf.open_model(tmp_path / "a.gguf").report()
    assert f"model.* from {tmp_path / 'a.gguf'}, a llama" in said
    assert said.endswith("keys of it that are not read: llama.attention.sliding_window")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rope.dimension_count": 16}, r"llama\.rope\.dimension_count is 16; a head has 32"),
        ({"rope.scaling.factor": 2.0}, r"llama\.rope\.scaling\.factor is 2\.0, which is not supported"),
        ({"rope.scale_linear": 2.0}, r"llama\.rope\.scale_linear is 2\.0"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 0.5},
            r"llama\.rope\.scaling\.attn_factor is 0\.5",
        ),
    ],
)
def test_a_rope_that_is_not_computed_is_refused_by_its_key(more, message, tmp_path):
    write(tmp_path / "a.gguf", CFG, Kind.F32, more=more)
    with pytest.raises(CheckpointError, match=rf"a\.gguf: {message}"):
        hf.open_model(tmp_path / "a.gguf")


def test_frequencies_of_its_own_are_refused(tmp_path):
    write(tmp_path / "a.gguf", CFG, Kind.F32, tensors={"rope_freqs.weight": np.full(16, 8, np.float32)})
    with pytest.raises(
        CheckpointError, match=r"rope_freqs\.weight.*is not read from GGUF; take the model's safetensors"
    ):
        hf.open_model(tmp_path / "a.gguf")


def test_tied_head_and_norms_and_biases_of_qwen(tmp_path):
    qwen2 = dataclasses.replace(CFG, qkv_bias=True, tie_embeddings=True)
    qwen3 = dataclasses.replace(CFG, qk_norm=True)
    for arch, cfg in (("qwen2", qwen2), ("qwen3", qwen3)):
        expected = write(tmp_path / f"{arch}.gguf", cfg, Kind.F32, arch)
        got = param_paths.flatten(params_of(tmp_path / f"{arch}.gguf"))
        assert got.keys() == expected.keys()
        for path, leaf in got.items():
            np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_slices_of_k_quants_are_those_of_the_whole(kind, tmp_path):
    """The library quantises to none of them: the blocks are random bytes, with scales that are numbers."""
    rng = np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    data = rng.integers(0, 60, (64, 256 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("token_embd.weight", data, raw_dtype=Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = gguf_files.open_file(tmp_path / "k.gguf")
    whole = gguf.quants.dequantize(data, Kind[kind])
    got = tensors.read("model.embed_tokens.weight", (slice(5, 9), slice(100, 130)))
    np.testing.assert_array_equal(got, whole[5:9, 100:130])


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path):
    write(tmp_path / "a.gguf", CFG, Kind.F32)
    whole = (tmp_path / "a.gguf").read_bytes()
    for name, content in {
        "cut": whole[:-100],
        "head": whole[:50],
        "empty": b"",
        "text": b"hello" * 100,
        "name": whole.replace(b"blk.1.attn_q.weight", b"blk.9.attn_q.weight"),
    }.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name}\.gguf"):
            hf.open_model(tmp_path / f"{name}.gguf")
    writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"mamba.gguf is a 'mamba'; of GGUF files llama, qwen2 and qwen3"):
        hf.open_model(tmp_path / "mamba.gguf")
