"""Attention over trees of tokens: keys that branches share are kept once and scored with one matrix
product.

A row of tokens is a tree of levels: level i has `nodes` equal branches of `length` slots each,
which divide evenly among the nodes of the level above. A token sees the earlier tokens of its own
node, all of its ancestors, and what lies in `past` (a cache), nothing else. This file decides what
is seen and what is computed; it knows nothing of prompts. `attend` is the one interface. Behind it
are the chunks of this file, which compute everything everywhere, and the fused kernels of
fused_attention.py, which compute some of it faster on the devices that they are made for. Letters as in
transformer.py, and in chunks: n groups of queries that share keys, m queries of a group, s their
keys."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from popi_jax.models import fused_attention
from popi_jax.sharding import UNSPLIT, Rules, platform

IMPLEMENTATIONS = ("auto", "chunked", "splash", "cudnn")
BEST = {"tpu": "splash", "gpu": "cudnn"}  # platform -> what "auto" is there; elsewhere "chunked"
KERNEL_SLOTS = 512  # of a row, from which on a kernel pays
QUERY_CHUNK = 128  # queries of a row, at most, whose scores exist at a time ...
MOST_CHUNKS = 16  # ... unless that made more chunks of a level than this


class Level(NamedTuple):
    """Equal branches of a tree: how many in a row, and slots of each."""

    nodes: int
    length: int


Levels = tuple[Level, ...]


class KeysValues(NamedTuple):
    """Keys and values of nodes computed before, in the layout that attention reads; one array for
    all layers.

    The nodes divide evenly among those of every level of the new tokens, or the other way round:
    one node is seen by all, as many nodes as there are branches by one branch each. Slots need not
    be in the order of positions."""

    k: Float[Array, "*layers batch kv_heads nodes slots head_dim"]
    v: Float[Array, "*layers batch kv_heads nodes slots head_dim"]
    valid: Bool[Array, "batch nodes slots"]
    positions: Int[Array, "batch nodes slots"]


class _Keys(NamedTuple):
    """Keys and values of nodes, as a chunk of queries sees them."""

    k: Float[Array, "B K n s H"]
    v: Float[Array, "B K n s H"]
    valid: Bool[Array, "B n s"]
    positions: Int[Array, "B n s"]

    def of(self, node: int, count: int, nodes: int, end: int | None = None) -> "_Keys":
        """The first `end` slots of what the branches [node, node + count) of `nodes` see."""
        each = nodes // self.k.shape[2]  # branches that see one of these nodes
        at = slice(node // each, -(-(node + count) // each))
        return _Keys(
            self.k[:, :, at, :end],
            self.v[:, :, at, :end],
            self.valid[:, at, :end],
            self.positions[:, at, :end],
        )


def num_slots(levels: Levels) -> int:
    return sum(level.nodes * level.length for level in levels)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    valid: Bool[Array, "B T"],
    positions: Int[Array, "B T"],
    past: tuple[KeysValues, ...] = (),
    *,
    levels: Levels,
    window: Int[Array, ""] | None = None,
    score_dim: int | None = None,
    softcap: float | None = None,
    implementation: str = "auto",
    rules: Rules = UNSPLIT,
) -> Float[Array, "B T N H"]:
    """Softmax attention of the new tokens, T = num_slots(levels), over their tree and the past.

    valid: False for padding, which nothing sees; its own result means nothing, but is finite.
    window: positions back that are seen, the token's own included; None for all. Scores are divided
    by sqrt(score_dim), None for head_dim, and bounded to +-softcap. The backward pass computes
    scores again. implementation: one of IMPLEMENTATIONS; where the kernel asked for does not
    compute this, or would gain nothing, the chunks do."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f'implementation = "{implementation}": must be one of {", ".join(IMPLEMENTATIONS)}'
        )
    q = q * (score_dim or q.shape[-1]) ** -0.5
    tree = tuple(level for level in levels if level.nodes * level.length)
    on = platform()
    name = BEST.get(on, "chunked") if implementation == "auto" else implementation
    if name != "chunked" and not past and window is None and num_slots(levels) >= KERNEL_SLOTS:
        if name == "splash":
            return fused_attention.splash(
                q, k, v, valid, levels=tree, softcap=softcap, rules=rules, interpret=on != "tpu"
            )
        if on == "gpu" and softcap is None and fused_attention.cudnn_takes(q):
            return fused_attention.cudnn(q, k, v, valid, levels=tree, rules=rules)
    return _in_chunks(q, k, v, valid, positions, past, levels, window, softcap)


