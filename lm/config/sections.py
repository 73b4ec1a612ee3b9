"""The sections of a config and their checks: every key and its default are defined here, once.

A recipe in `configs/` starts from `lm.tasks.default_config` and changes some keys; `build` turns the result into a
`Config`. It refuses an unknown key, a wrong type, an unknown choice and two durations at once; the message names the
key and suggests the nearest known name.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from lm.config import older, schema
from lm.config.schema import NEVER, ConfigError, Duration, flatten, to_dict


def _refuse(broken: Mapping[str, bool]) -> None:
    """Raises ConfigError with the first message whose condition is false."""
    for message, holds in broken.items():
        if not holds:
            raise ConfigError(message)


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Options of a task that has none but its name; tasks with more define their own dataclass, see `lm.tasks`."""

    name: str = "causal_lm"


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer, which turns text into ids."""

    # A .model, tokenizer.json, vocab.txt or .gguf file, or a folder with one, such as a published model's; '' = that of
    # init_from's run, or else train one on the training text.
    path: str = schema.path()
    vocab_size: int = 8192  # number of ids, when training a model
    extra_ids: int = (
        0  # ids after those of the files: the mask, where they have none, then sentinels of span corruption
    )
    chat_template: str = schema.path()  # a .jinja file that replaces the chat template of a published tokenizer
    train_bytes: int = 10_000_000  # at most this much text is read to train a model


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where records come from and how they become rows of a batch."""

    format: Literal[
        Literal["builtin_text", "builtin_instructions", "text", "jsonl", "table", "conll", "squad", "parallel"],
        Literal["images", "interactions", "tfds", "array_record", "parquet", "arrow", "prepared"],
    ] = "builtin_text"
    # A file, a folder or a glob, local or any URL that etils.epath opens; parallel: DIR/train.{en,de}; tfds: the name
    # of a data set such as wikipedia/20230601.en, whose split 'train' is read; prepared: a folder that
    # tools/prepare_data.py made.
    path: str = schema.path()
    # Instead of `path`: (share of the run at which the entry takes effect, path, weight). The entries with the largest
    # share that the run has passed are in effect: ((0, "web", 0.7), (0, "books", 0.3), (0.9, "books", 1)).
    mixture: tuple[tuple[float, str, float], ...] = schema.path(())
    # The set `valid` of eval.sets, if it is not there. '' = the validation split of a folder that has one, else
    # eval_fraction of the texts, contexts, ... of `path` (see docs/formats.md); tfds: a split such as test or
    # train[:1%].
    eval_path: str = schema.path()
    eval_fraction: float = 0.02  # becomes 0 if eval.sets has a set `valid`: nothing of `path` is held out then
    encoding: str = "utf-8"  # of text files; a Python codec
    max_expansion: int = 1000  # a .gz or .zst file that unpacks to more than this many times its size is refused
    separator: str = ""  # text only: splits one file into documents; '' = one document a file
    # (field in the file, expected field) pairs, for records with fields. In a table without a header, columns are
    # named by number, from 1.
    rename: tuple[tuple[str, str], ...] = ()
    augment: tuple[tuple[str, float], ...] = ()  # (entry of lm.data.augment, strength) pairs, training only
    synonyms: str = schema.path()  # a file of lines 'word<TAB>synonym', for the augmentation of that name
    replay: float = 0.0  # share of the training rows drawn from the data of init_from's run instead
    curriculum: Duration = NEVER  # short rows first, then longer ones too; all rows after this duration
    seq_len: int = 256  # positions in a row; in an encoder-decoder, of the encoder's input
    target_len: int = 0  # encoder-decoder: positions in a row of the decoder; 0 = seq_len
    batch_size: int = 16  # rows in a step, over all devices
    packing: Literal["pad", "best_fit", "concat"] = "best_fit"
    mask_documents: bool = True  # False: documents packed in one row see the ones before them
    # Examples longer than a row: drop_turns (chat only) removes the oldest turns, truncate cuts the end, drop removes
    # the whole example.
    overlong: Literal["auto", "drop_turns", "truncate", "drop"] = (
        "auto"  # auto: drop_turns for conversations, truncate for other text
    )
    max_bad_records: int = 0  # up to this many are skipped, and counted with their places; one more is an error
    max_records: int = 0  # 0 = all of them


# Formats that name no files of records: prepared data and the built-in corpora have held-out parts of their own.
_NO_FILES = ("builtin_text", "builtin_instructions", "prepared")


