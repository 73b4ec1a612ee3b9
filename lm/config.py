"""The schema of a run: frozen dataclasses, built strictly from an `ml_collections.ConfigDict`.

Every key has one owner here and its default here. A recipe in `configs/` starts from `defaults()`, changes what it
means to change, and `build` turns the result into a `Config`: an unknown key, a wrong type, an unknown choice or two
durations at once is refused with the key named and the nearest known name suggested.
"""

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

UNITS = ("steps", "tokens", "examples", "epochs")


class ConfigError(ValueError):
    """The config cannot be run. The message names the key, what was found, and what was expected."""


@dataclasses.dataclass(frozen=True)
class Duration:
    """A length of training, spelled in the config as one of `NAME_steps|_tokens|_examples|_epochs`; all 0 = none."""

    steps: int = 0
    tokens: int = 0
    examples: int = 0
    epochs: float = 0.0

    def to_steps(self, *, batch_size: int, seq_len: int, epoch_examples: int) -> int:
        """Rounds up to whole steps. A token is one position of a batch, padding included; an example is one row."""
        if self.steps:
            return self.steps
        # Rounded: 1.1 epochs of 100 examples are 110.00000000000001 in floats, and would be a step too long.
        examples = self.examples or round(self.epochs * epoch_examples, 6) or self.tokens / seq_len
        return math.ceil(examples / batch_size)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which SentencePiece model turns text into ids."""

    path: str = ""  # a .model file; '' = the one of init_from's run, else train one on the training text
    vocab_size: int = 8192  # ids, when training one
    train_bytes: int = 10_000_000  # at most this much text is read to train one


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where records come from and how they become rows of a batch."""

    format: Literal["builtin_text", "builtin_instructions", "text", "jsonl"] = "builtin_text"
    path: str = ""  # a file, a folder or a glob, local or any URL that etils.epath opens
    eval_path: str = ""  # '' = hold out eval_fraction of the records of `path`, chosen by hash
    eval_fraction: float = 0.02
    separator: str = ""  # text only: splits one file into documents; '' = one document a file
    rename: tuple[tuple[str, str], ...] = ()  # jsonl only: (field in the file, field expected) pairs
    task: Literal["text", "chat"] = "text"  # which function of lm.data.examples makes examples
    seq_len: int = 256  # positions in a row
    batch_size: int = 16  # rows in a step, over all devices
    packing: Literal["pad", "best_fit", "concat"] = "best_fit"
    mask_documents: bool = True  # False: documents packed in one row see the ones before them
    overlong: Literal["truncate", "drop"] = "truncate"  # chat only: cut the prompt from its left, or drop the example
    on_bad_record: Literal["error", "skip"] = "error"
    max_bad_records: int = 100  # on_bad_record=skip: more than this is an error all the same
    max_records: int = 0  # 0 = all of them


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of pre-norm blocks. The defaults are GPT-2's; the comment gives the Llama choice where it differs."""

    num_layers: int = 4
    embed_dim: int = 256
    num_heads: int = 4
    num_kv_heads: int = 0  # 0 = num_heads
    head_dim: int = 0  # 0 = embed_dim / num_heads
    mlp_dim: int = 0  # 0 = 4 * embed_dim
    vocab_size: int = 0  # rows of the embedding; 0 = the tokenizer's, rounded up to a multiple of 128
    max_len: int = 0  # rows of the learned position table; 0 = data.seq_len
    position: Literal["learned", "rope"] = "learned"  # rope
    rope_theta: float = 10_000.0
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # rmsnorm
    norm_eps: float = 1e-5
    mlp: Literal["gelu", "swiglu"] = "gelu"  # swiglu
    use_bias: bool = True  # False
    tie_embeddings: bool = True
    qk_norm: bool = False
    logit_softcap: float = 0.0  # 0 = off; else logits = cap * tanh(logits / cap)
    attention_softcap: float = 0.0  # the same, on attention scores
    sliding_window: int = 0  # 0 = off; else a position sees itself and the window - 1 before it
    dropout: float = 0.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute; auto = bfloat16, but float32 on CPU
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass computes again, see lm.models.transformer
    unroll: int = 1  # layers in one iteration of the scan; 0 = all (faster on CPU, slower to compile)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Options of the token cross-entropy."""

    z_loss: float = 0.0  # weight of logsumexp(logits)^2 (PaLM, section 5)
    label_smoothing: float = 0.0
    chunk_len: int = 128  # positions of each row whose logits are held at once; 0 = all


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer. Rules are ordered (regex over the whole parameter path, value) pairs; the first match wins."""

    name: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-3  # the peak
    schedule: Literal["constant", "linear", "cosine", "rsqrt", "wsd"] = "cosine"
    warmup: Duration = Duration()
    decay: Duration = Duration()  # wsd only: the final linear decay
    end_lr_ratio: float = 0.0  # learning rate at the end / peak; linear, cosine and wsd
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # per step: lr * weight_decay * parameter
    decay_rules: tuple[tuple[str, bool], ...] = ((r".*(kernel|embedding)", True), (r".*", False))
    lr_rules: tuple[tuple[str, float], ...] = ((r".*", 1.0),)  # multiplies the learning rate; 0 = frozen
    clip_norm: float = 1.0  # of the global gradient norm; 0 = off
    ema_decay: float = 0.0  # 0 = off; else evaluation uses the average; less at the start, see lm.step


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices along each axis; -1 for `data` = all the rest."""

    data: int = -1  # copies of the model, inside a slice
    fsdp: int = 1  # parameters, moments and batch split (ZeRO-3)
    tensor: int = 1  # heads, MLP width and vocabulary split
    dcn_data: int = 1  # data parallel over slices, across the data-centre network


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, and in how many pieces a step is computed."""

    total: Duration = Duration()
    micro_batches: int = 1  # the batch is split in this many, their gradients summed: less memory, the same result


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out data."""

    every: Duration = Duration()  # none = only at the start and the end
    at_start: bool = True
    batch_size: int = 0  # 0 = data.batch_size
    max_tokens: int = 0  # evaluate on at most this many positions; 0 = all held-out rows


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved and what is kept."""

    every: Duration = Duration()  # none = only at the end and when an evaluation is the best so far
    keep_latest: int = 2
    keep_best: int = 1
    best_metric: str = "loss"  # a key of the evaluation's metrics
    best_mode: Literal["min", "max"] = "min"


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Samples written at each evaluation."""

    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 64
    temperature: float = 0.8  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
    """What is written while training."""

    log_every_steps: int = 10
    profile_start_step: int = 0
    profile_steps: int = 0  # 0 = no profile


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    seed: int = 0
    objective: Literal["clm"] = "clm"
    init_from: str = ""  # RUN, RUN@best or RUN@STEP: parameters and tokenizer to start from; '' = scratch
    init_rules: tuple[tuple[str, str], ...] = ((r".*", "keep"),)  # 'keep', 'reinit' or a path to read from instead
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    generate: GenerateConfig = GenerateConfig()
    monitor: MonitorConfig = MonitorConfig()


