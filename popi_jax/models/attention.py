"""Attention over trees of tokens: keys that branches share are kept once and scored with one
matrix product. And the rotary positions of its queries and keys.

A row of tokens is a tree of levels (packing.py): level i has `nodes` equal branches of `length`
slots each, which divide evenly among the nodes of the level above. A token sees the earlier tokens
of its own node, all of its ancestors, and what lies in `past` (a cache), nothing else. This file
decides what is seen; it knows nothing of prompts. `attend` is the one interface: it computes in
chunks everywhere, or by a fused kernel (fused_attention.py) where the model has one that takes it.
Letters as in transformer.py, and in chunks: n groups of queries that share keys, m queries of a
group, s their keys."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from popi_jax.models.layout import UNSPLIT, Rules

Levels = tuple[tuple[int, int], ...]  # (nodes, slots of each) of each level, as packing.Level
ROPE_KINDS = ("linear", "llama3", "yarn", "dynamic")
KERNEL_SLOTS = 512  # of a row, from which on a fused kernel pays
QUERY_CHUNK = 128  # queries of a row, at most, whose scores exist at a time ...
MOST_CHUNKS = 16  # ... unless that made more chunks of a level than this


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the frequencies are lowered for texts longer than those of the first training.

    "linear" divides all of them by `factor`. "llama3" divides those of waves longer than
    original_len / low_freq_factor tokens, keeps those shorter than original_len / high_freq_factor,
    and blends in between (Llama 3.1). "yarn" keeps planes that turn more than `beta_fast` times
    within the original length, divides those that turn less than `beta_slow` times, blends in
    between by the number of the plane (rounded outwards with `truncate`), and multiplies rotated
    queries and keys by `attention_factor` (YaRN, arXiv:2309.00071). "dynamic" changes nothing
    within the trained length, and rows beyond it are not computed here. All as
    `modeling_rope_utils` of transformers 4 and 5."""

    kind: str  # linear | llama3 | yarn | dynamic
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_len: int = 8192  # tokens
    beta_fast: float = 32.0  # turns
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ValueError(f'rope scaling "{self.kind}": must be one of {", ".join(ROPE_KINDS)}')
        if self.kind != "yarn" and self.attention_factor != 1.0:
            raise ValueError(f'rope scaling "{self.kind}": only yarn has an attention_factor')


