"""Translates with a run, by beam search, and scores the translations against references.

    python tools/translate.py runs/multi30k --path='../shared/data/multi30k/test_2016_flickr.{en,de}.gz' [--beams=4]

Prints BLEU and chrF with their signatures (sacrebleu; pip install -e '.[scores]') and writes one translation a line.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from absl import flags

from lm import command_line
from lm.terminal import say, stop

_PATH = flags.DEFINE_string("path", None, "Source and reference files, line by line: 'DIR/test.{en,de}.gz'.")
_BEAMS = flags.DEFINE_integer("beams", 4, "Beam size; 1 = greedy.", lower_bound=1)
_ALPHA = flags.DEFINE_float("alpha", None, "Length penalty of Wu et al. 2016 (default: 0.6).")
_LIMIT = flags.DEFINE_integer("limit", 0, "Translate only this many lines; 0 = all.", lower_bound=0)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Lines translated together.", lower_bound=1)
_GENERATE = command_line.define_generate("max_new_tokens", "min_new_tokens", "stop", "repetition_penalty")
_BLEU_TOKENIZER = flags.DEFINE_string("bleu_tokenizer", "", "sacrebleu's, such as zh or flores200; '' = the run's.")
_OUT = flags.DEFINE_string("out", "", "File for the translations; '' = translations.txt in the run's folder.")


def main(argv: list[str]) -> None:
    """Loads a run's checkpoint (RUN, RUN@best or RUN@STEP) and translates the first side of --path."""
    (run,) = command_line.arguments(argv, "RUN")
    if _PATH.value is None:
        stop("error: --path='DIR/test.{en,de}.gz' is needed; --help explains it")
    if _ALPHA.value is not None and not math.isfinite(_ALPHA.value):
        stop(f"error: --alpha={_ALPHA.value}: expected a finite number")
    with command_line.one_line_errors():
        translate(run, _PATH.value)


def check(cfg: Any) -> None:
    """Raises ConfigError unless the config is that of a translation model."""
    from lm.config import schema

    if cfg.task.name != "translation":
        raise schema.ConfigError(f"this run's 'task.name' is {cfg.task.name}; translate.py is for runs of translation")


def translate(run: str, path: str) -> None:
    """Translates with `lm.predict`: a source may be longer than the run's rows, and is cut at the learned positions."""
    from lm import input_pipeline, predict
    from lm.data.readers import paths, registry
    from lm.decoding import beam_search, sampling
    from lm.evaluation import scores

    loaded = predict.load(run, batch_size=_BATCH_SIZE.value)
    check(loaded.config)
    cfg = sampling.changed(loaded.config, _GENERATE())
    pairs = registry.parallel_records(path)[: _LIMIT.value or None]
    references = [pair["target"] for pair in pairs]
    chosen = _BLEU_TOKENIZER.value or cfg.task.bleu_tokenizer
    bleu_tokenizer = scores.bleu_tokenizer(chosen, paths.target_side(path), references)
    signatures = scores.translation_signatures(bleu_tokenizer)  # fails early if sacrebleu is missing
    alpha = beam_search.ALPHA if _ALPHA.value is None else _ALPHA.value
    shown = input_pipeline.progress(pairs, "translating", len(pairs))
    loaded = dataclasses.replace(loaded, config=cfg)
    said = list(predict.predictions(loaded, shown, beams=_BEAMS.value, alpha=alpha))
    translations = [one["prediction"] for one in said]
    if cut := sum("counts" in one for one in said):
        say(f"{cut} of {len(pairs)} sources are longer than 'model.max_len': their ends were cut", file=sys.stderr)
    out = Path(_OUT.value) if _OUT.value else Path(run.partition("@")[0]) / "translations.txt"
    out.write_text("".join(f"{line}\n" for line in translations), encoding="utf-8")
    values = scores.translation(translations, references, bleu_tokenizer)
    say(f"BLEU {values['bleu']:.2f}  chrF {values['chrf']:.2f}  {len(pairs)} lines, beams {_BEAMS.value}, {out}")
    say(f"BLEU {signatures['bleu']}\nchrF {signatures['chrf']}")


if __name__ == "__main__":
    command_line.run(main)
