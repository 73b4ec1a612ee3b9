"""lm/models/initialisers.py: each scheme's deviations are those that its source publishes, at every width of muP."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest

from lm import config, param_paths
from lm.checkpoint import resume
from lm.config import Config, ModelConfig, TaskConfig, TrainConfig
from lm.config.schema import Duration
from lm.models import initialisers, registry, transformer
from lm.tasks import build_saved_config
from tests import toys

WIDTH, MLP, LAYERS, VOCAB, PATCH = 64, 160, 3, 512, 48
TIED = ModelConfig(num_layers=LAYERS, embed_dim=WIDTH, num_heads=4, mlp_dim=MLP, vocab_size=VOCAB)
LLAMA = dataclasses.replace(TIED, position="rope", norm="rmsnorm", mlp="swiglu", use_bias=False, tie_embeddings=False)
MIXTRAL = dataclasses.replace(LLAMA, num_experts=4, experts_per_token=2)
T5 = dataclasses.replace(LLAMA, kind="encoder_decoder", position="relative")
MAE = dataclasses.replace(TIED, kind="mae", position="sincos", decoder_layers=1)
# What a normal distribution of deviation 1 has when it is cut at 2: sqrt(1 - 4 phi(2) / (2 Phi(2) - 1)).
CUT = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))


def start(cfg):
    """Path -> parameter at the start."""
    cfg = transformer.resolve(cfg, vocab_size=VOCAB, seq_len=128)
    task = toys.task("masked_autoencoding") if cfg.kind == "mae" else TaskConfig()
    model = registry.MODELS[cfg.kind](Config(task=task, model=cfg), None, jnp.float32)
    # Quicker to compile than the default's generator.
    return param_paths.flatten(jax.jit(model.init)(jax.random.key(0, impl="rbg")))


def xavier(fan_in, fan_out):
    return math.sqrt(2 / (fan_in + fan_out))


# (scheme, model, path -> deviation of what the first matching pattern names), in the numbers of the source.
PUBLISHED = [
    # transformers' GPT2PreTrainedModel._init_weights, nanoGPT's GPT.__init__
    ("gpt2", TIED, {r".*(out|down)/kernel": 0.02 / math.sqrt(2 * LAYERS), r".*kernel|.*embedding": 0.02}),
    # torchtitan's Llama 3: N(0, 1) for tokens, 0.02 for kernels, by depth where they write, width**-0.5 at the end;
    # of experts the same; the router is the Switch Transformer's (section 2.4): its variance a hundredth of 1 / fan-in
    (
        "llama",
        MIXTRAL,
        {
            r"embed/embedding": 1.0,
            r"lm_head/kernel": 1 / math.sqrt(WIDTH),
            r".*router_kernel": 0.1 / math.sqrt(WIDTH),
            r".*(out/|down_)kernel": 0.02 / math.sqrt(2 * LAYERS),
            r".*kernel": 0.02,
        },
    ),
    # transformers' T5PreTrainedModel._init_weights; its query is smaller by the 1 / sqrt(head width) of our scores
    (
        "t5",
        T5,
        {
            r"embed/embedding": 1.0,
            r".*down/kernel": 1 / math.sqrt(MLP),
            r".*kernel": 1 / math.sqrt(WIDTH),
            r".*table": 1 / math.sqrt(32),
        },
    ),
    # facebookresearch/mae: xavier_uniform_ of every linear layer and of the flattened patches, 0.02 for the two tokens
    (
        "vit",
        MAE,
        {
            r"embed/patches/kernel|pixels/kernel": xavier(PATCH, WIDTH),
            r".*(up|down)/kernel": xavier(WIDTH, MLP),
            r".*kernel": xavier(WIDTH, WIDTH),
            r"embed/cls|mask_token": 0.02,
        },
    ),
]


@pytest.mark.parametrize(("scheme", "cfg", "published"), PUBLISHED, ids=[scheme for scheme, _, _ in PUBLISHED])
def test_every_parameter_starts_as_the_source_says(scheme, cfg, published):
    for path, leaf in start(dataclasses.replace(cfg, init=scheme)).items():
        pattern = next((pattern for pattern in published if re.fullmatch(pattern, path)), None)
        if pattern is None:
            assert (leaf == (1 if path.endswith("scale") else 0)).all(), path
            assert path.endswith(("scale", "bias")), path
            continue
        far = 5 / math.sqrt(2 * leaf.size)  # five deviations of a deviation's estimate
        assert float(leaf.std()) == pytest.approx(published[pattern], rel=far), path
        assert abs(float(leaf.mean())) < 5 * published[pattern] / math.sqrt(leaf.size), path


@pytest.mark.parametrize(
    ("scheme", "role", "expected"),
    [
        # google-research/bert: create_initializer(0.02), truncated, for every table and kernel
        *(("bert", role, 0.02 * CUT) for role in ("embedding", "tied_embedding", "kernel", "residual", "output")),
        ("fan_in", "embedding", 1.0),
        ("fan_in", "tied_embedding", 1 / math.sqrt(MLP)),
        ("fan_in", "kernel", 1 / math.sqrt(WIDTH)),
        ("fan_in", "residual", 1 / math.sqrt(WIDTH * 2 * LAYERS)),
        ("fan_in", "output", 1 / math.sqrt(WIDTH)),
        ("gpt2", "embedding", 0.02),
        ("gpt2", "output", 0.02),
        ("llama", "tied_embedding", 0.02),
        ("t5", "tied_embedding", 1 / math.sqrt(MLP)),
        ("vit", "embedding", 0.02),
    ],
)
def test_deviation_of_each_role(scheme, role, expected):
    init = initialisers.initialiser(dataclasses.replace(TIED, init=scheme), role)
    drawn = init(jax.random.key(0), (WIDTH, MLP), jnp.float32)
    assert float(drawn.std()) == pytest.approx(expected, rel=0.03)


def test_truncated_and_uniform_have_the_expected_bounds():
    shape = (64, 160)
    for scheme, end in (("bert", 2 * 0.02), ("vit", math.sqrt(6 / sum(shape)))):
        init = initialisers.initialiser(dataclasses.replace(TIED, init=scheme), "kernel")
        largest = float(jnp.abs(init(jax.random.key(0), shape, jnp.float32)).max())
        assert 0.98 * end < largest <= end * (1 + 1e-6)


@pytest.mark.parametrize("scheme", initialisers.SCHEMES)
def test_every_scheme_follows_the_table_of_mup(scheme):
    """At four times the base's width: variances of kernels by r, the others as at the base; at r = 1 nothing."""
    base, wide, r = (64, 160), (256, 640), 1 / 4

    def variance(role, shape, ratio):
        return initialisers.deviation(scheme, role, shape, LAYERS, ratio) ** 2

    for role in ("kernel", "residual"):
        assert variance(role, wide, r) == pytest.approx(variance(role, base, 1.0) * r)
    for role, there, here in (
        ("embedding", (VOCAB, 256), (VOCAB, 64)),
        ("tied_embedding", (VOCAB, 256), (VOCAB, 64)),
        ("output", (256, VOCAB), (64, VOCAB)),
    ):
        expected = variance(role, here, 1.0)
        if scheme == "vit" and role == "output":  # Xavier's depends on the vocabulary, too, which does not grow
            expected = 2 / (64 + VOCAB)
        assert variance(role, there, r) == pytest.approx(expected), role


def test_the_default_is_gpt2_and_a_run_without_the_key_was_fan_in(tmp_path):
    assert ModelConfig().init == "gpt2"
    new = dataclasses.replace(Config(train=TrainConfig(Duration(steps=9))))
    written = config.to_dict(new)
    del written["model"]["init"]
    old = build_saved_config(written)
    assert old.model.init == "fan_in"
    assert dataclasses.replace(old, model=new.model) == new
    said = []
    resume.refuse_changes(old, new, tmp_path, say=said.append)
    assert said == ["changed since the last start: model.init 'fan_in' -> 'gpt2'"]
    assert build_saved_config(config.to_dict(new)) == new