def frequencies(half: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per token of each plane of a head: float32 [half], computed in float64."""
    f = theta ** (-np.arange(half) / half)
    if scaling is None or scaling.kind == "dynamic":
        kept: Any = 1.0
    elif scaling.kind == "linear":
        kept = 0.0
    elif scaling.kind == "llama3":
        waves = scaling.original_len * f / (2 * math.pi)  # periods within the original length
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((waves - low) / (high - low), 0.0, 1.0)
    else:
        kept = 1.0 - _yarn_ramp(half, theta, scaling)
    divided = f if scaling is None else f / scaling.factor
    return (kept * f + (1.0 - kept) * divided).astype(np.float32)


def _yarn_ramp(half: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """0 for the planes that are kept, 1 for those that are divided: float64 [half]."""

    def plane(turns: float) -> float:  # which turns so often within the original length
        return half * math.log(scaling.original_len / (turns * 2 * math.pi)) / math.log(theta)

    low, high = plane(scaling.beta_fast), plane(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    # the upper bound is of coordinates, not of planes: so it is in transformers
    low, high = max(low, 0), min(high, 2 * half - 1)
    return np.clip((np.arange(half) - low) / ((high - low) or 0.001), 0.0, 1.0)


class Turn(NamedTuple):
    """How a layer turns queries and keys: radians per token of each plane, and the factor that they
    are multiplied with (None: 1)."""

    freqs: Float[Array, " half"]
    scale: Float[Array, ""] | None


def make_turns(
    half: int, thetas: tuple[float, float | None], scaling: RopeScaling | None
) -> tuple[Turn, Turn]:
    """Those of global and of local layers; the second theta is of local layers, which are then not
    scaled (None: they are as the others)."""
    theta, local = thetas
    factor = 1.0 if scaling is None else scaling.attention_factor
    scale = None if factor == 1.0 else jnp.float32(factor)
    turn = Turn(jnp.asarray(frequencies(half, theta, scaling)), scale)
    if local is None:
        return turn, turn
    plain = jnp.asarray(frequencies(half, local, None))
    return turn, Turn(plain, None if scale is None else jnp.float32(1.0))


def rope(
    x: Float[Array, "B T heads H"],
    positions: Int[Array, "B T"],
    freqs: Float[Array, " half"],
    scale: Float[Array, ""] | None = None,
) -> Float[Array, "B T heads H"]:
    """Turns plane i, made of coordinates i and i + half, by positions x freqs[i], and multiplies
    with `scale`."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None].astype(jnp.float32) * freqs[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scale is not None:
        cos, sin = cos * scale, sin * scale
    x1, x2 = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


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


def take_branches(
    keys: KeysValues, first: int, count: int, nodes: int, end: int | None = None
) -> KeysValues:
    """The first `end` slots of what the branches [first, first + count) of `nodes` see."""
    each = nodes // keys.k.shape[2]  # branches that see one of these nodes
    at = slice(first // each, -(-(first + count) // each))
    return KeysValues(*(x[:, :, at, :end] for x in keys[:2]), *(x[:, at, :end] for x in keys[2:]))


class Kernel(NamedTuple):
    """A fused kernel, which computes whole rows without a past and without a window."""

    takes: Callable[[Array, float | None], bool]  # (queries, softcap) -> whether it computes them
    run: Callable[..., Array]  # (q, k, v, valid, levels=, softcap=, rules=), queries come scaled


class Attention(NamedTuple):
    """What of a model decides how its attention is computed."""

    score_dim: int | None = None  # scores are divided by its square root; None: head_dim
    softcap: float | None = None  # c: scores become c tanh(scores / c)
    kernel: Kernel | None = None  # None: in chunks, always
    rules: Rules = UNSPLIT


class NewTokens(NamedTuple):
    """The new tokens of a layer, T = the slots of their levels. Padding is not valid: nothing sees
    it, and its own result means nothing, but is finite."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    valid: Bool[Array, "B T"]
    positions: Int[Array, "B T"]


IN_CHUNKS = Attention()


def attend(
    new: NewTokens,
    past: tuple[KeysValues, ...] = (),
    *,
    levels: Levels,
    window: Int[Array, ""] | None = None,
    how: Attention = IN_CHUNKS,
) -> Float[Array, "B T N H"]:
    """Softmax attention of the new tokens over their tree and the past.

    window: positions back that are seen, the token's own included; None for all. The backward pass
    computes scores again. Where the kernel does not compute this, or would gain nothing, the
    chunks do."""
    new = new._replace(q=new.q * (how.score_dim or new.q.shape[-1]) ** -0.5)
    slots = sum(nodes * length for nodes, length in levels)
    whole_rows = not past and window is None and slots >= KERNEL_SLOTS
    if how.kernel is not None and whole_rows and how.kernel.takes(new.q, how.softcap):
        tree = tuple(level for level in levels if math.prod(level))
        run = partial(how.kernel.run, levels=tree, softcap=how.softcap, rules=how.rules)
        return run(new.q, new.k, new.v, new.valid)
    return _attend_in_chunks(new, past, levels, window, how.softcap)


def _attend_in_chunks(
    new: NewTokens,
    past: tuple[KeysValues, ...],
    levels: Levels,
    window: Int[Array, ""] | None,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    q, k, v, valid, positions = new
    batch, slots, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, slots, kv_heads, heads // kv_heads, head_dim)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    above = list(past)
    outputs, start = [], 0
    for nodes, length in levels:
        end = start + nodes * length
        if end == start:
            continue
        own = KeysValues(
            k[:, :, start:end].reshape(batch, kv_heads, nodes, length, head_dim),
            v[:, :, start:end].reshape(batch, kv_heads, nodes, length, head_dim),
            valid[:, start:end].reshape(batch, nodes, length),
            positions[:, start:end].reshape(batch, nodes, length),
        )
        queries = q[:, start:end].reshape(batch, nodes, length, *q.shape[2:])
        queries = queries.transpose(0, 3, 1, 4, 2, 5)
        y = _attend_level(queries, own, above, window, softcap)
        outputs.append(y.transpose(0, 2, 4, 1, 3, 5).reshape(batch, end - start, heads, head_dim))
        above.append(own)
        start = end
    return jnp.concatenate(outputs, axis=1)


def _attend_level(
    q: Float[Array, "B K nodes G length H"],
    own: KeysValues,
    above: list[KeysValues],
    window: Int[Array, ""] | None,
    softcap: float | None,
) -> Float[Array, "B K nodes G length H"]:
    """In chunks of some whole nodes or, where a node is longer than a chunk, of a part of one."""
    nodes, length = q.shape[2], q.shape[4]
    most = max(QUERY_CHUNK, -(-nodes * length // MOST_CHUNKS))
    # a chunk lies in one node above or holds whole ones
    shared = [nodes // keys.k.shape[2] for keys in above]
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
    def chunk(q: Array, q_positions: Array, seen: list[KeysValues], first: int) -> Array:
        return _attend_chunk(q, q_positions, seen, first, window, softcap)

    rows = []
    for node in range(0, nodes, count):
        parts = []
        for first in range(0, length, step):
            last = min(first + step, length)
            seen = [take_branches(keys, node, count, nodes) for keys in above]
            seen.append(take_branches(own, node, count, nodes, last))
            queries = q[:, :, node : node + count, :, first:last]
            positions = own.positions[:, node : node + count, first:last]
            parts.append(chunk(queries, positions, seen, first))
        rows.append(jnp.concatenate(parts, axis=4) if len(parts) > 1 else parts[0])
    return jnp.concatenate(rows, axis=2) if len(rows) > 1 else rows[0]


def _attend_chunk(
    q: Float[Array, "B K nodes G t H"],
    q_positions: Int[Array, "B nodes t"],
    seen: list[KeysValues],
    first: int,
    window: Int[Array, ""] | None,
    softcap: float | None,
) -> Float[Array, "B K nodes G t H"]:
    """One softmax over several sets of keys. The last set are the chunk's own nodes, seen up to
    each query's slot; `first` is the slot of its first query."""
    batch, kv_heads, nodes, groups, t, head_dim = q.shape
    rows, scores = nodes * groups * t, []
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    for number, keys in enumerate(seen):
        n, s = keys.k.shape[2:4]
        own, each = number == len(seen) - 1, nodes // n
        # without axes of length 1, with which the compiler for CPUs makes slower programs
        lead = (batch, kv_heads, n) if n > 1 else (batch, kv_heads)
        queries = q.reshape(*lead, rows // n, head_dim)
        x = product("...mH,...sH->...ms", queries, keys.k.reshape(*lead, s, head_dim))
        if softcap is not None:
            x = softcap * jnp.tanh(x / softcap)
        if own or window is not None:
            mask = keys.valid[:, :, None, None, :]  # [B n each t s]
            if own:
                mask &= (jnp.arange(s)[None, :] <= first + jnp.arange(t)[:, None])[None, None, None]
            if window is not None:
                back = q_positions.reshape(batch, n, each, t, 1)
                mask &= back - keys.positions[:, :, None, None, :] < window
            mask = jnp.broadcast_to(mask, (batch, n, each, t, s))
            inner = [(size, kept) for size, kept in ((each, each), (groups, 1)) if size > 1]
            sizes, kept = (tuple(axis) for axis in zip(*inner, strict=True)) if inner else ((), ())
            bias = jnp.where(mask, 0.0, -1e30).reshape(batch, 1, *lead[2:], *kept, t, s)
            x = (x.reshape(*lead, *sizes, t, s) + bias).reshape(x.shape)
        else:
            x = x + jnp.where(keys.valid, 0.0, -1e30).reshape(batch, 1, *lead[2:], 1, s)
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
        values = keys.v.reshape(*x.shape[:-2], *keys.v.shape[3:])
        sums = product("...ms,...sH->...mH", weights.astype(keys.v.dtype), values)
        y = y + sums.reshape(y.shape)
    return (y / total[..., None]).astype(q.dtype).reshape(q.shape)
