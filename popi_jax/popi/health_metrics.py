"""Signs of health of an update that trains the inference model, of what the update holds anyway: no
pass of a model is added. All are of the whole batch, so neither mesh nor microbatches matter.
docs/diagnostics.md says what each tells."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from popi_jax.arrays import Mean, Metrics, Tokens
from popi_jax.losses.masked import masked_mean_last, metric
from popi_jax.losses.reward import pair_rewards
from popi_jax.models.packing import length_mask

SATURATED = 8.0  # nats of a margin from which on log sigmoid hardly changes
EQUAL = 1e-6  # rewards that differ by no more are equal
NO_VARIANCE = 1e-10  # variance of rewards that rounding alone makes


class VarianceSums(NamedTuple):
    """Analysis of variance of pair rewards, summaries by pairs within each user, as sums over
    users: those of several batches add up."""

    between: Float[Array, ""]  # squares of the summaries' means about their user's, times K
    within: Float[Array, ""]  # squares of what neither the summary nor the pair explains
    between_df: Float[Array, ""]  # (G - 1) per user
    between_pairs: Float[Array, ""]  # (G - 1) K
    within_df: Float[Array, ""]  # (G - 1)(K - 1)
    users: Float[Array, ""]  # with a pair at all
    pairs: Float[Array, ""]


def health_metrics(
    margins: Float[Array, "users group pairs"],
    pair_mask: Bool[Array, "users pairs"],
    rewards: Float[Array, "users group"],
    summaries: Tokens,
    *,
    kind: str,
) -> Metrics:
    """kind: of `pair_rewards`; rewards: of the summaries, as the update takes them."""
    group = margins.shape[1]
    mask = jnp.broadcast_to(pair_mask[:, None, :], margins.shape)
    spread = jnp.max(rewards, axis=-1) - jnp.min(rewards, axis=-1)
    first = Tokens(summaries.ids[:, 0], summaries.lengths[:, 0])
    users = jnp.float32(margins.shape[0])
    return {
        "zero_variance": metric((spread <= EQUAL).astype(jnp.float32)),
        "distinct": metric(count_distinct(summaries) / group),
        "distinct_users": Mean(count_distinct(first), users),
        "saturated": metric((jnp.abs(margins) > SATURATED).astype(jnp.float32), mask),
        "margin_spread": metric(jnp.std(margins, axis=1, ddof=1), pair_mask),
        "reliability": reliability(sum_variances(margins, pair_mask, kind=kind)),
    }


def count_distinct(texts: Tokens) -> Float[Array, "*rows"]:
    """How many different texts [*rows n seq] holds in each row; padding does not count."""
    mask = length_mask(texts)
    ids = jnp.where(mask, texts.ids, -1)
    same = jnp.all(ids[..., :, None, :] == ids[..., None, :, :], axis=-1)
    earlier = jnp.tril(jnp.ones(same.shape[-2:], bool), k=-1)
    seen = jnp.any(same & earlier.reshape((1,) * (same.ndim - 2) + earlier.shape), axis=-1)
    return jnp.sum((~seen).astype(jnp.float32), axis=-1)


def sum_variances(
    margins: Float[Array, "users group pairs"], pair_mask: Bool[Array, "users pairs"], *, kind: str
) -> VarianceSums:
    """What a pair adds to all summaries alike is taken out: it moves no advantage."""
    group = margins.shape[1]
    mask = jnp.broadcast_to(pair_mask[:, None, :], margins.shape)
    worth = jnp.where(mask, pair_rewards(margins, kind=kind), 0.0)
    centred = jnp.where(mask, worth - jnp.mean(worth, axis=1, keepdims=True), 0.0)
    of_summary = masked_mean_last(centred, mask)
    rest = jnp.where(mask, centred - of_summary[..., None], 0.0)
    pairs = jnp.sum(pair_mask, axis=-1).astype(jnp.float32)
    some = (pairs > 0).astype(jnp.float32)
    return VarianceSums(
        between=jnp.sum(pairs[:, None] * of_summary**2),
        within=jnp.sum(rest**2),
        between_df=(group - 1) * jnp.sum(some),
        between_pairs=(group - 1) * jnp.sum(pairs),
        within_df=(group - 1) * jnp.sum(pairs - some),
        users=jnp.sum(some),
        pairs=jnp.sum(pairs),
    )


def reliability(sums: VarianceSums, pairs: float | None = None) -> Mean:
    """Share of the variance of summaries' rewards within groups that another draw of `pairs` pairs
    would repeat; None: of as many as the users have on average. Weight 0 where no user has two
    pairs, and where nothing varies.

    Of one pair it is rho, the part of the summary in the variance of a pair's reward; of K by
    Spearman and Brown K rho / (1 + (K - 1) rho)."""
    noise = sums.within / jnp.maximum(sums.within_df, 1.0)
    signal = (sums.between - sums.between_df * noise) / jnp.maximum(sums.between_pairs, 1.0)
    signal = jnp.maximum(signal, 0.0)  # rho is clipped to [0, 1]
    applies = (sums.within_df > 0) & (signal + noise > NO_VARIANCE)
    rho = jnp.where(applies, signal / jnp.where(applies, signal + noise, 1.0), 0.0)
    count = sums.pairs / jnp.maximum(sums.users, 1.0) if pairs is None else pairs
    return Mean(count * rho / (1.0 + (count - 1.0) * rho), applies.astype(jnp.float32))
