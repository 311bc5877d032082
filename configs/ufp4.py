"""UF-P-4 in AlignX's benchmark: users who care about one of four qualities (arXiv 2408.10075).

Command: python -m popi_jax.train --config=configs/ufp4.py
Hardware, time and result: not measured; the files were not seen.
Licence: none stated.

With base weights the figures are those of official code f88878c6 (configs/official.py), which does
not use this set.
"""

from ml_collections import ConfigDict

from configs.base import compose
from configs.official import apply_figures


def get_config(arg: str = "") -> ConfigDict:
    c = compose(arg)
    c.name = "ufp4"
    c.data.source = "ufp4"
    c.data.path = "data/ufp4"
    c.data.split_by = "target"
    apply_figures(c, arg)
    c.data.num_pairs = c.batch.pairs = 1  # a row has one target
    c.data.num_shots = 4
    return c
