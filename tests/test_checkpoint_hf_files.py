"""Folders of published models that are damaged, forged or of another shape; runs that start from one."""

import dataclasses
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="needs the extra hf: pip install -e '.[hf]'")

from safetensors.numpy import load_file, save_file

from configs import chat_lora
from lm import checkpoint, param_paths, train
from lm import run as run_lib
from lm.checkpoint import CheckpointError, hf
from lm.checkpoint.hf import export
from lm.config import Duration, ModelConfig
from lm.config.schema import ConfigError
from lm.data import tokenizer
from lm.models import transformer
from lm.parallel import mesh as mesh_lib
from lm.tasks import build_config
from lm.types import Head
from tests import published as published_tokenizers
from tests import tool_modules, toys

MODEL = dataclasses.replace(toys.PLAIN_LLAMA, num_layers=3, vocab_size=300, max_len=64)
BERT = dataclasses.replace(toys.BERT, vocab_size=210, max_len=64, norm_eps=1e-12)
T5 = dataclasses.replace(toys.PUBLISHED_T5, decoder_layers=1, vocab_size=280, max_len=64)
T5_V1_1 = dataclasses.replace(T5, mlp="geglu", tie_embeddings=False, scale_logits=False, head_dim=8)
ROBERTA = dataclasses.replace(BERT, unused_positions=2, sentence_types=1)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """(a folder of a Llama in two shards, its parameters by path)."""
    cfg = transformer.resolve(MODEL, vocab_size=300, seq_len=64)
    params, folder = toys.random_params(cfg), tmp_path_factory.mktemp("hf") / "tiny-llama"
    export.export(folder, cfg, params, vocab_size=300, shard_bytes=40_000)
    return folder, param_paths.flatten(params)


@pytest.fixture
def copy(published, tmp_path) -> Path:
    return shutil.copytree(published[0], tmp_path / "copy")


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        hf.open_model(folder)
    return str(error.value)


def shard(folder: Path, holds: str) -> Path:
    """The file that holds a tensor."""
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][holds]


def change(folder: Path, name: str, **values: Any) -> None:
    """Sets keys of a JSON file; None removes one."""
    content = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


def test_truncated_file_is_refused_by_name(copy):
    file = shard(copy, EMBEDDING)
    file.write_bytes(file.read_bytes()[:-10])
    assert re.search(rf"{file.name} is no safetensors file, or damaged: .*; download it again", refusal(copy))
    file.write_bytes(b"")
    assert file.name in refusal(copy)


def test_every_bit_of_a_header_matters(copy):
    """A header with a flipped bit is refused, or says the same: no tensor is read from another place or as another."""
    file = shard(copy, NORM)
    whole = file.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    names = sorted(load_file(file))
    said = {name: load_file(file)[name].tobytes() for name in names}
    rng = np.random.default_rng(0)
    for bit in rng.choice(8 * (8 + size), 150, replace=False):
        bytes_ = bytearray(whole)
        bytes_[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bytes_)
        try:
            opened = hf.open_model(copy)
        except CheckpointError as error:
            assert str(copy) in str(error)
            continue
        for name in names:  # the flip was in the metadata, or in white space
            shape = opened.tensors.shapes[name]
            assert opened.tensors.read(name, tuple(slice(0, n) for n in shape)).tobytes() == said[name]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({NORM: {"dtype": "F32", "shape": [16], "data_offsets": [0, 1 << 40]}}, "damaged"),
        ({NORM: {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 64]}}, "damaged"),
        ({NORM: {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}}, "damaged"),
        ({NORM: {"dtype": "PICKLE", "shape": [16], "data_offsets": [0, 64]}}, "damaged"),
        ([], "damaged"),
    ],
)
def test_forged_header_is_refused(header, message, copy):
    text = json.dumps(header).encode()
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    assert message in refusal(copy) and "model.safetensors" in refusal(copy)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "https://x/y.safetensors"])
def test_index_that_names_no_file_of_the_folder_is_refused(name, copy):
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    index["weight_map"][NORM] = name
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"names the file {name!r}; expected" in refusal(copy)


def test_link_out_of_the_folder_is_refused_and_a_hub_cache_is_read(copy, published, tmp_path):
    file = shard(copy, NORM)
    file.unlink()
    file.symlink_to(shard(published[0], NORM))
    assert "is a link to" in refusal(copy) and file.name in refusal(copy)

    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "123").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("123")
    for each in published[0].iterdir():
        shutil.copy(each, cache / "blobs" / each.name)
        (cache / "snapshots" / "123" / each.name).symlink_to(Path("../../blobs") / each.name)
    assert hf.open_model(cache).path == cache / "snapshots" / "123"


def test_index_and_file_that_disagree_are_refused(copy):
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    other = next(name for name in set(index["weight_map"].values()) if name != index["weight_map"][NORM])
    index["weight_map"][NORM] = other
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"tensor '{NORM}' is in the file but not in the index" in refusal(copy) or "not in the file" in refusal(copy)
    (copy / other).unlink()
    assert "which model.safetensors.index.json lists" in refusal(copy)


def rewrite(folder: Path, change: Any) -> None:
    """One file with all tensors after `change`."""
    tensors = {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}
    for file in folder.glob("model*"):
        file.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_wrong_tensors_are_refused_by_name(copy):
    rewrite(copy, lambda tensors: tensors.update({"model.layers.3.mlp.up_proj.weight": np.zeros((24, 16), np.float32)}))
    assert re.search(r"model\.safetensors, tensor 'model\.layers\.3\..*' is no tensor of a llama", refusal(copy))
    rewrite(copy, lambda tensors: tensors.pop("model.layers.3.mlp.up_proj.weight"))
    hf.open_model(copy)
    rewrite(copy, lambda tensors: tensors.update({NORM: np.zeros(17, np.float32)}))
    assert f"tensor '{NORM}' has shape [17]; the sizes in config.json need [16]" in refusal(copy)
    rewrite(copy, lambda tensors: tensors.update({NORM: np.zeros(16, np.int32)}))
    with pytest.raises(CheckpointError, match=rf"tensor '{NORM}' is I32; expected F32, F16 or BF16"):
        params_of(copy)


def test_a_parameter_that_lacks_some_layers_is_refused_by_name(copy):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(copy, lambda tensors: tensors.pop(name))
    assert f"no tensor '{name}', which a llama of 3 layers has" in refusal(copy)


def test_more_layers_than_the_files_have_are_refused_however_many(copy):
    for count in (4, 10**15):
        change(copy, "config.json", num_hidden_layers=count)
        assert "no tensor 'model.layers.3." in refusal(copy) or "config.json" in refusal(copy)


@pytest.mark.parametrize("rows", [300, 301])
def test_a_head_that_is_not_the_embedding_to_which_it_is_tied_is_refused(rows, copy, monkeypatch):
    monkeypatch.setattr(hf.published, "_ROWS", 64)
    change(copy, "config.json", tie_word_embeddings=True)
    rewrite(copy, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING]}))
    assert hf.open_model(copy).model.tie_embeddings

    def spoil(tensors: Any) -> None:
        head = np.resize(tensors[EMBEDDING], (rows, 16)).copy()
        head[299, 15] += rows == 300
        tensors["lm_head.weight"] = head

    rewrite(copy, spoil)
    assert re.search(
        rf"tensor 'lm_head.weight' differs from '{EMBEDDING}'.*tie_word_embeddings to false", refusal(copy)
    )


FAMILIES = {"llama": MODEL, "gpt2": dataclasses.replace(toys.GPT2, vocab_size=300, max_len=64)}
FAMILIES |= {"bert": BERT, "roberta": ROBERTA, "t5": T5}


