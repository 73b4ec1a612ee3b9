"""Losses: arrays in, `LossTerms` out, each a sum and a weight that are added up and divided once."""

from lm.losses.cross_entropy import (
    BALANCE,
    MASKED_LOGIT,
    class_cross_entropy,
    logits,
    patch_mse,
    routing,
    sequence_log_likelihood,
    span_cross_entropy,
    squared_error,
    symmetric_divergence,
    token_cross_entropy,
)
