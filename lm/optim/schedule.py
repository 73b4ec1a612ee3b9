"""Learning rate schedules: warm-up, then constant, linear, cosine, inverse square root, or warm-up-stable-decay."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm.config import OptimConfig
from lm.config.schema import ConfigError

# step, int32 [...] -> learning rate, float32 [...].
Schedule = Callable[[jax.Array], jax.Array]


def schedule(cfg: OptimConfig, *, total_steps: int, warmup_steps: int, decay_steps: int) -> Schedule:
    """The learning rate as a pure function of the global step, so that resuming a run does not shift it.

    `step` counts from 0: training runs steps 0 to total_steps - 1. The warm-up is peak * (step + 1) / warmup_steps, so
    the learning rate of the first step is not 0 and that of step warmup_steps - 1 is the peak. A decay starts from the
    peak and would reach its end at step total_steps, so the learning rate of the last step is not 0 either. With peak
    1, end 0, 10 steps in all, 4 of warm-up, and 3 of decay for wsd:

        step      0    1    2    3    4     5     6     7     8     9     10, 11, ...
        constant  1/4  1/2  3/4  1    1     1     1     1     1     1     1
        linear    1/4  1/2  3/4  1    1     5/6   4/6   3/6   2/6   1/6   0
        cosine    1/4  1/2  3/4  1    1     0.93  0.75  0.5   0.25  0.07  0
        rsqrt     1/4  1/2  3/4  1    0.89  0.82  0.76  0.71  0.67  0.63  sqrt(warmup_steps / (step + 1))
        wsd       1/4  1/2  3/4  1    1     1     1     1     2/3   1/3   0

    Args:
      cfg: `learning_rate`, `schedule` and `end_lr_ratio` are read.
      total_steps: length of the run.
      warmup_steps: 0 = none.
      decay_steps: length of the final decay; wsd only.

    Returns:
      step, int32 [...] -> learning rate, float32 [...].

    Raises:
      ConfigError: warm-up and decay are longer than the run, or wsd has no decay, or rsqrt no warm-up.
    """
    if warmup_steps + decay_steps > total_steps:
        raise ConfigError(
            f"'optim.warmup_*' ({warmup_steps:,} steps) and 'optim.decay_*' ({decay_steps:,} steps) are together longer"
            f" than the run, 'train.total_*' ({total_steps:,} steps): shorten them or train longer"
        )
    if cfg.schedule == "wsd" and not decay_steps:
        raise ConfigError("'optim.schedule' is wsd, but no 'optim.decay_steps|_tokens|_examples|_epochs' is set")
    if cfg.schedule == "rsqrt" and not warmup_steps:
        raise ConfigError("'optim.schedule' is rsqrt, but no 'optim.warmup_*' is set: it is the unit of its decay")
    decay_start = total_steps - decay_steps if cfg.schedule == "wsd" else warmup_steps

    def remaining(step: jax.Array) -> jax.Array:
        """1 up to decay_start, then linear to 0 at total_steps. Both ends are exact, although XLA multiplies by 1/n."""
        left = jnp.maximum(total_steps - step, 0) / max(total_steps - decay_start, 1)
        return jnp.where(step <= decay_start, 1.0, left)

    # Step, from the last one of the warm-up on -> fraction of the way from the final rate (0) to the peak (1).
    shapes: dict[str, Schedule] = {
        "constant": lambda step: jnp.ones_like(step, jnp.float32),
        "linear": remaining,
        "cosine": lambda step: 0.5 - 0.5 * jnp.cos(jnp.pi * remaining(step)),
        "rsqrt": lambda step: jnp.sqrt(warmup_steps / (step + 1)),
        "wsd": remaining,
    }
    shape = shapes[cfg.schedule]
    end = cfg.end_lr_ratio if cfg.schedule in ("linear", "cosine", "wsd") else 0.0

    def learning_rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.int32)
        warm = (step + 1) / max(warmup_steps, 1)
        share = shape(step)
        ratio = jnp.where(step + 1 < warmup_steps, warm, share + (1 - share) * end)
        return jnp.asarray(cfg.learning_rate * ratio, jnp.float32)

    return learning_rate
