"""Device meshes, and how logical axes are laid out on them. The only place that decides where an array lives.

Every parameter and a few activations name their axes by logical words; `AXIS_RULES` maps a word to mesh axes. All axes
are `Auto`: the compiler propagates the layouts and inserts the collectives.
"""

import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "tensor")

AXIS_RULES: dict[str, tuple[str, ...] | str | None] = {
    "batch": ("data", "fsdp"),  # users, pairs, rows
    "seq": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "embed_unsharded": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "layers": None,
    "rank": None,  # of adapters
}


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh of all devices; one size may be -1 and takes what the others leave.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    sizes, count = [data, fsdp, tensor], jax.device_count()
    if -1 in sizes:
        known = -data * fsdp * tensor
        sizes[sizes.index(-1)] = count // max(known, 1)
    if sizes[0] * sizes[1] * sizes[2] != count:
        raise ValueError(f"mesh data x fsdp x tensor = {data} x {fsdp} x {tensor} does not fill {count} devices")
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def platform() -> str:
    """Of the devices that a program is for: those of the mesh that is set, else the default ones."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def spec(names: tuple[str | None, ...]) -> P:
    """The PartitionSpec of logical axis names. Raises KeyError on a name that has no rule."""
    return P(*(AXIS_RULES[name] if name is not None else None for name in names))


def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Asks the compiler to lay `x` out by its logical axis names; outside a mesh it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec(names))


def batch_shards() -> int:
    """Parts that rows of a batch are laid out in on the mesh that is set."""
    sizes, axes = jax.sharding.get_abstract_mesh().shape, AXIS_RULES["batch"]
    return math.prod(sizes.get(axis, 1) for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of parameters that still carry their logical axis names (boxed by flax)."""
    specs = nn.get_partition_spec(boxed)
    return jax.tree.map(lambda p: NamedSharding(mesh, spec(tuple(p))), specs, is_leaf=lambda x: isinstance(x, P))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's part of a batch of numpy arrays on the mesh, split along the leading axis."""
    sharding = NamedSharding(mesh, spec(("batch",)))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def match_shardings(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for `tree`: a leaf that has the path (its last keys) and the shape of a parameter, as optimizer moments
    do, lies as that parameter does; the rest, such as counters and the sums of a factored moment, is replicated."""
    layouts = jax.tree.map(lambda x, s: (x.shape, s), params, shardings)
    known = {
        tuple(part.key for part in path): layout
        for path, layout in jax.tree_util.tree_leaves_with_path(layouts, is_leaf=lambda x: isinstance(x, tuple))
    }

    def layout(path: tuple[Any, ...], x: Any) -> NamedSharding:
        keys = tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))
        for start in range(len(keys)):
            shape, sharding = known.get(keys[start:], (None, None))
            if shape == x.shape:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(layout, tree)
