"""Studies: many runs from one file, and tables, tests and claims from their run directories."""

from lm.study.axes import Override, arms, chain, over, product, sample, seeds, when, zip
from lm.study.definition import Claim, Study, Table, Trial, better, load
from lm.study.search import Search, choice, integer, log_uniform, uniform
