"""Every stage once on a small sample in the format of PRISM.

Command: python -m popi_jax.train --config=configs/smoke.py
Hardware and time: a CPU, a minute or two.
Result: scores mean nothing.
"""

from ml_collections import ConfigDict

from configs.base import compose, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    c = compose(arg)
    c.name = "smoke"
    c.data.path = "data/smoke"
    c.data.sample_people = 120
    c.model.vocab_size = 512
    c.model.num_layers = 2
    c.model.embed_dim = 32
    c.model.num_heads = 2
    c.model.num_kv_heads = 2
    c.model.mlp_dim = 64
    chips = c.mesh.data * c.mesh.fsdp * c.mesh.tensor
    if c.mesh.topology:  # heads and widths are too few for more
        c.mesh.fsdp, c.mesh.tensor = min(8, chips), 1
        c.mesh.data = chips // c.mesh.fsdp
    users = max(8, chips)
    c.batch.microbatches = 1
    c.warmup.steps = 0 if c.model.checkpoint else 4
    c.warmup.generator_users = users
    c.warmup.summary_users = c.warmup.reading_users = users
    c.inference.group_size = 4
    c.batch.users = users
    c.batch.pairs = min(c.batch.pairs, 2)
    if parse_arg(arg).schedule == "default":
        c.schedule.phases = ("inference 2", "generator 1", "alternate 1:1 2", "joint 1")
    c.schedule.log_every = 1
    c.schedule.save_every = 3
    c.evaluation.batch_users = users
    c.evaluation.max_users = 2 * users
    return c
