"""The decoder: pre-norm, rotary positions, grouped-query attention, gated MLP, scanned over layers.

Pure behind `Transformer(cfg).apply(variables(params), ...)`; callers say by `Levels` and caches
what a token sees, so this file knows nothing of prompts or samples, nor of model families:
`TransformerConfig` switches behaviours. Einsum letters: B batch, T queries, S keys, D embed, N
heads, K kv_heads, G heads per kv_head, H head_dim, F mlp, V vocab.

A layer takes a tuple of *streams*: the hidden states of the model and, where the caller asks for
its twin, those of the base without the adapters, of the same tokens. Each weight is read once for
both, so it is gathered and cast once."""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from popi_jax.models.attention import KeysValues, Level, Levels, attend
from popi_jax.models.packing import Dense, take, to_places, to_slots
from popi_jax.models.rope import RopeScaling, frequencies, rope
from popi_jax.models.sharded_vocab import lookup
from popi_jax.sharding import UNSPLIT, Rules, constrain, logical_names, relaid

Streams = tuple[Float[Array, "*rows D"], ...]
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
    attention: str = "auto"  # what computes it, one of attention.IMPLEMENTATIONS
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
    sliding_window: int | None = (
        None  # positions that a token of a local layer sees, its own included
    )
    local_layers: tuple[bool, ...] = ()  # which layers are local; (): none
    local_rope_theta: float | None = (
        None  # of local layers, then without scaling; None: as in the others
    )
    rules: Rules = UNSPLIT  # the layout on a mesh
    rollout_rules: Rules = UNSPLIT  # the same while tokens are sampled

    def __post_init__(self) -> None:
        if self.local_layers and (
            len(self.local_layers) != self.num_layers or self.sliding_window is None
        ):
            raise ValueError("local_layers: needs one entry per layer and a sliding_window")


class Now(NamedTuple):
    """What all layers are told of the new tokens and of what lies before them."""

    positions: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    past: tuple[
        tuple[Bool[Array, "B n S"], Int[Array, "B n S"]], ...
    ]  # (valid, positions) of each cache
    freqs: Float[Array, " half"]
    local_freqs: Float[Array, " half"]
    at: Dense | None  # where the tokens lie outside of attention; None: in their slots


def kernel_init(fan_in_axes: int) -> nn.initializers.Initializer:
    """Normal with standard deviation 1/sqrt(fan in); the fan in is the product of the first
    `fan_in_axes` axes."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        fan_in = 1
        for size in shape[:fan_in_axes]:
            fan_in *= size
        return jax.random.normal(key, shape, dtype) / jnp.sqrt(jnp.asarray(fan_in, dtype))

    return init


class Linear(nn.Module):
    """A kernel that contracts the last `contract` axes of its input, and for the first stream an
    adapter where `lora` holds one.

    An adapter is a pair of kernels `a` [inputs rank] and `b` [rank outputs]; the layer adds (x a)
    b. The factor alpha / rank is already in `b` (see lora.py)."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    contract: int
    cfg: TransformerConfig
    bias: bool = False

    @nn.compact
    def __call__(self, streams: tuple[Array, ...]) -> tuple[Array, ...]:
        init = nn.with_logical_partitioning(kernel_init(self.contract), self.names)
        kernel = in_use(self.param("kernel", init, self.shape, jnp.float32), self.names, self.cfg)
        fan_in, outputs = math.prod(self.shape[: self.contract]), self.shape[self.contract :]
        # one plain matrix product: on CPUs several times faster than a contraction of many axes,
        # elsewhere the same
        kernel = kernel.reshape(fan_in, -1)
        adapter, bias = None, None
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            a = in_use(a, (*self.names[: self.contract], "rank"), self.cfg)
            b = in_use(b, ("rank", *self.names[self.contract :]), self.cfg)
            adapter = a.reshape(fan_in, -1), b.reshape(b.shape[0], -1)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.names[self.contract :])
            bias = in_use(
                self.param("bias", zeros, outputs, jnp.float32),
                self.names[self.contract :],
                self.cfg,
            )

        def product(x: Array, adapter: tuple[Array, Array] | None) -> Array:
            rows = x.reshape(-1, fan_in)
            y = rows @ kernel
            if adapter is not None:
                y = y + (rows @ adapter[0]) @ adapter[1]
            y = y.reshape(*x.shape[: x.ndim - self.contract], *outputs)
            return (
                y
                if bias is None
                else y + bias.reshape((1,) * (x.ndim - self.contract) + bias.shape)
            )

        return product(streams[0], adapter), *(product(x, None) for x in streams[1:])