@pytest.mark.parametrize(
    ("family", "name", "may_differ"),
    [
        *(("llama", "lm_head.weight", True), ("gpt2", "lm_head.weight", True), ("t5", "lm_head.weight", False)),
        *(("t5", "encoder.embed_tokens.weight", False), ("bert", "cls.predictions.decoder.weight", False)),
        ("roberta", "lm_head.decoder.bias", False),
    ],
)
def test_what_is_advised_for_a_tensor_that_differs_from_its_twin_helps(family, name, may_differ, tmp_path):
    model = dataclasses.replace(FAMILIES[family], tie_embeddings=True)
    cfg = transformer.resolve(model, vocab_size=model.vocab_size, seq_len=64)
    export.export(tmp_path, cfg, toys.random_params(cfg), vocab_size=cfg.vocab_size)
    own, path = hf.open_model(tmp_path), hf.families.FAMILIES[family].repeats[name]
    first = own.table[path].name
    rewrite(tmp_path, lambda tensors: tensors.update({name: 1 + tensors[first]}))
    refused = refusal(tmp_path)
    assert f"tensor '{name}' differs from '{first}'" in refused
    if may_differ:
        assert refused.endswith("set its tie_word_embeddings to false")
        change(tmp_path, "config.json", tie_word_embeddings=False)
        assert not hf.open_model(tmp_path).model.tie_embeddings
    else:
        assert refused.endswith("download the files of one model again")
        rewrite(tmp_path, lambda tensors: tensors.update({name: tensors[first]}))
        assert hf.open_model(tmp_path).model == own.model


def test_two_sets_of_weights_are_refused(copy):
    save_file({NORM: np.zeros(16, np.float32)}, copy / "model.safetensors")
    assert "has both model.safetensors and model.safetensors.index.json, which does not list it" in refusal(copy)


def test_a_factor_of_1_in_a_file_is_read(copy):
    for kind in ("linear", "dynamic", "yarn"):
        change(copy, "config.json", rope_parameters={"rope_type": kind, "factor": 1.0})
        scaling = hf.open_model(copy).model.rope_scaling
        assert (scaling.kind, scaling.factor) == (kind, 1.0)


def test_keys_of_rope_count_inside_and_outside_of_its_parameters(copy):
    change(copy, "config.json", rope_theta=5e5, rope_parameters={"rope_type": "default"})
    assert hf.open_model(copy).model.rope_theta == 5e5
    change(copy, "config.json", partial_rotary_factor=0.5)
    assert "partial_rotary_factor is 0.5" in refusal(copy)


def test_the_rope_of_gemma3_is_given_for_both_kinds_of_layers():
    sizes = {"num_hidden_layers": 6, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
    config = {"model_type": "gemma3_text", "vocab_size": 300, "rope_parameters": {"rope_theta": 5e5}} | sizes
    with pytest.raises(CheckpointError, match="rope_parameters has rope_theta; expected sliding_attention and full_"):
        hf.families.model_of(hf.FAMILIES["gemma3_text"], config, Path("config.json"))


def params_of(folder: Path) -> Any:
    opened = hf.open_model(folder)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        f"params/{path}": jax.ShapeDtypeStruct(opened.shapes[path], np.float32, sharding=where) for path in opened.table
    }
    return hf.load(opened, param_paths.unflatten(wanted))["params"]


def test_only_pickled_weights_are_refused_and_beside_safetensors_not_read(copy):
    (copy / "pytorch_model.bin").write_bytes(b"no pickle at all")
    hf.open_model(copy)
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    assert "found pytorch_model.bin, which are not read: loading them may execute code" in refusal(copy)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; there are gpt2, llama"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; of this family 'silu' is supported"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": None}, "no num_hidden_layers"),
        ({"num_hidden_layers": "3"}, "'model.num_layers' must be int, got str"),
        ({"num_hidden_layers": -3}, "num_hidden_layers is -3; expected at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"hidden_size": 10**12}, "need"),
        ({"num_key_value_heads": 3}, "must be a multiple of 'model.num_kv_heads'"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2}}, "rope_type 'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2, "beta": 1}}, "llama3 with beta"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "rope_parameters differ by layer"),
        ({"rope_parameters": [1]}, "cannot be read as a llama"),
    ],
)
def test_config_that_asks_for_something_else_is_refused(values, message, copy):
    change(copy, "config.json", **values)
    assert message in refusal(copy) and "config.json" in refusal(copy)


def test_config_that_is_no_json_is_refused(copy):
    (copy / "config.json").write_text("[" * 100_000)
    assert "config.json is no JSON" in refusal(copy)
    (copy / "config.json").unlink()
    assert "config.json" in refusal(copy)
    assert "no folder" in refusal(copy / "absent")


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A tokenizer of 296 ids, fewer than the model has rows."""
    folder = tmp_path_factory.mktemp("words")
    texts = [path.read_text() for path in toys.write_texts(folder / "texts").iterdir()]
    tokenizer.train(texts, 296, 10**6).save(folder / "tokenizer.model")
    return folder / "tokenizer.model"


def recipe(folder: Path, words: Path, tmp_path: Path, **changes: Any) -> Any:
    """A run from a published model, whose `model` section is untouched."""
    cfg = toys.recipe(toys.write_texts(tmp_path / "texts"), init_from=f"hf:{folder}", tokenizer__path=str(words))
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(ModelConfig(), **changes),
        train=dataclasses.replace(cfg.train, total=Duration(steps=2)),
        checkpoint=dataclasses.replace(cfg.checkpoint, every=Duration(steps=1)),
    )
    return cfg


def test_run_takes_the_shape_and_the_parameters_and_resumes_without_the_folder(published, words, tmp_path, capsys):
    folder, _ = published
    copy = shutil.copytree(folder, tmp_path / "copy")
    cfg = recipe(copy, words, tmp_path)
    train.train(cfg, tmp_path / "run")
    said = capsys.readouterr().out
    assert "num_layers=3" in said and "vocab_size=300" in said and "position='rope'" in said
    assert "parameters read" in said and "hf:copy" in said
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert (saved["num_layers"], saved["embed_dim"], saved["vocab_size"]) == (3, 16, 300)

    shutil.rmtree(copy)
    forget_the_last_step(tmp_path / "run", 2, 1)
    train.train(cfg, tmp_path / "run")
    assert f"resuming from {tmp_path}/run/checkpoints/1\n" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"'init_from' is hf:.*no folder"):
        train.train(cfg, tmp_path / "other")


def forget_the_last_step(run: Path, last: int, kept: int) -> None:
    """A run's folder as if it had been killed between two checkpoints."""
    shutil.rmtree(run / "checkpoints" / str(last))
    assert checkpoint.choose(str(run)).step == kept
    for name in ("summary.json", "report.html"):
        (run / name).unlink()


