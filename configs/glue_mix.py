"""One model for four tasks of sentences at once: SST-2, CoLA, RTE and STS-B, a head each (MT-DNN, Liu et al. 2019).

    python tools/mix_tasks.py runs/glue_mix_data sst2 cola rte stsb
    python -m lm.main --config=configs/glue_mix.py --workdir=runs/glue_mix

Two CPU cores, minutes. Accuracy, Matthews and Pearson correlation of each task: not run.
The argument is that of configs/sst2.py. Tasks are drawn in proportion to their size; a sentence or pair of more than 64
ids is cut, which happens most in RTE.
"""

import importlib
from typing import Any

from configs import reviews_clm
from lm.tasks import task_config

PARTS = ("sst2", "cola", "rte", "stsb")
DATA = "runs/glue_mix_data"


def get_config(arg: str | None = None) -> Any:
    """See above for `arg`."""
    c = reviews_clm.for_sentences(arg)
    c.data.format = "jsonl"
    c.data.path = f"{DATA}/train.jsonl"
    c.data.eval_path = f"{DATA}/valid.jsonl"
    tasks = {name: importlib.import_module(f"configs.{name}").get_config().task for name in PARTS}
    labels = (f"{name}/{label}" for name, task in tasks.items() for label in task.get("labels", ("",)))
    c.task = task_config("multitask", labels=tuple(labels))
    c.data.seq_len = 64
    c.checkpoint.best_metric = "mean_score"
    return c
