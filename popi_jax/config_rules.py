"""How a setting is declared and checked: its own value, then what several values have to keep.

Knows no single declaration: those are in config.py. Imports no jax, so that a wrong field is told
at once."""

import dataclasses
import json
import math
import operator
import os
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from popi_jax.errors import UserError, check_field, did_you_mean

if typing.TYPE_CHECKING:
    from popi_jax.config import Config, MeshConfig

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
MESH_AXES = ("data", "fsdp", "tensor", "sequence")
# axes of arrays that rules may split
LOGICAL_AXES = (
    "batch",
    "seq",
    "vocab",
    "vocab_embed",
    "embed",
    "heads",
    "kv_heads",
    "mlp",
    "attention_heads",
)
# Weights are split by all axes but `data`, and gathered layer by layer where they are used; users
# by `data` and `fsdp`. What is not named is whole.
RULES = (
    "batch data fsdp",
    "seq sequence",
    "vocab tensor",
    "vocab_embed fsdp",
    "embed fsdp",
    "heads tensor",
    "kv_heads tensor",
    "mlp tensor",
    "attention_heads tensor sequence",
)
# While summaries are sampled: matrices are split by their heads or hidden units alone, so that no
# step gathers them.
ROLLOUT_RULES = (
    "batch data fsdp",
    "vocab tensor",
    "heads tensor",
    "kv_heads tensor",
    "mlp tensor",
    "attention_heads tensor",
)


class Allowed(NamedTuple):
    """What one value must be: how it is told, what decides, and the words if it is one of some."""

    text: str
    holds: Callable[[Any], bool]
    words: tuple[str, ...] = ()


def at_least(least: int, why: str = "") -> Allowed:
    return Allowed(f"must be at least {least}{why and f' ({why})'}", lambda x: x >= least)


def one_of(*words: str) -> Allowed:
    named = ", ".join(word or "''" for word in words)
    return Allowed(f"must be one of {named}.", lambda x: x in words, words)


def some_of(*words: str) -> Allowed:
    text = f"must be some of {', '.join(words)}"
    return Allowed(text, lambda x: bool(x) and {*x} <= {*words}, words)


ABOVE_ZERO = Allowed("must be above 0", lambda x: x > 0)
FRACTION = Allowed("must be between 0 and 1", lambda x: 0 <= x <= 1)
BELOW_ONE = Allowed("must be at least 0 and below 1", lambda x: 0 <= x < 1)
BELOW_HALF = Allowed("must be at least 0 and below 0.5", lambda x: 0 <= x < 0.5)
EVEN = Allowed("must be even (rotary positions rotate pairs)", lambda x: x % 2 == 0)
HAS_END = at_least(2, "the end token is counted")
AXIS = Allowed(
    "must be at least 1, or -1 for all devices that are left", lambda x: x == -1 or x >= 1
)
JSON_OBJECT = Allowed(
    """must be a JSON object, as '{"enable_thinking": false}', or ''""", lambda x: _is_object(x)
)
FOLDER = Allowed("must name a folder", bool)
ON_DISK = Allowed("must be on a disk of this machine; copy it here first", lambda x: "://" not in x)
PLACE = Allowed("must name the folder or file of the data", bool)
NAME = Allowed(
    "must consist of letters, digits, '_', '-' and '.'",
    lambda x: re.fullmatch(r"[A-Za-z0-9_.-]+", x) is not None,
)


def _is_object(text: str) -> bool:
    try:
        return not text or isinstance(json.loads(text), dict)
    except ValueError:
        return False


class Setting(NamedTuple):
    """A declared field; `name` is its path, e.g. "inference.group_size"."""

    name: str
    kind: Any
    default: Any
    meaning: str
    allowed: tuple[Allowed, ...]
    free: bool
    data: bool
    path: bool


