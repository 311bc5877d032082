"""The decoder: pre-norm, rotary positions, grouped-query attention, gated MLP, scanned over layers.

Pure behind `Transformer(cfg).apply(variables(params), ...)`; callers decide what a position sees by a boolean mask, so
this file knows nothing of prompts, trees or samples, nor of model families: `TransformerConfig` switches behaviours.
Einsum letters: B batch, T queries, S keys, D embed, N heads, K kv_heads, G heads per kv_head, H head_dim, F mlp,
V vocab.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from popi_jax.models.rope import RopeScaling, frequencies, rope
from popi_jax.sharding import constrain

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and behaviours. The defaults of the behaviours are those of the first Llama."""

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
    activation: str = "silu"  # of the gate, a key of ACTIVATIONS
    qkv_bias: bool = False  # biases on queries, keys and values
    qk_norm: bool = False  # RMS norm of each head of queries and keys before the rotary positions
    norm_plus_one: bool = False  # norms multiply by 1 + scale
    post_norms: bool = False  # RMS norm also of what attention and MLP add to the stream
    embed_scale: bool = False  # embeddings are multiplied by sqrt(embed_dim)
    score_dim: int | None = None  # attention scores are divided by its square root; None: head_dim
    attn_logit_softcap: float | None = None  # c: scores become c tanh(scores / c)
    final_logit_softcap: float | None = None  # the same for the logits of tokens
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # positions that a token of a local layer sees, its own included
    local_layers: tuple[bool, ...] = ()  # which layers are local; (): none
    local_rope_theta: float | None = None  # of local layers, then without scaling; None: as in the others

    def __post_init__(self) -> None:
        if self.local_layers and (len(self.local_layers) != self.num_layers or self.sliding_window is None):
            raise ValueError("local_layers: needs one entry per layer and a sliding_window")


class Cache(NamedTuple):
    """Keys and values of the slots written so far; a value that goes in and comes out of `apply`.

    Slots need not be in the order of positions, so those are kept too: windows are measured in positions.
    """

    k: Float[Array, "layers batch slots kv_heads head_dim"]
    v: Float[Array, "layers batch slots kv_heads head_dim"]
    positions: Int[Array, "batch slots"]


def empty_cache(cfg: TransformerConfig, batch: int, slots: int) -> Cache:
    shape = (cfg.num_layers, batch, slots, cfg.num_kv_heads, cfg.head_dim)
    return Cache(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype), jnp.zeros((batch, slots), jnp.int32))


def kernel_init(fan_in_axes: int) -> nn.initializers.Initializer:
    """Normal with standard deviation 1/sqrt(fan in); the fan in is the product of the first `fan_in_axes` axes."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        fan_in = 1
        for size in shape[:fan_in_axes]:
            fan_in *= size
        return jax.random.normal(key, shape, dtype) / jnp.sqrt(jnp.asarray(fan_in, dtype))

    return init


class Linear(nn.Module):
    """A kernel that contracts the last `contract` axes of its input, and an adapter where `lora` holds one.

    An adapter is a pair of kernels `a` [inputs rank] and `b` [rank outputs]; the layer adds (x a) b. The factor
    alpha / rank is already in `b` (see lora.py).
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    contract: int
    dtype: str
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_logical_partitioning(kernel_init(self.contract), self.names)
        kernel = self.param("kernel", init, self.shape, jnp.float32).astype(self.dtype)
        fan_in = math.prod(self.shape[: self.contract])
        # one plain matrix product: on CPUs several times faster than a contraction of many axes, elsewhere the same
        rows = x.reshape(-1, fan_in)
        y = rows @ kernel.reshape(fan_in, -1)
        if self.has_variable("lora", "a"):
            a, b = (self.get_variable("lora", name).astype(self.dtype) for name in "ab")
            y = y + (rows @ a.reshape(fan_in, -1)) @ b.reshape(b.shape[0], -1)
        y = y.reshape(*x.shape[: x.ndim - self.contract], *self.shape[self.contract :])
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.names[self.contract :])
            bias = self.param("bias", zeros, self.shape[self.contract :], jnp.float32).astype(self.dtype)
            y = y + bias.reshape((1,) * (x.ndim - self.contract) + bias.shape)
        return y


class RMSNorm(nn.Module):
    """x / rms(x) times a scale of the last axis; with `plus_one` the parameter is what the scale has above 1."""

    eps: float
    plus_one: bool
    names: tuple[str, ...] = ("embed_unsharded",)

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        start = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = self.param("scale", nn.with_logical_partitioning(start, self.names), (x.shape[-1],), jnp.float32)
        scale = (1.0 + scale if self.plus_one else scale).reshape((1,) * (x.ndim - 1) + scale.shape)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps) * scale
        return y.astype(x.dtype)


QUERY_CHUNK = 96  # queries whose scores exist at a time


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    *,
    causal_slots: bool,
    score_dim: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention, a chunk of queries at a time; the backward pass recomputes the scores.

    causal_slots: no query sees a later slot than its own, so a chunk needs the keys up to its end only.
    Scores are divided by sqrt(score_dim), None for head_dim, and bounded to +-softcap.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = (
        (q * (score_dim or head_dim) ** -0.5)
        .reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
        .transpose(0, 2, 3, 1, 4)
    )
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    @jax.checkpoint
    def chunk(q: Array, k: Array, v: Array, mask: Array) -> Array:
        scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32)
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
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


