"""Makes the configuration from the ConfigDict of configs/ or from JSON, and checks every field.

Refuses to guess: a missing, unknown or ill-typed field is an error. Imports no jax, so that a wrong
field is reported at once."""

import dataclasses
import json
import math
import os
import re
import typing
from collections.abc import Mapping
from typing import Any

from popi_jax.config import LOGICAL_AXES, MESH_AXES, Config, MeshConfig, Mode, Phase
from popi_jax.errors import UserError, did_you_mean

if typing.TYPE_CHECKING:
    from ml_collections import ConfigDict

WORDS: dict[str, tuple[str, ...]] = {
    "data.source": ("prism", "prefeval", "jsonl"),
    "data.on_bad_row": ("error", "skip"),
    "data.split_by": ("user", "topic"),
    "data.pair_mode": ("best_vs_worst", "best_vs_rest", "all_pairs"),
    "data.pair_layout": ("paired", "grouped"),
    "data.turns": ("first", "all"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "model.attention": ("auto", "chunked", "splash", "cudnn"),
    "generator.objective": (
        "dpo",
        "robust",
        "ipo",
        "hinge",
        "kto",
        "slic",
        "cpo",
        "simpo",
        "orpo",
        "rrhf",
    ),
    "generator.reference": ("prompt", "summary"),
    "inference.reward": ("log_sigmoid", "accuracy", "margin"),
    "inference.reward_generator": ("current", "ema", "frozen"),
    "inference.advantage_baseline": ("group", "leave_one_out", "batch"),
    "inference.advantage_scale": ("group", "batch", "batch_rewards", "whiten", "none"),
    "inference.ratio": ("token", "sequence", "sequence_token"),
    "inference.normalise": ("samples", "sequences", "tokens", "max_len"),
    "inference.kl": ("k1", "k2", "k3"),
    "optimizer.name": ("adamw", "lion", "muon", "adafactor"),
    "optimizer.schedule": ("cosine", "linear", "constant"),
}
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")

# least value -> fields; the reason, where one is needed, is in REASONS
AT_LEAST: dict[int, list[str]] = {
    0: """
        seed data.num_shots data.workers warmup.steps warmup.readings warmup.lr_warmup_steps generator.gamma
        generator.sft_coef generator.desirable_weight generator.undesirable_weight generator.lora.rank
        generator.lr_warmup_steps inference.length_penalty inference.clip_low inference.clip_high inference.clip_max
        inference.kl_coef inference.entropy_coef inference.lora.rank inference.lr_warmup_steps optimizer.weight_decay
        mesh.num_devices evaluation.max_users
    """.split(),
    1: """
        data.num_pairs data.score_margin data.sample_people data.context_len data.turn_len model.num_layers
        model.embed_dim model.num_heads model.num_kv_heads model.mlp_dim warmup.generator_users warmup.summary_users
        warmup.reading_users warmup.reading_shots inference.updates_per_rollout batch.users batch.pairs
        batch.microbatches schedule.log_every schedule.save_every schedule.keep evaluation.batch_users
    """.split(),
    2: "data.answer_len data.summary_len model.head_dim inference.group_size".split(),
    300: ["model.vocab_size"],
}
REASONS = {
    "data.answer_len": "the end token is counted",
    "data.summary_len": "the end token is counted",
    "inference.group_size": "a reward is compared with those of the user's other summaries",
    "model.vocab_size": "the tokenizer starts from 256 bytes and its control tokens",
}
ABOVE_ZERO = """
    model.rope_theta model.norm_eps warmup.learning_rate generator.beta generator.lora.alpha generator.learning_rate
    inference.temperature inference.high_entropy_share inference.lora.alpha inference.learning_rate optimizer.clip_norm
    batch.summary_fill
""".split()
FRACTIONS = """
    data.validation_fraction data.test_fraction warmup.reading_survey warmup.guess warmup.no_summary warmup.drop
    warmup.repeat warmup.wrong inference.high_entropy_share optimizer.final_lr batch.summary_fill
""".split()
BELOW_ONE = (
    "optimizer.b1 optimizer.b2 data.test_fraction data.validation_fraction generator.ema_decay inference.ema_decay"
).split()


def from_config_dict(c: "ConfigDict") -> Config:
    """Returns the checked configuration.

    Raises:
        UserError: one line that names the field, what it is and what is allowed.
    """
    return _from_mapping(c.to_dict())


def to_json(config: Config) -> str:
    """Returns JSON from which `from_json` makes an equal Config."""
    return json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False) + "\n"


