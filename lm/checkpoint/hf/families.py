"""One table a family: keys of config.json <-> `model.*`, and tensors <-> parameters.

Each table is read in both directions: import follows it forwards, export backwards.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm.checkpoint.store import CheckpointError
from lm.config import ModelConfig, RopeScalingConfig, check_model, schema
from lm.config.schema import ConfigError
from lm.config.sections import ROPE_SCALING_KEYS
from lm.models import transformer
from lm.models.layers import RELATIVE_BUCKETS, RELATIVE_MAX_DISTANCE
from lm.types import Head

Json = dict[str, Any]

# Keys of `model` that training chooses and no folder says.
FREE = ("init", "dropout", "neftune_alpha", "pool", "dtype", "remat", "unroll")
_SIZES = ("num_layers", "embed_dim", "num_heads", "vocab_size", "max_len", "patch_size")
IMAGE_MODELS = ("vit", "mae")  # of model.kind
_OF_TEXT = ("vocab_size", "max_len")  # keys of `model` that models of images do not read
# Keys of config.json that may be null, which means off, or the usual size.
_OPTIONAL = (
    *("num_key_value_heads", "head_dim", "n_inner", "num_decoder_layers"),
    *("final_logit_softcapping", "attn_logit_softcapping"),
)
# Keys of config.json that change nothing that is computed here, or repeat another key.
_HARMLESS = re.compile(
    r"_name_or_path|architectures|(torch_)?dtype|transformers_version|use_cache|initializer_(range|factor)|.*_token_id|.*dropout(_prob|_rate)?"
    r"|.*pdrop|auto_map|id2label|label2id|num_labels|task_specific_params|summary_.*|n_ctx|max_window_layers|use_sliding_window"
    r"|layer_types|_?sliding_window_pattern|rope_.*|cache_implementation|output_.*|return_dict|is_llama_config|model_type"
    r"|transformers\.js_config|torchscript|_attn_implementation.*|problem_type|chunk_size_feed_forward|gradient_checkpointing|pretraining_tp"
)


class Tensor(NamedTuple):
    """A tensor of the files, and the parameter that it holds, or a layer of it, or that holds a part of it.

    Attributes:
      path: the parameter.
      name: the tensor; '{}' stands for the number of the layer in a parameter that stacks layers.
      transposed: whether the tensor is [out, in], as in torch's Linear.
      part: which part of one of the tensor's axes the parameter is, from 0.
      parts: number of those, of equal size.
      axis: the axis of the tensor that has the parts.
      leading: number of axes of size 1 that the tensor has before those of the parameter.
      patch: side of the patches, where the tensor is the kernel [out, channels, patch, patch] of a convolution over
        them and the parameter [patch * patch * channels, out]; 0 = it is none.
    """

    path: str
    name: str
    transposed: bool = False
    part: int = 0
    parts: int = 1
    axis: int = -1
    leading: int = 0
    patch: int = 0

    def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor for a parameter (of one layer) of this shape."""
        if self.patch:
            return (shape[1], shape[0] // self.patch**2, self.patch, self.patch)
        sizes = list(shape[::-1] if self.transposed else shape)
        if self.parts > 1:
            sizes[self.axis] *= self.parts
        return (1,) * self.leading + tuple(sizes)

    def file_index(self, index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Slices of the tensor that hold these slices (of one layer) of a parameter of this shape.

        Of a convolution's kernel they hold all rows, of which `from_file` takes those of the index.
        """
        if self.patch:
            return (index[1], *(slice(0, size) for size in self.file_shape(shape)[1:]))
        ranges = [each.indices(size) for each, size in zip(index, shape, strict=True)]
        found = [slice(start, stop) for start, stop, _ in ranges]
        if self.transposed:
            found, shape = found[::-1], shape[::-1]
        offset, own = self.part * shape[self.axis], found[self.axis]
        found[self.axis] = slice(own.start + offset, own.stop + offset)
        return (slice(0, 1),) * self.leading + tuple(found)

    def from_file(self, values: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        """The slices of the parameter (of one layer), of the values that `file_index` names."""
        if self.patch:
            return values.transpose(2, 3, 1, 0).reshape(-1, len(values))[index[0]]
        values = values.reshape(values.shape[self.leading :])
        return values.T if self.transposed else values

    def to_file(self, value: np.ndarray) -> np.ndarray:
        """The tensor, or its part, of a parameter (of one layer)."""
        if self.patch:
            return value.T.reshape(-1, self.patch, self.patch, len(value) // self.patch**2).transpose(0, 3, 1, 2)
        return (value.T if self.transposed else value)[(None,) * self.leading]


class Family(NamedTuple):
    """A family of published models.

    Attributes:
      model_type: `model_type` in config.json.
      architecture: `architectures` in config.json.
      prefix: of the names of all tensors but the head's; files of a model without a head lack it.
      keys: key of config.json -> key of `model`.
      defaults: key of config.json -> what `transformers` takes if it is absent, also of keys that only `more` reads;
        the others of `keys` must be there.
      expected: key of config.json -> the one value that is supported, also the default.
      fixed: key of `model` -> its value in this family.
      more: (config.json with its defaults, model so far) -> further keys of `model`.
      more_back: model -> further keys of config.json; the inverse of `more`.
      tensors: model -> the table of its tensors.
      ignored: regular expression of tensors that hold nothing learned.
      repeats: tensor -> the parameter whose values some files store in it once more.
      older: part of a tensor's name -> what older files have in its place.
      heads: (head of a task, model) -> (`architectures` with it, its tensors); None = a head has no place in the files.
      optional: tensors of heads, of which files may have some.
    """

    model_type: str
    architecture: str
    prefix: str
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    expected: Mapping[str, Any]
    fixed: Mapping[str, Any]
    more: Callable[[Json, ModelConfig], Json]
    more_back: Callable[[ModelConfig], Json]
    tensors: Callable[[ModelConfig], list[Tensor]]
    ignored: str = r"(?!)"
    repeats: Mapping[str, str] = {}
    older: Mapping[str, str] = {}
    heads: Callable[[Head, ModelConfig], tuple[str, list[Tensor]] | None] = lambda head, model: None
    optional: tuple[Tensor, ...] = ()


def of_config(theirs: Json, path: Path) -> Family:
    """The family of a config.json. Raises CheckpointError for one that is not supported."""
    name = theirs.get("model_type")
    if name not in FAMILIES:
        raise CheckpointError(f"{path}: model_type {name!r} is not supported; there are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def model_of(family: Family, theirs: Json, path: Path) -> ModelConfig:
    """The `model` section of a config.json, resolved.

    Args:
      family: of `of_config`.
      theirs: the contents of config.json.
      path: its path, for messages.

    Raises:
      CheckpointError: a key is missing, of the wrong type, or has a value that the model code does not support.
    """
    for key, value in {**family.expected, "quantization_config": None}.items():
        if (found := theirs.get(key, value)) != value and not (value is False and found is None):
            raise CheckpointError(f"{path}: {key} is {found!r}; of this family {value!r} is supported")
    values, given = dict(family.fixed), {**family.defaults, **theirs}
    for key, name in family.keys.items():
        if key not in given:
            raise CheckpointError(f"{path}: no {key}; expected it in a {family.model_type}")
        values[name] = value = 0 if given[key] is None and key in _OPTIONAL else given[key]
        if isinstance(value, int | float) and value < (1 if name in _SIZES else 0):
            raise CheckpointError(f"{path}: {key} is {value!r}; expected at least {int(name in _SIZES)}")
    try:
        model = schema.build_section(ModelConfig, values, "model.")
        model = schema.build_section(ModelConfig, values | family.more(given, model), "model.")
        check_model(model)
        return transformer.resolve(model, vocab_size=1, seq_len=model.max_len)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path} cannot be read as a {family.model_type}: {error!r}") from None


def config_of(family: Family, model: ModelConfig) -> Json:
    """The config.json of a model, which must be of this family's shape: see `of_model`."""
    values = schema.to_dict(model)
    own = {key: values[name] for key, name in family.keys.items()}
    about = {"architectures": [family.architecture], "model_type": family.model_type}
    return about | own | dict(family.expected) | family.more_back(model)


def of_model(model: ModelConfig) -> Family:
    """The family whose config.json can say all of a model's shape.

    Args:
      model: resolved.

    Raises:
      ConfigError: there is none; names the keys that differ from each family.
    """
    reasons = []
    for family in FAMILIES.values():
        try:
            back = model_of(family, config_of(family, model), Path("config.json"))
            back = dataclasses.replace(back, **{key: getattr(model, key) for key in PIXELS})  # are in another file
        except CheckpointError as error:
            reasons.append(f"  {family.model_type}: {error}")
            continue
        differs = differences(model, back)
        if not differs:
            return family
        named = (f"model.{key} is {mine!r}, expected {theirs!r}" for key, (mine, theirs) in differs.items())
        reasons.append(f"  {family.model_type}: {', '.join(named)}")
    raise ConfigError("this model is of no published family's shape:\n" + "\n".join(reasons))


def differences(model: ModelConfig, other: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Key -> (value in `model`, value in `other`), of the keys that say what a model computes."""
    mine, theirs = (dict(schema.flatten(schema.to_dict(each))) for each in (model, other))
    unread = (*FREE, *(_OF_TEXT if other.kind in IMAGE_MODELS else ()))
    return {key: (mine[key], theirs[key]) for key in mine if key not in unread and mine[key] != theirs[key]}


def adopt(model: ModelConfig, there: ModelConfig, where: Any) -> ModelConfig:
    """`there`, with the keys of `model` that training chooses.

    Args:
      model: of a config that starts from `where`. A key with its default takes the value from there.
      there: the published model.
      where: its place, for messages.

    Raises:
      ConfigError: a key is set to something else, other than a larger vocabulary.
    """
    usual, mine = (dict(schema.flatten(schema.to_dict(each))) for each in (ModelConfig(), model))
    conflicts = {key: pair for key, pair in differences(model, there).items() if mine[key] != usual[key]}
    changes = {key: getattr(model, key) for key in FREE}
    if (model.kind, there.kind) == ("vit", "mae"):  # its encoder, whose positions learn from now on
        without: Any = dict.fromkeys(_OF_DECODER, 0)
        there = dataclasses.replace(there, kind="vit", position="learned", **without)
        conflicts = {key: pair for key, pair in differences(model, there).items() if mine[key] != usual[key]}
    if there.kind in IMAGE_MODELS:
        changes |= {key: getattr(model, key) for key in _OF_TEXT}
    if model.vocab_size > there.vocab_size:
        conflicts.pop("vocab_size", None)
        changes["vocab_size"] = model.vocab_size
    if (model.kind, there.kind) == ("prefix_decoder", "decoder"):
        conflicts.pop("kind", None)
        changes["kind"] = model.kind
    refuse_conflicts("model", conflicts, where)
    return dataclasses.replace(there, **changes)


def adopt_task(task: Any, there: Mapping[str, Any], where: Any) -> Any:
    """The options of a run's task with those that the published model says, as far as the task has them.

    Args:
      task: of a config that starts from `where`. An option with its default takes the value from there.
      there: option -> value.
      where: its place, for messages.

    Raises:
      ConfigError: an option is set to something else.
    """
    usual = type(task)()
    pairs = {key: (getattr(task, key), value) for key, value in there.items() if hasattr(task, key)}
    conflicts = {key: pair for key, pair in pairs.items() if pair[0] not in (pair[1], getattr(usual, key))}
    refuse_conflicts("task", conflicts, where)
    return dataclasses.replace(task, **{key: value for key, (_, value) in pairs.items()})


def refuse_conflicts(section: str, conflicts: Mapping[str, tuple[Any, Any]], where: Any) -> None:
    """Raises ConfigError if there are any: key of the section -> (value of the config, value in `where`)."""
    if conflicts:
        lines = "\n".join(
            f"  {section}.{key}: {mine!r} here, {theirs!r} there" for key, (mine, theirs) in conflicts.items()
        )
        raise ConfigError(f"'init_from': the {section} of {where} is another one:\n{lines}\nremove these keys")


def with_head(family: Family, head: Head | None, model: ModelConfig) -> tuple[str, list[Tensor]]:
    """`architectures` in config.json of a model with this head, and the head's tensors.

    Raises:
      ConfigError: the family's files have no place for it.
    """
    if head is None:
        return family.architecture, []
    if not (found := family.heads(head, model)):
        raise ConfigError(f"the files of a {family.model_type} have no place for this task's head ({head.kind})")
    return found


def not_read(family: Family, theirs: Json) -> list[str]:
    """Keys of a config.json of which it is not known what they mean."""
    known = {*family.keys, *family.defaults, *family.expected, *_READ, "quantization_config"}
    return sorted(key for key in theirs if key not in known and not _HARMLESS.fullmatch(key))


# Keys that `more` of some family reads, beside those that have a default.
_READ = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor")

# Rope ----------------------------------------------------------------------------------------------------------------

# rope_type -> keys that rope_parameters and model.rope_scaling have alike
_ROPE_KEYS = {
    kind: [key for key in keys if key not in ("original_len", "magnitude")]
    for kind, keys in ROPE_SCALING_KEYS.items()
    if kind != "none"
}
_ROPE_ALSO = ("type", "rope_type", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor")
_MAGNITUDE = ("attention_factor", "mscale", "mscale_all_dim")


def _rope_parameters(theirs: Json) -> Json:
    """`rope_parameters`, or what older files have instead of it; with the keys that may stand outside of it."""
    given = dict(theirs.get("rope_scaling") or theirs.get("rope_parameters") or {})
    if nested := [key for key, value in given.items() if isinstance(value, Mapping)]:
        raise ConfigError(f"rope_parameters differ by layer ({', '.join(nested)}), which this family does not support")
    return _outside(theirs) | given


def _outside(theirs: Json) -> Json:
    """The keys of a rope's parameters at the top of config.json."""
    return {key: theirs[key] for key in ("rope_theta", "partial_rotary_factor") if theirs.get(key) is not None}


def _rope(given: Json, max_len: int) -> Json:
    """`rope_theta` and `rope_scaling` of a rope's parameters.

    Raises:
      ConfigError: a kind of scaling, or a key of it, that is not supported.
    """
    theta = float(given.get("rope_theta", 10_000.0))
    kind = given.get("rope_type", given.get("type", "default"))
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"partial_rotary_factor is {given['partial_rotary_factor']}; supported is 1.0")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": {}}
    if kind not in _ROPE_KEYS:
        raise ConfigError(f"rope_type {kind!r} is not supported; there are default, {', '.join(_ROPE_KEYS)}")
    keys = _ROPE_KEYS[kind]
    extra = _MAGNITUDE if kind == "yarn" else ()
    if unknown := sorted(set(given) - {*keys, *_ROPE_ALSO, *extra, *(("finetuned",) if kind == "yarn" else ())}):
        raise ConfigError(f"rope_type {kind} with {unknown[0]}, which is not supported")
    usual = RopeScalingConfig()
    length = given.get("original_max_position_embeddings") or max_len
    section: Json = {"kind": kind}
    for key in keys:
        value = given.get(key)
        if key == "factor" and value is None:
            value = max_len / length
        default = getattr(usual, key)
        section[key] = default if value is None else value if isinstance(default, bool) else float(value)
    if kind == "dynamic":  # its length is the model's own, whatever else the file says
        length = max_len
    if kind != "linear":
        section["original_len"] = int(length)
    if kind == "yarn":
        section["magnitude"] = _yarn_magnitude(given, section["factor"])
    return {"rope_theta": theta, "rope_scaling": section}


def _yarn_magnitude(given: Json, factor: float) -> float:
    """`attention_factor`, or the quotient of two magnitudes (DeepSeek); 0 = the default."""
    import math

    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    mscales = [given.get("mscale"), given.get("mscale_all_dim")]
    if not all(mscales):
        return 0.0
    above, below = (0.1 * scale * math.log(factor) + 1.0 for scale in mscales if scale is not None)
    return above / below


def _rope_back(theta: float, scaling: RopeScalingConfig) -> Json:
    """`rope_parameters` of a model: the inverse of `_rope`."""
    if scaling.kind == "none":
        return {"rope_theta": theta, "rope_type": "default"}
    own = schema.to_dict(scaling)
    out: Json = {"rope_theta": theta, "rope_type": scaling.kind}
    out |= {key: own[key] for key in _ROPE_KEYS[scaling.kind]}
    if scaling.kind in ("llama3", "yarn"):
        out["original_max_position_embeddings"] = scaling.original_len
    if scaling.magnitude:
        out["attention_factor"] = scaling.magnitude
    return out


# Windows -------------------------------------------------------------------------------------------------------------


_KINDS = ("sliding_attention", "full_attention")


def _layer_types(theirs: Json, is_full: list[bool]) -> list[bool]:
    """Whether each layer has no window, by `layer_types`; `is_full` where that is absent."""
    given = theirs.get("layer_types")
    if given is None:
        return is_full
    if len(given) != len(is_full) or not set(given) <= set(_KINDS):
        raise ConfigError(f"layer_types is {given}; expected {len(is_full)} of {' or '.join(_KINDS)}")
    return [each == "full_attention" for each in given]


def _window(window: Any, is_full: list[bool]) -> Json:
    """`sliding_window` and `global_every`.

    Raises:
      ConfigError: layers with and without a window do not alternate in a regular way.
    """
    full = [i for i, each in enumerate(is_full, 1) if each]
    if len(full) == len(is_full):
        return {}
    if not isinstance(window, int) or window < 1:
        raise ConfigError(f"sliding_window is {window!r}, but layers have a window; expected a number of positions")
    every = full[0] if full else len(is_full) + 1
    if full != list(range(every, len(is_full) + 1, every)):
        raise ConfigError(f"layers without a window are {full}, from 1; supported is every n-th")
    return {"sliding_window": window, "global_every": every if full else 0}


def _window_back(model: ModelConfig) -> Json:
    if not model.sliding_window:
        return {"layer_types": ["full_attention"] * model.num_layers}
    every = model.global_every or model.num_layers + 1
    return {
        "sliding_window": model.sliding_window,
        "layer_types": [_KINDS[(layer + 1) % every == 0] for layer in range(model.num_layers)],
    }


# Llama and its relatives ---------------------------------------------------------------------------------------------


def _llama_tensors(model: ModelConfig) -> list[Tensor]:
    block = "decoder/layers"
    linear = {"attention/query": "self_attn.q_proj", "attention/key": "self_attn.k_proj"}
    linear |= {"attention/value": "self_attn.v_proj", "attention/out": "self_attn.o_proj"}
    linear |= {f"mlp/{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if model.norm_position == "both":
        norms = {
            **{"attention_norm": "input_layernorm", "attention_post_norm": "post_attention_layernorm"},
            **{"mlp_norm": "pre_feedforward_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
        }
    if model.qk_norm:
        norms |= {"attention/query_norm": "self_attn.q_norm", "attention/key_norm": "self_attn.k_norm"}
    biased = [f"attention/{name}" for name in ("query", "key", "value")] if model.qkv_bias else []
    out = [
        Tensor("embed/embedding", "model.embed_tokens.weight"),
        Tensor("decoder/final_norm/scale", "model.norm.weight"),
        *(Tensor(f"{block}/{a}/kernel", f"model.layers.{{}}.{b}.weight", True) for a, b in linear.items()),
        *(Tensor(f"{block}/{a}/bias", f"model.layers.{{}}.{linear[a]}.bias") for a in biased),
        *(Tensor(f"{block}/{a}/scale", f"model.layers.{{}}.{b}.weight") for a, b in norms.items()),
    ]
    if not model.tie_embeddings:
        out.append(Tensor("lm_head/kernel", "lm_head.weight", True))
    return out


def _llama_more(theirs: Json, model: ModelConfig) -> Json:
    return _rope(_rope_parameters(theirs), model.max_len)


def _mistral_more(theirs: Json, model: ModelConfig) -> Json:
    window = theirs["sliding_window"]
    return _llama_more(theirs, model) | _window(window, [window is None] * model.num_layers)


def _qwen_more(theirs: Json, model: ModelConfig) -> Json:
    window = theirs["sliding_window"] if theirs["use_sliding_window"] else None
    first = model.num_layers if window is None else theirs["max_window_layers"]
    is_full = _layer_types(theirs, [layer < first for layer in range(model.num_layers)])
    return _llama_more(theirs, model) | _window(window, is_full)


def _llama_back(model: ModelConfig) -> Json:
    out: Json = {"rope_parameters": _rope_back(model.rope_theta, model.rope_scaling)}
    out |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if model.rope_scaling.kind == "dynamic":
        out["max_position_embeddings"] = model.rope_scaling.original_len
    return out


def _windowed_back(model: ModelConfig) -> Json:
    return _llama_back(model) | _window_back(model)


def _qwen_back(model: ModelConfig) -> Json:
    return _windowed_back(model) | {"use_sliding_window": model.sliding_window > 0}


_LLAMA_KEYS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "embed_dim",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
_LLAMA_DEFAULTS = {
    **{"num_key_value_heads": 0, "head_dim": 0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    "max_position_embeddings": 2048,
}
_LLAMA_FIXED = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "use_bias": False}

_TIED = {"lm_head.weight": "embed/embedding"}
_LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    keys=_LLAMA_KEYS,
    defaults=_LLAMA_DEFAULTS,
    expected={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    fixed=_LLAMA_FIXED,
    more=_llama_more,
    more_back=_llama_back,
    tensors=_llama_tensors,
    ignored=r".*\.rotary_emb\.inv_freq",
    repeats=_TIED,
)
_MISTRAL = _LLAMA._replace(
    model_type="mistral",
    architecture="MistralForCausalLM",
    defaults={
        **_LLAMA_DEFAULTS,
        **{"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    },
    expected={"hidden_act": "silu"},
    more=_mistral_more,
    more_back=lambda model: _llama_back(model) | {"sliding_window": model.sliding_window or None},
)
_QWEN2 = _LLAMA._replace(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults={
        **_LLAMA_DEFAULTS,
        **{"num_key_value_heads": 32, "max_position_embeddings": 32_768, "sliding_window": 4096},
        **{"use_sliding_window": False, "max_window_layers": 28},
    },
    expected={"hidden_act": "silu"},
    fixed=_LLAMA_FIXED | {"qkv_bias": True},
    more=_qwen_more,
    more_back=_qwen_back,
)
_QWEN3 = _QWEN2._replace(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults={**_QWEN2.defaults, "head_dim": 128},
    expected={"hidden_act": "silu", "attention_bias": False},
    fixed=_LLAMA_FIXED | {"qk_norm": True},
)

# Gemma ---------------------------------------------------------------------------------------------------------------

_GEMMA_FIXED = {
    "position": "rope",
    "norm": "rmsnorm_plus_one",
    "norm_position": "both",
    "mlp": "geglu",
    "use_bias": False,
    "scale_embeddings": True,
}


def _gemma_window(theirs: Json, model: ModelConfig, every: int) -> Json:
    """Windows in all layers but every n-th, and the scale of the queries."""
    is_full = _layer_types(theirs, [(layer + 1) % every == 0 for layer in range(model.num_layers)])
    scale = float(theirs["query_pre_attn_scalar"]) ** -0.5
    return _window(theirs["sliding_window"], is_full) | {"query_scale": scale}


def _gemma2_more(theirs: Json, model: ModelConfig) -> Json:
    return _llama_more(theirs, model) | _gemma_window(theirs, model, 2)


def _gemma2_back(model: ModelConfig) -> Json:
    caps = {"final_logit_softcapping": model.logit_softcap, "attn_logit_softcapping": model.attention_softcap}
    off = {key: value or None for key, value in caps.items()}
    return _windowed_back(model) | off | {"query_pre_attn_scalar": _scalar(model)}


def _scalar(model: ModelConfig) -> float:
    """The number whose -0.5th power is the queries' scale."""
    scale = model.query_scale or model.head_dim**-0.5
    whole = round(scale**-2)
    return whole if whole**-0.5 == scale else scale**-2


def _gemma3_more(theirs: Json, model: ModelConfig) -> Json:
    given = theirs.get("rope_parameters") or {kind: {} for kind in _KINDS}
    if given.keys() != set(_KINDS):
        raise ConfigError(f"rope_parameters has {', '.join(given)}; expected {' and '.join(_KINDS)}")
    outside = {"rope_theta": 1e6, **_outside(theirs)}
    local = outside | {"rope_theta": theirs.get("rope_local_base_freq", 10_000.0)} | (given["sliding_attention"] or {})
    full = outside | (given["full_attention"] or {}) | (theirs.get("rope_scaling") or {})
    of_local = _rope(local, model.max_len)
    if of_local["rope_scaling"]:
        raise ConfigError(f"rope_type {local['rope_type']!r} in layers with a window is not supported")
    window = _gemma_window(theirs, model, theirs["sliding_window_pattern"])
    if "sliding_window" not in window:
        return _rope(full, model.max_len) | window
    every = window["global_every"] or model.num_layers + 1
    return {
        **_rope(full, model.max_len),
        **window,
        **{"global_every": every, "rope_local_theta": of_local["rope_theta"]},
    }


def _gemma3_back(model: ModelConfig) -> Json:
    local = {"rope_theta": model.rope_local_theta or model.rope_theta, "rope_type": "default"}
    full = _rope_back(model.rope_theta, model.rope_scaling)
    return _gemma2_back(model) | {"rope_parameters": {"full_attention": full, "sliding_attention": local}}


_GEMMA2 = _LLAMA._replace(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    keys=_LLAMA_KEYS | {"final_logit_softcapping": "logit_softcap", "attn_logit_softcapping": "attention_softcap"},
    defaults={
        **{"num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
        **{"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
        **{"max_position_embeddings": 8192, "sliding_window": 4096, "query_pre_attn_scalar": 256},
    },
    expected={
        **{"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
        "use_bidirectional_attention": False,
    },
    fixed=_GEMMA_FIXED,
    more=_gemma2_more,
    more_back=_gemma2_back,
)
_GEMMA3 = _GEMMA2._replace(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    defaults={
        **_GEMMA2.defaults,
        **{"final_logit_softcapping": None, "attn_logit_softcapping": None},
        **{"max_position_embeddings": 131_072, "sliding_window_pattern": 6},
    },
    fixed=_GEMMA_FIXED | {"qk_norm": True},
    more=_gemma3_more,
    more_back=_gemma3_back,
)

# GPT-2 ---------------------------------------------------------------------------------------------------------------


def _gpt2_tensors(model: ModelConfig) -> list[Tensor]:
    block, layer = "decoder/layers", "transformer.h.{}"
    linear = {"attention/out": "attn.c_proj", "mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"}
    norms = {f"{block}/attention_norm": f"{layer}.ln_1", f"{block}/mlp_norm": f"{layer}.ln_2"}
    norms["decoder/final_norm"] = "transformer.ln_f"
    out = [
        Tensor("embed/embedding", "transformer.wte.weight"),
        Tensor("embed/position_embedding", "transformer.wpe.weight"),
    ]
    for ours, theirs in (("kernel", "weight"), ("bias", "bias")):  # Conv1D: [in, out] as here, but q, k, v in one
        out += [Tensor(f"{block}/{a}/{ours}", f"{layer}.{b}.{theirs}") for a, b in linear.items()]
        for part, name in enumerate(("query", "key", "value")):
            out.append(Tensor(f"{block}/attention/{name}/{ours}", f"{layer}.attn.c_attn.{theirs}", False, part, 3))
    for ours, theirs in (("scale", "weight"), ("bias", "bias")):
        out += [Tensor(f"{a}/{ours}", f"{b}.{theirs}") for a, b in norms.items()]
    if not model.tie_embeddings:
        out.append(Tensor("lm_head/kernel", "lm_head.weight", True))
    return out


_GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    keys={
        "n_layer": "num_layers",
        "n_embd": "embed_dim",
        "n_head": "num_heads",
        "n_inner": "mlp_dim",
        "n_positions": "max_len",
        "vocab_size": "vocab_size",
        "layer_norm_epsilon": "norm_eps",
        "tie_word_embeddings": "tie_embeddings",
    },
    defaults={"n_inner": 0, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    expected={
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
    fixed={},
    more=lambda theirs, model: {},
    more_back=lambda model: {"bos_token_id": None, "eos_token_id": None},
    tensors=_gpt2_tensors,
    ignored=r".*\.attn\.(bias|masked_bias)",
    repeats=_TIED,
)

# BERT ----------------------------------------------------------------------------------------------------------------

_BERT_MLP = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}


def _bert_encoder(prefix: str) -> list[Tensor]:
    """Embeddings and blocks, which BERT and RoBERTa have alike."""
    block, layer = "encoder/layers", f"{prefix}.encoder.layer.{{}}"
    linear = {f"{block}/attention/{name}": f"{layer}.attention.self.{name}" for name in ("query", "key", "value")}
    linear |= {f"{block}/attention/out": f"{layer}.attention.output.dense"}
    linear |= {f"{block}/mlp/up": f"{layer}.intermediate.dense", f"{block}/mlp/down": f"{layer}.output.dense"}
    norms = {f"{block}/attention_norm": f"{layer}.attention.output", f"{block}/mlp_norm": f"{layer}.output"}
    norms["embed/norm"] = f"{prefix}.embeddings"
    tables = {"embedding": "word", "position_embedding": "position", "type_embedding": "token_type"}
    out = [Tensor(f"embed/{a}", f"{prefix}.embeddings.{b}_embeddings.weight") for a, b in tables.items()]
    out += [tensor for path, name in linear.items() for tensor in _dense(path, name)]
    return out + [tensor for path, name in norms.items() for tensor in _norm(path, f"{name}.LayerNorm")]


def _bert_tensors(model: ModelConfig) -> list[Tensor]:
    transform = "cls.predictions.transform"
    return [
        *_bert_encoder("bert"),
        *_dense("lm_transform/dense", f"{transform}.dense"),
        *_norm("lm_transform/norm", f"{transform}.LayerNorm"),
        Tensor("lm_transform/output_bias", "cls.predictions.bias"),
    ]


def _norm(path: str, name: str) -> list[Tensor]:
    return [Tensor(f"{path}/scale", f"{name}.weight"), Tensor(f"{path}/bias", f"{name}.bias")]


def _dense(path: str, name: str) -> list[Tensor]:
    return [Tensor(f"{path}/kernel", f"{name}.weight", True), Tensor(f"{path}/bias", f"{name}.bias")]


_OLDER_NORMS = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
_BERT_POOLER = _dense("head/pooler", "bert.pooler.dense")
_BERT_CLASSIFIER = _dense("head/classifier", "classifier")
_NEXT_SENTENCE = "cls.seq_relationship"


def _bert_heads(head: Head, model: ModelConfig) -> tuple[str, list[Tensor]] | None:
    if head.kind == "token":
        return "BertForTokenClassification", _BERT_CLASSIFIER
    if head.kind == "projection":  # for training only
        return "BertModel", []
    if model.pool != "first":
        return None
    if head.keeps_unembed:
        return "BertForPreTraining", _BERT_POOLER + _dense("head/classifier", _NEXT_SENTENCE)
    return "BertForSequenceClassification", _BERT_POOLER + _BERT_CLASSIFIER


def _bert_more(theirs: Json, model: ModelConfig) -> Json:
    if (activation := theirs["hidden_act"]) not in _BERT_MLP:
        raise ConfigError(f"hidden_act is {activation!r}; supported are {', '.join(_BERT_MLP)}")
    return {"mlp": _BERT_MLP[activation]}


def _bert_back(model: ModelConfig) -> Json:
    activation = {ours: theirs for theirs, ours in reversed(_BERT_MLP.items())}.get(model.mlp)
    return {"hidden_act": activation, "bos_token_id": None, "eos_token_id": None}


_BERT = Family(
    model_type="bert",
    architecture="BertForMaskedLM",
    prefix="bert.",
    keys={
        "num_hidden_layers": "num_layers",
        "hidden_size": "embed_dim",
        "num_attention_heads": "num_heads",
        "intermediate_size": "mlp_dim",
        "max_position_embeddings": "max_len",
        "vocab_size": "vocab_size",
        "layer_norm_eps": "norm_eps",
        "type_vocab_size": "sentence_types",
    },
    defaults={
        **{"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
        **{"max_position_embeddings": 512, "vocab_size": 30522, "layer_norm_eps": 1e-12, "hidden_act": "gelu"},
        "type_vocab_size": 2,
    },
    expected={
        **{"position_embedding_type": "absolute", "is_decoder": False},
        **{"add_cross_attention": False, "tie_word_embeddings": True},
    },
    fixed={"kind": "encoder", "norm_position": "post", "embed_norm": True, "lm_transform": True},
    more=_bert_more,
    more_back=_bert_back,
    tensors=_bert_tensors,
    ignored=r"(bert\.)?embeddings\.position_ids",
    repeats={
        "cls.predictions.decoder.weight": "embed/embedding",
        "cls.predictions.decoder.bias": "lm_transform/output_bias",
    },
    older=_OLDER_NORMS,
    heads=_bert_heads,
    # The last under a name of its own, so that no other task of two classes takes it for its classifier.
    optional=(*_BERT_POOLER, *_BERT_CLASSIFIER, *_dense("next_sentence", _NEXT_SENTENCE)),
)

# RoBERTa -------------------------------------------------------------------------------------------------------------


def _roberta_tensors(model: ModelConfig) -> list[Tensor]:
    return [
        *_bert_encoder("roberta"),
        *_dense("lm_transform/dense", "lm_head.dense"),
        *_norm("lm_transform/norm", "lm_head.layer_norm"),
        Tensor("lm_transform/output_bias", "lm_head.bias"),
    ]


_ROBERTA_POOLED = _dense("head/pooler", "classifier.dense") + _dense("head/classifier", "classifier.out_proj")


def _roberta_heads(head: Head, model: ModelConfig) -> tuple[str, list[Tensor]] | None:
    if head.kind == "token":
        return "RobertaForTokenClassification", _BERT_CLASSIFIER
    if head.kind == "projection":  # for training only
        return "RobertaModel", []
    if model.pool != "first" or head.keeps_unembed:
        return None
    return "RobertaForSequenceClassification", _ROBERTA_POOLED


def _roberta_more(theirs: Json, model: ModelConfig) -> Json:
    """Positions are counted from the row after that of `pad_token_id`, which is that of padding."""
    pad = theirs["pad_token_id"]
    if not isinstance(pad, int) or not 0 <= pad < model.max_len - 1:
        raise ConfigError(
            f"pad_token_id is {pad!r}; expected 0 to {model.max_len - 2}, as positions begin at the row after it"
        )
    return {"unused_positions": pad + 1, "max_len": model.max_len - pad - 1}


def _roberta_back(model: ModelConfig) -> Json:
    return {
        **{"pad_token_id": model.unused_positions - 1, "bos_token_id": None, "eos_token_id": None},
        "max_position_embeddings": model.max_len + model.unused_positions,
    }


_ROBERTA = _BERT._replace(
    model_type="roberta",
    architecture="RobertaForMaskedLM",
    prefix="roberta.",
    defaults={**_BERT.defaults, "vocab_size": 50265, "pad_token_id": 1},
    # The transform before the output projection has the exact GELU, whatever hidden_act says.
    expected={**_BERT.expected, "hidden_act": "gelu"},
    fixed={**_BERT.fixed, "mlp": "gelu_exact"},
    more=_roberta_more,
    more_back=_roberta_back,
    tensors=_roberta_tensors,
    ignored=r"(roberta\.)?embeddings\.position_ids",
    repeats={"lm_head.decoder.weight": "embed/embedding", "lm_head.decoder.bias": "lm_transform/output_bias"},
    heads=_roberta_heads,
    # The pooler, which no head of RoBERTa reads, under a name of its own: classification has another one.
    optional=(*_ROBERTA_POOLED, *_BERT_CLASSIFIER, *_dense("unused_pooler", "roberta.pooler.dense")),
)
# The same tensors; exported as a RoBERTa, which computes the same.
_XLM_ROBERTA = _ROBERTA._replace(
    model_type="xlm-roberta", architecture="XLMRobertaForMaskedLM", defaults={**_ROBERTA.defaults, "vocab_size": 30522}
)

# T5 ------------------------------------------------------------------------------------------------------------------

# (is_gated_act, dense_act_fn) -> model.mlp, and feed_forward_proj, which says both
_T5_MLP = {
    (False, "relu"): ("relu", "relu"),
    (True, "gelu_new"): ("geglu", "gated-gelu"),
    (True, "silu"): ("swiglu", "gated-silu"),
    (False, "gelu_new"): ("gelu", "gelu_new"),
    (False, "gelu"): ("gelu_exact", "gelu"),
}


def _t5_more(theirs: Json, model: ModelConfig) -> Json:
    """T5 v1.1, whose head is not tied, is told from T5 by `scale_decoder_outputs`, in older files by
    `tie_word_embeddings`, which newer ones set to true whatever the head."""
    if theirs["num_decoder_layers"] == 0:
        raise ConfigError("num_decoder_layers is 0; expected at least 1")
    first, _, last = theirs["feed_forward_proj"].rpartition("-")
    said = {
        "is_gated_act": first == "gated",
        "dense_act_fn": "gelu_new" if (first, last) == ("gated", "gelu") else last,
    }
    gated, activation = (own if (given := theirs[key]) is None else given for key, own in said.items())
    if first not in ("", "gated") or (gated, activation) not in _T5_MLP:
        known = ", ".join(name for _, name in _T5_MLP.values())
        raise ConfigError(
            f"feed_forward_proj is {theirs['feed_forward_proj']!r} (is_gated_act {gated}, dense_act_fn "
            f"{activation!r}); supported are {known}"
        )
    is_scaled = theirs["scale_decoder_outputs"]
    is_scaled = theirs["tie_word_embeddings"] is not False if is_scaled is None else is_scaled
    return {"mlp": _T5_MLP[gated, activation][0], "tie_embeddings": is_scaled, "scale_logits": is_scaled}


def _t5_back(model: ModelConfig) -> Json:
    return {
        "num_decoder_layers": model.decoder_layers or None,
        "feed_forward_proj": dict(_T5_MLP.values()).get(model.mlp),
        "tie_word_embeddings": model.scale_logits,
    }


def _t5_tensors(model: ModelConfig) -> list[Tensor]:
    attention = {"query": "q", "key": "k", "value": "v", "out": "o"}
    gated = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
    mlp = gated if model.mlp in ("geglu", "swiglu") else {"up": "wi", "down": "wo"}
    # Branch of a block -> its module, and the kernels in it.
    branches = {"attention": ("SelfAttention", attention), "cross_attention": ("EncDecAttention", attention)}
    branches["mlp"] = ("DenseReluDense", mlp)
    out = [Tensor("embed/embedding", "shared.weight")]
    for stack, names in (("encoder", ("attention", "mlp")), ("decoder", tuple(branches))):
        for number, branch in enumerate(names):
            path, layer = f"{stack}/layers/{branch}", f"{stack}.block.{{}}.layer.{number}"
            module, kernels = branches[branch]
            out.append(Tensor(f"{path}_norm/scale", f"{layer}.layer_norm.weight"))
            out += [Tensor(f"{path}/{a}/kernel", f"{layer}.{module}.{b}.weight", True) for a, b in kernels.items()]
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        out.append(Tensor(f"{stack}/relative_bias/table", bias))
        out.append(Tensor(f"{stack}/final_norm/scale", f"{stack}.final_layer_norm.weight"))
    if not model.tie_embeddings:
        out.append(Tensor("lm_head/kernel", "lm_head.weight", True))
    return out


_T5 = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    prefix="",
    keys={
        "num_layers": "num_layers",
        "num_decoder_layers": "decoder_layers",
        "d_model": "embed_dim",
        "num_heads": "num_heads",
        "d_kv": "head_dim",
        "d_ff": "mlp_dim",
        "vocab_size": "vocab_size",
        "n_positions": "max_len",
        "layer_norm_epsilon": "norm_eps",
    },
    defaults={
        **{"num_layers": 6, "num_decoder_layers": None, "d_model": 512, "num_heads": 8, "d_kv": 64, "d_ff": 2048},
        **{"vocab_size": 32128, "n_positions": 512, "layer_norm_epsilon": 1e-6, "feed_forward_proj": "relu"},
        **{"is_gated_act": None, "dense_act_fn": None, "scale_decoder_outputs": None, "tie_word_embeddings": True},
    },
    expected={
        **{"is_encoder_decoder": True, "is_decoder": False},
        "relative_attention_num_buckets": RELATIVE_BUCKETS,
        "relative_attention_max_distance": RELATIVE_MAX_DISTANCE,
    },
    fixed={
        **{"kind": "encoder_decoder", "position": "relative", "norm": "rmsnorm", "use_bias": False},
        "query_scale": 1.0,  # the factor is in the query's kernel
    },
    more=_t5_more,
    more_back=_t5_back,
    tensors=_t5_tensors,
    # Which no version of T5 reads: the decoder's attention to the encoder has no bias.
    ignored=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    repeats={
        **dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "embed/embedding"),
        **_TIED,
    },
)

# ViT and ViT-MAE -----------------------------------------------------------------------------------------------------

PREPROCESSOR = "preprocessor_config.json"
PIXELS = ("pixel_mean", "pixel_deviation")  # keys of `model` that this file says, and not config.json
_OF_DECODER = ("decoder_layers", "decoder_dim", "decoder_heads", "decoder_mlp_dim")
_RESCALE = 1 / 255


def images_of(theirs: Json, model: ModelConfig, path: Path) -> Json:
    """Options of an image task by a config.json: `image_shape`, and of ViT-MAE `target`.

    Args:
      theirs: the contents of config.json.
      model: of `model_of`.
      path: its path, for messages.

    Raises:
      CheckpointError: an image is of no size that the patches divide.
    """
    family, size = FAMILIES[theirs["model_type"]], theirs.get("image_size", 224)
    shape = (*(size if isinstance(size, list) and len(size) == 2 else [size] * 2), theirs.get("num_channels", 3))
    whole = all(isinstance(each, int) for each in shape)
    if not whole or shape[2] not in (1, 3) or any(each < 1 or each % model.patch_size for each in shape[:2]):
        raise CheckpointError(
            f"{path}: image_size is {size!r}, num_channels {shape[2]!r}; expected multiples of patch_size "
            f"({model.patch_size}), and 1 channel or 3"
        )
    if family.model_type == "vit":
        return {"image_shape": shape}
    return {"image_shape": shape, "target": "normalised_unbiased" if theirs.get("norm_pix_loss") else "pixels"}


def images_back(task: Any) -> Json:
    """The inverse of `images_of`: keys of config.json by the options of an image task.

    Raises:
      ConfigError: the task's target is none of ViT-MAE.
    """
    *size, channels = task.image_shape
    out: Json = {"image_size": size[0] if size[0] == size[1] else size, "num_channels": channels}
    if hasattr(task, "target"):
        if task.target == "normalised":
            raise ConfigError(
                "task.target is normalised, by the biased variance, which config.json of a vit_mae cannot say; set "
                "task.target=normalised_unbiased, which is nearly the same, or pixels"
            )
        out |= {"norm_pix_loss": task.target == "normalised_unbiased", "mask_ratio": task.mask_rate}
    return out


def pixels_of(processor: Json, path: Path) -> Json:
    """`model.pixel_mean` and `model.pixel_deviation` of a preprocessor_config.json.

    Raises:
      CheckpointError: pixels are computed in another way.
    """
    if (
        processor.get("do_rescale", True) is not True
        or abs(processor.get("rescale_factor", _RESCALE) - _RESCALE) > 1e-9
    ):
        raise CheckpointError(
            f"{path}: do_rescale is {processor.get('do_rescale', True)!r}, rescale_factor "
            f"{processor.get('rescale_factor', _RESCALE)!r}; supported are pixels divided by 255"
        )
    mean, deviation = processor.get("image_mean", 0.5), processor.get("image_std", 0.5)
    if processor.get("do_normalize", True) is not True:
        mean, deviation = 0.0, 1.0
    try:
        rows = [tuple(map(float, each if isinstance(each, list) else [each])) for each in (mean, deviation)]
    except (TypeError, ValueError):
        rows = [(), ()]
    if len(rows[0]) == 1 or len(rows[1]) == 1:
        rows = [row * max(map(len, rows)) if len(row) == 1 else row for row in rows]
    if len(rows[0]) not in (1, 3) or len(rows[0]) != len(rows[1]) or not all(x > 0 for x in rows[1]):
        raise CheckpointError(
            f"{path}: image_mean is {mean!r}, image_std {deviation!r}; expected a number for each channel, above 0 in "
            "image_std"
        )
    if all(len(set(row)) == 1 for row in rows):
        rows = [row[:1] for row in rows]
    return dict(zip(PIXELS, rows, strict=True))


def pixels_back(model: ModelConfig, shape: tuple[int, int, int]) -> Json:
    """The preprocessor_config.json of a model of images of this shape; the inverse of `pixels_of`."""
    height, width, channels = shape
    mean, deviation = (
        list(row) * (channels if len(row) == 1 else 1) for row in (model.pixel_mean, model.pixel_deviation)
    )
    return {
        **{"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}},
        **{"do_resize": True, "resample": 2, "do_rescale": True, "rescale_factor": _RESCALE},
        **{"do_normalize": True, "image_mean": mean, "image_std": deviation},
    }


def _vit_blocks(block: str, layer: str) -> list[Tensor]:
    linear = {f"attention/{name}": f"attention.attention.{name}" for name in ("query", "key", "value")}
    linear |= {"attention/out": "attention.output.dense", "mlp/up": "intermediate.dense", "mlp/down": "output.dense"}
    norms = {"attention_norm": "layernorm_before", "mlp_norm": "layernorm_after"}
    out = [tensor for path, name in linear.items() for tensor in _dense(f"{block}/{path}", f"{layer}.{name}")]
    return out + [tensor for path, name in norms.items() for tensor in _norm(f"{block}/{path}", f"{layer}.{name}")]


def _vit_tensors(model: ModelConfig) -> list[Tensor]:
    patches = "vit.embeddings.patch_embeddings.projection"
    return [
        Tensor("embed/cls", "vit.embeddings.cls_token", leading=2),
        Tensor("embed/positions", "vit.embeddings.position_embeddings", leading=1),
        Tensor("embed/patches/kernel", f"{patches}.weight", patch=model.patch_size),
        Tensor("embed/patches/bias", f"{patches}.bias"),
        *_vit_blocks("encoder/layers", "vit.encoder.layer.{}"),
        *_norm("encoder/final_norm", "vit.layernorm"),
    ]


def _mae_tensors(model: ModelConfig) -> list[Tensor]:
    return [
        *_vit_tensors(model),
        *_dense("decoder_embed", "decoder.decoder_embed"),
        Tensor("mask_token", "decoder.mask_token", leading=2),
        Tensor("decoder_positions", "decoder.decoder_pos_embed", leading=1),
        *_vit_blocks("decoder/layers", "decoder.decoder_layers.{}"),
        *_norm("decoder/final_norm", "decoder.decoder_norm"),
        *_dense("pixels", "decoder.decoder_pred"),
    ]


_VIT_CLASSIFIER = _dense("head/classifier", "classifier")


def _vit_heads(head: Head, model: ModelConfig) -> tuple[str, list[Tensor]] | None:
    if head.kind == "projection":  # for training only
        return "ViTModel", []
    return ("ViTForImageClassification", _VIT_CLASSIFIER) if model.pool == "cls" else None


def _vit_more(theirs: Json, model: ModelConfig) -> Json:
    if theirs["pooler_output_size"] not in (None, model.embed_dim):
        raise ConfigError(f"pooler_output_size is {theirs['pooler_output_size']!r}; supported is hidden_size")
    return _bert_more(theirs, model)


def _mae_more(theirs: Json, model: ModelConfig) -> Json:
    sizes = {key: theirs[key] for key in _MAE_DECODER}
    if min(sizes.values()) < 1:
        raise ConfigError(f"the decoder has the sizes {sizes}; expected each to be at least 1")
    width, heads = model.decoder_dim, model.decoder_heads
    if width % heads:
        raise ConfigError(f"decoder_hidden_size ({width}) is no multiple of decoder_num_attention_heads ({heads})")
    return _bert_more(theirs, model)


def _vit_back(model: ModelConfig) -> Json:
    return {"hidden_act": _bert_back(model)["hidden_act"]}


_VIT = Family(
    model_type="vit",
    architecture="ViTModel",
    prefix="vit.",
    keys={
        "num_hidden_layers": "num_layers",
        "hidden_size": "embed_dim",
        "num_attention_heads": "num_heads",
        "intermediate_size": "mlp_dim",
        "layer_norm_eps": "norm_eps",
        "patch_size": "patch_size",
    },
    defaults={
        **{"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
        **{"layer_norm_eps": 1e-12, "patch_size": 16, "hidden_act": "gelu", "image_size": 224, "num_channels": 3},
        **{"pooler_output_size": None, "encoder_stride": 16},  # the last of a decoder that is refused
    },
    expected={"qkv_bias": True, "pooler_act": "tanh"},
    fixed={"kind": "vit", "position": "learned"},
    more=_vit_more,
    more_back=_vit_back,
    tensors=_vit_tensors,
    ignored=r"(vit\.)?embeddings\.mask_token",  # which is for pre-training that is not supported
    heads=_vit_heads,
    optional=(*_dense("head/pooler", "vit.pooler.dense"), *_VIT_CLASSIFIER),
)
_MAE_DECODER = {
    "decoder_num_hidden_layers": "decoder_layers",
    "decoder_hidden_size": "decoder_dim",
    "decoder_num_attention_heads": "decoder_heads",
    "decoder_intermediate_size": "decoder_mlp_dim",
}
_VIT_MAE = _VIT._replace(
    model_type="vit_mae",
    architecture="ViTMAEForPreTraining",
    keys={**_VIT.keys, **_MAE_DECODER},
    defaults={
        **{key: value for key, value in _VIT.defaults.items() if key not in ("pooler_output_size", "encoder_stride")},
        **{"decoder_num_hidden_layers": 8, "decoder_hidden_size": 512, "decoder_num_attention_heads": 16},
        **{"decoder_intermediate_size": 2048, "norm_pix_loss": False},
    },
    expected={"qkv_bias": True},
    fixed={"kind": "mae", "position": "fixed"},
    more=_mae_more,
    tensors=_mae_tensors,
    ignored=r"(?!)",
    older={"decoder.decoder_layers.": "decoder.decoder_encoder.layer."},  # which transformers 5 writes
    heads=lambda head, model: None,
    optional=(),
)

# By model_type; export takes the first that fits.
_TEXT = (_GPT2, _LLAMA, _MISTRAL, _QWEN2, _QWEN3, _GEMMA2, _GEMMA3, _BERT, _ROBERTA, _XLM_ROBERTA, _T5)
_ALL = (*_TEXT, _VIT, _VIT_MAE)
FAMILIES = {family.model_type: family for family in _ALL}
