"""Optimizers from the configuration, all of optax."""

import dataclasses
from typing import Any

import jax
import optax

from popi_jax.arrays import Params
from popi_jax.config import Config, OptimizerConfig


def learning_rates(
    cfg: OptimizerConfig, learning_rate: float, lr_warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Linear warm-up from 0 to the peak; then constant, or cosine or linear to `final_lr` of the
    peak at the end."""
    total, first = max(total_steps, lr_warmup_steps + 1), 0.0 if lr_warmup_steps else learning_rate
    end = learning_rate * cfg.final_lr
    if cfg.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(first, learning_rate, lr_warmup_steps, total, end)
    rest = optax.linear_schedule(
        learning_rate, end if cfg.schedule == "linear" else learning_rate, total - lr_warmup_steps
    )
    return optax.join_schedules(
        [optax.linear_schedule(first, learning_rate, lr_warmup_steps), rest], [lr_warmup_steps]
    )


def optimizer(
    cfg: OptimizerConfig, learning_rate: float, lr_warmup_steps: int, total_steps: int
) -> optax.GradientTransformation:
    """The optimizer of the configuration behind a clip by global norm; `total_steps` are its own
    updates."""
    rates = learning_rates(cfg, learning_rate, lr_warmup_steps, total_steps)
    match cfg.name:
        case "adamw":
            made = optax.adamw(rates, b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay)
        case "lion":
            made = optax.lion(rates, b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay)
        case "adafactor":
            made = optax.adafactor(
                rates, multiply_by_parameter_scale=False, weight_decay_rate=cfg.weight_decay or None
            )
        case "muon":
            made = optax.contrib.muon(
                rates,
                beta=cfg.b1,
                weight_decay=cfg.weight_decay,
                adam_b1=cfg.b1,
                adam_b2=cfg.b2,
                adam_weight_decay=cfg.weight_decay,
                muon_weight_dimension_numbers=matrices,
                consistent_rms=0.2,  # the size of Adam's updates: one learning rate serves both
            )
        case _:
            raise ValueError(f"the optimizer {cfg.name!r} is unknown")
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), made)


def matrices(params: Params) -> Any:
    """Which axes of a parameter Muon takes as inputs and outputs of a matrix, layer by layer; None:
    not a matrix.

    Kernels of the layers are [layers, inputs..., outputs...]; only that of `o` has two axes of
    inputs."""

    def axes(path: tuple[Any, ...], x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        names = [part.key for part in path]
        if names[0] != "layers" or names[-1] != "kernel":
            return None
        inputs = 2 if names[-2] == "o" else 1
        return optax.contrib.MuonDimensionNumbers(
            tuple(range(1, 1 + inputs)), tuple(range(1 + inputs, x.ndim))
        )

    return jax.tree_util.tree_map_with_path(axes, params)


def warmup_transform(cfg: Config) -> optax.GradientTransformation:
    """For both roles in the warm-up stage, which names its own (`warmup.optimizer`)."""
    w = cfg.warmup
    named = dataclasses.replace(cfg.optimizer, name=w.optimizer)
    return optimizer(named, w.learning_rate, w.lr_warmup_steps, w.steps)


def inference_transform(cfg: Config, turns: int) -> optax.GradientTransformation:
    """`turns`: updates of the main stage that train the role; without one it needs no memory."""
    if not turns:
        return optax.set_to_zero()
    c = cfg.inference
    return optimizer(
        cfg.optimizer, c.learning_rate, c.lr_warmup_steps, turns * c.updates_per_rollout
    )


def generator_transform(cfg: Config, turns: int) -> optax.GradientTransformation:
    """As `inference_transform`."""
    if not turns:
        return optax.set_to_zero()
    return optimizer(
        cfg.optimizer, cfg.generator.learning_rate, cfg.generator.lr_warmup_steps, turns
    )