def setting(
    default: Any,
    meaning: str,
    *allowed: Allowed,
    free: bool = False,
    data: bool = False,
    path: bool = False,
) -> Any:
    """Declares a field of a section, which is a frozen dataclass.

    Args:
        meaning: a line for --help. free: a run may go on with another value: where things are, how
            fast, and what is looked at, but not what is learned. data: it decides what a prepared
            copy of the data holds. path: "~" at its beginning is a home folder."""
    declared = {"meaning": meaning, "allowed": allowed, "free": free, "data": data, "path": path}
    return dataclasses.field(default=default, metadata=declared)


def list_settings(section: type, prefix: str = "") -> list[Setting]:
    """Returns the declared fields of a section and of those inside it, in order."""
    found: list[Setting] = []
    for field in dataclasses.fields(section):
        name, kind = prefix + field.name, typing.cast(type, field.type)
        if dataclasses.is_dataclass(kind):
            found += list_settings(kind, f"{name}.")
        else:
            found.append(Setting(name, kind, field.default, **field.metadata))
    return found


def read_section(section: type, values: Any, prefix: str) -> Any:
    """Makes a section of `values`, which must have each field; `prefix` is its path with a dot.

    Raises:
        UserError: one line that names the field, what it is and what is allowed."""
    fields = {field.name: field for field in dataclasses.fields(section)}
    if not isinstance(values, Mapping):
        rule = f"is a section and cannot be set to {values!r}; set its fields one by one"
        raise UserError(f"config.{prefix[:-1]} {rule}")
    for name in values:
        if name not in fields:
            hint = did_you_mean(name, fields)
            raise UserError(f"config.{prefix}{name}: there is no such field.{hint}")
    for name in fields:
        if name not in values:
            raise UserError(
                f"config.{prefix}{name} is missing; its default is in popi_jax/config.py"
            )
    read = {name: _read(field, values[name], prefix + name) for name, field in fields.items()}
    return section(**read)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns path of a field -> value, e.g. "inference.group_size" -> 8."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inside = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{name}.") if inside else {prefix + name: value}
    return flat


