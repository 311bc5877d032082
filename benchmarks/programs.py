"""The jitted programs of a workload with random inputs: the very functions that `make train`
runs."""

import dataclasses
from collections.abc import Callable, Container
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.workloads import STORED_REFERENCE, Geometry, Workload
from configs.base import compose
from popi_jax.arrays import Frozen, PairLogps, Rollouts, Tokens, TrainState, UserBatch
from popi_jax.config import Config, from_config_dict
from popi_jax.models.decode import Sampling
from popi_jax.models.fused_attention import choose_kernel
from popi_jax.models.packing import Budgets
from popi_jax.models.transformer import TransformerConfig
from popi_jax.popi.generator_step import generator_step
from popi_jax.popi.inference_step import inference_step
from popi_jax.popi.rollout import PromptTokens, splice
from popi_jax.popi.scorer import repeat_ids
from popi_jax.popi.update import popi_update
from popi_jax.training import setup as setups

END = 1
PREFIX_LEN = 4  # tokens of a conversation's header, part of the signals or the prompt
TURN_LEN = 4  # tokens that ask for a summary, part of the signals


class Program(NamedTuple):
    """`step(carry, *inputs)` returns (carry, results); the carry is donated."""

    name: str
    step: Callable[..., tuple[Any, Any]]
    carry: Any
    inputs: tuple[Any, ...]


class Setup(NamedTuple):
    """What the programs of a workload have in common."""

    work: Workload
    cfg: Config
    update: setups.UpdateSetup
    state: TrainState
    frozen: Frozen
    users: UserBatch
    shared: bool = True  # the state by several programs, so that each gets a copy

    def make(self, name: str, step: Callable[..., Any], carry: Any, *inputs: Any) -> Program:
        own = jax.tree.map(jnp.copy, carry) if self.shared else carry
        return Program(f"{self.work.name}/{name}", jax.jit(step, donate_argnums=0), own, inputs)

    def train_generator(self, role: Any, *inputs: Any) -> tuple[Any, Any]:
        plan, scorer = self.update.plan.generator, self.update.scorer
        return generator_step(role, {}, *inputs, plan=plan, scorer=scorer)[:2]

    def train_inference(self, role: Any, *inputs: Any) -> tuple[Any, Any]:
        frozen, margins, rollouts, users = inputs
        plan, scorer = self.update.plan.inference, self.update.scorer
        return inference_step(
            role, frozen, margins, None, rollouts, users, plan=plan, scorer=scorer
        )

    def draw(self, params: Any, users: UserBatch, key: Any) -> Rollouts:
        return self.update.sampler.sample(params, users, key, self.cfg.inference.group_size)


def make_config(work: Workload, phase: str) -> Config:
    c = compose("scale=laptop")
    c.name = "bench"
    c.warmup.steps = 0
    c.batch.users, c.batch.pairs = work.users, max(work.pairs, 1)
    c.inference.group_size = max(work.group, 2)
    c.inference.kl_coef = 0.04
    c.data.summary_len = max(work.summary_len, 2)
    c.schedule.phases = (f"{phase} 1000",)
    return from_config_dict(c)


def make_tokens(
    rng: np.random.Generator, rows: tuple[int, ...], length: int, vocab_size: int
) -> Tokens:
    ids = rng.integers(2, vocab_size, (*rows, length)).astype(np.int32)
    return Tokens(jnp.asarray(ids), jnp.full(rows, length, jnp.int32))


def make_users(work: Workload, vocab_size: int, seed: int = 0) -> UserBatch:
    """Users whose texts all have the full length; the headers of a conversation count as part of
    the texts."""
    rng = np.random.default_rng(seed)
    users, pairs = work.users, max(work.pairs, 1)
    has_header = work.kind != "popi" and not work.signals_len
    prompt_len = work.prompt_len - (PREFIX_LEN if has_header else 0)
    return UserBatch(
        index=jnp.arange(users, dtype=jnp.int32),
        context=make_tokens(rng, (users,), max(work.signals_len - TURN_LEN, 1), vocab_size),
        turns=make_tokens(rng, (users, pairs), max(prompt_len, 1), vocab_size),
        chosen=make_tokens(rng, (users, pairs), max(work.answer_len, 2), vocab_size),
        rejected=make_tokens(rng, (users, pairs), max(work.answer_len, 2), vocab_size),
        pair_mask=jnp.ones((users, pairs), bool),
        pair_number=jnp.arange(users * pairs, dtype=jnp.int32).reshape(users, pairs),
    )


class Compute(NamedTuple):
    """How a model computes, the same for both roles."""

    remat: str = "dots"
    dtype: str = "float32"
    attention: str = "chunked"  # config.model.attention
    platform: str = "cpu"  # that this is for


PLAIN = Compute()