def holds_out(data: DataConfig) -> bool:
    """Whether records are held out of the training data, or are in files of `data.eval_path`."""
    has_parts = data.format in (*_NO_FILES, "interactions")
    return has_parts or bool(data.eval_path) or data.eval_fraction > 0


def _check_data(data: DataConfig) -> None:
    schema.check_encoding(data.encoding, "data.encoding")
    is_builtin, starts = data.format.startswith("builtin"), [start for start, _, _ in data.mixture]
    _refuse(
        {
            f"'data.path' is empty: data.format={data.format} needs a file, folder or glob": (
                is_builtin or bool(data.path) or bool(data.mixture)
            ),
            f"'data.path' ({data.path!r}) and 'data.eval_path' must be empty if 'data.mixture' is set": (
                not data.mixture or not (data.path or data.eval_path or is_builtin)
            ),
            "'data.mixture' must begin at 0, with shares of the run below 1 and weights above 0: "
            f"{data.mixture}": not data.mixture
            or (min(starts) == 0 and all(0 <= start < 1 and weight > 0 for start, _, weight in data.mixture)),
            "'data.curriculum_*' orders one source, but there is a 'data.mixture'": (
                not data.mixture or data.curriculum == NEVER
            ),
            "'data.curriculum_*' goes by the length of one example; set data.packing=pad, not "
            f"{data.packing}": data.curriculum == NEVER or data.packing == "pad",
        }
    )


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Small trainable modules added to a frozen model, see `lm.models.adapters`."""

    kind: Literal["none", "lora", "houlsby", "pfeiffer"] = "none"
    rank: int = 8  # of LoRA, or the width of a bottleneck
    alpha: float = 16.0  # LoRA only: the product of its two matrices is scaled by alpha / rank
    dropout: float = 0.0  # LoRA only: on its input
    targets: str = r".*(query|value)"  # LoRA only: a regular expression over the paths of the Dense layers


@dataclasses.dataclass(frozen=True)
class MupConfig:
    """Sizes of the recipe whose learning rate muP transfers to this width, see `lm.optim.mup`."""

    base_width: int = 0  # its embed_dim; 0 = off
    base_head_dim: int = 0  # 0 = the same as here


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
    """How rope's frequencies are changed for rows longer than a model was trained on, see `lm.models.rope`."""

    kind: Literal["none", "linear", "dynamic", "llama3", "yarn"] = "none"
    factor: float = 0.0  # of the length, at least 1; none has no factor
    original_len: int = 0  # positions of a row that the model was trained on; linear does not read it
    low_freq_factor: float = 1.0  # llama3: rotations within original_len below which a frequency is divided by factor
    high_freq_factor: float = 4.0  # llama3: rotations above which it is kept
    beta_fast: float = 32.0  # yarn: as high_freq_factor
    beta_slow: float = 1.0  # yarn: as low_freq_factor
    truncate: bool = True  # yarn: whether the dimensions of these two are rounded outwards to whole ones
    magnitude: float = 0.0  # yarn: factor of queries and keys; 0 = 0.1 ln(factor) + 1


