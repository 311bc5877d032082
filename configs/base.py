"""What every file of configs/ begins with: the defaults of popi_jax/config.py, overwritten by rows.

Order: the defaults, then MODELS[model], SCALES[scale], SCHEDULES[schedule], the lines of the file
itself, and last the flags `--config.a.b=value`. A released model on a laptop has smaller batches,
a generator that is trained alone from random weights a larger learning rate.
A layer may only overwrite fields that are declared: another name or type raises."""

import dataclasses
from typing import NamedTuple

from ml_collections import ConfigDict

from configs.models import MODELS
from configs.scales import RELEASED_ON_LAPTOP, SCALES, detect, find_row
from configs.schedules import FROM_RANDOM, SCHEDULES
from popi_jax.config import Config
from popi_jax.errors import UserError, did_you_mean


class Arg(NamedTuple):
    """What follows the colon of `--config=configs/prism.py:model=tiny,scale=auto`."""

    model: str = "tiny"
    scale: str = "auto"  # auto: the row for this machine
    schedule: str = "default"


def parse_arg(arg: str) -> Arg:
    """Parses "model=small,schedule=short"; an empty value means the default.

    Raises:
        UserError: one line, for an unknown or repeated name or an unknown value.
    """
    allowed = {"model": [*MODELS], "scale": ["auto", *SCALES], "schedule": [*SCHEDULES]}
    chosen: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in arg.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise UserError(f'"{part}" is not name=value; write e.g. model={next(iter(MODELS))}')
        if name not in allowed:
            names = f"{', '.join(allowed)}.{did_you_mean(name, allowed)}"
            raise UserError(f'unknown name "{name}", allowed are {names}')
        if name in chosen:
            raise UserError(f'"{name}" is given twice')
        if value and value not in allowed[name] and not (name == "scale" and find_row(value)):
            values = f"{', '.join(allowed[name])}.{did_you_mean(value, allowed[name])}"
            also = " Or name the topology of a TPU, e.g. v5p:4x4x4." if name == "scale" else ""
            raise UserError(f'{name} = "{value}": must be one of {values}{also}')
        chosen[name] = value
    return Arg(**{name: value for name, value in chosen.items() if value})


def compose(arg: str) -> ConfigDict:
    """Returns the defaults, locked, overwritten by the rows that `arg` names."""
    chosen = parse_arg(arg)
    c = ConfigDict(dataclasses.asdict(Config())).lock()
    c.update_from_flattened_dict(MODELS[chosen.model])
    scale = detect() if chosen.scale == "auto" else chosen.scale
    c.update_from_flattened_dict(find_row(scale))
    if scale == "laptop" and c.model.checkpoint:
        c.update_from_flattened_dict(RELEASED_ON_LAPTOP)
    c.update_from_flattened_dict(SCHEDULES[chosen.schedule])
    if c.model.checkpoint:
        c.warmup.steps = 0
    else:
        c.update_from_flattened_dict(FROM_RANDOM.get(chosen.schedule, {}))
    return c