# Keys that change neither the parameters nor the data of any step, so that a resumed run may change them.
RESUMABLE = ("mesh", "eval", "checkpoint", "generate", "monitor", "model.remat", "model.unroll", "loss.chunk_len")


def defaults() -> Any:
    """The default config as a `ConfigDict`, with every key there is: recipes start from it."""
    from ml_collections import ConfigDict

    return ConfigDict(to_dict(Config()))


def build(source: Mapping[str, Any]) -> Config:
    """Builds a `Config` from a `ConfigDict` or nested dict, strictly.

    Raises:
      ConfigError: unknown key, wrong type, unknown choice, two durations at once, or values that contradict each other.
    """
    try:
        source = source.to_dict() if hasattr(source, "to_dict") else source
    except OSError as error:  # so late does ml_collections tell that it could not load the recipe
        raise ConfigError(f"no recipe to load: {str(error).strip().splitlines()[-1].strip()}") from None
    config = _build(Config, source, "")
    _check(config)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dict of a config dataclass; a duration becomes its four keys."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Duration):
            out |= dict(zip(spelled(field.name), dataclasses.astuple(value), strict=True))
        else:
            out[field.name] = to_dict(value) if dataclasses.is_dataclass(value) else value
    return out


def to_json(config: Config) -> str:
    """The resolved config as JSON; `build(json.loads(to_json(c))) == c`."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def diff(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Key -> (old value, new value), for the keys whose values differ."""
    old_flat, new_flat = dict(flatten(to_dict(old))), dict(flatten(to_dict(new)))
    return {key: (old_flat[key], new_flat[key]) for key in old_flat if old_flat[key] != new_flat[key]}


def keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Every config key, as 'a.b'. A duration counts once: only one of its four spellings can be set."""
    out = []
    for name, hint in get_type_hints(cls).items():
        is_section = dataclasses.is_dataclass(hint) and hint is not Duration
        out += keys(hint, f"{prefix}{name}.") if is_section else [prefix + name]
    return out


def spelled(name: str) -> list[str]:
    """The keys that a duration may be spelled as: 'total' -> 'total_steps', 'total_tokens', …"""
    return [f"{name}_{unit}" for unit in UNITS]


def nearest(name: str, known: Iterable[str], what: str = "did you mean") -> str:
    """' (did you mean X?)' for the closest of `known`, or '' when nothing is close."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" ({what} '{match[0]}'?)" if match else ""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of the leaves of nested dicts. Example: {'a': {'b': 1}} -> ('a.b', 1)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _build(cls: type, source: Mapping[str, Any], prefix: str) -> Any:
    hints = get_type_hints(cls)
    known = [key for name, hint in hints.items() for key in (spelled(name) if hint is Duration else [name])]
    for key in source:
        if key not in known:
            hint = nearest(key, known) or f"; known here: {', '.join(known)}"
            raise ConfigError(f"unknown config key '{prefix}{key}'{hint}")
    values = {}
    for name, hint in hints.items():
        if hint is Duration:
            values[name] = _duration(name, source, prefix)
        elif name in source:
            value = source[name]
            if dataclasses.is_dataclass(hint):
                if not isinstance(value, Mapping):
                    raise ConfigError(f"'{prefix}{name}' is a section of keys, got {value!r}")
                values[name] = _build(typing.cast(type, hint), value, f"{prefix}{name}.")
            else:
                values[name] = _convert(value, hint, prefix + name)
    return cls(**values)


