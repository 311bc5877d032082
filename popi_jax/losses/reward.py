"""The reward of a summary: how well the generator behind it ranks the user's pairs."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from popi_jax.arrays import Tokens
from popi_jax.losses.masked import masked_mean_last

KINDS = ("log_sigmoid", "accuracy", "margin")


@dataclasses.dataclass(frozen=True)
class RewardObjective:
    """Static settings of a reward."""

    kind: str = "log_sigmoid"  # of a pair: one of KINDS
    over: float = 1.0  # divides what pairs are worth: beta where it divides the loss too
    length_penalty: float = 0.0  # per token
    repeat_penalty: float = 0.0  # per token that `count_repeats` counts
    unfinished_penalty: float = 0.0  # of a summary that is cut at the length limit
    kl_coef: float = 0.0  # per nat of KL; 0: the KL is in the loss, if at all


def pair_rewards(margins: Float[Array, "*rows"], *, kind: str) -> Float[Array, "*rows"]:
    """What one pair's margin is worth: "log_sigmoid", log sigmoid(m), nats, <= 0, with plain DPO
    the negative of the generator's loss, so that both models ascend one objective (POPI, arXiv
    2510.17881 v1); "accuracy", 1 where m > 0, a tie one half; "margin", m itself, nats. Raises
    ValueError for another name."""
    match kind:
        case "log_sigmoid":
            return jax.nn.log_sigmoid(margins)
        case "accuracy":
            return (margins > 0) + 0.5 * (margins == 0)
        case "margin":
            return margins
    raise ValueError(f"the reward {kind!r} is unknown; allowed: {', '.join(KINDS)}")


def summary_rewards(
    margins: Float[Array, "users group pairs"],
    pair_mask: Bool[Array, "users pairs"],
    lengths: Int[Array, "users group"],
    margins_without_summary: Float[Array, "users pairs"] | None = None,
    kl: Float[Array, "users group"] | None = None,
    repeats: Int[Array, "users group"] | None = None,
    finished: Bool[Array, "users group"] | None = None,
    *,
    objective: RewardObjective,
) -> Float[Array, "users group"]:
    """Mean over the user's pairs of `pair_rewards`, divided by `over`, less `length_penalty` per
    token, `repeat_penalty` per repeat, `unfinished_penalty` where a summary is not `finished`
    (DAPO, arXiv 2503.14476, has such a penalty, which rises over the last tokens) and `kl_coef` per
    nat of `kl`.

    margins_without_summary: the generator's on the same pairs with no summary; their mean reward is
    subtracted. It is the same for all summaries of a user, so it acts only on advantages that
    compare users (baseline or scale "batch"). kl: of each summary to the reference inference model,
    `summed_kl`."""
    o, mask = objective, jnp.broadcast_to(pair_mask[:, None, :], margins.shape)
    rewards = masked_mean_last(pair_rewards(margins, kind=o.kind), mask)
    if margins_without_summary is not None:
        without = pair_rewards(margins_without_summary, kind=o.kind)
        rewards = rewards - masked_mean_last(without, pair_mask)[:, None]
    rewards = rewards if o.over == 1.0 else rewards / o.over
    rewards = rewards - o.length_penalty * lengths.astype(jnp.float32)
    if repeats is not None:
        rewards = rewards - o.repeat_penalty * repeats.astype(jnp.float32)
    if finished is not None:
        rewards = rewards - o.unfinished_penalty * (1.0 - finished.astype(jnp.float32))
    return rewards - o.kl_coef * kl if kl is not None else rewards


def count_repeats(summaries: Tokens) -> Int[Array, "*rows"]:
    """Tokens of each summary that end a pair of neighbours which it had before: saying "warm tone"
    again counts one or more, a word alone nothing. A generator may answer more firmly to what is
    said twice, so that RL finds repetition where nothing speaks against it."""
    ids = summaries.ids
    pairs = jnp.stack([ids[..., :-1], ids[..., 1:]], axis=-1)
    equal = jnp.all(pairs[..., :, None, :] == pairs[..., None, :, :], axis=-1)
    places = jnp.broadcast_to(jnp.arange(pairs.shape[-2]), pairs.shape[:-1])
    earlier = places[..., None, :] < places[..., :, None]
    before = jnp.any(equal & earlier, axis=-1)
    return jnp.sum(before & (places + 1 < summaries.lengths[..., None]), axis=-1)