def from_json(text: str | bytes) -> Config:
    """Inverse of `to_json`.

    Raises:
        UserError: as `from_config_dict`, or when the text is not JSON.
    """
    try:
        values = json.loads(text)
    except ValueError as e:
        raise UserError(f"the saved configuration is not JSON: {e}") from None
    if not isinstance(values, dict):
        raise UserError("the saved configuration is not a JSON object")
    return _from_mapping(values)


def parse_phases(phases: tuple[str, ...]) -> tuple[Phase, ...]:
    """Parses the phases of a schedule, e.g. ("inference 240", "alternate 2:1 60").

    Raises:
        UserError: for anything that is not one of the four forms with whole numbers of at least 1.
    """
    return tuple(_parse_phase(phase, f"schedule.phases[{i}]") for i, phase in enumerate(phases))


def resolve_mesh(mesh: MeshConfig, num_devices: int) -> tuple[int, int, int, int]:
    """Returns the number of devices along MESH_AXES, with -1 replaced by what is left of
    `num_devices`.

    Raises:
        UserError: when the axes do not multiply to `num_devices`.
    """
    shape = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    known = math.prod(n for n in shape.values() if n != -1)
    fits = num_devices % known == 0 if -1 in shape.values() else num_devices == known
    if not fits:
        axes = ", ".join(f"{axis}={size}" for axis, size in shape.items())
        raise UserError(
            f"config.mesh ({axes}) does not fit {num_devices} devices: the product of the axes must be their number; "
            "set one axis to -1 for all that are left"
        )
    data, fsdp, tensor, sequence = (num_devices // known if n == -1 else n for n in shape.values())
    return data, fsdp, tensor, sequence


def parse_rules(rules: tuple[str, ...], field: str) -> dict[str, tuple[str, ...]]:
    """Parses rules like "batch data fsdp": logical axis -> the mesh axes that split it.

    Raises:
        UserError: for an unknown or repeated logical axis, an unknown mesh axis or one that is
        given twice.
    """
    found: dict[str, tuple[str, ...]] = {}
    for number, rule in enumerate(rules):
        name, *axes = rule.split() or [""]
        where = f"{field}[{number}]"
        known = name in LOGICAL_AXES
        _check(
            known,
            where,
            rule,
            f"must begin with one of {', '.join(LOGICAL_AXES)}.{did_you_mean(name, LOGICAL_AXES)}",
        )
        _check(name not in found, where, rule, f"{name} has a rule already")
        for axis in axes:
            hint = did_you_mean(axis, MESH_AXES)
            _check(
                axis in MESH_AXES,
                where,
                rule,
                f"{axis} is no mesh axis; these are {', '.join(MESH_AXES)}.{hint}",
            )
        _check(len(set(axes)) == len(axes), where, rule, "names a mesh axis twice")
        found[name] = tuple(axes)
    return found


def check_mesh(config: Config, num_devices: int) -> None:
    """Checks what depends on the number of devices: called with the real number once it is known.

    Raises:
        UserError: when a batch does not divide over the mesh, or the heads over the axes that split
        them.
    """
    sizes = dict(zip(MESH_AXES, resolve_mesh(config.mesh, num_devices), strict=True))
    rules = {
        name: parse_rules(getattr(config.mesh, name), f"mesh.{name}")
        for name in ("rules", "rollout_rules")
    }

    def split(axes: tuple[str, ...]) -> tuple[int, str]:
        return math.prod(sizes[axis] for axis in axes), " and ".join(
            f"mesh.{axis}" for axis in axes
        )

    batches = {"evaluation.batch_users": config.evaluation.batch_users}
    if config.warmup.steps:
        batches |= {"warmup.generator_users": config.warmup.generator_users}
        batches |= {
            f"warmup.{name}": getattr(config.warmup, name)
            for name in ("summary_users", "reading_users")
        }
    for table in rules.values():
        count, along = split(table.get("batch", ()))
        for name, users in {"batch.users": config.batch.users, **batches}.items():
            _check(
                users % count == 0,
                name,
                users,
                f"must be a multiple of {count}, the devices along {along}",
            )
        parts = config.batch.microbatches
        rule = f"leaves parts of {config.batch.users // parts} users; must be multiples of {count}, the devices along "
        rule += along
        _check(config.batch.users // parts % count == 0, "batch.microbatches", parts, rule)
        if not config.model.checkpoint:
            for axis in ("num_kv_heads", "mlp_dim"):
                count, along = split(
                    table.get({"num_kv_heads": "kv_heads", "mlp_dim": "mlp"}[axis], ())
                )
                size = getattr(config.model, axis)
                _check(
                    size % count == 0,
                    f"model.{axis}",
                    size,
                    f"must be a multiple of {along} = {count}",
                )


def _from_mapping(values: Mapping[str, Any]) -> Config:
    config = _build(Config, values, "")
    if not config.workdir:
        config = dataclasses.replace(config, workdir=os.path.join("work", config.name))
    _check_fields(config)
    _check_together(config)
    return config


def _build(cls: type, values: Any, prefix: str) -> Any:
    """Makes the dataclass `cls` of `values`, recursively; `prefix` is the path of the section with
    a final dot."""
    hints = typing.get_type_hints(cls)
    if not isinstance(values, Mapping):
        raise UserError(
            f"config.{prefix[:-1]} is a section and cannot be set to {values!r}; set its fields one by one"
        )
    for name in values:
        if name not in hints:
            raise UserError(
                f"config.{prefix}{name}: there is no such field.{did_you_mean(name, hints)}"
            )
    for name in hints:
        if name not in values:
            raise UserError(f"config.{prefix}{name} is missing; its default is in configs/base.py")
    return cls(**{name: _typed(hint, values[name], prefix + name) for name, hint in hints.items()})


def _typed(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, name + ".")
    if hint is float and type(value) is int:
        return float(value)
    if hint == tuple[str, ...]:
        ok = isinstance(value, (tuple, list)) and all(isinstance(v, str) for v in value)
        _check(ok, name, value, "must be a tuple of strings")
        return tuple(value)
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    _check(type(value) is hint, name, value, f"must be {kinds[hint]}")
    if hint is float:
        _check(math.isfinite(value), name, value, "must be a finite number")
    return value


def _check_fields(config: Config) -> None:
    """Ranges and allowed words of single fields."""
    for name, words in WORDS.items():
        value = _get(config, name)
        _check(
            value in words,
            name,
            value,
            f"must be one of {', '.join(words)}.{did_you_mean(value, words)}",
        )
    for least, names in AT_LEAST.items():
        for name in names:
            why = f" ({REASONS[name]})" if name in REASONS else ""
            _check(
                _get(config, name) >= least,
                name,
                _get(config, name),
                f"must be at least {least}{why}",
            )
    for name in ABOVE_ZERO:
        _check(_get(config, name) > 0, name, _get(config, name), "must be above 0")
    for name in FRACTIONS:
        _check(0 <= _get(config, name) <= 1, name, _get(config, name), "must be between 0 and 1")
    for name in BELOW_ONE:
        _check(
            0 <= _get(config, name) < 1, name, _get(config, name), "must be at least 0 and below 1"
        )
    for name in (f"mesh.{axis}" for axis in MESH_AXES):
        rule = "must be at least 1, or -1 for all devices that are left"
        _check(_get(config, name) == -1 or _get(config, name) >= 1, name, _get(config, name), rule)
    named = re.fullmatch(r"[A-Za-z0-9_.-]+", config.name) is not None
    _check(named, "name", config.name, "must consist of letters, digits, '_', '-' and '.'")
    _check(
        config.data.path != "",
        "data.path",
        config.data.path,
        "must name the folder or file of the data",
    )
    _check(config.data.prepared != "", "data.prepared", config.data.prepared, "must name a folder")


def _check_together(config: Config) -> None:
    """Rules that concern several fields."""
    d, m = config.data, config.model
    held_out = d.validation_fraction + d.test_fraction
    rule = f"leaves no training users, with data.validation_fraction = {d.validation_fraction}; their sum must be below 1"
    _check(held_out < 1, "data.test_fraction", d.test_fraction, rule)
    rule = f'is possible for the source prefeval only, not for data.source = "{d.source}"; use data.split_by=user'
    _check(d.split_by == "user" or d.source == "prefeval", "data.split_by", d.split_by, rule)
    rule = f"must be at most data.num_pairs = {d.num_pairs}, the pairs that are kept of a user"
    _check(config.batch.pairs <= d.num_pairs, "batch.pairs", config.batch.pairs, rule)
    _check(
        m.num_heads % m.num_kv_heads == 0,
        "model.num_kv_heads",
        m.num_kv_heads,
        f"must divide model.num_heads = {m.num_heads}",
    )
    _check(
        m.head_dim % 2 == 0,
        "model.head_dim",
        m.head_dim,
        "must be even (rotary positions rotate pairs)",
    )
    rule = "must be 0 with model.checkpoint: released weights need no warm-up; use model=pretrained or set it to 0"
    _check(config.warmup.steps == 0 or not m.checkpoint, "warmup.steps", config.warmup.steps, rule)
    _check_roles(config)
    phases = parse_phases(config.schedule.phases)
    rule = "is empty and warmup.steps = 0: there is nothing to train"
    _check(bool(phases) or config.warmup.steps > 0, "schedule.phases", config.schedule.phases, rule)
    axes = tuple(getattr(config.mesh, axis) for axis in MESH_AXES)
    rule = f"only one of {', '.join(f'mesh.{axis}' for axis in MESH_AXES)} may be -1"
    _check(axes.count(-1) <= 1, "mesh.fsdp", config.mesh.fsdp, rule)
    parse_rules(config.mesh.rules, "mesh.rules")
    parse_rules(config.mesh.rollout_rules, "mesh.rollout_rules")
    if config.mesh.num_devices:
        check_mesh(config, config.mesh.num_devices)
    elif -1 not in axes:
        check_mesh(config, math.prod(axes))


def _check_roles(config: Config) -> None:
    """What the two roles and their optimizer can be combined with."""
    g, i, b = config.generator, config.inference, config.batch
    _check(
        g.label_smoothing < 0.5,
        "generator.label_smoothing",
        g.label_smoothing,
        "must be at least 0 and below 0.5",
    )
    rule = f"must be above 0 with generator.objective = {g.objective}, whose likelihood term it weighs; as published, 1"
    _check(
        g.sft_coef > 0 or g.objective not in ("orpo", "cpo", "rrhf"),
        "generator.sft_coef",
        g.sft_coef,
        rule,
    )
    rule = "needs an average: set generator.ema_decay above 0, e.g. 0.99, or take current or frozen"
    _check(
        i.reward_generator != "ema" or g.ema_decay > 0,
        "inference.reward_generator",
        i.reward_generator,
        rule,
    )
    rule = f'goes with inference.kl = "k3" only, not "{i.kl}", whose gradient it would make wrong'
    _check(not i.kl_corrected or i.kl == "k3", "inference.kl_corrected", i.kl_corrected, rule)
    rule = f"must be 0 (no bound) or more than 1 + inference.clip_high = {1 + i.clip_high}"
    _check(i.clip_max == 0 or i.clip_max > 1 + i.clip_high, "inference.clip_max", i.clip_max, rule)
    rule = f"must divide batch.users = {b.users}"
    _check(b.users % b.microbatches == 0, "batch.microbatches", b.microbatches, rule)
    rule = "must be 1 where inference.high_entropy_share is below 1, a share of the whole batch"
    _check(
        b.microbatches == 1 or i.high_entropy_share == 1, "batch.microbatches", b.microbatches, rule
    )
    for name, lora in (("generator", g.lora), ("inference", i.lora)):
        known = bool(lora.targets) and set(lora.targets) <= {*LORA_TARGETS}
        rule = f"must be some of {', '.join(LORA_TARGETS)}"
        _check(known, f"{name}.lora.targets", lora.targets, rule)
        rule = "needs base weights (model.checkpoint); from random weights all parameters are trained: set it to 0"
        _check(
            lora.rank == 0 or config.model.checkpoint != "", f"{name}.lora.rank", lora.rank, rule
        )
        rule = f'must be 0 with optimizer.name = "{config.optimizer.name}", which is for whole matrices; take adamw'
        _check(
            lora.rank == 0 or config.optimizer.name != "muon", f"{name}.lora.rank", lora.rank, rule
        )


def _parse_phase(phase: str, name: str) -> Phase:
    words = phase.split()
    modes: tuple[Mode, ...] = typing.get_args(Mode)
    if words and words[0] not in modes:
        _check(
            False,
            name,
            phase,
            f"must begin with one of {', '.join(modes)}.{did_you_mean(words[0], modes)}",
        )
    match = re.fullmatch(
        r"\s*(?:(inference|generator|joint)|alternate\s+(\d+):(\d+))\s+(\d+)\s*", phase
    )
    rule = 'must be like "inference 240", "generator 60", "joint 60" or "alternate 2:1 60"'
    if match is None:
        raise UserError(f"config.{name} = {json.dumps(phase)}: {rule}")
    n, m, steps = int(match[2] or 1), int(match[3] or 1), int(match[4])
    _check(min(n, m, steps) >= 1, name, phase, f"{rule}, with numbers of at least 1")
    mode = typing.cast(Mode, match[1] or "alternate")
    return Phase(mode, n if mode != "generator" else 0, m if mode != "inference" else 0, steps)


def _get(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _check(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        shown = json.dumps(value, ensure_ascii=False, default=repr)
        raise UserError(f"config.{name} = {shown}: {rule}")
