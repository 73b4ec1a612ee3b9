"""Losses: arrays in, `LossTerms` out, each a sum and a weight that are added over micro-batches and divided once.

`contrastive` (losses that couple the rows of a batch) and `ranking` (ranks of items) are modules of their own.
"""

from lm.losses.classification import (
    class_cross_entropy,
    patch_mse,
    span_cross_entropy,
    squared_error,
    symmetric_divergence,
)
from lm.losses.cross_entropy import reference_token_cross_entropy, sequence_log_likelihood, token_cross_entropy
from lm.losses.logits import MASKED_LOGIT, logits
from lm.losses.router import LOAD_BALANCE, router_loss
