"""Reads and writes published models, and compares them with `transformers`.

    python tools/hf.py import FOLDER OUT [--tokenizer=FILE]  OUT = a run folder that tools/chat.py and init_from read
    python tools/hf.py import FOLDER OUT --task=contrastive_pairs --pool=mean    a sentence encoder, such as MiniLM
    python tools/hf.py import FOLDER OUT --task=image_classification --pool=cls  a ViT, or the encoder of a ViT-MAE
    python tools/hf.py import ADAPTER OUT [--base=FOLDER]    LoRA of the library peft, on the model it belongs to
    python tools/hf.py export RUN OUT [--dtype=bfloat16]     OUT = config.json, generation_config.json, safetensors
    python tools/hf.py export RUN OUT --adapter              OUT = LoRA alone, for the library peft
    python tools/hf.py verify FOLDER [--text=FILE]           logits and hidden states here and in transformers

FOLDER may be a GGUF file, RUN may be RUN@best or RUN@STEP. A run can also start from a published model directly, with
--config.init_from=hf:FOLDER.
`verify` needs torch and transformers: pip install -e '.[hf,peer]'.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from lm import command_line
from lm.terminal import say, stop

_TOKENIZER = flags.DEFINE_string("tokenizer", "", "import: the tokenizer, a file or folder; '' = that of FOLDER.")
_TASK = flags.DEFINE_string("task", "causal_lm", "import: task.name of the run.")
_POOL = flags.DEFINE_enum("pool", "first", ["first", "mean", "last", "cls"], "import: model.pool of the run.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "export: of the tensors.")
_ADAPTER = flags.DEFINE_bool("adapter", False, "export: LoRA and the head alone, as the library peft reads them.")
_BASE = flags.DEFINE_string("base", "", "an adapter's published model, if RUN or FOLDER names none, or it was moved.")
_TEXT = flags.DEFINE_string("text", "", "verify: a file of text; '' = docstrings of Python's library.")
_POSITIONS = flags.DEFINE_integer("positions", 1024, "verify: positions in a row.", lower_bound=16)

# What `verify` accepts: error of the logits relative to the largest, and KL divergence in nats.
MAX_ERROR, MAX_KL = 1e-5, 1e-9
# Tasks whose heads have a place in the files of some family.
_WITH_HEADS = (
    *("classification", "tagging", "masked_lm_pairs"),
    *(
        "contrastive_sentences",
        "contrastive_pairs",
        "contrastive_triples",
        "contrastive_images",
        "image_classification",
    ),
)


def main(argv: list[str]) -> None:
    """Runs the command."""
    from lm import run as run_lib
    from lm.config.schema import ConfigError

    command, *rest = argv[1:] or [""]
    names = {"import": ("FOLDER", "OUT"), "export": ("RUN", "OUT"), "verify": ("FOLDER",)}
    with command_line.one_line_errors():
        if command not in names:
            raise ConfigError(f"found command '{command}', expected {', '.join(names)}")
        given = command_line.arguments([argv[0], *rest], *names[command])
        if command != "verify":
            run_lib.check_new(Path(given[1]))
        if command == "import":
            import_model(
                given[0] + f",{_BASE.value}" * bool(_BASE.value),
                Path(given[1]),
                _TOKENIZER.value,
                _TASK.value,
                _POOL.value,
            )
        elif command == "export":
            export_run(given[0], Path(given[1]), _DTYPE.value, _ADAPTER.value, _BASE.value)
        else:
            verify(Path(given[0]), _TEXT.value, _POSITIONS.value)


def import_model(folder: str, out: Path, tokenizer: str, task: str, pool: str) -> None:
    """Writes a published model as a run folder with one checkpoint, of step 0.

    What the folder lacks of the head of the task is initialised, and said.

    Raises:
      ConfigError: the task is for models of another kind.
    """
    from lm import param_paths, tasks
    from lm import run as run_lib
    from lm.checkpoint import hf, init_from
    from lm.config.schema import ConfigError

    source = tasks.default_config(task)
    source.init_from = hf.PREFIX + folder
    source.tokenizer.path = tokenizer
    source.model.pool = pool
    source.data.packing = tasks.TASKS[task].packing[0]
    published = hf.open_model(folder)
    kinds = {"vit", "mae"} if published.model.kind == "mae" else {published.model.kind}  # its encoder is a ViT
    fitting = [name for name, each in tasks.TASKS.items() if kinds & {*each.models}]
    if task not in fitting:
        raise ConfigError(
            f"{folder} has model.kind={published.model.kind}; --task is {task}, expected {', '.join(fitting)}"
        )
    if published.task:
        source.model.kind = next(kind for kind in tasks.TASKS[task].models if kind in kinds)
        source.task.image_shape = published.task["image_shape"]
        if hasattr(source.task, "labels"):
            source.task.labels = _labels(published)
    else:
        for name in ("seq_len", "target_len"):
            source.data[name] = min(source.data[name], published.model.max_len)
    source.train.total_steps = 1
    if published.adapter:
        source.optim.lr_rules = ((".*/lora_.*|head/.*", 1.0), (".*", 0.0))
    source.init_rules = ((".*", init_from.REINIT),)
    paths = param_paths.flatten(run_lib.plan(tasks.build_config(source), None).abstract_params)
    fresh = [(path, init_from.REINIT) for path in paths if path.startswith("head/") and path not in published.table]
    source.init_rules = (*fresh, (".*", init_from.KEEP))
    planned, _, params = run_lib.init_model(tasks.build_config(source))
    assert planned.init is not None
    say(init_from.describe(planned.origin_of, planned.unused, planned.init, planned.cfg.model, planned.cfg.model))
    about = {"tokenizer_hash": planned.tokenizer.hash if planned.tokenizer else "", "data": {"example": 0}}
    info = about | {key: getattr(planned, key) for key in ("published_vocab", "published_adapter")}
    size = run_lib.write_checkpoint(out, planned.cfg, params, planned.tokenizer, 0, info)
    say(f"{out}: {size / 2**20:,.1f} MiB of parameters")


def _labels(published: Any) -> tuple[str, ...]:
    """The labels of a classifier, as config.json names them; two where the folder has no classifier."""
    classifier = "head/classifier/bias"
    count = published.shapes[classifier][0] if classifier in published.table else 2
    named = {int(key): str(name) for key, name in (published.tensors.config.get("id2label") or {}).items()}
    return tuple(named.get(number, f"LABEL_{number}") for number in range(count))


def export_run(run: str, out: Path, dtype: str, as_adapter: bool, base: str) -> None:
    """Writes a run's parameters in the format of the family whose shape its model has, and a model card.

    Args:
      run: the run.
      out: a new folder.
      dtype: of the tensors.
      as_adapter: whether to write LoRA and the head alone; otherwise LoRA is merged.
      base: of an adapter: the published model that it belongs to, as `lm.checkpoint.hf.open_model`; '' = that of the
        run's `init_from`.

    Raises:
      ConfigError: there is no such family, its files have no place for the head of the run's task, or no base is known.
    """
    import jax.numpy as jnp

    from lm import param_paths, tasks
    from lm import run as run_lib
    from lm.checkpoint import hf
    from lm.checkpoint.hf import card, export, export_adapter, families
    from lm.config.schema import ConfigError
    from lm.models import adapters
    from lm.tracking import files

    if base and not as_adapter:
        raise ConfigError("--base is the model that LoRA belongs to; it needs --adapter, a whole model has no base")
    saved, (cfg, _, params, tokenizer) = run_lib.load_checkpoint(run)
    base = base or cfg.init_from.removeprefix(hf.PREFIX) * cfg.init_from.startswith(hf.PREFIX)
    if as_adapter and not base:
        raise ConfigError(f"{run} does not say which published model it started from; name it with --base=FOLDER")
    if cfg.adapter.kind == "lora" and not as_adapter:
        params = adapters.merge(params, cfg.adapter)
    model, head = cfg.model, tasks.task_of(cfg).head(cfg)
    if head and cfg.task.name not in _WITH_HEADS:
        raise ConfigError(
            f"a run of {cfg.task.name} is not exported: of tasks with a head, {', '.join(_WITH_HEADS)} are"
        )
    if head and head.kind == "projection":
        params = {name: part for name, part in params.items() if name != "head"}
        say("the projection head, which is for training only, is left out")
    about: dict[str, Any] = {}
    others: dict[str, bytes] = {}
    if model.kind in families.IMAGE_MODELS:
        model, params = _with_stored_positions(model, params, cfg.task.image_shape)
        about = families.images_back(cfg.task)
        pixels = families.pixels_back(model, cfg.task.image_shape)
        others[families.PREPROCESSOR] = f"{json.dumps(pixels, indent=2)}\n".encode()
    if head and (labels := getattr(cfg.task, "labels", ())):
        about |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    opened = hf.open_model(base) if as_adapter else None
    model_type = (opened.family if opened else families.of_model(model)).model_type
    if tokenizer:
        ends = tasks.task_of(cfg).ends(tokenizer)
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        if model.kind == "encoder_decoder":
            ids["decoder_start_token_id"] = tokenizer.bos_id
        generate = cfg.generate
        about |= ids
        generation = ids | {"eos_token_id": list(ends), "max_new_tokens": generate.max_new_tokens}
        if generate.temperature:
            sampled = {"temperature": generate.temperature, "top_p": generate.top_p, "top_k": generate.top_k}
            generation |= {"do_sample": True} | sampled
        if generate.min_new_tokens:
            generation["min_new_tokens"] = generate.min_new_tokens
        if generate.repetition_penalty != 1.0:
            generation["repetition_penalty"] = generate.repetition_penalty
        if generate.stop:
            generation["stop_strings"] = list(generate.stop)
        others = export.tokenizer_files(tokenizer, model_type)
    if tokenizer and model.kind != "encoder" and not as_adapter:
        others["generation_config.json"] = f"{json.dumps(generation, indent=2)}\n".encode()
    # Rows after the tokenizer's ids were never trained, unless they came from a published model.
    rows = max(tokenizer.vocab_size if tokenizer else 0, saved.info.get("published_vocab", 0)) or model.vocab_size
    has_lora = saved.info.get("published_adapter", False)
    text = card.card(
        out.name,
        cfg,
        model_type=model_type,
        head=head,
        parameters=sum(
            leaf.size * rows // model.vocab_size if path in export.OF_VOCABULARY else leaf.size
            for path, leaf in param_paths.flatten(params).items()
            if "/lora_" not in path
        ),
        base=export_adapter.base_name(opened.base_path) if opened else export_adapter.base_of(base, has_lora),
        is_adapter=as_adapter,
        step=saved.step,
        metrics=saved.metrics,
        summary=files.read_document(Path(saved.path.parent.parent) / "summary.json"),
    )
    others["README.md"] = text.encode()
    options: dict[str, Any] = {"dtype": jnp.dtype(dtype), "head": head, "others": others}
    if opened:
        export_adapter.export(out, model, params, cfg.adapter, opened, **options)
        say(f"{out}: LoRA of rank {cfg.adapter.rank} on {base}, {dtype}")
        return
    export.export(out, model, params, vocab_size=rows, about=about, **options)
    kept = "" if model.kind in families.IMAGE_MODELS else f"{rows:,} of {model.vocab_size:,} rows of vocabulary, "
    say(f"{out}: {kept}{dtype}")


def _with_stored_positions(model: Any, params: Any, shape: tuple[int, int, int]) -> tuple[Any, Any]:
    """A model of images with tables instead of the positions that `model.position=sincos` computes."""
    import dataclasses

    from lm import param_paths
    from lm.models import vision

    if model.position != "sincos":
        return model, params
    grid = (shape[0] // model.patch_size, shape[1] // model.patch_size)
    tables = {"embed/positions": vision.position_table(*grid, model.embed_dim)}
    if model.kind == "mae":
        tables["decoder_positions"] = vision.position_table(*grid, model.decoder_dim)
    stored = param_paths.unflatten(param_paths.flatten(params) | tables)
    return dataclasses.replace(model, position="fixed" if model.kind == "mae" else "learned"), stored


class Comparison(NamedTuple):
    """Differences on one batch.

    Attributes:
      name: of the batch.
      logits: largest error of the logits / largest logit; of a model without them that of the hidden states.
      hidden: the same of the last hidden states.
      kl: largest KL divergence of the distribution of an id at a position, in nats.
    """

    name: str
    logits: float
    hidden: float
    kl: float


def verify(folder: Path, text: str, positions: int) -> None:
    """Prints how far logits and hidden states are from those of `transformers`, by layer where they differ.

    Raises:
      CheckpointError: they differ by more than MAX_ERROR or MAX_KL.
    """
    from lm.checkpoint import CheckpointError

    pair = load_both(folder)
    if pair.task:
        verify_images(pair)
        return
    batches = random_batches(pair.vocab_size, min(positions, pair.model.max_len))
    if ids := _real_text(pair.path, text, min(positions, pair.model.max_len)):
        batches["real text"] = (ids, [[1] * len(ids[0])])
    say(f"{'batch':<28}{'logits':>10}{'hidden':>10}{'KL, nats':>12}")
    worst = []
    for name, (tokens, mask) in batches.items():
        found = compare(pair, name, tokens, mask)
        logits, kl = (f"{found.logits:.1e}", f"{found.kl:.1e}") if pair.predicts else ("-", "-")
        say(f"{name:<28}{logits:>10}{found.hidden:>10.1e}{kl:>12}")
        if not (found.logits <= MAX_ERROR and found.kl <= MAX_KL):
            worst.append(name)
            for layer, error in enumerate(layer_errors(pair, tokens, mask), 1):
                say(f"  after layer {layer:>3}: hidden states differ by {error:.1e}")
    if worst:
        raise CheckpointError(
            f"{folder} computes something else here than in transformers (on {', '.join(worst)}): logits, or without "
            f"them hidden states, differ by more than {MAX_ERROR} of the largest, or KL is above {MAX_KL}"
        )
    what = f"logits within {MAX_ERROR}, KL within {MAX_KL}" if pair.predicts else f"hidden states within {MAX_ERROR}"
    say(f"equal: {what}")


class Pair(NamedTuple):
    """A published model in both implementations, float32.

    Attributes:
      path: its folder with config.json, or the GGUF file.
      theirs: of `transformers`.
      model: its shape here.
      params: its parameters here.
      predicts: whether the files have what predicts ids; a BERT without it is compared by its hidden states alone.
      vocab_size: its ids.
      task: of a model of images, `lm.checkpoint.hf.Published.task`.
      head: of a ViT that classifies.
    """

    path: Path
    theirs: Any
    model: Any
    params: Any
    predicts: bool
    vocab_size: int
    task: Any = None
    head: Any = None


def load_both(folder: Path) -> Pair:
    """Reads a folder here and with `transformers`."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from lm import param_paths
    from lm.checkpoint import CheckpointError, hf
    from lm.types import Head

    published = hf.open_model(folder)
    if published.adapter:
        raise CheckpointError(f"{folder} is an adapter; verify compares whole models, such as {published.base_path}")
    model, head = published.model, None
    if model.kind == "vit" and (classifier := "head/classifier/bias") in published.table:
        model, head = dataclasses.replace(model, pool="cls"), Head("pooled", published.shapes[classifier][0])
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(hf.functions(model, published.task, head).init, jax.random.key(0))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)
    there, flat = published.info["arrays"], param_paths.flatten(abstract)
    absent = {path: jnp.zeros(leaf.shape) for path, leaf in flat.items() if f"params/{path}" not in there}
    # What predicts ids, or pixels.
    unneeded = ("decoder", "mask_token", "pixels/") if model.kind == "mae" else ("lm_",)
    if wrong := [path for path in absent if not path.startswith(unneeded)]:
        raise CheckpointError(f"{published.path} has no tensor for '{wrong[0]}'")
    wanted = param_paths.unflatten({path: leaf for path, leaf in flat.items() if path not in absent})
    read = hf.load(published, {"params": wanted})["params"]
    params = param_paths.unflatten(absent | param_paths.flatten(read))
    try:
        import torch
        import transformers
    except ImportError:
        stop("error: verify needs torch and transformers: pip install -e '.[hf,peer]'")
    where, more = place(published.path)
    kinds = {"encoder": "AutoModelForMaskedLM", "encoder_decoder": "AutoModelForSeq2SeqLM"}
    kinds |= {"vit": "AutoModelForImageClassification" if head else "AutoModel", "mae": "AutoModelForPreTraining"}
    auto = getattr(transformers, "AutoModel" if absent else kinds.get(model.kind, "AutoModelForCausalLM"))
    theirs = auto.from_pretrained(where, dtype=torch.float32, attn_implementation="eager", **more)
    predicts = not absent and (model.kind != "vit" or head is not None)
    return Pair(published.path, theirs.eval(), model, params, predicts, model.vocab_size, published.task, head)


