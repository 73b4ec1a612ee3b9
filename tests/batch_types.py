"""Batches against the types of `lm.types.Batch`, at run time."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from jaxtyping import jaxtyped

from lm.types import Batch


def check(batch: Mapping[str, Any]) -> None:
    """Raises TypeError for an array that `Batch` does not name, or whose dtype, rank or sizes are not as it says."""
    hints = get_type_hints(Batch)
    with jaxtyped("context"):  # inside of it B, L, ... are of one size
        for key in sorted(batch, key=[*hints, *batch].index):  # tokens first: they say what L is
            if key not in hints:
                raise TypeError(f"batch[{key!r}] is not named in lm.types.Batch")
            array = batch[key]
            if not isinstance(array, hints[key]):
                raise TypeError(f"batch[{key!r}] is {array.dtype}{list(array.shape)}; expected {hints[key]}")


def checked(step: Callable[..., Any]) -> Callable[..., Any]:
    """`lm.step.train_step` or `eval_step`, whose second argument is checked when it is traced."""

    @functools.wraps(step)
    def run(state: Any, batch: Any, *args: Any, **options: Any) -> Any:
        check(batch)
        return step(state, batch, *args, **options)

    return run
