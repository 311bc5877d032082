"""Rows without padding: what is computed token by token goes over the tokens alone, one after the
other.

A tree of texts has *slots*, as many for each text as the longest may need. Attention works on them;
all else, most of the arithmetic, works on *places*, a fixed number for all rows of a shard that its
tokens fill from the start: there one long text pads no other. How many places there are is a guess
(`Budget`); what does not fit is computed in its slots, so the guess decides about the speed alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from popi_jax.arrays import Tokens

WORTHWHILE = 0.95  # places per slot, at most, for which it pays to compute them apart


class Budget(NamedTuple):
    """How many tokens the rows of one shard hold, as a rule, and how many of them belong to
    answers."""

    tokens: int
    answers: int
    shards: int = 1  # equal parts of the rows


class Dense(NamedTuple):
    """Where the tokens of each shard lie: slots of all its rows against places."""

    slot_of: Int[Array, "shards places"]  # 0 at places without a token
    place_of: Int[Array, "shards slots"]  # some place or other for slots without a token
    used: Bool[Array, "shards places"]
    valid: Bool[Array, "shards slots"]


def within(
    budget: Budget | None,
    context: Tokens,
    turns: Tokens,
    answers: Tokens | None,
    compute: Callable[[Budget | None], Any],
) -> Any:
    """compute(budget) if the texts fit the budget, else compute(None), which must give the same:
    decided by their lengths, inside the program, for all shards alike.

    Not to be differentiated: both branches would keep what the backward pass of either needs.
    Without a budget, or with one that spares next to nothing, there is compute(None) alone."""
    parts = [context, turns] if answers is None else [context, turns, answers]
    if (
        budget is None
        or budget.tokens > WORTHWHILE * sum(part.ids.size for part in parts) / budget.shards
    ):
        return compute(None)

    def count(part: Tokens) -> Int[Array, " shards"]:
        return jnp.sum(part.lengths.reshape(budget.shards, -1), axis=1)

    fits = sum(map(count, parts)) <= budget.tokens
    if answers is not None:
        fits &= count(answers) <= budget.answers
    return jax.lax.cond(jnp.all(fits), lambda: compute(budget), lambda: compute(None))


def dense(valid: Bool[Array, "batch slots"], places: int, shards: int) -> Dense:
    """Gives the tokens of each shard their places, in the order of rows and slots. They must fit:
    what does not is lost."""
    valid = valid.reshape(shards, -1)
    count = jnp.cumsum(valid, axis=1)
    place_of = jnp.clip(count - 1, 0, places - 1)
    slots = jnp.arange(valid.shape[1])

    def slots_of(valid: Array, place_of: Array) -> Array:
        return (
            jnp.zeros((places,), jnp.int32)
            .at[jnp.where(valid, place_of, places)]
            .set(slots, mode="drop")
        )

    used = jnp.arange(places)[None, :] < count[:, -1:]
    return Dense(jax.vmap(slots_of)(valid, place_of), place_of, used, valid)


def take(x: Array, index: Int[Array, "shards n"]) -> Array:
    """x[s, index[s, i]] for each shard s; the same may be taken several times."""
    return jax.vmap(lambda rows, at: rows.at[at].get(mode="promise_in_bounds"))(x, index)


@jax.custom_vjp
def to_places(
    x: Float[Array, "shards slots *dims"], at: Dense
) -> Float[Array, "shards places *dims"]:
    """What lies in the slots of tokens, at their places; anything at places without a token.

    A token has one slot and one place, so the gradient is the way back: nothing has to be added up.
    """
    return take(x, at.slot_of)


@jax.custom_vjp
def to_slots(
    x: Float[Array, "shards places *dims"], at: Dense
) -> Float[Array, "shards slots *dims"]:
    """The inverse of `to_places`; anything in slots without a token."""
    return take(x, at.place_of)


def _only(mask: Bool[Array, "shards n"], x: Array) -> Array:
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, 0)


to_places.defvjp(
    lambda x, at: (take(x, at.slot_of), at),
    lambda at, g: (_only(at.valid, take(g, at.place_of)), None),
)
to_slots.defvjp(
    lambda x, at: (take(x, at.place_of), at),
    lambda at, g: (_only(at.used, take(g, at.slot_of)), None),
)
