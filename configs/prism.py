"""PRISM: 1,500 people, their survey and their scored conversations (arXiv 2404.16019).

Command: python -m popi_jax.train --config=configs/prism.py
"""

from ml_collections import ConfigDict

from configs.base import compose


def get_config(arg: str = "") -> ConfigDict:
    c = compose(arg)
    c.name = "prism"
    return c
