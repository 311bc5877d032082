"""The state of a run, its abstract form with shardings, and how it starts."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key, PyTree

from popi_jax.arrays import Params
from popi_jax.models.transformer import TransformerConfig, init_boxed, unbox
from popi_jax.sharding import match_shardings, param_shardings, replicated


class RoleState(NamedTuple):
    """The trained side of one model."""

    step: Int[Array, ""]  # updates of this role in the present stage
    params: Params
    opt_state: PyTree


class TrainState(NamedTuple):
    """Everything that changes; donated to each update."""

    inference: RoleState
    generator: RoleState
    step: Int[Array, ""]  # updates over all stages
    key: Key[Array, ""]  # constant; folded with the step, never split


class Frozen(NamedTuple):
    """Reference policies: the models at the start of the main stage. Never donated, never updated."""

    inference: Params
    generator: Params


class Transforms(NamedTuple):
    inference: optax.GradientTransformation
    generator: optax.GradientTransformation


def new_state(inference: Params, generator: Params, key: Key[Array, ""], *, transforms: Transforms) -> TrainState:
    """The state at step 0 with given parameters."""
    zero = jnp.int32(0)
    return TrainState(
        RoleState(zero, inference, transforms.inference.init(inference)),
        RoleState(zero, generator, transforms.generator.init(generator)),
        zero,
        jax.random.fold_in(key, 2),
    )


def init_state(seed: Int[Array, ""], *, model: TransformerConfig, transforms: Transforms) -> TrainState:
    """The state at step 0 with random parameters."""
    key = jax.random.key(seed)
    inference, generator = (unbox(init_boxed(jax.random.fold_in(key, role), model)) for role in range(2))
    return new_state(inference, generator, key, transforms=transforms)


def restart_optimizers(state: TrainState, *, transforms: Transforms) -> TrainState:
    """The state at the start of a stage: parameters stay, optimizers and role counters start anew."""
    zero = jnp.int32(0)
    inference = RoleState(zero, state.inference.params, transforms.inference.init(state.inference.params))
    generator = RoleState(zero, state.generator.params, transforms.generator.init(state.generator.params))
    return TrainState(inference, generator, state.step, state.key)


def abstract_state(model: TransformerConfig, transforms: Transforms, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the whole state, without any array."""
    boxed = jax.eval_shape(partial(init_boxed, cfg=model), jax.random.key(0))
    shardings = param_shardings(boxed, mesh)
    shapes = jax.eval_shape(partial(init_state, model=model, transforms=transforms), jnp.int32(0))

    def role(shape: RoleState) -> RoleState:
        layout = match_shardings(shape, shape.params, shardings, mesh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shape, layout)

    def whole(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh))

    return TrainState(role(shapes.inference), role(shapes.generator), whole(shapes.step), whole(shapes.key))


def shardings_of(abstract: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.sharding, abstract)
