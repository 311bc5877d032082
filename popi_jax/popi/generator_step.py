"""A preference step of the generator on the users' pairs behind summaries."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from popi_jax.arrays import Metrics, PairLengths, PairLogps, Params, RoleState, Tokens, UserBatch
from popi_jax.losses.masked import metric
from popi_jax.losses.preference import batch_terms, pair_margins, preference_losses
from popi_jax.popi.plan import GeneratorPlan
from popi_jax.popi.scorer import Scorer


def generator_step(
    state: RoleState,
    frozen: Params,
    reference: PairLogps | None,
    contexts: Tokens,
    users: UserBatch,
    *,
    plan: GeneratorPlan,
    scorer: Scorer,
) -> tuple[RoleState, Metrics, Float[Array, "users group pairs"]]:
    """A step on the preference objective; also the margins before it.

    frozen: the base under adapters. contexts: [users group seq]; reference: [users group pairs], or
    [users 1 pairs] where it does not see the summary; None where the objective has none."""
    o = plan.objective
    shape = (*contexts.lengths.shape, users.pair_mask.shape[1])
    spread = partial(jnp.broadcast_to, shape=shape)
    mask = spread(users.pair_mask[:, None])
    both = (users.chosen, users.rejected)
    lengths = PairLengths(*(spread(replies.lengths[:, None]) for replies in both))
    reference = jax.tree.map(spread, reference)
    whole = partial(plan.role.join_policy, frozen=frozen)
    total = jnp.maximum(jnp.sum(mask), 1)
    terms = None  # of the whole batch: what a microbatch cannot know
    if not o.needs_batch_logps:
        terms = batch_terms(None, lengths, reference, mask, objective=o)
    elif scorer.microbatches > 1:
        logps = scorer.score_pairs(whole(state.params), contexts, users)
        terms = batch_terms(logps, lengths, reference, mask, objective=o)

    def loss_fn(
        logps: PairLogps,
        contexts: Tokens,
        users: UserBatch,
        mask: Array,
        lengths: PairLengths,
        reference: PairLogps | None,
    ) -> tuple[Array, tuple[Metrics, Array]]:
        own = terms or batch_terms(logps, lengths, reference, mask, objective=o)
        losses = preference_losses(logps, lengths, reference, own, objective=o)
        margins = jax.lax.stop_gradient(pair_margins(logps, lengths, reference, objective=o))
        metrics = {
            "loss": metric(losses, mask),
            "accuracy": metric((margins > 0) + 0.5 * (margins == 0), mask),
            "margin": metric(margins, mask),
        }
        return jnp.sum(jnp.where(mask, losses, 0.0)) / total, (metrics, margins)

    batch = (contexts, users, mask, lengths, reference)
    grads, metrics, margins = scorer.differentiate_pairs(loss_fn, state.params, whole, batch)
    state, norm = plan.role.apply_gradients(state, grads)
    metrics = metrics | {"grad_norm": metric(norm)}
    return state, {f"generator/{name}": mean for name, mean in metrics.items()}, margins
