"""Reads and writes published models, and compares them with `transformers`.

    python tools/hf.py import FOLDER OUT [--tokenizer=FILE]  OUT = a run folder that tools/chat.py and init_from read
    python tools/hf.py export RUN OUT [--dtype=bfloat16]     OUT = config.json, generation_config.json, safetensors
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
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "export: of the tensors.")
_TEXT = flags.DEFINE_string("text", "", "verify: a file of text; '' = docstrings of Python's library.")
_POSITIONS = flags.DEFINE_integer("positions", 1024, "verify: positions in a row.", lower_bound=16)

# What `verify` accepts: error of the logits relative to the largest, and KL divergence in nats.
MAX_ERROR, MAX_KL = 1e-5, 1e-9


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
            import_model(given[0], Path(given[1]), _TOKENIZER.value, _TASK.value)
        elif command == "export":
            export_run(given[0], Path(given[1]), _DTYPE.value)
        else:
            verify(Path(given[0]), _TEXT.value, _POSITIONS.value)


def import_model(folder: str, out: Path, tokenizer: str, task: str) -> None:
    """Writes a published model as a run folder with one checkpoint, of step 0."""
    from lm import run as run_lib
    from lm import tasks
    from lm.checkpoint import hf, init_from

    source = tasks.default_config(task)
    source.init_from = hf.PREFIX + folder
    source.tokenizer.path = tokenizer
    source.train.total_steps = 1
    planned, _, params = run_lib.init_model(tasks.build_config(source))
    assert planned.init is not None
    say(init_from.describe(planned.origin_of, planned.unused, planned.init, planned.cfg.model, planned.cfg.model))
    about = {"tokenizer_hash": planned.tokenizer.hash if planned.tokenizer else "", "data": {"example": 0}}
    info = about | {"published_vocab": planned.published_vocab}
    size = run_lib.write_checkpoint(out, planned.cfg, params, planned.tokenizer, 0, info)
    say(f"{out}: {size / 2**20:,.1f} MiB of parameters")


def export_run(run: str, out: Path, dtype: str) -> None:
    """Writes a run's parameters, LoRA merged, in the format of the family whose shape its model has."""
    import jax.numpy as jnp

    from lm import run as run_lib
    from lm import tasks
    from lm.checkpoint.hf import export
    from lm.models import adapters

    saved, (cfg, _, params, tokenizer) = run_lib.load_checkpoint(run)
    if cfg.adapter.kind == "lora":
        params = adapters.merge(params, cfg.adapter)
    model = cfg.model
    # Rows after the tokenizer's ids were never trained, unless they came from a published model.
    rows = max(tokenizer.vocab_size if tokenizer else 0, saved.info.get("published_vocab", 0)) or model.vocab_size
    ids: dict[str, Any] = {}
    others: dict[str, bytes] = {}
    if tokenizer:
        ends = tasks.task_of(cfg).ends(tokenizer)
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        generate = cfg.generate
        generation = ids | {"eos_token_id": list(ends), "max_new_tokens": generate.max_new_tokens}
        if generate.temperature:
            sampled = {"temperature": generate.temperature, "top_p": generate.top_p, "top_k": generate.top_k}
            generation |= {"do_sample": True} | sampled
        others = {Path(name).name: content for name, content in tokenizer.saved_files.items()}
        others["generation_config.json"] = f"{json.dumps(generation, indent=2)}\n".encode()
    export.export(out, model, params, vocab_size=rows, dtype=jnp.dtype(dtype), about=ids, others=others)
    say(f"{out}: {rows:,} of {model.vocab_size:,} rows of vocabulary, {dtype}")


