"""Stored executables: found again without tracing, never found when anything differs, never an
obstacle."""

import dataclasses
import hashlib
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from popi_jax import programs
from popi_jax.config import Config, parse_phases
from popi_jax.models.packing import Budget
from popi_jax.popi.update import popi_update
from popi_jax.programs import LOADING, STORING, Store, StoredProgram, load_early
from popi_jax.sharding import place_batch, replicated
from popi_jax.training import loop
from tests import tiny_run
from tests.oracles.plain import RULES
from tests.training import small

ROOT = Path(__file__).parents[1]
TRACING, COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/backend_compile_duration",
)


class State(NamedTuple):
    """With what a state of training has: an array that is split, a counter, a key, something
    absent."""

    x: jax.Array
    step: jax.Array
    key: jax.Array
    nothing: None = None


def update(
    state: State, other: jax.Array, *, scale: float = 2.0
) -> tuple[State, dict[str, jax.Array]]:
    noise = jax.random.normal(jax.random.fold_in(state.key, state.step), state.x.shape)
    x = jnp.tanh(state.x @ state.x.T) @ state.x * scale + noise
    return State(x, state.step + 1, state.key), {"mean": jnp.mean(x)}


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    made = small.make_mesh(2, 1, 1)
    jax.set_mesh(made)
    yield made
    jax.set_mesh(None)


@pytest.fixture
def events() -> Iterator[Counter]:
    seen: Counter = Counter()

    def count(event: str, seconds: float, **_: Any) -> None:
        seen[event] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    yield seen
    jax.monitoring.unregister_event_duration_listener(count)


def arguments(mesh: Mesh, rows: int = 8, dtype: Any = jnp.float32) -> tuple[State, jax.Array]:
    x = place_batch(np.linspace(-1, 1, rows * 6, dtype=dtype).reshape(rows, 6), mesh, RULES)
    whole = partial(jax.device_put, device=replicated(mesh))
    return State(x, whole(jnp.int32(3)), whole(jax.random.key(5))), whole(jnp.arange(3.0))


def layout(mesh: Mesh) -> Any:
    return jax.tree.map(lambda x: x.sharding, arguments(mesh)[0]), None


def stored(
    folder: Path,
    mesh: Mesh,
    *,
    function: Any = update,
    settings: str = "",
    donate: Any = (0,),
    early: bool = False,
) -> Any:
    store, fresh = (
        Store(folder, mesh, settings),
        partial(function),
    )  # for which this process has nothing in memory
    options: Any = {"donate_argnums": donate, "out_shardings": layout(mesh)}
    found = load_early("main", store) if early else None
    return StoredProgram(fresh, name="main", store=store, early=found, **options)


def counted(
    events: Counter, program: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Any, tuple[int, ...]]:
    """The result, and how many programs were traced, compiled, loaded and stored for it."""
    jax.block_until_ready(args)
    before = events.copy()
    result = program(*args)
    return result, tuple(
        events[name] - before[name] for name in (TRACING, COMPILING, LOADING, STORING)
    )


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(small.copied(x), small.copied(y)), a, b)
    jax.tree.map(
        lambda x, y: x.sharding == y.sharding or pytest.fail(f"{x.sharding} {y.sharding}"), a, b
    )


def test_a_second_start_neither_traces_nor_compiles(
    tmp_path: Path, mesh: Mesh, events: Counter
) -> None:
    expected = jax.jit(update, out_shardings=layout(mesh))(*arguments(mesh))
    first, counts = counted(events, stored(tmp_path, mesh), arguments(mesh))
    assert counts[0] > 0 and counts[1:] == (1, 0, 1)
    assert_same(first, expected)
    program, args = stored(tmp_path, mesh), arguments(mesh)
    second, counts = counted(events, program, args)
    assert counts == (0, 0, 1, 0)
    assert_same(second, expected)
    assert args[0].x.is_deleted() and not args[1].is_deleted()  # donated as before
    third, counts = counted(events, program, (second[0], args[1]))
    assert counts == (0, 0, 0, 0) and int(third[0].step) == 5


