"""The state of a run, its abstract form with shardings, and how it starts."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key, PyTree

from popi_jax.arrays import Params
from popi_jax.config import Config, GeneratorConfig, InferenceConfig
from popi_jax.losses.preference import PairLogps
from popi_jax.models.lora import init_lora_boxed, join
from popi_jax.models.transformer import TransformerConfig, init_boxed, unbox
from popi_jax.sharding import check_heads, match_shardings, param_shardings, replicated


class RoleState(NamedTuple):
    """The trained side of one model."""

    step: Int[Array, ""]  # gradient steps of this role in the present stage
    params: Params  # under LoRA the adapters alone
    opt_state: PyTree
    ema: Params | None = None  # average of `params` over the steps; None: not asked for


class TrainState(NamedTuple):
    """Everything that changes; donated to each update."""

    inference: RoleState
    generator: RoleState
    step: Int[Array, ""]  # updates over all stages
    key: Key[Array, ""]  # constant; folded with the step, never split


class Frozen(NamedTuple):
    """Reference policies: the models at the start of the main stage. Never donated, never updated.

    Under LoRA they are the base weights that the adapters stand on, one copy for both roles.
    """

    inference: Params
    generator: Params
    pairs: PairLogps | None = (
        None  # [train pairs]: the generator's log-probs of every pair of the training users
    )
    # without a summary, computed once at the start of the main stage; None: each update computes
    # those of its pairs


class Transforms(NamedTuple):
    inference: optax.GradientTransformation
    generator: optax.GradientTransformation


def policy(params: Params, frozen: Params, role: InferenceConfig | GeneratorConfig) -> Params:
    """The whole model of a role, as models/ takes it, from what is trained of it and the role's
    `Frozen` weights."""
    return (
        join(frozen, params, scale=role.lora.alpha / role.lora.rank) if role.lora.rank else params
    )


def new_role(params: Params, tx: optax.GradientTransformation, ema_decay: float) -> RoleState:
    return RoleState(
        jnp.int32(0), params, tx.init(params), jax.tree.map(jnp.copy, params) if ema_decay else None
    )


def new_state(
    inference: Params,
    generator: Params,
    key: Key[Array, ""],
    *,
    transforms: Transforms,
    cfg: Config,
) -> TrainState:
    """The state at step 0 with given parameters."""
    return TrainState(
        new_role(inference, transforms.inference, cfg.inference.ema_decay),
        new_role(generator, transforms.generator, cfg.generator.ema_decay),
        jnp.int32(0),
        jax.random.fold_in(key, 2),
    )


def init_state(
    seed: Int[Array, ""], *, model: TransformerConfig, transforms: Transforms, cfg: Config
) -> TrainState:
    """The state at step 0 with random parameters, or with adapters that change nothing yet."""
    key = jax.random.key(seed)
    inference, generator = (unbox(params) for params in _boxed(key, model, cfg))
    return new_state(inference, generator, key, transforms=transforms, cfg=cfg)


def restart_optimizers(state: TrainState, *, transforms: Transforms, cfg: Config) -> TrainState:
    """The state at the start of a stage: parameters stay; optimizers, averages and role counters
    start anew."""
    return TrainState(
        new_role(state.inference.params, transforms.inference, cfg.inference.ema_decay),
        new_role(state.generator.params, transforms.generator, cfg.generator.ema_decay),
        state.step,
        state.key,
    )


def abstract_state(
    model: TransformerConfig, transforms: Transforms, mesh: Mesh, *, cfg: Config
) -> TrainState:
    """Shapes, types and shardings of the whole state, without any array."""
    for rules in (model.rules, model.rollout_rules):
        check_heads(model.num_kv_heads, mesh, rules)
    key = jax.eval_shape(jax.random.key, 0)
    boxed = jax.eval_shape(partial(_boxed, model=model, cfg=cfg), key)
    shapes = jax.eval_shape(
        partial(new_state, transforms=transforms, cfg=cfg), unbox(boxed[0]), unbox(boxed[1]), key
    )

    def role(shape: RoleState, params: Params) -> RoleState:
        layout = match_shardings(
            shape, shape.params, param_shardings(params, mesh, model.rules), mesh
        )
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shape, layout
        )

    def whole(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh))

    return TrainState(
        role(shapes.inference, boxed[0]),
        role(shapes.generator, boxed[1]),
        whole(shapes.step),
        whole(shapes.key),
    )


def abstract_params(model: TransformerConfig, mesh: Mesh, dtype: str) -> Params:
    """Shapes and shardings of a whole model whose parameters are stored as `dtype`."""
    boxed = jax.eval_shape(partial(init_boxed, cfg=model), jax.eval_shape(jax.random.key, 0))
    layout = param_shardings(boxed, mesh, model.rules)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), unbox(boxed), layout
    )


def shardings_of(abstract: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.sharding, abstract)


def _boxed(key: Key[Array, ""], model: TransformerConfig, cfg: Config) -> tuple[Params, Params]:
    """What is trained of (inference, generator), with logical axis names."""

    def made(key: Key[Array, ""], role: InferenceConfig | GeneratorConfig) -> Params:
        if role.lora.rank:
            return init_lora_boxed(key, model, rank=role.lora.rank, targets=role.lora.targets)
        return init_boxed(key, model)

    return made(jax.random.fold_in(key, 0), cfg.inference), made(
        jax.random.fold_in(key, 1), cfg.generator
    )
