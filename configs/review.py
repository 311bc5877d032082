"""Review: four wishes, positive to verbose, judge reviews (FSPO, arXiv 2502.19312).

Command: python -m popi_jax.train --config=configs/review.py
Hardware, time and result: not measured.
Licence: none stated; the code repository of FSPO has no licence file, its dataset cards were not
seen.

With base weights the figures are those of official code f88878c6 (configs/official.py).
"""

from ml_collections import ConfigDict

from configs.base import compose
from configs.official import apply_figures


def get_config(arg: str = "") -> ConfigDict:
    c = compose(arg)
    c.name = "review"
    c.data.source = "review"
    c.data.path = "data/review"
    apply_figures(c, arg)
    # official code f88878c6: blocks of 4 shots and one target, once through the rows
    c.data.num_shots = 4
    c.data.passes = 1
    return c
