"""All checkpoint files of a run: `<workdir>/checkpoints/<step>/` and `<workdir>/reference/`.

The only file that calls Orbax. A step holds the items `inference` and `generator` (parameters
alone, so that one role can be read without the rest), `optimizer` (the rest of the state: optimizer
states, steps, key), `data` (position of the data iterator) and `config`. A directory gets its final
name only when it is complete, so a run may be killed at any time."""

import contextlib
import json
import logging as std_logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from popi_jax import config_rules
from popi_jax.arrays import Frozen, Params, TrainState
from popi_jax.config import Config, flatten_stored
from popi_jax.errors import UserError, disk_is_full
from popi_jax.phases import find_change

ROLES = ("inference", "generator")

_AVERAGE = "_ema"  # added to a role: the item that holds the average of its parameters


def open_manager(workdir: str, keep: int, config_json: str) -> ocp.CheckpointManager:
    """Opens `<workdir>/checkpoints` for writing, made if absent; the newest `keep` steps stay.
    Leftovers of a kill go.

    Raises: UserError if the folder cannot be written, or holds a run with other settings (see
    `check_same_run`)."""
    folder = _find_checkpoints(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if "://" not in str(folder):
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as e:
        raise UserError(
            f'config.workdir: cannot write in "{folder}": {e.strerror or e}; give a WORKDIR that '
            "you may write in"
        ) from e
    check_same_run(workdir, config_json)
    logging.get_absl_logger().addFilter(_drop_traceback)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.LatestN(keep), cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(folder, options=options)


def save(
    manager: ocp.CheckpointManager, step: int, state: TrainState, iterator: Any, config_json: str
) -> None:
    """Starts to write `step` and returns once the arrays are copied; a step that exists already is
    left alone.

    `iterator` tells its position, which is the same in every process, by `get_state() -> bytes` of
    UTF-8 and goes there by `set_state(bytes)`; None: there is none. A failure of the write in the
    background is raised by the next call. Raises: UserError if the disk is full; older steps stay
    as they are."""
    steps = manager.all_steps()
    if step in steps:
        return
    if steps and step < max(steps):
        raise RuntimeError(
            f"step {step} is older than {max(steps)}, the newest in {manager.directory}"
        )
    models = _split_models(state)
    items = {name: ocp.args.StandardSave(params) for name, params in models.items()}
    items["optimizer"] = ocp.args.StandardSave(_join_models(state, dict.fromkeys(models, {})))
    items["config"] = ocp.args.JsonSave(json.loads(config_json))
    if iterator is not None:
        items["data"] = ocp.args.JsonSave({"position": iterator.get_state().decode()})
    with tell_full_disk(manager.directory):
        manager.save(step, args=ocp.args.Composite(**items), force=True)


def close(manager: ocp.CheckpointManager) -> None:
    """Waits for writes in the background and ends the threads. Raises: UserError if the disk is
    full."""
    with tell_full_disk(manager.directory):
        manager.close()


def restore_latest(
    manager: ocp.CheckpointManager, shape_at: Callable[[int], TrainState], iterator: Any
) -> tuple[int, TrainState] | None:
    """Returns (step, state) of the newest readable step and moves `iterator` to its position; None
    if there is no step.

    shape_at(step) is the state as a tree of `jax.ShapeDtypeStruct` with shardings, which may be of
    another mesh than the one that wrote. A step that cannot be read is told, renamed to
    `damaged-<step>` and passed over. Raises: UserError if there are steps and none can be read."""

    def read(step: int) -> TrainState:
        abstract = shape_at(step)
        models = _split_models(abstract)
        rest = _join_models(abstract, dict.fromkeys(models, {}))
        items = {name: ocp.args.StandardRestore(params) for name, params in models.items()}
        items["optimizer"] = ocp.args.StandardRestore(rest)
        if iterator is not None:
            items["data"] = ocp.args.JsonRestore()
        restored = manager.restore(step, args=ocp.args.Composite(**items))
        state = _join_models(restored["optimizer"], {name: restored[name] for name in models})
        # without one of its small files Orbax returns a key as plain numbers instead of failing
        kinds = jax.tree.map(
            lambda x, like: (x.shape, x.dtype) == (like.shape, like.dtype), state, abstract
        )
        if not jax.tree.all(kinds):
            raise ValueError("an array has another shape or type than it was saved with")
        if iterator is not None:
            iterator.set_state(restored["data"]["position"].encode())
        return state

    steps = sorted(manager.all_steps(), reverse=True)
    if not steps:
        return None
    found = _read_first(manager.directory, steps, read)
    damaged = [step for step in steps if step > found[0]]
    if damaged:  # left in place, a damaged step would keep the run from saving that step again
        if jax.process_index() == 0:
            for step in damaged:
                _set_aside(manager.directory / str(step))
        multihost_utils.sync_global_devices("damaged steps set aside")
        manager.reload()
    return found


def restore_params(
    workdir: str, role: str, abstract_params: Params | None = None, step: int | None = None
) -> tuple[int, Params]:
    """Returns (step, parameters) of one role from a step, or from the newest that is readable;
    nothing in the folder is changed.

    They are the average of the parameters where the run keeps one, and adapters alone where it
    trains those. Without `abstract_params` (shapes with shardings) they come as saved, whole on the
    first local device. Raises: UserError if there is no such step, or none that can be read."""
    folder = _find_checkpoints(workdir)
    steps = list_steps(workdir)
    if not steps:
        told = f'no checkpoint in "{folder}"' if folder.exists() else f'"{folder}" does not exist'
        raise UserError(f"config.workdir: {told}; train first, or give the WORKDIR of a run")
    if step is not None and step not in steps:
        there = ", ".join(map(str, sorted(steps)))
        raise UserError(f'--step={step}: not in "{folder}"; the steps that are there: {there}')
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(folder, options=options) as manager:

        def read(step: int) -> Params:
            target = abstract_params
            where = folder / str(step)
            name = role + _AVERAGE if (where / (role + _AVERAGE)).exists() else role
            if target is None:
                one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
                saved = ocp.StandardCheckpointHandler().metadata(where / name)
                target = jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), dict(saved.tree)
                )
            item = {name: ocp.args.StandardRestore(target)}
            return manager.restore(step, args=ocp.args.Composite(**item))[name]

        try:
            return _read_first(folder, steps if step is None else [step], read)
        except UserError as e:
            if step is None:
                raise
            there = ", ".join(map(str, sorted(steps)))
            raise UserError(f"--step={step}: {e}; the steps that are there: {there}") from e


