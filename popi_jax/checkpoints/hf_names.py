"""The table between our parameter tree and the tensor names of Hugging Face's Llama, both ways.

Hugging Face stores a kernel as [out, in], one tensor per layer and heads flattened; we store [in, out] with heads as an
axis and layers stacked. The arrays here are of numpy: no device is used.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from popi_jax.arrays import Params
from popi_jax.models.transformer import TransformerConfig


class Row(NamedTuple):
    path: tuple[str, ...]  # in our tree
    name: str  # in a file; "{i}" stands for the layer, and our leaf then has a leading axis "layers"
    shape: tuple[int, ...]  # of our leaf, without "layers"
    inputs: int  # leading axes of `shape` that the kernel contracts; 0: not a kernel, stored as it is

    @property
    def stored_shape(self) -> tuple[int, ...]:
        if not self.inputs:
            return self.shape
        return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])


def table(cfg: TransformerConfig) -> tuple[Row, ...]:
    """One row per leaf of the parameter tree."""
    d, n, k, h, f, v = cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.mlp_dim, cfg.vocab_size
    layer = "model.layers.{i}."
    rows = (
        Row(("embed", "embedding"), "model.embed_tokens.weight", (v, d), 0),
        Row(("layers", "attention_norm", "scale"), layer + "input_layernorm.weight", (d,), 0),
        Row(("layers", "attention", "q", "kernel"), layer + "self_attn.q_proj.weight", (d, n, h), 1),
        Row(("layers", "attention", "k", "kernel"), layer + "self_attn.k_proj.weight", (d, k, h), 1),
        Row(("layers", "attention", "v", "kernel"), layer + "self_attn.v_proj.weight", (d, k, h), 1),
        Row(("layers", "attention", "o", "kernel"), layer + "self_attn.o_proj.weight", (n, h, d), 2),
        Row(("layers", "mlp_norm", "scale"), layer + "post_attention_layernorm.weight", (d,), 0),
        Row(("layers", "mlp", "gate", "kernel"), layer + "mlp.gate_proj.weight", (d, f), 1),
        Row(("layers", "mlp", "up", "kernel"), layer + "mlp.up_proj.weight", (d, f), 1),
        Row(("layers", "mlp", "down", "kernel"), layer + "mlp.down_proj.weight", (f, d), 1),
        Row(("final_norm", "scale"), "model.norm.weight", (d,), 0),
    )
    return rows if cfg.tied_embeddings else (*rows, Row(("lm_head", "kernel"), "lm_head.weight", (d, v), 1))


def stored_shapes(cfg: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a folder of this model holds."""
    return {name: row.stored_shape for row in table(cfg) for name in _names(row, cfg)}


def to_hf(params: Params, cfg: TransformerConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, C-contiguous array) of every tensor, one at a time; dtypes are kept.

    Raises: KeyError or ValueError if the tree is not that of `cfg`.
    """
    rows = table(cfg)
    extra = set(_leaf_paths(params)) - {row.path for row in rows}
    if extra:
        raise ValueError(f"parameters that the table does not know: {sorted(extra)}")
    for row in rows:
        leaf = np.asarray(functools.reduce(lambda node, part: node[part], row.path, params))
        names = _names(row, cfg)
        layers = leaf if "{i}" in row.name else leaf[None]
        if layers.shape != (len(names), *row.shape):
            raise ValueError(f"{'/'.join(row.path)}: shape {leaf.shape}, expected {(len(names), *row.shape)}")
        for name, x in zip(names, layers, strict=True):
            # safetensors writes the memory of an array as it lies, so a transposed view would be written wrong
            yield name, np.ascontiguousarray(x.reshape(row.stored_shape[::-1]).T if row.inputs else x)


def from_hf(get: Callable[[str], np.ndarray], cfg: TransformerConfig, dtype: type = np.float32) -> Params:
    """Builds our tree, in `dtype`, from a function that returns the tensor of a name in its `stored_shapes` shape."""
    params: Params = {}
    for row in table(cfg):
        names = _names(row, cfg)
        leaf: np.ndarray = np.empty((len(names), *row.shape), dtype)
        for i, name in enumerate(names):
            x = get(name)
            leaf[i] = x.T.reshape(row.shape) if row.inputs else x
        node = params
        for part in row.path[:-1]:
            node = node.setdefault(part, {})
        node[row.path[-1]] = leaf if "{i}" in row.name else leaf[0]
    return params


def _names(row: Row, cfg: TransformerConfig) -> list[str]:
    return [row.name.format(i=i) for i in range(cfg.num_layers)] if "{i}" in row.name else [row.name]


def _leaf_paths(tree: Params, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaf_paths(value, (*prefix, name))
        else:
            yield (*prefix, name)