class Comparison(NamedTuple):
    """Differences on one batch.

    Attributes:
      name: of the batch.
      logits: largest error of the logits / largest logit.
      hidden: the same of the last hidden states.
      kl: largest KL divergence of the next id's distribution at a position, in nats.
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
    batches = random_batches(pair.vocab_size, min(positions, pair.model.max_len))
    if ids := _real_text(pair.path, text, min(positions, pair.model.max_len)):
        batches["real text"] = (ids, [[1] * len(ids[0])])
    say(f"{'batch':<28}{'logits':>10}{'hidden':>10}{'KL, nats':>12}")
    worst = []
    for name, (tokens, mask) in batches.items():
        found = compare(pair, name, tokens, mask)
        say(f"{name:<28}{found.logits:>10.1e}{found.hidden:>10.1e}{found.kl:>12.1e}")
        if not (found.logits <= MAX_ERROR and found.kl <= MAX_KL):
            worst.append(name)
            for layer, error in enumerate(layer_errors(pair, tokens, mask), 1):
                say(f"  after layer {layer:>3}: hidden states differ by {error:.1e}")
    if worst:
        raise CheckpointError(
            f"{folder} computes something else here than in transformers (on {', '.join(worst)}): logits differ by "
            f"more than {MAX_ERROR} of the largest, or KL is above {MAX_KL}"
        )
    say(f"equal: logits within {MAX_ERROR}, KL within {MAX_KL}")


class Pair(NamedTuple):
    """A published model in both implementations, float32.

    Attributes:
      path: its folder with config.json, or the GGUF file.
      theirs: of `transformers`.
      model: its shape here.
      params: its parameters here.
      vocab_size: its ids.
    """

    path: Path
    theirs: Any
    model: Any
    params: Any
    vocab_size: int


def load_both(folder: Path) -> Pair:
    """Reads a folder here and with `transformers`."""
    import jax
    import jax.numpy as jnp

    from lm.checkpoint import hf
    from lm.models import transformer

    published = hf.open_model(folder)
    model = published.model
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(transformer.text_model(model, jnp.float32).init, jax.random.key(0))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)
    params = hf.load(published, {"params": abstract})["params"]
    try:
        import torch
        import transformers
    except ImportError:
        stop("error: verify needs torch and transformers: pip install -e '.[hf,peer]'")
    where, more = place(published.path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        where, dtype=torch.float32, attn_implementation="eager", **more
    )
    return Pair(published.path, theirs.eval(), model, params, model.vocab_size)


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

    content = Path(text).read_text(encoding="utf-8") if text else f"{argparse.__doc__}\n{json.__doc__}"
    where, more = place(path)
    has_one = any((where / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    if not has_one and "gguf_file" not in more:
        say(f"no tokenizer in {path}: only random ids are compared")
        return []
    more.pop("use_safetensors", None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, **more)
    return [tokenizer(content)["input_ids"][:positions]]


def batch_of(tokens: Any, mask: Any) -> dict[str, Any]:
    """The batch of a model here: padding has segment 0."""
    import numpy as np

    mask_BxL = np.asarray(mask, np.int32)
    positions_BxL = np.maximum(np.cumsum(mask_BxL, axis=1, dtype=np.int32) - 1, 0)
    return {"tokens": np.asarray(tokens, np.int32), "segment_ids": mask_BxL, "positions": positions_BxL}


def compare(pair: Pair, name: str, tokens: Any, mask: Any) -> Comparison:
    """Compares the two implementations on one batch, at its real positions."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lm import losses
    from lm.models import transformer

    batch, model = batch_of(tokens, mask), pair.model

    @jax.jit
    def apply(params: Any, batch: Any) -> Any:
        out = transformer.text_model(model, jnp.float32).apply(params, batch)
        size = {"vocab_size": pair.vocab_size, "softcap": model.logit_softcap}
        return losses.logits(out.pre_logits_BxLxD, out.unembed_DxV, **size), out.hidden_BxLxD

    logits, hidden = (np.asarray(x, np.float64) for x in apply(pair.params, batch))
    out = _theirs(pair, batch)
    real = batch["segment_ids"] > 0
    their_logits = out.logits.double().numpy()

    def error(mine: Any, their: Any) -> float:
        return float(np.abs(mine - their)[real].max() / np.abs(their[real]).max())

    mine, theirs = (_log_softmax(x[real]) for x in (logits[..., : their_logits.shape[-1]], their_logits))
    kl = float((np.exp(theirs) * (theirs - mine)).sum(axis=-1).max())
    return Comparison(
        name,
        error(logits[..., : their_logits.shape[-1]], their_logits),
        error(hidden, out.hidden_states[-1].double().numpy()),
        kl,
    )


def layer_errors(pair: Pair, tokens: Any, mask: Any) -> list[float]:
    """Error of the hidden states after each layer, and the final norm, relative to the largest.

    The layers after it are made to add nothing, by kernels of 0: all are then the same program.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lm import param_paths
    from lm.models import layers, transformer

    batch, model, params = batch_of(tokens, mask), pair.model, pair.params
    apply = jax.jit(transformer.text_model(model, jnp.float32).apply)
    theirs = _theirs(pair, batch).hidden_states
    norm = layers.Norm(model.norm, model.norm_eps, model.use_bias)
    real, errors = batch["segment_ids"] > 0, []
    for count in range(1, model.num_layers + 1):

        def first(path: str, leaf: Any, count: int = count) -> Any:
            return leaf.at[count:].set(0.0) if "/attention/out/" in path or "/mlp/down/" in path else leaf

        mine = np.asarray(apply(param_paths.map_with_path(first, params), batch).hidden_BxLxD)[real]
        their = theirs[count].numpy()
        if count < model.num_layers:  # transformers normalises the last ones only
            their = np.asarray(norm.apply({"params": params["decoder"]["final_norm"]}, jnp.asarray(their)))
        errors.append(float(np.abs(mine - their[real]).max() / np.abs(their[real]).max()))
    return errors


def _theirs(pair: Pair, batch: dict[str, Any]) -> Any:
    import torch

    tokens, mask, positions = (torch.from_numpy(batch[k]).long() for k in ("tokens", "segment_ids", "positions"))
    with torch.no_grad():
        return pair.theirs(
            input_ids=tokens, attention_mask=mask, position_ids=positions, output_hidden_states=True, use_cache=False
        )


def _log_softmax(logits: Any) -> Any:
    import numpy as np

    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


if __name__ == "__main__":
    command_line.run(main)
