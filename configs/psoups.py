"""P-Soups in AlignX's benchmark: two opposed personas a file (arXiv 2310.11564, 2503.15463).

Command: python -m popi_jax.train --config=configs/psoups.py
Hardware, time and result: not measured. A file has about 128 distinct targets: it shows that all
parts work together, and is no evidence.
Licence: none stated.

With base weights the figures are those of official code f88878c6 (configs/official.py), which does
not use this set.
"""

from ml_collections import ConfigDict

from configs.base import compose, parse_arg
from configs.official import apply_figures


def get_config(arg: str = "") -> ConfigDict:
    c = compose(arg)
    c.name = "psoups"
    c.data.source = "psoups"
    c.data.path = "data/psoups"
    c.data.split_by = "target"
    # of 128 targets
    c.data.validation_fraction = 0.1
    c.data.test_fraction = 0.2
    apply_figures(c, arg)
    if c.model.checkpoint and parse_arg(arg).schedule == "default":  # one pass through 430 rows
        c.schedule.phases = ("inference 60", "stored 60")
    c.data.num_pairs = c.batch.pairs = 1  # a row has one target
    c.data.num_shots = 4
    return c
