"""PRISM: 1,500 people, their survey and their scored conversations (arXiv 2404.16019).

Command: python -m popi_jax.train --config=configs/prism.py
Hardware and time: 2 CPU cores, 8 minutes (of an AMD EPYC with AVX-512), with model=tiny.
Result: on the made sample in the format of PRISM, accuracy with greedy summaries 0.640 before the
main stage and 0.831 after it, at commit be248f6. It says nothing about real people.
"""

from ml_collections import ConfigDict

from configs.base import compose


def get_config(arg: str = "") -> ConfigDict:
    c = compose(arg)
    c.name = "prism"
    return c
