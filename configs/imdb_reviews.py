"""Fine-tune the Wikipedia model on the sentiment of film reviews: the TFDS set imdb_reviews (Maas et al. 2011).

    python -m lm.main --config=configs/imdb_reviews.py --workdir=runs/imdb_reviews
    python -m lm.main --config=configs/imdb_reviews.py:lora --workdir=runs/imdb_reviews_lora

Not run on the whole set. The argument is START,HOW: 'clm' (from the run of configs/wikipedia_clm.py) or 'scratch'; what
learns (full, head, last2, lora, adapters). Labels are the names of the classes in the set.
Reads the set from TFDS_DATA_DIR (~/tensorflow_datasets); if it is missing, the error gives the command that prepares
it. For runs of minutes on two CPU cores see configs/imdb.py.
"""

from typing import Any

from configs import common, wikipedia_clm
from lm.tasks import task_config


def get_config(arg: str | None = None) -> Any:
    """See above for `arg`."""
    c = wikipedia_clm.get_config()
    common.fine_tune(c, arg, {"clm": "runs/wikipedia_clm"})
    c.task = task_config("classification", labels=("neg", "pos"))
    c.model.pool = "mean"
    c.model.dropout = 0.1
    c.data.path = "imdb_reviews"
    c.data.eval_path = "test"
    c.data.packing = "pad"
    c.data.seq_len = 512  # longer reviews are cut at the end
    c.data.batch_size = 32

    c.optim.learning_rate = 1e-4
    c.optim.schedule = "linear"
    c.optim.warmup_steps = 100
    c.optim.end_lr_ratio = 0.0
    c.train.total_steps = 0
    c.train.total_epochs = 3.0
    c.eval.every_steps = 0
    c.eval.every_epochs = 1.0
    c.eval.max_tokens = 0
    c.checkpoint.every_steps = 0
    c.checkpoint.best_metric = "accuracy"
    c.generate.prompts = ()
    return c
