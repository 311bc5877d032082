"""PersonaMem: questions to an assistant after long chats (arXiv 2504.14225, and two successors).

Command: python -m popi_jax.train --config=configs/personamem.py
--config.data.form=v3 reads the third release, v2 the second.
Hardware, time and result are not measured.
"""

from ml_collections import ConfigDict

from configs.base import compose


def get_config(arg: str = "") -> ConfigDict:
    c = compose(arg)
    c.name = "personamem"
    c.data.source = "personamem"
    c.data.path = "data/personamem"
    if c.model.checkpoint:  # chats of 32,000 tokens: what does not fit is left out of the signals
        c.data.context_len = max(c.data.context_len, 4096)
        c.data.summary_len = max(c.data.summary_len, 128)
    return c
