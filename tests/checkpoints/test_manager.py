import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from popi_jax.checkpoints import manager
from popi_jax.errors import UserError
from popi_jax.training.setup import Frozen, RoleState, TrainState

CONFIG = {
    "name": "a",
    "seed": 0,
    "workdir": "x",
    "generator": {"beta": 0.3},
    "schedule": {"phases": ["inference 2"], "keep": 2, "save_every": 5, "log_every": 1},
    "mesh": {"fsdp": 1},
    "evaluation": {"max_users": 0},
    "data": {"path": "p", "source": "prism"},
}
CONFIG_JSON = json.dumps(CONFIG)


def make_role(key: jax.Array, rows: int) -> RoleState:
    params = {"a": {"kernel": jax.random.normal(key, (rows, 8))}, "b": {"scale": jnp.ones(8)}}
    opt_state = optax.adamw(1e-3).init(params)
    # moments that are not zero, so that a restore which forgets them is seen
    return RoleState(jnp.int32(3), params, jax.tree.map(lambda x: x + 1, opt_state))


def make_state(seed: int, rows: int = 16) -> TrainState:
    key = jax.random.key(seed)
    return TrainState(
        inference=make_role(jax.random.fold_in(key, 1), rows),
        generator=make_role(jax.random.fold_in(key, 2), rows),
        step=jnp.int32(seed),
        key=key,
    )


class Batches:
    def __init__(self) -> None:
        self._iterator = iter(
            grain.MapDataset.range(100).seed(1).shuffle().batch(4).to_iter_dataset()
        )

    def __next__(self) -> np.ndarray:
        return next(self._iterator)

    def get_state(self) -> bytes:
        return json.dumps(self._iterator.get_state()).encode()

    def set_state(self, state: bytes) -> None:
        self._iterator.set_state(json.loads(state))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def raw(x) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(raw(x), raw(y))


def write_run(folder: Path, steps: int, keep: int = 5) -> list:
    """Saves states 1..steps, each after one more batch; returns the batch that follows each
    step."""
    m, iterator, following = manager.open_manager(str(folder), keep, CONFIG_JSON), Batches(), []
    twin = Batches()
    next(twin)
    for step in range(1, steps + 1):
        next(iterator)
        manager.save(m, step, make_state(step), iterator, CONFIG_JSON)
        following.append(next(twin))
    manager.close(m)
    return following


def restore(folder: Path):
    iterator = Batches()
    m = manager.open_manager(str(folder), 5, CONFIG_JSON)
    found = manager.restore_latest(m, lambda _: abstract(make_state(0)), iterator)
    return m, found, iterator


def flip_a_bit_of_each_file(folder: Path) -> None:
    for path in folder.iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def test_restores_arrays_key_and_iterator_bitwise(tmp_path):
    following = write_run(tmp_path, 2)
    m, (step, state), iterator = restore(tmp_path)
    assert step == 2
    manager.close(m)
    assert_same(state, make_state(2))
    np.testing.assert_array_equal(next(iterator), following[1])


def test_an_empty_workdir_restores_nothing(tmp_path):
    m, found, _ = restore(tmp_path)
    assert found is None
    manager.close(m)


