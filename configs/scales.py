"""SCALES: hardware -> mesh shape, layout of arrays, global batch and precision.

The number of a pod slice is the one in its name at the cloud: chips for v5e ("v5litepod-8" has 8) and v6e, TensorCores
for v5p (two of them are one chip, so v5p-64 has 32). A slice may also be named by its topology, e.g. "v5p:4x4x4", and
several of them by their number before it: "2xv5p:4x4x4". `mesh.fsdp = -1` takes all devices that there are.
"""

import glob
import importlib.util
import os

# How arrays are laid out: "axis mesh-axis ..." says which mesh axes split a logical axis; what is not named is whole.
# Weights are split by all axes but `data`, and gathered layer by layer where they are used; users by `data` and `fsdp`.
RULES = (
    "batch data fsdp",
    "seq sequence",
    "vocab tensor",
    "embed fsdp",
    "heads tensor",
    "kv_heads tensor",
    "mlp tensor",
    "attention_heads tensor sequence",
)
# While summaries are sampled: matrices are split by their heads or hidden units alone, so that no step gathers them.
ROLLOUT_RULES = (
    "batch data fsdp",
    "vocab tensor",
    "heads tensor",
    "kv_heads tensor",
    "mlp tensor",
    "attention_heads tensor",
)
# Fully sharded data parallel: devices along `tensor` hold users and parts of weights of their own while training, and
# share the weights while sampling (ROLLOUT_RULES). No activation crosses devices; weights are gathered once per layer.
FSDP_RULES = ("batch data fsdp tensor", "seq sequence", "embed fsdp tensor", "attention_heads sequence")


def _slice(devices: int, users: int) -> dict[str, object]:
    """Returns the row of a TPU slice whose devices all share the parameters (axis fsdp)."""
    return {
        "mesh.num_devices": 0,
        "mesh.data": 1,
        "mesh.fsdp": devices,
        "mesh.tensor": 1,
        "model.dtype": "bfloat16",
        "batch.users": users,
        "warmup.generator_users": users,
        "warmup.summary_users": users,
        "warmup.reading_users": users,
        "evaluation.batch_users": users,
    }


SCALES: dict[str, dict[str, object]] = {
    # one process on a CPU, the defaults of base.py
    "laptop": {},
    # all GPUs of one machine; the batch of a laptop, so that results compare
    "gpu": {"mesh.num_devices": 0},
    # all devices of a TPU slice that has no row of its own, up to 32
    "tpu": {**_slice(-1, 32)},
    "v5e-4": _slice(4, 16),
    "v5e-8": _slice(8, 32),
    "v5e-16": _slice(16, 32),
    "v5e-64": _slice(64, 128),
    "v5p-8": _slice(4, 16),
    "v5p-64": _slice(32, 64),
    "v5p-128": _slice(64, 128),
}


def detect() -> str:
    """Returns the row of SCALES for this machine without starting a device: the meaning of `scale=auto`.

    It reads device files and the environment: a TPU needs libtpu, a GPU the CUDA plug-in of JAX, and JAX_PLATFORMS=cpu
    rules out both.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return "laptop"
    if (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")) and importlib.util.find_spec("libtpu"):
        name = os.environ.get("TPU_ACCELERATOR_TYPE", "").replace("v5litepod", "v5e")
        return name if name in SCALES else "tpu"
    if glob.glob("/dev/nvidia[0-9]*") and importlib.util.find_spec("jax_cuda13_plugin"):
        return "gpu"
    return "laptop"