@pytest.mark.slow
def test_lora_on_a_folder_with_its_own_tokenizer_trains_resumes_answers_and_is_exported(tmp_path, capsys):
    """As configs/chat_lora.py does it; resumed after the folder is gone."""
    cfg = transformer.resolve(dataclasses.replace(MODEL, vocab_size=420), vocab_size=420, seq_len=64)
    folder = tmp_path / "tiny-chat"
    base = toys.random_params(cfg)
    export.export(folder, cfg, jax.tree.map(lambda leaf: 0.1 * leaf, base), vocab_size=420)
    published_tokenizers.folder("byte_bpe", folder)
    c = chat_lora.get_config(str(folder))
    c.data.path, c.data.rename, c.data.seq_len = str(toys.write_chats(tmp_path / "chats.jsonl")), (), 64
    c.data.batch_size, c.train.total_steps, c.optim.warmup_steps = 8, 4, 1
    c.checkpoint.every_steps, c.eval.every_steps = 2, 4
    c.generate.prompts, c.generate.max_new_tokens = ("What is 1 and 1?",), 4
    cfg, run = build_config(c), tmp_path / "run"
    train.train(cfg, run)
    _, _, whole, words = run_lib.load_model(str(run))
    assert words.hash == tokenizer.load(folder).hash and words.vocab_size < 420

    capsys.readouterr()
    shutil.rmtree(folder)
    forget_the_last_step(run, 4, 2)
    train.train(cfg, run)
    assert f"resuming from {run}/checkpoints/2\n" in capsys.readouterr().out
    flat = param_paths.flatten(run_lib.load_model(str(run))[2])
    trained = [path for path in flat if "/lora_b" in path]
    assert len(trained) == 7 and all(np.any(flat[path]) for path in trained)
    for path, leaf in param_paths.flatten(whole).items():
        np.testing.assert_array_equal(flat[path], leaf, err_msg=path)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples[-1]["step"] == 4

    tool_modules.call("chat", f"--workdir={run}", "--prompt=What is 2 and 2?", "--max_new_tokens=4")
    tool_modules.call("merge_adapters", "merge", run, tmp_path / "merged")
    for name in ("run", "merged"):
        tool_modules.call("hf", "export", tmp_path / name, tmp_path / f"{name}-out")
    out = [params_of(tmp_path / f"{name}-out") for name in ("run", "merged")]
    for path, leaf in param_paths.flatten(out[0]).items():
        np.testing.assert_allclose(param_paths.flatten(out[1])[path], leaf, rtol=1e-6, err_msg=path)
    assert out[0]["embed"]["embedding"].shape == (420, 16), "rows that no id uses are kept"


def test_first_state_is_the_published_one(published, words, tmp_path):
    _, _, params = run_lib.init_model(recipe(published[0], words, tmp_path))
    flat = param_paths.flatten(params)
    assert flat.keys() == published[1].keys()
    for path, leaf in flat.items():
        np.testing.assert_array_equal(leaf, published[1][path], err_msg=path)


def test_keys_that_contradict_the_folder_are_all_named(published, words, tmp_path):
    with pytest.raises(ConfigError) as error:
        run_lib.plan(recipe(published[0], words, tmp_path, num_layers=2, norm_eps=1e-3), None)
    text = str(error.value)
    assert "model.num_layers: 2 here, 3 there" in text and "model.norm_eps: 0.001 here, 1e-05 there" in text
    run_lib.plan(recipe(published[0], words, tmp_path, num_layers=3, dropout=0.3, remat="full"), None)


def test_rows_of_vocabulary_beyond_the_files_are_the_mean_of_theirs(published, words, tmp_path):
    planned, _, params = run_lib.init_model(recipe(published[0], words, tmp_path, vocab_size=384))
    table, head = np.asarray(params["embed"]["embedding"]), np.asarray(params["lm_head"]["kernel"])
    old = published[1]["embed/embedding"]
    np.testing.assert_array_equal(table[:300], old)
    np.testing.assert_allclose(table[300:], np.tile(old.mean(axis=0), (84, 1)), atol=1e-6)
    np.testing.assert_array_equal(head[:, :300], published[1]["lm_head/kernel"])
    assert planned.words == ({"embed/embedding": 0, "lm_head/kernel": 1}, 300, 384)


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_adds_rows(published, tmp_path):
    texts = [path.read_text() for path in toys.write_texts(tmp_path / "t").iterdir()]
    big = tokenizer.train([*texts, "".join(map(chr, range(300, 400)))], 420, 10**6)
    big.save(tmp_path / "big.model")
    planned, _, params = run_lib.init_model(recipe(published[0], tmp_path / "big.model", tmp_path))
    assert planned.cfg.model.vocab_size == 420
    assert (np.ptp(np.asarray(params["embed"]["embedding"])[300:], axis=0) == 0).all()


def test_folder_without_a_tensor_needs_a_rule(copy, words, tmp_path):
    rewrite(copy, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ConfigError, match=r"no parameter 'lm_head/kernel'.*add the rule"):
        run_lib.plan(recipe(copy, words, tmp_path), None)
    rules = (("lm_head/.*", "reinit"), (".*", "keep"))
    planned = run_lib.plan(dataclasses.replace(recipe(copy, words, tmp_path), init_rules=rules), None)
    assert planned.origin_of["lm_head/kernel"] is None


def test_replay_needs_the_data_of_a_run(published, words, tmp_path):
    cfg = recipe(published[0], words, tmp_path)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, replay=0.1))
    with pytest.raises(ConfigError, match=r"'data.replay' draws from a run's data, but hf:.* is a published model"):
        run_lib.plan(cfg, None)


