"""What a sweep scores, opened: the models of a run at a step, or base models. Weights are loaded
when they are asked for; what they are is told by the content of their files."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath
from jax.sharding import Mesh

from popi_jax.arrays import Frozen, Params
from popi_jax.checkpoints import hf_config, hub, manager
from popi_jax.checkpoints.content import Hashes
from popi_jax.checkpoints.hf_io import read_params
from popi_jax.checkpoints.hf_write import MARK
from popi_jax.config import Config, from_json
from popi_jax.data import tokenizer
from popi_jax.data.prompts import WORDING
from popi_jax.data.tokenizer import Tokenizer
from popi_jax.errors import UserError
from popi_jax.evals.conditions import BEFORE_RL, TRAINED
from popi_jax.evals.sweep_plan import BASE, parse_model
from popi_jax.run import LAYOUT, RoleParts, Roles, make_roles
from popi_jax.training import reference, setup
from popi_jax.training.restore import restore_role, restore_start

# settings of the command that a run's own give way to: they change no answer
_OF_THE_COMMAND = ("mesh", "evaluation")
# fields of a TransformerConfig that say how it is computed, not what
_SPEED = ("rules", "rollout_rules", "kernel", "remat")


class Weights(NamedTuple):
    identify: Callable[[Hashes], list[Any]]  # what they are
    load: Callable[[], Params]  # laid out on the mesh


class Reader(NamedTuple):
    """A generator that is scored, and what its margins are measured from."""

    config: Config
    parts: RoleParts
    weights: Weights
    reference: Weights


class Subject(NamedTuple):
    """An entry of a sweep's models."""

    roles: Roles
    step: int | None  # None: base models have none
    trained_on: str  # the kind of data that a run was trained on, "" for base models
    writers: dict[str, Weights]  # of the inference model; TRAINED and, of a run, BEFORE_RL
    readers: dict[str, Reader]  # by the same names


def open_subject(model: str, command: Config, mesh: Mesh) -> Subject:
    """Opens WORKDIR, WORKDIR@STEP or hf:BASE. command: what runs on this machine, and of base
    models all settings.

    Raises: UserError where there is no such run, step or model."""
    if model.startswith(BASE):
        return _open_base_models(model.removeprefix(BASE), command, mesh)
    return _open_run(*parse_model(model), command, mesh)


def open_reader(place: str, command: Config, mesh: Mesh) -> Reader:
    """A base model as a generator: its margins are measured from itself without a text about the
    user. Raises: UserError."""
    config, words, folder = _open_folder(place, command)
    parts = make_roles(config, words)[1]
    weights = _name_folder(config, parts, mesh, folder)
    return Reader(config, parts, weights, weights)


def identify_shape(parts: RoleParts) -> dict[str, Any]:
    shape = dataclasses.asdict(parts.model)
    return {name: str(value) for name, value in shape.items() if name not in _SPEED}


def _open_run(workdir: str, step: int | None, command: Config, mesh: Mesh) -> Subject:
    stored = manager.read_config(workdir, step)
    if stored is None:
        raise UserError(f'no run in "{workdir}"; name the WORKDIR of a run, or {BASE}FOLDER')
    origin, base = stored.pop("dataset", {}), stored.pop("base", {})
    if origin.get("layout") != LAYOUT:
        raise UserError(
            f'"{workdir}" is a run of another version of this program (layout '
            f"{origin.get('layout')}, this one reads {LAYOUT}); train it again"
        )
    steps = manager.list_steps(workdir)
    if step is not None and step not in steps:
        there = ", ".join(map(str, sorted(steps))) or "none"
        raise UserError(f'"{workdir}" has no step {step}; the steps that are there: {there}')
    if not steps:
        raise UserError(f'"{workdir}" has no checkpoint; train first')
    step = steps[0] if step is None else step
    config = _read_stored(stored, workdir, command)
    place = hub.open_base(config.model.checkpoint, base.get("commit", "")).folder
    config = _set_checkpoint(config, place)
    folder = epath.Path(workdir)
    words = tokenizer.load(folder / "tokenizer", system_role=config.model.summary_place == "system")
    roles = Roles(config, mesh, *make_roles(config, words))
    start = functools.cache(lambda: _restore_start(roles))

    def name(role: str) -> tuple[Weights, Weights]:
        scale = setup.adapter_scale(getattr(config, role))

        def stand(hashes: Hashes, saved: list[Any]) -> list[Any]:
            return [*saved, hashes.hash_model(place), scale] if scale else saved

        def identify_now(hashes: Hashes) -> list[Any]:
            here = folder / "checkpoints" / str(step)
            item = here / f"{role}_ema"
            item = item if item.exists() else here / role
            return stand(hashes, [hashes.hash_saved(item)])

        def identify_start(hashes: Hashes) -> list[Any]:
            own = [] if scale else [hashes.hash_saved(folder / "reference" / role)]
            return stand(hashes, own)

        return (
            Weights(identify_now, lambda: restore_role(roles, role, step)[1]),
            Weights(identify_start, lambda: getattr(start(), role)),
        )

    writer, first_writer = name("inference")
    reader, first_reader = name("generator")
    parts = roles.generator
    return Subject(
        roles,
        step,
        origin.get("data", ""),
        {TRAINED: writer, BEFORE_RL: first_writer},
        {
            TRAINED: Reader(config, parts, reader, first_reader),
            BEFORE_RL: Reader(config, parts, first_reader, first_reader),
        },
    )


