"""Writes the labelled sentences of several recipes as one data set, for task.name=multitask.

    python tools/mix_tasks.py OUT RECIPE [RECIPE ...]

OUT/train.jsonl and OUT/valid.jsonl hold the records of each configs/RECIPE.py, with labels of the form 'RECIPE/LABEL'.
The recipes are of classification or regression; their data is read as their configs say.
"""

import importlib
import json
from pathlib import Path

from lm import command_line
from lm.terminal import say


def mix(out: Path, names: list[str]) -> dict[str, int]:
    """Writes both files. Returns the number of records of each recipe, training and validation together.

    Raises:
      DataError, ConfigError: from reading the data of a recipe.
    """
    from lm.data.readers import registry
    from lm.tasks import build_config, task_of

    splits = {}
    for name in names:
        cfg = build_config(importlib.import_module(f"configs.{name}").get_config())
        splits[name] = registry.load(cfg.data, task_of(cfg).wanted(cfg))
    out.mkdir(parents=True, exist_ok=True)
    for part in ("train", "valid"):
        with (out / f"{part}.jsonl").open("w", encoding="utf-8") as file:
            for name, split in splits.items():
                for record in getattr(split, part):
                    kept = {key: record[key] for key in ("text", "text_pair") if key in record}
                    file.write(json.dumps(kept | {"label": f"{name}/{record['label']}"}) + "\n")
    return {name: len(split.train) + len(split.valid) for name, split in splits.items()}


def main(argv: list[str]) -> None:
    """Writes the data set."""
    out, *recipes = command_line.arguments(argv, "OUT", "RECIPE...")
    with command_line.one_line_errors():
        counts = mix(Path(out), recipes)
    say(f"written to {out}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))


if __name__ == "__main__":
    command_line.run(main)