def test_keeps_the_newest(tmp_path):
    write_run(tmp_path, 4, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def test_saving_a_step_twice_leaves_the_first(tmp_path):
    m = manager.open_manager(str(tmp_path), 2, CONFIG_JSON)
    for seed in (1, 2):
        manager.save(m, 7, make_state(seed), None, CONFIG_JSON)
        m.wait_until_finished()
    _, state = manager.restore_latest(m, lambda _: abstract(make_state(0)), None)
    manager.close(m)
    assert_same(state, make_state(1))


def test_saving_an_older_step_is_an_error(tmp_path):
    m = manager.open_manager(str(tmp_path), 2, CONFIG_JSON)
    manager.save(m, 7, make_state(1), None, CONFIG_JSON)
    m.wait_until_finished()
    with pytest.raises(RuntimeError, match="step 3 is older than 7"):
        manager.save(m, 3, make_state(1), None, CONFIG_JSON)
    manager.close(m)


def test_arrays_may_be_donated_while_they_are_written(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = make_state(1, rows=100_000)
    expected = jax.tree.map(lambda x: np.array(x), state.generator.params)
    m = manager.open_manager(str(tmp_path), 2, CONFIG_JSON)
    manager.save(m, 1, state, None, CONFIG_JSON)
    overwrite(state.generator.params)
    manager.close(m)
    assert_same(
        jax.tree.map(np.asarray, manager.restore_params(str(tmp_path), "generator")[1]), expected
    )


def test_restores_on_another_mesh(tmp_path):
    def place(state, mesh, spec):
        def sharding(x):
            return NamedSharding(mesh, spec if getattr(x, "shape", ())[:1] == (16,) else P())

        return jax.tree.map(lambda x: jax.device_put(x, sharding(x)), state)

    def mesh(shape):
        return jax.make_mesh(shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    m = manager.open_manager(str(tmp_path), 2, CONFIG_JSON)
    manager.save(m, 1, place(make_state(1), mesh((8, 1)), P("x")), None, CONFIG_JSON)
    manager.close(m)
    target = abstract(place(make_state(0), mesh((2, 4)), P("y", "x")))
    m = manager.open_manager(str(tmp_path), 2, CONFIG_JSON)
    _, state = manager.restore_latest(m, lambda _: target, None)
    manager.close(m)
    assert_same(state, make_state(1))
    assert state.generator.params["a"]["kernel"].sharding.spec == P("y", "x")
    assert state.inference.opt_state[0].mu["a"]["kernel"].sharding.spec == P("y", "x")


@pytest.mark.parametrize("item", ["generator", "optimizer", "key", "data"])
def test_a_damaged_newest_step_is_set_aside_and_written_again(tmp_path, item, caplog):
    following = write_run(tmp_path, 3)
    if item == "data":
        (tmp_path / "checkpoints/3/data/metadata").write_text("{")
    elif item == "optimizer":
        shutil.rmtree(tmp_path / "checkpoints/3/optimizer")
    elif item == "key":  # the file that says that the key is a key
        (tmp_path / "checkpoints/3/optimizer/array_metadatas/process_0").unlink()
    else:
        flip_a_bit_of_each_file(tmp_path / "checkpoints/3/generator/d")
    with caplog.at_level(logging.ERROR):
        m, (step, state), iterator = restore(tmp_path)
    assert step == 2
    assert_same(state, make_state(2))
    np.testing.assert_array_equal(next(iterator), following[1])
    assert any("checkpoints/3 cannot be read" in r.getMessage() for r in caplog.records)
    manager.save(m, 3, make_state(30), iterator, CONFIG_JSON)
    manager.close(m)
    m, (step, state), _ = restore(tmp_path)
    manager.close(m)
    assert step == 3
    assert_same(state, make_state(30))
    assert (tmp_path / "checkpoints/damaged-3").is_dir()


def test_if_no_step_can_be_read_nothing_is_moved(tmp_path):
    write_run(tmp_path, 2)
    for step in (1, 2):
        shutil.rmtree(tmp_path / f"checkpoints/{step}/inference")
    with pytest.raises(UserError, match=r"none of the checkpoints \[2, 1\] .* can be read"):
        restore(tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_the_leftover_of_a_killed_save_is_ignored_and_removed(tmp_path):
    write_run(tmp_path, 2)
    leftover = tmp_path / "checkpoints/9.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints/2", leftover)
    shutil.rmtree(leftover / "optimizer")
    m, (step, _), iterator = restore(tmp_path)
    assert step == 2
    manager.save(m, 3, make_state(3), iterator, CONFIG_JSON)
    manager.close(m)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2", "3"]


SAVE_FOREVER = """
import sys
from tests.checkpoints import test_manager as t
m = t.manager.open_manager(sys.argv[1], 2, t.CONFIG_JSON)
found = t.manager.restore_latest(m, lambda _: t.abstract(t.make_state(0, rows=30000)), None)
step = found[0] if found else 0
while True:
    step += 1
    t.manager.save(m, step, t.make_state(step, rows=30000), None, t.CONFIG_JSON)
"""


@pytest.mark.slow
def test_killed_at_any_time_the_newest_step_is_whole(tmp_path):
    rng = np.random.default_rng(0)
    last = 0
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)], env=os.environ
        )
        deadline = time.time() + 60
        while not (tmp_path / f"checkpoints/{last + 1}").is_dir() and time.time() < deadline:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        m = manager.open_manager(str(tmp_path), 2, CONFIG_JSON)
        newest, state = manager.restore_latest(
            m, lambda _: abstract(make_state(0, rows=30000)), None
        )
        manager.close(m)
        assert newest > last
        assert_same(state, make_state(newest, rows=30000))
        assert not list((tmp_path / "checkpoints").glob("damaged-*"))
        last = newest


