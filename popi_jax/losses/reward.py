"""The reward of a summary: how well the generator, given it, tells the user's chosen replies from the rejected ones."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from popi_jax.losses.masked import masked_mean_last


def summary_rewards(
    margins: Float[Array, "users group pairs"],
    pair_mask: Bool[Array, "users pairs"],
    lengths: Int[Array, "users group"],
    *,
    length_penalty: float,
) -> Float[Array, "users group"]:
    """Mean over the user's pairs of log sigmoid(margin), less `length_penalty` per token: nats, <= 0.

    It is the negative of the generator's preference loss, so that both models ascend one objective (POPI, arXiv
    2510.17881 v1).
    """
    mask = jnp.broadcast_to(pair_mask[:, None, :], margins.shape)
    return masked_mean_last(jax.nn.log_sigmoid(margins), mask) - length_penalty * lengths.astype(jnp.float32)
