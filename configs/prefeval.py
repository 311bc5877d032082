"""PrefEval: stated preferences and questions whose answers respect or violate them (arXiv 2502.09597).

Command: python -m popi_jax.train --config=configs/prefeval.py
"""

from ml_collections import ConfigDict

from configs.base import compose


def get_config(arg: str = "") -> ConfigDict:
    c = compose(arg)
    c.name = "prefeval"
    c.data.source = "prefeval"
    c.data.path = "data/prefeval"
    c.data.split_by = "topic"
    c.data.num_pairs = 3
    c.data.context_len = max(c.data.context_len, 1536)
    c.data.turn_len = max(c.data.turn_len, 96)
    c.data.answer_len = max(c.data.answer_len, 160)
    c.data.summary_len = max(c.data.summary_len, 48)
    c.batch.pairs = min(c.batch.pairs, 3)
    return c