def _in_chunks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    valid: Bool[Array, "B T"],
    positions: Int[Array, "B T"],
    past: tuple[KeysValues, ...],
    levels: Levels,
    window: Int[Array, ""] | None,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    batch, slots, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, slots, kv_heads, heads // kv_heads, head_dim)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    above = [_Keys(*of_past) for of_past in past]
    outputs, start = [], 0
    for nodes, length in levels:
        end = start + nodes * length
        if end == start:
            continue
        own = _Keys(
            k[:, :, start:end].reshape(batch, kv_heads, nodes, length, head_dim),
            v[:, :, start:end].reshape(batch, kv_heads, nodes, length, head_dim),
            valid[:, start:end].reshape(batch, nodes, length),
            positions[:, start:end].reshape(batch, nodes, length),
        )
        queries = (
            q[:, start:end].reshape(batch, nodes, length, *q.shape[2:]).transpose(0, 3, 1, 4, 2, 5)
        )
        y = _attend_level(queries, own, above, window, softcap)
        outputs.append(y.transpose(0, 2, 4, 1, 3, 5).reshape(batch, end - start, heads, head_dim))
        above.append(own)
        start = end
    return jnp.concatenate(outputs, axis=1)


def _attend_level(
    q: Float[Array, "B K nodes G length H"],
    own: _Keys,
    above: list[_Keys],
    window: Int[Array, ""] | None,
    softcap: float | None,
) -> Float[Array, "B K nodes G length H"]:
    """In chunks of some whole nodes or, where a node is longer than a chunk, of a part of one."""
    nodes, length = q.shape[2], q.shape[4]
    most = max(QUERY_CHUNK, -(-nodes * length // MOST_CHUNKS))
    shared = [
        nodes // keys.k.shape[2] for keys in above
    ]  # a chunk lies in one node above or holds whole ones
    fitting = [
        count
        for count in range(1, nodes + 1)
        if nodes % count == 0
        and count * length <= most
        and all(count % n == 0 or n % count == 0 for n in shared)
    ]
    count = max(fitting, default=1)
    step = -(-length // -(-length // most))

    @partial(jax.checkpoint, static_argnums=3)
    def chunk(q: Array, q_positions: Array, seen: list[_Keys], first: int) -> Array:
        return _attend_chunk(q, q_positions, seen, first, window, softcap)

    rows = []
    for node in range(0, nodes, count):
        parts = []
        for first in range(0, length, step):
            last = min(first + step, length)
            seen = [
                *(keys.of(node, count, nodes) for keys in above),
                own.of(node, count, nodes, last),
            ]
            queries = q[:, :, node : node + count, :, first:last]
            parts.append(
                chunk(queries, own.positions[:, node : node + count, first:last], seen, first)
            )
        rows.append(jnp.concatenate(parts, axis=4) if len(parts) > 1 else parts[0])
    return jnp.concatenate(rows, axis=2) if len(rows) > 1 else rows[0]


def _attend_chunk(
    q: Float[Array, "B K nodes G t H"],
    q_positions: Int[Array, "B nodes t"],
    seen: list[_Keys],
    first: int,
    window: Int[Array, ""] | None,
    softcap: float | None,
) -> Float[Array, "B K nodes G t H"]:
    """One softmax over several sets of keys. The last set are the chunk's own nodes, seen up to
    each query's slot; `first` is the slot of its first query."""
    batch, kv_heads, nodes, groups, t, head_dim = q.shape
    rows = nodes * groups * t
    scores = []
    for number, keys in enumerate(seen):
        n, s = keys.k.shape[2:4]
        own = number == len(seen) - 1
        x = jnp.einsum(
            "BKnmH,BKnsH->BKnms",
            q.reshape(batch, kv_heads, n, rows // n, head_dim),
            keys.k,
            preferred_element_type=jnp.float32,
        )
        if softcap is not None:
            x = softcap * jnp.tanh(x / softcap)
        if own or window is not None:
            mask = keys.valid[:, :, None, None, :]  # [B n nodes/n t s]
            if own:
                mask &= (jnp.arange(s)[None, :] <= first + jnp.arange(t)[:, None])[None, None, None]
            if window is not None:
                mask &= (
                    q_positions.reshape(batch, n, nodes // n, t, 1)
                    - keys.positions[:, :, None, None, :]
                    < window
                )
            bias = jnp.where(mask, 0.0, -1e30)[:, None, :, :, None]
            x = (x.reshape(batch, kv_heads, n, nodes // n, groups, t, s) + bias).reshape(x.shape)
        else:
            x = x + jnp.where(keys.valid, 0.0, -1e30)[:, None, :, None, :]
        scores.append(x)

    def flat(x: Array) -> Array:
        return x.reshape(batch, kv_heads, rows)

    most = [flat(jnp.max(jax.lax.stop_gradient(x), axis=-1)) for x in scores if x.shape[-1]]
    top = most[0]
    for other in most[1:]:
        top = jnp.maximum(top, other)
    total, y = jnp.zeros_like(top), jnp.zeros((batch, kv_heads, rows, head_dim), jnp.float32)
    for x, keys in zip(scores, seen, strict=True):
        weights = jnp.exp(x - top.reshape(*x.shape[:-1], 1))
        total = total + flat(jnp.sum(weights, axis=-1))
        values = jnp.einsum(
            "BKnms,BKnsH->BKnmH",
            weights.astype(keys.v.dtype),
            keys.v,
            preferred_element_type=jnp.float32,
        )
        y = y + values.reshape(y.shape)
    return (y / total[..., None]).astype(q.dtype).reshape(q.shape)