def expand_home(path: str, name: str) -> str:
    """Returns a path with the home folder in place of "~" or "~user" at its beginning; `name` is
    that of the setting or flag.

    Raises:
        UserError: one line, when that user has no home folder."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = path.partition("/")[0]
        told = f"there is no home folder {user}; write ./{path} for a folder of that name"
        raise UserError(f'{name} = "{path}": {told}')
    return found


def check_together(config: "Config") -> None:
    """Checks the rules that concern several fields.

    Raises:
        UserError: one line."""
    d, m, b = config.data, config.model, config.batch
    rule = "leaves no training users, with data.validation_fraction = "
    rule += f"{d.validation_fraction}; their sum must be below 1"
    held_out = d.validation_fraction + d.test_fraction
    _require(config, held_out < 1, "data.test_fraction", rule)
    rule = f"must be at most data.num_pairs = {d.num_pairs}, the pairs that are kept of a user"
    _require(config, b.pairs <= d.num_pairs, "batch.pairs", rule)
    rule = "must be 1 with data.prompt_aware: a summary is for one prompt"
    _require(config, b.pairs == 1 or not d.prompt_aware, "batch.pairs", rule)
    rule = f"must divide model.num_heads = {m.num_heads}"
    _require(config, m.num_heads % m.num_kv_heads == 0, "model.num_kv_heads", rule)
    rule = "must be 0 with model.checkpoint: released weights need no warm-up; "
    rule += "use model=pretrained or set it to 0"
    _require(config, config.warmup.steps == 0 or not m.checkpoint, "warmup.steps", rule)
    rule = "is of the chat template of a base model (model.checkpoint); set it to ''"
    _require(config, bool(m.checkpoint) or not m.template_args, "model.template_args", rule)
    _check_roles(config)
    _check_baseline(config)
    rule = f"must divide batch.users = {b.users}"
    _require(config, b.users % b.microbatches == 0, "batch.microbatches", rule)
    rule = "must be 1 where inference.high_entropy_share is below 1, a share of the whole batch"
    whole = config.inference.high_entropy_share == 1
    _require(config, b.microbatches == 1 or whole, "batch.microbatches", rule)
    rule = "is empty and warmup.steps = 0: there is nothing to train"
    trains = bool(config.schedule.phases) or config.warmup.steps > 0
    _require(config, trains, "schedule.phases", rule)
    axes = [getattr(config.mesh, axis) for axis in MESH_AXES]
    rule = f"only one of {', '.join(f'mesh.{axis}' for axis in MESH_AXES)} may be -1"
    _require(config, axes.count(-1) <= 1, "mesh.fsdp", rule)
    parse_rules(config.mesh.rules, "mesh.rules")
    parse_rules(config.mesh.rollout_rules, "mesh.rollout_rules")
    if config.mesh.num_devices or -1 not in axes:
        check_mesh(config, config.mesh.num_devices or math.prod(axes))


def resolve_mesh(mesh: "MeshConfig", num_devices: int) -> tuple[int, int, int, int]:
    """Returns the number of devices along MESH_AXES, with -1 replaced by what is left of
    `num_devices`.

    Raises:
        UserError: when the axes do not multiply to `num_devices`."""
    shape = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    known = math.prod(n for n in shape.values() if n != -1)
    fits = num_devices % known == 0 if -1 in shape.values() else num_devices == known
    if not fits:
        axes = ", ".join(f"{axis}={size}" for axis, size in shape.items())
        raise UserError(
            f"config.mesh ({axes}) does not fit {num_devices} devices: the product of the axes "
            "must be their number; set one axis to -1 for all that are left"
        )
    data, fsdp, tensor, sequence = (num_devices // known if n == -1 else n for n in shape.values())
    return data, fsdp, tensor, sequence


def parse_rules(rules: tuple[str, ...], field: str) -> dict[str, tuple[str, ...]]:
    """Parses rules like "batch data fsdp": logical axis -> the mesh axes that split it.

    Raises:
        UserError: for an unknown or repeated logical axis, an unknown mesh axis or one that is
        given twice."""
    found: dict[str, tuple[str, ...]] = {}
    for number, rule in enumerate(rules):
        where = f"{field}[{number}]"
        name, *axes = rule.split() or [""]
        known = f"must begin with one of {', '.join(LOGICAL_AXES)}."
        hint = did_you_mean(name, LOGICAL_AXES)
        check_field(name in LOGICAL_AXES, where, rule, known + hint)
        check_field(name not in found, where, rule, f"{name} has a rule already")
        for axis in axes:
            known = f"{axis} is no mesh axis; these are {', '.join(MESH_AXES)}."
            check_field(axis in MESH_AXES, where, rule, known + did_you_mean(axis, MESH_AXES))
        check_field(len(set(axes)) == len(axes), where, rule, "names a mesh axis twice")
        found[name] = tuple(axes)
    return found


def check_mesh(config: "Config", num_devices: int) -> None:
    """Checks what depends on the number of devices: called with the real number once it is known.

    Raises:
        UserError: when a batch does not divide over the mesh, or the heads over the axes that split
        them."""
    sizes = dict(zip(MESH_AXES, resolve_mesh(config.mesh, num_devices), strict=True))
    split = {"batch": ["batch.users", "evaluation.batch_users"], "kv_heads": [], "mlp": []}
    if config.warmup.steps:
        users = ("generator_users", "summary_users", "reading_users")
        split["batch"] += [f"warmup.{name}" for name in users]
    if not config.model.checkpoint:  # else the shape is known when its files are read
        split |= {"kv_heads": ["model.num_kv_heads"], "mlp": ["model.mlp_dim"]}
    for field in ("rules", "rollout_rules"):
        rules = parse_rules(getattr(config.mesh, field), f"mesh.{field}")
        for logical, names in split.items():
            axes = rules.get(logical, ())
            count = math.prod(sizes[axis] for axis in axes)
            along = " and ".join(f"mesh.{axis}" for axis in axes)
            rule = f"must be a multiple of {along} = {count}"
            if logical == "batch":
                rule = f"must be a multiple of {count}, the devices along {along}"
            for name in names:
                _require(config, operator.attrgetter(name)(config) % count == 0, name, rule)
            if logical == "batch":
                part = config.batch.users // config.batch.microbatches
                rule = f"leaves parts of {part} users; must be multiples of {count}, "
                rule += f"the devices along {along}"
                _require(config, part % count == 0, "batch.microbatches", rule)


def _check_roles(config: "Config") -> None:
    """What the two roles and their optimizer can be combined with."""
    g, i = config.generator, config.inference
    rule = f"must be above 0 with generator.objective = {g.objective}, "
    rule += "whose likelihood term it weighs; as published, 1"
    weighed = g.objective in ("orpo", "cpo", "rrhf")
    _require(config, g.sft_coef > 0 or not weighed, "generator.sft_coef", rule)
    rule = (
        f"does not go with generator.objective = {g.objective}; take dpo, robust, hinge, slic or "
    )
    rule += "cpo, or set it to false"
    divided = g.objective in ("dpo", "robust", "hinge", "slic", "cpo")
    _require(config, divided or not g.over_beta, "generator.over_beta", rule)
    rule = "must be log_sigmoid with generator.over_beta, which divides the loss and that reward"
    same = i.reward == "log_sigmoid" or not g.over_beta
    _require(config, same, "inference.reward", rule)
    rule = "needs an average: set generator.ema_decay above 0, e.g. 0.99, or take current or frozen"
    kept = i.reward_generator != "ema" or g.ema_decay > 0
    _require(config, kept, "inference.reward_generator", rule)
    rule = f'goes with inference.kl = "k3" only, not "{i.kl}", whose gradient it would make wrong'
    _require(config, not i.kl_corrected or i.kl == "k3", "inference.kl_corrected", rule)
    rule = f"must be 0 (no bound) or more than 1 + inference.clip_high = {1 + i.clip_high}"
    bounded = i.clip_max == 0 or i.clip_max > 1 + i.clip_high
    _require(config, bounded, "inference.clip_max", rule)
    optimizer = config.optimizer.name
    for name, lora in (("generator.lora.rank", g.lora), ("inference.lora.rank", i.lora)):
        rule = "needs base weights (model.checkpoint); from random weights all parameters are "
        rule += "trained: set it to 0"
        _require(config, lora.rank == 0 or config.model.checkpoint != "", name, rule)
        rule = f'must be 0 with optimizer.name = "{optimizer}", which is for whole matrices; '
        rule += "take adamw"
        _require(config, lora.rank == 0 or optimizer != "muon", name, rule)


def _check_baseline(config: "Config") -> None:
    """A generator that reads no summaries has no part in updates that write some."""
    told, phases = config.generator.reads, config.schedule.phases
    rule = f'holds more than "generator N", but with generator.reads = "{told}" there are no '
    rule += "summaries; take generator phases alone, or generator.reads=summary"
    alone = all(phase.split()[:1] == ["generator"] for phase in phases)
    _require(config, told == "summary" or alone, "schedule.phases", rule)


def _require(config: "Config", ok: bool, name: str, rule: str) -> None:
    check_field(ok, name, operator.attrgetter(name)(config), rule)


def _read(field: dataclasses.Field, value: Any, name: str) -> Any:
    """Checks one value by the declaration of its field."""
    kind = typing.cast(type, field.type)
    if dataclasses.is_dataclass(kind):
        return read_section(kind, value, f"{name}.")
    if kind == tuple[str, ...]:
        ok = isinstance(value, (tuple, list)) and all(isinstance(v, str) for v in value)
        check_field(ok, name, value, "must be a tuple of strings")
        value = tuple(value)
    else:
        value = float(value) if kind is float and type(value) is int else value
        check_field(type(value) is kind, name, value, f"must be {KINDS[kind]}")
        finite = kind is not float or math.isfinite(value)
        check_field(finite, name, value, "must be a finite number")
    if field.metadata["path"]:
        value = expand_home(value, f"config.{name}")
    for allowed in field.metadata["allowed"]:
        hint = did_you_mean(value, allowed.words) if isinstance(value, str) else ""
        check_field(allowed.holds(value), name, value, allowed.text + hint)
    return value
