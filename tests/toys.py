"""Small models, batches and runs that several tests use."""

import dataclasses
import functools
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from lm.config import Config, MeshConfig, ModelConfig
from lm.models import registry, transformer
from lm.parallel import mesh as mesh_lib
from lm.tasks import TASKS, build_config, default_config
from lm.tasks.language_modelling import predict_tokens
from lm.types import ModelFns, Params

VOCAB = 50  # rows of the embedding are 128: the rest is padding

GPT2 = ModelConfig(num_layers=2, embed_dim=16, num_heads=4, mlp_dim=24)
PLAIN_LLAMA = dataclasses.replace(
    GPT2, num_kv_heads=2, position="rope", norm="rmsnorm", mlp="swiglu", use_bias=False, tie_embeddings=False
)
LLAMA = dataclasses.replace(PLAIN_LLAMA, qk_norm=True, logit_softcap=30.0, attention_softcap=20.0, sliding_window=5)
STYLES = {"gpt2": GPT2, "llama": LLAMA}
MOE = dataclasses.replace(LLAMA, num_experts=4, experts_per_token=2, sliding_window=0)
T5 = dataclasses.replace(
    LLAMA, kind="encoder_decoder", position="relative", sliding_window=0, num_layers=2, decoder_layers=3
)
ENCODER_DECODERS = {
    "relative": T5,
    "rope": dataclasses.replace(T5, position="rope"),
    "learned": dataclasses.replace(GPT2, kind="encoder_decoder", decoder_layers=1),
}
BERT = dataclasses.replace(
    GPT2,
    kind="encoder",
    norm_position="post",
    embed_norm=True,
    lm_transform=True,
    mlp="gelu_exact",
)
# As published: T5 v1.0 (tied, scaled logits).
PUBLISHED_T5 = dataclasses.replace(
    GPT2, kind="encoder_decoder", position="relative", norm="rmsnorm", norm_eps=1e-6, mlp="relu", use_bias=False
)
PUBLISHED_T5 = dataclasses.replace(PUBLISHED_T5, decoder_layers=3, query_scale=1.0, scale_logits=True)
PREFIX = dataclasses.replace(LLAMA, kind="prefix_decoder", sliding_window=0)


@functools.cache
def decoder(cfg: ModelConfig, seq_len: int, seed: int = 0) -> tuple[ModelConfig, ModelFns, Params]:
    """A resolved config (of any kind of text model), its functions, and parameters whose zeros and ones are perturbed,
    so that each one matters."""
    cfg = transformer.resolve(cfg, vocab_size=VOCAB, seq_len=seq_len)
    model = registry.MODELS[cfg.kind](Config(model=cfg), None, jnp.float32)
    rng = np.random.default_rng(seed)
    params = jax.jit(model.init)(jax.random.key(seed))
    moved = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), params)
    return cfg, model, moved


