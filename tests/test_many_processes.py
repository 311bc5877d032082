"""Two real processes on this machine: a Slurm launch, the loss of one, and that an update does not
depend on them.

Each process has four simulated devices. What Gloo prints on stdout is never read: results are
files."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from popi_jax.data.sources.made_people import write_sample
from popi_jax.evals import records
from tests.cheap_compiles import CHEAP
from tests.tiny_run import read_jsonl

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".pytest_cache" / "many"  # what was compiled, beside the prepared data
LOST_S = 6  # as tests/test_distributed.py checks, users get 40
STEPS, STORED = 6, 2  # STORED: where summaries are written, which the later updates read
LAST_LINE = "ended early: if no other error is told above"
OWN = {
    "data.sample_people": 60,  # as many as are in data.path, which holds the made files
    "data.num_pairs": 1,
    "data.num_shots": 1,
    "data.context_len": 64,
    "data.test_fraction": 0.3,
    "data.validation_fraction": 0.1,
    "data.download": "false",
    "model.vocab_size": 400,
    "model.num_layers": 1,
    "mesh.num_devices": 0,
    "mesh.data": 2,
    "mesh.fsdp": 4,
    "warmup.steps": 0,
    "inference.group_size": 2,
    "batch.pairs": 1,
    "schedule.phases": f"joint {STORED},stored {STEPS - STORED}",
    "schedule.save_every": 2,
    "evaluation.max_users": 8,
}


def environment(num_devices: int) -> dict[str, str]:
    """That of a user who has simulated devices; compiling with little optimisation takes half the
    time."""
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "SLURM_", "POPI_"))
    }
    flags = f"--xla_force_host_platform_device_count={num_devices} {CHEAP}"
    return env | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 150) -> float:
    """The seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"waited {seconds} s for {what}"
        time.sleep(0.05)
    return time.monotonic() - began


class Launch:
    """`launch/slurm.sh` with two tasks; a stand-in for srun starts them as Slurm would."""

    def __init__(self, folder: Path, name: str) -> None:
        self.workdir, self.tasks = folder / "run", folder / name
        self.tasks.mkdir()
        tools = folder / "tools"
        tools.mkdir(exist_ok=True)
        shutil.copy(ROOT / "tests" / "fake_srun.sh", tools / "srun")
        own = {
            **OWN,
            "workdir": self.workdir,
            "data.path": folder / "raw",
            "data.prepared": CACHE / "prepared",
        }
        env = environment(4) | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PIDS": str(self.tasks),
            "TASKS": "2",
            "SLURM_JOB_ID": "7",
            "JAX_COORDINATOR_PORT": str(
                free_port()
            ),  # Slurm's job ids differ, so do the ports; tests may run together
            "POPI_JAX_LOST_S": str(LOST_S),
        }
        command = [sys.executable, "-m", "popi_jax.train", "--config=smoke:scale=laptop"]
        command += [f"--config.{name}={value}" for name, value in own.items()]
        self.script = subprocess.Popen([ROOT / "launch" / "slurm.sh", *command], cwd=ROOT, env=env)

    def kill(self, task: int) -> None:
        os.kill(int((self.tasks / str(task)).read_text()), signal.SIGKILL)

    def stderr(self, task: int) -> str:
        return (self.tasks / f"err.{task}").read_text()

    def end(self) -> None:
        for task in range(2):
            if not (self.tasks / f"status.{task}").exists() and (self.tasks / str(task)).exists():
                self.kill(task)
        self.script.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_sample(tmp_path / "raw", people=OWN["data.sample_people"])
    return tmp_path