def _duration(name: str, source: Mapping[str, Any], prefix: str) -> Duration:
    hints = get_type_hints(Duration)
    given = {}
    for unit, key in zip(UNITS, spelled(name), strict=True):
        if value := _convert(source.get(key, 0), hints[unit], prefix + key):
            given[unit] = value
    if len(given) > 1:
        listed = " and ".join(f"{prefix}{name}_{unit}={value:,}" for unit, value in given.items())
        raise ConfigError(f"two durations at once: {listed}; keep one and set the others to 0")
    return Duration(**given)


def _convert(value: Any, hint: Any, key: str) -> Any:
    """Checks `value` against a type hint; the only conversions are int -> float and list -> tuple."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in args:
            raise ConfigError(
                f"'{key}' must be one of {', '.join(map(str, args))}; got {value!r}{nearest(str(value), args)}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"'{key}' must be a tuple, got {value!r}")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(item, args[0], f"{key}[{i}]") for i, item in enumerate(value))
        if len(value) != len(args):
            raise ConfigError(f"'{key}' must have {len(args)} items, got {value!r}")
        return tuple(_convert(item, arg, f"{key}[{i}]") for i, (item, arg) in enumerate(zip(value, args, strict=True)))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"'{key}' must be {hint.__name__}, got {type(value).__name__} {value!r}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"'{key}' must be finite, got {value!r}")
    return value


_AT_LEAST_ONE = {
    *("model.num_layers", "model.embed_dim", "model.num_heads", "data.seq_len", "data.batch_size"),
    *("train.micro_batches", "checkpoint.keep_latest", "monitor.log_every_steps", "generate.max_new_tokens"),
    *("mesh.fsdp", "mesh.tensor", "mesh.dcn_data"),
}
_BELOW_ONE = {"model.dropout", "loss.label_smoothing", "data.eval_fraction", "optim.b1", "optim.b2", "optim.ema_decay"}


def _check(config: Config) -> None:
    """Refuses values that no run could use, whatever the data."""
    model, data, optim, train = config.model, config.data, config.optim, config.train
    for key, value in flatten(to_dict(config)):
        if not isinstance(value, int | float) or key in ("mesh.data", "seed"):
            continue
        least = 1 if key in _AT_LEAST_ONE else 0
        if value < least:
            raise ConfigError(f"'{key}' must {f'be at least {least}' if least else 'not be negative'}, got {value}")
        if key in _BELOW_ONE and value >= 1:
            raise ConfigError(f"'{key}' must be in [0, 1), got {value}")
    needs = {
        "'optim.eps' must be greater than 0": optim.eps > 0,
        f"'generate.top_p' must be in (0, 1], got {config.generate.top_p}": 0 < config.generate.top_p <= 1,
        f"'data.batch_size' ({data.batch_size}) must be a multiple of 'train.micro_batches' ({train.micro_batches})": (
            data.batch_size % train.micro_batches == 0
        ),
        f"'model.num_heads' ({model.num_heads}) must be a multiple of 'model.num_kv_heads' ({model.num_kv_heads})": (
            model.num_heads % (model.num_kv_heads or model.num_heads) == 0
        ),
        f"'model.embed_dim' ({model.embed_dim}) must be a multiple of 'model.num_heads' ({model.num_heads}), or set "
        "'model.head_dim'": bool(model.head_dim) or model.embed_dim % model.num_heads == 0,
        f"'model.max_len' ({model.max_len}) is shorter than 'data.seq_len' ({data.seq_len})": (
            model.position == "rope" or not model.max_len or model.max_len >= data.seq_len
        ),
        f"'data.path' is empty: data.format={data.format} needs a file, folder or glob": (
            data.format.startswith("builtin") or bool(data.path)
        ),
        f"'optim.decay_*' is read by schedule wsd only; 'optim.schedule' is {optim.schedule}": (
            optim.schedule == "wsd" or optim.decay == Duration()
        ),
        f"'optim.schedule' is {optim.schedule}, but no 'optim.decay_steps|_tokens|_examples|_epochs' is set": (
            optim.schedule != "wsd" or optim.decay != Duration()
        ),
        f"'data.task' is {data.task}, which does not fit 'data.format' ({data.format})": (
            (data.format, data.task) not in (("builtin_text", "chat"), ("builtin_instructions", "text"))
        ),
        "'data.packing' concat would cut answers from their questions; with 'data.task' chat use best_fit or pad": (
            (data.task, data.packing) != ("chat", "concat")
        ),
        f"'seed' must be in [-2^31, 2^31), got {config.seed}": -(2**31) <= config.seed < 2**31,
        "no training length: set one of 'train.total_steps|_tokens|_examples|_epochs'": train.total != Duration(),
    }
    if broken := [message for message, holds in needs.items() if not holds]:
        raise ConfigError(broken[0])
