"""A run of the smallest size: configuration, batch, static parts, state on a mesh."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from configs.base import compose
from popi_jax import sharding
from popi_jax.arrays import Demonstrations, Frozen, Tokens, TrainState, UserBatch, WarmupBatch
from popi_jax.config import Config, from_config_dict
from popi_jax.models.decode import Sampling
from popi_jax.models.packing import Budgets
from popi_jax.models.transformer import TransformerConfig
from popi_jax.phases import parse_phases
from popi_jax.popi.generator_step import generator_step
from popi_jax.popi.inference_step import inference_step
from popi_jax.popi.plan import RolePlan
from popi_jax.popi.rollout import PromptTokens
from popi_jax.training import setup
from tests.oracles.plain import MODEL

END = 10
PHASES = ("inference 2", "generator 2", "alternate 2:1 6", "joint 2")
GLUE = PromptTokens(generator_prefix=(1, 7, 8), summary_turn=(9, 10))


def make_config() -> Config:
    c = compose("scale=laptop")
    c.name = "test"
    c.warmup.steps = 0
    c.inference.group_size = 3
    c.inference.temperature = 0.8
    c.inference.lr_warmup_steps = 0
    c.inference.kl_coef = 0.05
    c.inference.length_penalty = 0.01
    c.inference.unfinished_penalty = 0.0
    c.inference.repeat_penalty = 0.0
    c.generator.lr_warmup_steps = 0
    c.warmup.lr_warmup_steps = 0
    c.data.summary_len = 4
    c.batch.users = 8
    c.batch.pairs = 2
    c.schedule.phases = PHASES
    return from_config_dict(c)


def make_update(
    cfg: Config,
    tx: optax.GradientTransformation | None = None,
    budgets: Budgets | None = None,
    *,
    model: TransformerConfig = MODEL,
    phases: tuple[str, ...] | None = None,
) -> setup.UpdateSetup:
    """The update of `cfg`, with another optimizer for both roles, or other phases."""
    if phases:
        cfg = replace(cfg, "schedule", phases=phases)
    sampling = Sampling(cfg.inference.temperature, cfg.data.summary_len, END)
    # so many users that no log-probs are stored
    made = setup.plan_update(cfg, model, GLUE, sampling, num_users=10**9, budgets=budgets)
    return made if tx is None else with_roles(made, setup.Roles(RolePlan(tx), RolePlan(tx)))


def with_roles(made: setup.UpdateSetup, roles: setup.Roles) -> setup.UpdateSetup:
    """The same update with the optimizers of other roles."""
    inference, generator = (
        dataclasses.replace(part, role=dataclasses.replace(part.role, tx=role.tx))
        for part, role in zip((made.plan.inference, made.plan.generator), roles, strict=True)
    )
    plan = dataclasses.replace(made.plan, inference=inference, generator=generator)
    return made._replace(plan=plan)


def roles_of(made: setup.UpdateSetup) -> setup.Roles:
    return setup.Roles(made.plan.inference.role, made.plan.generator.role)


def generator_program(made: setup.UpdateSetup) -> Callable[..., Any]:
    return partial(generator_step, plan=made.plan.generator, scorer=made.scorer)


def inference_program(made: setup.UpdateSetup) -> Callable[..., Any]:
    return partial(inference_step, plan=made.plan.inference, scorer=made.scorer)


def fitting(batches: Sequence[UserBatch], shards: int, cfg: Config) -> Budgets:
    """The least budgets that all of these batches fit, whatever the summaries."""
    users = cfg.batch.users // shards

    def most(count: Callable[[UserBatch], np.ndarray]) -> int:
        return max(int(count(batch).reshape(shards, -1).sum(axis=1).max()) for batch in batches)

    def replies(batch: UserBatch) -> np.ndarray:
        return (batch.chosen.lengths + batch.rejected.lengths).sum(axis=1)

    return Budgets(
        shards=shards,
        rollout_shards=shards,
        rollout_signals=most(lambda batch: batch.context.lengths) + users * len(GLUE.summary_turn),
        signals=most(lambda batch: batch.context.lengths) + users * len(GLUE.summary_turn),
        contexts=users * (len(GLUE.generator_prefix) + cfg.data.summary_len),
        summaries=users * cfg.data.summary_len,
        pairs=most(lambda batch: batch.turns.lengths.sum(axis=1) + replies(batch)),
        answers=most(replies),
    )


def random_tokens(
    rng: np.random.Generator, rows: tuple[int, ...], length: int, *, ended: bool = False
) -> Tokens:
    """Padding holds random ids. ended: the last token that counts is the end token."""
    ids, lengths = rng.integers(3, 64, (*rows, length)), rng.integers(2, length + 1, rows)
    if ended:
        np.put_along_axis(ids, lengths[..., None] - 1, END, axis=-1)
    return Tokens(ids.astype(np.int32), lengths.astype(np.int32))


def user_batch(seed: int, users: int = 8, pairs: int = 2) -> UserBatch:
    """Numpy; one user has one pair less."""
    rng = np.random.default_rng(seed)
    mask = np.ones((users, pairs), bool)
    mask[1, -1] = False
    return UserBatch(
        index=(seed * users + np.arange(users)).astype(np.int32),
        context=random_tokens(rng, (users,), 10),
        turns=random_tokens(rng, (users, pairs), 5),
        chosen=random_tokens(rng, (users, pairs), 4, ended=True),
        rejected=random_tokens(rng, (users, pairs), 4, ended=True),
        pair_mask=mask,
        pair_number=np.arange(users * pairs, dtype=np.int32).reshape(users, pairs),
    )


def warmup_batch(seed: int, rows: int = 8) -> WarmupBatch:
    rng = np.random.default_rng(seed)

    def demonstrations() -> Demonstrations:
        mask = np.ones((rows, 2), bool)
        mask[0, 1] = False
        return Demonstrations(
            random_tokens(rng, (rows,), 6),
            random_tokens(rng, (rows, 2), 3),
            random_tokens(rng, (rows, 2), 4, ended=True),
            mask,
        )

    return WarmupBatch(demonstrations(), demonstrations(), demonstrations())


def make_mesh(data: int, fsdp: int, tensor: int, sequence: int = 1) -> Mesh:
    """The first devices alone, as on a machine that has no more."""
    devices = jax.devices()[: data * fsdp * tensor * sequence]
    return sharding.make_mesh(data, fsdp, tensor, sequence, devices)


def make_state(
    cfg: Config, roles: setup.Roles, mesh: Mesh, model: TransformerConfig = MODEL
) -> tuple[TrainState, Frozen]:
    """A state and reference policies that differ from it, on the mesh (which must be set)."""
    layout = setup.get_shardings(setup.abstract_state(model, roles, mesh, cfg))
    init = partial(setup.init_state, model=model, roles=roles, config=cfg)
    program = jax.jit(init, out_shardings=layout)
    state, other = program(jnp.int32(0)), program(jnp.int32(1))
    return state, jax.tree.map(jnp.copy, Frozen(other.inference.params, other.generator.params))


def phases() -> tuple:
    return parse_phases(PHASES)


def copied(tree: Any) -> Any:
    """On the host, so that donation does not matter."""
    return jax.tree.map(lambda x: np.array(jax.random.key_data(x) if _is_key(x) else x), tree)


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def replace(cfg: Config, section: str, **values: Any) -> Config:
    return dataclasses.replace(
        cfg, **{section: dataclasses.replace(getattr(cfg, section), **values)}
    )
