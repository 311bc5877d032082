"""Sampling: G answers to one turn behind one context, prefilled once and shared by the samples."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from popi_jax.arrays import Params, Rollouts, Tokens
from popi_jax.losses.logprobs import token_logits
from popi_jax.models.sampling import Sampling, draw, stops
from popi_jax.models.scoring import length_mask, pack
from popi_jax.models.transformer import Cache, Transformer, TransformerConfig, empty_cache, head, variables


class _Loop(NamedTuple):
    t: Int[Array, ""]
    logits: Float[Array, "batch group vocab"]
    cache: Cache
    ids: Int[Array, "batch group seq"]
    logps: Float[Array, "batch group seq"]
    lengths: Int[Array, "batch group"]
    done: Bool[Array, "batch group"]
    finished: Bool[Array, "batch group"]


def sample_keys(key: Key[Array, ""], index: Int[Array, " batch"], group_size: int) -> Key[Array, "batch group"]:
    """One key per sample, folded from the global index of its example: independent of how the batch is laid out."""

    def per_example(i: Array) -> Array:
        return jax.vmap(lambda g: jax.random.fold_in(jax.random.fold_in(key, i), g))(jnp.arange(group_size))

    return jax.vmap(per_example)(index)


def sample(
    params: Params,
    context: Tokens,
    turn: Tokens,
    keys: Key[Array, "batch group"],
    *,
    model: TransformerConfig,
    sampling: Sampling,
) -> Rollouts:
    """Draws one answer per key. Shapes: context [batch seq], turn [batch seq].

    The cache holds [context | turn | step 0 of all samples | step 1 of all samples | ...], so that each step writes one
    slice. Stops early when every sample has ended.
    """
    batch, group = keys.shape
    prefix_len = context.ids.shape[1] + turn.ids.shape[1]
    slots = prefix_len + group * sampling.max_len
    turns = Tokens(turn.ids[:, None], turn.lengths[:, None])
    packed = pack(context, turns)
    mask = jnp.pad(packed.mask, ((0, 0), (0, 0), (0, slots - prefix_len)))
    hidden, cache = Transformer(model).apply(
        variables(params), packed.ids, packed.positions, mask, empty_cache(model, batch, slots), jnp.int32(0)
    )
    kernel = head(params, model)
    last = context.ids.shape[1] + turn.lengths - 1
    first = jnp.take_along_axis(hidden, last[:, None, None], axis=1)  # [batch 1 embed]
    logits = token_logits(first, kernel, softcap=model.final_logit_softcap)
    prefix_valid = jnp.concatenate([length_mask(context), length_mask(turn)], axis=1)
    start = context.lengths + turn.lengths
    slot_numbers = jnp.arange(group * sampling.max_len)
    own = (slot_numbers % group)[None, :] == jnp.arange(group)[:, None]  # [group slots]

    def body(loop: _Loop) -> _Loop:
        step_keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, loop.t)))(keys)
        token, logp = draw(loop.logits, step_keys, sampling)
        live = ~loop.done
        token = jnp.where(live, token, sampling.end_id)
        ids = jax.lax.dynamic_update_index_in_dim(loop.ids, token, loop.t, axis=2)
        logps = jax.lax.dynamic_update_index_in_dim(loop.logps, jnp.where(live, logp, 0.0), loop.t, axis=2)
        seen = own & (slot_numbers // group <= loop.t)[None, :]
        mask = jnp.concatenate(
            [
                jnp.broadcast_to(prefix_valid[:, None, :], (batch, group, prefix_len)),
                jnp.broadcast_to(seen[None], (batch, group, slots - prefix_len)),
            ],
            axis=2,
        )
        positions = jnp.broadcast_to((start + loop.t)[:, None], (batch, group))
        slot = jnp.int32(prefix_len) + loop.t * group
        hidden, cache = Transformer(model).apply(variables(params), token, positions, mask, loop.cache, slot)
        logits = token_logits(hidden, kernel, softcap=model.final_logit_softcap)
        ended = token == sampling.end_id
        done = loop.done | ended | stops(ids, loop.t, sampling)
        return _Loop(loop.t + 1, logits, cache, ids, logps, loop.lengths + live, done, loop.finished | (live & ended))

    def unfinished(loop: _Loop) -> Array:
        return (loop.t < sampling.max_len) & ~jnp.all(loop.done)

    shape = (batch, group, sampling.max_len)
    end = jax.lax.while_loop(
        unfinished,
        body,
        _Loop(
            t=jnp.int32(0),
            logits=jnp.broadcast_to(logits, (batch, group, logits.shape[-1])),
            cache=cache,
            ids=jnp.full(shape, sampling.end_id, jnp.int32),
            logps=jnp.zeros(shape, jnp.float32),
            lengths=jnp.zeros((batch, group), jnp.int32),
            done=jnp.zeros((batch, group), bool),
            finished=jnp.zeros((batch, group), bool),
        ),
    )
    return Rollouts(Tokens(end.ids, end.lengths), end.finished, end.logps)