def test_each_device_reads_its_own_slices(published, monkeypatch):
    """fsdp=8: the same parameters; no read is larger than a device's part of a tensor."""
    opened = hf.open_model(published[0])
    mesh = mesh_lib.make_mesh(dataclasses.replace(run_lib.MeshConfig(), fsdp=8))
    axes = param_paths.flatten(transformer.text_model(opened.model, np.float32).logical_axes())
    from lm.parallel import sharding

    wanted, sizes = {}, []
    for path, shape in opened.shapes.items():
        where = jax.NamedSharding(mesh, sharding.spec(axes[path]))
        wanted[f"params/{path}"] = jax.ShapeDtypeStruct(shape, np.float32, sharding=where)

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        values = opened.tensors.read(name, index)
        sizes.append((name, values.size))
        return values

    spied = dataclasses.replace(opened, tensors=dataclasses.replace(opened.tensors, read=read))
    params = param_paths.flatten(hf.load(spied, param_paths.unflatten(wanted))["params"])
    for path, leaf in params.items():
        np.testing.assert_array_equal(leaf, published[1][path], err_msg=path)
    kernels = [size for name, size in sizes if name.endswith("up_proj.weight")]
    assert set(kernels) == {24 * 16 // 8}


# The command ---------------------------------------------------------------------------------------------------------


def test_import_then_export_gives_the_same_tensors(published, words, tmp_path, monkeypatch):
    folder, params = published
    tool_modules.call("hf", "import", folder, tmp_path / "run", f"--tokenizer={words}")
    cfg, _, read, _ = run_lib.load_model(str(tmp_path / "run"))
    assert cfg.model.num_layers == 3 and checkpoint.choose(str(tmp_path / "run")).step == 0
    for path, leaf in param_paths.flatten(read).items():
        np.testing.assert_array_equal(leaf, params[path])
    tool_modules.call("hf", "export", tmp_path / "run", tmp_path / "out")
    mine = {name: each for file in (tmp_path / "out").glob("*.safetensors") for name, each in load_file(file).items()}
    there = {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}
    assert mine.keys() == there.keys() and all(mine[name].tobytes() == there[name].tobytes() for name in there)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["bos_token_id"] == 1 and config["eos_token_id"] == 2
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2] and "repetition_penalty" not in generation
    saved, (cfg, *others) = run_lib.load_checkpoint(str(tmp_path / "run"))
    changes = {"min_new_tokens": 3, "repetition_penalty": 1.2, "stop": ("a",), "temperature": 0.0}
    cfg = dataclasses.replace(cfg, generate=dataclasses.replace(cfg.generate, **changes))
    monkeypatch.setattr(run_lib, "load_checkpoint", lambda _: (saved, (cfg, *others)))
    tool_modules.call("hf", "export", tmp_path / "run", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    sampled = ("do_sample", "temperature", "top_p", "top_k")
    kept = {name: value for name, value in generation.items() if name not in sampled}
    assert again == kept | {"min_new_tokens": 3, "repetition_penalty": 1.2, "stop_strings": ["a"]}


@pytest.mark.slow
def test_export_keeps_a_published_vocabulary_also_by_way_of_other_runs(words, tmp_path):
    """Also where it has as many rows as a run of its own would round its tokenizer's ids to."""
    big = transformer.resolve(dataclasses.replace(MODEL, vocab_size=384), vocab_size=384, seq_len=64)
    export.export(tmp_path / "hf", big, toys.random_params(big), vocab_size=384)
    tool_modules.call("hf", "import", tmp_path / "hf", tmp_path / "a", f"--tokenizer={words}")
    cfg = dataclasses.replace(recipe(Path(), words, tmp_path), model=big, init_from=str(tmp_path / "a"))
    train.train(cfg, tmp_path / "b")
    forget_the_last_step(tmp_path / "b", 2, 1)
    train.train(cfg, tmp_path / "b")
    for name in ("a", "b"):
        tool_modules.call("hf", "export", tmp_path / name, tmp_path / f"{name}-out")
        assert hf.open_model(tmp_path / f"{name}-out").model.vocab_size == 384
    new = dataclasses.replace(cfg, init_rules=((".*", "reinit"),))
    assert run_lib.plan(new, None).published_vocab == 0


@pytest.mark.parametrize(("asked", "rows"), [(0, 384), pytest.param(512, 512, marks=pytest.mark.slow)])
def test_export_of_an_own_run_cuts_the_rows_that_no_id_uses(asked, rows, tmp_path):
    llama = dict(position="rope", norm="rmsnorm", mlp="swiglu", use_bias=False, max_len=32, vocab_size=asked)
    changes = {f"model__{key}": value for key, value in llama.items()}
    cfg = toys.recipe(toys.write_texts(tmp_path / "texts"), train__total_steps=1, optim__warmup_steps=0, **changes)
    train.train(cfg, tmp_path / "run")
    tool_modules.call("hf", "export", tmp_path / "run", tmp_path / "out", "--dtype=bfloat16")
    opened = hf.open_model(tmp_path / "out")
    assert opened.model.vocab_size == 300 and opened.family.model_type == "llama" and opened.model.tie_embeddings
    tables = run_lib.load_model(str(tmp_path / "run"))[2]["embed"]["embedding"]
    assert tables.shape[0] == rows
    got = params_of(tmp_path / "out")["embed"]["embedding"]
    np.testing.assert_array_equal(got, np.asarray(tables[:300].astype("bfloat16").astype("float32")))


def test_a_run_with_a_head_is_not_exported(tmp_path):
    cfg = transformer.resolve(MODEL, vocab_size=300, seq_len=64)
    params = toys.random_params(cfg) | {"head": {"kernel": np.zeros((16, 2), np.float32)}}
    del params["lm_head"]
    with pytest.raises(CheckpointError, match=r"'head/kernel'.*with this head, or with bottleneck adapters, cannot"):
        export.export(tmp_path / "out", cfg, params, vocab_size=300)
    with pytest.raises(ConfigError, match=r"files of a llama have no place for this task's head \(pooled\)"):
        export.export(tmp_path / "out", cfg, params, vocab_size=300, head=Head("pooled", 2))
    del params["head"]
    with pytest.raises(CheckpointError, match="no parameter 'lm_head/kernel', which a llama has"):
        export.export(tmp_path / "out", cfg, params, vocab_size=300)


def test_an_export_that_was_cut_short_has_no_config(tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    cfg = transformer.resolve(MODEL, vocab_size=300, seq_len=64)
    for name, written in (("safetensors.numpy.save_file", []), ("pathlib.Path.write_bytes", ["model.safetensors"])):
        out = tmp_path / name
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
            patch.setattr(name, full)
            export.export(out, cfg, toys.random_params(cfg), vocab_size=300, others={"tokenizer.json": b"{}"})
        assert [file.name for file in out.iterdir()] == written
        assert f"no {out}/config.json" in refusal(out)


def test_a_plan_needs_the_published_model_that_a_run_starts_from(published, words, tmp_path):
    plan = tool_modules.load("plan")
    with pytest.raises(CheckpointError, match=r"'init_from' is hf:.*no folder"):
        plan.without_missing_start(recipe(tmp_path / "absent", words, tmp_path))
    cfg = recipe(published[0], words, tmp_path)
    assert plan.without_missing_start(cfg) == cfg
    assert plan.without_missing_start(dataclasses.replace(cfg, init_from=str(tmp_path / "absent"))).init_from == ""


def test_model_of_no_family_is_not_exported(tmp_path):
    cfg = transformer.resolve(dataclasses.replace(MODEL, logit_softcap=3.0), vocab_size=300, seq_len=64)
    with pytest.raises(ConfigError, match=r"no published family's shape:(.|\n)*llama: model.logit_softcap is 3.0"):
        export.export(tmp_path / "out", cfg, toys.random_params(cfg), vocab_size=300)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "kind", "of_classifier", "architecture"),
    [
        (BERT, "word_piece", ("bert.pooler.dense", "classifier"), "BertForSequenceClassification"),
        (ROBERTA, "roberta", ("classifier.dense", "classifier.out_proj"), "RobertaForSequenceClassification"),
    ],
    ids=["bert", "roberta"],
)
def test_a_bert_is_trained_further_then_classifies_and_both_are_exported(
    model, kind, of_classifier, architecture, tmp_path
):
    rows = 210 if kind == "word_piece" else 420
    cfg = transformer.resolve(dataclasses.replace(model, vocab_size=rows), vocab_size=rows, seq_len=64)
    export.export(tmp_path / "bert", cfg, toys.random_params(cfg), vocab_size=rows)
    published_tokenizers.folder(kind, tmp_path / "bert")
    texts = toys.write_texts(tmp_path / "texts")
    first = toys.recipe(texts, task__name="masked_lm", init_from=f"hf:{tmp_path / 'bert'}", train__total_steps=2)
    first = dataclasses.replace(first, model=ModelConfig(init="bert"))
    train.train(first, tmp_path / "a")
    tool_modules.call("hf", "export", tmp_path / "a", tmp_path / "a-out")
    before, after = (
        param_paths.flatten(params_of(tmp_path / "bert")),
        param_paths.flatten(params_of(tmp_path / "a-out")),
    )
    assert before.keys() == after.keys() and hf.open_model(tmp_path / "a-out").model.vocab_size == rows
    if kind == "roberta":  # whose rows of the unused positions are not
        for each in (before, after):
            each["embed/position_embedding"] = each["embed/position_embedding"][2:]
    assert all(np.any(before[path] != after[path]) for path in before), "every parameter is trained"

    rows = [{"text": path.read_text(), "label": ("odd", "even")[i % 2]} for i, path in enumerate(texts.iterdir())]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rules = (("head/.*", "reinit"), (".*", "keep"))
    options = {
        "task__name": "classification",
        "task__labels": ("odd", "even"),
        "data__format": "jsonl",
        "data__packing": "pad",
    }
    second = toys.recipe(texts, **options, init_from=f"hf:{tmp_path / 'a-out'}", init_rules=rules, train__total_steps=1)
    data = dataclasses.replace(second.data, path=str(tmp_path / "rows.jsonl"))
    second = dataclasses.replace(second, data=data, model=ModelConfig(init="bert"))
    train.train(second, tmp_path / "b")
    tool_modules.call("hf", "export", tmp_path / "b", tmp_path / "b-out")
    config = json.loads((tmp_path / "b-out" / "config.json").read_text())
    assert config["architectures"] == [architecture]
    assert config["id2label"] == {"0": "odd", "1": "even"}
    there = load_file(tmp_path / "b-out" / "model.safetensors")
    pooler, classifier = of_classifier
    assert there[f"{classifier}.weight"].shape == (2, 16) and f"{pooler}.bias" in there
    assert not any(name.startswith(("cls.", "lm_head.")) for name in there)

    again = dataclasses.replace(second, init_from=f"hf:{tmp_path / 'b-out'}", init_rules=((".*", "keep"),))
    planned, _, params = run_lib.init_model(again)
    assert not planned.unused
    np.testing.assert_array_equal(params["head"]["classifier"]["kernel"].T, there[f"{classifier}.weight"])


