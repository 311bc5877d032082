"""Compiled programs that a later start loads without tracing them again: executables of jitted
functions in a folder.

JAX's own cache of compiled programs finds one only after it was traced and lowered, which for a
small model is most of a start. `jax.experimental.serialize_executable` keeps the whole executable
instead, as MaxText does for train steps that are compiled ahead of time (`train_compile.py`).

An executable is loaded when its key is the same: all source files of this package, the settings
that the caller names, the arguments' tree, shapes, types and layouts, the devices, the processor,
the versions of what compiles, the settings of JAX and the environment variables of XLA. Where only
the sources or the named settings differ and the lowered program is the same, as after an edit of a
comment, it is traced and lowered once more, and not compiled.

The files are unpickled and run, as those of JAX's cache are run: whoever can write in the folder
can run code here, so it must be trusted as the code itself is."""

import contextlib
import hashlib
import os
import pickle
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

MOST_FILES = 32
LOADING, STORING = (
    "/popi_jax/programs/loading",
    "/popi_jax/programs/storing",
)  # seconds that the caller waited

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
_VARIABLES = (
    "XLA_",
    "LIBTPU_",
    "TF_XLA_",
    "TF_CUDNN_",
    "NVIDIA_TF32_",
    "CUBLAS_",
    "CUDNN_",
)  # how names begin that compilers read
_PROCESSOR = (
    "vendor_id",
    "cpu family",
    "model",
    "model name",
    "stepping",
    "flags",
    "CPU part",
    "Features",
)
_CPUINFO = Path("/proc/cpuinfo")


def _sources() -> str:
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


_SOURCES = _sources()  # as they were imported: they may be edited while a process runs


class Store(NamedTuple):
    """Where programs are kept, and what they all depend on beside their arguments."""

    folder: Path
    mesh: Mesh
    settings: str  # everything static that the functions have bound, as text


class Early(NamedTuple):
    """An executable that was loaded before the arguments were known, so it may be for others."""

    path: Path
    executable: Callable[..., Any]


