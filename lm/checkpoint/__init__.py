"""Saved states: written and verified (`store`), gone on from (`resume`), carried over to another run (`init_from`)."""

from lm.checkpoint.store import (
    CheckpointError,
    Checkpoints,
    Saved,
    choose,
    fingerprints,
    list_saved,
    load,
    named_leaves,
)
