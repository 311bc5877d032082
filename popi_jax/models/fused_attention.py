"""Attention over a tree by fused kernels: splash (a TPU kernel in Pallas) and the flash attention
of cuDNN. `choose_kernel` says which of them a model has.

Both compute what attention.py computes in chunks, for a whole row at once, without a past and
without a window, see `attend` there. Neither keeps scores. A row is laid out anew for them: each
node gets room for some more padding, so that nodes begin where blocks of the kernel do. Which
blocks of scores hold any pair that sees another is known before the program runs, the others are
skipped; padding, which only the run knows, is told by segments."""

import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Bool, Float

from popi_jax.models.attention import Kernel, Levels
from popi_jax.models.layout import Axes, Rules, count_shards, on_one_device

IMPLEMENTATIONS = ("auto", "chunked", "splash", "cudnn")
BEST = {"tpu": "splash", "gpu": "cudnn"}  # platform -> what "auto" is there; elsewhere "chunked"
# queries and keys of a block: multiples of what the kernel asks for, that fit its memory
BLOCKS = (128, 256, 512)
# scores whose products take as long as starting one step of the grid, about 0.35 us: between those
# of v5e and v6e
STEP = 320 * 320


def choose_kernel(name: str, platform: str) -> Kernel | None:
    """The kernel that config.model.attention asks for on a platform; None: chunks."""
    if name not in IMPLEMENTATIONS:
        allowed = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f'attention = "{name}": must be one of {allowed}')
    match BEST.get(platform) if name == "auto" else name:
        case "splash":
            return Kernel(takes_all, splash if platform == "tpu" else INTERPRETED)
        case "cudnn" if platform == "gpu":
            return Kernel(cudnn_takes, cudnn)
    return None


def takes_all(q: Array, softcap: float | None) -> bool:
    return True


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    valid: Bool[Array, "B T"],
    *,
    levels: Levels,
    softcap: float | None,
    rules: Rules,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """`interpret`: the kernel as plain operations, for processors that are no TPU."""
    layout = lay_out(levels)

    def attend_here(q: Array, k: Array, v: Array, valid: Array) -> Array:
        heads = q.shape[2]
        kernel = splash_kernel.make_splash_mha(
            splash_mask.MultiHeadMask([_Mask(layout)] * heads),
            block_sizes=_block_sizes(layout.block),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap,
            interpret=interpret,
        )
        q, k, v, real = (
            layout.joined(_spread(x, levels, layout.strides)) for x in (q, k, v, valid)
        )
        segments = real.astype(jnp.int32)

        def run(q: Array, k: Array, v: Array, segments: Array) -> Array:
            return jax.vmap(kernel)(q, k, v, splash_kernel.SegmentIds(segments, segments))

        computed = blocks(layout)
        run.__name__ = f"splash_runs_{computed.sum()}_of_{len(computed)}_rows"  # read by flops.py
        y = jax.jit(run)(*(x.swapaxes(1, 2) for x in (q, k, v)), segments)
        return layout.taken(y.swapaxes(1, 2))

    return _by_device(attend_here, k.shape, rules)(q, k, v, valid)


INTERPRETED = partial(splash, interpret=True)  # one value, so that equal models are equal


def cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    valid: Bool[Array, "B T"],
    *,
    levels: Levels,
    softcap: float | None,
    rules: Rules,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """One call per level: the queries of a node with the keys of its ancestors, copied for each
    node, and its own. "xla" is the same on any processor."""
    if softcap is not None:
        raise ValueError("cuDNN has no softcap")
    # the kernel has no gradient of odd lengths
    even = tuple(-(-length // 2) * 2 for _, length in levels)

    def attend_here(q: Array, k: Array, v: Array, valid: Array) -> Array:
        batch = q.shape[0]
        qs, ks, vs, reals = (_spread(x, levels, even) for x in (q, k, v, valid))
        parts = []
        for depth, (nodes, length) in enumerate(levels):

            def seen(of_levels: list[Array], depth: int = depth, nodes: int = nodes) -> Array:
                each = [jnp.repeat(x, nodes // x.shape[1], axis=1) for x in of_levels[: depth + 1]]
                return jnp.concatenate(each, axis=2).reshape(batch * nodes, -1, *each[0].shape[3:])

            slots, keys = even[depth], sum(even[: depth + 1])
            slot, key = (
                np.arange(slots)[:, None],
                np.arange(keys)[None, :] - (keys - slots),
            )  # own keys from 0 on
            mask = (
                seen(reals)[:, None, :] & jnp.asarray(key <= slot)[None]
                | jnp.asarray(key == slot)[None]
            )
            y = jax.nn.dot_product_attention(
                qs[depth].reshape(batch * nodes, slots, *q.shape[2:]),
                seen(ks),
                seen(vs),
                mask=mask[:, None],
                scale=1.0,
                implementation=implementation,
            )
            y = y.reshape(batch, nodes, slots, *q.shape[2:])[:, :, :length]
            parts.append(y.reshape(batch, nodes * length, *q.shape[2:]))
        return jnp.concatenate(parts, axis=1)

    return _by_device(attend_here, k.shape, rules)(q, k, v, valid)


def cudnn_takes(q: Float[Array, "B T N H"], softcap: float | None) -> bool:
    """Whether cuDNN has a kernel for queries of this type and size of heads on every GPU that it
    supports."""
    if softcap is not None:
        return False
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0


def _by_device(
    fn: Callable[..., Array], shape: tuple[int, ...], rules: Rules
) -> Callable[..., Array]:
    """`fn` of (q, k, v, valid) on each device's rows and heads: a kernel is not split by the
    compiler.

    shape: of the keys. An axis that does not divide over its devices is whole on each of them."""
    if on_one_device():
        return fn

    def fitting(size: int, axes: Axes) -> Axes:
        return axes if size % count_shards(axes) == 0 else ()

    rows, heads = fitting(shape[0], rules.batch), fitting(shape[2], rules.attention_heads)
    each = jax.sharding.PartitionSpec(rows, None, heads, None)
    whole = jax.sharding.PartitionSpec(rows, None)
    return jax.shard_map(fn, in_specs=(each, each, each, whole), out_specs=each, check_vma=False)


def _spread(x: Array, levels: Levels, strides: tuple[int, ...]) -> list[Array]:
    """[B T ...] to [B nodes stride ...] of each level, padded with zeros."""
    parts, start = [], 0
    for (nodes, length), stride in zip(levels, strides, strict=True):
        part = x[:, start : start + nodes * length].reshape(x.shape[0], nodes, length, *x.shape[2:])
        parts.append(
            jnp.pad(part, [(0, 0), (0, 0), (0, stride - length), *[(0, 0)] * (x.ndim - 2)])
        )
        start += nodes * length
    return parts


class Layout(NamedTuple):
    """Where a tree lies in a row of the kernel. The room before the next level belongs to the last
    node."""

    levels: Levels
    starts: tuple[int, ...]  # of each level
    strides: tuple[int, ...]  # slots from one node of a level to the next
    slots: int
    block: int

    def joined(self, parts: list[Array]) -> Array:
        rows = []
        for part, start, end in zip(
            parts, self.starts, (*self.starts[1:], self.slots), strict=True
        ):
            row = part.reshape(part.shape[0], -1, *part.shape[3:])
            rows.append(
                jnp.pad(row, [(0, 0), (0, end - start - row.shape[1]), *[(0, 0)] * (row.ndim - 2)])
            )
        return jnp.concatenate(rows, axis=1)

    def taken(self, y: Array) -> Array:
        """The slots of the tree."""
        parts = []
        for (nodes, length), start, stride in zip(
            self.levels, self.starts, self.strides, strict=True
        ):
            part = y[:, start : start + nodes * stride].reshape(
                y.shape[0], nodes, stride, *y.shape[2:]
            )
            parts.append(part[:, :, :length].reshape(y.shape[0], nodes * length, *y.shape[2:]))
        return jnp.concatenate(parts, axis=1)


@cache
def lay_out(levels: Levels) -> Layout:
    """The layout and block in which the kernels take least time, for what a block and a step of
    their grids cost."""

    def place(block: int, multiples: tuple[int, ...]) -> Layout:
        starts, strides, end = [], [], 0
        for (nodes, length), multiple in zip(levels, multiples, strict=True):
            starts.append(-(-end // multiple) * multiple)
            strides.append(-(-length // multiple) * multiple)
            end = starts[-1] + nodes * strides[-1]
        return Layout(levels, tuple(starts), tuple(strides), -(-end // block) * block, block)

    def cost(layout: Layout) -> tuple[int, int]:
        computed = blocks(layout)
        # two of the three kernels go over the keys of a block of queries, one over the queries of a
        # block of keys; all take as many steps for each block as the fullest has
        steps = len(computed) * (2 * computed.sum(axis=1).max() + computed.sum(axis=0).max()) // 3
        return int(computed.sum() * layout.block**2 + steps * STEP), layout.slots

    choices = (
        place(block, multiples)
        for block in BLOCKS
        for multiples in itertools.product(sorted({1, 128, block}), repeat=len(levels))
    )
    return min(choices, key=cost)


def _seen(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """int[levels slots] each: of which slots on and up to which, exclusive, a slot sees keys of a
    level."""
    first, last = np.zeros((2, len(layout.levels), layout.slots), np.int32)
    ends = (*layout.starts[1:], layout.slots)
    for depth, ((nodes, _), start, end) in enumerate(
        zip(layout.levels, layout.starts, ends, strict=True)
    ):
        slots = np.arange(start, end)
        node = np.minimum((slots - start) // layout.strides[depth], nodes - 1)
        for above, (others, length) in enumerate(layout.levels[:depth]):
            first[above, slots] = (
                layout.starts[above] + node // (nodes // others) * layout.strides[above]
            )
            last[above, slots] = first[above, slots] + length
        first[depth, slots] = start + node * layout.strides[depth]
        last[depth, slots] = slots + 1
    return first, last


def blocks(layout: Layout) -> np.ndarray:
    """bool[blocks of queries, blocks of keys]: which the kernels compute."""
    number = layout.slots // layout.block
    changes = np.zeros((number, number + 1), np.int32)
    row = np.arange(layout.slots) // layout.block
    for first, last in zip(*_seen(layout), strict=True):
        some = first < last
        np.add.at(changes, (row[some], first[some] // layout.block), 1)
        np.add.at(changes, (row[some], (last[some] - 1) // layout.block + 1), -1)
    return np.cumsum(changes, axis=1)[:, :-1] > 0


class _Mask(splash_mask.Mask):
    """What the tree sees, made block by block: the kernel keeps different blocks that are partly
    seen once each."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.first, self.last = _seen(layout)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.slots, self.layout.slots

    def __getitem__(self, at: tuple[slice, slice]) -> np.ndarray:
        keys = np.arange(*at[1].indices(self.layout.slots))[None, None, :]
        first, last = (x[:, at[0], None] for x in (self.first, self.last))
        return np.any((first <= keys) & (keys < last), axis=0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Mask) and self.layout == other.layout

    def __hash__(self) -> int:
        return hash(self.layout)


def _block_sizes(block: int) -> splash_kernel.BlockSizes:
    """Gradients of queries and of keys by a kernel each: a fused one would compute a part less, but
    write as many copies of the queries' gradients, rounded, as there are blocks of keys, most of
    them zeros in a tree."""
    forward = {"block_q": block, "block_kv": block, "block_kv_compute": block}
    of_keys = {"block_q_dkv": block, "block_kv_dkv": block, "block_kv_dkv_compute": block}
    return splash_kernel.BlockSizes(**forward, **of_keys, block_q_dq=block, block_kv_dq=block)
