"""Optimizers from the configuration."""

import optax

from popi_jax.config import Config, OptimizerConfig


def adamw(
    cfg: OptimizerConfig, learning_rate: float, lr_warmup_steps: int, total_steps: int
) -> optax.GradientTransformation:
    """AdamW behind a clip by global norm; linear warm-up, then cosine to `final_lr` of the peak at `total_steps`."""
    total = max(total_steps, lr_warmup_steps + 1)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if lr_warmup_steps else learning_rate,
        peak_value=learning_rate,
        warmup_steps=lr_warmup_steps,
        decay_steps=total,
        end_value=learning_rate * cfg.final_lr,
    )
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.adamw(schedule, b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay),
    )


def warmup_transform(cfg: Config) -> optax.GradientTransformation:
    """For both roles in the warm-up stage."""
    return adamw(cfg.optimizer, cfg.warmup.learning_rate, cfg.warmup.lr_warmup_steps, cfg.warmup.steps)


def inference_transform(cfg: Config, total_steps: int) -> optax.GradientTransformation:
    return adamw(cfg.optimizer, cfg.inference.learning_rate, cfg.inference.lr_warmup_steps, total_steps)


def generator_transform(cfg: Config, total_steps: int) -> optax.GradientTransformation:
    return adamw(cfg.optimizer, cfg.generator.learning_rate, cfg.generator.lr_warmup_steps, total_steps)
