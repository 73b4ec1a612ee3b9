"""Next-item recommendation by a causal transformer, as SASRec (Kang and McAuley 2018), on SYNTHETIC interactions.

    python tools/make_interactions.py runs/interactions.csv
    python -m lm.main --config=configs/sasrec.py --workdir=runs/sasrec
    python -m lm.main --config=configs/sasrec.py:masked --workdir=runs/sasrec_masked

Two CPU cores, minutes. Each user's last item ranked among all items, at the step that scores best on the second-last
items: HR@10 0.765, NDCG@10 0.437 (seed 0). Recommending the ten most popular items gives 0.380 and 0.232; the Markov
chain that made the data, known exactly, gives 0.849 and 0.483.
Unlike in the paper, the loss is the cross-entropy over all items, not one negative (Klenitskiy and Vasilev 2023).
Another table: --config.data.path=FILE; data.rename maps its columns, such as (("1", "user"), ("2", "item"), ("4",
"time")) for MovieLens' u.data. The table is used as it is: the papers first leave out rare users and items.
The argument 'masked' starts from the run of configs/bert4rec.py; 'scratch' is the same model from scratch. For a
comparison after few passes, see experiments/objectives/results.md.
"""

from typing import Any

from lm.config.schema import ConfigError
from lm.tasks import default_config


def get_config(arg: str | None = None) -> Any:
    """Next-item prediction; `arg` is '', 'masked' or 'scratch'."""
    if arg not in (None, "", "masked", "scratch"):
        raise ConfigError(f"recipe argument '{arg}': expected masked, scratch or nothing")
    c = default_config("next_item")
    if arg:
        c.tokenizer.extra_ids = 1  # bert4rec's mask, which occurs in no row
    if arg == "masked":
        c.init_from = "runs/bert4rec"
        c.init_rules = ((r"decoder/(.*)", r"encoder/\1"), (r".*", "keep"))
    c.tokenizer.vocab_size = 512  # the items and three special ids
    c.data.format = "interactions"
    c.data.path = "runs/interactions.csv"
    c.data.packing = "pad"
    c.data.seq_len = 32  # the newest items of a user
    c.data.batch_size = 128

    c.model.num_layers = 2
    c.model.embed_dim = 64
    c.model.num_heads = 2
    c.model.init = "fan_in"  # at this width better than gpt2, see experiments/initialisation
    c.model.dropout = 0.2
    c.model.unroll = 0  # all layers: faster on CPU
    c.loss.chunk_len = 0  # 128 rows x 32 positions x 512 ids x 4 bytes = 8 MiB of logits

    c.optim.learning_rate = 3e-3
    c.optim.b2 = 0.98
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 20
    c.train.total_epochs = 16.0
    c.eval.every_epochs = 4.0
    c.checkpoint.best_metric = "ndcg_at_10"
    return c
