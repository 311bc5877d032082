"""AlignX: which of two comments on a post a person preferred (arXiv 2503.15463).

Command: python -m popi_jax.train --config=configs/alignx.py
Hardware, time and result: not measured.
Licence: none stated; the code repository has no licence file, the dataset card was not seen, and
the posts come from Reddit.

The four published test files are the test split, if data.path has them or they can be downloaded.
With base weights the figures are those of official code f88878c6 (configs/official.py).
"""

from ml_collections import ConfigDict

from configs.base import compose
from configs.official import apply_figures


def get_config(arg: str = "") -> ConfigDict:
    c = compose(arg)
    c.name = "alignx"
    c.data.source = "alignx"
    c.data.path = "data/alignx"
    c.data.form = "mixed"  # serves all four tests
    c.data.split_by = "published"
    apply_figures(c, arg)
    c.data.num_pairs = c.batch.pairs = 1  # a row has one target
    c.data.num_shots = 4
    return c