def verify_images(pair: Pair, images: int = 4) -> None:
    """As `verify`, of a model of images on random pixels; of ViT-MAE with the same hidden patches, and the loss.

    Raises:
      CheckpointError: they differ by more than MAX_ERROR.
    """
    from lm.checkpoint import CheckpointError

    found = compare_images(pair, images)
    say(f"random images of {pair.task['image_shape']}, error relative to the largest value:")
    for name, error in found.items():
        say(f"  {name:<16}{error:>10.1e}")
    if not max(found.values()) <= MAX_ERROR:
        raise CheckpointError(
            f"{pair.path} computes something else here than in transformers: more than {MAX_ERROR} of the largest value"
        )
    say(f"equal: within {MAX_ERROR}")


def compare_images(pair: Pair, images: int) -> dict[str, float]:
    """What is compared -> error relative to the largest value: hidden states after each layer and the last norm, and if
    there is what predicts them, logits, the reconstruction of all patches and the loss."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from lm import losses, param_paths
    from lm.checkpoint import hf
    from lm.models import layers, vision

    model, shape = pair.model, pair.task["image_shape"]
    rng = np.random.default_rng(0)
    pixels_BxHxWxC = rng.integers(0, 256, (images, *shape)).astype(np.uint8)
    batch: dict[str, Any] = {"images": pixels_BxHxWxC}
    values = (pixels_BxHxWxC.astype(np.float64) / 255 - model.pixel_mean) / model.pixel_deviation
    given: dict[str, Any] = {"pixel_values": torch.from_numpy(values.transpose(0, 3, 1, 2).astype(np.float32))}
    if model.kind == "mae":
        noise = rng.random((images, shape[0] * shape[1] // model.patch_size**2), np.float32)
        order_BxT, seen = (
            noise.argsort(axis=1).astype(np.int32),
            int(noise.shape[1] * (1 - pair.theirs.config.mask_ratio)),
        )
        batch |= {"visible_patches": order_BxT[:, :seen], "masked_patches": order_BxT[:, seen:]}
        given["noise"] = torch.from_numpy(noise)
    with torch.no_grad():
        theirs = pair.theirs(**given, output_hidden_states=True)
    out = jax.jit(hf.functions(model, pair.task, pair.head).apply)(pair.params, batch)

    def error(mine: Any, their: Any) -> float:
        mine, their = np.asarray(mine, np.float64), np.asarray(their, np.float64)
        return float(np.abs(mine - their).max() / np.abs(their).max())

    norm = layers.Norm(model.norm, model.norm_eps, model.use_bias)
    of_norm = {"params": pair.params["encoder"]["final_norm"]}
    errors = {}
    for count in range(1, model.num_layers + 1):

        def first(path: str, leaf: Any, count: int = count) -> Any:
            return leaf[:count] if path.startswith("encoder/layers/") else leaf

        mine = out.hidden_BxLxD
        if count < model.num_layers:
            shorter = hf.functions(dataclasses.replace(model, num_layers=count), pair.task, pair.head)
            mine = jax.jit(shorter.apply)(param_paths.map_with_path(first, pair.params), batch).hidden_BxLxD
        their = jnp.asarray(theirs.hidden_states[count].numpy())
        errors[f"after layer {count}"] = error(mine, norm.apply(of_norm, their))
    if pair.predicts:
        errors["logits" if model.kind == "vit" else "reconstruction"] = error(out.head, theirs.logits)
    if pair.predicts and model.kind == "mae":
        patches = vision.patchify(vision.normalise(pixels_BxHxWxC, model), model.patch_size)
        ones = jnp.ones(images)
        terms = losses.patch_mse(out.head, patches, batch["masked_patches"], ones, target=pair.task["target"])
        errors["loss"] = error(terms.sum / terms.weight, theirs.loss)
    return errors


def place(path: Path) -> tuple[Path, dict[str, Any]]:
    """The folder, and the options with which `transformers` reads a model from a path."""
    return (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {"use_safetensors": True})


def random_batches(vocab_size: int, positions: int) -> dict[str, tuple[Any, Any]]:
    """Name -> (ids, mask) of random ids: whole rows, and rows with padding on either side."""
    import numpy as np

    rng = np.random.default_rng(0)
    whole = rng.integers(0, vocab_size, (1, positions))
    two = rng.integers(0, vocab_size, (2, min(positions, 64)))
    left, right = np.ones_like(two), np.ones_like(two)
    left[0, :11], right[0, -11:] = 0, 0
    return {
        f"random, {positions:,} positions": (whole, np.ones_like(whole)),
        "random, padded left": (two, left),
        "random, padded right": (two, right),
    }


def _real_text(path: Path, text: str, positions: int) -> list[list[int]]:
    """Ids of one row of text by the folder's tokenizer; empty, with a note, if it has none."""
    import argparse

    import transformers

    from lm.data import published_tokenizer

    content = Path(text).read_text(encoding="utf-8") if text else f"{argparse.__doc__}\n{json.__doc__}"
    where, more = place(path)
    if "gguf_file" not in more and not published_tokenizer.has_files(where):
        say(f"no tokenizer in {path}: only random ids are compared")
        return []
    more.pop("use_safetensors", None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, **more)
    return [tokenizer(content)["input_ids"][:positions]]


