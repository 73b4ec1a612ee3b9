"""Put LoRA's weights into the kernels; or keep a run's trained part without its base, and put the two together again.

python tools/merge_adapters.py merge RUN OUT                     OUT = the model without LoRA that computes the same
python tools/merge_adapters.py extract RUN OUT                   OUT = what RUN trained: adapters and head, small
python tools/merge_adapters.py attach EXTRACTED OUT [--base=RUN]  OUT = the model of `extract`, its base put back

RUN and EXTRACTED may be RUN@best or RUN@STEP. OUT is a new run folder with one checkpoint; what `merge` and `attach`
write is read by tools/chat.py and `init_from` as any other. `attach` takes the base that RUN's config names as
`init_from`, and refuses one whose arrays are not those that RUN was trained on.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Reads the command and runs it; an error is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("merge", "extract", "attach"))
    parser.add_argument("run", help="a run's folder; DIR@best or DIR@STEP for another checkpoint than the newest")
    parser.add_argument("out", type=Path, help="the folder to write; must not exist")
    parser.add_argument("--base", default="", help="attach only: the run to start from, where it has moved")
    args = parser.parse_args()

    from lm.checkpoint import CheckpointError
    from lm.config.schema import ConfigError

    try:
        if args.out.exists():
            raise ConfigError(f"{args.out} exists already; name a new folder")
        {"merge": merge, "extract": extract, "attach": attach}[args.command](args)
    except (CheckpointError, ConfigError) as error:
        sys.exit(f"error: {error}")


def merge(args: argparse.Namespace) -> None:
    """RUN with LoRA -> OUT without."""
    from lm import checkpoint, config
    from lm import run as run_lib
    from lm.config import AdapterConfig, OptimConfig
    from lm.models import adapters

    saved = checkpoint.choose(args.run)
    cfg, _, params, words = run_lib.load_model(args.run)
    # Rules that name adapters would match nothing in the model that is written.
    rules = {name: getattr(OptimConfig(), name) for name in ("lr_rules", "decay_rules", "unfreeze_rules")}
    optim = dataclasses.replace(cfg.optim, **rules, to_init=0.0, mixout=0.0)
    plain = dataclasses.replace(
        cfg,
        adapter=AdapterConfig(),
        optim=optim,
        data=dataclasses.replace(cfg.data, replay=0.0),  # of what init_from named
        init_from="",
        init_rules=config.Config().init_rules,
    )
    write(args.out, saved, plain, adapters.merge(params, cfg.adapter), words)


def extract(args: argparse.Namespace) -> None:
    """RUN -> OUT with what it trained or initialised, and the fingerprints of all else."""
    from lm import checkpoint, param_paths
    from lm import run as run_lib
    from lm.checkpoint import init_from
    from lm.config.schema import ConfigError
    from lm.optim import trainable

    saved = checkpoint.choose(args.run)
    cfg, _, params, words = run_lib.load_model(args.run)
    trained = trainable.resolve(cfg.optim, params, total_steps=1).trained
    actions = param_paths.match_rules(cfg.init_rules, list(trained), "init_rules")
    own = {path: trained[path] or actions[path] == init_from.REINIT for path in trained}
    if all(own.values()) or not cfg.init_from:
        raise ConfigError(f"{args.run} has no frozen base: it trains everything, or started from no 'init_from'")
    base = {path: saved.info["arrays"][f"params/{path}"]["fingerprint"] for path in own if not own[path]}
    write(
        args.out, saved, cfg, param_paths.select(params, own), words, base={"run": cfg.init_from, "fingerprints": base}
    )


def attach(args: argparse.Namespace) -> None:
    """EXTRACTED and its base -> OUT with both."""
    import jax

    from lm import checkpoint, param_paths, tasks
    from lm import run as run_lib

    saved = checkpoint.choose(args.run)
    if "base" not in saved.info:
        raise checkpoint.CheckpointError(f"{saved.path} was not made by 'extract': it names no base")
    name, expected = args.base or saved.info["base"]["run"], saved.info["base"]["fingerprints"]
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
    write(args.out, saved, cfg, param_paths.overlay(params, own), planned.tokenizer)


def write(out: Path, saved: Any, cfg: Any, params: Any, words: Any, **about: Any) -> None:
    """A run folder with one checkpoint: the step, position and metrics of `saved`, with other parameters."""
    import jax

    from lm import checkpoint, config
    from lm import run as run_lib
    from lm.config import schema
    from lm.tracking import tracker

    out.mkdir(parents=True)
    if words:
        words.save(out / run_lib.tokenizer_file(cfg))
    tracker.write_atomic(out / "config.json", config.to_json(cfg))
    kept = {key: value for key, value in saved.info.items() if key not in ("format", "arrays", "base")}
    with checkpoint.Checkpoints(out, cfg.checkpoint) as saves:
        saves.save(saved.step, {"params": params}, kept | {"config": schema.to_dict(cfg)} | about, saved.metrics)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(f"{out}: step {saved.step:,} of {saved.path.parent.parent}, {size / 2**20:,.1f} MiB of parameters")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
