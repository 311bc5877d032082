"""A run with random weights on a few made people, as training leaves it, for the tests of what uses
a run."""

import atexit
import contextlib
import functools
import importlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from absl import flags

from popi_jax import cli, sharding
from popi_jax import run as runs
from popi_jax.arrays import Frozen, TrainState
from popi_jax.checkpoints import manager
from popi_jax.config import Config
from popi_jax.training import setup

STEP = 7
# beside prepared data, `open_run` keeps what was compiled
CACHE = Path(__file__).parents[1] / ".pytest_cache"


class TinyRun(NamedTuple):
    """The two roles, now and at the start of the main stage, have four different sets of
    weights."""

    workdir: Path
    run: runs.Run
    now: TrainState
    frozen: Frozen


def config_of(workdir: Path, *overrides: str) -> Config:
    return cli.load_config("smoke:scale=laptop", [*list_overrides(workdir), *overrides])


def load_tiny(spec: str, workdir: Path, **changed: object) -> Config:
    """A configuration on the same few made people."""
    own = [f"--config.{name}={value}" for name, value in changed.items()]
    return cli.load_config(spec, [*list_overrides(workdir), *own])


def list_overrides(workdir: Path) -> list[str]:
    own = {
        "workdir": workdir,
        "data.path": CACHE / "nothing",
        "data.prepared": CACHE / "prepared",
        "data.download": "false",
        "data.sample_people": 60,
        "data.test_fraction": 0.3,
        "data.num_pairs": 3,
        "data.num_shots": 1,
        "model.vocab_size": 400,
        "mesh.num_devices": 0,
        "evaluation.max_users": 0,
    }
    return [f"--config.{name}={value}" for name, value in own.items()]


@contextlib.contextmanager
def on_devices(count: int) -> Iterator[None]:
    """Lets `open_run` see so many of the simulated devices, and at the end undoes what it sets for
    a whole process."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}

    def make_mesh(*sizes: int) -> jax.sharding.Mesh:
        return sharding.make_mesh(1, count, 1, devices=jax.devices()[:count])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "make_mesh", make_mesh)
        yield
    jax.set_mesh(None)
    for name, value in before.items():
        jax.config.update(name, value)


@functools.cache
def shared_run(num_devices: int) -> TinyRun:
    """One run for all tests of a process; it has the checkpoint, the reference and the
    tokenizer."""
    workdir = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, workdir, ignore_errors=True)
    config = config_of(workdir)
    with on_devices(num_devices):
        run = runs.open_run(config)
        shape = {"model": run.inference.model, "roles": setup.plan_warmup_roles(run.config)}
        abstract = setup.abstract_state(**shape, mesh=run.mesh, config=run.config)
        init = functools.partial(setup.init_state, **shape, config=run.config)
        program = jax.jit(init, out_shardings=setup.get_shardings(abstract))
        now, before = program(jnp.int32(1)), program(jnp.int32(2))
        frozen = Frozen(before.inference.params, before.generator.params)
        steps = manager.open_manager(config.workdir, 1, run.config_json)
        manager.save(steps, STEP, now, None, run.config_json)
        manager.close(steps)
        manager.save_frozen(config.workdir, frozen, run.config_json)
    return TinyRun(workdir, run, now, frozen)


def command(name: str) -> ModuleType:
    """Imports an entry point. Two of them may define a flag of one name: a process of a user runs
    only one."""
    for flag in flags.FLAGS:
        flags.FLAGS[flag].allow_override = True
    return importlib.import_module(f"popi_jax.{name}")


@contextlib.contextmanager
def flags_set(*args: str) -> Iterator[None]:
    """Parses flags as the command line does, and forgets them at the end."""
    flags.FLAGS(["test", *args])
    try:
        yield
    finally:
        for name in {arg[2:].split("=")[0] for arg in args}:
            flags.FLAGS[name].unparse()
        flags.FLAGS.mark_as_parsed()


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
