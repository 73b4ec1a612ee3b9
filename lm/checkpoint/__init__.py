"""Checkpoints: written and verified (`store`), resumed from (`resume`), read by another run (`init_from`)."""

from lm.checkpoint.store import (
    EXPIRED,
    CheckpointError,
    Checkpoints,
    Diverged,
    Saved,
    choose,
    fingerprints,
    first_readable,
    list_saved,
    load,
    named_leaves,
    none_readable,
    read_file,
    sweep,
    unfinished,
    verify,
    warn,
)
