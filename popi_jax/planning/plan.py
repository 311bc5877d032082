"""The update of a run that need not exist: shapes and layouts of all that `make train` would give
to it, no arrays.

Everything static comes from where training has it (training/loop.py); texts have the longest
lengths of the configuration, since there are no data, and rows are computed with their padding:
with less it is faster, not larger."""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from popi_jax.arrays import Params, Tokens, UserBatch
from popi_jax.config import Config, parse_phases
from popi_jax.config_rules import check_mesh, resolve_mesh
from popi_jax.errors import UserError, did_you_mean
from popi_jax.models.presets import PRESETS
from popi_jax.models.sampling import Sampling
from popi_jax.models.transformer import TransformerConfig
from popi_jax.planning.target import Target
from popi_jax.popi.roles import Glue
from popi_jax.popi.update import Parts, popi_update, role_turns
from popi_jax.run import mesh_rules, model_config
from popi_jax.sharding import make_mesh, spec
from popi_jax.training.loop import abstract_frozen, static_parts, trains_adapters
from popi_jax.training.state import (
    Frozen,
    TrainState,
    abstract_params,
    abstract_state,
    shardings_of,
)

TEMPLATE = 24  # tokens that a chat template puts before a summary, and that ask for one
USERS = 1275  # of the training split, as PRISM has: decides only whether the reference's log-probs can be stored

Kind = tuple[bool, bool]  # whether a turn trains (inference, generator)


class Plan(NamedTuple):
    config: Config
    mesh: Mesh
    parts: Parts
    phases: tuple
    state: TrainState
    frozen: Frozen
    users: UserBatch

    @property
    def kinds(self) -> list[Kind]:
        """The turns of the schedule, in the order of the program's branches."""
        return sorted({(bool(a), bool(b)) for a, b in role_turns(self.phases)})

    def split(self, axes: tuple[str, ...]) -> int:
        """Parts that an axis of an array is split in by these axes of the mesh."""
        return math.prod(self.mesh.shape[axis] for axis in axes)


def planned_model(config: Config) -> TransformerConfig:
    """The shape of both models: of the checkpoint's folder where there is one, else of the released
    model of its name.

    Raises: UserError when neither is known.
    """
    m, path = config.model, Path(config.model.checkpoint)
    if not m.checkpoint or (path / "config.json").exists():
        return model_config(config, m.vocab_size if not m.checkpoint else 0)
    preset = PRESETS.get(path.name.lower())
    if preset is None:
        hint = did_you_mean(path.name.lower(), PRESETS)
        raise UserError(
            f'config.model.checkpoint = "{m.checkpoint}": there is no such folder, and {path.name} is no released '
            f"model that is known here ({', '.join(PRESETS)}).{hint}"
        )
    rules, rollout_rules = mesh_rules(config)
    ours: dict[str, Any] = {"dtype": m.dtype, "remat": m.remat, "attention": m.attention}
    return dataclasses.replace(preset, **ours, rules=rules, rollout_rules=rollout_rules)


def make_plan(config: Config, target: Target) -> Plan:
    """Raises: UserError when something of the configuration does not fit the devices. Sets the
    mesh."""
    check_mesh(config, len(target.devices))
    mesh = make_mesh(*resolve_mesh(config.mesh, len(target.devices)), devices=target.devices)
    jax.set_mesh(mesh)
    model = planned_model(config)
    ids = tuple(range(3, 3 + TEMPLATE))
    sampling = Sampling(config.inference.temperature, config.data.summary_len, 2, (0, 1))
    parts, _ = static_parts(config, model, Glue(ids, ids), sampling, None)
    state = abstract_state(model, parts.transforms, mesh, cfg=config)
    frozen = abstract_frozen(config, state, mesh, USERS)
    base: Params = {}
    if any(trains_adapters(config, role) for role in ("inference", "generator")):
        base = abstract_params(model, mesh, config.model.dtype)
    frozen = frozen._replace(
        inference=frozen.inference or base,
        generator=frozen.generator or (base if trains_adapters(config, "generator") else {}),
    )
    phases = parse_phases(config.schedule.phases)
    return Plan(config, mesh, parts, phases, state, frozen, abstract_users(config, mesh, model))


def abstract_users(config: Config, mesh: Mesh, model: TransformerConfig) -> UserBatch:
    users, pairs, d = config.batch.users, config.batch.pairs, config.data
    sharding = NamedSharding(mesh, spec(("batch",), model.rules))

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def tokens(*shape: int) -> Tokens:
        return Tokens(array(*shape), array(*shape[:-1]))

    return UserBatch(
        index=array(users),
        context=tokens(users, d.context_len),
        turns=tokens(users, pairs, d.turn_len),
        chosen=tokens(users, pairs, d.answer_len),
        rejected=tokens(users, pairs, d.answer_len),
        pair_mask=array(users, pairs, dtype=jnp.bool_),
        pair_number=array(users, pairs),
    )


def update_of(plan: Plan, phases: tuple) -> Any:
    """The update as training/loop.py jits it, with the turns of some phases."""
    update = partial(popi_update, parts=plan.parts, phases=phases)
    return jax.jit(
        update,
        donate_argnums=(0,),
        out_shardings=(shardings_of(plan.state), None),
        keep_unused=True,
    )


def state_bytes(plan: Plan) -> dict[str, int]:
    """Bytes per device of what an update is given, by what it is."""
    role = {
        "parameters": (plan.state.inference.params, plan.state.generator.params),
        "optimizer": (plan.state.inference.opt_state, plan.state.generator.opt_state),
        "averages": (plan.state.inference.ema, plan.state.generator.ema),
        "reference policies": plan.frozen,
        "batch": plan.users,
    }
    return {name: bytes_per_device(tree) for name, tree in role.items() if jax.tree.leaves(tree)}


def bytes_per_device(tree: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def cache_bytes(plan: Plan) -> int:
    """Keys and values per device while summaries are sampled: of the signals and of what is
    sampled."""
    model, cfg = plan.parts.model, plan.config
    split = plan.split
    users = cfg.batch.users // cfg.batch.microbatches / split(model.rollout_rules.batch)
    slots = cfg.data.context_len + TEMPLATE + cfg.inference.group_size * cfg.data.summary_len
    heads = model.num_kv_heads / split(model.rollout_rules.attention_heads)
    number = 2 if model.dtype == "bfloat16" else 4
    return int(2 * model.num_layers * users * slots * heads * model.head_dim * number)