def random_like(shapes: Any, seed: int = 0, scale: float = 1.0) -> Any:
    """Normal values for a tree of arrays or of their shapes, of the same dtypes: none that an initialiser makes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (scale * rng.normal(size=leaf.shape)).astype(leaf.dtype), shapes)


def random_params(cfg: ModelConfig, seed: int = 0, scale: float = 1.0) -> Params:
    """Parameters of a model without a head; `cfg`: resolved."""
    model = registry.MODELS[cfg.kind](Config(model=cfg), None, jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return random_like(shapes, seed, scale)


def batch(rows: int, seq_len: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Packed rows: two to four documents each, some padding, and very uneven loss weights; row 3 has none at all."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, seq_len)).astype(np.int32)
    segments = np.zeros((rows, seq_len), np.int32)
    positions = np.zeros((rows, seq_len), np.int32)
    for row in range(rows):
        end = seq_len - int(rng.integers(0, seq_len // 4))
        cuts = sorted(rng.choice(np.arange(1, end), size=int(rng.integers(1, 4)), replace=False))
        for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, end], strict=True), 1):
            segments[row, start:stop] = number
            positions[row, start:stop] = np.arange(stop - start)
    density = rng.random((rows, 1)) ** 2
    weights = ((rng.random((rows, seq_len)) < density) & (segments > 0)).astype(np.float32)
    weights[0, 0] = 1.0  # never empty as a whole
    if rows > 3:
        weights[3] = 0.0
    return {
        "tokens": tokens,
        "targets": rng.integers(0, VOCAB, (rows, seq_len)).astype(np.int32),
        "loss_weights": weights,
        "segment_ids": segments,
        "positions": positions,
        "example_index": np.arange(rows, dtype=np.int32),
    }


def write_texts(folder: Path, documents: int = 60) -> Path:
    """A folder of small made-up text files to train on."""
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "of", "the", "a", "run", "step", "loss", "is", "not", "model", "data"]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        text = " ".join(rng.choice(words, int(rng.integers(5, 60))))
        (folder / f"{number:03}.txt").write_text(text.capitalize() + ".\n")
    return folder


def write_chats(path: Path, rows: int = 40) -> Path:
    """A jsonl file of small made-up question and answer pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = [{"prompt": f"What is {n} and {n}?", "response": f"It is {2 * n}."} for n in range(rows)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def recipe(data: Path, **changes: Any) -> Config:
    """A run of a few seconds on a folder of text or a jsonl file; `changes` are keys with '__' for '.'."""
    is_chat = data.suffix == ".jsonl"
    c = default_config(changes.pop("task__name", "chat" if is_chat else "causal_lm"))
    c.tokenizer.vocab_size = 300
    c.data.format = "jsonl" if is_chat else "text"
    c.data.path = str(data)
    c.data.eval_fraction = 0.1
    c.data.seq_len, c.data.batch_size = 32, 16
    c.model.num_layers, c.model.embed_dim, c.model.num_heads, c.model.mlp_dim = 2, 16, 2, 32
    c.model.dropout = 0.1
    c.optim.warmup_steps = 1
    c.optim.ema_decay = 0.9
    c.train.total_steps = 12
    c.generate.max_new_tokens = 8
    c.monitor.log_every_steps = 1

    for key, value in changes.items():
        *sections, name = key.split("__")
        setattr(functools.reduce(lambda inner, section: inner[section], sections, c), name, value)
    return build_config(c)


def shrink(c: Any) -> None:
    """Makes a recipe's `ConfigDict` one of two steps of a small model on a little data; what it does stays the same.

    The number of layers stays too: rules name them.
    """
    # One length for most of them, so that they share what is compiled; pairs of sentences, and questions, need room.
    longer = {"masked_lm_pairs": 64, "chat": 128, "preferences": 128}
    m, seq_len = c.model, min(c.data.seq_len, longer.get(c.task.name, 32))
    m.embed_dim, m.num_heads, m.num_kv_heads, m.head_dim, m.mlp_dim = 32, 2, 0, 0, 48
    if "projection_dim" in c.task:
        c.task.projection_dim = 16
    m.decoder_dim = m.decoder_dim and 32
    m.unroll = 1
    if c.data.format != "interactions":  # whose ids are items
        c.tokenizer.vocab_size, c.tokenizer.train_bytes = 400, 50_000
    # Rows that are prepared are all read.
    c.data.max_records = 0 if c.data.format == "prepared" else 48
    c.data.eval_fraction, c.data.batch_size = 0.25, 8
    c.data.seq_len, c.data.target_len = seq_len, min(c.data.target_len, 32)
    c.eval.batch_size, c.eval.max_tokens = 0, 12 * seq_len  # the last batch is not full

    was_set = set()
    for section in c.values():
        if not hasattr(section, "keys"):
            continue
        for key, value in section.items():
            base, _, unit = key.rpartition("_")
            if unit in ("steps", "tokens", "examples", "epochs") and f"{base}_examples" in section:
                was_set |= {base} if value else set()
                section[key] = type(value)(0)
    c.train.total_steps = 2
    c.optim.warmup_steps = c.optim.decay_steps = int("decay" in was_set)
    c.eval.every_steps = int("every" in was_set and c.train.early_stopping.patience > 0)
    c.data.curriculum_steps = int("curriculum" in was_set)
    c.generate.prompts = c.generate.prompts[:1]
    c.generate.max_new_tokens = 4
    c.monitor.log_every_steps = 1


def task(name: str, **options: Any) -> Any:
    """The options of a task, for `Config.task`."""
    return TASKS[name].options(name=name, **options)


def token_loss(apply: Any, cfg: Config, words: Any) -> Any:
    """The cross-entropy of all tokens that have a weight, of any model and for any vocabulary."""
    return lambda params, batch, rng: predict_tokens(apply(params, batch, rng=rng), batch, cfg, words)


# Devices, processes and damage ----------------------------------------------------------------------------------------


def use_one_device(patch: pytest.MonkeyPatch) -> Mesh:
    """Makes later runs use the first device alone; its mesh."""
    mesh = mesh_lib.make_mesh(MeshConfig(), jax.devices()[:1])
    patch.setattr(mesh_lib, "make_mesh", lambda *_: mesh)
    return mesh


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def flip(content: bytes, bit: int) -> bytes:
    """A copy with one bit flipped."""
    out = bytearray(content)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def flips(content: bytes) -> Iterator[bytes]:
    """Every copy with one bit flipped."""
    return (flip(content, bit) for bit in range(8 * len(content)))
