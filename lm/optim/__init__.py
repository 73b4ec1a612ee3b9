"""The optimizer of a run: its update, its schedule, and which parameters it trains."""

from lm.optim.optimizer import Optimizer, build, is_stacked_kernel, schedule, state_specs
