"""The decoder: pre-norm, rotary positions, grouped-query attention, gated MLP, scanned over layers.

Pure behind `Transformer(cfg).apply({"params": params}, ...)`; callers decide what a position sees by a boolean mask, so
this file knows nothing of prompts, trees or samples. Einsum letters: B batch, T queries, S keys, D embed, N heads,
K kv_heads, G heads per kv_head, H head_dim, F mlp, V vocab.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from popi_jax.sharding import constrain

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tied_embeddings: bool = True
    dtype: str = "float32"  # of compute; parameters are float32
    remat: str = "none"  # a key of REMAT_POLICIES


class Cache(NamedTuple):
    """Keys and values of the slots written so far; a value that goes in and comes out of `apply`."""

    k: Float[Array, "layers batch slots kv_heads head_dim"]
    v: Float[Array, "layers batch slots kv_heads head_dim"]


def empty_cache(cfg: TransformerConfig, batch: int, slots: int) -> Cache:
    shape = (cfg.num_layers, batch, slots, cfg.num_kv_heads, cfg.head_dim)
    return Cache(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype))


def rope(x: Float[Array, "B T heads H"], positions: Int[Array, "B T"], theta: float) -> Float[Array, "B T heads H"]:
    """Rotary positions in the half-split form ("rotate half") that Hugging Face's Llama uses."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x1, x2 = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def kernel_init(fan_in_axes: int) -> nn.initializers.Initializer:
    """Normal with standard deviation 1/sqrt(fan in); the fan in is the product of the first `fan_in_axes` axes."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        fan_in = 1
        for size in shape[:fan_in_axes]:
            fan_in *= size
        return jax.random.normal(key, shape, dtype) / jnp.sqrt(jnp.asarray(fan_in, dtype))

    return init


class Linear(nn.Module):
    """A kernel without bias that contracts the last `contract` axes of its input."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    contract: int
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_logical_partitioning(kernel_init(self.contract), self.names)
        kernel = self.param("kernel", init, self.shape, jnp.float32).astype(self.dtype)
        fan_in = math.prod(self.shape[: self.contract])
        # one plain matrix product: on CPUs several times faster than a contraction of many axes, elsewhere the same
        y = x.reshape(-1, fan_in) @ kernel.reshape(fan_in, -1)
        return y.reshape(*x.shape[: x.ndim - self.contract], *self.shape[self.contract :])


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("embed_unsharded",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps) * scale[None, None, :]
        return y.astype(x.dtype)