def batch_of(model: Any, tokens: Any, mask: Any) -> dict[str, Any]:
    """The batch of a model here: padding has segment 0. An encoder-decoder's encoder reads the same ids reversed."""
    import numpy as np

    mask_BxL = np.asarray(mask, np.int32)
    positions_BxL = np.maximum(np.cumsum(mask_BxL, axis=1, dtype=np.int32) - 1, 0)
    batch = {"tokens": np.asarray(tokens, np.int32), "segment_ids": mask_BxL, "positions": positions_BxL}
    if model.kind == "encoder_decoder":
        back = {name: column[:, ::-1] for name, column in batch.items()}
        batch |= {"inputs": back["tokens"], "input_segment_ids": back["segment_ids"], "input_positions": positions_BxL}
    return batch


def compare(pair: Pair, name: str, tokens: Any, mask: Any) -> Comparison:
    """Compares the two implementations on one batch, at its real positions."""
    import jax
    import numpy as np

    from lm import losses
    from lm.checkpoint import hf

    batch, model = batch_of(pair.model, tokens, mask), pair.model

    @jax.jit
    def apply(params: Any, batch: Any) -> Any:
        out = hf.functions(model, pair.task).apply(params, batch)
        size = {"vocab_size": pair.vocab_size, "softcap": model.logit_softcap}
        return losses.logits(out.pre_logits_BxLxD, out.unembed_DxV, **size), out.hidden_BxLxD

    logits, hidden = (np.asarray(x, np.float64) for x in apply(pair.params, batch))
    out = _theirs(pair, batch)
    real = batch["segment_ids"] > 0

    def error(mine: Any, their: Any) -> float:
        return float(np.abs(mine - their)[real].max() / np.abs(their[real]).max())

    hidden_error = error(hidden, _hidden(out)[-1].double().numpy())
    if not pair.predicts:
        return Comparison(name, hidden_error, hidden_error, 0.0)
    their_logits = out.logits.double().numpy()
    logits = logits[..., : their_logits.shape[-1]]
    mine, theirs = (_log_softmax(x[real]) for x in (logits, their_logits))
    kl = float((np.exp(theirs) * (theirs - mine)).sum(axis=-1).max())
    return Comparison(name, error(logits, their_logits), hidden_error, kl)