class RMSNorm(nn.Module):
    """x / rms(x) times a scale of the last axis; with `plus_one` the parameter is what the scale
    has above 1."""

    eps: float
    plus_one: bool
    names: tuple[str, ...] = ("embed_unsharded",)

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        start = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        dim = streams[0].shape[-1]
        scale = self.param(
            "scale", nn.with_logical_partitioning(start, self.names), (dim,), jnp.float32
        )

        def normed(x: Array) -> Array:
            by = (1.0 + scale if self.plus_one else scale).reshape(
                (1,) * (x.ndim - 1) + scale.shape
            )
            y = x.astype(jnp.float32)
            y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps) * by
            return y.astype(x.dtype)

        return tuple(map(normed, streams))


class Attention(nn.Module):
    cfg: TransformerConfig
    levels: Levels

    @nn.compact
    def __call__(
        self,
        streams: Streams,
        past: tuple[tuple[Array, Array], ...],
        is_local: Bool[Array, ""],
        now: Now,
    ) -> tuple[Streams, tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]]:
        """What attention adds to each stream, and the keys and values of the first."""
        c = self.cfg
        window, freqs = None, now.freqs
        if any(
            c.local_layers
        ):  # a local layer sees a window of positions, wherever their slots lie
            window = jnp.where(is_local, c.sliding_window, jnp.iinfo(jnp.int32).max)
            freqs = jnp.where(is_local, now.local_freqs, now.freqs)

        def project(heads: int, axis: str, name: str) -> tuple[Float[Array, "*rows heads H"], ...]:
            shape, names = (c.embed_dim, heads, c.head_dim), ("embed", axis, "head_dim")
            return Linear(shape, names, 1, c, c.qkv_bias, name=name)(streams)

        q = project(c.num_heads, "heads", "q")
        k = project(c.num_kv_heads, "kv_heads", "k")
        v = project(c.num_kv_heads, "kv_heads", "v")
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, c.norm_plus_one, ("head_dim",), name="q_norm")(q)
            k = RMSNorm(c.norm_eps, c.norm_plus_one, ("head_dim",), name="k_norm")(k)

        def attended(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
            if now.at is not None:
                q, k, v = (
                    to_slots(x, now.at).reshape(*now.valid.shape, *x.shape[2:]) for x in (q, k, v)
                )
            q, k, v = (
                constrain(x, ("batch", None, "attention_heads", "head_dim"), c.rules)
                for x in (q, k, v)
            )
            q, k = rope(q, now.positions, freqs), rope(k, now.positions, freqs)
            y = attend(
                q,
                k,
                v,
                now.valid,
                now.positions,
                tuple(KeysValues(*kv, *at) for kv, at in zip(past, now.past, strict=True)),
                levels=self.levels,
                window=window,
                score_dim=c.score_dim,
                softcap=c.attn_logit_softcap,
                implementation=c.attention,
                rules=c.rules,
            )
            if now.at is not None:
                y = to_places(y.reshape(*now.at.valid.shape, *y.shape[2:]), now.at)
            return y, (k, v)

        results = [attended(*qkv) for qkv in zip(q, k, v, strict=True)]
        shape, names = (c.num_heads, c.head_dim, c.embed_dim), ("heads", "head_dim", "embed")
        return Linear(shape, names, 2, c, name="o")(tuple(y for y, _ in results)), results[0][1]


class Mlp(nn.Module):
    cfg: TransformerConfig

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        c = self.cfg
        gates = Linear((c.embed_dim, c.mlp_dim), ("embed", "mlp"), 1, c, name="gate")(streams)
        ups = Linear((c.embed_dim, c.mlp_dim), ("embed", "mlp"), 1, c, name="up")(streams)

        def hidden(gate: Array, up: Array) -> Array:
            return constrain(ACTIVATIONS[c.activation](gate) * up, ("batch", "seq", "mlp"), c.rules)

        down = Linear((c.mlp_dim, c.embed_dim), ("mlp", "embed"), 1, c, name="down")
        return down(tuple(map(hidden, gates, ups)))


class Block(nn.Module):
    cfg: TransformerConfig
    levels: Levels
    keep: bool

    @nn.compact
    def __call__(
        self,
        streams: Streams,
        past: tuple[tuple[Array, Array], ...],
        is_local: Bool[Array, ""],
        now: Now,
    ) -> tuple[Streams, tuple[Array, Array] | None]:
        c = self.cfg

        def norm(streams: Streams, name: str) -> Streams:
            return RMSNorm(c.norm_eps, c.norm_plus_one, name=name)(streams)

        x = tuple(constrain(x, ("batch", "seq", "embed_unsharded"), c.rules) for x in streams)
        y, new = Attention(c, self.levels, name="attention")(
            norm(x, "attention_norm"), past, is_local, now
        )
        x = tuple(map(jnp.add, x, norm(y, "attention_post_norm") if c.post_norms else y))
        y = Mlp(c, name="mlp")(norm(x, "mlp_norm"))
        x = tuple(map(jnp.add, x, norm(y, "mlp_post_norm") if c.post_norms else y))
        return x, new if self.keep else None


class Transformer(nn.Module):
    cfg: TransformerConfig

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        past: tuple[KeysValues, ...] = (),
        *,
        levels: Levels,
        keep: bool = False,
        at: Dense | None = None,
        twin: bool = False,
    ) -> tuple[
        Float[Array, "*rows D"] | Streams,
        tuple[Float[Array, "L B T K H"], Float[Array, "L B T K H"]] | None,
    ]:
        """Final hidden states, before the LM head, and with `keep` the new tokens' keys and values
        of all layers.

        The T new tokens form the tree `levels` behind the `past`, see attention.py; valid is False
        for padding. The hidden states are [B T D] or, with `at`, those of its places, [shards
        places D].

        With `twin` they are a pair, the second of the base without the adapters. Its stream never
        meets the other's, so where the adapters alone are differentiated it has no backward pass.
        """
        c = self.cfg
        if at is not None:
            ids = take(ids.reshape(at.valid.shape), at.slot_of)
        init = nn.with_logical_partitioning(
            nn.initializers.normal(c.embed_dim**-0.5), ("vocab", "vocab_embed")
        )
        embedding = Embedding(c, init, name="embed")()
        x = lookup(embedding, ids, c.rules, c.dtype)
        if c.embed_scale:
            x = x * jnp.asarray(c.embed_dim**0.5, c.dtype)
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),
            out_axes=0,
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, levels, keep, name="layers")
        half = c.head_dim // 2
        freqs = jnp.asarray(frequencies(half, c.rope_theta, c.rope_scaling))
        local = (
            freqs
            if c.local_rope_theta is None
            else jnp.asarray(frequencies(half, c.local_rope_theta, None))
        )
        now = Now(
            positions, valid, tuple((kv.valid, kv.positions) for kv in past), freqs, local, at
        )
        is_local = jnp.asarray(c.local_layers or (False,) * c.num_layers)
        streams = (x, jax.lax.stop_gradient(x)) if twin else (x,)
        streams, new = layers(streams, tuple((kv.k, kv.v) for kv in past), is_local, now)
        streams = RMSNorm(c.norm_eps, c.norm_plus_one, name="final_norm")(streams)
        if not c.tied_embeddings:  # declared here so that it belongs to the tree; `head` reads it
            Head(c, name="lm_head")()
        return streams if twin else streams[0], new