def test_parameters_of_one_role_alone(tmp_path):
    write_run(tmp_path, 2)
    shutil.rmtree(tmp_path / "checkpoints/2/optimizer")
    shutil.rmtree(tmp_path / "checkpoints/2/inference")
    step, params = manager.restore_params(str(tmp_path), "generator")
    assert step == 2
    assert_same(params, make_state(2).generator.params)
    sharding = NamedSharding(jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)), P())
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), params
    )
    _, params = manager.restore_params(str(tmp_path), "generator", target)
    assert len(params["a"]["kernel"].sharding.device_set) == 8


def test_reading_parameters_passes_over_damage_and_moves_nothing(tmp_path):
    write_run(tmp_path, 2)
    shutil.rmtree(tmp_path / "checkpoints/2/generator")
    assert manager.restore_params(str(tmp_path), "generator")[0] == 1
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_reading_parameters_of_a_step(tmp_path):
    write_run(tmp_path, 3)
    step, params = manager.restore_params(str(tmp_path), "generator", step=2)
    assert step == 2
    assert_same(params, make_state(2).generator.params)
    with pytest.raises(UserError, match=r"--step=9: not in .*that are there: 1, 2, 3$"):
        manager.restore_params(str(tmp_path), "generator", step=9)
    shutil.rmtree(tmp_path / "checkpoints/2/generator")  # no other step is taken instead
    with pytest.raises(UserError, match=r"none of the checkpoints \[2\] .* can be read"):
        manager.restore_params(str(tmp_path), "generator", step=2)


def test_reading_parameters_where_there_are_none(tmp_path):
    with pytest.raises(UserError, match="does not exist; train first"):
        manager.restore_params(str(tmp_path), "generator")
    manager.close(manager.open_manager(str(tmp_path), 2, CONFIG_JSON))
    with pytest.raises(UserError, match="no checkpoint in"):
        manager.restore_params(str(tmp_path), "generator")


def test_a_workdir_of_another_run_is_refused(tmp_path):
    write_run(tmp_path, 1)
    other = json.dumps(CONFIG | {"seed": 1, "generator": {"beta": 0.5}, "added": 3})
    with pytest.raises(UserError) as error:
        manager.open_manager(str(tmp_path), 2, other)
    message = str(error.value)
    differing = "added was absent, is 3; generator.beta was 0.3, is 0.5; seed was 0, is 1"
    assert f"{differing}; give another WORKDIR" in message
    assert "\n" not in message
    assert manager.read_config(str(tmp_path)) == CONFIG


def test_fields_that_do_not_touch_learning_may_change(tmp_path):
    write_run(tmp_path, 1)
    free = {"name": "b", "workdir": "y", "mesh": {"fsdp": 8}, "evaluation": {"max_users": 3}}
    schedule = CONFIG["schedule"] | {"keep": 9, "save_every": 1, "log_every": 2}
    data = CONFIG["data"] | {"path": "q"}
    manager.check_same_run(
        str(tmp_path), json.dumps(CONFIG | free | {"schedule": schedule, "data": data})
    )


def change_phases(folder: Path, *phases: str) -> None:
    manager.check_same_run(str(folder), json.dumps(CONFIG | {"schedule": {"phases": phases}}))