def layer_errors(pair: Pair, tokens: Any, mask: Any) -> list[float]:
    """Error of the hidden states after each layer, and the final norm if there is one, relative to the largest; in an
    encoder-decoder those of the decoder, which reads the whole encoder."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np

    from lm import param_paths
    from lm.checkpoint import hf
    from lm.models import layers

    batch, model, params = batch_of(pair.model, tokens, mask), pair.model, pair.params
    theirs = _hidden(_theirs(pair, batch))
    stack, key = ("encoder" if model.kind == "encoder" else "decoder"), "num_layers"
    if model.kind == "encoder_decoder":
        key = "decoder_layers"
    most = getattr(model, key)
    norm = layers.Norm(model.norm, model.norm_eps, model.use_bias)
    real, errors = batch["segment_ids"] > 0, []
    for count in range(1, most + 1):

        def first(path: str, leaf: Any, count: int = count) -> Any:
            return leaf[:count] if path.startswith(f"{stack}/layers/") else leaf

        shorter = hf.functions(dataclasses.replace(model, **{key: count}), pair.task)
        mine = np.asarray(jax.jit(shorter.apply)(param_paths.map_with_path(first, params), batch).hidden_BxLxD)[real]
        their = theirs[count].numpy()
        if count < most and model.norm_position != "post":  # transformers normalises the last ones only
            their = np.asarray(norm.apply({"params": params["decoder"]["final_norm"]}, jnp.asarray(their)))
        errors.append(float(np.abs(mine - their[real]).max() / np.abs(their[real]).max()))
    return errors


def _theirs(pair: Pair, batch: dict[str, Any]) -> Any:
    import torch

    tokens, mask, positions = (torch.from_numpy(batch[k]).long() for k in ("tokens", "segment_ids", "positions"))
    positions += pair.model.unused_positions
    given = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "output_hidden_states": True}
    if pair.model.kind == "encoder_decoder":
        inputs, seen = (torch.from_numpy(batch[k].copy()).long() for k in ("inputs", "input_segment_ids"))
        given = {"input_ids": inputs, "attention_mask": seen, "output_hidden_states": True}
        given |= {"decoder_input_ids": tokens, "decoder_attention_mask": mask}
    with torch.no_grad():
        return pair.theirs(**given, **({} if pair.model.kind == "encoder" else {"use_cache": False}))


def _hidden(theirs: Any) -> Any:
    """Hidden states after each layer of an output of `transformers`, of an encoder-decoder those of the decoder."""
    return theirs.decoder_hidden_states if "decoder_hidden_states" in theirs else theirs.hidden_states


def _log_softmax(logits: Any) -> Any:
    import numpy as np

    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


if __name__ == "__main__":
    command_line.run(main)