class Embedding(nn.Module):
    cfg: TransformerConfig
    init: nn.initializers.Initializer

    @nn.compact
    def __call__(self) -> Float[Array, "V D"]:
        return self.param(
            "embedding", self.init, (self.cfg.vocab_size, self.cfg.embed_dim), jnp.float32
        )


class Head(nn.Module):
    cfg: TransformerConfig

    @nn.compact
    def __call__(self) -> Float[Array, "D V"]:
        init = nn.with_logical_partitioning(kernel_init(1), ("vocab_embed", "vocab"))
        return self.param("kernel", init, (self.cfg.embed_dim, self.cfg.vocab_size), jnp.float32)


def variables(params: dict) -> dict:
    """What `Transformer.apply` takes, of a plain parameter tree or of base weights joined with
    adapters (lora.py)."""
    return params if "lora" in params else {"params": params}


def in_use(x: Array, names: tuple[str, ...], cfg: TransformerConfig) -> Array:
    """A parameter as it is multiplied with: in the compute type, and gathered along `embed`, in
    this order, so that half the bytes move. Its gradient is added up where the parameter lies: no
    device holds all of it."""

    @jax.custom_vjp
    def gathered(x: Array) -> Array:
        whole = tuple("embed_unsharded" if name == "embed" else name for name in names)
        return constrain(constrain(x, names, cfg.rules), whole, cfg.rules)

    gathered.defvjp(lambda x: (gathered(x), None), lambda _, g: (constrain(g, names, cfg.rules),))
    return gathered(x.astype(cfg.dtype))


