"""The update of a run that need not exist: shapes and layouts of all that `make train` would give
to it, no arrays.

All that planning knows of training and of the update is here. Texts have the longest lengths of the
configuration, since there are no data, and rows are computed with their padding: with less it is
faster, not larger."""

import dataclasses
import math
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from popi_jax import run
from popi_jax.arrays import Params, UserBatch
from popi_jax.checkpoints import hub
from popi_jax.config import Config
from popi_jax.config_rules import check_mesh, resolve_mesh
from popi_jax.errors import UserError, did_you_mean
from popi_jax.models.decode import Sampling
from popi_jax.models.fused_attention import choose_kernel
from popi_jax.models.presets import PRESETS
from popi_jax.models.transformer import TransformerConfig
from popi_jax.phases import Mode
from popi_jax.planning.target import Target
from popi_jax.popi import update as updates
from popi_jax.popi.plan import Kind
from popi_jax.popi.rollout import PromptTokens
from popi_jax.sharding import find_platform, make_mesh
from popi_jax.training import abstract, setup

TEMPLATE = 24  # tokens that a chat template puts before a summary, and that ask for one
USERS = 1275  # of PRISM's training split: decides whether reference log-probs can be stored
SCOPES = updates.SCOPES
# names of `jax.named_scope` that the update of each mode must have, and those of the models
TURN_SCOPES: dict[Mode, tuple[str, ...]] = {
    "inference": ("sampling", "rewards", "inference_step"),
    "generator": ("sampling", "generator_step"),
    "joint": ("sampling", "rewards", "generator_step", "inference_step"),
    "supervised": ("supervised_step",),
    "stored": ("generator_step",),
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
    prompt: tuple[int, ...]  # what asks for a summary: as many tokens as a template has, about
    sampling: Sampling  # of summaries

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

    @property
    def told_len(self) -> int:
        """Most tokens of what the generator reads of a user."""
        if self.config.generator.reads == "summary":
            return self.config.data.summary_len
        return self.users.told.ids.shape[1] if self.users.told else 0

    def list_scopes(self, turn: Mode) -> tuple[str, ...]:
        """The scopes that an update must have."""
        samples = self.config.generator.reads == "summary"
        return tuple(x for x in TURN_SCOPES[turn] if samples or x != "sampling")

    @property
    def samples(self) -> bool:
        """Whether some update samples summaries."""
        return any("sampling" in self.list_scopes(turn) for turn in self.turns)

    def count_shards(self, axes: tuple[str, ...]) -> int:
        """Parts that an axis of an array is split in by these axes of the mesh."""
        return math.prod(self.mesh.shape[axis] for axis in axes)


def plan_model(config: Config) -> TransformerConfig:
    """The shape of both models: of the checkpoint's files where they are on this disk, else of the
    released model of its name; nothing is fetched.

    Raises: UserError when neither is known."""
    m = config.model
    if not m.checkpoint:
        return run.make_model(config, m.vocab_size)
    if folder := hub.find_cached(m.checkpoint):
        found = dataclasses.replace(m, checkpoint=folder)
        return run.make_model(dataclasses.replace(config, model=found), 0)
    name = Path(hub.split(m.checkpoint)[0]).name.lower()
    # a model that was tuned for chats has the shape of the one before
    preset = PRESETS.get(name) or PRESETS.get(re.sub(r"-(instruct|chat|it)(?=-|$)", "", name))
    if preset is None:
        raise UserError(
            f'config.model.checkpoint = "{m.checkpoint}": its files are not on this disk, and '
            f"{name} is no released model that is known here ({', '.join(PRESETS)})."
            f"{did_you_mean(name, PRESETS)}"
        )
    rules, rollout_rules = run.parse_mesh_rules(config)
    kernel = choose_kernel(m.attention, find_platform())
    ours: dict[str, Any] = {"dtype": m.dtype, "remat": m.remat, "kernel": kernel}
    return dataclasses.replace(preset, **ours, rules=rules, rollout_rules=rollout_rules)


def make_plan(config: Config, target: Target) -> Plan:
    """Sets the mesh. Where training chooses what is computed again, it is what needs least memory.

    Raises: UserError when something of the configuration does not fit the devices."""
    if config.model.remat == "auto":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))
    check_mesh(config, len(target.devices))
    mesh = make_mesh(*resolve_mesh(config.mesh, len(target.devices)), devices=target.devices)
    jax.set_mesh(mesh)
    model = plan_model(config)
    ids = tuple(range(3, 3 + TEMPLATE))
    sampling = Sampling(config.inference.temperature, config.data.summary_len, 2, (0, 1))
    prompts = PromptTokens(ids, ids)
    made = abstract.plan_abstract_update(config, model, prompts, sampling, mesh, num_users=USERS)
    update = jax.jit(
        partial(updates.popi_update, **made.setup._asdict()),
        donate_argnums=(0,),
        out_shardings=(setup.get_shardings(made.state), None),
        keep_unused=True,
    )
    names: dict[Kind, Mode] = {
        Kind(False, True): "generator",
        Kind(True, False): "inference",
        Kind(True, True): "joint",
        Kind(True, False, supervised=True): "supervised",
        Kind(False, True, stored=True): "stored",
    }
    modes = [names[kind] for kind in sorted(set(made.setup.plan.kinds))]
    return Plan(
        config, mesh, model, modes, update, made.state, made.frozen, made.users, ids, sampling
    )


def count_state_bytes(plan: Plan) -> dict[str, int]:
    """Bytes per device of what an update is given, by what it is."""
    roles = plan.state.inference, plan.state.generator
    trees = {
        "parameters": [role.params for role in roles],
        "optimizer": [role.opt_state for role in roles],
        "averages": [role.ema for role in roles],
        "reference policies": plan.frozen._replace(summaries=None),
        "stored summaries": plan.frozen.summaries,
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
    if not plan.samples:
        return 0
    model, c = plan.model, plan.config
    users = c.batch.users // c.batch.microbatches / plan.count_shards(model.rollout_rules.batch)
    slots = c.data.context_len + TEMPLATE + c.inference.group_size * c.data.summary_len
    heads = model.num_kv_heads / plan.count_shards(model.rollout_rules.attention_heads)
    per_slot = 2 * model.num_layers * heads * model.head_dim * plan.number_bytes
    return int(users * slots * per_slot)
