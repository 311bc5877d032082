"""Your own users and preference pairs: one JSON record per line, in the format of docs/data.md.

Command: python -m popi_jax.train --config=configs/jsonl.py --config.data.path=my_users.jsonl
Hardware, time and result depend on the data; none are measured.
"""

from ml_collections import ConfigDict

from configs.base import compose


def get_config(arg: str = "") -> ConfigDict:
    c = compose(arg)
    c.name = "jsonl"
    c.data.source = "jsonl"
    c.data.path = "data/users.jsonl"
    c.data.download = False
    return c
