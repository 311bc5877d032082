"""The table between our parameter tree and the tensor names of Hugging Face's decoders, both ways.

Hugging Face stores a kernel as [out, in], one tensor per layer and heads flattened; we store [in,
out] with heads as an axis and layers stacked. The rows follow from the switches of the model alone.
No device is used, and a slice of a leaf is made from slices of tensors, so that nobody holds more
than its own part."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from popi_jax.arrays import Params
from popi_jax.models.transformer import TransformerConfig

Index = tuple[slice, ...]


class Row(NamedTuple):
    path: tuple[str, ...]  # in our tree
    name: (
        str  # in a file; "{i}" stands for the layer, and our leaf then has a leading axis "layers"
    )
    shape: tuple[int, ...]  # of our leaf, without "layers"
    groups: tuple[
        tuple[int, ...], ...
    ]  # axes of `shape` that each stored axis flattens, in stored order

    @property
    def stacked(self) -> bool:
        return "{i}" in self.name

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shape[axis] for axis in group) for group in self.groups)

    def names(self, cfg: TransformerConfig) -> list[str]:
        return (
            [self.name.format(i=i) for i in range(cfg.num_layers)] if self.stacked else [self.name]
        )


def table(cfg: TransformerConfig) -> tuple[Row, ...]:
    """One row per leaf of the parameter tree."""
    d, n, k, h, f, v = (
        cfg.embed_dim,
        cfg.num_heads,
        cfg.num_kv_heads,
        cfg.head_dim,
        cfg.mlp_dim,
        cfg.vocab_size,
    )
    rows = [
        Row(("embed", "embedding"), "model.embed_tokens.weight", (v, d), ((0,), (1,))),
        Row(("final_norm", "scale"), "model.norm.weight", (d,), ((0,),)),
    ]
    if not cfg.tied_embeddings:
        rows.append(Row(("lm_head", "kernel"), "lm_head.weight", (d, v), ((1,), (0,))))

    def layer(path: str, name: str, shape: tuple[int, ...], *groups: tuple[int, ...]) -> None:
        rows.append(
            Row(("layers", *path.split("/")), "model.layers.{i}." + name, shape, groups or ((0,),))
        )

    for ours, heads in (("q", n), ("k", k), ("v", k)):
        layer(
            f"attention/{ours}/kernel", f"self_attn.{ours}_proj.weight", (d, heads, h), (1, 2), (0,)
        )
        if cfg.qkv_bias:
            layer(f"attention/{ours}/bias", f"self_attn.{ours}_proj.bias", (heads, h), (0, 1))
    layer("attention/o/kernel", "self_attn.o_proj.weight", (n, h, d), (2,), (0, 1))
    if cfg.qk_norm:
        layer("attention/q_norm/scale", "self_attn.q_norm.weight", (h,))
        layer("attention/k_norm/scale", "self_attn.k_norm.weight", (h,))
    layer("attention_norm/scale", "input_layernorm.weight", (d,))
    if cfg.post_norms:
        layer("attention_post_norm/scale", "post_attention_layernorm.weight", (d,))
        layer("mlp_norm/scale", "pre_feedforward_layernorm.weight", (d,))
        layer("mlp_post_norm/scale", "post_feedforward_layernorm.weight", (d,))
    else:
        layer("mlp_norm/scale", "post_attention_layernorm.weight", (d,))
    layer("mlp/gate/kernel", "mlp.gate_proj.weight", (d, f), (1,), (0,))
    layer("mlp/up/kernel", "mlp.up_proj.weight", (d, f), (1,), (0,))
    layer("mlp/down/kernel", "mlp.down_proj.weight", (f, d), (1,), (0,))
    return tuple(rows)


def stored_shapes(cfg: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a folder of this model holds."""
    return {name: row.stored_shape for row in table(cfg) for name in row.names(cfg)}


def num_params(cfg: TransformerConfig) -> int:
    return sum(math.prod(shape) for shape in stored_shapes(cfg).values())


def to_hf(params: Params, cfg: TransformerConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, C-contiguous array) of every tensor, one at a time; dtypes are kept.

    A leaf may be a jax.Array on many devices: one layer of it at a time is brought to the host.
    Raises: KeyError or ValueError if the tree is not that of `cfg`.
    """
    rows = table(cfg)
    extra = set(_leaf_paths(params)) - {row.path for row in rows}
    if extra:
        raise ValueError(f"parameters that the table does not know: {sorted(extra)}")
    for row in rows:
        leaf: Any = functools.reduce(lambda node, part: node[part], row.path, params)
        names = row.names(cfg)
        expected = (len(names), *row.shape) if row.stacked else row.shape
        if leaf.shape != expected:
            raise ValueError(f"{'/'.join(row.path)}: shape {leaf.shape}, expected {expected}")
        order = [axis for group in row.groups for axis in group]
        for i, name in enumerate(names):
            x = (
                np.asarray(leaf[i] if row.stacked else leaf)
                .transpose(order)
                .reshape(row.stored_shape)
            )
            # safetensors writes the memory of an array as it lies, so a transposed view would be
            # written wrong
            yield name, np.ascontiguousarray(x)


def read_part(
    row: Row,
    index: Index,
    read: Callable[[str, Index], np.ndarray],
    cfg: TransformerConfig,
    dtype: Any,
) -> np.ndarray:
    """The part of a leaf that `index` selects, in `dtype`; `read` returns the part of a stored
    tensor.

    index: one slice of step 1 for each axis of the leaf, "layers" included.
    """
    names, shape = row.names(cfg), row.shape
    if row.stacked:
        chosen, index = names[index[0]], index[1:]
    else:
        chosen = names
    spans = [axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True)]
    # of the axes that a stored axis flattens, the first is cut in the file, the others after
    # reading
    stored, wide, rest = [], [], []
    for first, *others in row.groups:
        inner = math.prod(shape[axis] for axis in others)
        start, stop = spans[first]
        stored.append(slice(start * inner, stop * inner))
        wide += [stop - start, *(shape[axis] for axis in others)]
        rest += [slice(None), *(slice(*spans[axis]) for axis in others)]
    order = [axis for group in row.groups for axis in group]
    out = np.empty((len(chosen), *(stop - start for start, stop in spans)), dtype)
    for i, name in enumerate(chosen):
        part = read(name, tuple(stored)).reshape(wide)[tuple(rest)]
        out[i] = part.transpose(np.argsort(order))
    return out if row.stacked else out[0]


def build_tree(leaf: Callable[[Row], Any], cfg: TransformerConfig) -> Params:
    """Our tree, with `leaf(row)` at the place of each row."""
    params: Params = {}
    for row in table(cfg):
        node = params
        for part in row.path[:-1]:
            node = node.setdefault(part, {})
        node[row.path[-1]] = leaf(row)
    return params


def _leaf_paths(tree: Params, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaf_paths(value, (*prefix, name))
        else:
            yield (*prefix, name)