def test_the_classifier_of_next_sentences_is_read_by_a_rule_only(tmp_path):
    """A task of two classes does not take it for its own."""
    cfg = transformer.resolve(BERT, vocab_size=210, seq_len=64)
    shapes = {"pooler": {"kernel": (16, 16), "bias": (16,)}, "classifier": {"kernel": (16, 2), "bias": (2,)}}
    heads = {name: {key: np.ones(shape, np.float32) for key, shape in each.items()} for name, each in shapes.items()}
    params = toys.random_params(cfg) | {"head": heads}
    export.export(tmp_path / "bert", cfg, params, vocab_size=210, head=Head("pooled", 2, keeps_unembed=True))
    published_tokenizers.folder("wordpiece", tmp_path / "bert")

    def plan(task: str, rules: Any = ((".*", "keep"),), **options: Any) -> Any:
        made = toys.recipe(tmp_path, task__name=task, init_rules=rules, data__packing="pad", **options)
        made = dataclasses.replace(made, init_from=f"hf:{tmp_path / 'bert'}", model=ModelConfig())
        return run_lib.plan(made, None)

    with pytest.raises(ConfigError, match="no parameter 'head/classifier/bias' for"):
        plan("classification", task__labels=("a", "b"))
    rules = (("head/classifier/(.*)", r"next_sentence/\1"), (".*", "keep"))
    planned = plan("masked_lm_pairs", rules)
    assert planned.origin_of["head/classifier/kernel"] == "params/next_sentence/kernel" and not planned.unused


def test_a_sentence_encoder_is_imported_and_exported_without_what_predicts_ids(tmp_path, capsys):
    cfg = transformer.resolve(BERT, vocab_size=210, seq_len=64)
    params = toys.random_params(cfg)
    encoder = {name: params[name] for name in ("embed", "encoder")}
    export.export(tmp_path / "bert", cfg, encoder, vocab_size=210, head=Head("projection", 8))
    published_tokenizers.folder("wordpiece", tmp_path / "bert")
    tool_modules.call("hf", "import", tmp_path / "bert", tmp_path / "run", "--task=contrastive_pairs", "--pool=mean")
    assert "initialised (4): head/hidden/bias" in capsys.readouterr().out
    assert run_lib.load_model(str(tmp_path / "run"))[0].model.pool == "mean"
    tool_modules.call("hf", "export", tmp_path / "run", tmp_path / "out")
    assert "the projection head, which is for training only, is left out" in capsys.readouterr().out
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("bert", "out"))
    assert {name: x.tobytes() for name, x in first.items()} == {name: x.tobytes() for name, x in second.items()}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["BertModel"]


def test_a_head_that_the_files_of_no_family_have_is_refused(tmp_path):
    cfg = transformer.resolve(BERT, vocab_size=210, seq_len=64)
    cfg = dataclasses.replace(cfg, pool="mean")
    with pytest.raises(ConfigError, match="files of a bert have no place for this task's head"):
        export.export(tmp_path / "out", cfg, toys.random_params(cfg), vocab_size=210, head=Head("pooled", 2))
    assert not (tmp_path / "out").exists()


# config.json of other families and other years -----------------------------------------------------------------------

LLAMA_CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 99,
    "max_position_embeddings": 8192,
}
GEMMA_CONFIG = LLAMA_CONFIG | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 7,
    "head_dim": 16,
    "sliding_window": 7,
    "query_pre_attn_scalar": 256,
    "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
}


def model_of(config: dict[str, Any]) -> ModelConfig:
    return hf.families.model_of(hf.FAMILIES[config["model_type"]], config, Path("config.json"))


def test_llama_has_no_windows_and_mistral_has_them_in_all_layers():
    """As in transformers, whatever `layer_types` says."""
    types = {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]}
    for name, window in (("llama", 0), ("mistral", 5)):
        model = model_of(LLAMA_CONFIG | {"model_type": name} | types)
        assert (model.sliding_window, model.global_every) == (window, 0)
    assert "sliding_window" in hf.families.not_read(hf.FAMILIES["llama"], LLAMA_CONFIG | types)


def test_the_config_of_rope_is_read_as_transformers_4_and_5_write_it():
    """Version 4 has rope_theta and rope_scaling at the top, and no layer_types."""
    factors = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling = {"rope_type": "llama3", "original_max_position_embeddings": 1024, **factors}
    new = model_of(LLAMA_CONFIG | {"rope_parameters": {"rope_theta": 5e5, **scaling}})
    assert (new.rope_theta, new.rope_scaling.kind, new.rope_scaling.factor) == (5e5, "llama3", 8.0)
    assert model_of(LLAMA_CONFIG | {"rope_theta": 5e5, "rope_scaling": scaling}) == new

    kinds = {"full_attention": 1e6, "sliding_attention": 2e4}
    ropes = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in kinds.items()}
    gemma = model_of(GEMMA_CONFIG | {"rope_parameters": ropes})
    assert (gemma.rope_theta, gemma.rope_local_theta, gemma.sliding_window, gemma.global_every) == (1e6, 2e4, 7, 6)
    older = GEMMA_CONFIG | {"rope_theta": 1e6, "rope_local_base_freq": 2e4}
    del older["layer_types"]
    assert model_of(older) == gemma


def test_older_names_and_repeated_tensors_of_bert_are_read(tmp_path):
    cfg = transformer.resolve(BERT, vocab_size=210, seq_len=64)
    export.export(tmp_path, cfg, toys.random_params(cfg), vocab_size=210)
    wanted, file = params_of(tmp_path), tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["bert.embeddings.position_ids"] = np.arange(64)[None]
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    assert older.keys() != tensors.keys()
    save_file(older, file)
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path), wanted)
    older["cls.predictions.decoder.bias"] = 1 + older["cls.predictions.bias"]
    save_file(older, file)
    assert "'cls.predictions.decoder.bias' differs from 'cls.predictions.bias'" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("tie_word_embeddings", False), ("hidden_act", "relu"), ("is_decoder", True)],
)
def test_a_bert_that_computes_something_else_is_refused(key, value, tmp_path):
    cfg = transformer.resolve(BERT, vocab_size=210, seq_len=64)
    export.export(tmp_path, cfg, toys.random_params(cfg), vocab_size=210)
    change(tmp_path, "config.json", **{key: value})
    assert f"{key} is {value!r}" in refusal(tmp_path)


@pytest.mark.parametrize("types", [1, 2, 3])
def test_a_bert_has_as_many_sentence_types_as_its_files(types, tmp_path):
    round_trip(dataclasses.replace(BERT, sentence_types=types), tmp_path, 210)
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert (config["model_type"], config["type_vocab_size"]) == ("bert", types)
    change(tmp_path / "one", "config.json", type_vocab_size=types + 1)
    assert f"has shape [{types}, 16]; the sizes in config.json need [{types + 1}, 16]" in refusal(tmp_path / "one")


# RoBERTa -------------------------------------------------------------------------------------------------------------