def for_rollout(params: dict, cfg: TransformerConfig) -> dict:
    """The weights as a loop over tokens reads them: matrices in the compute type, laid out by
    `cfg.rollout_rules`.

    Cast and moved once, before the loop, so that no step of it gathers weights.
    """
    names = logical_names(
        jax.eval_shape(partial(init_boxed, cfg=cfg), jax.eval_shape(jax.random.key, 0))
    )

    def laid_out(path: tuple[Any, ...], x: Array) -> Array:
        if path[-1].key == "scale":
            return x
        keys = [part.key for part in path if part.key not in ("params", "lora")]
        adapter = keys[-1] if keys[-1] in ("a", "b") else None
        at = names
        for key in [*keys[:-1], "kernel"] if adapter else keys:
            at = at[key]
        if adapter:  # of a kernel [layers, inputs, outputs]: a is [layers, inputs, rank], b is [layers, rank, outputs]
            at = (
                (*at[: x.ndim - 1], "rank")
                if adapter == "a"
                else (at[0], "rank", *at[len(at) - x.ndim + 2 :])
            )
        return relaid(
            constrain(x.astype(cfg.dtype), at, cfg.rules), at, cfg.rules, cfg.rollout_rules
        )

    return jax.tree_util.tree_map_with_path(laid_out, params)


def head(params: dict, cfg: TransformerConfig) -> Float[Array, "D V"]:
    """The LM head, in the compute type: the transposed embedding when tied."""
    tree = variables(params)["params"]
    kernel = tree["embed"]["embedding"].T if cfg.tied_embeddings else tree["lm_head"]["kernel"]
    return kernel.astype(cfg.dtype)


def init_boxed(key: Array, cfg: TransformerConfig) -> dict:
    """Random parameters that still carry their logical axis names; `unbox` drops them."""
    one = jnp.zeros((1, 1), jnp.int32)
    return Transformer(cfg).init(key, one, one, jnp.ones((1, 1), bool), levels=(Level(1, 1),))[
        "params"
    ]


def unbox(boxed: dict) -> dict:
    return nn.meta.unbox(boxed)


def box(x: Array, names: tuple[str, ...]) -> Any:
    """An array that carries the logical names of its axes, as those of `init_boxed`."""
    return nn.LogicallyPartitioned(x, names)
