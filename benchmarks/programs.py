"""The jitted programs of a workload with random inputs: the very functions that `make train`
runs."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from popi_jax.popi.roles import Budgets, Glue, empty_summary, pair_logps, rollout, splice
from popi_jax.popi.steps import generator_step, inference_step

from benchmarks.workloads import Geometry, Workload
from configs.base import compose
from popi_jax.arrays import Rollouts, Tokens, UserBatch
from popi_jax.config import Config, from_config_dict, parse_phases
from popi_jax.losses.preference import PairLogps
from popi_jax.models.decode import Sampling
from popi_jax.models.transformer import TransformerConfig
from popi_jax.popi.update import Parts, popi_update
from popi_jax.training import optim
from popi_jax.training.setup import Frozen, Transforms, init_state

END = 1
PREFIX_LEN = 4  # tokens of a conversation's header, part of the signals or the prompt
TURN_LEN = 4  # tokens that ask for a summary, part of the signals


class Program(NamedTuple):
    """`step(carry, *inputs)` returns (carry, results); the carry is donated."""

    name: str
    step: Callable[..., tuple[Any, Any]]
    carry: Any
    inputs: tuple[Any, ...]
    compute_dtype: str


def transformer(
    geometry: Geometry, *, dtype: str = "float32", remat: str = "none"
) -> TransformerConfig:
    return TransformerConfig(**geometry._asdict(), dtype=dtype, remat=remat)


def config(work: Workload, phase: str) -> Config:
    c = compose("scale=laptop")
    c.name = "bench"
    c.warmup.steps = 0
    c.batch.users, c.batch.pairs = work.users, max(work.pairs, 1)
    c.inference.group_size = max(work.group, 2)
    c.inference.kl_coef = 0.04
    c.data.summary_len = max(work.summary_len, 2)
    c.schedule.phases = (f"{phase} 1000",)
    return from_config_dict(c)


def tokens(rng: np.random.Generator, rows: tuple[int, ...], length: int, vocab_size: int) -> Tokens:
    ids = rng.integers(2, vocab_size, (*rows, length)).astype(np.int32)
    return Tokens(jnp.asarray(ids), jnp.full(rows, length, jnp.int32))


def user_batch(work: Workload, vocab_size: int, seed: int = 0) -> UserBatch:
    """Users whose texts all have the full length; the headers of a conversation count as part of
    the texts."""
    rng = np.random.default_rng(seed)
    users, pairs = work.users, max(work.pairs, 1)
    behind = (
        work.prompt_len if work.kind == "popi" or work.signals_len else work.prompt_len - PREFIX_LEN
    )
    return UserBatch(
        index=jnp.arange(users, dtype=jnp.int32),
        context=tokens(rng, (users,), max(work.signals_len - TURN_LEN, 1), vocab_size),
        turns=tokens(rng, (users, pairs), max(behind, 1), vocab_size),
        chosen=tokens(rng, (users, pairs), max(work.answer_len, 2), vocab_size),
        rejected=tokens(rng, (users, pairs), max(work.answer_len, 2), vocab_size),
        pair_mask=jnp.ones((users, pairs), bool),
        pair_number=jnp.arange(users * pairs, dtype=jnp.int32).reshape(users, pairs),
    )


def programs(
    work: Workload, geometry: Geometry, *, dtype: str = "float32", remat: str = "none"
) -> list[Program]:
    """The programs of a workload, none compiled yet."""
    model = transformer(geometry, dtype=dtype, remat=remat)
    phase = {"dpo": "generator", "grpo": "inference", "popi": "joint"}[work.kind]
    cfg = config(work, phase)
    glue = Glue(tuple(range(2, 2 + PREFIX_LEN)), tuple(range(2, 2 + TURN_LEN)))
    sampling = Sampling(1.0, max(work.summary_len, 2), END, banned=(END,))
    transforms = Transforms(
        optim.inference_transform(cfg, 1000), optim.generator_transform(cfg, 1000)
    )
    parts = Parts(model, transforms, glue, sampling, cfg, first_step=0)
    init = jax.jit(partial(init_state, model=model, transforms=transforms, cfg=cfg))
    state, other = init(jnp.int32(0)), init(jnp.int32(1))
    frozen = Frozen(other.inference.params, other.generator.params)
    users = user_batch(work, geometry.vocab_size)
    made: list[Program] = []

    def add(name: str, step: Callable[..., tuple[Any, Any]], carry: Any, *inputs: Any) -> None:
        copied = jax.tree.map(jnp.copy, carry)
        made.append(
            Program(f"{work.name}/{name}", jax.jit(step, donate_argnums=0), copied, inputs, dtype)
        )

    step_of = partial(generator_step, model=model, tx=transforms.generator, cfg=cfg)
    if work.kind == "dpo":
        contexts = jax.tree.map(lambda x: x[:, None], _dpo_contexts(work, users, glue))

        def generator(
            role: Any, frozen: Any, contexts: Tokens, users: UserBatch
        ) -> tuple[Any, Any]:
            reference = pair_logps(frozen, contexts, users, model=model)
            return step_of(role, frozen, reference, contexts, users)[:2]

        def stored(
            role: Any, reference: PairLogps, contexts: Tokens, users: UserBatch
        ) -> tuple[Any, Any]:
            return step_of(role, {}, reference, contexts, users)[:2]

        reference = jax.jit(partial(pair_logps, model=model))(frozen.generator, contexts, users)
        add("generator_step", generator, state.generator, frozen.generator, contexts, users)
        add("generator_step+stored_reference", stored, state.generator, reference, contexts, users)
        return made

    draw = partial(
        rollout, model=model, glue=glue, sampling=sampling, group_size=cfg.inference.group_size
    )

    def sample(key: Any, params: Any, users: UserBatch) -> tuple[Any, Any]:
        return jax.random.fold_in(key, 1), draw(params, users, key)

    rollouts = jax.jit(lambda params, users, key: draw(params, users, key))(
        state.inference.params, users, jax.random.key(0)
    )
    margins = (
        jnp.zeros((work.users, cfg.inference.group_size, max(work.pairs, 1)))
        + rollouts.logps[:, :, :1]
    )
    update = partial(inference_step, model=model, tx=transforms.inference, glue=glue, cfg=cfg)

    def learn(
        role: Any, frozen: Any, margins: Any, rollouts: Any, users: UserBatch
    ) -> tuple[Any, Any]:
        return update(role, frozen, margins, None, rollouts, users)

    def both(carry: Any, frozen: Any, margins: Any, users: UserBatch) -> tuple[Any, Any]:
        role, key = carry
        rollouts = draw(role.params, users, key)
        role, metrics = update(role, frozen, margins, None, rollouts, users)
        return (role, jax.random.fold_in(key, 1)), metrics

    add("rollout", sample, jax.random.key(0), state.inference.params, users)
    add("inference_update", learn, state.inference, frozen.inference, margins, rollouts, users)
    if work.kind == "grpo":
        add(
            "inference_step",
            both,
            (state.inference, jax.random.key(0)),
            frozen.inference,
            margins,
            users,
        )
        return made

    contexts = splice(glue.generator_prefix, rollouts.summaries, rollouts.finished)

    def reward(carry: Any, params: Any, contexts: Tokens, users: UserBatch) -> tuple[Any, Any]:
        return carry, pair_logps(params, contexts, users, model=model)

    nothing = jax.tree.map(lambda x: x[:, None], empty_summary(glue.generator_prefix, work.users))
    reference = jax.jit(partial(pair_logps, model=model))(frozen.generator, nothing, users)
    first = jax.tree.map(lambda x: x[:, :1], contexts)
    add("reward", reward, jnp.int32(0), state.generator.params, contexts, users)
    add(
        "generator_step",
        lambda role, *rest: step_of(role, {}, *rest)[:2],
        state.generator,
        reference,
        first,
        users,
    )
    fused = partial(popi_update, parts=parts, phases=parse_phases(cfg.schedule.phases))
    add(
        "fused_update",
        lambda state, frozen, users: fused(state, frozen, users),
        state,
        frozen,
        users,
    )
    return made


def padded_and_dense(
    work: Workload, geometry: Geometry, uneven: Callable[[UserBatch], UserBatch]
) -> dict[str, dict[str, Program]]:
    """Both gradient steps on texts of uneven lengths: with all their padding, and in no more places
    than they need."""
    model, cfg = transformer(geometry), config(work, "joint")
    glue = Glue(tuple(range(2, 2 + PREFIX_LEN)), tuple(range(2, 2 + TURN_LEN)))
    transforms = Transforms(
        optim.inference_transform(cfg, 1000), optim.generator_transform(cfg, 1000)
    )
    state = jax.jit(partial(init_state, model=model, transforms=transforms, cfg=cfg))(jnp.int32(0))
    frozen = jax.tree.map(jnp.copy, state.inference.params)
    users = jax.tree.map(jnp.asarray, uneven(user_batch(work, geometry.vocab_size)))
    # as long as the other texts: samples of a model that knows when to stop
    drawn = uneven(
        users._replace(
            context=tokens(np.random.default_rng(1), (work.users, work.group), work.summary_len, 8)
        )
    )
    summaries = jax.tree.map(jnp.asarray, drawn.context)
    shape = work.users, work.group
    rollouts = Rollouts(summaries, jnp.ones(shape, bool), jnp.zeros((*shape, work.summary_len)))
    contexts = jax.tree.map(
        lambda x: x[:, :1], splice(glue.generator_prefix, summaries, rollouts.finished)
    )
    zeros = jnp.zeros((work.users, 1, work.pairs))
    margins = (
        jnp.zeros((*shape, work.pairs)) + jnp.arange(work.group, dtype=jnp.float32)[None, :, None]
    )

    def count(*parts: Tokens) -> int:
        return sum(int(part.lengths.sum()) for part in parts)

    replies = count(users.chosen, users.rejected)
    signals = count(users.context) + work.users * TURN_LEN
    needed = Budgets(
        shards=1,
        rollout_shards=1,
        rollout_signals=signals,
        signals=signals,
        contexts=count(contexts),
        summaries=-(-count(summaries) // work.group),
        pairs=count(users.turns) + replies,
        answers=replies,
    )
    found: dict[str, dict[str, Program]] = {"generator step": {}, "inference step": {}}
    for kind, budgets in (("padded", None), ("dense", needed)):
        static: Any = {"model": model, "cfg": cfg, "budgets": budgets}

        def generator(role: Any, users: UserBatch, static: Any = static) -> tuple[Any, Any]:
            reference = PairLogps(zeros, zeros)
            return generator_step(
                role, {}, reference, contexts, users, tx=transforms.generator, **static
            )[:2]

        def inference(
            role: Any, frozen: Any, users: UserBatch, static: Any = static
        ) -> tuple[Any, Any]:
            more: Any = {"tx": transforms.inference, "glue": glue}
            return inference_step(role, frozen, margins, None, rollouts, users, **more, **static)

        for name, step, role, rest in (
            ("generator step", generator, state.generator, ()),
            ("inference step", inference, state.inference, (frozen,)),
        ):
            carry, inputs = jax.tree.map(jnp.copy, role), (*rest, users)
            found[name][kind] = Program(
                f"{name}/{kind}", jax.jit(step, donate_argnums=0), carry, inputs, model.dtype
            )
    return found


def _dpo_contexts(work: Workload, users: UserBatch, glue: Glue) -> Tokens:
    """What the pairs of a user share: the raw signals, or no more than a header."""
    if not work.signals_len:
        return empty_summary(glue.generator_prefix, work.users)
    ids = jnp.concatenate([users.context.ids, users.context.ids[:, :TURN_LEN]], axis=1)
    return Tokens(ids, jnp.full((work.users,), ids.shape[1], jnp.int32))
