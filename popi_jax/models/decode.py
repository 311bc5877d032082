"""Sampling: G answers to one turn behind one context, prefilled once and shared by the samples."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from popi_jax.arrays import Params, Rollouts, Tokens
from popi_jax.losses.logprobs import token_logits
from popi_jax.models.attention import KeysValues, Level
from popi_jax.models.packing import Budget, dense, take, within
from popi_jax.models.sampling import Sampling, draw, stops
from popi_jax.models.transformer import Transformer, TransformerConfig, for_rollout, head, variables
from popi_jax.popi.scorer import pack


class _Loop(NamedTuple):
    t: Int[Array, ""]
    logits: Float[Array, "batch group vocab"]
    k: Float[Array, "layers batch kv_heads group seq head_dim"]
    v: Float[Array, "layers batch kv_heads group seq head_dim"]
    ids: Int[Array, "batch group seq"]
    logps: Float[Array, "batch group seq"]
    lengths: Int[Array, "batch group"]
    done: Bool[Array, "batch group"]
    finished: Bool[Array, "batch group"]


def sample_keys(
    key: Key[Array, ""], index: Int[Array, " batch"], group_size: int
) -> Key[Array, "batch group"]:
    """One key per sample, folded from the global index of its example: independent of how the batch
    is laid out."""

    def per_example(i: Array) -> Array:
        return jax.vmap(lambda g: jax.random.fold_in(jax.random.fold_in(key, i), g))(
            jnp.arange(group_size)
        )

    return jax.vmap(per_example)(index)


def sample(
    params: Params,
    context: Tokens,
    turn: Tokens,
    keys: Key[Array, "batch group"],
    *,
    model: TransformerConfig,
    sampling: Sampling,
    budget: Budget | None = None,
) -> Rollouts:
    """Draws one answer per key. Shapes: context [batch seq], turn [batch seq].

    The prefix is one read-only cache that all samples of a row share; each sample has its own small
    cache, of which a step writes one slot. Stops early when every sample has ended. `budget` is of
    the prefixes alone, see dense.py."""
    batch, group = keys.shape
    weights = for_rollout(params, model)
    model = dataclasses.replace(model, rules=model.rollout_rules)
    transformer = Transformer(model)
    turns = Tokens(turn.ids[:, None], turn.lengths[:, None])
    packed = pack(context, turns)
    last = context.ids.shape[1] + turn.lengths - 1

    def prefill(budget: Budget | None) -> tuple[Float[Array, "batch 1 embed"], tuple[Array, Array]]:
        """The state behind which the first token is drawn, and the keys and values of all
        layers."""
        at = None if budget is None else dense(packed.valid, budget.tokens, budget.shards)
        hidden, kept = transformer.apply(
            variables(weights), *packed[:3], levels=packed.levels, keep=True, at=at
        )
        if at is None:
            return jnp.take_along_axis(hidden, last[:, None, None], axis=1), kept
        ends = jnp.take_along_axis(at.place_of.reshape(packed.ids.shape), last[:, None], axis=1)
        return take(hidden, ends.reshape(hidden.shape[0], -1)).reshape(batch, 1, -1), kept

    first, (k, v) = within(budget, context, turns, None, prefill)
    k, v = (x.swapaxes(2, 3)[:, :, :, None] for x in (k, v))
    prefix = KeysValues(k, v, packed.valid[:, None], packed.positions[:, None])
    kernel = head(weights, model)
    logits = token_logits(first, kernel, softcap=model.final_logit_softcap)
    start = context.lengths + turn.lengths
    steps = jnp.arange(sampling.max_len)
    own_positions = jnp.broadcast_to(
        start[:, None, None] + steps[None, None], (batch, group, sampling.max_len)
    )

    @jax.named_scope("decode")
    def body(loop: _Loop) -> _Loop:
        step_keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, loop.t)))(keys)
        token, logp = draw(loop.logits, step_keys, sampling)
        live = ~loop.done
        token = jnp.where(live, token, sampling.end_id)
        ids = jax.lax.dynamic_update_index_in_dim(loop.ids, token, loop.t, axis=2)
        logps = jax.lax.dynamic_update_index_in_dim(
            loop.logps, jnp.where(live, logp, 0.0), loop.t, axis=2
        )
        written = jnp.broadcast_to((steps < loop.t)[None, None], own_positions.shape)
        positions = jnp.broadcast_to((start + loop.t)[:, None], (batch, group))
        hidden, new = transformer.apply(
            variables(weights),
            token,
            positions,
            jnp.ones((batch, group), bool),
            (prefix, KeysValues(loop.k, loop.v, written, own_positions)),
            levels=(Level(group, 1),),
            keep=True,
        )
        k, v = (
            jax.lax.dynamic_update_slice_in_dim(
                cache, x.swapaxes(2, 3)[:, :, :, :, None], loop.t, axis=4
            )
            for cache, x in zip((loop.k, loop.v), new, strict=True)
        )
        logits = token_logits(hidden, kernel, softcap=model.final_logit_softcap)
        ended = token == sampling.end_id
        done = loop.done | ended | stops(ids, loop.t, sampling)
        lengths, finished = loop.lengths + live, loop.finished | (live & ended)
        return _Loop(loop.t + 1, logits, k, v, ids, logps, lengths, done, finished)

    def unfinished(loop: _Loop) -> Array:
        return (loop.t < sampling.max_len) & ~jnp.all(loop.done)

    shape = (batch, group, sampling.max_len)
    own = (model.num_layers, batch, model.num_kv_heads, group, sampling.max_len, model.head_dim)
    end = jax.lax.while_loop(
        unfinished,
        body,
        _Loop(
            t=jnp.int32(0),
            logits=jnp.broadcast_to(logits, (batch, group, logits.shape[-1])),
            k=jnp.zeros(own, model.dtype),
            v=jnp.zeros(own, model.dtype),
            ids=jnp.full(shape, sampling.end_id, jnp.int32),
            logps=jnp.zeros(shape, jnp.float32),
            lengths=jnp.zeros((batch, group), jnp.int32),
            done=jnp.zeros((batch, group), bool),
            finished=jnp.zeros((batch, group), bool),
        ),
    )
    return Rollouts(Tokens(end.ids, end.lengths), end.finished, end.logps)
