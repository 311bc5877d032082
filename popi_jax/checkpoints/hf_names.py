"""Which tensors of Hugging Face's decoders hold which leaf of our parameter tree.

Hugging Face stores a kernel as [out, in], one tensor per layer and heads flattened; we store [in,
out] with heads as an axis and layers stacked. The names follow from the switches of the model
alone. No device is used, and a slice of a leaf is made from slices of tensors, so that nobody holds
more than its own part."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from popi_jax.arrays import Params
from popi_jax.models.transformer import TransformerConfig

Index = tuple[slice, ...]


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


def read_part(
    weight: Weight,
    index: Index,
    read: Callable[[str, Index], np.ndarray],
    cfg: TransformerConfig,
    dtype: Any,
) -> np.ndarray:
    """The part of a leaf that `index` selects, in `dtype`; `read` returns the part of a stored
    tensor.

    index: one slice of step 1 for each axis of the leaf, "layers" included."""
    names, shape = weight.names(cfg), weight.shape
    if weight.stacked:
        names, index = names[index[0]], index[1:]
    spans = [axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True)]
    # of the axes that a stored axis flattens, the first is cut in the file, the others after
    # reading
    stored, wide, rest = [], [], []
    for first, *others in weight.groups:
        inner = math.prod(shape[axis] for axis in others)
        start, stop = spans[first]
        stored.append(slice(start * inner, stop * inner))
        wide += [stop - start, *(shape[axis] for axis in others)]
        rest += [slice(None), *(slice(*spans[axis]) for axis in others)]
    order = [axis for group in weight.groups for axis in group]
    out = np.empty((len(names), *(stop - start for start, stop in spans)), dtype)
    for i, name in enumerate(names):
        part = read(name, tuple(stored)).reshape(wide)[tuple(rest)]
        out[i] = part.transpose(np.argsort(order))
    return out if weight.stacked else out[0]


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