def make_setup(work: Workload, geometry: Geometry, how: Compute = PLAIN) -> Setup:
    cfg = make_config(work, {"dpo": "generator", "grpo": "inference", "popi": "joint"}[work.kind])
    kernel = choose_kernel(how.attention, how.platform)
    model = TransformerConfig(**geometry._asdict(), dtype=how.dtype, remat=how.remat, kernel=kernel)
    prompts = PromptTokens(tuple(range(2, 2 + PREFIX_LEN)), tuple(range(2, 2 + TURN_LEN)))
    sampling = Sampling(1.0, max(work.summary_len, 2), END, banned=(END,))
    # so many users that no log-probs are stored
    update = setups.plan_update(cfg, model, prompts, sampling, num_users=10**9)
    roles = setups.Roles(update.plan.inference.role, update.plan.generator.role)
    init = partial(setups.init_state, model=model, roles=roles, config=cfg)
    both = "inference", "generator"
    trains = {"dpo": ("generator",), "grpo": ("inference",)}.get(work.kind, both)

    def make_frozen(seed: Any) -> Frozen:
        state = init(seed)
        params = {name: getattr(state, name).params for name in trains}
        return Frozen(params.get("inference", {}), params.get("generator", {}))

    def make_state(seed: Any) -> TrainState:  # of the roles that are trained
        idle: dict[str, Any] = {n: {} for n in both if n not in trains}
        return init(seed)._replace(**idle)

    frozen, state = jax.jit(make_frozen)(jnp.int32(1)), jax.jit(make_state)(jnp.int32(0))
    return Setup(work, cfg, update, state, frozen, make_users(work, geometry.vocab_size))


def make_rollouts(work: Workload, vocab_size: int) -> Rollouts:
    """Random samples, of which none ends early."""
    shape = work.users, work.group
    samples = make_tokens(np.random.default_rng(1), shape, work.summary_len, vocab_size)
    return Rollouts(samples, jnp.zeros(shape, bool), jnp.zeros((*shape, work.summary_len)))


def make_programs(
    work: Workload, geometry: Geometry, names: Container[str] | None = None, *, how: Compute = PLAIN
) -> list[Program]:
    """The programs of a workload, none compiled yet. names: of all that are to be made, of which at
    most one trains: it gets the state itself, so that memory holds no second one."""
    setup = make_setup(work, geometry, how)._replace(shared=names is None)
    wanted = lambda name: names is None or name in names  # noqa: E731
    if work.kind == "dpo":
        made = _make_preference_programs(setup)
    else:
        made = _make_sampling_programs(setup, make_rollouts(work, geometry.vocab_size))
        if work.kind == "popi":
            made = {name: made[name] for name in ("rollout", "inference_update")}
            made |= _make_joint_programs(setup)
    return [make() for name, make in made.items() if wanted(name)]


Makers = dict[str, Callable[[], Program]]  # name -> what makes the program


def _make_preference_programs(setup: Setup) -> Makers:
    """A preference step that scores the reference itself, and one for which it is stored."""
    score = setup.update.scorer.score_pairs
    users, frozen = setup.users, setup.frozen.generator
    contexts = jax.tree.map(lambda x: x[:, None], _make_dpo_contexts(setup))
    role, stored = setup.state.generator, f"generator_step{STORED_REFERENCE}"

    def step(role: Any, frozen: Any, contexts: Tokens, users: UserBatch) -> tuple[Any, Any]:
        return setup.train_generator(role, score(frozen, contexts, users), contexts, users)

    def make_stored() -> Program:
        reference = jax.jit(score)(frozen, contexts, users)
        return setup.make(stored, setup.train_generator, role, reference, contexts, users)

    return {
        "generator_step": partial(
            setup.make, "generator_step", step, role, frozen, contexts, users
        ),
        stored: make_stored,
    }


def _make_sampling_programs(setup: Setup, rollouts: Rollouts) -> Makers:
    """Samples alone, a policy-gradient step on given ones, and both."""
    users, frozen, role = setup.users, setup.frozen.inference, setup.state.inference
    zeros = jnp.zeros((*rollouts.finished.shape, users.pair_mask.shape[1]))
    margins = zeros + jnp.arange(zeros.shape[1], dtype=jnp.float32)[None, :, None]

    def sample(key: Any, params: Any, users: UserBatch) -> tuple[Any, Any]:
        return jax.random.fold_in(key, 1), setup.draw(params, users, key)

    def step(carry: Any, frozen: Any, margins: Any, users: UserBatch) -> tuple[Any, Any]:
        role, key = carry
        rollouts = setup.draw(role.params, users, key)
        role, metrics = setup.train_inference(role, frozen, margins, rollouts, users)
        return (role, jax.random.fold_in(key, 1)), metrics

    key, train = jax.random.key(0), setup.train_inference
    inputs = frozen, margins, rollouts, users
    return {
        "rollout": partial(setup.make, "rollout", sample, key, frozen, users),
        "inference_update": partial(setup.make, "inference_update", train, role, *inputs),
        "inference_step": partial(
            setup.make, "inference_step", step, (role, key), frozen, margins, users
        ),
    }