def round_trip(model: ModelConfig, folder: Path, vocab_size: int) -> Any:
    """(model, parameters) of a random model's export, whose second export has the same bytes."""
    cfg = transformer.resolve(model, vocab_size=vocab_size, seq_len=64)
    written = toys.random_params(cfg)
    export.export(folder / "one", cfg, written, vocab_size=vocab_size)
    opened, params = hf.open_model(folder / "one"), params_of(folder / "one")
    assert not hf.families.differences(opened.model, cfg)
    jax.tree.map(np.testing.assert_array_equal, params, written)
    export.export(folder / "two", opened.model, params, vocab_size=vocab_size)
    for file in (folder / "one").iterdir():
        assert file.read_bytes() == (folder / "two" / file.name).read_bytes(), file.name
    return opened.model, params


@pytest.mark.parametrize("unused", [1, 2, 6])
def test_a_roberta_reads_positions_from_the_row_after_that_of_its_padding(unused, tmp_path):
    """It is a BERT without the rows before that, and with the same embedding for both sentences."""
    model, params = round_trip(dataclasses.replace(ROBERTA, unused_positions=unused), tmp_path, 210)
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["model_type"] == "roberta" and config["max_position_embeddings"] == 64 + unused
    assert config["pad_token_id"] == unused - 1 and config["type_vocab_size"] == 1
    plain = dataclasses.replace(model, unused_positions=0, sentence_types=2)
    embed = params["embed"] | {"position_embedding": params["embed"]["position_embedding"][unused:]}
    embed["type_embedding"] = np.repeat(params["embed"]["type_embedding"], 2, axis=0)
    rng, ones = np.random.default_rng(0), np.ones((2, 64), np.int32)
    batch = {"tokens": rng.integers(0, 210, (2, 64)), "positions": np.tile(np.arange(64), (2, 1)), "segment_ids": ones}
    batch["type_ids"] = rng.integers(0, 2, (2, 64))
    mine, want = (
        transformer.text_model(cfg, np.float32).apply(each, batch).hidden_BxLxD
        for cfg, each in ((model, params), (plain, params | {"embed": embed}))
    )
    assert np.isfinite(mine).all()
    np.testing.assert_array_equal(mine, want)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pad_token_id", 65, "pad_token_id is 65; expected 0 to 64, as positions begin at the row after it"),
        ("pad_token_id", -1, "pad_token_id is -1; expected 0 to 64"),
        ("hidden_act", "gelu_new", "hidden_act is 'gelu_new'"),
        ("tie_word_embeddings", False, "tie_word_embeddings is False"),
        (
            "type_vocab_size",
            2,
            "token_type_embeddings.weight' has shape [1, 16]; the sizes in config.json need [2, 16]",
        ),
    ],
)
def test_a_roberta_that_computes_something_else_is_refused(key, value, message, tmp_path):
    cfg = transformer.resolve(ROBERTA, vocab_size=210, seq_len=64)
    export.export(tmp_path, cfg, toys.random_params(cfg), vocab_size=210)
    change(tmp_path, "config.json", **{key: value})
    assert message in refusal(tmp_path)


def test_a_roberta_with_the_padding_of_another_tokenizer_is_not_exported(tmp_path):
    cfg = transformer.resolve(ROBERTA, vocab_size=210, seq_len=64)
    params = toys.random_params(cfg)
    with pytest.raises(ConfigError, match=r"pad_token_id of this run is 0, .*a roberta that computes the same has 1"):
        export.export(tmp_path / "out", cfg, params, vocab_size=210, about={"pad_token_id": 0, "bos_token_id": 0})
    assert not (tmp_path / "out").exists()
    export.export(tmp_path / "out", cfg, params, vocab_size=210, about={"pad_token_id": 1, "bos_token_id": 0})


def test_a_run_whose_tokenizer_pads_with_another_id_than_a_roberta_is_refused_before_it_trains(tmp_path):
    folder = published_tokenizers.folder("roberta", tmp_path)
    cfg = transformer.resolve(dataclasses.replace(ROBERTA, vocab_size=400), vocab_size=400, seq_len=64)
    export.export(folder, cfg, toys.random_params(cfg), vocab_size=400)
    change(folder, "tokenizer_config.json", pad_token="<s>")
    start = toys.recipe(tmp_path / "texts", task__name="masked_lm", data__packing="concat", init_from=f"hf:{folder}")
    start = dataclasses.replace(start, model=ModelConfig(kind="encoder"))
    with pytest.raises(ConfigError, match=r"row after pad_token_id, 1, but the tokenizer pads with id 0, '<s>'"):
        run_lib.plan(start, None)
    change(folder, "tokenizer_config.json", pad_token="<pad>")
    assert run_lib.plan(start, None).tokenizer.pad_id == 1


def test_the_classifiers_of_a_roberta_are_read_and_its_pooler_by_nobody(tmp_path):
    cfg = transformer.resolve(ROBERTA, vocab_size=210, seq_len=64)
    encoder = {name: each for name, each in toys.random_params(cfg).items() if not name.startswith("lm_")}
    pooled = {"pooler": {"kernel": (16, 16), "bias": (16,)}, "classifier": {"kernel": (16, 3), "bias": (3,)}}
    random = {
        name: toys.random_like({key: np.zeros(shape, np.float32) for key, shape in each.items()})
        for name, each in pooled.items()
    }
    for name, head in (("pooled", random), ("token", {"classifier": random["classifier"]})):
        folder = tmp_path / name
        export.export(folder, cfg, encoder | {"head": head}, vocab_size=210, head=Head(name, 3))
        wanted, got = (param_paths.flatten(each) for each in (encoder | {"head": head}, params_of(folder)))
        assert wanted.keys() <= got.keys()
        for path, value in wanted.items():
            np.testing.assert_array_equal(got[path], value, err_msg=path)
    rewrite(
        tmp_path / "token",
        lambda tensors: tensors.update(
            {
                "roberta.pooler.dense.weight": np.ones((16, 16), np.float32),
                "roberta.pooler.dense.bias": np.ones(16, np.float32),
            }
        ),
    )
    assert {"unused_pooler/kernel", "unused_pooler/bias"} <= hf.open_model(tmp_path / "token").table.keys()
    assert "head/pooler/kernel" not in hf.open_model(tmp_path / "token").table
    with pytest.raises(ConfigError, match="files of a roberta have no place for this task's head"):
        head = Head("pooled", 2, keeps_unembed=True)  # of next sentences
        export.export(tmp_path / "out", cfg, encoder, vocab_size=210, head=head)


def exported_with_tokenizer(kind: str, tmp_path: Path) -> tuple[Path, Any]:
    """(export of a RoBERTa that was imported, with a tokenizer whose class no file names; the tokenizer)."""
    folder = published_tokenizers.folder(kind, tmp_path / "in")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    tok = tokenizer.load(folder)
    model = dataclasses.replace(ROBERTA, unused_positions=tok.pad_id + 1, vocab_size=tok.vocab_size)
    cfg = transformer.resolve(model, vocab_size=tok.vocab_size, seq_len=64)
    export.export(folder, cfg, toys.random_params(cfg), vocab_size=tok.vocab_size)
    tool_modules.call("hf", "import", folder, tmp_path / "run", "--task=masked_lm")
    tool_modules.call("hf", "export", tmp_path / "run", tmp_path / "out")
    return tmp_path / "out", tok


@pytest.mark.parametrize(("kind", "is_named"), [("xlm_roberta", True), ("roberta", False), ("word_piece", True)])
def test_an_export_names_the_class_of_a_tokenizer_that_another_class_would_misread(kind, is_named, tmp_path):
    out, tok = exported_with_tokenizer(kind, tmp_path)
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "in" / "tokenizer.json").read_bytes()
    said = json.loads((out / "tokenizer_config.json").read_text())
    assert said.pop("model_max_length") == 512 and bool(said) == is_named
    if is_named:
        assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
        own = {"cls_token": tok.bos_id, "sep_token": tok.eos_id, "pad_token": tok.pad_id, "mask_token": tok.mask_id}
        assert {role: said[role] for role in own} == {role: tok.piece(i) for role, i in own.items()}


