"""The update of a run that need not exist: shapes and layouts of all that it is given, for
planning."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from popi_jax.arrays import Frozen, Tokens, TrainState, UserBatch
from popi_jax.config import Config
from popi_jax.data.batches import teaches
from popi_jax.data.encode import get_told_len
from popi_jax.models.decode import Sampling
from popi_jax.models.layout import spec
from popi_jax.models.transformer import TransformerConfig
from popi_jax.popi.rollout import PromptTokens
from popi_jax.training import setup
from popi_jax.training.setup import Roles, UpdateSetup


class AbstractUpdate(NamedTuple):
    """The update of a run that need not exist: shapes and layouts of all that it is given."""

    setup: UpdateSetup
    state: TrainState
    frozen: Frozen
    users: UserBatch


def plan_abstract_update(
    config: Config,
    model: TransformerConfig,
    prompts: PromptTokens,
    sampling: Sampling,
    mesh: Mesh,
    *,
    num_users: int,
) -> AbstractUpdate:
    """Texts have the longest lengths of the configuration, since there are no data, and rows are
    computed with their padding. num_users: of the training split."""
    if config.data.prompt_aware:  # each pair is an example
        num_users *= config.data.num_pairs
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_pairs=1))
    made = setup.plan_update(config, model, prompts, sampling, num_users=num_users)
    plan = made.plan
    roles = Roles(plan.inference.role, plan.generator.role)
    state = setup.abstract_state(model, roles, mesh, config)
    frozen = setup.abstract_frozen(plan, state, mesh, config, num_users)
    for name in ("inference", "generator"):
        if getattr(plan, name).role.adapter_scale:
            base = setup.abstract_params(model, mesh, config.model.dtype)
            frozen = frozen._replace(**{name: base})  # type: ignore[arg-type]
    return AbstractUpdate(made, state, frozen, abstract_users(config, model, mesh))


def abstract_users(config: Config, model: TransformerConfig, mesh: Mesh) -> UserBatch:
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
        told=tokens(users, told_len) if (told_len := get_told_len(config)) else None,
        taught=tokens(users, d.summary_len) if teaches(config) else None,
    )
