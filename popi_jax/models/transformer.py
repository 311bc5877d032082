"""The decoder: pre-norm, rotary positions, grouped-query attention, gated MLP; layers are a scan.

Pure behind `Transformer(cfg).apply(variables(params), ...)`. Callers say by `Levels` and caches
what a token sees, so this file knows nothing of prompts or samples, nor of model families:
`TransformerConfig` switches behaviours. The only file that imports flax.
Einsum letters: B batch, T queries, S keys, D embed, N heads, K kv_heads, G heads per kv_head, H
head_dim, F mlp, V vocab."""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from popi_jax.models import attention, packing
from popi_jax.models.attention import Kernel, KeysValues, Levels, RopeScaling, Turn
from popi_jax.models.layout import UNSPLIT, Rules, constrain, move
from popi_jax.models.packing import Level, Places
from popi_jax.models.sharded_vocab import look_up

ATTENDED = "attended"  # the name of what attention gives, which takes products to compute again
REMAT_POLICIES = {
    "auto": jax.checkpoint_policies.nothing_saveable,  # as long as training has not chosen
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENDED),
    ),
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
    kernel: Kernel | None = None  # a fused kernel for attention; None: in chunks
    activation: str = "silu"  # of the gate, a key of ACTIVATIONS
    qkv_bias: bool = False  # biases on queries, keys and values
    out_bias: bool = False  # a bias on what attention adds to the stream
    qk_norm: bool = False  # RMS norm of each head of queries and keys before the rotary positions
    norm_plus_one: bool = False  # norms multiply by 1 + scale
    post_norms: bool = False  # RMS norm also of what attention and MLP add to the stream
    embed_scale: bool = False  # embeddings are multiplied by sqrt(embed_dim)
    score_dim: int | None = None  # attention scores are divided by its square root; None: head_dim
    attn_logit_softcap: float | None = None  # c: scores become c tanh(scores / c)
    final_logit_softcap: float | None = None  # the same for the logits of tokens
    rope_scaling: RopeScaling | None = None
    extra_rows: int = 0  # of the embedding behind the vocabulary: tokens that are read, never drawn
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


class Sight(NamedTuple):
    """What all layers are told of the new tokens and of what lies before them."""

    positions: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    past: tuple[tuple[Bool[Array, "B n S"], Int[Array, "B n S"]], ...]  # (valid, positions) of each
    turn: Turn
    local_turn: Turn
    places: Places | None  # where the tokens lie outside of attention; None: in their slots


def kernel_init(fan_in_axes: int) -> nn.initializers.Initializer:
    """Normal with standard deviation 1/sqrt(fan in), the product of the first axes."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        fan_in = math.prod(shape[:fan_in_axes])
        return jax.random.normal(key, shape, dtype) / jnp.sqrt(jnp.asarray(fan_in, dtype))

    return init


class Linear(nn.Module):
    """A kernel that contracts the last `contract` axes of its input, plus an adapter where the
    collection `lora` holds one.

    An adapter is a pair of kernels `a` [inputs rank] and `b` [rank outputs]; the layer adds
    (x a) b. The factor alpha / rank is already in `b` (see `join_adapters`)."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    contract: int
    cfg: TransformerConfig
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        cfg, names, contract = self.cfg, self.names, self.contract
        init = nn.with_logical_partitioning(kernel_init(contract), names)
        kernel = gather_for_use(self.param("kernel", init, self.shape, jnp.float32), names, cfg)
        fan_in, outputs = math.prod(self.shape[:contract]), self.shape[contract:]
        # one plain matrix product: on CPUs several times faster than a contraction of many axes
        rows = x.reshape(-1, fan_in)
        y = rows @ kernel.reshape(fan_in, -1)
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            a = gather_for_use(a, (*names[:contract], "rank"), cfg).reshape(fan_in, -1)
            b = gather_for_use(b, ("rank", *names[contract:]), cfg)
            y = y + (rows @ a) @ b.reshape(b.shape[0], -1)
        lead = x.shape[: x.ndim - contract]
        y = y.reshape(*lead, *outputs)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, names[contract:])
            bias = self.param("bias", zeros, outputs, jnp.float32)
            bias = gather_for_use(bias, names[contract:], cfg)
            y = y + bias.reshape((1,) * len(lead) + bias.shape)
        return y


class RMSNorm(nn.Module):
    """x / rms(x) times a scale; with `plus_one` the parameter is the scale less 1."""

    eps: float
    plus_one: bool
    names: tuple[str, ...] = ("embed_unsharded",)

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        start = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        init = nn.with_logical_partitioning(start, self.names)
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        by = (1.0 + scale if self.plus_one else scale).reshape((1,) * (x.ndim - 1) + scale.shape)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps) * by
        return y.astype(x.dtype)