QUERY_CHUNK = 96  # queries whose scores exist at a time


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    *,
    causal_slots: bool,
) -> Float[Array, "B T N H"]:
    """Softmax attention, a chunk of queries at a time; the backward pass recomputes the scores.

    causal_slots: no query sees a later slot than its own, so a chunk needs the keys up to its end only.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = (q * head_dim**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    @jax.checkpoint
    def chunk(q: Array, k: Array, v: Array, mask: Array) -> Array:
        scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32)
        scores = scores + jnp.where(mask, 0.0, -1e30)[:, None, None]
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        y = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (y / total).astype(v.dtype)

    chunks = []
    for start in range(0, length, QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, length)
        keys = end if causal_slots else k.shape[2]
        chunks.append(chunk(q[..., start:end, :], k[:, :, :keys], v[:, :, :keys], mask[:, start:end, :keys]))
    y = jnp.concatenate(chunks, axis=3)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


class Attention(nn.Module):
    cfg: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]] | None,
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"],
        slot: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]] | None]:
        c = self.cfg
        q = Linear((c.embed_dim, c.num_heads, c.head_dim), ("embed", "heads", "head_dim"), 1, c.dtype, name="q")(x)
        kv_shape, kv_names = (c.embed_dim, c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim")
        k = Linear(kv_shape, kv_names, 1, c.dtype, name="k")(x)
        v = Linear(kv_shape, kv_names, 1, c.dtype, name="v")(x)
        q, k = rope(q, positions, c.rope_theta), rope(k, positions, c.rope_theta)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, slot, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, slot, axis=1)
            cache = (k, v)
        y = attend(q, k, v, mask, causal_slots=cache is None)
        o = Linear((c.num_heads, c.head_dim, c.embed_dim), ("heads", "head_dim", "embed"), 2, c.dtype, name="o")(y)
        return o, cache


class Mlp(nn.Module):
    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.cfg
        gate = Linear((c.embed_dim, c.mlp_dim), ("embed", "mlp"), 1, c.dtype, name="gate")(x)
        up = Linear((c.embed_dim, c.mlp_dim), ("embed", "mlp"), 1, c.dtype, name="up")(x)
        hidden = constrain(jax.nn.silu(gate) * up, ("batch", "seq", "mlp"))
        return Linear((c.mlp_dim, c.embed_dim), ("mlp", "embed"), 1, c.dtype, name="down")(hidden)


class Block(nn.Module):
    cfg: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: tuple[Array, Array] | None,
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"],
        slot: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
        x = constrain(x, ("batch", "seq", "embed_unsharded"))
        y, cache = Attention(self.cfg, name="attention")(
            RMSNorm(self.cfg.norm_eps, name="attention_norm")(x), cache, positions, mask, slot
        )
        x = x + y
        x = x + Mlp(self.cfg, name="mlp")(RMSNorm(self.cfg.norm_eps, name="mlp_norm")(x))
        return x, cache


class Transformer(nn.Module):
    cfg: TransformerConfig

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"],
        cache: Cache | None = None,
        slot: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Final hidden states, before the LM head.

        mask: True where a query may see a key slot. Without a cache the key slots are the T tokens themselves; with one
        they are the cache's, and the T new keys are written from index `slot` on.
        """
        c = self.cfg
        init = nn.with_logical_partitioning(nn.initializers.normal(c.embed_dim**-0.5), ("vocab", "embed"))
        embedding = Embedding(c, init, name="embed")()
        x = constrain(embedding, ("vocab", "embed_unsharded"))[ids].astype(c.dtype)
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            out_axes=0,
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, name="layers")
        x, kv = layers(x, None if cache is None else (cache.k, cache.v), positions, mask, slot)
        x = RMSNorm(c.norm_eps, name="final_norm")(x)
        if not c.tied_embeddings:  # declared here so that it belongs to the tree; `head` reads it
            Head(c, name="lm_head")()
        return x, None if cache is None else Cache(*kv)


class Embedding(nn.Module):
    cfg: TransformerConfig
    init: nn.initializers.Initializer

    @nn.compact
    def __call__(self) -> Float[Array, "V D"]:
        return self.param("embedding", self.init, (self.cfg.vocab_size, self.cfg.embed_dim), jnp.float32)


class Head(nn.Module):
    cfg: TransformerConfig

    @nn.compact
    def __call__(self) -> Float[Array, "D V"]:
        init = nn.with_logical_partitioning(kernel_init(1), ("embed", "vocab"))
        return self.param("kernel", init, (self.cfg.embed_dim, self.cfg.vocab_size), jnp.float32)


def head(params: dict, cfg: TransformerConfig) -> Float[Array, "D V"]:
    """The LM head, in the compute type: the transposed embedding when tied."""
    kernel = params["embed"]["embedding"].T if cfg.tied_embeddings else params["lm_head"]["kernel"]
    return kernel.astype(cfg.dtype)


def init_boxed(key: Array, cfg: TransformerConfig) -> dict:
    """Random parameters that still carry their logical axis names; `unbox` drops them."""
    one = jnp.zeros((1, 1), jnp.int32)
    return Transformer(cfg).init(key, one, one, jnp.ones((1, 1, 1), bool))["params"]


def unbox(boxed: dict) -> dict:
    return nn.meta.unbox(boxed)