def list_steps(workdir: str) -> list[int]:
    """Returns the steps that were saved, readable or not, the newest first.

    In a bucket Orbax writes under the final name and marks what is complete by a file."""
    folder = _find_checkpoints(workdir)
    saved = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    if "://" in str(folder):
        saved = [path for path in saved if (path / "commit_success.txt").exists()]
    return sorted((int(path.name) for path in saved), reverse=True)


def read_config(workdir: str, step: int | None = None) -> dict[str, Any] | None:
    """Returns the configuration that wrote a step, else the newest one, or else the reference, of a
    workdir; None without any."""
    folder = _find_checkpoints(workdir)
    first = [] if step is None else [step]
    steps = [folder / str(step) for step in (*first, *list_steps(workdir))]
    for holder in (*steps, folder.parent / "reference"):
        try:
            return json.loads((holder / "config" / "metadata").read_text())
        except (OSError, ValueError):
            continue  # damaged or absent: another one tells the same, but for what is free
    return None


def check_same_run(workdir: str, config_json: str) -> None:
    """Compares the stored configuration of a workdir, if any, with the present one, in which more
    updates may follow those of the stored one.

    Raises: UserError naming each field that differs and matters for continuing the run."""
    stored = read_config(workdir)
    if stored is None:
        return
    before, now = flatten_stored(stored), flatten_stored(json.loads(config_json))
    free = {field.name for field in config_rules.list_settings(Config) if field.free}
    differing = [
        _tell_change(before, now, name)
        for name in sorted((before.keys() | now.keys()) - free)
        if _show(before, name) != _show(now, name)
    ]
    differing = [told for told in differing if told]
    if differing:
        raise UserError(
            f'config.workdir: "{workdir}" holds a run with other settings: {"; ".join(differing)}; '
            "give another WORKDIR, or the settings of that run"
        )


def _tell_change(before: dict[str, Any], now: dict[str, Any], name: str) -> str:
    """How a setting differs; "" where a run may go on with it."""
    told = f"{name} was {_tell(before, name)}, is {_tell(now, name)}"
    if name != "schedule.phases":
        return told
    try:
        why = find_change(tuple(before[name]), tuple(now[name]))
    except (UserError, KeyError, TypeError, AttributeError):  # of another version
        return told
    return f"{told} ({why})" if why else ""


def holds_reference(workdir: str, part: str) -> bool:
    """Whether `<workdir>/reference` is there and has a part of a `Frozen`."""
    return (epath.Path(workdir).resolve() / "reference" / part).exists()