class Attention(nn.Module):
    cfg: TransformerConfig
    levels: Levels

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*rows D"],
        past: tuple[tuple[Array, Array], ...],
        is_local: Bool[Array, ""],
        sight: Sight,
    ) -> tuple[Float[Array, "*rows D"], tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]]:
        """What attention adds, and the keys and values of the new tokens."""
        c, places = self.cfg, sight.places
        window, turn = None, sight.turn
        if any(
            c.local_layers
        ):  # a local layer sees a window of positions, wherever their slots lie
            window = jnp.where(is_local, c.sliding_window, jnp.iinfo(jnp.int32).max)
            turn = jax.tree.map(partial(jnp.where, is_local), sight.local_turn, turn)

        def project(heads: int, axis: str, name: str) -> Float[Array, "B T heads H"]:
            shape, names = (c.embed_dim, heads, c.head_dim), ("embed", axis, "head_dim")
            y = Linear(shape, names, 1, c, c.qkv_bias, name=name)(x)
            if c.qk_norm and name != "v":
                y = RMSNorm(c.norm_eps, c.norm_plus_one, ("head_dim",), name=f"{name}_norm")(y)
            if places is not None:
                y = packing.to_slots(y, places).reshape(*sight.valid.shape, *y.shape[2:])
            return constrain(y, ("batch", None, "attention_heads", "head_dim"), c.rules)

        q = attention.rope(project(c.num_heads, "heads", "q"), sight.positions, *turn)
        k = attention.rope(project(c.num_kv_heads, "kv_heads", "k"), sight.positions, *turn)
        v = project(c.num_kv_heads, "kv_heads", "v")
        y = attention.attend(
            attention.NewTokens(q, k, v, sight.valid, sight.positions),
            tuple(KeysValues(*kv, *at) for kv, at in zip(past, sight.past, strict=True)),
            levels=self.levels,
            window=window,
            how=attention.Attention(c.score_dim, c.attn_logit_softcap, c.kernel, c.rules),
        )
        if places is not None:
            y = packing.to_places(y.reshape(*places.valid.shape, *y.shape[2:]), places)
        y = checkpoint_name(y, ATTENDED)
        shape, names = (c.num_heads, c.head_dim, c.embed_dim), ("heads", "head_dim", "embed")
        return Linear(shape, names, 2, c, c.out_bias, name="o")(y), (k, v)


class Mlp(nn.Module):
    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        c = self.cfg
        gate = Linear((c.embed_dim, c.mlp_dim), ("embed", "mlp"), 1, c, name="gate")(x)
        up = Linear((c.embed_dim, c.mlp_dim), ("embed", "mlp"), 1, c, name="up")(x)
        hidden = constrain(ACTIVATIONS[c.activation](gate) * up, ("batch", "seq", "mlp"), c.rules)
        return Linear((c.mlp_dim, c.embed_dim), ("mlp", "embed"), 1, c, name="down")(hidden)


