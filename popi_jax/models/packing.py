"""Trees of texts as rows of tokens, with padding or without.

A tree is a context, turns that continue it and answers to each turn. It is laid out as one row
[context | turns | answers] of *slots*, as many for each text as the longest may need. Attention
works on slots; all else, most of the arithmetic, may work on *places*, a fixed number for all rows
of a shard that its tokens fill from the start: there one long text pads no other. How many places
there are is a guess (`Budgets`); what does not fit is computed in its slots, so the guess decides
about the speed alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from popi_jax.arrays import Tokens

WORTHWHILE = 0.95  # places per slot, at most, for which it pays to compute them apart


class Level(NamedTuple):
    """Equal branches of a tree: how many in a row, and slots of each."""

    nodes: int
    length: int


class Tree(NamedTuple):
    """Answers to turns that continue one context."""

    context: Tokens  # [batch seq]
    turns: Tokens  # [batch turns seq]
    answers: Tokens  # [batch turns answers seq]


class Rows(NamedTuple):
    """A tree in slots."""

    ids: Int[Array, "batch slots"]
    positions: Int[Array, "batch slots"]
    valid: Bool[Array, "batch slots"]
    levels: tuple[Level, ...]


class Budget(NamedTuple):
    """How many tokens the rows of one shard hold, as a rule, and how many are of answers."""

    tokens: int
    answers: int
    shards: int = 1  # equal parts of the rows
    holds: bool = False  # all rows are known to fit: nothing is decided inside the program


class Budgets(NamedTuple):
    """Tokens that the users of one shard have, as a rule, in a microbatch of an update."""

    shards: int  # parts of the users while training
    rollout_shards: int  # and while sampling
    rollout_signals: int  # of users of such a part: signals, and what asks for a summary
    signals: int  # the same of users of a part while training
    contexts: int  # the generator's: each with a summary of full length, or what else it reads
    summaries: int  # one of each user
    pairs: int  # prompts, and both replies to each
    answers: int  # the replies alone

    def for_sampling(self) -> Budget:
        return Budget(self.rollout_signals, 0, self.rollout_shards)

    def for_pairs(self, group: int) -> Budget:
        """Of all pairs behind `group` summaries of each user."""
        return Budget(group * (self.contexts + self.pairs), group * self.answers, self.shards)

    def for_summaries(self, group: int) -> Budget:
        """Of `group` summaries behind the signals of each user."""
        return Budget(self.signals + group * self.summaries, group * self.summaries, self.shards)


class Places(NamedTuple):
    """Where the tokens of each shard lie: slots of all its rows against places."""

    slot_of: Int[Array, "shards places"]  # 0 at places without a token
    place_of: Int[Array, "shards slots"]  # some place or other for slots without a token
    used: Bool[Array, "shards places"]
    valid: Bool[Array, "shards slots"]


def prefix_tree(context: Tokens, turn: Tokens) -> Tree:
    """One turn behind each context, without answers. Shapes: [batch seq], [batch seq]."""
    batch = context.ids.shape[0]
    nothing = Tokens(jnp.zeros((batch, 1, 0, 0), jnp.int32), jnp.zeros((batch, 1, 0), jnp.int32))
    return Tree(context, Tokens(turn.ids[:, None], turn.lengths[:, None]), nothing)


def length_mask(tokens: Tokens) -> Bool[Array, "*rows seq"]:
    """True at the tokens that count."""
    index = jax.lax.broadcasted_iota(jnp.int32, tokens.ids.shape, tokens.ids.ndim - 1)
    return index < tokens.lengths[..., None]


def pack(tree: Tree) -> Rows:
    """Lays a tree out in slots, at the positions that each text would have behind its own past."""
    context, turns, answers = tree
    batch, context_len = context.ids.shape
    _, num_turns, turn_len = turns.ids.shape
    num_answers, answer_len = answers.ids.shape[2:]
    turn_start = jnp.broadcast_to(context.lengths[:, None], turns.lengths.shape)
    answer_start = jnp.broadcast_to((turn_start + turns.lengths)[..., None], answers.lengths.shape)

    def flat(*parts: Array) -> Array:
        return jnp.concatenate([part.reshape(batch, -1) for part in parts], axis=1)

    positions = flat(
        jnp.broadcast_to(jnp.arange(context_len)[None, :], (batch, context_len)),
        turn_start[..., None] + jnp.arange(turn_len)[None, None, :],
        answer_start[..., None] + jnp.arange(answer_len)[None, None, None, :],
    )
    ids, valid = flat(context.ids, turns.ids, answers.ids), flat(*map(length_mask, tree))
    last = Level(num_turns * num_answers, answer_len)
    return Rows(ids, positions, valid, (Level(1, context_len), Level(num_turns, turn_len), last))


def spares_padding(budget: Budget | None, tree: Tree) -> bool:
    """Whether the places of a budget are enough fewer than the slots of the tree."""
    slots = sum(part.ids.size for part in tree)
    return budget is not None and budget.tokens * budget.shards <= WORTHWHILE * slots


def run_packed_if_it_fits(
    budget: Budget | None, tree: Tree, compute: Callable[[Budget | None], Any]
) -> Any:
    """compute(budget) if the tree fits the budget, else compute(None), which must give the same:
    decided by the lengths, inside the program, for all shards alike, unless the caller knows.

    Not to be differentiated: both branches would keep what the backward pass of either needs.
    Without a budget, or with one that spares next to nothing, there is compute(None) alone."""
    if budget is None or not spares_padding(budget, tree):
        return compute(None)
    if budget.holds:
        return compute(budget)

    def count(part: Tokens) -> Int[Array, " shards"]:
        if not part.lengths.size:
            return jnp.zeros((budget.shards,), jnp.int32)
        return jnp.sum(part.lengths.reshape(budget.shards, -1), axis=1)

    fits = sum(map(count, tree)) <= budget.tokens
    fits &= count(tree.answers) <= budget.answers
    return jax.lax.cond(jnp.all(fits), lambda: compute(budget), lambda: compute(None))


def assign_places(valid: Bool[Array, "batch slots"], num_places: int, shards: int) -> Places:
    """Gives the tokens of each shard their places, in order; what does not fit is lost."""
    valid = valid.reshape(shards, -1)
    count = jnp.cumsum(valid, axis=1)
    place_of = jnp.clip(count - 1, 0, num_places - 1)
    slots = jnp.arange(valid.shape[1])

    def find_slots(valid: Array, place_of: Array) -> Array:
        places = jnp.where(valid, place_of, num_places)
        return jnp.zeros((num_places,), jnp.int32).at[places].set(slots, mode="drop")

    used = jnp.arange(num_places)[None, :] < count[:, -1:]
    return Places(jax.vmap(find_slots)(valid, place_of), place_of, used, valid)


def take(x: Array, index: Int[Array, "shards n"]) -> Array:
    """x[s, index[s, i]] for each shard s; the same may be taken several times."""
    return jax.vmap(lambda rows, at: rows.at[at].get(mode="promise_in_bounds"))(x, index)


@jax.custom_vjp
def to_places(
    x: Float[Array, "shards slots *dims"], places: Places
) -> Float[Array, "shards places *dims"]:
    """What lies in the slots of tokens, at their places; anything at places without a token.

    A token has one slot and one place, so the gradient is the way back: nothing is added up."""
    return take(x, places.slot_of)


@jax.custom_vjp
def to_slots(
    x: Float[Array, "shards places *dims"], places: Places
) -> Float[Array, "shards slots *dims"]:
    """The inverse of `to_places`; anything in slots without a token."""
    return take(x, places.place_of)


def _keep(mask: Bool[Array, "shards n"], x: Array) -> Array:
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, 0)


to_places.defvjp(
    lambda x, places: (take(x, places.slot_of), places),
    lambda places, g: (_keep(places.valid, take(g, places.place_of)), None),
)
to_slots.defvjp(
    lambda x, places: (take(x, places.place_of), places),
    lambda places, g: (_keep(places.used, take(g, places.slot_of)), None),
)
