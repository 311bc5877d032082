"""The forms of training: in parts, several steps per rollout, averages, adapters, frozen roles,
every optimizer."""

import dataclasses
import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popi_jax.arrays import Frozen, Mean, PairLogps, RoleState, Rollouts, Tokens, TrainState
from popi_jax.config import Config
from popi_jax.losses.preference import REFERENCE_FREE, WITH_REFERENCE
from popi_jax.models.transformer import join_adapters
from popi_jax.popi import scorer
from popi_jax.popi.plan import Judge, Reference, RolePlan
from popi_jax.popi.scorer import Scorer
from popi_jax.popi.update import popi_update
from popi_jax.training import optim, setup
from tests.oracles import plain
from tests.oracles.plain import MODEL
from tests.popi.test_steps import assert_close
from tests.training import small

SGD = optax.sgd(1.0)
JOINT = ("joint 8",)
PLAIN = setup.Roles(RolePlan(SGD), RolePlan(SGD))
LORA = {"rank": 2, "alpha": 3.0, "targets": ("q", "o", "down")}


def changed(
    generator: dict[str, Any] | None = None, inference: dict[str, Any] | None = None, **batch: Any
) -> Config:
    cfg = small.make_config()
    for name, values in (("generator", generator), ("inference", inference), ("batch", batch)):
        values = dict(values or {})
        if "lora" in values:
            values["lora"] = dataclasses.replace(getattr(cfg, name).lora, **values["lora"])
        cfg = small.replace(cfg, name, **values)
    return cfg


@functools.cache
def compiled(cfg: Config, phases: tuple[str, ...]) -> tuple[TrainState, Frozen, Any]:
    """(state, reference policies, update) with plain gradient descent."""
    made = small.make_update(cfg, SGD, phases=phases)
    mesh = small.make_mesh(1, 1, 1)
    with jax.set_mesh(mesh):
        state, frozen = small.make_state(cfg, small.roles_of(made), mesh)
        if cfg.inference.lora.rank:  # what the adapters stand on
            base, _ = small.make_state(small.make_config(), PLAIN, mesh)
            frozen = Frozen(base.inference.params, base.generator.params)
    return state, frozen, jax.jit(partial(popi_update, **made._asdict()))


def run(
    cfg: Config, updates: int = 1, phases: tuple[str, ...] = JOINT
) -> tuple[TrainState, TrainState, dict[str, Mean]]:
    """(state before, state after, metrics of the last update)."""
    before, frozen, program = compiled(cfg, phases)
    state = before
    with jax.set_mesh(small.make_mesh(1, 1, 1)):
        for i in range(updates):
            state, metrics = program(state, frozen, small.user_batch(i))
    return before, state, metrics


@functools.cache
def small_state() -> TrainState:
    """Of whole models without averages."""
    mesh = small.make_mesh(1, 1, 1)
    with jax.set_mesh(mesh):
        return small.make_state(small.make_config(), PLAIN, mesh)[0]


ADAPTED = changed(generator={"lora": LORA, "reference": "summary"}, inference={"lora": LORA})


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_an_update_in_parts_is_that_of_the_whole() -> None:
    """Under settings whose denominators are counts of tokens, of pairs and of samples."""
    settings_ = {
        "generator": {"objective": "ipo", "sft_coef": 0.3},
        "inference": {
            "normalise": "tokens",
            "entropy_coef": 0.01,
            "reward_baseline": True,
            "kl": "k1",
        },
    }
    _, whole, metrics = run(changed(**settings_))
    _, parts, of_parts = run(changed(**settings_, microbatches=4))
    for role in ("inference", "generator"):
        assert_close(getattr(parts, role).params, getattr(whole, role).params)
    assert metrics.keys() == of_parts.keys()
    for name, mean in metrics.items():
        np.testing.assert_allclose(
            of_parts[name].total / of_parts[name].weight, mean.total / mean.weight, rtol=2e-4
        )


