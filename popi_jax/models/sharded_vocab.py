"""Both ends of a model on a mesh: the lookup of embeddings and the LM head, where the vocabulary
may be split.

Written for each device, since the compiler, left alone, gathers the LM head and adds up its
gradient in each chunk of tokens. Devices that hold users of their own and parts of the vocabulary
at once exchange tokens, which are fewer bytes than the vocabulary: each computes its part for the
tokens of all."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from popi_jax.models.layout import Axes, Rules, count_shards, on_one_device


def _find_layout(rows: int, rules: Rules) -> tuple[Axes, Axes, Axes]:
    """Mesh axes of (rows, width, devices that share a vocabulary but no rows)."""
    if rows % count_shards(rules.batch):  # every device computes all rows
        return (), (), ()
    shared = tuple(axis for axis in rules.vocab if axis in rules.batch)
    return rules.batch, rules.vocab_embed, shared


def look_up(
    table: Float[Array, "vocab embed"], ids: Int[Array, "rows n"], rules: Rules, dtype: str
) -> Float[Array, "rows n embed"]:
    """table[ids] as `dtype`; gradients of equal tokens are added up in float32."""
    if on_one_device():
        return _take_rows(table, ids).astype(dtype)
    rows, embed, shared = _find_layout(ids.shape[0], rules)
    pad = -ids.shape[1] % count_shards(rules.seq)

    @jax.named_scope("embedding")
    def here(table: Array, ids: Array) -> Array:
        if embed:
            table = jax.lax.all_gather(table, embed, axis=1, tiled=True)
        if shared:
            ids = jax.lax.all_gather(ids, shared, axis=0, tiled=True)
        others = tuple(axis for axis in (*rows, *rules.seq) if axis not in (*embed, *shared))
        table = jax.lax.pcast(table, others, to="varying")
        if not rules.vocab:
            return _take_rows(table, ids)
        own = ids - jax.lax.axis_index(rules.vocab) * table.shape[0]
        inside = (own >= 0) & (own < table.shape[0])
        x = jnp.where(inside[..., None], _take_rows(table, jnp.clip(own, 0, table.shape[0] - 1)), 0)
        if shared:
            x = jax.lax.psum_scatter(x, shared, scatter_dimension=0, tiled=True)
        alone = tuple(axis for axis in rules.vocab if axis not in shared)
        return jax.lax.psum(x, alone) if alone else x

    by_token = P(rows, rules.seq)
    program = jax.shard_map(here, in_specs=(P(rules.vocab, embed), by_token), out_specs=by_token)
    return program(table.astype(dtype), jnp.pad(ids, ((0, 0), (0, pad))))[:, : ids.shape[1]]


@jax.custom_vjp
def _take_rows(
    table: Float[Array, "vocab embed"], ids: Int[Array, "rows n"]
) -> Float[Array, "rows n embed"]:
    return table[ids]


def _sum_rows(kept: tuple[Array, Array], grads: Array) -> tuple[Array, None]:
    table, ids = kept
    # zeros that differ along the mesh axes that the table differs along, as jax.shard_map asks
    start = jnp.zeros(table.shape, jnp.float32) + 0.0 * table[:1, :1].astype(jnp.float32)
    return start.at[ids].add(grads.astype(jnp.float32)).astype(table.dtype), None


_take_rows.defvjp(lambda table, ids: (table[ids], (table, ids)), _sum_rows)


def score_by_device(
    score: Callable[..., Any],
    head: Float[Array, "embed vocab"],
    states: Float[Array, "rows n embed"],
    ids: Int[Array, "rows n"],
    rules: Rules,
) -> Any:
    """score(states, head, ids, vocab_axes=) -> a tree of [rows n]; on a mesh each device does so
    with its tokens.

    The head is gathered along its width once, before the chunks that `score` goes through, and its
    gradient is summed over the devices once, behind them. `vocab_axes` are the mesh axes that split
    the vocabulary."""
    if on_one_device():
        return score(states, head, ids)
    rows, embed, shared = _find_layout(ids.shape[0], rules)
    count = ids.shape[1]
    pad = -count % count_shards(rules.seq)
    states = jnp.pad(states, ((0, 0), (0, pad), (0, 0)))

    @jax.named_scope("head")
    def here(head: Array, states: Array, ids: Array) -> Any:
        if embed:
            head = jax.lax.all_gather(head, embed, axis=0, tiled=True)
        own = ids.shape[0]
        if shared:
            states = jax.lax.all_gather(states, shared, axis=0, tiled=True)
            ids = jax.lax.all_gather(ids, shared, axis=0, tiled=True)
        # of different tokens on each device, so that its gradients are added up behind the chunks
        others = tuple(axis for axis in (*rows, *rules.seq) if axis not in (*embed, *shared))
        head = jax.lax.pcast(head, others, to="varying")
        found = score(states, head, ids, vocab_axes=rules.vocab)
        if not shared:
            return found
        first = jax.lax.axis_index(shared) * own
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, own, axis=0), found)

    by_token = P(rows, rules.seq)
    program = jax.shard_map(
        here, in_specs=(P(embed, rules.vocab), by_token, by_token), out_specs=by_token
    )
    found = program(head, states, jnp.pad(ids, ((0, 0), (0, pad))))
    return jax.tree.map(lambda x: x[:, :count], found)