def _restore_start(roles: Roles) -> Frozen:
    return restore_start(
        roles, reference.read_base(roles.config, roles.inference.model, roles.mesh)
    )


def _open_base_models(place: str, command: Config, mesh: Mesh) -> Subject:
    config, words, folder = _open_folder(place, command)
    roles = Roles(config, mesh, *make_roles(config, words))
    weights = _name_folder(config, roles.inference, mesh, folder)
    reader = Reader(config, roles.generator, weights, weights)
    return Subject(roles, None, "", {TRAINED: weights}, {TRAINED: reader})


def _open_folder(place: str, command: Config) -> tuple[Config, Tokenizer, str]:
    folder = hub.open_base(place).folder
    if not folder:
        raise UserError(f"{BASE} names no base model; write {BASE}FOLDER or {BASE}org/name")
    config = _set_checkpoint(command, folder)
    model = dataclasses.replace(config.model, **_read_wording(folder))
    config, system_role = dataclasses.replace(config, model=model), model.summary_place == "system"
    return config, tokenizer.load(folder, system_role=system_role), folder


def _read_wording(folder: str) -> dict[str, Any]:
    """How the prompts of an export of ours are worded, as it was trained; of other models
    nothing."""
    described = json.loads((epath.Path(folder) / "config.json").read_text())
    wording = described.get(MARK, {}).get("wording", {})
    return {name: wording[name] for name in WORDING if name in wording}


def _name_folder(config: Config, parts: RoleParts, mesh: Mesh, folder: str) -> Weights:
    def load() -> Params:
        shapes = setup.abstract_params(parts.model, mesh, config.model.dtype)
        return read_params(folder, parts.model, shapes)

    return Weights(lambda hashes: [hashes.hash_model(folder)], load)


def _set_checkpoint(config: Config, folder: str) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, checkpoint=folder))


def _read_stored(stored: dict[str, Any], workdir: str, command: Config) -> Config:
    """The settings of a run, with those of the command that say how and where it is scored. A
    setting that is newer than the run has its default."""
    config = from_json(json.dumps(_fill(stored, dataclasses.asdict(Config()))))
    changed = {name: getattr(command, name) for name in _OF_THE_COMMAND}
    data = dataclasses.replace(config.data, prepared=command.data.prepared)
    model = dataclasses.replace(
        config.model, attention=command.model.attention, remat=command.model.remat
    )
    return dataclasses.replace(config, workdir=workdir, data=data, model=model, **changed)


def _fill(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    filled = defaults | values
    for name, default in defaults.items():
        if isinstance(default, dict) and isinstance(filled[name], dict):
            filled[name] = _fill(filled[name], default)
    return filled


def check_room(reader: Reader, longest: int) -> None:
    """longest: tokens of the longest row. Raises: UserError where the model has no positions for
    it."""
    folder = reader.config.model.checkpoint
    usable = hf_config.read_base(folder).usable_len if folder else None
    if usable is not None and longest > usable:
        raise UserError(
            f"{folder}: a row of {longest} tokens is longer than its context of {usable} "
            "(max_position_embeddings); lower data.context_len, data.turn_len or data.answer_len, "
            "or choose fewer signals"
        )
