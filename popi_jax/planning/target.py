"""The devices that a program is planned for: a TPU slice that need not be there, or those of this
machine."""

import contextlib
import importlib.util
import io
import math
import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

from popi_jax.config import MESH_AXES, Config
from popi_jax.config_rules import resolve_mesh
from popi_jax.errors import UserError

# where `make fit` installs the compiler
LIBRARY = Path(__file__).resolve().parents[2] / ".libtpu" / "libtpu" / "libtpu.so"


class Target(NamedTuple):
    devices: list[Any]
    chip: str  # a key of roofline.CHIPS; "" for one whose rates are not known
    name: str


def count_chips(topology: str) -> int:
    """Of one slice. Raises: UserError on a name that is no topology."""
    kind, _, sizes = topology.partition(":")
    try:
        return math.prod(map(int, sizes.split("x"))) if kind else 0
    except ValueError:
        raise UserError(
            f'config.mesh.topology = "{topology}": must be like v5p:4x4x4 or v5e:16x16'
        ) from None


def set_environment(environ: MutableMapping[str, str], *, fast: bool) -> None:
    """What the TPU compiler needs of the environment on a machine without a TPU; before jax is
    imported.

    fast: a third of the time to compile, with memory within 5 % and a slower program."""
    environ["JAX_PLATFORMS"] = "cpu"
    environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-128")  # of no account, but asked for
    environ.setdefault("TPU_LOG_DIR", "disabled")
    environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if LIBRARY.exists():
        environ.setdefault("TPU_LIBRARY_PATH", str(LIBRARY))
    if fast:
        environ["JAX_EXEC_TIME_OPTIMIZATION_EFFORT"] = "-1"


def open_target(config: Config) -> Target:
    """The devices of the mesh of a configuration.

    Raises: UserError when the mesh does not fill whole slices, or the compiler is missing or knows
    no such slice."""
    import jax

    topology = config.mesh.topology
    if not topology:
        devices = list(jax.devices())
        return Target(devices, "", f"this machine, {len(devices)} x {devices[0].device_kind}")
    if "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the compiler for TPUs is not installed: make fit installs it (Linux on x86-64 alone "
            "has it)"
        )
    from jax.experimental import topologies

    chips = count_chips(topology)
    sizes = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    count = math.prod(size for size in sizes.values() if size != -1)
    slices = max(count // chips, 1) if -1 not in sizes.values() else 1
    resolve_mesh(config.mesh, chips * slices)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=topology, num_slices=slices
            )
    except Exception as e:  # of several types, by version
        raise UserError(
            f'config.mesh.topology = "{topology}": {" ".join(str(e).split())[:300]}'
        ) from None
    name = topology if slices == 1 else f"{slices} slices of {topology}"
    kind = topology.partition(":")[0]
    return Target(list(found.devices), kind, f"{name}, {slices * chips} chips")
