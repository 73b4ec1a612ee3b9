"""Merges LoRA into the kernels, extracts what a run trained without its base, or attaches that to its base again.

    python tools/merge_adapters.py merge RUN OUT                     OUT = the same model without LoRA
    python tools/merge_adapters.py extract RUN OUT                   OUT = what RUN trained: adapters and head, small
    python tools/merge_adapters.py attach EXTRACTED OUT [--base=RUN]  OUT = the whole model of an extracted run

RUN and EXTRACTED may be RUN@best or RUN@STEP. OUT is a new run folder with one checkpoint. tools/chat.py and
`init_from` read the output of `merge` and `attach` like any other run. `attach` takes the base that RUN's config names
as `init_from`, and refuses a base whose arrays differ from those that RUN was trained on.
"""

import dataclasses
from pathlib import Path
from typing import Any

from absl import app, flags

from lm import command_line

_BASE = flags.DEFINE_string("base", "", "attach: the base run, if it was moved.")


def main(argv: list[str]) -> None:
    """Runs the command."""
    from lm.config.schema import ConfigError

    command, run, out = command_line.arguments(argv, "COMMAND", "RUN", "OUT")
    with command_line.one_line_errors():
        if command not in ("merge", "extract", "attach"):
            raise ConfigError(f"found command '{command}', expected merge, extract or attach")
        if Path(out).exists():
            raise ConfigError(f"{out} exists already; name a new folder")
        if command == "attach":
            attach(run, Path(out), _BASE.value)
        else:
            {"merge": merge, "extract": extract}[command](run, Path(out))


def merge(run: str, out: Path) -> None:
    """Writes a run with LoRA as a run without."""
    from lm import checkpoint, config
    from lm import run as run_lib
    from lm.config import AdapterConfig, OptimConfig
    from lm.models import adapters

    saved = checkpoint.choose(run)
    cfg, _, params, tokenizer = run_lib.load_model(run)
    # Rules that name adapters would match no parameter of the merged model.
    rules = {name: getattr(OptimConfig(), name) for name in ("lr_rules", "decay_rules", "unfreeze_rules")}
    optim = dataclasses.replace(cfg.optim, **rules, l2_sp=0.0, mixout=0.0)
    plain = dataclasses.replace(
        cfg,
        adapter=AdapterConfig(),
        optim=optim,
        data=dataclasses.replace(cfg.data, replay=0.0),  # it replays data of the run that init_from named
        init_from="",
        init_rules=config.Config().init_rules,
    )
    write(out, saved, plain, adapters.merge(params, cfg.adapter), tokenizer)


def extract(run: str, out: Path) -> None:
    """Writes the parameters that a run trained or initialised, and the fingerprints of all others."""
    from lm import checkpoint, param_paths
    from lm import run as run_lib
    from lm.checkpoint import init_from
    from lm.config.schema import ConfigError
    from lm.optim import trainable

    saved = checkpoint.choose(run)
    cfg, _, params, tokenizer = run_lib.load_model(run)
    trained = trainable.resolve(cfg.optim, params, total_steps=1).trained
    actions = param_paths.match_rules(cfg.init_rules, list(trained), "init_rules")
    own = {path: trained[path] or actions[path] == init_from.REINIT for path in trained}
    if all(own.values()) or not cfg.init_from:
        raise ConfigError(f"{run} has no frozen base: it trains everything, or started from no 'init_from'")
    base = {path: saved.info["arrays"][f"params/{path}"]["fingerprint"] for path in own if not own[path]}
    write(
        out, saved, cfg, param_paths.select(params, own), tokenizer, base={"run": cfg.init_from, "fingerprints": base}
    )


def attach(run: str, out: Path, base: str) -> None:
    """Writes an extracted run together with its base; `base`: where it is, '' = where the run says."""
    import jax

    from lm import checkpoint, param_paths, tasks
    from lm import run as run_lib

    saved = checkpoint.choose(run)
    if "base" not in saved.info:
        raise checkpoint.CheckpointError(f"{saved.path} was not made by 'extract': it names no base")
    name, expected = base or saved.info["base"]["run"], saved.info["base"]["fingerprints"]
    cfg = tasks.build_saved_config(saved.info["config"])
    planned, _, params = run_lib.init_model(dataclasses.replace(cfg, init_from=name))
    found = jax.device_get(jax.jit(checkpoint.fingerprints)(params))
    if different := [path for path, wanted in expected.items() if int(found[path]) != wanted]:
        raise checkpoint.CheckpointError(
            f"'{name}' is not the base of {saved.path}: '{different[0]}' differs ({len(different)} of {len(expected)} "
            "arrays); name the right one with --base=RUN, or RUN@STEP"
        )
    flat = param_paths.flatten(params)
    kept = {
        f"params/{path}": jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for path, leaf in flat.items()
        if path not in expected
    }
    own = checkpoint.load(saved, param_paths.unflatten(kept))["params"]
    write(out, saved, cfg, param_paths.overlay(params, own), planned.tokenizer)


def write(out: Path, saved: Any, cfg: Any, params: Any, tokenizer: Any, **info: Any) -> None:
    """Writes a run folder with one checkpoint: step, position and metrics of `saved`, with other parameters."""
    import jax

    from lm import checkpoint, config
    from lm.config import schema
    from lm.tracking import tracker

    out.mkdir(parents=True)
    if tokenizer:
        tokenizer.save(out / tokenizer.file)
    tracker.write_atomic(out / "config.json", config.to_json(cfg))
    kept = {key: value for key, value in saved.info.items() if key not in ("format", "arrays", "base")}
    with checkpoint.Checkpoints(out, cfg.checkpoint) as saves:
        saves.save(saved.step, {"params": params}, kept | {"config": schema.to_dict(cfg)} | info, saved.metrics)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(f"{out}: step {saved.step:,} of {saved.path.parent.parent}, {size / 2**20:,.1f} MiB of parameters")


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse)
