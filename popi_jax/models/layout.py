"""How arrays inside a program are laid out on a mesh, by the logical names of their axes.

`Rules` says which mesh axes split a logical axis. They are data of the configuration
(configs/scales.py) and travel with the model's configuration, so nothing here is global. All mesh
axes are `Auto`: the compiler propagates the layouts and inserts the collectives."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec as P

Axes = tuple[str, ...]


class Rules(NamedTuple):
    """The mesh axes that split each logical axis; () for none. Any other name is an error."""

    batch: Axes = ()  # users, pairs, rows
    seq: Axes = ()  # tokens of a row, outside of attention
    vocab: Axes = ()
    vocab_embed: Axes = ()  # the width of the embedding and of the LM head
    embed: Axes = ()  # the width of other parameters
    heads: Axes = ()
    kv_heads: Axes = ()
    mlp: Axes = ()
    attention_heads: Axes = ()  # heads inside attention, where rows of tokens are whole
    embed_unsharded: Axes = ()  # of activations, and of parameters while they are used
    head_dim: Axes = ()
    layers: Axes = ()
    rank: Axes = ()  # of adapters


UNSPLIT = Rules()


def spec(names: Sequence[str | None], rules: Rules) -> P:
    """The PartitionSpec of logical axis names. Raises KeyError on a name that has no rule."""
    unknown = [name for name in names if name is not None and name not in Rules._fields]
    if unknown:
        raise KeyError(f"no rule for the logical axes {unknown}; known are {Rules._fields}")
    return P(*(None if name is None else getattr(rules, name) or None for name in names))


def constrain(x: jax.Array, names: Sequence[str | None], rules: Rules) -> jax.Array:
    """Asks the compiler to lay `x` out by its logical axis names; does nothing on one device."""
    if on_one_device():
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, rules))


def move(x: jax.Array, names: Sequence[str | None], before: Rules, after: Rules) -> jax.Array:
    """Moves `x` from the layout of the rules `before` to that of the rules `after`.

    In two steps, since the compiler, left alone, makes it whole on every device on the way: first
    what splits another axis than before moves there, then what splits none is gathered."""
    if on_one_device():
        return x
    wanted: list[Axes] = [() if name is None else getattr(after, name) for name in names]
    taken = {axis for part in wanted for axis in part}
    parts = []
    for name, new in zip(names, wanted, strict=True):
        old = () if name is None else getattr(before, name)
        parts.append((*new, *(axis for axis in old if axis not in taken)) or None)
    return constrain(jax.lax.with_sharding_constraint(x, P(*parts)), names, after)


def count_shards(axes: Axes) -> int:
    """Parts that an axis is split in by these axes of the mesh that is set."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in axes)


def on_one_device() -> bool:
    """Whether no mesh is set, or one of a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1
