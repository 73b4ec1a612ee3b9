"""Run directories with made-up figures, for the tests of the registry of runs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm import config
from lm.tasks import build_config, default_config
from lm.tracking import files, report


def config_of(task: str = "causal_lm", **keys: Any) -> config.Config:
    """A small config; a key 'optim__learning_rate' is 'optim.learning_rate'."""
    source = default_config(task)
    source.train.total_steps = 20
    for key, value in keys.items():
        source.update_from_flattened_dict({key.replace("__", "."): value})
    return build_config(source)


def write_run(
    folder: Path,
    losses: Sequence[float] = (3.0, 2.5, 2.0),
    is_done: bool = True,
    summary: Mapping[str, Any] | None = None,
    **keys: Any,
) -> Path:
    """A run with an evaluation each 10 steps from 0 on, whose figures are `losses`, and a row of training at each."""
    cfg = config_of(**keys)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json(cfg))
    rows, evaluations = files.RowFile(folder / "metrics.jsonl"), []
    for i, loss in enumerate(losses):
        evaluations.append({"step": 10 * i, "seconds": 5.0 * i, "loss": loss, "nll": loss, "accuracy": 1 / loss})
        if i:
            rows.append({"step": 10 * i, "split": "train", "seconds": 5.0 * i, "loss": loss + 0.5, "grad_norm": 1.0})
        rows.append({"split": "eval", **evaluations[-1]})
    rows.close()
    if is_done:
        last = {key: value for key, value in evaluations[-1].items() if key not in ("step", "seconds")}
        steps = 10 * (len(losses) - 1)
        tokens = steps * cfg.data.batch_size * cfg.data.seq_len
        best = min(evaluations[1:], key=lambda row: row["loss"])
        about = {"steps": steps, "tokens": tokens, "seconds": 12.5, "before": evaluations[0], "best": best}
        report.write_summary(folder, {**last, **about, **(summary or {})})
    return folder


def age(folder: Path, days: float) -> None:
    """Makes the files of a run so many days older."""
    for path in folder.iterdir():
        when = path.stat().st_mtime - 86400 * days
        os.utime(path, (when, when), follow_symlinks=False)
