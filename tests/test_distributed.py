"""Which environments mean several processes, what a process that is lost leaves behind, and the
limits of waiting."""

import fnmatch
import functools
import http.server
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs import scales
from popi_jax import distributed
from popi_jax.distributed import Joining, joining
from popi_jax.errors import UserError
from tests.test_many_processes import LAST_LINE, environment, free_port

ALONE = {"TPU_SKIP_MDS_QUERY": "1"}
SRUN = {
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "2",
}
MINE = {"JAX_COORDINATOR_ADDRESS": "host:1"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        (MINE, Joining("host:1", None, None, [])),
        (MINE | {"JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}, Joining("host:1", 3, 2, [])),
        (
            SRUN | {"SLURM_STEP_NUM_NODES": "2"},
            Joining(local_device_ids=[]),
        ),  # a process per node has all its devices
        (SRUN | {"SLURM_STEP_NUM_NODES": "1"}, Joining()),  # one per device: JAX gives each its own
        (SRUN | {"SLURM_NTASKS": "1"}, None),
        (
            {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            None,
        ),  # the script of a job, not of a step
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, Joining()),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, Joining(local_device_ids=[])),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, Joining(local_device_ids=[])),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, Joining(local_device_ids=[])),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "1"}, None),
    ],
)
def test_environments(env: dict[str, str], expected: Joining | None) -> None:
    assert joining(ALONE | env) == expected


@pytest.mark.parametrize(
    ("env", "device", "plugin", "alone"),
    [
        ({}, "", "", True),
        ({}, "/dev/nvidia0", "", True),  # a GPU that JAX cannot use
        ({}, "", "libtpu", True),  # the compiler alone
        ({}, "/dev/nvidia0", "jax_cuda13_plugin", False),
        ({}, "/dev/accel0", "libtpu", False),
        ({}, "/dev/vfio/0", "libtpu", False),
        ({"JAX_PLATFORMS": "cpu"}, "/dev/nvidia0", "jax_cuda13_plugin", True),
        ({"JAX_PLATFORMS": "cuda"}, "", "", False),
        (MINE, "", "", False),
        (MINE | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, "", "", True),
        (SRUN, "", "", False),
    ],
)
def test_alone_on_cpu(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], device: str, plugin: str, alone: bool
) -> None:
    """As `scale=auto` sees it: a laptop."""
    monkeypatch.setattr("glob.glob", lambda shape: fnmatch.filter([device], shape))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == plugin or None)
    assert distributed.is_alone_on_cpu(ALONE | env) is alone
    if env in ({}, {"JAX_PLATFORMS": "cpu"}):
        monkeypatch.delenv("JAX_PLATFORMS")
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        assert (scales.detect() == "laptop") is alone


def test_a_number_that_is_none_is_told() -> None:
    with pytest.raises(UserError, match='JAX_PROCESS_ID is "one": must be a whole number'):
        joining(MINE | {"JAX_PROCESS_ID": "one"})


@pytest.fixture
def metadata(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A stand-in for Google's metadata server: the folder of its attributes, and its address."""
    folder = tmp_path / "computeMetadata" / "v1" / "instance" / "attributes"
    folder.mkdir(parents=True)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"localhost:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("attributes", "several"),
    [
        ({"worker-network-endpoints": "a:1:10.0.0.1,b:2:10.0.0.2"}, True),
        ({"worker-network-endpoints": "a:1:10.0.0.1"}, False),
        (
            {
                "worker-network-endpoints": "a:1:10.0.0.1",
                "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n",
            },
            True,
        ),
        ({}, False),
    ],
)
def test_tpu_vms_ask_the_metadata_server(
    metadata: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    attributes: dict[str, str],
    several: bool,
) -> None:
    folder, address = metadata
    for name, text in attributes.items():
        (folder / name).write_text(text)
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: object())
    expected = Joining(local_device_ids=[]) if several else None
    assert joining({"GCE_METADATA_IP": address}) == expected
    assert joining({"GCE_METADATA_IP": address, "JAX_PLATFORMS": "cpu"}) is None


def test_a_process_waits_for_missing_ones_only_so_long() -> None:
    env = (
        environment(1)
        | MINE
        | {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    )
    code = "from popi_jax import distributed; distributed.start()"
    env |= {"JAX_PROCESS_ID": "1", "POPI_JAX_JOIN_S": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=40
    )
    assert done.returncode == -signal.SIGABRT
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"error: process 1 did not meet the others at {env['JAX_COORDINATOR_ADDRESS']} within 1 s"
    )
    assert "all 2 processes" in last


BARRIER = """
import sys, os, time
from popi_jax import cli, distributed
from popi_jax.errors import UserError
distributed.BARRIER_S = 1
def main(config):
    distributed.start()
    distributed.wait_for_all("both are here")
    if os.environ["JAX_PROCESS_ID"] == "1":
        distributed.wait_for_all("the tea")
    time.sleep(30)
sys.argv = ["x"]
cli.run(main, description="")
"""


def test_barrier_says_what_it_waited_for_and_a_failure_ends_all() -> None:
    env = environment(1) | {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    env |= {"POPI_JAX_LOST_S": "4"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", BARRIER],
            env=env | {"JAX_PROCESS_ID": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        told = [process.communicate(timeout=60)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    assert both[1].returncode == 2
    assert "error: not all processes came within 1 s to: the tea" in told[1]
    assert both[0].returncode == -signal.SIGABRT  # not after its 30 s of sleep
    assert told[0].splitlines()[-1].startswith(f"error: process 0 of 2 {LAST_LINE}")


def test_the_limits_of_users_are_below_two_minutes() -> None:
    assert distributed.JOIN_S + distributed.LOST_S <= 100
