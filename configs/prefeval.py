"""PrefEval: preferences and questions whose answers respect or violate them (arXiv 2502.09597).

Command: python -m popi_jax.train --config=configs/prefeval.py
Hardware and time: 2 CPU cores, 7.5 minutes, with model=tiny.
Result: with random weights, scores show that all parts work together and nothing more, at commit
b8e2849.
"""

from ml_collections import ConfigDict

from configs.base import compose, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    c = compose(arg)
    c.name = "prefeval"
    c.data.source = "prefeval"
    c.data.path = "data/prefeval"
    c.data.num_pairs = 3
    if c.model.checkpoint:
        c.data.context_len = max(c.data.context_len, 1536)
        c.data.summary_len = max(c.data.summary_len, 48)
    else:  # from 800 rows random weights learn to write, not to personalise
        c.data.context_len = 384
        c.data.turn_len = 48
        c.data.answer_len = 48
        c.data.summary_len = 32
        c.warmup.steps = 80
        c.schedule.save_every = 20
        if parse_arg(arg).schedule == "default":
            c.schedule.phases = ("inference 12", "alternate 2:1 6")
    c.batch.pairs = min(c.batch.pairs, 3)
    return c
