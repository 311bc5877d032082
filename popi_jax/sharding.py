"""Device meshes, and where parameters, optimizer states and batches lie on them.

How arrays inside a program are laid out is models/layout.py."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from popi_jax.config import MESH_AXES
from popi_jax.errors import UserError
from popi_jax.models.layout import Axes, Rules, spec


def make_mesh(
    data: int, fsdp: int, tensor: int, sequence: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of all devices, or of those given; the axis `data` goes across slices, where there are
    several.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
      UserError: `data` does not divide over the slices of a TPU."""
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

    Raises: UserError, as `make_mesh`."""
    data = sizes[0]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and data % slices == 0:
        within, across = (data // slices, *sizes[1:]), (slices, 1, 1, 1)
        found = mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    elif slices > 1 and devices[0].platform == "tpu":
        raise UserError(
            f"config.mesh.data = {data}: must be a multiple of {slices}, the TPU slices; "
            f"set it to {slices}"
        )
    else:
        found = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return np.asarray(found)


def find_platform() -> str:
    """The platform of the devices of the mesh that is set, else of the default ones."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def param_shardings(params: Any, names: Any, mesh: Mesh, rules: Rules) -> Any:
    """Shardings of a tree of parameters, or of their shapes; `names` holds the logical axis names
    of each parameter, a tuple for every leaf.

    Raises:
      UserError: an axis of a parameter does not divide over the devices that split it, a mesh axis
        would split two axes of one parameter, or a matrix would be whole on every device although
        the rules split others."""
    split_by = ("vocab", "vocab_embed", "embed", "heads", "kv_heads", "mlp")
    used = {axis for name in split_by for axis in getattr(rules, name)}
    splits_parameters = any(mesh.shape[axis] > 1 for axis in used)

    def find_layout(path: tuple[Any, ...], x: Any, names: tuple[str | None, ...]) -> NamedSharding:
        where = "/".join(str(part.key) for part in path)
        by_rule = spec(names, rules)
        parts: list[Axes] = [() if name is None else getattr(rules, name) for name in names]
        axes = [axis for part in parts for axis in part]
        if len(set(axes)) < len(axes):
            twice = next(axis for axis in axes if axes.count(axis) > 1)
            raise UserError(
                f"parameter {where} {names}: config.mesh.rules split two of its axes by mesh axis "
                f"{twice}"
            )
        for name, size, part in zip(names, x.shape, parts, strict=True):
            count = math.prod(mesh.shape[axis] for axis in part)
            if size % count:
                fits = max(n for n in range(1, count + 1) if size % n == 0 and count % n == 0)
                raise UserError(
                    f"parameter {where}: its axis {name} of {size} does not divide over {count} "
                    f"devices (mesh axes {', '.join(part)}); at most {fits} of them can split it: "
                    "change config.mesh or config.mesh.rules"
                )
        whole = all(mesh.shape[axis] == 1 for axis in axes)
        if splits_parameters and whole and path[-1].key in ("kernel", "embedding"):
            raise UserError(
                f"parameter {where} {names} would be whole on every device: no rule of "
                "config.mesh.rules splits any of its axes, though others are split by "
                f"{', '.join(sorted(used))}"
            )
        return NamedSharding(mesh, by_rule)

    return jax.tree_util.tree_map_with_path(find_layout, params, names)


def check_heads(num_kv_heads: int, mesh: Mesh, rules: Rules) -> None:
    """Raises: UserError when the heads of attention do not divide over the devices that are to
    share them."""
    count = math.prod(mesh.shape[axis] for axis in rules.attention_heads)
    if num_kv_heads % count:
        axes = " x ".join(f"mesh.{axis}" for axis in rules.attention_heads)
        raise UserError(
            f"config.{axes} = {count}: the {num_kv_heads} KV heads of the model do not divide over "
            f"so many devices; at most {math.gcd(num_kv_heads, count)} can share them"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def place_batch(batch: Any, mesh: Mesh, rules: Rules) -> Any:
    """Puts this process's part of a batch of numpy arrays on the mesh, split along the leading
    axis."""
    sharding = NamedSharding(mesh, spec(("batch",), rules))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def place_whole(batch: Any, mesh: Mesh, rules: Rules) -> Any:
    """Puts arrays that every process holds whole on the mesh, split along the leading axis."""
    sharding = NamedSharding(mesh, spec(("batch",), rules))

    def place(x: Any) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, batch)


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
