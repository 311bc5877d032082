"""One process or many: start-up, who writes and who speaks, the end of all when one is lost, and a
request to stop.

Every host starts the same command; which of how many it is stands in its environment. A process
that is lost is noticed by JAX's coordination service, whose heartbeats go on while Python or a
collective blocks; it then ends the others from C++, past any handler of Python. So the last line
that such a process shall say is kept by a child, `Herald`."""

import atexit
import contextlib
import glob
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from absl import logging
from jax._src.distributed import (
    global_state,  # barriers with a time limit have no public name yet; jax is pinned
)
from jax.experimental import multihost_utils

from popi_jax.errors import UserError

T = TypeVar("T")

# until all processes must have come; POPI_JAX_JOIN_S overrides it, e.g. where hosts start minutes
# apart
JOIN_S = 60
LOST_S = 40  # without a sign of life a process counts as lost; POPI_JAX_LOST_S overrides it
BARRIER_S = 600  # until all processes must have come to the same point of the program
_SHUTDOWN_S = 100  # that the first process to end waits for the last
_CONTINUE = "the same command on all hosts continues from the last checkpoint"


class Joining(NamedTuple):
    """How `jax.distributed.initialize` is called; None: it finds that out, as it can in Slurm, Open
    MPI and on TPUs."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: list[int] | None = None  # []: all devices of this host


class Herald:
    """A child that says the last message it was given when this process ends without having
    withdrawn it."""

    _SCRIPT = 'while read -r line; do last=$line; done; [ -z "$last" ] || echo "$last" >&2'

    def __init__(self) -> None:
        # in a session of its own, so that neither Ctrl-C nor a hang-up ends it before this process
        self._child = subprocess.Popen(
            ["sh", "-c", self._SCRIPT],
            stdin=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
        )

    def keep(self, message: str) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(f"{message}\n")

    def withdraw(self) -> None:
        self.keep("")


def joining(env: Mapping[str, str]) -> Joining | None:
    """What an environment says about the other processes; None when this process is alone.

    Raises: UserError when a number is none."""
    local: list[int] | None = None if _several_on_this_host(env) else []
    if env.get("JAX_COORDINATOR_ADDRESS"):
        count, number = (_whole(env, name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        return Joining(env["JAX_COORDINATOR_ADDRESS"], count, number, local)
    # an allocation of many tasks is also seen by the script of the job and by `salloc`: only srun
    # makes steps
    in_srun = {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST"} <= env.keys()
    slurm = in_srun and (_whole(env, "SLURM_NTASKS") or 1) > 1
    open_mpi = (_whole(env, "OMPI_COMM_WORLD_SIZE") or 1) > 1
    hosts = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES", ""))
    gke = "," in hosts or (_whole(env, "MEGASCALE_NUM_SLICES") or 1) > 1
    if slurm or open_mpi or gke or _on_tpu_vms(env):
        return Joining(local_device_ids=local)
    return None


def is_alone_on_cpu(env: Mapping[str, str]) -> bool:
    """Whether a command that starts in this environment runs in one process on CPUs; starts no
    device.

    Only there may made data stand in for real ones. An accelerator is a device file whose plug-in
    of JAX is installed. Raises: UserError as `joining`."""
    how = joining(env)
    if how is not None and how.num_processes != 1:
        return False
    if env.get("JAX_PLATFORMS"):
        return env["JAX_PLATFORMS"] == "cpu"
    files = {"libtpu": ("accel*", "vfio/[0-9]*"), "jax_cuda13_plugin": ("nvidia[0-9]*",)}
    return not any(
        importlib.util.find_spec(plugin) and any(glob.glob(f"/dev/{name}") for name in names)
        for plugin, names in files.items()
    )


def start() -> None:
    """Joins the other processes that the environment speaks of; does nothing where there are none.

    Of several processes only the first shows what is no error.
    Raises: UserError when the environment does not suffice."""
    how = joining(os.environ)
    if how is None:
        return
    join_s, lost_s = (
        _whole(os.environ, f"POPI_JAX_{name}_S") or s
        for name, s in (("JOIN", JOIN_S), ("LOST", LOST_S))
    )
    herald = Herald()
    where = how.coordinator_address or "the address of process 0"
    number = "this process" if how.process_id is None else f"process {how.process_id}"
    count = "all" if how.num_processes is None else f"all {how.num_processes}"
    herald.keep(
        f"error: {number} did not meet the others at {where} within {join_s} s; check that {count} "
        "processes were started, that each has another number, and that this address can be "
        "reached from every host"
    )
    try:
        jax.distributed.initialize(
            *how,
            initialization_timeout=join_s,
            heartbeat_timeout_seconds=lost_s,
            shutdown_timeout_seconds=_SHUTDOWN_S,
        )
    except (RuntimeError, TypeError, ValueError) as e:
        herald.withdraw()
        raise UserError(
            f"cannot join the other processes: {' '.join(str(e).split())[:300]}; see docs/launch.md"
        ) from e
    herald.keep(
        f"error: process {global_state.process_id} of {global_state.num_processes} ended early: if "
        "no other error is told above, it got a signal or another process was lost, whose log says "
        f"why; {_CONTINUE}"
    )
    atexit.register(_part, herald)
    if global_state.process_id:
        logging.set_verbosity(logging.ERROR)


def is_main_process() -> bool:
    return jax.process_index() == 0


def tell_all(text: str) -> str:
    """The text of process 0, in every process."""
    if jax.process_count() == 1:
        return text
    encoded = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(encoded))))
    padded = encoded if is_main_process() else np.zeros(length, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(padded)).decode()


def wait_for_all(what: str, limit_s: int = 0) -> None:
    """Returns when all processes have called this with the same words, each of which may be used
    once.

    Raises: UserError after `limit_s` seconds; 0: BARRIER_S."""
    limit_s = limit_s or BARRIER_S
    if jax.process_count() == 1:
        return
    try:
        global_state.client.wait_at_barrier(f"popi_jax: {what}", limit_s * 1000)
    except jax.errors.JaxRuntimeError as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(
            f"not all processes came within {limit_s} s to: {what}; {_CONTINUE} ({reason})"
        ) from e


def make_once(make: Callable[[], T], place: Path, what: str, limit_s: int) -> T:
    """make() of every process. It leaves something at `place`, a folder: processes that have it on
    the disk of process 0 wait until that has made it, and find it there. All call it at the same
    point of the program.

    what, limit_s: as `wait_for_all`. Raises: UserError, as make()."""
    if jax.process_count() == 1:
        return make()
    first, mark = is_main_process(), uuid.uuid4().hex
    if first:
        with contextlib.suppress(OSError):  # then every process makes its own, or tells why not
            place.mkdir(parents=True, exist_ok=True)
            (place / mark).touch()
    mark = tell_all(mark)
    found: list[T] = []
    try:
        if first or not (place / mark).exists():
            found = [make()]
        wait_for_all(f"{what} ({mark})", limit_s)
    finally:
        if first:
            (place / mark).unlink(missing_ok=True)
    return found[0] if found else make()


def leave(status: int) -> None:
    """Ends this process at once where there are others: a process that failed must not wait for
    those that wait for it.

    Returns where there are none."""
    if not jax.distributed.is_initialized() or global_state.num_processes == 1:
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if global_state.process_id == 0:
        time.sleep(
            3
        )  # its end ends the others: if they fail for the same reason, they may say so before
    os._exit(status)


class StopRequest:
    """Remembers SIGINT and SIGTERM, so that a loop can save and end at a step that all processes
    agree on.

    A second signal of the same kind acts as it would without this."""

    def __init__(self) -> None:
        self.signal = 0
        self._previous = {
            s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)
        }

    def _remember(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = number
        signal.signal(number, self._previous[signal.Signals(number)])

    def agreed(self) -> int:
        """The signal that any process received, 0 if none. Every process must call it at the same
        step."""
        if jax.process_count() == 1:
            return self.signal
        return int(np.max(multihost_utils.process_allgather(np.int32(self.signal))))

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _part(herald: Herald) -> None:
    jax.distributed.shutdown()  # waits for the others
    herald.withdraw()


def _whole(env: Mapping[str, str], name: str) -> int | None:
    """The whole number that a variable holds; None if it is absent or empty."""
    text = env.get(name, "")
    if text and not text.isdecimal():
        raise UserError(f'the environment variable {name} is "{text}": must be a whole number')
    return int(text) if text else None


def _several_on_this_host(env: Mapping[str, str]) -> bool:
    """Whether a launcher started a process per device: JAX then gives each the device of its number
    on the host."""
    nodes = _whole(env, "SLURM_STEP_NUM_NODES") or _whole(env, "SLURM_NNODES") or 1
    in_slurm = "SLURM_PROCID" in env and (_whole(env, "SLURM_NTASKS") or 1) > nodes
    return in_slurm or (_whole(env, "OMPI_COMM_WORLD_LOCAL_SIZE") or 1) > 1


def _on_tpu_vms(env: Mapping[str, str]) -> bool:
    """Whether this is one of several TPU VMs, which only Google's metadata server tells.

    JAX sets TPU_SKIP_MDS_QUERY on hosts without a TPU when it is imported, and GKE does in its
    containers."""
    if (
        "TPU_SKIP_MDS_QUERY" in env
        or env.get("JAX_PLATFORMS") == "cpu"
        or importlib.util.find_spec("libtpu") is None
    ):
        return False
    server = env.get("GCE_METADATA_IP", "metadata.google.internal")

    def attribute(name: str) -> str:
        url = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                return response.read().decode()
        except OSError:  # not in Google's cloud, or not one of its TPU VMs
            return ""

    slices = re.search(
        r"^\s*MEGASCALE_NUM_SLICES\s*:\s*'?(\d+)", attribute("tpu-env"), re.MULTILINE
    )
    return "," in attribute("worker-network-endpoints") or (
        slices is not None and int(slices[1]) > 1
    )
