"""The preference objective that trains both models.

L = -E log sigmoid(beta * [(log pi(y_w|x,z) - log ref(y_w|x)) - (log pi(y_l|x,z) - log ref(y_l|x))])

(POPI, arXiv 2510.17881 v1; the sigmoid loss of DPO, arXiv 2305.18290 equation 7.) The reference does not see z: it is
the generator at the start of training with an empty summary, so the margin measures what the summary adds. Whether the
paper conditions its reference on z could not be read in its abstract; this is a choice of this project.
"""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float


class PairLogps(NamedTuple):
    """Summed log-probs (nats) of whole replies, end token included."""

    chosen: Float[Array, "*rows"]
    rejected: Float[Array, "*rows"]


def preference_margins(policy: PairLogps, reference: PairLogps, *, beta: float) -> Float[Array, "*rows"]:
    """Implicit reward of the chosen reply less that of the rejected one, times beta (nats)."""
    return beta * ((policy.chosen - reference.chosen) - (policy.rejected - reference.rejected))


def dpo_losses(policy: PairLogps, reference: PairLogps, *, beta: float) -> Float[Array, "*rows"]:
    """Loss of each pair in nats, >= 0; log 2 where policy and reference agree."""
    return -jax.nn.log_sigmoid(preference_margins(policy, reference, beta=beta))
