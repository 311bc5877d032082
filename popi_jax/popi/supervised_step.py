"""A likelihood step of the inference model on known summaries: a baseline without rewards."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from popi_jax.arrays import Metrics, Params, RoleState, Rollouts, UserBatch
from popi_jax.losses.masked import metric
from popi_jax.popi.plan import RolePlan
from popi_jax.popi.scorer import AnswerLogps, Scorer


def supervised_step(
    state: RoleState, frozen: Params, users: UserBatch, *, role: RolePlan, scorer: Scorer
) -> tuple[RoleState, Metrics]:
    """A step on the mean negative log-likelihood of the tokens of `users.taught` behind the signals
    (nats per token, at temperature 1). frozen: the base under adapters."""
    taught = jax.tree.map(lambda x: x[:, None], users.taught)
    tokens = jnp.maximum(jnp.sum(taught.lengths), 1)
    nothing = jnp.zeros(taught.lengths.shape)
    # they stand where sampled summaries do: a group of one, whose log-probs nobody reads
    known = Rollouts(taught, nothing == 0, nothing[..., None])

    def loss_fn(scores: AnswerLogps, *part: object) -> tuple[Float[Array, ""], tuple]:
        losses = jnp.where(scores.mask, -scores.logps, 0.0)
        return jnp.sum(losses) / tokens, ({"nll": metric(losses, scores.mask)}, ())

    whole = partial(role.join_policy, frozen=frozen)
    plain = dataclasses.replace(scorer, temperature=1.0)
    grads, metrics, _ = plain.differentiate_summaries(
        loss_fn, state.params, whole, (users, known), entropies=False
    )
    state, norm = role.apply_gradients(state, grads)
    metrics |= {"grad_norm": metric(norm)}
    return state, {f"supervised/{name}": mean for name, mean in metrics.items()}