class StoredProgram:
    """`jax.jit(function)` for jax arrays that always have the same shapes, types and layouts; the
    first call loads it.

    Results are those of `jax.jit`. Nothing is kept or loaded by one of several processes, as some
    could find a program that others must compile; nor with `jax_disable_jit`, `jax_debug_nans` or
    `jax_debug_infs`, for which JAX must have the Python function. A file that cannot be used is
    removed and costs a line in the log and a compilation. `early` is what `load_early` returned for
    the same name and store."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str,
        store: Store,
        donate_argnums: tuple[int, ...] = (),
        out_shardings: Any = None,
        early: "Future[Early | None] | None" = None,
    ) -> None:
        # an unused argument stays one, so that the text of the program says which arguments it
        # reads
        options: Any = {
            "donate_argnums": donate_argnums,
            "out_shardings": out_shardings,
            "keep_unused": True,
        }
        self._jitted = jax.jit(function, **options)
        self._name, self._store, self._options = name, store, repr(options)
        self._executable: Callable[..., Any] | None = None
        self._early = early

    def __call__(self, *args: Any) -> Any:
        if self._executable is None:
            self._executable = self._find(args) if _can_store() else self._jitted
        return self._executable(*args)

    def _find(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        """The stored executable for such arguments, else one that is compiled now, and stored."""
        began = time.monotonic()
        folder, mesh = self._store.folder, self._store.mesh
        environment, signature = _environment(mesh), [self._options, *_signature(args)]
        prefix = f"{_prefix(self._name, self._store, environment)}-{_digest(*signature)}"
        early, self._early = self._early.result() if self._early else None, None
        if early is not None and early.path.name.startswith(prefix):
            return _told(LOADING, began, early.executable)
        for path in folder.glob(f"{prefix}-*"):
            if (found := _load(path, mesh)) is not None:
                return _told(LOADING, began, found)
        lowered = self._jitted.lower(*args)
        trees = str(lowered.in_tree), str(lowered.out_tree)
        program = _digest(*environment, *signature, *trees, lowered.as_text())
        path = folder / f"{prefix}-{program}"
        for same in folder.glob(f"{self._name}-*-{program}"):
            began = time.monotonic()
            if (found := _load(same, mesh)) is not None:
                _told(LOADING, began, found)
                _store(path, partial(os.link, same))
                return found
        with _without_cache():
            compiled = lowered.compile()
        _store(path, lambda part: part.write_bytes(_packed(compiled)))
        return compiled


def load_early(name: str, store: Store) -> "Future[Early | None] | None":
    """Begins to load in a thread what was stored last under a name, while the arguments of the
    first call are made."""
    if not _can_store():
        return None
    threads = ThreadPoolExecutor(max_workers=1)
    future = threads.submit(_newest, _prefix(name, store, _environment(store.mesh)), store)
    threads.shutdown(wait=False)
    return future


def _newest(prefix: str, store: Store) -> Early | None:
    with contextlib.suppress(OSError, ValueError):  # of a file that is gone meanwhile; of none
        path = max(store.folder.glob(f"{prefix}-*"), key=lambda p: p.stat().st_mtime)
        found = _load(path, store.mesh)
        return None if found is None else Early(path, found)
    return None


def _prefix(name: str, store: Store, environment: list[str]) -> str:
    """How the names of files begin that fit whatever the arguments and options are."""
    return f"{name}-{_digest(_SOURCES, store.settings, *environment)}"


def _can_store() -> bool:
    config = jax.config
    debugged = config.jax_disable_jit or config.jax_debug_nans or config.jax_debug_infs
    return jax.process_count() == 1 and not debugged and _CPUINFO.exists()


def _packed(compiled: jax.stages.Compiled) -> bytes:
    content = pickle.dumps(serialize_executable.serialize(compiled))
    return hashlib.sha256(content).digest() + content


def _load(path: Path, mesh: Mesh) -> Callable[..., Any] | None:
    """The executable of a file; None, and the file is gone, when there is anything wrong with
    it."""
    try:
        packed = path.read_bytes()
        if hashlib.sha256(packed[32:]).digest() != packed[:32]:
            raise ValueError("it is damaged")
        devices = list(mesh.devices.flat)
        parts = pickle.loads(packed[32:])
        found = serialize_executable.deserialize_and_load(*parts, execution_devices=devices)
        with contextlib.suppress(OSError):
            os.utime(path)  # what is used stays
    except Exception as e:  # of whatever type: unpickling and the runtime have many
        logging.warning(
            "The compiled program %s cannot be used (%s); compiling it again.", path, _one_line(e)
        )
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    return found


def _told(event: str, began: float, found: Any) -> Any:
    jax.monitoring.record_event_duration_secs(event, time.monotonic() - began)
    return found


def _store(path: Path, write: Callable[[Path], Any]) -> None:
    """Makes `path` by `write`, at once or not at all, and removes the files that were not used for
    longest."""
    began = time.monotonic()
    part = path.with_name(f"part-{uuid.uuid4().hex}")
    try:
        if _sources() != _SOURCES:
            raise ValueError("the sources were edited since this process began")
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        part.replace(path)
    except Exception as e:  # a full disk, a program or a platform that cannot be serialized
        logging.info("The compiled program %s is not kept (%s).", path, _one_line(e))
    with contextlib.suppress(OSError):  # of another process that removes the same
        part.unlink(missing_ok=True)
        kept = sorted(path.parent.iterdir(), key=lambda p: p.stat().st_mtime, reverse=True)
        for old in kept[MOST_FILES:]:
            old.unlink(missing_ok=True)
    _told(STORING, began, None)


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Compiles without JAX's own cache: on a CPU an executable that was read from it cannot be
    serialized again."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it asks for the setting only once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _signature(args: tuple[Any, ...]) -> list[str]:
    """What `jax.jit` distinguishes of arguments: their tree, and of each array shape, type and
    layout."""
    leaves, tree = jax.tree.flatten(args)
    return [str(tree), *(f"{jax.typeof(x)!r} {x.sharding!r} {x.committed}" for x in leaves)]


def _environment(mesh: Mesh) -> list[str]:
    """What decides on an executable beside the program: versions, devices, processor, settings."""
    processor = _CPUINFO.read_text().partition("\n\n")[0].splitlines()
    settings = {name: getattr(jax.config, name, value) for name, value in jax.config.values.items()}
    client = mesh.devices.flat[0].client
    return [
        *(f"{name} {metadata.version(name)}" for name in _PACKAGES),
        sys.version,
        f"{client.platform} {client.platform_version}",
        *(
            f"{device.id} {device.device_kind} {device.process_index}"
            for device in client.devices()
        ),
        f"{mesh} {[device.id for device in mesh.devices.flat]} {jax.sharding.get_abstract_mesh()}",
        *(line for line in processor if line.partition(":")[0].strip() in _PROCESSOR),
        f"{os.cpu_count()} {len(os.sched_getaffinity(0))}",  # XLA splits loops on a CPU by the number of its cores
        *(
            f"{name}={value}"
            for name, value in sorted(os.environ.items())
            if name.startswith(_VARIABLES)
        ),
        *(f"{name}={value!r}" for name, value in sorted(settings.items()) if "cache" not in name),
    ]


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
