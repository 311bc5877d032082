"""What the authors of POPI set for a released model, laid over a configuration of one of their
sets: their recipe, the row `official` of configs/schedules.py, and its figures.

Both come from "official code f88878c6" (YizhuoChen99/POPI, of a later version of the paper), never
from the paper; nobody has run them here. What differs still, and why, is in docs/paper_map.md."""

from ml_collections import ConfigDict

from configs.base import parse_arg
from configs.schedules import SCHEDULES
from popi_jax.config import Config

USERS = 8  # examples an update, of both stages: 20,000 in 2,500

# official code f88878c6: its recipe, then what both stages share, stage 1, stage 3
OFFICIAL: dict[str, object] = SCHEDULES["official"] | {
    "seed": 42,
    "data.num_pairs": 1,  # an example has one target
    "optimizer.name": "adamw",  # torch's, with its defaults:
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.weight_decay": 0.01,  # times the learning rate, as here
    "optimizer.schedule": "cosine",
    "optimizer.final_lr": 0.0,
    "schedule.phases": ("inference 2500", "stored 2500"),  # one round
    # stage 1: the inference model
    "inference.learning_rate": 1e-6,
    "inference.lr_warmup_steps": 150,
    "data.context_len": 8192,  # the prompt of the inference model
    "data.summary_len": 2048,  # new tokens
    # stage 3: the generator
    "generator.learning_rate": 1e-6,
    "generator.lr_warmup_steps": 150,
    # a row of at most 6,144: summary, turn and answer together
    "data.turn_len": 1024,
    "data.answer_len": 6144 - 2048 - 1024,
}


def apply_figures(c: ConfigDict, arg: str) -> None:
    """Lays the official figures over a configuration with base weights, else small limits."""
    if c.model.checkpoint:
        apply_official(c)
    else:
        apply_small(c, arg)


def apply_official(c: ConfigDict) -> None:
    """Lays the figures over a configuration with base weights.

    A schedule, or adapters, that were asked for keep their own phases and learning rates. Rows of
    TPU slices keep their users per update where a chip would else have none."""
    known = (Config().schedule.phases, SCHEDULES["official"]["schedule.phases"])
    own = set() if c.schedule.phases in known else {"schedule.phases"}
    for role in ("inference", "generator"):
        own |= {f"{role}.learning_rate"} if c[role].lora.rank else set()
    c.update_from_flattened_dict({k: v for k, v in OFFICIAL.items() if k not in own})
    many_chips = bool(c.mesh.topology) or c.batch.users > Config().batch.users
    c.batch.users = max(USERS, c.batch.users) if many_chips else USERS


def apply_small(c: ConfigDict, arg: str) -> None:
    """Lays limits for random weights over a configuration: they learn to write, not to personalise,
    and show that all parts work together."""
    c.data.num_pairs = c.batch.pairs = 1
    c.data.validation_fraction = 0.1  # of the training prompts, as files may be small
    c.data.context_len = 512
    c.data.turn_len = 48
    c.data.answer_len = 48
    c.data.summary_len = 32
    c.warmup.steps = 80
    c.schedule.save_every = 20
    if parse_arg(arg).schedule == "default":
        c.schedule.phases = ("inference 12", "alternate 2:1 6")
