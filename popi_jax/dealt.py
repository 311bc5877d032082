"""Users of an evaluation in batches without padding: all lengths are known, so how many tokens each
batch holds is, too, and nothing is decided inside a program."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from popi_jax.arrays import Tokens, UserBatch
from popi_jax.data import dealing
from popi_jax.models.layout import count_shards
from popi_jax.models.packing import Budget
from popi_jax.models.transformer import TransformerConfig
from popi_jax.sharding import place_whole


class Group(NamedTuple):
    """Batches of one shape."""

    dealt: Int[np.ndarray, "batches rows"]  # the user of each row; -1: none
    placed: list[Any]  # what each batch holds, on the mesh
    budget: Budget  # which all of them fit


class Dealt(NamedTuple):
    """Something of all users; made once for any number of models."""

    groups: list[Group]
    shape: tuple[int, int]  # users, pairs of each


def deal_signals(
    users: UserBatch, model: TransformerConfig, turn: tuple[int, ...], mesh: Mesh, most_rows: int
) -> Dealt:
    """Batches of (signals [rows seq], numbers of the users [rows]), of at most `most_rows` rows.

    turn: what asks for a summary. A row that no user is left for repeats one of its batch."""
    lengths, shards = np.asarray(users.context.lengths), count_shards(model.rollout_rules.batch)
    rows = dealing.choose_rows(len(lengths), most_rows, count_rows(model))
    groups = []
    for members in dealing.group_by_length(lengths, rows):
        dealt = _name(members, dealing.deal(lengths[members], rows, shards))
        filled = np.where(dealt < 0, dealt.max(axis=1, keepdims=True), dealt)
        tokens = dealing.find_heaviest(lengths, filled, shards) + rows // shards * len(turn)
        longest = dealing.find_longest(lengths[members])
        placed = [
            place_whole((_take(users.context, row, longest), users.index[row]), mesh, model.rules)
            for row in filled
        ]
        budget = Budget(dealing.round_up(tokens), 0, shards, holds=True)
        groups.append(Group(dealt, placed, budget))
    return Dealt(groups, users.turns.lengths.shape)


def deal_pairs(users: UserBatch, model: TransformerConfig, mesh: Mesh, most_rows: int) -> Dealt:
    """Batches of (prompts [rows pairs seq], chosen and rejected replies [rows pairs 2 seq]), of at
    most `most_rows` rows; the budgets are without contexts."""
    shards, turns = count_shards(model.rules.batch), users.turns
    lengths = np.stack((users.chosen.lengths, users.rejected.lengths), axis=2)
    answers = lengths.sum(axis=(1, 2))
    # the last token of an answer is never read
    loads = turns.lengths.sum(axis=1) + answers - (lengths > 0).sum(axis=(1, 2))
    rows = dealing.choose_rows(len(loads), most_rows, count_rows(model))
    groups = []
    for members in dealing.group_by_length(lengths.max(axis=(1, 2)), rows):
        dealt = _name(members, dealing.deal(loads[members], rows, shards))
        pairs = max(int((turns.lengths[members] > 0).sum(axis=1).max(initial=0)), 1)
        turn_len = dealing.find_longest(turns.lengths[members])
        answer_len = dealing.find_longest(lengths[members])
        placed = []
        for row in dealt:
            replies = [_take(x, row, pairs, answer_len) for x in (users.chosen, users.rejected)]
            both = jax.tree.map(lambda *x: np.stack(x, axis=2), *replies)
            batch = (_take(turns, row, pairs, turn_len), both)
            placed.append(place_whole(batch, mesh, model.rules))
        held = [dealing.find_heaviest(x, dealt, shards) for x in (loads, answers)]
        tokens, scored = map(dealing.round_up, held)
        budget = Budget(tokens, scored, shards, holds=True)
        groups.append(Group(dealt, placed, budget))
    return Dealt(groups, turns.lengths.shape)


def add_texts(group: Group, lengths: Int[np.ndarray, " users"], prefix: int) -> Budget:
    """The budget of a group whose users each have a context of `prefix` tokens and a text of some
    length: in few steps, so that the conditions share programs."""
    budget, rows = group.budget, group.dealt.shape[1]
    step = max(budget.tokens // 16, 1)
    texts = dealing.find_heaviest(lengths, group.dealt, budget.shards)
    tokens = budget.tokens + rows // budget.shards * prefix + step * max(-(-texts // step), 1)
    return budget._replace(tokens=tokens)


def run_ahead(
    calls: Sequence[Callable[[], Any]], advance: Callable[[float], None]
) -> Iterator[Any]:
    """What each call returns, as numpy arrays; the next one is started before one is waited for.

    advance: called with the finished part after each."""
    started = None
    for number, call in enumerate(calls):
        before, started = started, call()
        if number:
            yield jax.device_get(before)
            advance(number / len(calls))
    if calls:
        yield jax.device_get(started)
        advance(1.0)


def count_rows(model: TransformerConfig) -> int:
    """The least rows of a batch that divide over the mesh."""
    return math.lcm(*(count_shards(rules.batch) for rules in (model.rules, model.rollout_rules)))


def _name(members: np.ndarray, dealt: np.ndarray) -> Int[np.ndarray, "batches rows"]:
    """The users of rows that hold numbers of members."""
    return np.where(dealt < 0, -1, members[dealt])


def _take(texts: Tokens, rows: Int[np.ndarray, " rows"], *shape: int) -> Tokens:
    """The texts of users, none for -1, as [rows *shape]: cut or padded."""
    ids = np.zeros((len(rows), *shape), np.int32)
    part = tuple(map(slice, map(min, shape, texts.ids.shape[1:])))
    ids[(slice(None), *part)] = texts.ids[(rows, *part)]
    lengths = texts.lengths[(rows, *part[:-1])]
    known = (rows >= 0).reshape(-1, *(1,) * (lengths.ndim - 1))
    return Tokens(ids, np.where(known, lengths, 0))
