"""Which tensors of Hugging Face's decoders hold which leaf of our parameter tree.

Hugging Face stores a kernel as [out, in], one tensor per layer and heads flattened; we store [in,
out] with heads as an axis and layers stacked. The names follow from the switches of the model
alone. No device is used, and a slice of a leaf is made from slices of tensors, so that nobody holds
more than its own part."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from popi_jax.arrays import Params
from popi_jax.models.transformer import TransformerConfig

Index = tuple[slice, ...]
JOB_BYTES = 2**26  # of a leaf, that one thread fills at a time
ALIGNMENT = 64  # bytes, of an array that XLA takes as it lies in memory


class Weight(NamedTuple):
    """A leaf of our tree, and the tensors of a file that hold it."""

    path: tuple[str, ...]  # in our tree
    name: str  # in a file; "{i}" is the layer, and our leaf then has a leading axis "layers"
    shape: tuple[int, ...]  # of our leaf, without "layers"
    # axes of `shape` that each stored axis flattens, in stored order
    groups: tuple[tuple[int, ...], ...]

    @property
    def stacked(self) -> bool:
        return "{i}" in self.name

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shape[axis] for axis in group) for group in self.groups)

    def names(self, cfg: TransformerConfig) -> list[str]:
        count = cfg.num_layers if self.stacked else 1
        return [self.name.format(i=i) for i in range(count)]


def list_weights(cfg: TransformerConfig) -> list[Weight]:
    """One for each leaf of the parameter tree."""
    d, n, k, h = cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    f, v = cfg.mlp_dim, cfg.vocab_size
    weights = [
        Weight(("embed", "embedding"), "model.embed_tokens.weight", (v, d), ((0,), (1,))),
        Weight(("final_norm", "scale"), "model.norm.weight", (d,), ((0,),)),
    ]
    if not cfg.tied_embeddings:
        weights.append(Weight(("lm_head", "kernel"), "lm_head.weight", (d, v), ((1,), (0,))))

    def add(path: str, name: str, shape: tuple[int, ...], *groups: tuple[int, ...]) -> None:
        place = ("layers", *path.split("/"))
        weights.append(Weight(place, "model.layers.{i}." + name, shape, groups or ((0,),)))

    for x, heads in (("q", n), ("k", k), ("v", k)):
        add(f"attention/{x}/kernel", f"self_attn.{x}_proj.weight", (d, heads, h), (1, 2), (0,))
        if cfg.qkv_bias:
            add(f"attention/{x}/bias", f"self_attn.{x}_proj.bias", (heads, h), (0, 1))
    add("attention/o/kernel", "self_attn.o_proj.weight", (n, h, d), (2,), (0, 1))
    if cfg.out_bias:
        add("attention/o/bias", "self_attn.o_proj.bias", (d,))
    if cfg.qk_norm:
        add("attention/q_norm/scale", "self_attn.q_norm.weight", (h,))
        add("attention/k_norm/scale", "self_attn.k_norm.weight", (h,))
    add("attention_norm/scale", "input_layernorm.weight", (d,))
    if cfg.post_norms:
        add("attention_post_norm/scale", "post_attention_layernorm.weight", (d,))
        add("mlp_norm/scale", "pre_feedforward_layernorm.weight", (d,))
        add("mlp_post_norm/scale", "post_feedforward_layernorm.weight", (d,))
    else:
        add("mlp_norm/scale", "post_attention_layernorm.weight", (d,))
    add("mlp/gate/kernel", "mlp.gate_proj.weight", (d, f), (1,), (0,))
    add("mlp/up/kernel", "mlp.up_proj.weight", (d, f), (1,), (0,))
    add("mlp/down/kernel", "mlp.down_proj.weight", (f, d), (1,), (0,))
    return weights


def list_stored_shapes(cfg: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a folder of this model holds."""
    return {name: w.stored_shape for w in list_weights(cfg) for name in w.names(cfg)}


# a file's part -> (first row, rows) of it, one block after the other
Read = Callable[[str, Index], Iterable[tuple[int, np.ndarray]]]


def read_part(
    weight: Weight,
    index: Index,
    read: Read,
    cfg: TransformerConfig,
    dtype: Any,
    run: Callable[..., Iterable[None]] = map,
) -> np.ndarray:
    """The part of a leaf that `index` selects, in `dtype`.

    index: one slice of step 1 for each axis of the leaf, "layers" included. read: yields the part
    of a stored tensor in blocks of whole rows, whose memory may be that of the next. run: `map`, or
    one that does several at once. The array lies so that a CPU device takes it without a copy."""
    names, shape = weight.names(cfg), weight.shape
    if weight.stacked:
        names, index = names[index[0]], index[1:]
    spans = [axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True)]
    sizes = [stop - start for start, stop in spans]
    out = _empty((len(names), *sizes), dtype)
    bits = np.dtype(f"u{out.itemsize}")  # numpy moves these faster than bfloat16
    order = [axis for group in weight.groups for axis in group]
    stored = []
    for first, *others in weight.groups:
        # of the axes that a stored axis flattens, the first alone is cut in the file
        inner = math.prod(shape[axis] for axis in others)
        stored.append(slice(spans[first][0] * inner, spans[first][1] * inner))
    plain = all(sizes[axis] == shape[axis] for group in weight.groups for axis in group[1:])

    def fill(job: tuple[int, slice]) -> None:
        layer, rows = job
        target = out.view(bits)[layer].transpose(order)
        if plain:  # a view: axes that are flattened lie side by side in the leaf too
            flat = target.reshape([math.prod(sizes[axis] for axis in g) for g in weight.groups])
            for at, block in read(names[layer], (rows, *stored[1:])):
                at += rows.start - stored[0].start
                flat[at : at + len(block)] = block.view(bits)
            return
        found = np.concatenate([x.copy() for _, x in read(names[layer], tuple(stored))])
        wide = [sizes[a] if a == g[0] else shape[a] for g in weight.groups for a in g]
        cut = [slice(None) if a == g[0] else slice(*spans[a]) for g in weight.groups for a in g]
        target[...] = found.view(bits).reshape(wide)[tuple(cut)]

    row = math.prod(axis.stop - axis.start for axis in stored[1:]) * out.itemsize
    step = stored[0].stop - stored[0].start
    if plain:
        step = min(step, max(1, JOB_BYTES // row))
    starts = range(stored[0].start, stored[0].stop, step)
    rows = [slice(start, min(start + step, stored[0].stop)) for start in starts]
    for _ in run(fill, [(layer, span) for layer in range(len(names)) for span in rows]):
        pass
    return out if weight.stacked else out[0]


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def build_tree(make_leaf: Callable[[Weight], Any], cfg: TransformerConfig) -> Params:
    """Our tree, with `make_leaf(weight)` at the place of each weight."""
    params: Params = {}
    for weight in list_weights(cfg):
        node = params
        for name in weight.path[:-1]:
            node = node.setdefault(name, {})
        node[weight.path[-1]] = make_leaf(weight)
    return params


def find_leaf(params: Params, weight: Weight) -> Any:
    """Raises: KeyError if the tree has no such leaf."""
    node: Any = params
    for name in weight.path:
        node = node[name]
    return node