def test_slurm_launch_loses_a_process_and_continues(folder: Path) -> None:
    first = Launch(folder, "first")
    try:
        saved = first.workdir / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
        wait_until(
            lambda: saved.exists() or first.script.poll() is not None, "the first checkpoint"
        )
        assert first.script.poll() is None, first.stderr(0) + first.stderr(1)
        first.kill(1)
        took = wait_until(lambda: first.script.poll() is not None, "the end of the other process")
    finally:
        first.end()
    assert LOST_S / 4 < took < 60
    statuses = [int((first.tasks / f"status.{task}").read_text()) for task in range(2)]
    assert statuses[0] not in (0, 128 + signal.SIGKILL) and statuses[1] == 128 + signal.SIGKILL
    last = first.stderr(0).splitlines()[-1]
    assert (
        last.startswith(f"error: process 0 of 2 {LAST_LINE}")
        and "continues from the last checkpoint" in last
    )

    second = Launch(folder, "second")
    try:
        wait_until(lambda: second.script.poll() is not None, "the end of the run")
    finally:
        second.end()
    assert second.script.returncode == 0, second.stderr(0) + second.stderr(1)
    told = second.stderr(0)
    assert (
        "Continuing at step" in told
        and "8 device(s), mesh {'data': 2, 'fsdp': 4, 'tensor': 1, 'sequence': 1}" in told
    )
    assert LAST_LINE not in told
    assert not set(told.splitlines()) & set(
        second.stderr(1).splitlines()
    )  # the first process alone speaks
    rows = read_jsonl(second.workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert [row["step"] for row in rows if "probe/nats_summary" in row] == [0, STORED, STEPS]
    stored = read_jsonl(second.workdir / "summaries" / f"train-{STORED}.jsonl")
    assert len({row["user"] for row in stored}) == len(stored) > 8
    results = json.loads((second.workdir / "results.json").read_text())
    assert results["step"] == STEPS and len(results["rows"]) == 9
    check_cells_on_one_device(second.workdir, folder / "cells")


def check_cells_on_one_device(workdir: Path, out: Path) -> None:
    """A sweep of the run in one process on one device has the names and figures of the cells that
    two processes with eight devices left."""
    command = [sys.executable, "-m", "popi_jax.sweep", "--config=smoke:scale=laptop"]
    command += ["--decodings=greedy,sampled", "--conditions=no_signals,raw_signals,summary"]
    own = {"workdir": workdir, "data.prepared": CACHE / "prepared"}
    command += [f"--config.{name}={value}" for name, value in own.items()]
    command += ["--sweep=configs/sweeps/default.py", "--generators=trained", f"--out={out}"]
    users = f"--max_users={OWN['evaluation.max_users']}"
    subprocess.run([*command, users], cwd=ROOT, env=environment(1), check=True)
    found = sorted((out / "cells").glob("*.jsonl"))
    assert len(found) == 4
    for path in found:
        alone, many = (records.read(p) for p in (path, workdir / "results" / "cells" / path.name))
        assert alone.header["coverage"] == many.header["coverage"]
        assert alone.header["made"]["devices"].startswith("1 ")
        assert many.header["made"]["devices"].startswith("8 ")
        margins = [[item.pop("margin") for item in r.items] for r in (alone, many)]
        np.testing.assert_allclose(*margins, atol=1e-5, rtol=0)
        for item, other in zip(alone.items, many.items, strict=True):
            for name in ("chosen", "rejected", "reference_chosen", "reference_rejected"):
                assert abs(item.pop(name) - other.pop(name)) < 1e-3
            assert item == other


UPDATE = """
import sys
import jax, numpy as np
from functools import partial
from popi_jax import distributed
from popi_jax.sharding import make_mesh, place_batch
from popi_jax.popi.update import popi_update
from tests.oracles.plain import RULES
from tests.training import small
distributed.start()
devices = jax.device_count()
mesh = make_mesh(1, devices, 1)
with jax.set_mesh(mesh):
    cfg = small.make_config()
    made = small.make_update(cfg, phases=("joint 2",))
    state, frozen = small.make_state(cfg, small.roles_of(made), mesh)
    whole = small.user_batch(0)
    each = 8 // jax.process_count()
    own = slice(jax.process_index() * each, (jax.process_index() + 1) * each)
    update = jax.jit(partial(popi_update, **made._asdict()))
    users = place_batch(jax.tree.map(lambda x: x[own], whole), mesh, RULES)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    draw = jax.jit(partial(made.sampler.sample, group_size=3), out_shardings=everywhere)
    drawn = draw(state.inference.params, users, jax.random.key(7))
    state, metrics = update(state, frozen, users)
    found = {}
    for name, m in jax.device_get(metrics).items():
        found[f"metric {name}"] = float(m.total) / max(float(m.weight), 1e-9)
    ids, lengths = map(np.asarray, drawn.summaries)
    found |= {"sampled ids": ids, "sampled lengths": lengths}
    params = {"inference": state.inference.params, "generator": state.generator.params}
    params = jax.jit(lambda x: x, out_shardings=everywhere)(params)
    for path, x in jax.tree.leaves_with_path(params):
        found[f"param {jax.tree_util.keystr(path)}"] = np.asarray(x)
if distributed.is_main_process():
    np.savez(sys.argv[1], **found)
"""


def update_on(out: Path, num_processes: int, num_devices: int) -> list[subprocess.Popen]:
    env = environment(num_devices // num_processes)
    env |= {
        "JAX_COMPILATION_CACHE_DIR": str(CACHE / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if num_processes > 1:
        env |= {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
            "JAX_NUM_PROCESSES": str(num_processes),
        }
    command = [sys.executable, "-c", UPDATE, str(out)]
    return [
        subprocess.Popen(
            command, cwd=ROOT, env=env | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.DEVNULL
        )
        for i in range(num_processes)
    ]


def test_an_update_does_not_depend_on_processes_and_devices(tmp_path: Path) -> None:
    outs = [tmp_path / f"{number}.npz" for number in range(3)]
    started = [
        update_on(out, *place) for out, place in zip(outs, ((1, 1), (1, 8), (2, 8)), strict=True)
    ]
    try:
        assert [process.wait(timeout=150) for many in started for process in many] == [0, 0, 0, 0]
    finally:
        for process in (process for many in started for process in many):
            process.kill()
    alone, devices, processes = (dict(np.load(out)) for out in outs)
    assert alone.keys() == devices.keys() == processes.keys()
    assert {
        "metric generator/loss",
        "metric inference/reward",
        "sampled ids",
    } <= alone.keys() and len(alone) > 30
    for other in (devices, processes):
        for name, value in alone.items():
            tolerance = {"sampled": (0, 0), "metric": (1e-5, 1e-4), "param": (1e-5, 0)}[
                name.split()[0]
            ]
            np.testing.assert_allclose(other[name], value, *tolerance[::-1], err_msg=name)