@given(st.integers(0, 3), st.sampled_from([1, 2, 3, 6]))
@settings(max_examples=20, deadline=None)
def test_parts_hold_every_user_once(seed: int, num: int) -> None:
    x = np.random.default_rng(seed).normal(size=(6, 2))
    parts = scorer.split_microbatches(jnp.asarray(x), num)
    assert parts.shape == (num, 6 // num, 2)
    np.testing.assert_array_equal(parts[0], x[::num].astype(np.float32))
    np.testing.assert_array_equal(scorer.join_microbatches(parts), x.astype(np.float32))
    doubled = scorer.map_microbatches(lambda part: {"a": 2 * part}, jnp.asarray(x), num)
    np.testing.assert_array_equal(doubled["a"], 2 * x.astype(np.float32))


def test_several_steps_on_the_same_summaries() -> None:
    """The first step is that of a single one; the ratio then counts: far from the old policy the
    clip stops it."""
    alone = ("inference 8",)
    _, once, _ = run(changed(), phases=alone)
    _, twice, metrics = run(changed(inference={"updates_per_rollout": 2}), phases=alone)
    assert (once.inference.step, twice.inference.step) == (1, 2)
    assert 0 <= metrics["inference/clip_fraction"].total < metrics["inference/clip_fraction"].weight
    assert np.abs(flat(twice.inference.params) - flat(once.inference.params)).max() > 1e-4
    tight = {"updates_per_rollout": 2, "clip_low": 0.0, "clip_high": 0.0, "kl_coef": 0.0}
    _, _, told = run(changed(inference=tight), phases=alone)
    assert told["inference/clip_fraction"].total > 0.2 * told["inference/clip_fraction"].weight


def test_averages_follow_the_parameters() -> None:
    before, after, _ = run(changed(generator={"ema_decay": 0.75}, inference={"ema_decay": 0.5}))
    for role, decay in (("generator", 0.75), ("inference", 0.5)):
        old, new = flat(getattr(before, role).params), flat(getattr(after, role).params)
        assert np.abs(new - old).max() > 1e-4
        np.testing.assert_allclose(
            flat(getattr(after, role).ema), decay * old + (1 - decay) * new, atol=1e-6
        )
    assert small_state().generator.ema is None


def test_the_average_can_judge_summaries() -> None:
    """At the first update average and generator agree; later they do not."""
    keep: dict[str, Any] = {"generator": {"ema_decay": 0.75}, "inference": {"ema_decay": 0.5}}
    for updates, same in ((1, True), (3, False)):
        current = run(changed(**keep), updates)[2]["inference/reward"].total
        judged = {"generator": keep["generator"], "inference": {"reward_generator": "ema"}}
        averaged = run(changed(**judged), updates)[2]["inference/reward"].total
        assert bool(np.isclose(current, averaged, atol=1e-6)) == same


def test_adapters_alone_are_trained() -> None:
    before, after, metrics = run(ADAPTED)
    assert set(before.generator.params["layers"]) == {"attention", "mlp"}
    assert set(before.generator.params["layers"]["attention"]) == {"q", "o"}
    # adapters start as nothing, so policy and reference agree wherever both see the summary
    np.testing.assert_allclose(
        metrics["generator/loss"].total / metrics["generator/loss"].weight, np.log(2), atol=1e-6
    )
    np.testing.assert_allclose(metrics["inference/kl"].total, 0, atol=1e-6)
    for role in ("inference", "generator"):
        moved = jax.tree.map(
            lambda x, y: np.abs(x - y).max(),
            getattr(before, role).params,
            getattr(after, role).params,
        )
        of_b = [x for path, x in jax.tree_util.tree_leaves_with_path(moved) if path[-1].key == "b"]
        assert len(of_b) == 3 and max(of_b) > 1e-6


def test_policy_joins_adapters_and_leaves_whole_models() -> None:
    plan = small.make_update(changed(generator={"lora": LORA})).plan
    base, lora = {"w": 1}, {"layers": {"mlp": {"down": {"a": jnp.ones(2), "b": jnp.ones(2)}}}}
    joined = plan.generator.role.join_policy(lora, base)
    assert joined["params"] is base
    np.testing.assert_allclose(joined["lora"]["layers"]["mlp"]["down"]["b"], 1.5)
    assert plan.inference.role.join_policy(base, {}) is base


@pytest.mark.parametrize("name", WITH_REFERENCE + REFERENCE_FREE)
def test_every_objective_makes_a_step(name: str) -> None:
    """Traced, not run: the numbers are tested in tests/losses."""
    cfg = changed(generator={"objective": name, "label_smoothing": 0.1, "sft_coef": 1.0})
    state, users = small_state().generator, jax.tree.map(jnp.asarray, small.user_batch(0))
    contexts = jax.tree.map(lambda x: x[:, None], users.context)
    reference = (
        PairLogps(*(jnp.zeros((8, 1, 2)) for _ in range(2))) if name in WITH_REFERENCE else None
    )
    step = small.generator_program(small.make_update(cfg, SGD))
    after, metrics, _ = jax.eval_shape(step, state, state.params, reference, contexts, users)
    assert jax.tree.map(lambda x: x.shape, after.params) == jax.tree.map(
        lambda x: x.shape, state.params
    )
    assert {"generator/loss", "generator/accuracy", "generator/margin"} <= metrics.keys()


@pytest.mark.parametrize(
    "values",
    [
        {"ratio": "sequence"},
        {"ratio": "sequence_token", "normalise": "sequences"},
        {"normalise": "tokens", "clip_high": 0.28, "clip_max": 3.0},
        {"normalise": "max_len", "advantage_scale": "none"},
        {"kl": "k1", "advantage_baseline": "leave_one_out", "advantage_scale": "whiten"},
        {"kl": "k2", "advantage_baseline": "batch", "advantage_scale": "batch_rewards"},
        {"kl_corrected": True, "entropy_coef": 0.01, "skip_unfinished": True},
        {"high_entropy_share": 0.2, "entropy_coef": 0.01, "reward": "accuracy"},
        {"reward": "margin", "advantage_scale": "group", "updates_per_rollout": 3},
    ],
    ids=str,
)
def test_every_policy_objective_makes_a_step(values: dict[str, Any]) -> None:
    """Traced, not run, as above."""
    cfg = changed(inference=values)
    state, users = (
        small_state().inference,
        jax.tree.map(lambda x: jnp.asarray(x)[:2], small.user_batch(0)),
    )
    rng = np.random.default_rng(0)
    lengths = jnp.asarray([[4, 2, 4], [1, 4, 3]])
    ids = jnp.asarray(rng.integers(3, 64, (2, 3, 4)))
    rollouts = Rollouts(
        Tokens(ids, lengths), lengths < 4, jnp.asarray(-rng.random((2, 3, 4)) - 3.0, jnp.float32)
    )
    margins = jnp.asarray(rng.normal(size=(2, 3, 2)), jnp.float32)
    step = small.inference_program(small.make_update(cfg, SGD))
    after, metrics = jax.eval_shape(step, state, state.params, margins, None, rollouts, users)
    assert {"inference/loss", "inference/kl", "inference/reward"} <= metrics.keys()
    assert jax.tree.map(lambda x: x.shape, after.params) == jax.tree.map(
        lambda x: x.shape, state.params
    )


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_optimizers_lower_a_loss(name: str, schedule: str) -> None:
    cfg = dataclasses.replace(small.make_config().optimizer, name=name, schedule=schedule)
    tx = optim.optimizer(cfg, 0.05, 2, 40)
    target = jax.random.normal(jax.random.key(0), (2, 4, 2, 3))
    params = {
        "layers": {"q": {"kernel": jnp.zeros((2, 4, 2, 3))}, "norm": {"scale": jnp.zeros((2, 4))}}
    }

    def loss(params: Any) -> jax.Array:
        return jnp.mean((params["layers"]["q"]["kernel"] - target) ** 2) + jnp.mean(
            (params["layers"]["norm"]["scale"] - 1.0) ** 2
        )

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    start, state = loss(params), tx.init(params)
    for _ in range(40):
        params, state = step(params, state)
    assert loss(params) < 0.6 * start


def test_the_warm_up_has_an_optimizer_of_its_own() -> None:
    """Lion's first update has one size, AdamW's the same up to its epsilon; so the gradients are
    small beside that."""
    cfg = small.make_config()
    assert cfg.optimizer.name == "adamw"
    warmup = dataclasses.replace(
        cfg.warmup, optimizer="lion", learning_rate=0.5, lr_warmup_steps=0, steps=9
    )
    cfg = dataclasses.replace(cfg, warmup=warmup)
    params, grads = {"w": jnp.zeros(3)}, {"w": jnp.array([1e-9, -1e-9, 1e-9])}

    def first(tx: optax.GradientTransformation) -> jax.Array:
        return tx.update(grads, tx.init(params), params)[0]["w"]

    np.testing.assert_allclose(first(optim.warmup_transform(cfg)), [-0.5, 0.5, -0.5])
    main = first(optim.inference_transform(cfg, 9)) / cfg.inference.learning_rate
    assert (jnp.abs(main) < 0.2).all()


def test_learning_rates() -> None:
    cfg = small.make_config().optimizer
    ends = {"cosine": 0.2, "linear": 0.2, "constant": 1.0}
    for schedule, end in ends.items():
        rates = optim.learning_rates(dataclasses.replace(cfg, schedule=schedule), 1.0, 10, 110)
        np.testing.assert_allclose(
            [rates(0), rates(5), rates(10), rates(110)], [0.0, 0.5, 1.0, end], atol=1e-6
        )
    middle = [
        optim.learning_rates(dataclasses.replace(cfg, schedule=s), 1.0, 10, 110)(60) for s in ends
    ]
    np.testing.assert_allclose(middle, [0.6, 0.6, 1.0], atol=1e-6)


def test_muon_takes_each_layer_as_a_matrix() -> None:
    kernels = {"q": (3, 4, 2, 5), "o": (3, 2, 5, 4)}
    params = {"layers": {name: {"kernel": jnp.zeros(shape)} for name, shape in kernels.items()}}
    params |= {"embed": {"embedding": jnp.zeros((7, 4))}}
    found = optim.matrices(params)
    assert found["layers"]["q"]["kernel"] == ((1,), (2, 3))
    assert found["layers"]["o"]["kernel"] == ((1, 2), (3,))
    assert found["embed"]["embedding"] is None


def test_a_role_that_is_never_trained_needs_no_optimizer() -> None:
    cfg = small.make_config()
    made = small.make_update(cfg, phases=("inference 3",))
    mesh = small.make_mesh(1, 1, 1)
    with jax.set_mesh(mesh):
        state, frozen = small.make_state(cfg, small.roles_of(made), mesh)
        assert jax.tree.leaves(state.generator.opt_state) == []
        after, metrics = jax.jit(partial(popi_update, **made._asdict()))(
            state, frozen, small.user_batch(0)
        )
    np.testing.assert_array_equal(flat(after.generator.params), flat(state.generator.params))
    assert not [name for name in metrics if name.startswith("generator/")]
    again = setup.restart_optimizers(after, roles=small.roles_of(made))
    assert again.inference.step == 0 and again.step == after.step


@pytest.mark.parametrize("objective", ["kto", "ipo"])
def test_a_generator_step_in_parts_is_that_of_the_whole(objective: str) -> None:
    """Also where the loss of a pair depends on all pairs of the batch."""
    users = jax.tree.map(jnp.asarray, small.user_batch(0))
    rng, params = np.random.default_rng(0), plain.random_params(0)
    reference = PairLogps(*(jnp.float32(rng.uniform(-25, -15, (8, 1, 2))) for _ in range(2)))
    contexts = jax.tree.map(lambda x: x[:, None], users.context)
    found = []
    for parts in (1, 4):
        cfg = changed(generator={"objective": objective, "sft_coef": 0.3}, microbatches=parts)
        step = jax.jit(small.generator_program(small.make_update(cfg, SGD)))
        state = RoleState(jnp.int32(0), params, SGD.init(params))
        found.append(step(state, params, reference, contexts, users))
    (whole, metrics, margins), (parts, parts_metrics, parts_margins) = found
    assert_close(
        jax.tree.map(jnp.subtract, parts.params, params),
        jax.tree.map(jnp.subtract, whole.params, params),
    )
    np.testing.assert_allclose(parts_margins, margins, atol=1e-5)
    for name in ("generator/loss", "generator/grad_norm"):
        np.testing.assert_allclose(parts_metrics[name].total, metrics[name].total, rtol=1e-4)


def test_what_an_update_does_is_decided_once() -> None:
    """Where the reference comes from, whose margins are the reward, and what is read."""

    def decide(num_users: int = 10**9, **changes: Any) -> tuple[Reference, Judge, bool]:
        cfg, sampling = changed(**changes), small.make_update(small.make_config()).sampler.sampling
        plan = setup.plan_update(cfg, MODEL, small.GLUE, sampling, num_users=num_users).plan
        return plan.generator.reference, plan.inference.judge, setup.reads_frozen_generator(plan)

    drawn = 8 * 12 // setup.STORE_AT  # so many users are drawn often enough by all updates
    assert decide() == (Reference.PROMPT, Judge.CURRENT, True)
    assert decide(drawn) == (Reference.STORED, Judge.CURRENT, False)
    assert decide(drawn + 1) == (Reference.PROMPT, Judge.CURRENT, True)
    summary = {"reference": "summary"}
    assert decide(1, generator=summary) == (Reference.SUMMARY, Judge.CURRENT, True)
    assert decide(1, generator={"lora": LORA}) == (Reference.STORED, Judge.CURRENT, True)
    free = {"objective": "simpo"}
    assert decide(1, generator=free) == (Reference.NONE, Judge.CURRENT, False)
    frozen = {"reward_generator": "frozen"}
    assert decide(1, generator=free, inference=frozen) == (Reference.NONE, Judge.FROZEN, True)
    for changes in (
        {"generator": {"reference": "both"}},
        {"inference": {"reward_generator": "it"}},
    ):
        with pytest.raises(ValueError, match="both|it"):
            decide(**changes)


def test_joined_adapters_change_the_scores_of_pairs() -> None:
    """Adapters in the whole chain of a role: not only in one layer."""
    _, after, _ = run(ADAPTED, 2)
    base = compiled(ADAPTED, JOINT)[1].generator
    with jax.set_mesh(small.make_mesh(1, 1, 1)):
        users = jax.tree.map(jnp.asarray, small.user_batch(3))
        context = jax.tree.map(lambda x: x[:, None], users.context)
        score = jax.jit(Scorer(MODEL).score_pairs)
        before = score(base, context, users)
        whole = join_adapters(base, after.generator.params, scale=1.5)
        adapted = score(whole, context, users)
    assert np.abs(before.chosen - adapted.chosen).max() > 1e-4
