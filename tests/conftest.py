"""Environment of every test: 8 simulated CPU devices, checked shapes, no silent broadcasting."""

import os
import pathlib

from tests.cheap_compiles import CHEAP

os.environ["JAX_PLATFORMS"] = "cpu"
FLAGS = f"--xla_force_host_platform_device_count=8 {CHEAP}"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ["NPROC"] = "32"  # threads of XLA: collectives of simulated devices block some
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
    pathlib.Path(__file__).parents[1] / ".pytest_cache" / "compiled"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

import fsspec
import pytest
from absl import flags
from fsspec.implementations.memory import MemoryFileSystem
from jaxtyping import install_import_hook

flags.FLAGS.mark_as_parsed()  # the worker processes of grain ask

# every function of the package checks the types and shapes of its signature; an int passes for a
# float
install_import_hook(
    "popi_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)


@pytest.fixture
def bucket() -> str:
    """The address of an empty bucket in memory; arrays of Orbax cannot go there."""
    fsspec.register_implementation("gcs", MemoryFileSystem, clobber=True)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    return "gs://bucket"


# files that take longest come first, so that no process is left alone with one
SLOW_FILES = (
    *("test_many_processes.py", "test_meshes.py", "test_loop.py", "test_forms.py"),
    *("test_update.py", "test_advertised_rows.py", "test_adapter_run.py", "test_sharing.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