class Seen(NamedTuple):
    """What differs between local and other layers, for both kinds: the masks and the rotary frequencies."""

    mask: Bool[Array, "B T S"]
    freqs: Float[Array, " half"]
    local_mask: Bool[Array, "B T S"] | None  # None: no layer is local
    local_freqs: Float[Array, " half"] | None

    def of(self, is_local: Bool[Array, ""]) -> tuple[Bool[Array, "B T S"], Float[Array, " half"]]:
        if self.local_mask is None or self.local_freqs is None:
            return self.mask, self.freqs
        return jnp.where(is_local, self.local_mask, self.mask), jnp.where(is_local, self.local_freqs, self.freqs)


def seen_by(
    cfg: TransformerConfig,
    positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    mask: Bool[Array, "B T S"],
) -> Seen:
    """A local layer sees what the mask allows at most sliding_window - 1 positions back, wherever its slot lies."""
    half = cfg.head_dim // 2
    freqs = jnp.asarray(frequencies(half, cfg.rope_theta, cfg.rope_scaling))
    if not any(cfg.local_layers):
        return Seen(mask, freqs, None, None)
    near = positions[:, :, None] - key_positions[:, None, :] < cfg.sliding_window
    local_freqs = freqs if cfg.local_rope_theta is None else jnp.asarray(frequencies(half, cfg.local_rope_theta, None))
    return Seen(mask, freqs, mask & near, local_freqs)


class Attention(nn.Module):
    cfg: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]] | None,
        is_local: Bool[Array, ""],
        positions: Int[Array, "B T"],
        seen: Seen,
        slot: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]] | None]:
        c = self.cfg
        mask, freqs = seen.of(is_local)

        def project(heads: int, axis: str, name: str) -> Float[Array, "B T heads H"]:
            shape, names = (c.embed_dim, heads, c.head_dim), ("embed", axis, "head_dim")
            return Linear(shape, names, 1, c.dtype, c.qkv_bias, name=name)(x)

        q = project(c.num_heads, "heads", "q")
        k = project(c.num_kv_heads, "kv_heads", "k")
        v = project(c.num_kv_heads, "kv_heads", "v")
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, c.norm_plus_one, ("head_dim",), name="q_norm")(q)
            k = RMSNorm(c.norm_eps, c.norm_plus_one, ("head_dim",), name="k_norm")(k)
        q, k = rope(q, positions, freqs), rope(k, positions, freqs)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, slot, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, slot, axis=1)
            cache = (k, v)
        y = attend(q, k, v, mask, causal_slots=cache is None, score_dim=c.score_dim, softcap=c.attn_logit_softcap)
        o = Linear((c.num_heads, c.head_dim, c.embed_dim), ("heads", "head_dim", "embed"), 2, c.dtype, name="o")(y)
        return o, cache


class Mlp(nn.Module):
    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.cfg
        gate = Linear((c.embed_dim, c.mlp_dim), ("embed", "mlp"), 1, c.dtype, name="gate")(x)
        up = Linear((c.embed_dim, c.mlp_dim), ("embed", "mlp"), 1, c.dtype, name="up")(x)
        hidden = constrain(ACTIVATIONS[c.activation](gate) * up, ("batch", "seq", "mlp"))
        return Linear((c.mlp_dim, c.embed_dim), ("mlp", "embed"), 1, c.dtype, name="down")(hidden)


class Block(nn.Module):
    cfg: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: tuple[Array, Array] | None,
        is_local: Bool[Array, ""],
        positions: Int[Array, "B T"],
        seen: Seen,
        slot: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
        c = self.cfg

        def norm(x: Array, name: str) -> Array:
            return RMSNorm(c.norm_eps, c.norm_plus_one, name=name)(x)

        x = constrain(x, ("batch", "seq", "embed_unsharded"))
        y, cache = Attention(c, name="attention")(norm(x, "attention_norm"), cache, is_local, positions, seen, slot)
        x = x + (norm(y, "attention_post_norm") if c.post_norms else y)
        y = Mlp(c, name="mlp")(norm(x, "mlp_norm"))
        x = x + (norm(y, "mlp_post_norm") if c.post_norms else y)
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
        if c.embed_scale:
            x = x * jnp.asarray(c.embed_dim**0.5, c.dtype)
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
            out_axes=0,
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, name="layers")
        key_positions = positions
        if cache is not None:
            key_positions = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, slot, axis=1)
        kv = None if cache is None else (cache.k, cache.v)
        is_local = jnp.asarray(c.local_layers or (False,) * c.num_layers)
        x, kv = layers(x, kv, is_local, positions, seen_by(c, positions, key_positions, mask), slot)
        x = RMSNorm(c.norm_eps, c.norm_plus_one, name="final_norm")(x)
        if not c.tied_embeddings:  # declared here so that it belongs to the tree; `head` reads it
            Head(c, name="lm_head")()
        return x, None if cache is None else Cache(kv[0], kv[1], key_positions)


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


def variables(params: dict) -> dict:
    """What `Transformer.apply` takes, of a plain parameter tree or of base weights joined with adapters (lora.py)."""
    return params if "lora" in params else {"params": params}


def head(params: dict, cfg: TransformerConfig) -> Float[Array, "D V"]:
    """The LM head, in the compute type: the transposed embedding when tied."""
    tree = variables(params)["params"]
    kernel = tree["embed"]["embedding"].T if cfg.tied_embeddings else tree["lm_head"]["kernel"]
    return kernel.astype(cfg.dtype)


def init_boxed(key: Array, cfg: TransformerConfig) -> dict:
    """Random parameters that still carry their logical axis names; `unbox` drops them."""
    one = jnp.zeros((1, 1), jnp.int32)
    return Transformer(cfg).init(key, one, one, jnp.ones((1, 1, 1), bool))["params"]


def unbox(boxed: dict) -> dict:
    return nn.meta.unbox(boxed)


def box(x: Array, names: tuple[str, ...]) -> Any:
    """An array that carries the logical names of its axes, as those of `init_boxed`."""
    return nn.LogicallyPartitioned(x, names)
