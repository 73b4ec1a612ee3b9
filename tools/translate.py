"""Translate with a run, by beam search, and score against references.

python tools/translate.py runs/multi30k --path='../shared/data/multi30k/test_2016_flickr.{en,de}.gz' [--beams=4]

Prints BLEU and chrF with their signatures (sacrebleu; pip install -e '.[scores]') and writes one translation a line.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Loads the run's newest (or best, or a given) checkpoint and translates the first side of `--path`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder; DIR@best or DIR@STEP for another checkpoint")
    parser.add_argument("--path", required=True, help="source and reference files, line by line: 'DIR/test.{en,de}.gz'")
    parser.add_argument("--beams", type=int, default=4, help="1 = greedy (default: 4)")
    parser.add_argument("--alpha", type=float, default=0.6, help="length penalty of Wu et al. 2016 (default: 0.6)")
    parser.add_argument("--limit", type=int, default=0, help="only this many lines (default: all)")
    parser.add_argument("--batch_size", type=int, default=32, help="lines translated together (default: 32)")
    parser.add_argument("--max_new_tokens", type=int, help="longest translation (default: the run's)")
    parser.add_argument("--bleu_tokenizer", help="sacrebleu's, such as zh or flores200 (default: the run's)")
    parser.add_argument("--out", help="where the translations go (default: translations.txt in the run's folder)")
    args = parser.parse_args()
    for key, least in (("beams", 1), ("batch_size", 1), ("limit", 0)):
        if getattr(args, key) < least:
            parser.error(f"--{key} must be at least {least}")
    if not math.isfinite(args.alpha):
        parser.error(f"--alpha must be finite, got {args.alpha}")

    from lm.checkpoint import CheckpointError
    from lm.config import schema
    from lm.data.record import DataError

    try:
        translate(args)
    except (CheckpointError, DataError, schema.ConfigError) as error:
        sys.exit(f"error: {error}")


def check(cfg: Any) -> None:
    """Raises ConfigError unless a run of this config translates."""
    from lm.config import schema

    if cfg.task.name != "translation":
        raise schema.ConfigError(f"this run's 'task.name' is {cfg.task.name}; translate.py is for runs of translation")


def translate(args: argparse.Namespace) -> None:
    """Translates in batches of like length; sources that are longer than the run's rows are not cut."""

    from lm import run as run_lib
    from lm import tasks
    from lm.config import schema
    from lm.data.readers import paths, registry
    from lm.decoding import beam_search, sampling
    from lm.evaluation import scores

    cfg, model, params, words = run_lib.load_model(args.run)
    check(cfg)
    if args.max_new_tokens is not None:
        values = schema.to_dict(cfg)
        cfg = tasks.build_config(values | {"generate": values["generate"] | {"max_new_tokens": args.max_new_tokens}})
    pairs = registry.parallel_records(args.path)[: args.limit or None]
    references = [pair["target"] for pair in pairs]
    wanted = args.bleu_tokenizer or cfg.task.bleu_tokenizer
    tokenizer = scores.bleu_tokenizer(wanted, paths.target_side(args.path), references)
    signatures = scores.translation_signatures(tokenizer)  # what is not installed is told before the work is done
    prompts = [sampling.encode_prompt(pair["text"], words, cfg) for pair in pairs]
    made = [""] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), args.batch_size):
        rows = order[start : start + args.batch_size]
        found = beam_search.search(
            model,
            params,
            [prompts[i] for i in rows],
            cfg,
            words,
            beams=args.beams,
            alpha=args.alpha,
            rows_multiple=args.batch_size,
        )
        for i, ids in zip(rows, found, strict=True):
            made[i] = " ".join(words.decode(ids).split())
        print(f"\r{start + len(rows)} of {len(pairs)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    out = Path(args.out) if args.out else Path(args.run.partition("@")[0]) / "translations.txt"
    out.write_text("".join(f"{line}\n" for line in made), encoding="utf-8")
    values = scores.translation(made, references, tokenizer)
    print(f"BLEU {values['bleu']:.2f}  chrF {values['chrf']:.2f}  {len(pairs)} lines, beams {args.beams}, {out}")
    print(f"BLEU {signatures['bleu']}\nchrF {signatures['chrf']}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