# Kind of scaling -> the keys of `RopeScalingConfig` that it reads.
ROPE_SCALING_KEYS = {
    "none": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_len"),
    "llama3": ("factor", "original_len", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_len", "beta_fast", "beta_slow", "truncate", "magnitude"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Blocks of attention and an MLP. The defaults are GPT-2's; the comment gives the Llama choice where it differs."""

    kind: Literal["decoder", "prefix_decoder", "encoder", "encoder_decoder", "vit", "mae"] = "decoder"
    num_layers: int = 4  # in an encoder-decoder, of the encoder
    decoder_layers: int = 0  # encoder_decoder and mae; 0 = num_layers
    decoder_dim: int = 0  # mae only: width of its decoder; 0 = embed_dim
    decoder_heads: int = 0  # mae only; 0 = num_heads
    decoder_mlp_dim: int = 0  # mae only; 0 = mlp_dim * decoder_dim / embed_dim
    embed_dim: int = 256
    num_heads: int = 4
    num_kv_heads: int = 0  # 0 = num_heads
    head_dim: int = 0  # 0 = embed_dim / num_heads
    mlp_dim: int = 0  # 0 = 4 * embed_dim
    vocab_size: int = 0  # rows of the embedding; 0 = the tokenizer's, rounded up to a multiple of 128
    max_len: int = 0  # rows of the learned position table; 0 = data.seq_len
    unused_positions: int = 0  # more rows of that table, before that of position 0, which are not read (RoBERTa)
    sentence_types: int = 2  # rows of an encoder's sentence embedding; 1 = all sentences have the same (RoBERTa)
    patch_size: int = 4  # vit and mae: side of the square patches of an image, in pixels
    # vit and mae: a pixel from 0 to 1 becomes (pixel - mean) / deviation; one value for all channels, or one for each.
    pixel_mean: tuple[float, ...] = (0.5,)
    pixel_deviation: tuple[float, ...] = (0.5,)
    # Llama: rope. relative = T5's bias. Of vit and mae: sincos = sines of row and column, computed; fixed = a table of
    # them, which is stored and not trained (ViT-MAE); learned = a table with a row for [CLS] and each patch (ViT).
    position: Literal["learned", "rope", "relative", "sincos", "fixed"] = "learned"
    rope_theta: float = 10_000.0
    rope_local_theta: float = 0.0  # in the layers with a window, without rope_scaling (Gemma 3); 0 = as in the others
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    # rmsnorm; rmsnorm_plus_one multiplies by 1 + scale (Gemma).
    norm: Literal["layernorm", "rmsnorm", "rmsnorm_plus_one"] = "layernorm"
    norm_eps: float = 1e-5
    # Of attention and MLP; post: after the residual addition (BERT); both: before, and before the addition (Gemma 2).
    norm_position: Literal["pre", "post", "both"] = "pre"
    embed_norm: bool = False  # the sum of the embeddings is normalised (BERT)
    # Initialisation of the parameters: a scheme of lm.models.initialisers.
    init: Literal["gpt2", "fan_in", "bert", "llama", "t5", "vit"] = "gpt2"
    # swiglu; gelu = in its tanh form; gelu_exact = by the error function (BERT); geglu = gated, with gelu (Gemma,
    # T5 v1.1); relu (T5).
    mlp: Literal["gelu", "gelu_exact", "relu", "swiglu", "geglu"] = "gelu"
    num_experts: int = 0  # MLPs of width mlp_dim in a layer; 0 = one MLP without a router
    experts_per_token: int = 0  # experts that each position is routed to
    use_bias: bool = True  # False
    qkv_bias: bool = False  # biases of query, key and value where use_bias is False (Qwen2)
    tie_embeddings: bool = True
    lm_transform: bool = (
        False  # before the output projection a dense layer, GELU and a norm; its logits have biases (BERT)
    )
    scale_embeddings: bool = False  # token embeddings are multiplied by sqrt(embed_dim) (Gemma)
    scale_logits: bool = False  # logits are divided by sqrt(embed_dim) (T5, whose head is tied)
    query_scale: float = 0.0  # factor of the queries; 0 = 1 / sqrt(head_dim); T5: 1
    qk_norm: bool = False
    mup: MupConfig = MupConfig()
    logit_softcap: float = 0.0  # 0 = off; else logits = cap * tanh(logits / cap)
    attention_softcap: float = 0.0  # the same, on attention scores
    sliding_window: int = 0  # 0 = off; else a position attends to itself and the window - 1 before it
    global_every: int = 0  # every n-th layer has no window, the last of each n; 0 = all layers have it
    # Input of a head on a row: [CLS], the mean, the last token; cls = the first without a pooler before the classifier
    # (ViT).
    pool: Literal["first", "mean", "last", "cls"] = "first"
    dropout: float = 0.0
    neftune_alpha: float = 0.0  # uniform noise on the embeddings while training (NEFTune); 0 = off
    dtype: Literal["auto", "float32", "bfloat16", "int8", "fp8"] = "auto"  # of compute, see lm.program.compute_dtype
    remat: Literal["none", "minimal", "offload", "attention", "qkv", "full"] = "none"  # see lm.models.remat
    unroll: int = 1  # layers in one iteration of the scan; 0 = all (faster on CPU, slower to compile)


def check_model(model: ModelConfig) -> None:
    """Raises ConfigError for values of the model that contradict each other."""
    is_vision, is_stack = model.kind in ("vit", "mae"), model.kind in ("decoder", "prefix_decoder", "encoder")
    _refuse(
        {
            f"'model.num_heads' ({model.num_heads}) must be a multiple of 'model.num_kv_heads' "
            f"({model.num_kv_heads})": model.num_heads % (model.num_kv_heads or model.num_heads) == 0,
            f"'model.embed_dim' ({model.embed_dim}) must be a multiple of 'model.num_heads' ({model.num_heads}), or "
            "set 'model.head_dim'": bool(model.head_dim) or model.embed_dim % model.num_heads == 0,
            f"'model.position' is {model.position}, but 'model.kind' {model.kind} needs "
            f"{'sincos, fixed or learned' if is_vision else 'another'}": (
                model.position == "learned" or is_vision == (model.position in ("sincos", "fixed"))
            ),
            f"'model.pixel_mean' is {model.pixel_mean}, 'model.pixel_deviation' {model.pixel_deviation}; expected one "
            "value or one for each channel in both, and deviations above 0": (
                len(model.pixel_mean) == len(model.pixel_deviation) and min(model.pixel_deviation, default=0) > 0
            ),
            f"'model.pixel_mean' and 'pixel_deviation' are for images; 'model.kind' {model.kind} reads text": (
                is_vision or (model.pixel_mean, model.pixel_deviation) == ((0.5,), (0.5,))
            ),
            f"'model.decoder_heads' and 'model.decoder_mlp_dim' are for mae; 'model.kind' {model.kind} needs 0": (
                model.kind == "mae" or not (model.decoder_heads or model.decoder_mlp_dim)
            ),
            f"'model.num_experts' is for models of text; 'model.kind' {model.kind} needs it to be 0": (
                not is_vision or not model.num_experts
            ),
            f"'model.experts_per_token' is {model.experts_per_token}; expected 1 to {model.num_experts}, "
            "'model.num_experts'": not model.num_experts or 0 < model.experts_per_token <= model.num_experts,
            f"'model.experts_per_token' is {model.experts_per_token}, but 'model.num_experts' is 0": (
                model.num_experts > 0 or not model.experts_per_token
            ),
            f"'model.mup' is for models of text; 'model.kind' {model.kind} needs 'model.mup.base_width' to be 0": (
                not is_vision or not model.mup.base_width
            ),
            f"'model.global_every' is {model.global_every}, but 'model.sliding_window' is 0": (
                not model.global_every or model.sliding_window > 0
            ),
            f"'model.rope_local_theta' is {model.rope_local_theta}, but 'model.global_every' is 0": (
                not model.rope_local_theta or model.global_every > 0
            ),
            f"'model.position' is {model.position}, which does not read 'model.rope_scaling': set rope": (
                model.position == "rope" or model.rope_scaling.kind == "none"
            ),
            f"'model.position' is {model.position}, which does not read 'model.rope_local_theta': set rope": (
                model.position == "rope" or not model.rope_local_theta
            ),
            f"'model.sliding_window' is {model.sliding_window}, but 'model.kind' {model.kind} has no windows: set 0": (
                not is_vision or not model.sliding_window
            ),
            f"'model.scale_embeddings' is for models of text; 'model.kind' {model.kind} needs it to be False": (
                not is_vision or not model.scale_embeddings
            ),
            f"'model.scale_logits' is for models of text; 'model.kind' {model.kind} needs it to be False": (
                not is_vision or not model.scale_logits
            ),
            "'model.qkv_bias' is set, but 'model.use_bias' adds these biases already: set one of them to False": (
                not model.qkv_bias or not model.use_bias
            ),
            f"'model.query_scale' is {model.query_scale}, but 'model.mup.base_width' sets the scale: set it to 0": (
                not model.query_scale or not model.mup.base_width
            ),
            f"'model.norm_position' is {model.norm_position}, but 'model.kind' {model.kind} supports pre only": (
                model.norm_position == "pre" or is_stack
            ),
            f"'model.lm_transform' is set, but 'model.kind' {model.kind} does not support it": (
                not model.lm_transform or is_stack
            ),
            f"'model.unused_positions' is {model.unused_positions}, but a 'model.kind' {model.kind} with "
            f"'model.position' {model.position} has no learned positions of text: set 0": (
                not model.unused_positions or (model.position == "learned" and not is_vision)
            ),
            f"'model.sentence_types' is {model.sentence_types}; expected at least 1": model.sentence_types > 0,
            f"'model.sentence_types' is {model.sentence_types}, but 'model.kind' {model.kind} has none: leave 2": (
                model.sentence_types == 2 or model.kind == "encoder"
            ),
            f"'model.embed_norm' is for models of text; 'model.kind' {model.kind} needs it to be False": (
                not is_vision or not model.embed_norm
            ),
            f"'model.mup.base_head_dim' is {model.mup.base_head_dim}, but 'model.mup.base_width' is 0": (
                model.mup.base_width > 0 or not model.mup.base_head_dim
            ),
            f"'model.dtype' is {model.dtype}, which experts do not support: set auto": (
                model.dtype not in ("int8", "fp8") or not model.num_experts
            ),
            f"'model.mlp' is {model.mlp}, which experts do not support: set gelu or swiglu": (
                model.mlp in ("gelu", "swiglu") or not model.num_experts
            ),
        }
    )
    _check_rope_scaling(model.rope_scaling)


def _check_rope_scaling(scaling: RopeScalingConfig) -> None:
    name, read = f"'model.rope_scaling.kind' is {scaling.kind}", ROPE_SCALING_KEYS[scaling.kind]
    usual, own = to_dict(RopeScalingConfig()), to_dict(scaling)
    _refuse(
        {
            f"{name}, which does not read 'model.rope_scaling.{key}': leave it at {usual[key]}": own[key] == usual[key]
            for key in own
            if key not in ("kind", *read)
        }
        | {
            f"{name}, which needs a 'model.rope_scaling.factor' of at least 1": (
                "factor" not in read or scaling.factor >= 1
            ),
            f"{name}, which needs 'model.rope_scaling.original_len'": (
                "original_len" not in read or scaling.original_len > 0
            ),
            "'model.rope_scaling.low_freq_factor' must be below 'high_freq_factor'": (
                scaling.low_freq_factor < scaling.high_freq_factor
            ),
            "'model.rope_scaling.beta_slow' must be below 'beta_fast', and above 0": (
                0 < scaling.beta_slow < scaling.beta_fast
            ),
        }
    )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Options of the losses."""

    z_loss: float = 0.0  # weight of logsumexp(logits)^2 (PaLM, section 5)
    label_smoothing: float = 0.0
    chunk_len: int = 128  # positions of each row (per device) whose logits are computed at once; 0 = all


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer. Rules are ordered (regex over the whole parameter path, value) pairs; the first match wins."""

    name: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-3  # the peak
    schedule: Literal["constant", "linear", "cosine", "rsqrt", "wsd"] = "cosine"
    warmup: Duration = NEVER
    decay: Duration = NEVER  # wsd only: the final linear decay
    end_lr_ratio: float = 0.0  # learning rate at the end / peak; linear, cosine and wsd
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # per step: lr * weight_decay * parameter
    decay_rules: tuple[tuple[str, bool], ...] = ((r".*(kernel|embedding)", True), (r".*", False))
    lr_rules: tuple[tuple[str, float], ...] = ((r".*", 1.0),)  # factor of the learning rate; 0 = frozen
    unfreeze_rules: tuple[tuple[str, float], ...] = ((r".*", 0.0),)  # share of the run after which a parameter learns
    l2_sp: float = 0.0  # weight of decay towards the initial values, as weight_decay is towards 0 (L2-SP)
    mixout: float = 0.0  # probability that an entry is replaced by its initial value while training
    clip_norm: float = 1.0  # of the global gradient norm; 0 = off
    ema_decay: float = 0.0  # 0 = off; else evaluation uses the average; smaller in early steps, see lm.step


def _check_optim(optim: OptimConfig) -> None:
    _refuse(
        {
            "'optim.eps' must be greater than 0": optim.eps > 0,
            f"'optim.decay_*' is read by schedule wsd only; 'optim.schedule' is {optim.schedule}": (
                optim.schedule == "wsd" or optim.decay == NEVER
            ),
            f"'optim.schedule' is {optim.schedule}, but no 'optim.decay_steps|_tokens|_examples|_epochs' is set": (
                optim.schedule != "wsd" or optim.decay != NEVER
            ),
        }
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis; data = -1 takes all the rest."""

    data: int = -1  # data parallelism within a slice: copies of the model
    fsdp: int = 1  # splits parameters, moments and batch (ZeRO-3)
    expert: int = 1  # splits experts, and all else as fsdp does
    context: int = 1  # splits the positions of each row, and parameters and moments as fsdp does
    tensor: int = 1  # splits heads, MLP width and vocabulary
    dcn_data: int = 1  # data parallelism across slices, over the data-centre network


@dataclasses.dataclass(frozen=True)
class EarlyStoppingConfig:
    """When a run ends before its full length; its result is then its best checkpoint."""

    patience: int = 0  # evaluations in a row without an improvement of checkpoint.best_metric; 0 = never
    min_delta: float = 0.0  # an improvement must be larger than this


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of training, and micro-batches."""

    total: Duration = NEVER
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    micro_batches: int = 1  # gradients are accumulated over this many parts of the batch: less memory, same result
    compilation_cache: str = schema.path("auto")  # folder that keeps compiled programs; auto: ~/.cache/lm; '' = none


@dataclasses.dataclass(frozen=True)
class EvalSetConfig:
    """A named set of records to evaluate on, see `lm.eval_sets`."""

    path: str = schema.path()  # as data.path; tfds: the name of a data set
    split: str = ""  # tfds only: a split such as test
    # '' = that of data, with its rename, separator and encoding, unless they are set here
    format: Literal[
        Literal["", "text", "jsonl", "table", "conll", "squad", "parallel"],
        Literal["images", "interactions", "tfds", "array_record", "parquet", "arrow"],
    ] = ""
    rename: tuple[tuple[str, str], ...] = ()  # as data.rename
    separator: str = ""  # as data.separator
    encoding: str = ""  # as data.encoding
    task: Any = TaskConfig(name="")  # a task's name and options; '' = the run's task, with its options


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out data."""

    # Name -> set. `valid` decides which checkpoint is the best one, and early stopping; without it, what `data` holds
    # out does. `test` is read by tools/evaluate.py --set=test alone. Others are evaluated together with `valid`, and
    # decide nothing.
    sets: tuple[tuple[str, EvalSetConfig], ...] = ()

    every: Duration = NEVER  # none = only at the start and the end
    at_start: bool = True
    batch_size: int = 0  # 0 = data.batch_size
    max_tokens: int = 0  # evaluate on at most this many positions of each set; 0 = all held-out rows


def _check_sets(config: "Config") -> None:
    """Raises ConfigError for a set of `eval.sets` that cannot be read, whatever its files hold, or no set `valid`."""
    data, reserved = config.data, ("train",)
    for name, one in config.eval.sets:
        key = f"eval.sets.{name}"
        own_format = one.format or data.format
        is_named = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) is not None and name not in reserved
        _refuse(
            {
                f"'{key}': expected a name of letters, digits, _ and -, which begins with a letter or digit and is not "
                f"{' or '.join(reserved)}": is_named,
                f"'{key}.path' is empty: a set needs a file, folder or glob": bool(one.path),
                f"'{key}.format' is '', but data.format={data.format} names no file of records: set it, such as "
                "jsonl": own_format not in _NO_FILES,
                f"'{key}.split' is {one.split!r}, but format {own_format} has no splits; 'path' names the file": (
                    not one.split or own_format == "tfds"
                ),
                f"'{key}.split' is empty: data sets of TFDS have splits, such as test": (
                    bool(one.split) or own_format != "tfds"
                ),
            }
        )
        if one.encoding:
            schema.check_encoding(one.encoding, f"{key}.encoding")
    _refuse(
        {
            "'eval.sets.test': interactions test on each user's last item, at the end of a run; give the set another "
            "name": data.format != "interactions" or "test" not in dict(config.eval.sets),
        }
    )
    valid = dict(config.eval.sets).get("valid")
    message = "nothing is held out: set 'data.eval_path', 'data.eval_fraction' above 0, or a set 'valid' of 'eval.sets'"
    _refuse({message: bool(valid) or holds_out(data)})
    if valid:
        _refuse(
            {
                f"'data.eval_path' ({data.eval_path!r}) and 'eval.sets.valid' are both set: they are two spellings of "
                "one set; remove one": not data.eval_path,
                f"'eval.sets.valid.task.name' is {valid.task.name!r}, but this set decides checkpoints, by the run's "
                "task: leave it '', or give the set another name": not valid.task.name,
                "'eval.sets.valid': interactions validate on each user's second-last item; give the set another name": (
                    data.format != "interactions"
                ),
            }
        )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved and what is kept."""

    every: Duration = NEVER  # none = only at the end and when an evaluation is the best so far
    keep_latest: int = 2
    keep_best: int = 1
    best_metric: str = "loss"  # an evaluation metric; lm.evaluation.metrics knows whether lower is better


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How texts are generated, and the samples written at each evaluation."""

    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 64
    min_new_tokens: int = 0  # before so many new ones, no token ends the text
    stop: tuple[str, ...] = ()  # strings that end a text, which is cut before them
    temperature: float = 0.8  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    repetition_penalty: float = 1.0  # 1 = off; Keskar et al. 2019, section 4.1
    symbols: tuple[Literal["sentinels", "roles", "mask", "bos"], ...] = ()  # control symbols allowed besides text


def _check_generate(generate: GenerateConfig) -> None:
    least, most = generate.min_new_tokens, generate.max_new_tokens
    penalty = generate.repetition_penalty
    _refuse(
        {
            f"'generate.top_p' must be in (0, 1], got {generate.top_p}": 0 < generate.top_p <= 1,
            f"'generate.min_new_tokens' ({least}) is above 'generate.max_new_tokens' ({most})": least <= most,
            f"'generate.repetition_penalty' must be above 0 (1 = off), got {penalty}": penalty > 0,
            "'generate.stop' has an empty string, which would end every text at once": all(generate.stop),
        }
    )


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """The steps that JAX's profiler traces."""

    first_step: int = 0
    num_steps: int = 0  # 0 = none


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
    """What is logged while training."""

    log_every_steps: int = 10
    # What else gets the metrics and samples; wandb and mlflow are extras, see docs/runs.md
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    project: str = "lm"  # W&B project, MLflow experiment
    run_name: str = ""  # for W&B and MLflow; '' = the name of the run's folder
    profile: ProfileConfig = ProfileConfig()


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    seed: int = 0
    # Parameters and tokenizer to start from: RUN, RUN@best or RUN@STEP; hf:FOLDER = a published model; '' = scratch
    init_from: str = schema.path()
    init_rules: tuple[tuple[str, str], ...] = ((r".*", "keep"),)  # 'keep', 'reinit' or another path to read from
    task: Any = TaskConfig()  # the options of the task that task.name selects, see lm.tasks
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    generate: GenerateConfig = GenerateConfig()
    monitor: MonitorConfig = MonitorConfig()


# Keys that affect neither the parameters nor the data of later steps, so that a resumed run may change them.
RESUMABLE = (
    *("mesh", "eval", "checkpoint", "generate", "monitor"),
    *("model.init", "model.remat", "model.unroll", "loss.chunk_len", "train.compilation_cache"),
)
Options = Mapping[str, type]  # name of a task -> the dataclass of its options


def build(source: Mapping[str, Any], options: Options) -> Config:
    """Builds a `Config` from a `ConfigDict` or nested dict, strictly.

    Args:
      source: missing keys get their defaults.
      options: name of each task -> the dataclass of its options.

    Raises:
      ConfigError: unknown key, wrong type, unknown choice, two durations at once, or values that contradict each other.
    """
    try:
        source = source.to_dict() if hasattr(source, "to_dict") else source
    except OSError as error:  # ml_collections reports only here that it could not load the recipe
        raise ConfigError(f"no recipe to load: {str(error).strip().splitlines()[-1].strip()}") from None
    section = _build_task(source.get("task", {}), options, "task", Config.task.name)
    rest, tasks_of_sets = _without_tasks(source)
    for key, _ in flatten(rest):
        if now := older.successor(key):
            raise ConfigError(f"unknown config key '{key}': set {now} instead")
    config = dataclasses.replace(schema.build_section(Config, rest, ""), task=section)
    if config.eval.sets:
        tasks = {name: _build_task(task, options, f"eval.sets.{name}.task") for name, task in tasks_of_sets.items()}
        sets = tuple((name, dataclasses.replace(one, task=tasks.get(name, one.task))) for name, one in config.eval.sets)
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, sets=sets))
        if "valid" in dict(sets):  # then nothing of `data.path` is held out
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_fraction=0.0))
    check(config)
    return config