def _make_joint_programs(setup: Setup) -> Makers:
    """Rewards of summaries, a preference step behind one of them, and the whole update."""
    users, state, frozen = setup.users, setup.state, setup.frozen
    rollouts = make_rollouts(setup.work, setup.update.scorer.model.vocab_size)
    prefix = setup.update.plan.generator_prefix
    score = setup.update.scorer.score_pairs

    def reward(carry: Any, params: Any, contexts: Tokens, users: UserBatch) -> tuple[Any, Any]:
        return carry, score(params, contexts, users)

    def make_step() -> Program:
        nothing = repeat_ids(prefix, (setup.work.users, 1))
        reference = jax.jit(score)(frozen.generator, nothing, users)
        first = jax.tree.map(lambda x: x[:, :1], contexts)
        role, step = state.generator, setup.train_generator
        return setup.make("generator_step", step, role, reference, first, users)

    contexts = splice(prefix, rollouts.summaries, rollouts.finished)
    update = partial(popi_update, **setup.update._asdict())
    inputs = frozen.generator, contexts, users
    return {
        "reward": partial(setup.make, "reward", reward, jnp.int32(0), *inputs),
        "generator_step": make_step,
        "fused_update": partial(setup.make, "fused_update", update, state, frozen, users),
    }


def make_padded_and_dense(
    work: Workload, geometry: Geometry, cut: Callable[[UserBatch], UserBatch]
) -> dict[str, dict[str, Program]]:
    """Both gradient steps on texts of the lengths that `cut` leaves: with all their padding, and in
    no more places than they need."""
    setup = make_setup(work, geometry)
    users = jax.tree.map(jnp.asarray, cut(setup.users))
    # as long as the other texts: samples of a model that knows when to stop
    shape, drawn = (work.users, work.group), make_rollouts(work, 8)
    cut_users = cut(users._replace(context=drawn.summaries))
    summaries = jax.tree.map(jnp.asarray, cut_users.context)
    rollouts = drawn._replace(summaries=summaries, finished=jnp.ones(shape, bool))
    spliced = splice(setup.update.plan.generator_prefix, summaries, rollouts.finished)
    contexts = jax.tree.map(lambda x: x[:, :1], spliced)
    zeros = jnp.zeros((work.users, 1, work.pairs))
    numbers = jnp.arange(work.group, dtype=jnp.float32)
    margins = jnp.zeros((*shape, work.pairs)) + numbers[None, :, None]
    budgets = _count_budgets(users, contexts, summaries, work)
    state, plan = setup.state, setup.update.plan
    found: dict[str, dict[str, Program]] = {"generator step": {}, "inference step": {}}
    for kind, needed in (("padded", None), ("dense", budgets)):
        scorer = dataclasses.replace(setup.update.scorer, budgets=needed)
        train = partial(generator_step, plan=plan.generator, scorer=scorer)
        inputs: Any = {}, PairLogps(zeros, zeros), contexts, users
        step = partial(_take_two, train)
        program = setup.make(f"generator step/{kind}", step, state.generator, *inputs)
        found["generator step"][kind] = program
        learn = partial(inference_step, plan=plan.inference, scorer=scorer)
        inputs = state.inference.params, margins, None, rollouts, users
        step = partial(_take_two, learn)
        program = setup.make(f"inference step/{kind}", step, state.inference, *inputs)
        found["inference step"][kind] = program
    return found


def _take_two(step: Callable[..., Any], *args: Any) -> Any:
    """The role and the metrics alone of what a step returns."""
    return step(*args)[:2]


def _count_budgets(
    users: UserBatch, contexts: Tokens, summaries: Tokens, work: Workload
) -> Budgets:
    """No more places than these texts need."""

    def count(*texts: Tokens) -> int:
        return sum(int(text.lengths.sum()) for text in texts)

    replies = count(users.chosen, users.rejected)
    signals = count(users.context) + work.users * TURN_LEN
    return Budgets(
        shards=1,
        rollout_shards=1,
        rollout_signals=signals,
        signals=signals,
        contexts=count(contexts),
        summaries=-(-count(summaries) // work.group),
        pairs=count(users.turns) + replies,
        answers=replies,
    )


def _make_dpo_contexts(setup: Setup) -> Tokens:
    """What the pairs of a user share: the raw signals, or no more than a header."""
    work, signals = setup.work, setup.users.context
    if not work.signals_len:
        return repeat_ids(setup.update.plan.generator_prefix, (work.users,))
    ids = jnp.concatenate([signals.ids, signals.ids[:, :TURN_LEN]], axis=1)
    return Tokens(ids, jnp.full((work.users,), ids.shape[1], jnp.int32))
