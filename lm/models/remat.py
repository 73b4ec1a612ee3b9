"""Rematerialisation policies: what is kept of a layer's forward pass for its backward pass; the rest is recomputed.

Values are named by `checkpoint_name` in `lm.models.transformer` and `lm.models.attention`. Under no policy is a value
kept that was gathered over devices, or every layer's would be held: weights (ZeRO-3), and the keys and values of
positions on other devices are gathered again.
"""

import jax

from lm.models import attention

_QKV = ("query", "key", "value")
_MATMULS = (*_QKV, attention.NAME, "out", "gate", "up")  # all matmuls but the last, whose result no gradient needs
_names = jax.checkpoint_policies.save_only_these_names

# model.remat -> policy.
REMAT_POLICIES = {
    "none": lambda primitive, *_, **__: primitive.name not in ("sharding_constraint", "all_gather"),
    "minimal": _names(*_MATMULS),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(  # as minimal, in the host's memory
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=_MATMULS,
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "attention": _names(*_QKV, attention.NAME, "out"),
    "qkv": _names(*_QKV),
    "full": jax.checkpoint_policies.nothing_saveable,  # the layer's input only
}