def test_an_older_bpe_that_does_not_name_its_kind_keeps_the_class_of_its_family():
    content = json.dumps({"model": {"vocab": {"a": 0}, "merges": []}}).encode()
    files = {"t/tokenizer.json": content, "t/tokenizer_config.json": b'{"model_max_length": 1024}'}
    made = export.tokenizer_files(SimpleNamespace(saved_files=files), "gpt2")
    assert made == {"tokenizer.json": content, "tokenizer_config.json": b'{"model_max_length": 1024}'}


@pytest.mark.parametrize("kind", ["xlm_roberta", "roberta"])
def test_transformers_reads_the_ids_of_a_run_from_its_export(kind, tmp_path):
    """An XLM-RoBERTa is exported as a RoBERTa, whose class reads byte-level BPE, and its own tokenizer is Unigram."""
    transformers = pytest.importorskip("transformers")
    out, tok = exported_with_tokenizer(kind, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    for text in (published_tokenizers.PROSE[-1], "The cat  sat, naïve or not"):
        assert theirs.encode(text) == [tok.bos_id, *tok.encode(text), tok.eos_id]
    pair = [tok.bos_id, *tok.encode("The cat"), *tok.separator_ids, *tok.encode("sat"), tok.eos_id]
    assert theirs("The cat", "sat")["input_ids"] == pair
    assert (theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id) == (tok.bos_id, tok.eos_id, tok.mask_id)


# T5 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (T5, {"feed_forward_proj": "relu", "tie_word_embeddings": True, "num_decoder_layers": 1, "d_kv": 4}),
        (T5_V1_1, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_kv": 8}),
        (dataclasses.replace(T5, decoder_layers=0, mlp="gelu_exact"), {"num_decoder_layers": 2, "num_layers": 2}),
        (dataclasses.replace(T5_V1_1, decoder_layers=3, mlp="swiglu"), {"num_decoder_layers": 3, "num_layers": 2}),
    ],
)
def test_a_t5_comes_out_as_it_went_in(model, config, tmp_path):
    round_trip(model, tmp_path, 280)
    said = json.loads((tmp_path / "one" / "config.json").read_text())
    assert said["architectures"] == ["T5ForConditionalGeneration"] and said["is_encoder_decoder"] is True
    assert {key: said[key] for key in config} == config
    names = load_file(tmp_path / "one" / "model.safetensors").keys()
    assert ("lm_head.weight" in names) == (not model.tie_embeddings)
    of_bias = [name for name in names if "relative_attention_bias" in name]
    assert sorted(of_bias) == [
        f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for stack in ("decoder", "encoder")
    ]


def test_the_logits_of_a_tied_t5_are_divided_by_the_root_of_its_width():
    """And its queries are not."""
    cfg, model, params = toys.decoder(T5, 16)
    _, plain, _ = toys.decoder(dataclasses.replace(T5, scale_logits=False, query_scale=0.0), 16)
    batch = toys.batch(2, 16)
    batch |= {f"input_{name}": batch[name] for name in ("segment_ids", "positions")} | {"inputs": batch["tokens"]}
    for stack, branches in (("encoder", ("attention",)), ("decoder", ("attention", "cross_attention"))):
        for branch in branches:
            params[stack]["layers"][branch]["query"]["kernel"] *= 0.5  # = 1 / sqrt(head_dim): exact
    mine = model.apply(params, batch)
    for stack, branches in (("encoder", ("attention",)), ("decoder", ("attention", "cross_attention"))):
        for branch in branches:
            params[stack]["layers"][branch]["query"]["kernel"] *= 2
    want = plain.apply(params, batch)
    np.testing.assert_array_equal(mine.hidden_BxLxD, want.hidden_BxLxD)
    np.testing.assert_array_equal(mine.unembed_DxV, want.unembed_DxV / 4)
    assert cfg.embed_dim == 16 and cfg.head_dim == 4


def test_the_head_of_a_t5_is_scaled_as_files_of_transformers_4_and_5_say(tmp_path):
    """Version 5 writes tie_word_embeddings=true for every T5, and scale_decoder_outputs."""
    for name, model in (("t5", T5), ("v1_1", T5_V1_1)):
        folder, cfg = tmp_path / name, transformer.resolve(model, vocab_size=280, seq_len=64)
        export.export(folder, cfg, toys.random_params(cfg), vocab_size=280)
        older = hf.open_model(folder).model
        assert (older.scale_logits, older.tie_embeddings) == (model.scale_logits, model.tie_embeddings)
        change(folder, "config.json", tie_word_embeddings=True, scale_decoder_outputs=model.scale_logits)
        assert hf.open_model(folder).model == older
    change(tmp_path / "v1_1", "config.json", scale_decoder_outputs=True)
    assert "tensor 'lm_head.weight' differs from 'shared.weight'" in refusal(tmp_path / "v1_1")


def test_tensors_that_files_of_t5_repeat_or_never_used_are_read(tmp_path):
    cfg = transformer.resolve(T5, vocab_size=280, seq_len=64)
    export.export(tmp_path, cfg, toys.random_params(cfg), vocab_size=280)
    wanted, tensors = params_of(tmp_path), load_file(tmp_path / "model.safetensors")
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    more = {f"{stack}.embed_tokens.weight": tensors["shared.weight"] for stack in ("encoder", "decoder")}
    more |= {"lm_head.weight": tensors["shared.weight"], unused: np.ones((32, 4), np.float32)}
    save_file(tensors | more, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path), wanted)
    save_file(tensors | {"decoder.embed_tokens.weight": 1 + tensors["shared.weight"]}, tmp_path / "model.safetensors")
    assert "'decoder.embed_tokens.weight' differs from 'shared.weight'" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"relative_attention_num_buckets": 64}, "relative_attention_num_buckets is 64; of this family 32"),
        ({"relative_attention_max_distance": 64}, "relative_attention_max_distance is 64; of this family 128"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder is False"),
        ({"feed_forward_proj": "gated-relu"}, "feed_forward_proj is 'gated-relu'"),
        ({"feed_forward_proj": "a-relu"}, "feed_forward_proj is 'a-relu'"),
        ({"feed_forward_proj": "tanh"}, "feed_forward_proj is 'tanh'"),
        ({"dense_act_fn": "silu"}, "dense_act_fn 'silu'"),
        ({"feed_forward_proj": "gated-gelu"}, "no tensor of a t5"),
        ({"num_decoder_layers": 0}, "num_decoder_layers is 0; expected at least 1"),
        ({"num_decoder_layers": 2}, "no tensor 'decoder.block.1."),
        ({"d_kv": 5}, "the sizes in config.json need [20, 16]"),
    ],
)
def test_a_t5_that_computes_something_else_is_refused(values, message, tmp_path):
    cfg = transformer.resolve(T5, vocab_size=280, seq_len=64)
    export.export(tmp_path, cfg, toys.random_params(cfg), vocab_size=280)
    change(tmp_path, "config.json", **values)
    assert message in refusal(tmp_path)


def test_a_t5_whose_tied_head_is_not_scaled_is_not_exported(tmp_path):
    cfg = transformer.resolve(dataclasses.replace(T5, scale_logits=False), vocab_size=280, seq_len=64)
    with pytest.raises(ConfigError, match=r"t5: model.tie_embeddings is True, expected False"):
        export.export(tmp_path / "out", cfg, toys.random_params(cfg), vocab_size=280)


