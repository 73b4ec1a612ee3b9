"""Optimizers, learning rate schedules, and which parameters are trained."""

from lm.optim.optimizer import Optimizer, build, is_stacked_kernel, state_specs
from lm.optim.schedule import Schedule, schedule
