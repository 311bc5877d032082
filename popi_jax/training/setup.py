"""From a configuration to what training starts with: the plan of an update, budgets, the state.

The one place that reads the configuration on behalf of popi/: what an update does is decided here
(`plan_update`) and nowhere else."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int, Key, PyTree

from popi_jax.arrays import (
    Frozen,
    PairLogps,
    Params,
    RoleState,
    StoredSummaries,
    Tokens,
    TrainState,
)
from popi_jax.config import Config, GeneratorConfig, InferenceConfig
from popi_jax.data.measure import Fill
from popi_jax.losses.grpo import PolicyObjective
from popi_jax.losses.preference import PreferenceObjective
from popi_jax.losses.reward import RewardObjective
from popi_jax.models.decode import Sampling
from popi_jax.models.layout import count_shards
from popi_jax.models.lora import init_lora_boxed
from popi_jax.models.packing import Budget, Budgets
from popi_jax.models.transformer import TransformerConfig, init_boxed, logical_names, unbox
from popi_jax.phases import Phase, list_updates, parse_phases
from popi_jax.popi.plan import (
    GeneratorPlan,
    InferencePlan,
    Judge,
    Kind,
    Reference,
    RolePlan,
    UpdatePlan,
)
from popi_jax.popi.rollout import PromptTokens, Sampler
from popi_jax.popi.scorer import Scorer
from popi_jax.sharding import check_heads, match_shardings, param_shardings, replicated
from popi_jax.training import optim

# how often the main stage draws each training user where log-probs of the reference are stored
STORE_AT = 4


class UpdateSetup(NamedTuple):
    """The static half of `popi_update`, bound once."""

    plan: UpdatePlan
    scorer: Scorer
    sampler: Sampler


class Roles(NamedTuple):
    """How each role is trained in one stage of a run."""

    inference: RolePlan
    generator: RolePlan


def plan_kinds(phases: tuple[Phase, ...]) -> tuple[Kind, ...]:
    """Which roles each update of the main stage trains."""
    kinds = {
        "inference": Kind(True, False),
        "generator": Kind(False, True),
        "joint": Kind(True, True),
        "supervised": Kind(True, False, supervised=True),
        "stored": Kind(False, True, stored=True),
    }
    return tuple(kinds[update] for update in list_updates(phases))


def plan_update(
    config: Config,
    model: TransformerConfig,
    prompts: PromptTokens,
    sampling: Sampling,
    *,
    num_users: int,
    budgets: Budgets | None = None,
) -> UpdateSetup:
    """Decides all about the updates of the main stage. num_users: of the training split.

    Raises: ValueError for a word that no decision knows (config.py refuses it before)."""
    kinds = plan_kinds(parse_phases(config.schedule.phases))
    roles = plan_main_roles(config, kinds)
    parts = config.batch.microbatches
    objective, reference = make_objective(config), Reference.NONE
    if objective.needs_reference:
        reference = Reference(config.generator.reference)
        # it never changes: where that pays for the pass before the first update, it is stored
        often = config.batch.users * len(kinds) >= STORE_AT * num_users
        if reference is Reference.PROMPT and often:
            reference = Reference.STORED
    plan = UpdatePlan(
        kinds,
        config.warmup.steps,
        GeneratorPlan(roles.generator, objective, reference, config.generator.reads == "summary"),
        plan_inference(config, roles.inference),
        prompts.generator_prefix,
        config.data.num_pairs,
    )
    turn, temperature = prompts.summary_turn, sampling.temperature
    return UpdateSetup(
        plan,
        Scorer(model, turn, temperature, parts, budgets),
        Sampler(model, turn, sampling, parts, budgets),
    )


def make_objective(config: Config) -> PreferenceObjective:
    """The preference objective that the configuration asks for: docs/objectives.md."""
    g = config.generator
    return PreferenceObjective(
        name=g.objective,
        beta=g.beta,
        over_beta=g.over_beta,
        label_smoothing=g.label_smoothing,
        length_normalised=g.length_normalised,
        gamma=g.gamma,
        sft_coef=g.sft_coef,
        desirable_weight=g.desirable_weight,
        undesirable_weight=g.undesirable_weight,
    )


def plan_inference(config: Config, role: RolePlan) -> InferencePlan:
    """With inference.kl = "k1" the KL is in the reward, and the loss has none."""
    i = config.inference
    in_reward = i.kl == "k1"
    objective = PolicyObjective(
        ratio=i.ratio,
        clip_low=i.clip_low,
        clip_high=i.clip_high,
        clip_max=i.clip_max or None,
        normalise=i.normalise,
        max_len=config.data.summary_len if i.normalise == "max_len" else None,
        kl="k3" if in_reward else i.kl,
        kl_coef=0.0 if in_reward else i.kl_coef,
        kl_corrected=i.kl_corrected,
        entropy_coef=i.entropy_coef,
    )
    return InferencePlan(
        role,
        objective,
        Judge(i.reward_generator),
        group_size=i.group_size,
        reward=RewardObjective(
            kind=i.reward,
            over=config.generator.beta if config.generator.over_beta else 1.0,
            length_penalty=i.length_penalty,
            repeat_penalty=i.repeat_penalty,
            unfinished_penalty=i.unfinished_penalty,
            kl_coef=i.kl_coef if in_reward else 0.0,
        ),
        reward_baseline=i.reward_baseline,
        advantage_scale=i.advantage_scale,
        advantage_baseline=i.advantage_baseline,
        skip_unfinished=i.skip_unfinished,
        high_entropy_share=i.high_entropy_share,
        steps_per_rollout=i.updates_per_rollout,
    )


def adapter_scale(role: InferenceConfig | GeneratorConfig) -> float:
    """alpha / rank of a role's adapters; 0 where all its parameters are trained."""
    return role.lora.alpha / role.lora.rank if role.lora.rank else 0.0


