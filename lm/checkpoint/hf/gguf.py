"""GGUF files of Llama, Qwen2 and Qwen3, dequantised by the `gguf` library, as if they were files of `transformers`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lm.checkpoint.hf.files import Tensors
from lm.checkpoint.store import CheckpointError

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Key of config.json -> key of the file, after the name of the architecture.
_KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
}
_SCALING = {
    "rope_type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
}
_FREQUENCIES = "rope_freqs.weight"
# Keys that say what the tensors' shapes, or other keys, say.
_REPEATED = ("vocab_size", "rope.scaling.finetuned")


def open_file(path: Path) -> Tensors:
    """Opens a GGUF file. Its tensors have the names, shapes and layout of `transformers`, and are read as float32.

    Raises:
      CheckpointError: the file is damaged, of another architecture, or asks for a rope that is not supported.
    """
    try:
        import gguf
    except ImportError:
        raise CheckpointError("reading GGUF needs the extra hf: pip install -e '.[hf]'") from None
    if not path.is_file():
        raise CheckpointError(f"no file {path}: expected a .gguf file")
    try:
        reader = gguf.GGUFReader(path, "r")
        values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
    except Exception as error:  # the library raises all kinds for a damaged file
        raise CheckpointError(f"{path} is no GGUF file, or damaged: {error!r}; download it again") from None
    kind = values.get("general.architecture")
    if kind not in ("llama", "qwen2", "qwen3"):
        raise CheckpointError(f"{path} is a {kind!r}; of GGUF files llama, qwen2 and qwen3 are supported")
    found = {_name(tensor.name): tensor for tensor in reader.tensors}
    if _FREQUENCIES in found:
        raise CheckpointError(
            f"{path} has the tensor '{_FREQUENCIES}', which divides rope's frequencies (Llama 3.1) and is not read "
            "from GGUF; take the model's safetensors, whose config.json says how these numbers are made"
        )
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in found.items()}
    places = {name: f"{path}, tensor '{tensor.name}'" for name, tensor in found.items()}
    own = {key.removeprefix(f"{kind}."): value for key, value in values.items() if key.startswith(f"{kind}.")}
    about = _config(kind, own, shapes, path)
    heads = {"q_proj": about.get("num_attention_heads"), "k_proj": about.get("num_key_value_heads")}

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        tensor = found[name]
        rows: Any = index[0]
        count = heads.get(name.split(".")[-2]) if kind == "llama" else None
        if count:
            rows = _half_split(shapes[name][0], count)[rows]
        data = tensor.data[rows] if len(index) > 1 else tensor.data
        try:
            out = gguf.quants.dequantize(data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"{places[name]} cannot be read as {tensor.tensor_type.name}: {error}") from None
        part: np.ndarray = out[:, *index[1:]] if len(index) > 1 else out[index]
        return part

    return Tensors(path, about, path, shapes, places, read)


def _name(name: str) -> str:
    """The name of a tensor in `transformers`; one that is not known stays as it is."""
    block, _, rest = name.partition(".")
    if block != "blk" or rest.count(".") != 2:
        return _NAMES.get(name, name)
    layer, kind, what = rest.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{what}" if kind in _LAYER_NAMES else name


def _config(kind: str, own: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, Any]:
    """What config.json would say, and the file's keys that say something else.

    Args:
      kind: the architecture.
      own: the values of its keys, without its name before them.
      shapes: of the tensors.
      path: the file, for messages.
    """
    out: dict[str, Any] = {"model_type": kind, "tie_word_embeddings": "lm_head.weight" not in shapes}
    out |= {key: own[name] for key, name in _KEYS.items() if name in own}
    if isinstance(heads := out.get("num_attention_heads"), int) and heads > 0:
        out = {"num_key_value_heads": heads, "head_dim": out.get("hidden_size", 0) // heads} | out
    if own.get("rope.scaling.type", "none") != "none":
        out["rope_scaling"] = {key: own[name] for key, name in _SCALING.items() if name in own}
    known = {*_KEYS.values(), *_REPEATED, *(_SCALING.values() if "rope.scaling.type" in own else ())}
    for name in ("rope.dimension_count", "attention.value_length"):
        if name in own and own[name] != out.get("head_dim"):
            raise CheckpointError(f"{path}: {kind}.{name} is {own[name]}; a head has {out.get('head_dim')}")
        known.add(name)
    unread = {f"{kind}.{name}": value for name, value in own.items() if name not in known}
    for name, value in unread.items():
        if "rope.scal" in name:
            raise CheckpointError(f"{path}: {name} is {value}, which is not supported")
    if "model.embed_tokens.weight" in shapes:
        out["vocab_size"] = shapes["model.embed_tokens.weight"][0]
    return out | unread


def _half_split(rows: int, heads: int) -> np.ndarray:
    """Row of the file for each row of a query or key kernel, int [rows].

    GGUF files of Llama have the two entries of a rotated pair side by side, x0 y0 x1 y1 ..., and `transformers` the
    first entries of all pairs before the second ones, x0 x1 ... y0 y1 ....
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).ravel()