class Block(nn.Module):
    cfg: TransformerConfig
    levels: Levels
    keep: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*rows D"],
        past: tuple[tuple[Array, Array], ...],
        is_local: Bool[Array, ""],
        sight: Sight,
    ) -> tuple[Float[Array, "*rows D"], tuple[Array, Array] | None]:
        c = self.cfg

        def norm(x: Array, name: str) -> Array:
            return RMSNorm(c.norm_eps, c.norm_plus_one, name=name)(x)

        x = constrain(x, ("batch", "seq", "embed_unsharded"), c.rules)
        attend = Attention(c, self.levels, name="attention")
        y, new = attend(norm(x, "attention_norm"), past, is_local, sight)
        x = x + (norm(y, "attention_post_norm") if c.post_norms else y)
        y = Mlp(c, name="mlp")(norm(x, "mlp_norm"))
        x = x + (norm(y, "mlp_post_norm") if c.post_norms else y)
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
        places: Places | None = None,
    ) -> tuple[
        Float[Array, "*rows D"], tuple[Float[Array, "L B T K H"], Float[Array, "L B T K H"]] | None
    ]:
        """Final hidden states, before the LM head, and with `keep` the new tokens' keys and values
        of all layers.

        The T new tokens form the tree `levels` behind the `past`, see attention.py; valid is False
        for padding. The hidden states are [B T D] or, with `places`, theirs: [shards places D]."""
        c = self.cfg
        if places is not None:
            ids = packing.take(ids.reshape(places.valid.shape), places.slot_of)
        shape, names = (c.vocab_size, c.embed_dim), ("vocab", "vocab_embed")
        normal = nn.initializers.normal(c.embed_dim**-0.5)
        rows = (c.vocab_size + c.extra_rows, c.embed_dim)
        embedding = Table("embedding", rows, names, normal, name="embed")()
        x = look_up(embedding, ids, c.rules, c.dtype)
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
        thetas = (c.rope_theta, c.local_rope_theta)
        turns = attention.make_turns(c.head_dim // 2, thetas, c.rope_scaling)
        seen = tuple((kv.valid, kv.positions) for kv in past)
        sight = Sight(positions, valid, seen, *turns, places)
        is_local = jnp.asarray(c.local_layers or (False,) * c.num_layers)
        x, new = layers(x, tuple((kv.k, kv.v) for kv in past), is_local, sight)
        x = RMSNorm(c.norm_eps, c.norm_plus_one, name="final_norm")(x)
        if not c.tied_embeddings:  # declared here so that it belongs to the tree; get_head reads it
            Table("kernel", shape[::-1], names[::-1], kernel_init(1), name="lm_head")()
        return x, new


class Table(nn.Module):
    """A parameter of its own: the embedding or the LM head."""

    key: str
    shape: tuple[int, int]
    names: tuple[str, str]
    init: nn.initializers.Initializer

    @nn.compact
    def __call__(self) -> Float[Array, "..."]:
        init = nn.with_logical_partitioning(self.init, self.names)
        return self.param(self.key, init, self.shape, jnp.float32)


def join_adapters(base: dict, lora: dict, *, scale: float) -> dict:
    """The parameters of base with adapters, as every function here takes them; scale is alpha/rank.

    Differentiable in `lora`. The base is not copied: the reference model is `base` alone."""

    def scaled(path: tuple[Any, ...], x: Array) -> Array:
        return x * scale if path[-1].key == "b" else x

    return {"params": base, "lora": jax.tree_util.tree_map_with_path(scaled, lora)}


def variables(params: dict) -> dict:
    """What `Transformer.apply` takes, of plain parameters or of base weights with adapters."""
    return params if "lora" in params else {"params": params}


def gather_for_use(x: Array, names: tuple[str, ...], cfg: TransformerConfig) -> Array:
    """A parameter as it is multiplied with: in the compute type, and gathered along `embed`, in
    this order, so that half the bytes move. Its gradient is added up where the parameter lies: no
    device holds all of it."""

    @jax.custom_vjp
    def gathered(x: Array) -> Array:
        whole = tuple("embed_unsharded" if name == "embed" else name for name in names)
        return constrain(constrain(x, names, cfg.rules), whole, cfg.rules)

    gathered.defvjp(lambda x: (gathered(x), None), lambda _, g: (constrain(g, names, cfg.rules),))
    return gathered(x.astype(cfg.dtype))


def lay_out_for_rollout(params: dict, cfg: TransformerConfig) -> dict:
    """The weights as a loop over tokens reads them: matrices in the compute type, laid out by
    `cfg.rollout_rules`. Cast and moved once, so that no step of the loop gathers weights."""
    boxed = jax.eval_shape(partial(init_boxed, cfg=cfg), jax.eval_shape(jax.random.key, 0))
    names = logical_names(boxed)

    def lay_out(path: tuple[Any, ...], x: Array) -> Array:
        keys = [part.key for part in path if part.key not in ("params", "lora")]
        if keys[-1] == "scale":
            return x
        adapter = keys[-1] in ("a", "b")
        at: Any = names
        for key in [*keys[:-1], "kernel"] if adapter else keys:
            at = at[key]
        if (
            adapter
        ):  # of [layers, inputs, outputs]: a [layers, inputs, rank], b [layers, rank, outputs]
            is_a = keys[-1] == "a"
            at = (*at[: x.ndim - 1], "rank") if is_a else (at[0], "rank", *at[2 - x.ndim :])
        x = constrain(x.astype(cfg.dtype), at, cfg.rules)
        return move(x, at, cfg.rules, cfg.rollout_rules)

    return jax.tree_util.tree_map_with_path(lay_out, params)


def get_head(params: dict, cfg: TransformerConfig) -> Float[Array, "D V"]:
    """The LM head, in the compute type: the transposed embedding when tied."""
    tree = variables(params)["params"]
    if not cfg.tied_embeddings:
        return tree["lm_head"]["kernel"].astype(cfg.dtype)
    return tree["embed"]["embedding"][: cfg.vocab_size].T.astype(cfg.dtype)


def init_boxed(key: Array, cfg: TransformerConfig) -> dict:
    """Random parameters that still carry their logical axis names; `unbox` drops them."""
    one = jnp.zeros((1, 1), jnp.int32)
    init = partial(Transformer(cfg).init, levels=(Level(1, 1),))
    return init(key, one, one, jnp.ones((1, 1), bool))["params"]


def unbox(boxed: dict) -> dict:
    return nn.meta.unbox(boxed)


def box(x: Array, names: tuple[str, ...]) -> Any:
    """An array that carries the logical names of its axes, as those of `init_boxed`."""
    return nn.LogicallyPartitioned(x, names)


def logical_names(boxed: dict) -> dict:
    """The logical axis names, a tuple for each parameter, of a tree that still carries them."""
    is_spec = lambda x: isinstance(x, jax.sharding.PartitionSpec)  # noqa: E731
    return jax.tree.map(tuple, nn.get_partition_spec(boxed), is_leaf=is_spec)
