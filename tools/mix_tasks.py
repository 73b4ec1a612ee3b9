"""Writes the labelled sentences of several recipes as one data set, for task.name=multitask.

python tools/mix_tasks.py OUT RECIPE [RECIPE ...]

OUT/train.jsonl and OUT/valid.jsonl hold the records of configs/RECIPE.py for each of them, with labels such as
'RECIPE/LABEL'. A recipe is one of classification or regression; its data is read as its config says.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # recipes import `configs`, which is not installed

from lm.data.readers import registry
from lm.tasks import build_config, task_of


def mix(out: Path, names: list[str]) -> dict[str, int]:
    """Writes both files. Returns how many records each recipe has in both.

    Raises:
      DataError, ConfigError: as reading the data of a recipe does.
    """
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


def main() -> None:
    """Writes what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("recipes", nargs="+", metavar="RECIPE")
    args = parser.parse_args()
    try:
        counts = mix(args.out, args.recipes)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"written to {args.out}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
