"""Low-rank adapters (LoRA, arXiv 2106.09685): W + (alpha / rank) A B on the kernels that `targets`
name.

Adapters are a second tree beside the base weights: {"layers": {"attention": {"q": {"a" [layers
embed rank], "b" [layers rank heads head_dim]}, ...}, "mlp": {...}}}, float32. alpha / rank is no
array and no field of the model: it is given where base and adapters are joined, so that it can be
neither trained nor stored by accident, and one model serves roles with different ranks."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from popi_jax.arrays import Params
from popi_jax.models.transformer import TransformerConfig, box

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


def kernels(
    cfg: TransformerConfig, targets: tuple[str, ...]
) -> Iterator[tuple[tuple[str, str], Any]]:
    """((group, name), (input axes, output axes)) of each target; an axis is (logical name, size).

    Raises: ValueError on a name that is no target, or none at all."""
    unknown = [name for name in targets if name not in TARGETS]
    if unknown or not targets:
        raise ValueError(f"targets {list(targets)}: must be some of {', '.join(TARGETS)}")
    embed, mlp, dim = ("embed", cfg.embed_dim), ("mlp", cfg.mlp_dim), ("head_dim", cfg.head_dim)
    heads, kv_heads = (("heads", cfg.num_heads), dim), (("kv_heads", cfg.num_kv_heads), dim)
    axes = {
        **{
            "q": ((embed,), heads),
            "k": ((embed,), kv_heads),
            "v": ((embed,), kv_heads),
            "o": (heads, (embed,)),
        },
        **{"gate": ((embed,), (mlp,)), "up": ((embed,), (mlp,)), "down": ((mlp,), (embed,))},
    }
    for name in TARGETS:
        if name in targets:
            yield ("attention" if name in "qkvo" else "mlp", name), axes[name]


def init_lora_boxed(
    key: Key[Array, ""], cfg: TransformerConfig, *, rank: int, targets: tuple[str, ...]
) -> Params:
    """Adapters that still carry their logical axis names; `unbox` drops them, `param_shardings`
    lays them out.

    A is uniform within 1 / sqrt(inputs), as PEFT's (Kaiming with a = sqrt 5), B is zero: the model
    starts as its base."""
    lora: Params = {"layers": {}}
    for number, ((group, name), (inputs, outputs)) in enumerate(kernels(cfg, targets)):
        shape_a = (cfg.num_layers, *(size for _, size in inputs), rank)
        shape_b = (cfg.num_layers, rank, *(size for _, size in outputs))
        bound = 1 / math.sqrt(math.prod(size for _, size in inputs))
        a = jax.random.uniform(jax.random.fold_in(key, number), shape_a, jnp.float32, -bound, bound)
        lora["layers"].setdefault(group, {})[name] = {
            "a": box(a, ("layers", *(axis for axis, _ in inputs), "rank")),
            "b": box(
                jnp.zeros(shape_b, jnp.float32), ("layers", "rank", *(axis for axis, _ in outputs))
            ),
        }
    return lora


def merge(base: Params, lora: Params, *, scale: float) -> Params:
    """The base with the adapters added to its kernels, in the dtypes of the base; sums are float32.
    For export."""
    merged = jax.tree.map(lambda x: x, base)
    for group, members in lora["layers"].items():
        for name, adapter in members.items():
            kernel = merged["layers"][group][name]["kernel"]
            merged["layers"][group][name]["kernel"] = _added(
                kernel, adapter["a"], adapter["b"], jnp.float32(scale)
            )
    return merged


@jax.jit
def _added(kernel: Array, a: Array, b: Array, scale: Array) -> Array:
    layers, rank = b.shape[:2]
    update = jnp.einsum(
        "LIR,LRO->LIO",
        a.reshape(layers, -1, rank),
        b.reshape(layers, rank, -1),
        precision="highest",
    ).reshape(kernel.shape)
    return (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)


def num_params(lora: Params) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(lora))