def plan_main_roles(config: Config, kinds: tuple[Kind, ...]) -> Roles:
    i, g = config.inference, config.generator
    turns = [sum(trained) for trained in zip(*kinds, strict=True)] or [0, 0]
    return Roles(
        RolePlan(optim.inference_transform(config, turns[0]), i.ema_decay, adapter_scale(i)),
        RolePlan(optim.generator_transform(config, turns[1]), g.ema_decay, adapter_scale(g)),
    )


def plan_warmup_roles(config: Config) -> Roles:
    role = RolePlan(optim.warmup_transform(config))
    return Roles(role, role)


def plan_budgets(
    fill: Fill,
    prompts: PromptTokens,
    model: TransformerConfig,
    config: Config,
    *,
    summary_fill: float,
) -> Budgets:
    """Places of the users that one shard holds of each microbatch of the main stage. A guess from
    what the users of the run are like: it decides about the speed alone.

    summary_fill: the part of their length that the summaries of a shard fill at most."""
    shards, rollout_shards = map(count_shards, (model.rules.batch, model.rollout_rules.batch))

    def count_users(shards: int) -> int:
        return max(config.batch.users // (shards * config.batch.microbatches), 1)

    def count_signals(shards: int) -> int:
        users = count_users(shards)
        return fill.contexts.budget(users, shards) + users * len(prompts.summary_turn)

    users, summary_len = count_users(shards), config.data.summary_len
    told = users * summary_len
    if config.generator.reads != "summary":
        told = fill.told.budget(users, shards)
    return Budgets(
        shards=shards,
        rollout_shards=rollout_shards,
        rollout_signals=count_signals(rollout_shards),
        signals=count_signals(shards),
        contexts=users * len(prompts.generator_prefix) + told,
        summaries=math.ceil(users * summary_len * summary_fill),
        pairs=fill.pairs.budget(users, shards),
        answers=fill.answers.budget(users, shards),
    )


def plan_warmup_budgets(fill: Fill, model: TransformerConfig, config: Config) -> dict[str, Budget]:
    """Places of each task of the warm-up."""
    budgets, shards = {}, count_shards(model.rules.batch)
    for task, found in fill.warmup.items():
        users = max(getattr(config.warmup, f"{task}_users") // shards, 1)
        tokens, answers = (x.budget(users, shards) for x in (found.tokens, found.answers))
        budgets[task] = Budget(tokens, answers, shards)
    return budgets


def new_role(params: Params, plan: RolePlan) -> RoleState:
    ema = jax.tree.map(jnp.copy, params) if plan.ema_decay else None
    return RoleState(jnp.int32(0), params, plan.tx.init(params), ema)


def new_state(
    inference: Params, generator: Params, key: Key[Array, ""], *, roles: Roles
) -> TrainState:
    """The state at step 0 with given parameters."""
    return TrainState(
        new_role(inference, roles.inference),
        new_role(generator, roles.generator),
        jnp.int32(0),
        jax.random.fold_in(key, 2),
    )


def init_state(
    seed: Int[Array, ""], *, model: TransformerConfig, roles: Roles, config: Config
) -> TrainState:
    """The state at step 0 with random parameters, or with adapters that change nothing yet."""
    key = jax.random.key(seed)
    inference, generator = (unbox(params) for params in _init_boxed(key, model, config))
    return new_state(inference, generator, key, roles=roles)


def restart_optimizers(state: TrainState, *, roles: Roles) -> TrainState:
    """The state at the start of a stage: parameters stay; optimizers, averages and role counters
    start anew."""
    return state._replace(
        inference=new_role(state.inference.params, roles.inference),
        generator=new_role(state.generator.params, roles.generator),
    )


def abstract_state(
    model: TransformerConfig, roles: Roles, mesh: Mesh, config: Config
) -> TrainState:
    """Shapes, types and shardings of the whole state of a stage, without any array."""
    for rules in (model.rules, model.rollout_rules):
        check_heads(model.num_kv_heads, mesh, rules)
    key = jax.eval_shape(jax.random.key, 0)
    boxed = jax.eval_shape(partial(_init_boxed, model=model, config=config), key)
    shapes = jax.eval_shape(partial(new_state, roles=roles), *map(unbox, boxed), key)

    def add_layout(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    placed: list[Any] = []
    for shape, params in zip(shapes[:2], boxed, strict=True):
        layout = param_shardings(shape.params, logical_names(params), mesh, model.rules)
        layout = match_shardings(shape, shape.params, layout, mesh)
        placed.append(jax.tree.map(add_layout, shape, layout))
    whole = partial(add_layout, sharding=replicated(mesh))
    return TrainState(placed[0], placed[1], whole(shapes.step), whole(shapes.key))


def abstract_params(model: TransformerConfig, mesh: Mesh, dtype: str) -> Params:
    """Shapes and shardings of a whole model whose parameters are stored as `dtype`."""
    boxed = jax.eval_shape(partial(init_boxed, cfg=model), jax.eval_shape(jax.random.key, 0))
    shapes = unbox(boxed)
    layout = param_shardings(shapes, logical_names(boxed), mesh, model.rules)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), shapes, layout
    )


def abstract_frozen(
    plan: UpdatePlan, state: TrainState, mesh: Mesh, config: Config, num_users: int
) -> Frozen:
    """Shapes and shardings of what updates read beside the state, all but the base under adapters.
    num_users: of the training split."""
    frozen = own_params(plan, state)
    if not reads_frozen_generator(plan):
        frozen = frozen._replace(generator={})
    if plan.generator.reference is Reference.STORED:
        pairs = num_users * config.data.num_pairs  # with those that pad them
        column = jax.ShapeDtypeStruct((pairs,), jnp.float32, sharding=replicated(mesh))
        frozen = frozen._replace(stored=PairLogps(column, column))
    if plan.stores_summaries:
        kept = abstract_summaries(num_users, config.data.summary_len, mesh)
        frozen = frozen._replace(summaries=kept)
    return frozen


def abstract_summaries(num_users: int, length: int, mesh: Mesh) -> StoredSummaries:
    """Shapes and shardings of stored summaries, which every device holds whole."""

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))

    tokens = Tokens(array(num_users, length), array(num_users))
    return StoredSummaries(tokens, array(num_users, dtype=jnp.bool_))


