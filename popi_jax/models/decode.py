"""Sampling: G answers to one turn behind one context, prefilled once and shared by the samples."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from popi_jax.arrays import Params, Rollouts, Tokens
from popi_jax.losses.logprobs import token_logits
from popi_jax.models import packing
from popi_jax.models.attention import KeysValues
from popi_jax.models.packing import Budget, Level
from popi_jax.models.transformer import Transformer, TransformerConfig, get_head, variables


class Sampling(NamedTuple):
    """How to draw tokens. The cuts apply in the order of the fields, each on what the ones before
    it left.

    They change what is drawn, never the log-probs that are reported: those are of the whole
    distribution at `temperature`, as the scoring pass computes them."""

    temperature: float  # 0 is greedy; log-probs are then those at temperature 1
    max_len: int  # tokens, end token included
    end_id: int
    banned: tuple[int, ...] = ()  # never drawn: control tokens and the padding of the vocabulary
    top_k: int = 0  # only the k likeliest; 0 = all
    top_p: float = 1.0  # only the likeliest that sum to p at least (nucleus, arXiv 1904.09751)
    min_p: float = 0.0  # only those of this part of the likeliest at least (arXiv 2407.01082)
    temperatures: tuple[float, ...] = ()  # in its place: one of each sample of a group


class Prefix(NamedTuple):
    """What all samples of a row share."""

    cache: KeysValues
    logits: Float[Array, "batch vocab"]  # of the first token
    length: Int[Array, " batch"]  # tokens
    head: Float[Array, "embed vocab"]


class Loop(NamedTuple):
    """The samples after t steps, each with a small cache of its own; a step writes one slot."""

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
    """One key per sample, folded from the global index of its example alone."""

    def fold_example(i: Array) -> Array:
        fold = partial(jax.random.fold_in, jax.random.fold_in(key, i))
        return jax.vmap(fold)(jnp.arange(group_size))

    return jax.vmap(fold_example)(index)


def sample(
    weights: Params,
    context: Tokens,
    turn: Tokens,
    keys: Key[Array, "batch group"],
    *,
    model: TransformerConfig,
    sampling: Sampling,
    budget: Budget | None = None,
) -> Rollouts:
    """Draws one answer per key. Shapes: context [batch seq], turn [batch seq].

    `weights` as transformer.lay_out_for_rollout makes them. Stops early when every sample has
    ended. `budget` is of the prefixes alone, see packing.py."""
    batch, group = keys.shape
    model = dataclasses.replace(model, rules=model.rollout_rules)
    tree = packing.prefix_tree(context, turn)
    run = partial(prefill, weights, tree, model)
    prefix = make_prefix(weights, tree, model, *packing.run_packed_if_it_fits(budget, tree, run))
    shape = (batch, group, sampling.max_len)
    own = (model.num_layers, batch, model.num_kv_heads, group, sampling.max_len, model.head_dim)
    start = Loop(
        t=jnp.int32(0),
        logits=jnp.broadcast_to(prefix.logits[:, None], (batch, group, model.vocab_size)),
        k=jnp.zeros(own, model.dtype),
        v=jnp.zeros(own, model.dtype),
        ids=jnp.full(shape, sampling.end_id, jnp.int32),
        logps=jnp.zeros(shape, jnp.float32),
        lengths=jnp.zeros((batch, group), jnp.int32),
        done=jnp.zeros((batch, group), bool),
        finished=jnp.zeros((batch, group), bool),
    )
    step = partial(decode_step, weights, prefix, keys, model=model, sampling=sampling)
    goes_on = lambda loop: (loop.t < sampling.max_len) & ~jnp.all(loop.done)  # noqa: E731
    end = jax.lax.while_loop(goes_on, step, start)
    return Rollouts(Tokens(end.ids, end.lengths), end.finished, end.logps)


def prefill(
    weights: Params, tree: packing.Tree, model: TransformerConfig, budget: Budget | None
) -> tuple[Float[Array, "batch embed"], tuple[Array, Array]]:
    """Runs the context and the turn of each row once, without padding where there is a budget: the
    state that predicts the first token, and the keys and values of all layers."""
    rows = packing.pack(tree)
    places = None
    if budget is not None:
        places = packing.assign_places(rows.valid, budget.tokens, budget.shards)
    apply = partial(Transformer(model).apply, variables(weights))
    hidden, kept = apply(*rows[:3], levels=rows.levels, keep=True, places=places)
    last = (tree.context.ids.shape[1] + tree.turns.lengths[:, 0] - 1)[:, None]
    if places is None:
        return jnp.take_along_axis(hidden, last[..., None], axis=1)[:, 0], kept
    ends = jnp.take_along_axis(places.place_of.reshape(rows.ids.shape), last, axis=1)
    ends = ends.reshape(hidden.shape[0], -1)
    return packing.take(hidden, ends).reshape(len(last), -1), kept


def make_prefix(
    weights: Params,
    tree: packing.Tree,
    model: TransformerConfig,
    states: Float[Array, "batch embed"],
    kept: tuple[Array, Array],
) -> Prefix:
    """What the loop reads of the prefilled rows; apart from `prefill`, whose branches of a
    conditional would each return a copy of the head."""
    rows, head = packing.pack(tree), get_head(weights, model)
    logits = token_logits(states, head, softcap=model.final_logit_softcap)
    k, v = (x.swapaxes(2, 3)[:, :, :, None] for x in kept)
    cache = KeysValues(k, v, rows.valid[:, None], rows.positions[:, None])
    return Prefix(cache, logits, tree.context.lengths + tree.turns.lengths[:, 0], head)


@jax.named_scope("decode")
def decode_step(
    weights: Params,
    prefix: Prefix,
    keys: Key[Array, "batch group"],
    loop: Loop,
    *,
    model: TransformerConfig,
    sampling: Sampling,
) -> Loop:
    """Draws a token of each sample that has not ended, and runs the model on it."""
    batch, group, max_len = loop.ids.shape
    steps = jnp.arange(max_len)
    step_keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, loop.t)))(keys)
    token, logp = draw_tokens(loop.logits, step_keys, sampling)
    live = ~loop.done
    token = jnp.where(live, token, sampling.end_id)
    ids = jax.lax.dynamic_update_index_in_dim(loop.ids, token, loop.t, axis=2)
    logp = jnp.where(live, logp, 0.0)
    logps = jax.lax.dynamic_update_index_in_dim(loop.logps, logp, loop.t, axis=2)

    written = jnp.broadcast_to((steps < loop.t)[None, None], ids.shape)
    positions = jnp.broadcast_to(prefix.length[:, None, None] + steps[None, None], ids.shape)
    own = KeysValues(loop.k, loop.v, written, positions)
    here = jnp.broadcast_to((prefix.length + loop.t)[:, None], (batch, group))
    apply = partial(Transformer(model).apply, variables(weights))
    valid, levels = jnp.ones((batch, group), bool), (Level(group, 1),)
    hidden, new = apply(token, here, valid, (prefix.cache, own), levels=levels, keep=True)
    k, v = (
        jax.lax.dynamic_update_slice_in_dim(cache, x.swapaxes(2, 3)[..., None, :], loop.t, axis=4)
        for cache, x in zip((loop.k, loop.v), new, strict=True)
    )
    logits = token_logits(hidden, prefix.head, softcap=model.final_logit_softcap)
    ended = token == sampling.end_id
    done = loop.done | ended
    lengths, finished = loop.lengths + live, loop.finished | (live & ended)
    return Loop(loop.t + 1, logits, k, v, ids, logps, lengths, done, finished)


def cut_logits(
    logits: Float[Array, "batch group vocab"], sampling: Sampling
) -> Float[Array, "batch group vocab"]:
    """Logits over the temperature, -inf where a token is not drawn; the likeliest stays."""
    z = heat(logits, sampling)
    if sampling.banned:
        z = z.at[..., jnp.asarray(sampling.banned)].set(-jnp.inf)
    if 0 < sampling.top_k < z.shape[-1]:
        z = jnp.where(z < jax.lax.top_k(z, sampling.top_k)[0][..., -1:], -jnp.inf, z)
    if sampling.top_p < 1.0:
        order = jnp.argsort(z, axis=-1, descending=True)
        p = jax.nn.softmax(jnp.take_along_axis(z, order, axis=-1), axis=-1)
        before = jnp.cumsum(p, axis=-1) - p  # probability of the likelier tokens
        keep = (before < sampling.top_p).at[..., 0].set(True)
        z = jnp.where(jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1), z, -jnp.inf)
    if sampling.min_p > 0.0:
        least = jnp.max(z, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        z = jnp.where(z < least, -jnp.inf, z)
    return z


def heat(
    logits: Float[Array, "batch group vocab"], sampling: Sampling
) -> Float[Array, "batch group vocab"]:
    """Logits over the temperature of their sample; those of a greedy one as they are."""
    if sampling.temperatures:
        heats = [t or 1.0 for t in sampling.temperatures]
        return logits / jnp.array(heats, jnp.float32)[None, :, None]
    return logits / sampling.temperature if sampling.temperature else logits


def draw_tokens(
    logits: Float[Array, "batch group vocab"], keys: Key[Array, "batch group"], sampling: Sampling
) -> tuple[Int[Array, "batch group"], Float[Array, "batch group"]]:
    """One token per row, and its log-prob (nats) in the whole distribution at the temperature."""
    z, group = cut_logits(logits, sampling), logits.shape[1]
    heats = sampling.temperatures or (sampling.temperature,) * group
    hot = [number for number, t in enumerate(heats) if t > 0.0]
    draw = jax.vmap(jax.vmap(jax.random.categorical))
    if len(hot) == group:
        token = draw(keys, z)
    else:
        token = jnp.argmax(z, axis=-1)
        if hot:
            at = np.array(hot)
            token = token.at[:, at].set(draw(keys[:, at], z[:, at]))
    logps = jax.nn.log_softmax(heat(logits, sampling), axis=-1)
    logp = jnp.take_along_axis(logps, token[..., None], axis=-1)
    return token.astype(jnp.int32), logp[..., 0]
