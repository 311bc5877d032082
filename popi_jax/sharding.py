"""Device meshes, and how logical axes are laid out on them. The only place that decides where an
array lives.

Every parameter and a few activations name their axes by logical words; `Rules` maps a word to mesh
axes. They are data of the configuration (configs/scales.py) and travel with the model's
configuration, so nothing here is global. All mesh axes are `Auto`: the compiler propagates the
layouts and inserts the collectives."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from popi_jax.config import MESH_AXES
from popi_jax.errors import UserError

Axes = tuple[str, ...]


class Rules(NamedTuple):
    """The mesh axes that split each logical axis; () for none. A name that is not here is an
    error."""

    batch: Axes = ()  # users, pairs, rows
    seq: Axes = ()  # tokens of a row, outside of attention
    vocab: Axes = ()
    vocab_embed: Axes = ()  # the width of the embedding and of the LM head
    embed: Axes = ()  # that of other parameters
    heads: Axes = ()
    kv_heads: Axes = ()
    mlp: Axes = ()
    attention_heads: Axes = ()  # queries, keys and values inside attention, where rows of tokens are whole
    embed_unsharded: Axes = ()  # of activations, and of parameters while they are used
    head_dim: Axes = ()
    layers: Axes = ()
    rank: Axes = ()  # of adapters


UNSPLIT = Rules()


def make_mesh(
    data: int, fsdp: int, tensor: int, sequence: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of all devices, or of those given; the axis `data` goes across slices, where there are
    several.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
      UserError: `data` does not divide over the slices of a TPU.
    """
    sizes = (data, fsdp, tensor, sequence)
    devices = jax.devices() if devices is None else devices
    if math.prod(sizes) != len(devices):
        shape = " x ".join(map(str, sizes))
        raise ValueError(
            f"mesh {' x '.join(MESH_AXES)} = {shape} does not fill {len(devices)} devices"
        )
    return Mesh(
        device_array(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


def device_array(sizes: tuple[int, int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """The devices in the order of a mesh: neighbours along its axes near each other, `data` across
    slices.

    Raises: UserError, as `make_mesh`.
    """
    data = sizes[0]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and data % slices == 0:
        within, across = (data // slices, *sizes[1:]), (slices, 1, 1, 1)
        found = mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    elif slices > 1 and devices[0].platform == "tpu":
        raise UserError(
            f"config.mesh.data = {data}: must be a multiple of {slices}, the TPU slices; set it to {slices}"
        )
    else:
        found = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return np.asarray(found)


def platform() -> str:
    """Of the devices that a program is for: those of the mesh that is set, else the default
    ones."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def spec(names: Sequence[str | None], rules: Rules) -> P:
    """The PartitionSpec of logical axis names. Raises KeyError on a name that has no rule."""
    unknown = [name for name in names if name is not None and name not in Rules._fields]
    if unknown:
        raise KeyError(
            f"logical axes without a rule: {', '.join(map(str, unknown))}; known are {Rules._fields}"
        )
    return P(*((getattr(rules, name) or None) if name is not None else None for name in names))


def constrain(x: jax.Array, names: Sequence[str | None], rules: Rules) -> jax.Array:
    """Asks the compiler to lay `x` out by its logical axis names; without a mesh of several devices
    it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, rules))


def relaid(x: jax.Array, names: Sequence[str | None], before: Rules, after: Rules) -> jax.Array:
    """`x`, laid out by the rules `before`, laid out by those `after`.

    In two steps, as the compiler, left alone, makes it whole on every device on the way: first what
    splits another axis than before moves there, then what splits none is gathered."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    wanted: list[Axes] = [() if name is None else getattr(after, name) for name in names]
    taken = {axis for part in wanted for axis in part}
    kept = [
        () if name is None else tuple(a for a in getattr(before, name) if a not in taken)
        for name in names
    ]
    between = P(*((*new, *old) or None for new, old in zip(wanted, kept, strict=True)))
    return constrain(jax.lax.with_sharding_constraint(x, between), names, after)


def shards(axes: Axes) -> int:
    """Parts that an axis is split in by these axes of the mesh that is set."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in axes)


def logical_names(boxed: Any) -> Any:
    """The logical axis names, a tuple for each parameter, of a tree that still carries them (boxed
    by flax)."""
    return jax.tree.map(tuple, nn.get_partition_spec(boxed), is_leaf=lambda x: isinstance(x, P))


def param_shardings(boxed: Any, mesh: Mesh, rules: Rules) -> Any:
    """Shardings of a tree of parameters that still carry their logical axis names (boxed by flax).

    Raises:
      UserError: an axis of a parameter does not divide over the devices that split it, a mesh axis
        would split two axes of one parameter, or a matrix would be whole on every device although
        the rules split others.
    """
    used = {
        axis
        for name in ("vocab", "vocab_embed", "embed", "heads", "kv_heads", "mlp")
        for axis in getattr(rules, name)
    }
    splits_parameters = any(mesh.shape[axis] > 1 for axis in used)

    def layout(path: tuple[Any, ...], x: Any, names: tuple[str | None, ...]) -> NamedSharding:
        where = "/".join(str(part.key) for part in path)
        by_rule = spec(names, rules)
        parts: list[Axes] = [() if name is None else getattr(rules, name) for name in names]
        axes = [axis for part in parts for axis in part]
        if len(set(axes)) < len(axes):
            twice = next(axis for axis in axes if axes.count(axis) > 1)
            raise UserError(
                f"parameter {where} {names}: config.mesh.rules split two of its axes by mesh axis {twice}"
            )
        for name, size, part in zip(names, x.shape, parts, strict=True):
            count = math.prod(mesh.shape[axis] for axis in part)
            if size % count:
                fits = max(n for n in range(1, count + 1) if size % n == 0 and count % n == 0)
                raise UserError(
                    f"parameter {where}: its axis {name} of {size} does not divide over {count} devices (mesh axes "
                    f"{', '.join(part)}); at most {fits} of them can split it: change config.mesh or config.mesh.rules"
                )
        whole = all(mesh.shape[axis] == 1 for axis in axes)
        if splits_parameters and whole and path[-1].key in ("kernel", "embedding"):
            raise UserError(
                f"parameter {where} {names} would be whole on every device: no rule of config.mesh.rules splits any of "
                f"its axes, though others are split by {', '.join(sorted(used))}"
            )
        return NamedSharding(mesh, by_rule)

    plain = nn.meta.unbox(boxed)
    return jax.tree_util.tree_map_with_path(layout, plain, logical_names(boxed))


def check_heads(num_kv_heads: int, mesh: Mesh, rules: Rules) -> None:
    """Raises: UserError when the heads of attention do not divide over the devices that are to
    share them."""
    count = math.prod(mesh.shape[axis] for axis in rules.attention_heads)
    if num_kv_heads % count:
        axes = " x ".join(f"mesh.{axis}" for axis in rules.attention_heads)
        raise UserError(
            f"config.{axes} = {count}: the {num_kv_heads} KV heads of the model do not divide over so many devices; at "
            f"most {math.gcd(num_kv_heads, count)} can share them"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def place_batch(batch: Any, mesh: Mesh, rules: Rules) -> Any:
    """Puts this process's part of a batch of numpy arrays on the mesh, split along the leading
    axis."""
    sharding = NamedSharding(mesh, spec(("batch",), rules))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def match_shardings(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for `tree`: a leaf that has the path (its last keys) and the shape of a parameter,
    as optimizer moments do, lies as that parameter does; the rest, such as counters and the sums of
    a factored moment, is replicated."""
    layouts = jax.tree.map(lambda x, s: (x.shape, s), params, shardings)
    known = {
        tuple(part.key for part in path): layout
        for path, layout in jax.tree_util.tree_leaves_with_path(
            layouts, is_leaf=lambda x: isinstance(x, tuple)
        )
    }

    def layout(path: tuple[Any, ...], x: Any) -> NamedSharding:
        keys = tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))
        for start in range(len(keys)):
            shape, sharding = known.get(keys[start:], (None, None))
            if shape == x.shape:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(layout, tree)