def _build_task(task: Any, options: Options, key: str, usual: str = "") -> Any:
    """The options of the task that the section `key` names; where it names none, of the task `usual` ('' = no task)."""
    if not isinstance(task, Mapping):
        raise ConfigError(f"'{key}' is a section of keys, one of them '{key}.name'; got {task!r}")
    name = task.get("name", usual)
    if name == usual == "" and not task.keys() - {"name"}:
        return TaskConfig(name="")
    if name not in options:
        now = older.task_name(str(name))
        hint = f" (it is called {now} now)" if now else schema.nearest(str(name), options)
        raise ConfigError(f"'{key}.name' must be one of {', '.join(options)}; got {name!r}{hint}")
    return schema.build_section(options[name], {"name": name, **task}, f"{key}.")


def _without_tasks(source: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The source without `task` and the tasks of `eval.sets`; name of a set -> its section `task`, if it has one."""
    rest = {key: value for key, value in source.items() if key != "task"}
    section = rest.get("eval", {})
    sets = section.get("sets", {}) if isinstance(section, Mapping) else {}
    if not isinstance(sets, Mapping) or not all(isinstance(one, Mapping) for one in sets.values()):
        return rest, {}  # refused where the section is built
    tasks = {name: one["task"] for name, one in sets.items() if "task" in one}
    plain = {name: {key: value for key, value in one.items() if key != "task"} for name, one in sets.items()}
    return rest | ({"eval": {**section, "sets": plain}} if sets else {}), tasks


def to_json(config: Config) -> str:
    """The resolved config as JSON; `build(json.loads(to_json(c)), options) == c`."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def diff(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Key -> (old value, new value), for the keys whose values differ."""
    old_flat, new_flat = dict(flatten(to_dict(old))), dict(flatten(to_dict(new)))
    keys = {**old_flat, **new_flat}  # the options differ between tasks
    both = {key: (old_flat.get(key), new_flat.get(key)) for key in keys}
    return {key: (before, now) for key, (before, now) in both.items() if before != now}


_AT_LEAST_ONE = {
    *("model.num_layers", "model.embed_dim", "model.num_heads", "model.patch_size"),
    *("data.seq_len", "data.batch_size", "data.max_expansion", "adapter.rank"),
    *("train.micro_batches", "checkpoint.keep_latest", "monitor.log_every_steps", "generate.max_new_tokens"),
    *("mesh.fsdp", "mesh.expert", "mesh.context", "mesh.tensor", "mesh.dcn_data"),
}
_BELOW_ONE = {
    *("model.dropout", "adapter.dropout", "loss.label_smoothing", "data.eval_fraction", "data.replay"),
    *("optim.b1", "optim.b2", "optim.ema_decay", "optim.mixout"),
}


def check(config: Config) -> None:
    """Raises ConfigError for values that are invalid whatever the data."""
    for key, value in flatten(to_dict(config)):
        numbers = [n for n in (value if isinstance(value, tuple) else (value,)) if isinstance(n, int | float)]
        if not numbers or key.startswith(("task.", "eval.sets.")) or key in ("mesh.data", "seed"):
            continue
        least = 1 if key in _AT_LEAST_ONE else 0
        if min(numbers) < least:
            raise ConfigError(f"'{key}' must {f'be at least {least}' if least else 'not be negative'}, got {value}")
        if key in _BELOW_ONE and value >= 1:
            raise ConfigError(f"'{key}' must be in [0, 1), got {value}")
    _check_data(config.data)
    check_model(config.model)
    _check_optim(config.optim)
    _check_generate(config.generate)
    _check_sets(config)
    _check_together(config)


def _check_together(config: Config) -> None:
    """Raises ConfigError for values of different sections that contradict each other."""
    model, data, train = config.model, config.data, config.train
    patience = train.early_stopping.patience
    _refuse(
        {
            f"'data.batch_size' ({data.batch_size}) must be a multiple of 'train.micro_batches' "
            f"({train.micro_batches})": data.batch_size % train.micro_batches == 0,
            f"'model.max_len' ({model.max_len}) is shorter than 'data.seq_len' ({data.seq_len}) or 'data.target_len'": (
                model.position != "learned"
                or model.kind in ("vit", "mae")
                or not model.max_len
                or model.max_len >= max(data.seq_len, data.target_len)
            ),
            "'data.replay' draws from the data of the run in 'init_from', but 'init_from' is empty": (
                not data.replay or bool(config.init_from)
            ),
            f"'mesh.context' splits the positions of a text; 'model.kind' {model.kind} needs it to be 1": (
                model.kind not in ("vit", "mae") or config.mesh.context == 1
            ),
            "'mesh.expert' splits experts, but 'model.num_experts' is 0: set mesh.fsdp instead": (
                model.num_experts > 0 or config.mesh.expert == 1
            ),
            "'train.early_stopping.patience' counts evaluations, but no 'eval.every_*' is set": (
                not patience or config.eval.every != NEVER
            ),
            "'train.early_stopping.patience' goes back to the best checkpoint, but 'checkpoint.keep_best' is 0": (
                not patience or config.checkpoint.keep_best > 0
            ),
            f"'seed' must be in [-2^31, 2^31), got {config.seed}": -(2**31) <= config.seed < 2**31,
            "no training length: set one of 'train.total_steps|_tokens|_examples|_epochs'": train.total != NEVER,
        }
    )