def test_a_run_may_go_on_with_more_updates_of_the_same_beginning(tmp_path):
    write_run(tmp_path, 1)  # that was begun with "inference 2"
    change_phases(tmp_path, "inference 2", "joint 3")
    change_phases(tmp_path, "inference 7")
    change_phases(tmp_path, "alternate 2:1 9")
    for phases, why in (
        (("inference 1",), "begun with 2 updates and may go on with more, not with 1"),
        (("alternate 1:1 9",), "update 2 was inference, is generator; more may follow"),
        (("supervised 9",), "update 1 was inference, is supervised; more may follow"),
    ):
        with pytest.raises(UserError, match=f"schedule.phases was .*{why}.*; give another WORKDIR"):
            change_phases(tmp_path, *phases)
    more = CONFIG | {"seed": 1, "schedule": {"phases": ["inference 7"]}}
    with pytest.raises(UserError, match=r"other settings: seed was 0, is 1; give"):
        manager.check_same_run(str(tmp_path), json.dumps(more))


def test_a_home_folder_that_was_stored_as_such_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    params = {"a": jnp.ones(2)}
    manager.save_frozen(
        str(tmp_path), Frozen(params, params), json.dumps(CONFIG | {"model": {"checkpoint": "~/b"}})
    )
    now = json.dumps(CONFIG | {"model": {"checkpoint": "/home/ann/b"}})
    manager.check_same_run(str(tmp_path), now)
    monkeypatch.setenv("HOME", "/home/bob")
    with pytest.raises(UserError, match='checkpoint was "/home/bob/b", is "/home/ann/b"'):
        manager.check_same_run(str(tmp_path), now)


def test_a_name_that_begins_like_a_free_field_is_not_free(tmp_path):
    write_run(tmp_path, 1)
    schedule = CONFIG["schedule"] | {"keep_x": 3}
    with pytest.raises(UserError, match="schedule.keep_x was absent, is 3"):
        manager.check_same_run(str(tmp_path), json.dumps(CONFIG | {"schedule": schedule}))


def test_a_workdir_that_holds_only_the_reference_is_compared_too(tmp_path):
    params = make_state(1).generator.params
    manager.save_frozen(str(tmp_path), Frozen(params, params), CONFIG_JSON)
    with pytest.raises(UserError, match="seed was 0, is 1"):
        manager.check_same_run(str(tmp_path), json.dumps(CONFIG | {"seed": 1}))


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in .*Not a directory"):
        manager.open_manager(str(tmp_path / "file"), 2, CONFIG_JSON)


def test_reference_round_trip(tmp_path):
    state = make_state(1)
    frozen = Frozen(state.inference.params, state.generator.params)
    assert manager.restore_frozen(str(tmp_path), abstract(frozen)) is None
    manager.save_frozen(str(tmp_path), frozen, CONFIG_JSON)
    assert_same(manager.restore_frozen(str(tmp_path), abstract(frozen)), frozen)
    shutil.rmtree(tmp_path / "reference/generator")
    with pytest.raises(UserError, match="cannot read .*reference"):
        manager.restore_frozen(str(tmp_path), abstract(frozen))


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # of the threads that failed
def test_a_full_disk_is_told_in_one_line_and_the_last_checkpoint_stays(tmp_path, caplog):
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        write_run(tmp_path, 1)
        m = manager.open_manager(str(tmp_path), 2, CONFIG_JSON)
        with (
            pytest.raises(UserError, match="no space left to write .*bytes free") as error,
            caplog.at_level("ERROR"),
        ):
            manager.save(m, 2, make_state(2, rows=200_000), None, CONFIG_JSON)
            with manager.tell_full_disk(tmp_path):
                m.wait_until_finished()
        assert "\n" not in str(error.value)
        assert not any("Traceback" in logging.Formatter().format(r) for r in caplog.records)
        manager.close(m)
        m, (step, state), _ = restore(tmp_path)
        manager.close(m)
        assert step == 1
        assert_same(state, make_state(1))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_known_inside_other_errors(tmp_path):
    full = OSError(errno.ENOSPC, "x")
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = full
    store = ValueError(
        "RESOURCE_EXHAUSTED: Failed to write 9 bytes to file 8: No space left on device"
    )
    for error in (full, wrapped, store, ExceptionGroup("several", [KeyError("x"), full])):
        with pytest.raises(UserError, match="no space left"), manager.tell_full_disk(tmp_path):
            raise error
    with pytest.raises(ValueError, match="out of memory"), manager.tell_full_disk(tmp_path):
        raise ValueError("RESOURCE_EXHAUSTED: out of memory on device")
