"""PRISM: 1,500 people, their survey and their scored conversations (arXiv 2404.16019).

Command: python -m popi_jax.train --config=configs/prism.py
Hardware and time: 2 CPU cores, 6.5 minutes, with model=tiny.
Result: on the made sample in the format of PRISM, accuracy with greedy summaries 0.635 before the
main stage and 0.765 after it, at commit fb030ed. It says nothing about real people.
"""

from ml_collections import ConfigDict

from configs.base import compose


def get_config(arg: str = "") -> ConfigDict:
    c = compose(arg)
    c.name = "prism"
    return c
