"""SCALES: hardware -> mesh shape, layout of arrays, global batch and precision.

The number of a pod slice is the one in its name at the cloud: chips for v5e ("v5litepod-8" has 8)
and v6e, TensorCores for v5p (two of them are one chip, so v5p-64 has 32). A slice may also be named
by its topology, e.g. "v5p:4x4x4", and several of them by their number before it: "2xv5p:4x4x4".
`mesh.fsdp = -1` takes all devices that there are."""

import glob
import importlib.util
import math
import os
import re

from popi_jax.config import RULES

# Fully sharded data parallel: devices along `tensor` hold users and parts of weights of their own
# while training, and share the weights while sampling (ROLLOUT_RULES). No activation crosses
# devices; weights are gathered once per layer.
FSDP_RULES = (
    "batch data fsdp tensor",
    "seq sequence",
    "vocab tensor",
    "vocab_embed fsdp",
    "embed fsdp tensor",
    "attention_heads sequence",
)


# topology of the slices that the cloud offers, by the number in their names
_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_TORUS = {
    8: "2x2x1",
    16: "2x2x2",
    32: "2x2x4",
    64: "2x4x4",
    128: "4x4x4",
    256: "4x4x8",
    512: "4x8x8",
    1024: "8x8x8",
}
_TOPOLOGY = re.compile(r"(?:(\d+)x)?(v5e|v6e|v5p):(\d+(?:x\d+){1,2})")


def _make_row(topology: str, count: int = 1) -> dict[str, object]:
    """Returns the row of `count` TPU slices of a topology: replicas of both models across them,
    parts within each.

    Up to 64 chips of a slice each train users of their own (FSDP_RULES); more share the users' rows
    along `tensor`."""
    chips = math.prod(map(int, topology.partition(":")[2].split("x")))
    tensor = math.gcd(chips, 4 if chips < 512 else 8)
    apart = chips <= 64
    parts = 2 if chips >= 512 else 1  # users of a device, one after the other
    users = count * (chips if apart else parts * chips // tensor)
    return {
        "mesh.topology": topology,
        "mesh.data": count,
        "mesh.fsdp": chips // tensor,
        "mesh.tensor": tensor,
        "mesh.rules": FSDP_RULES if apart else RULES,
        "model.dtype": "bfloat16",
        "batch.users": users,
        "batch.microbatches": parts,
        "warmup.generator_users": users,
        "warmup.summary_users": users,
        "warmup.reading_users": users,
        "evaluation.batch_users": users,
    }


SCALES: dict[str, dict[str, object]] = {
    # one process on a CPU
    # few users at a time, so that what is computed stays near the cores
    "laptop": {"mesh.num_devices": 1, "evaluation.batch_users": 8},
    # all GPUs of one machine or job; the batch of a laptop, so that results compare
    "gpu": {},
    # all devices of a TPU slice that has no row of its own, up to 32
    "tpu": {
        "model.dtype": "bfloat16",
        "batch.users": 32,
        "warmup.generator_users": 32,
        "warmup.summary_users": 32,
        "warmup.reading_users": 32,
        "evaluation.batch_users": 32,
    },
    **{f"v5e-{number}": _make_row(f"v5e:{topology}") for number, topology in _FLAT.items()},
    **{f"v6e-{number}": _make_row(f"v6e:{topology}") for number, topology in _FLAT.items()},
    **{f"v5p-{number}": _make_row(f"v5p:{topology}") for number, topology in _TORUS.items()},
}


# over the row "laptop" where a released model is trained on it: updates of a minute
RELEASED_ON_LAPTOP: dict[str, object] = {
    "model.dtype": "float32",  # CPUs compute bfloat16 slower
    "data.summary_len": 64,
    "batch.users": 2,
    "inference.group_size": 4,
    "evaluation.batch_users": 8,
    "evaluation.max_users": 32,
    "schedule.probe_users": 4,
}


def find_row(name: str) -> dict[str, object] | None:
    """Returns the row of SCALES, or of a topology like "v5p:4x4x4" or "2xv5p:4x4x4"; None for any
    other name."""
    if found := _TOPOLOGY.fullmatch(name):
        return _make_row(f"{found[2]}:{found[3]}", int(found[1] or 1))
    return SCALES.get(name)


def detect() -> str:
    """Returns the row of SCALES for this machine without starting a device: the meaning of
    `scale=auto`.

    It reads device files and the environment: a TPU needs libtpu, a GPU the CUDA plug-in of JAX,
    and JAX_PLATFORMS=cpu rules out both."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return "laptop"
    if (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")) and importlib.util.find_spec(
        "libtpu"
    ):
        name = os.environ.get("TPU_ACCELERATOR_TYPE", "").replace("v5litepod", "v5e")
        return name if name in SCALES else "tpu"
    if glob.glob("/dev/nvidia[0-9]*") and importlib.util.find_spec("jax_cuda13_plugin"):
        return "gpu"
    return "laptop"
