"""The plain way of everything: each sequence alone in its row, one causal mask, no tree, no cache.

`logits` is float64 numpy; `logps_and_pullback` runs the model of popi_jax on rows of one fixed
shape, so that all tests of a process share one compilation."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from popi_jax import config_rules
from popi_jax.arrays import Tokens
from popi_jax.models.layout import Rules
from popi_jax.models.packing import Level
from popi_jax.models.transformer import (
    Transformer,
    TransformerConfig,
    get_head,
    init_boxed,
    logical_names,
    unbox,
)
from popi_jax.sharding import param_shardings
from tests.oracles_llama import llama_logits

RULES, ROLLOUT_RULES = (
    Rules(**config_rules.parse_rules(table, "rules"))
    for table in (config_rules.RULES, config_rules.ROLLOUT_RULES)
)
MODEL = TransformerConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    rope_theta=100.0,
    tied_embeddings=False,
    rules=RULES,
    rollout_rules=ROLLOUT_RULES,
)
ROWS, LENGTH = 32, 24


def random_params(seed: int, model: TransformerConfig = MODEL) -> dict:
    """Random parameters, with norms that differ and sharper predictions than those of a new
    model."""
    boxed = jax.jit(partial(init_boxed, cfg=model))(jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def changed(path: tuple, x: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            return jnp.asarray(rng.uniform(0.5, 1.5, x.shape), jnp.float32)
        return 2 * x if "lm_head" in name or "embed" in name else x

    return jax.tree_util.tree_map_with_path(changed, unbox(boxed))


def shardings(boxed: dict, mesh: jax.sharding.Mesh, rules: Rules) -> dict:
    """Of parameters that still carry their logical axis names."""
    return param_shardings(unbox(boxed), logical_names(boxed), mesh, rules)


def logits(params: dict, model: TransformerConfig, ids: np.ndarray) -> np.ndarray:
    """Float64 logits [seq vocab] of one sequence of ids [seq]."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    dim, layers = model.embed_dim, p["layers"]
    tensors = {
        "model.embed_tokens.weight": p["embed"]["embedding"],
        "model.norm.weight": p["final_norm"]["scale"],
    }
    if not model.tied_embeddings:
        tensors["lm_head.weight"] = p["lm_head"]["kernel"].T
    for i in range(model.num_layers):
        name = f"model.layers.{i}."
        tensors[name + "input_layernorm.weight"] = layers["attention_norm"]["scale"][i]
        tensors[name + "post_attention_layernorm.weight"] = layers["mlp_norm"]["scale"][i]
        for n in "qkv":
            tensors[f"{name}self_attn.{n}_proj.weight"] = (
                layers["attention"][n]["kernel"][i].reshape(dim, -1).T
            )
        tensors[name + "self_attn.o_proj.weight"] = (
            layers["attention"]["o"]["kernel"][i].reshape(-1, dim).T
        )
        for n in ("gate", "up", "down"):
            tensors[f"{name}mlp.{n}_proj.weight"] = layers["mlp"][n]["kernel"][i].T
    config = {
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "num_hidden_layers": model.num_layers,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tied_embeddings,
    }
    return llama_logits(tensors, config, np.asarray(ids))


class Scored(NamedTuple):
    """A prefix and the answer that is scored behind it."""

    prefix: list[int]
    answer: list[int]


def row(tokens: Tokens, *at: int) -> list[int]:
    """The ids that count of one row of padded tokens."""
    return np.asarray(tokens.ids)[at][: int(np.asarray(tokens.lengths)[at])].tolist()


@partial(jax.jit, static_argnames="model")
def _program(
    params: dict,
    ids: jax.Array,
    weights: jax.Array,
    temperature: jax.Array,
    *,
    model: TransformerConfig,
):
    def total(params: dict) -> tuple[jax.Array, jax.Array]:
        positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], ids.shape)
        valid = jnp.ones(ids.shape, bool)
        hidden, _ = Transformer(model).apply(
            {"params": params}, ids, positions, valid, levels=(Level(1, LENGTH),)
        )
        scores = hidden[:, :-1] @ get_head(params, model)
        if model.final_logit_softcap is not None:
            scores = model.final_logit_softcap * jnp.tanh(scores / model.final_logit_softcap)
        logps = jax.nn.log_softmax(scores / temperature)
        logps = jnp.take_along_axis(logps, ids[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(logps * weights), logps

    return jax.grad(total, has_aux=True)(params)


def logps_and_pullback(
    params: dict,
    sequences: Sequence[Scored],
    weights: Sequence[Sequence[float]] | None = None,
    *,
    temperature: float = 1.0,
    model: TransformerConfig = MODEL,
) -> tuple[list[np.ndarray], dict]:
    """Log-probs of the tokens of each answer, and the gradient of their sum weighted by
    `weights`."""
    ids, scale = np.zeros((ROWS, LENGTH), np.int32), np.zeros((ROWS, LENGTH - 1), np.float32)
    spans = [slice(len(s.prefix) - 1, len(s.prefix) + len(s.answer) - 1) for s in sequences]
    for i, s in enumerate(sequences):
        ids[i, : len(s.prefix) + len(s.answer)] = s.prefix + s.answer
        if weights is not None:
            scale[i, spans[i]] = weights[i]
    grads, logps = _program(
        params, jnp.asarray(ids), jnp.asarray(scale), jnp.float32(temperature), model=model
    )
    return [np.asarray(logps)[i, span] for i, span in enumerate(spans)], grads
