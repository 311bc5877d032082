"""Masked sums and means; the only place that divides by a count."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from popi_jax.arrays import Mean


def masked_mean(x: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, ""]:
    """Sum of the masked values over their number; 0 when the mask is empty."""
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def masked_mean_last(
    x: Float[Array, "*rows n"], mask: Bool[Array, "*rows n"]
) -> Float[Array, "*rows"]:
    """The same along the last axis."""
    return jnp.sum(jnp.where(mask, x, 0.0), axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def metric(x: Float[Array, "..."], mask: Bool[Array, "..."] | None = None) -> Mean:
    """Sum and count of the masked values, for means that are formed on the host."""
    mask = jnp.ones(x.shape, bool) if mask is None else jnp.broadcast_to(mask, x.shape)
    return Mean(
        jnp.sum(jnp.where(mask, x, 0.0).astype(jnp.float32)), jnp.sum(mask).astype(jnp.float32)
    )


def divided(mean: Mean) -> Float[Array, ""]:
    """A sum over its weight; 0 where nothing counted."""
    return mean.total / jnp.maximum(mean.weight, 1.0)
