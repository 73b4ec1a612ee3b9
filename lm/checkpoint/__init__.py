"""Checkpoints: written and verified (`store`), resumed from (`resume`), read by another run (`init_from`)."""

from lm.checkpoint.store import (
    CheckpointError,
    Checkpoints,
    Diverged,
    Saved,
    choose,
    fingerprints,
    list_saved,
    load,
    named_leaves,
    read_file,
    sweep,
)
