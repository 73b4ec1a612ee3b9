"""Metrics as mergeable sums, and what each metric is called and measured in.

A metric is a (sum, weight) pair; its value is sum / weight, divided once at the very end. Adding the pairs of
micro-batches, batches, shards or hosts gives the same value as one pass over all rows. There is no mean of means.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# name -> (sum, weight), on the host in float64. Examples, over all tokens with a loss weight:
#   loss           (the quantity that is optimised, weight)  label smoothing and z-loss included
#   nll            (-log p(target) in nats, weight)
#   bits_per_byte  (-log2 p(target), UTF-8 bytes of the targets)
Sums = dict[str, tuple[float, float]]


_LOSS = "that of the loss"  # replaced by the unit of the task's loss


class About(NamedTuple):
    """Description of a metric.

    Attributes:
      title: its name in tables and above curves.
      unit: of its values; '' = none, as for a share.
      less_is_better: whether smaller values are better.
    """

    title: str
    unit: str = ""
    less_is_better: bool = False


METRICS = {
    "loss": About("Loss", _LOSS, less_is_better=True),
    "nll": About("NLL", _LOSS, less_is_better=True),
    "answer_loss": About("NLL of the answers", _LOSS, less_is_better=True),
    "perplexity": About("Perplexity", less_is_better=True),
    "bits_per_byte": About("Bits per byte", less_is_better=True),
    "accuracy": About("Accuracy"),
    "pair_accuracy": About("Accuracy of the pairs' labels"),
    "token_accuracy": About("Accuracy over words"),
    "f1": About("F1"),
    "matthews": About("Matthews correlation"),
    "pearson": About("Pearson correlation"),
    "spearman": About("Spearman correlation"),
    "exact_match": About("Exact match"),
    "HasAns_exact": About("Exact match where there is an answer"),
    "HasAns_f1": About("F1 where there is an answer"),
    "NoAns_exact": About("Exact match where there is none"),
    "NoAns_f1": About("F1 where there is none"),
    "best_exact": About("Exact match at the best threshold"),
    "best_f1": About("F1 at the best threshold"),
    "best_exact_thresh": About("Threshold of the best exact match"),
    "best_f1_thresh": About("Threshold of the best F1"),
    "entity_f1": About("Entity F1"),
    "entity_f1_strict": About("Entity F1, strict"),
    "entity_precision": About("Entity precision"),
    "entity_recall": About("Entity recall"),
    "mean_score": About("Mean score of the tasks"),
    "hr_at_10": About("Hit rate at 10"),
    "ndcg_at_10": About("NDCG at 10"),
    "alignment": About("Alignment", "squared distance", less_is_better=True),
    "uniformity": About("Uniformity", less_is_better=True),
    "reward_margin": About("Margin of the rewards", "nats"),
    "chosen_reward": About("Reward of the chosen answers", "nats"),
    "rejected_reward": About("Reward of the rejected answers", "nats", less_is_better=True),
    "balance": About("Balance of the experts", less_is_better=True),
    "weight": About("Weight of the batch"),
    "learning_rate": About("Learning rate"),
    "grad_norm": About("Gradient norm"),
    "tokens_per_second": About("Tokens per second"),
    "tokens_per_second_a_device": About("Tokens per second and device"),
    "mfu": About("MFU, attention in full"),
    "mfu_causal": About("MFU, attention's causal half"),
    "input_bound": About("Input-bound", "share of the time"),
}


def about(name: str, loss_unit: Callable[[str], str] = lambda prefix: "") -> About:
    """Describes a metric. 'NAME_loss', the loss of the source or task NAME, and 'SET/loss', that of a set of
    `eval.sets`, are described as 'loss' with a prefix.

    A metric that is not in `METRICS` has its name as title, and larger values are better.

    Args:
      name: as an evaluation reports it.
      loss_unit: '', NAME, 'SET/' or 'SET/NAME' -> unit of that loss, see `lm.tasks.base.loss_unit`.
    """
    of_set, slash, own_name = name.rpartition("/")
    if slash:
        found = about(own_name, lambda prefix: loss_unit(f"{of_set}/{prefix}"))
        return found._replace(title=f"{of_set}: {found.title}")
    words = name.split("_")
    own = _known_part(words)
    if own is None:
        return About(name)
    found, prefix = METRICS["_".join(words[own:])], "_".join(words[:own])
    if found.unit == _LOSS:
        found = found._replace(unit=loss_unit(prefix))
    return found._replace(title=f"{prefix}: {found.title}") if prefix else found


def is_known(name: str) -> bool:
    """Whether a metric, perhaps of a source or task, is in `METRICS`."""
    return _known_part(name.rpartition("/")[2].split("_")) is not None


def _known_part(words: list[str]) -> int | None:
    """Index of the word at which the metric's own name begins; None = no known metric."""
    return next((i for i in range(len(words)) if "_".join(words[i:]) in METRICS), None)


def nll_metrics(nll_sum: Any, weight_sum: Any, byte_sum: Any) -> dict[str, tuple[Any, Any]]:
    """'nll' and 'bits_per_byte' of token likelihoods, as (sum, weight), for `LossTerms.metrics`; also inside jit.

    Args:
      nll_sum: [], sum of loss_weight * -log p(target), in nats.
      weight_sum: [], sum of loss_weight.
      byte_sum: [], sum of the UTF-8 bytes of the targets that have a weight; control symbols have 0 bytes.
    """
    return {"nll": (nll_sum, weight_sum), "bits_per_byte": (nll_sum / math.log(2), byte_sum)}


def add(total: Mapping[str, tuple[Any, Any]], part: Mapping[str, tuple[Any, Any]]) -> Sums:
    """Adds two sets of (sum, weight) pairs in float64. Names that only one of them has are kept. Takes any scalars."""
    out = {name: (float(value), float(weight)) for name, (value, weight) in total.items()}
    for name, (value, weight) in part.items():
        old_value, old_weight = out.get(name, (0.0, 0.0))
        out[name] = (old_value + float(value), old_weight + float(weight))
    return out


def gain(name: str, value: float) -> float:
    """`value` with the sign that makes larger better: -`value` for metrics of which less is better."""
    return -value if about(name).less_is_better else value


def finalize(sums: Mapping[str, tuple[Any, Any]], has_perplexity: bool) -> dict[str, float]:
    """Name -> sum / weight, and 'perplexity' = exp(nll) of a language model (`Task.has_perplexity`).

    A metric of weight 0 was measured on nothing and is left out, rather than reported as 0 or NaN. A perplexity that
    overflows float64 is inf.
    """
    out = {name: float(value) / float(weight) for name, (value, weight) in sums.items() if float(weight) != 0}
    if "nll" in out and has_perplexity:
        # exp overflows just above 709 nats; a diverged model is there.
        out["perplexity"] = math.inf if out["nll"] > 709 else math.exp(out["nll"])
    return out