def edited(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(programs, "_SOURCES", "other")
    patch.setattr(programs, "_sources", lambda: "other")


def other_processor(patch: pytest.MonkeyPatch, folder: Path) -> None:
    path = folder / "cpuinfo"
    path.write_text("flags : sse2\n\n")
    patch.setattr(programs, "_CPUINFO", path)


@pytest.mark.parametrize("changed", ["source", "settings"])
def test_what_only_may_change_the_program_is_traced_again(
    changed: str, tmp_path: Path, mesh: Mesh, events: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stored(tmp_path, mesh)(*arguments(mesh))
    if changed == "source":
        edited(monkeypatch)
    settings = "other" if changed == "settings" else ""
    same, counts = counted(events, stored(tmp_path, mesh, settings=settings), arguments(mesh))
    assert counts[0] > 0 and counts[1:] == (0, 1, 1)  # lowered it is the same
    assert_same(same, expected)
    _, counts = counted(events, stored(tmp_path, mesh, settings=settings), arguments(mesh))
    assert counts == (0, 0, 1, 0)
    rescaled = partial(update, scale=3.0)
    other, counts = counted(
        events, stored(tmp_path, mesh, function=rescaled, settings="third"), arguments(mesh)
    )
    assert counts[1:] == (1, 0, 1)
    assert not np.array_equal(other[0].x, expected[0].x)


def test_what_is_loaded_early_is_used_only_where_it_fits(
    tmp_path: Path, mesh: Mesh, events: Counter
) -> None:
    def early(args: Any) -> tuple[Any, tuple[int, ...]]:
        return counted(events, stored(tmp_path, mesh, early=True), args)

    assert early(arguments(mesh))[1][1:] == (1, 0, 1)  # there is nothing yet
    expected = stored(tmp_path, mesh)(*arguments(mesh))
    result, counts = early(arguments(mesh))
    assert counts == (0, 0, 1, 0)
    assert_same(result, expected)
    longer = arguments(mesh, rows=16)
    assert early(longer)[1][1:] == (1, 0, 1)  # the newest is for other shapes
    assert early(arguments(mesh))[1] == early(arguments(mesh, rows=16))[1] == (0, 0, 1, 0)
    for path in tmp_path.iterdir():
        path.write_bytes(b"damaged")
    result, counts = early(arguments(mesh))
    assert counts[1:] == (1, 0, 1)
    assert_same(result, expected)


CHANGES: dict[str, Callable[[pytest.MonkeyPatch, Path], None]] = {
    "processor": other_processor,
    "cores": lambda patch, _: patch.setattr(os, "cpu_count", lambda: 77),
    "flags of XLA": lambda patch, _: patch.setenv(
        "XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_max_isa=AVX"
    ),
    "flags of libtpu": lambda patch, _: patch.setenv("LIBTPU_INIT_ARGS", "--xla_some=1"),
    "version": lambda patch, _: patch.setattr(programs.metadata, "version", lambda name: "0.0"),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_another_environment_compiles(
    changed: str, tmp_path: Path, mesh: Mesh, events: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(tmp_path / "kept", mesh)(*arguments(mesh))
    CHANGES[changed](monkeypatch, tmp_path)
    _, counts = counted(events, stored(tmp_path / "kept", mesh), arguments(mesh))
    assert counts[1:] == (1, 0, 1)


def test_other_arguments_options_or_settings_of_jax_compile(
    tmp_path: Path, mesh: Mesh, events: Counter
) -> None:
    def compiles(program: Any, args: Any) -> bool:
        return counted(events, program, args)[1][1:3] == (1, 0)

    args = arguments(mesh)
    assert compiles(stored(tmp_path, mesh), arguments(mesh))
    assert compiles(stored(tmp_path, mesh), arguments(mesh, rows=16))
    assert compiles(stored(tmp_path, mesh), arguments(mesh, dtype=jnp.bfloat16))
    assert compiles(stored(tmp_path, mesh, donate=()), arguments(mesh))
    whole = args[0]._replace(x=jax.device_put(args[0].x, replicated(mesh)))
    assert compiles(stored(tmp_path, mesh, donate=()), (whole, args[1]))
    assert compiles(stored(tmp_path, mesh), (*args[:1], {"a": args[1]}))
    with jax.default_matmul_precision("highest"):
        assert compiles(stored(tmp_path, mesh), arguments(mesh))
    other = small.make_mesh(1, 2, 1)
    jax.set_mesh(other)
    assert compiles(stored(tmp_path, other), arguments(other))
    jax.set_mesh(mesh)
    assert not compiles(stored(tmp_path, mesh), arguments(mesh))


def test_programs_that_read_different_arguments_are_told_apart(tmp_path: Path, mesh: Mesh) -> None:
    store = partial(Store, tmp_path, mesh)
    a, b = (jax.device_put(jnp.float32(x), replicated(mesh)) for x in (1, 2))
    assert StoredProgram(lambda a, b: -a, name="main", store=store("first"))(a, b) == -1
    assert StoredProgram(lambda a, b: -b, name="main", store=store("second"))(a, b) == -2


def sealed(content: bytes) -> bytes:
    return hashlib.sha256(content).digest() + content


def is_sealed(packed: bytes) -> bool:
    return sealed(packed[32:]) == packed


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
        lambda whole: sealed(b"no pickle"),
        lambda whole: sealed(pickle.dumps("of another version")),
    ],
    ids=["empty", "truncated", "a bit", "no pickle", "another version"],
)
def test_a_file_that_cannot_be_used_is_replaced(
    damage: Callable[[bytes], bytes],
    tmp_path: Path,
    mesh: Mesh,
    events: Counter,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = stored(tmp_path, mesh)(*arguments(mesh))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    result, counts = counted(events, stored(tmp_path, mesh), arguments(mesh))
    assert counts[1:] == (1, 0, 1)
    assert_same(result, expected)
    assert caplog.text.count("cannot be used") == 1
    assert ("damaged" in caplog.text) == (
        not is_sealed(damage(whole))
    )  # nothing unpickles or loads it
    _, counts = counted(events, stored(tmp_path, mesh), arguments(mesh))
    assert counts == (0, 0, 1, 0) and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, mesh: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level("INFO", logger="absl"):
        result = stored(tmp_path / "file" / "programs", mesh)(*arguments(mesh))
    assert_same(result, jax.jit(update, out_shardings=layout(mesh))(*arguments(mesh)))
    assert caplog.text.count("is not kept") == 1


def test_only_the_newest_files_stay(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "MOST_FILES", 2)
    for number, settings in enumerate(("a", "b")):
        before = set(tmp_path.iterdir())
        stored(tmp_path, mesh, function=partial(update, scale=float(number)), settings=settings)(
            *arguments(mesh)
        )
        (made,) = set(tmp_path.iterdir()) - before
        os.utime(made, (number, number))
    newest = made
    left = tmp_path / "part-left-by-a-kill"
    left.write_text("")
    os.utime(left, (0, 0))
    stored(tmp_path, mesh, function=partial(update, scale=2.0), settings="c")(*arguments(mesh))
    assert len(list(tmp_path.iterdir())) == 2 and newest.exists()


def test_a_source_edited_since_the_start_is_not_taken_for_what_was_traced(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "_sources", lambda: "edited")
    stored(tmp_path, mesh)(*arguments(mesh))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "setting", ["jax_disable_jit", "jax_debug_nans", "jax_debug_infs", "processes"]
)
def test_nothing_is_kept(
    setting: str, tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(mesh)
    expected = jax.jit(update, out_shardings=layout(mesh))(*args)
    if setting == "processes":
        monkeypatch.setattr(programs.jax, "process_count", lambda: 2)
    else:
        jax.config.update(setting, True)
    try:
        result = stored(tmp_path, mesh, donate=())(*args)
    finally:
        if setting != "processes":
            jax.config.update(setting, False)
    np.testing.assert_allclose(result[0].x, expected[0].x, rtol=1e-6)
    assert not list(tmp_path.iterdir())


PROCESS = """
import sys
from pathlib import Path
import jax, numpy as np
from popi_jax.programs import LOADING, Store, StoredProgram
from tests.test_programs import arguments, layout, stored, update
from tests.training import small
loads = []
jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: event == LOADING and loads.append(1))
mesh = small.make_mesh(2, 1, 1)
jax.set_mesh(mesh)
how, folder = sys.argv[1:]
jitted = jax.jit(update, donate_argnums=(0,), out_shardings=layout(mesh), keep_unused=True)
state, metrics = (jitted if how == "jit" else stored(Path(folder), mesh))(*arguments(mesh))
print(len(loads), np.asarray(state.x).tobytes().hex(), np.asarray(metrics["mean"]).tobytes().hex())
"""


def test_a_program_that_lies_in_the_cache_of_jax_can_be_stored_too(tmp_path: Path) -> None:
    """An executable that was read from that cache would, once stored, load in another process and
    fail when run."""

    def process(how: str) -> list[str]:
        command = [sys.executable, "-c", PROCESS, how, str(tmp_path / "programs")]
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax")}
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    jitted, first, second = process("jit"), process("stored"), process("stored")
    assert any("update" in path.name for path in (tmp_path / "jax").iterdir())
    assert (jitted[0], first[0], second[0]) == ("0", "0", "1")
    assert jitted[1:] == first[1:] == second[1:]


def test_training_through_stored_programs_is_bitwise_that_through_jit(
    tmp_path: Path, mesh: Mesh
) -> None:
    parts = small.make_parts(small.make_config())
    made = partial(popi_update, parts=parts, phases=parse_phases(("joint 4",)))

    def run(how: str) -> tuple[Any, list[Any]]:
        state, frozen = small.make_state(parts, mesh)
        options: Any = {
            "donate_argnums": (0,),
            "out_shardings": (jax.tree.map(lambda x: x.sharding, state), None),
        }
        store = Store(tmp_path, mesh, "")
        program: Any = jax.jit(made, **options) if how == "jit" else None
        metrics = []
        for step in range(4):
            if how == "stored" and step in (0, 2):  # as if stopped and continued after two steps
                program = StoredProgram(made, name="main", store=store, **options)
            state, values = program(state, frozen, place_batch(small.user_batch(step), mesh, RULES))
            metrics.append(small.copied(values))
        return small.copied(state), metrics

    expected, found = run("jit"), run("stored")
    assert len(list(tmp_path.iterdir())) == 1
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def changed(cfg: Config, field: str, value: Any) -> Config:
    section, _, name = field.rpartition(".")
    return (
        small.replace(cfg, section, **{name: value})
        if section
        else dataclasses.replace(cfg, **{name: value})
    )


def test_which_settings_programs_depend_on() -> None:
    built = tiny_run.shared_run(1).built
    own = loop.program_store(built)
    assert own.folder == Path(built.config.data.prepared).parent / "compiled" / "programs"

    def same(field: str, value: Any) -> bool:
        config = changed(built.config, field, value)
        other = built._replace(config=config)
        assert loop.make_parts(other)[0].cfg == loop.program_config(
            config
        )  # what is left out is not seen either
        return loop.program_store(other).settings == own.settings

    free = {
        "seed": 9,
        "workdir": "/elsewhere",
        "name": "x",
        "schedule.log_every": 7,
        "schedule.save_every": 7,
    }
    free |= {"schedule.keep": 7, "data.workers": 2, "evaluation.max_users": 7}
    assert all(same(field, value) for field, value in free.items())
    told = {
        "generator.beta": 0.7,
        "inference.learning_rate": 0.5,
        "batch.users": 2,
        "data.summary_len": 5,
    }
    told |= {"warmup.learning_rate": 0.5, "schedule.phases": ("joint 7",), "model.remat": "full"}
    assert not any(same(field, value) for field, value in told.items())
    assert loop.program_store(built._replace(glue=small.GLUE)).settings != own.settings
    assert loop.program_store(built, {"generator": Budget(4, 2)}).settings != own.settings
