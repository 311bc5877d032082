"""The update of a run that need not exist: shapes and layouts of all that `make train` would give
to it, no arrays.

All that planning knows of training and of the update is here. Texts have the longest lengths of the
configuration, since there are no data, and rows are computed with their padding: with less it is
faster, not larger."""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from popi_jax.arrays import Params, Tokens, UserBatch
from popi_jax.config import Config, Mode
from popi_jax.config_check import check_mesh, parse_phases, resolve_mesh
from popi_jax.errors import UserError, did_you_mean
from popi_jax.models.presets import PRESETS
from popi_jax.models.sampling import Sampling
from popi_jax.models.transformer import TransformerConfig
from popi_jax.planning.target import Target
from popi_jax.popi.roles import Glue
from popi_jax.popi.update import popi_update, role_turns
from popi_jax.run import mesh_rules, model_config
from popi_jax.sharding import make_mesh, spec
from popi_jax.training import loop, state

TEMPLATE = 24  # tokens that a chat template puts before a summary, and that ask for one
USERS = 1275  # of PRISM's training split: decides whether reference log-probs can be stored
# names of `jax.named_scope`: of the update, those that each turn must have, those of the models
SCOPES = ("sampling", "rewards", "reference", "generator_step", "inference_step")
TURN_SCOPES: dict[Mode, tuple[str, ...]] = {
    "inference": ("sampling", "rewards", "inference_step"),
    "generator": ("sampling", "generator_step"),
    "joint": ("sampling", "rewards", "generator_step", "inference_step"),
}
DECODE, HEAD = "decode", "head"


class Plan(NamedTuple):
    config: Config
    mesh: Mesh
    model: TransformerConfig
    turns: list[Mode]  # what an update may train, in the order of the program's branches
    update: Any  # jitted: (state, frozen, users) -> (state, metrics)
    state: Any
    frozen: Any
    users: UserBatch

    @property
    def trained(self) -> Params:
        """What is trained of the inference model: all of it, or its adapters."""
        return self.state.inference.params

    @property
    def weights(self) -> Params:
        """The parameters of the inference model without adapters."""
        return self.frozen.inference if self.config.inference.lora.rank else self.trained

    @property
    def number_bytes(self) -> int:
        """Of a number in the compute type."""
        return 2 if self.model.dtype == "bfloat16" else 4

    def count_shards(self, axes: tuple[str, ...]) -> int:
        """Parts that an axis of an array is split in by these axes of the mesh."""
        return math.prod(self.mesh.shape[axis] for axis in axes)


def plan_model(config: Config) -> TransformerConfig:
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
            f'config.model.checkpoint = "{m.checkpoint}": there is no such folder, and '
            f"{path.name} is no released model that is known here ({', '.join(PRESETS)}).{hint}"
        )
    rules, rollout_rules = mesh_rules(config)
    ours: dict[str, Any] = {"dtype": m.dtype, "remat": m.remat, "attention": m.attention}
    return dataclasses.replace(preset, **ours, rules=rules, rollout_rules=rollout_rules)


def make_plan(config: Config, target: Target) -> Plan:
    """Sets the mesh. Raises: UserError when something of the configuration does not fit the
    devices."""
    check_mesh(config, len(target.devices))
    mesh = make_mesh(*resolve_mesh(config.mesh, len(target.devices)), devices=target.devices)
    jax.set_mesh(mesh)
    model = plan_model(config)
    ids = tuple(range(3, 3 + TEMPLATE))
    sampling = Sampling(config.inference.temperature, config.data.summary_len, 2, (0, 1))
    parts, _ = loop.static_parts(config, model, Glue(ids, ids), sampling, None)
    phases = parse_phases(config.schedule.phases)
    abstract = state.abstract_state(model, parts.transforms, mesh, cfg=config)
    frozen = loop.abstract_frozen(config, abstract, mesh, USERS)
    adapted = {role for role in ("inference", "generator") if loop.trains_adapters(config, role)}
    if adapted:
        base = state.abstract_params(model, mesh, config.model.dtype)
        own = frozen.generator or (base if "generator" in adapted else {})
        frozen = frozen._replace(inference=frozen.inference or base, generator=own)
    update = jax.jit(
        partial(popi_update, parts=parts, phases=phases),
        donate_argnums=(0,),
        out_shardings=(state.shardings_of(abstract), None),
        keep_unused=True,
    )
    names: dict[tuple[bool, bool], Mode] = {
        (False, True): "generator",
        (True, False): "inference",
        (True, True): "joint",
    }
    turns = [names[turn] for turn in sorted({(bool(a), bool(b)) for a, b in role_turns(phases)})]
    users = make_abstract_users(config, mesh, model)
    return Plan(config, mesh, model, turns, update, abstract, frozen, users)


def make_abstract_users(config: Config, mesh: Mesh, model: TransformerConfig) -> UserBatch:
    users, pairs, d = config.batch.users, config.batch.pairs, config.data
    sharding = NamedSharding(mesh, spec(("batch",), model.rules))

    def make(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def make_tokens(*shape: int) -> Tokens:
        return Tokens(make(*shape), make(*shape[:-1]))

    return UserBatch(
        index=make(users),
        context=make_tokens(users, d.context_len),
        turns=make_tokens(users, pairs, d.turn_len),
        chosen=make_tokens(users, pairs, d.answer_len),
        rejected=make_tokens(users, pairs, d.answer_len),
        pair_mask=make(users, pairs, dtype=jnp.bool_),
        pair_number=make(users, pairs),
    )


def count_state_bytes(plan: Plan) -> dict[str, int]:
    """Bytes per device of what an update is given, by what it is."""
    roles = plan.state.inference, plan.state.generator
    trees = {
        "parameters": [role.params for role in roles],
        "optimizer": [role.opt_state for role in roles],
        "averages": [role.ema for role in roles],
        "reference policies": plan.frozen,
        "batch": plan.users,
    }
    return {
        name: count_bytes_per_device(tree) for name, tree in trees.items() if jax.tree.leaves(tree)
    }


def count_bytes_per_device(tree: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def count_cache_bytes(plan: Plan) -> int:
    """Bytes per device of the keys and values of the signals and of the samples, while sampling."""
    model, c = plan.model, plan.config
    users = c.batch.users // c.batch.microbatches / plan.count_shards(model.rollout_rules.batch)
    slots = c.data.context_len + TEMPLATE + c.inference.group_size * c.data.summary_len
    heads = model.num_kv_heads / plan.count_shards(model.rollout_rules.attention_heads)
    per_slot = 2 * model.num_layers * heads * model.head_dim * plan.number_bytes
    return int(users * slots * per_slot)