def save_frozen(workdir: str, frozen: Frozen, config_json: str) -> None:
    """Writes `<workdir>/reference` (a `Frozen` whose empty trees are left out) and waits; an
    earlier one is replaced.

    Raises: UserError if the disk is full."""
    folder = epath.Path(workdir).resolve() / "reference"
    items = {name: ocp.args.StandardSave(tree) for name, tree in frozen._asdict().items() if tree}
    with tell_full_disk(folder), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        args = ocp.args.Composite(**items, config=ocp.args.JsonSave(json.loads(config_json)))
        checkpointer.save(folder, args=args, force=True)


def restore_frozen(workdir: str, abstract_frozen: Frozen) -> Frozen | None:
    """Returns the `Frozen` of `<workdir>/reference`, sharded as `abstract_frozen`; None if it was
    not written yet.

    Raises: UserError if it cannot be read: the run cannot continue without it."""
    folder = epath.Path(workdir).resolve() / "reference"
    if not folder.exists():
        return None
    items = {
        name: ocp.args.StandardRestore(tree)
        for name, tree in abstract_frozen._asdict().items()
        if tree
    }
    if not items:
        return abstract_frozen
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(folder, args=ocp.args.Composite(**items))
    except Exception as e:
        reason = _shorten(e)
        raise UserError(
            f'config.workdir: cannot read "{folder}": {reason}; start again in another WORKDIR'
        ) from e
    return abstract_frozen._replace(**{name: restored[name] for name in items})


def _split_models(state: TrainState) -> dict[str, Params]:
    """Item name -> tree: the parameters of each role, and their average where there is one."""
    roles = {role: getattr(state, role) for role in ROLES}
    averages = {
        role + _AVERAGE: parts.ema for role, parts in roles.items() if parts.ema is not None
    }
    return {role: parts.params for role, parts in roles.items()} | averages


def _join_models(state: TrainState, models: dict[str, Params]) -> TrainState:
    """Inverse of `_split_models`."""
    parts = {
        role: getattr(state, role)._replace(params=models[role], ema=models.get(role + _AVERAGE))
        for role in ROLES
    }
    return state._replace(**parts)


def _find_checkpoints(workdir: str) -> epath.Path:
    return epath.Path(workdir).resolve() / "checkpoints"


def _read_first(
    folder: epath.Path, steps: list[int], read: Callable[[int], Any]
) -> tuple[int, Any]:
    """Returns (step, read(step)) of the first of `steps` that all processes can read."""
    for step in steps:
        failure, value = None, None
        try:
            value = read(step)
        except Exception as e:  # Orbax and TensorStore tell damage by many types
            failure = e
        if np.all(multihost_utils.process_allgather(np.array(failure is None))):
            return step, value
        reason = _shorten(failure) if failure else "another process could not read it"
        where, rest = folder / str(step), " trying the one before it." if len(steps) > 1 else ""
        logging.error("Checkpoint %s cannot be read (%s);%s", where, reason, rest)
    raise UserError(
        f'config.workdir: none of the checkpoints {steps} in "{folder}" can be read: {reason}; '
        "give another WORKDIR"
    ) from failure


def _set_aside(path: epath.Path) -> None:
    target = path.parent / f"damaged-{path.name}"
    if target.exists():
        target.rmtree()
    path.rename(target)
    logging.error("Renamed the damaged checkpoint %s to %s.", path, target.name)


@contextlib.contextmanager
def tell_full_disk(folder: os.PathLike) -> Iterator[None]:
    """Raises UserError of one line in place of an error, of whatever type, that says that the disk
    is full."""
    where = epath.Path(folder)
    try:
        yield
    except Exception as e:
        if not disk_is_full(e):
            raise
        free = next((shutil.disk_usage(p).free for p in (where, *where.parents) if p.exists()), 0)
        raise UserError(
            f'config.workdir: no space left to write "{where}" ({free:,} bytes free); what was '
            "complete is intact; free some space and run the same command again"
        ) from e


def _drop_traceback(record: std_logging.LogRecord) -> bool:
    """Orbax logs each error of its threads with a traceback and then raises it too: once is
    enough."""
    if record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname:
        record.exc_info = None
    return True


def _shorten(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _show(flat: dict[str, Any], name: str) -> str:
    return json.dumps(flat[name]) if name in flat else "absent"


def _tell(flat: dict[str, Any], name: str) -> str:
    """The same, cut: a template may have many lines."""
    shown = _show(flat, name)
    return shown if len(shown) <= 120 else f"{shown[:117]}..."