@pytest.fixture(scope="module")
def published_t5(tmp_path_factory) -> Path:
    """A T5 with more rows than its tokenizer has ids, as the published ones."""
    folder, cfg = tmp_path_factory.mktemp("hf") / "t5", transformer.resolve(T5, vocab_size=280, seq_len=64)
    export.export(folder, cfg, toys.random_params(cfg, scale=0.2), vocab_size=280)
    change(folder, "config.json", decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    return published_tokenizers.folder("t5", folder)


def test_a_t5_is_imported_and_exported_as_it_was_with_the_start_of_its_decoder(published_t5, tmp_path, capsys):
    with pytest.raises(
        SystemExit, match=r"t5 has model.kind=encoder_decoder; --task is causal_lm, expected .*span_corruption"
    ):
        tool_modules.call("hf", "import", published_t5, tmp_path / "run")
    tool_modules.call("hf", "import", published_t5, tmp_path / "run", "--task=translation")
    tool_modules.call("hf", "export", tmp_path / "run", tmp_path / "out")
    assert "280 of 280 rows" in capsys.readouterr().out
    first, second = (load_file(folder / "model.safetensors") for folder in (published_t5, tmp_path / "out"))
    assert {name: x.tobytes() for name, x in first.items()} == {name: x.tobytes() for name, x in second.items()}
    for name in ("config.json", "generation_config.json"):
        said = json.loads((tmp_path / "out" / name).read_text())
        assert (said["decoder_start_token_id"], said["pad_token_id"]) == (0, 0)
    assert 'pipeline_tag: "text2text-generation"' in (tmp_path / "out" / "README.md").read_text()


def test_a_decoder_that_starts_from_another_id_than_the_tokenizers_is_refused(published_t5, tmp_path):
    """As CodeT5, whose tokenizer has a [CLS] but whose decoder starts from the padding."""
    copy = shutil.copytree(published_t5, tmp_path / "copy")
    change(copy, "tokenizer_config.json", cls_token="</s>")
    cfg = toys.recipe(tmp_path / "texts", task__name="span_corruption", data__packing="concat", init_from=f"hf:{copy}")
    cfg = dataclasses.replace(cfg, model=ModelConfig(kind="encoder_decoder"))
    with pytest.raises(ConfigError, match=r"decoder_start_token_id is 0, but decoders here start from id 1, '</s>'"):
        run_lib.plan(cfg, None)
    change(copy, "tokenizer_config.json", cls_token="<pad>")
    assert run_lib.plan(cfg, None).tokenizer.bos_id == 0


@pytest.mark.parametrize(
    ("config", "generation", "start"),
    [
        ({"decoder_start_token_id": 0, "pad_token_id": 1}, {"decoder_start_token_id": 1}, 0),
        ({"decoder_start_token_id": None, "pad_token_id": 0}, {"decoder_start_token_id": 1}, 1),
        ({"decoder_start_token_id": None, "pad_token_id": 1}, {"bos_token_id": 0}, 1),
        ({"decoder_start_token_id": None, "pad_token_id": 1}, None, 1),
        ({"decoder_start_token_id": None, "pad_token_id": None}, None, 0),
    ],
)
def test_the_start_of_a_decoder_is_compared_wherever_the_files_say_it(
    config, generation, start, published_t5, tmp_path
):
    copy = shutil.copytree(published_t5, tmp_path / "copy")
    change(copy, "config.json", **config)
    if generation is not None:
        (copy / "generation_config.json").write_text(json.dumps(generation))
    opened = hf.open_model(copy)
    for role, i in (("<pad>", 0), ("</s>", 1)):
        change(copy, "tokenizer_config.json", cls_token=role)
        tok = tokenizer.load(copy)
        assert tok.bos_id == i
        if i == start:
            opened.check_tokenizer(tok)
            continue
        with pytest.raises(ConfigError, match=rf"_token_id is {start}, but decoders here start from id {i}, '{role}'"):
            opened.check_tokenizer(tok)


@pytest.mark.slow
def test_a_t5_is_trained_further_with_its_own_sentinels_and_exported(published_t5, tmp_path):
    texts = toys.write_texts(tmp_path / "texts")
    cfg = toys.recipe(
        texts,
        task__name="span_corruption",
        data__packing="concat",
        init_from=f"hf:{published_t5}",
        train__total_steps=2,
    )
    train.train(dataclasses.replace(cfg, model=ModelConfig(init="t5")), tmp_path / "run")
    saved, _, _, tok = run_lib.load_model(str(tmp_path / "run"))
    assert (saved.model.kind, saved.model.decoder_layers) == ("encoder_decoder", 1) and len(tok.sentinel_ids) == 100
    tool_modules.call("hf", "export", tmp_path / "run", tmp_path / "out")
    before, after = (param_paths.flatten(params_of(folder)) for folder in (published_t5, tmp_path / "out"))
    assert before.keys() == after.keys() and hf.open_model(tmp_path / "out").model.vocab_size == 280
    assert all(np.any(before[path] != after[path]) for path in before), "every parameter is trained"


LOADS = """
    import json, re, sys, threading, time
    from pathlib import Path
    import jax
    import jax.numpy as jnp
    from lm.checkpoint import hf
    from lm.config import Config, MeshConfig
    from lm.models import registry
    from lm.parallel import mesh as mesh_lib
    from lm.parallel import sharding

    published = hf.open_model(sys.argv[1])
    model = registry.MODELS[published.model.kind](Config(model=published.model), None, jnp.float32)
    mesh = mesh_lib.make_mesh(MeshConfig(fsdp=8))
    shapes = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
    place = lambda axes: jax.sharding.NamedSharding(mesh, sharding.spec(axes))
    where = jax.tree.map(place, model.logical_axes(), is_leaf=lambda x: isinstance(x, tuple))
    abstract = jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), shapes, where)

    def used():  # without the pages of mapped files, which the kernel takes back when it needs them
        return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    before, peak, is_loaded = used(), 0, False
    def watch():
        global peak
        while not is_loaded:
            peak = max(peak, used())
            time.sleep(0.001)
    watching = threading.Thread(target=watch)
    watching.start()
    params = jax.block_until_ready(hf.load(published, {"params": abstract}))
    is_loaded = True
    watching.join()
    leaves = jax.tree.leaves(params)
    assert any(leaf.addressable_shards[0].data.size * 8 == leaf.size for leaf in leaves)
    print(json.dumps({"more": peak - before, "own": sum(leaf.nbytes for leaf in leaves)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as Linux counts it")
def test_shards_are_read_onto_eight_devices_in_little_more_memory_than_their_own(tmp_path):
    """The sizes of a Llama of 1.1B, each a quarter of it, in four files."""
    sizes = {"embed_dim": 512, "num_heads": 8, "num_kv_heads": 1, "head_dim": 64, "mlp_dim": 1408}
    cfg = dataclasses.replace(MODEL, **sizes, num_layers=22, vocab_size=8000, tie_embeddings=False)
    cfg = transformer.resolve(cfg, vocab_size=8000, seq_len=64)
    export.export(tmp_path / "big", cfg, toys.random_params(cfg), vocab_size=8000, shard_bytes=72_000_000)
    shards = [file.stat().st_size for file in (tmp_path / "big").glob("*.safetensors")]
    assert len(shards) == 4
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(tool_modules.ROOT),
    }
    command = [sys.executable, "-c", textwrap.dedent(LOADS), str(tmp_path / "big")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["own"] == sum(shards) - sum(_header_bytes(file) for file in (tmp_path / "big").glob("*.safetensors"))
    assert found["own"] < found["more"] < found["own"] + 1.3 * max(shards)


def _header_bytes(file: Path) -> int:
    return 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]