def own_params(plan: UpdatePlan, state: TrainState) -> Frozen:
    """The parameters of both roles, as a run stores them for its reference; {} of a role with
    adapters, which stand on a base that is not the run's own."""
    inference, generator = state.inference.params, state.generator.params
    return Frozen(
        {} if plan.inference.role.adapter_scale else inference,
        {} if plan.generator.role.adapter_scale else generator,
    )


def reads_frozen_generator(plan: UpdatePlan) -> bool:
    """Whether updates read the reference generator's weights, or just its stored log-probs."""
    scores = plan.generator.reference in (Reference.PROMPT, Reference.SUMMARY)
    judges = plan.inference.judge is Judge.FROZEN
    return scores or judges or bool(plan.generator.role.adapter_scale)


def get_shardings(abstract: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.sharding, abstract)


def _init_boxed(
    key: Key[Array, ""], model: TransformerConfig, config: Config
) -> tuple[Params, Params]:
    """What is trained of (inference, generator), with logical axis names."""
    made = []
    for number, lora in enumerate((config.inference.lora, config.generator.lora)):
        own = jax.random.fold_in(key, number)
        if lora.rank:
            made.append(init_lora_boxed(own, model, rank=lora.rank, targets=lora.targets))
        else:
            made.append(init_boxed(own, model))
    return made[0], made[1]
