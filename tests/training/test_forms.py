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
from jax.extend.core import jaxprs_in_params
from popi_jax.popi.roles import pair_logps
from popi_jax.popi.steps import generator_step, inference_step

from popi_jax.arrays import Mean, Rollouts, Tokens
from popi_jax.config import Config
from popi_jax.losses.preference import REFERENCE_FREE, WITH_REFERENCE, PairLogps
from popi_jax.models.lora import join
from popi_jax.models.transformer import init_boxed, unbox
from popi_jax.popi.update import popi_update
from popi_jax.training import microbatches, optim
from popi_jax.training.setup import (
    Frozen,
    RoleState,
    TrainState,
    Transforms,
    init_state,
    policy,
    restart_optimizers,
)
from tests.oracles.plain import MODEL
from tests.popi.test_steps import assert_close
from tests.training import small

SGD = optax.sgd(1.0)
JOINT = small.parse_phases(("joint 8",))
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
def compiled(cfg: Config) -> tuple[TrainState, Frozen, Any]:
    """(state, reference policies, update) with plain gradient descent."""
    parts = small.make_parts(cfg, Transforms(SGD, SGD))
    mesh = small.make_mesh(1, 1, 1)
    with jax.set_mesh(mesh):
        state, frozen = small.make_state(parts, mesh)
        if cfg.inference.lora.rank:  # what the adapters stand on
            base, _ = small.make_state(
                small.make_parts(small.make_config(), Transforms(SGD, SGD)), mesh
            )
            frozen = Frozen(base.inference.params, base.generator.params)
    return state, frozen, jax.jit(partial(popi_update, parts=parts, phases=JOINT))


def run(cfg: Config, updates: int = 1) -> tuple[TrainState, TrainState, dict[str, Mean]]:
    """(state before, state after, metrics of the last update)."""
    before, frozen, program = compiled(cfg)
    state = before
    with jax.set_mesh(small.make_mesh(1, 1, 1)):
        for i in range(updates):
            state, metrics = program(state, frozen, small.user_batch(i))
    return before, state, metrics


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
    parts = microbatches.split(jnp.asarray(x), num)
    assert parts.shape == (num, 6 // num, 2)
    np.testing.assert_array_equal(parts[0], x[::num].astype(np.float32))
    np.testing.assert_array_equal(microbatches.join(parts), x.astype(np.float32))
    doubled = microbatches.by_parts(lambda part: {"a": 2 * part}, jnp.asarray(x), num)
    np.testing.assert_array_equal(doubled["a"], 2 * x.astype(np.float32))


def test_several_steps_on_the_same_summaries() -> None:
    """The first step is that of a single one; the ratio then counts: far from the old policy the
    clip stops it."""
    _, once, _ = run(changed())
    _, twice, metrics = run(changed(inference={"updates_per_rollout": 2}))
    assert (once.inference.step, twice.inference.step) == (1, 2)
    assert 0 <= metrics["inference/clip_fraction"].total < metrics["inference/clip_fraction"].weight
    assert np.abs(flat(twice.inference.params) - flat(once.inference.params)).max() > 1e-4
    tight = {"updates_per_rollout": 2, "clip_low": 0.0, "clip_high": 0.0, "kl_coef": 0.0}
    _, _, told = run(changed(inference=tight))
    assert told["inference/clip_fraction"].total > 0.2 * told["inference/clip_fraction"].weight


def test_averages_follow_the_parameters() -> None:
    before, after, _ = run(changed(generator={"ema_decay": 0.75}, inference={"ema_decay": 0.5}))
    for role, decay in (("generator", 0.75), ("inference", 0.5)):
        old, new = flat(getattr(before, role).params), flat(getattr(after, role).params)
        assert np.abs(new - old).max() > 1e-4
        np.testing.assert_allclose(
            flat(getattr(after, role).ema), decay * old + (1 - decay) * new, atol=1e-6
        )
    assert run(changed())[1].generator.ema is None


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


def with_adapters(cfg: Config) -> tuple[TrainState, Frozen]:
    """Adapters that already change much, on a base of each role."""
    mesh = small.make_mesh(1, 1, 1)
    state, _ = small.make_state(small.make_parts(cfg, Transforms(SGD, SGD)), mesh)
    base, _ = small.make_state(small.make_parts(small.make_config(), Transforms(SGD, SGD)), mesh)
    rng = np.random.default_rng(0)

    def moved(role: RoleState) -> RoleState:
        return role._replace(
            params=jax.tree.map(lambda x: jnp.float32(rng.normal(0, 0.3, x.shape)), role.params)
        )

    state = state._replace(inference=moved(state.inference), generator=moved(state.generator))
    return state, Frozen(base.inference.params, base.generator.params)


def as_whole_models(state: TrainState, frozen: Frozen) -> TrainState:
    """The same models with base and adapters for their parameters: their references are scored
    apart."""

    def whole(role: RoleState, base: Any) -> RoleState:
        params = join(base, role.params, scale=1.0)
        return role._replace(params=params, opt_state=SGD.init(params))

    inference, generator = (
        whole(state.inference, frozen.inference),
        whole(state.generator, frozen.generator),
    )
    return state._replace(inference=inference, generator=generator)


def test_one_pass_for_policy_and_reference_is_the_update_of_two() -> None:
    """Whatever the turn, and in parts."""
    lora: dict[str, Any] = {
        "lora": {**LORA, "alpha": LORA["rank"]}
    }  # a factor of 1, as in `as_whole_models`
    inference, generator = {"reward_baseline": True, "entropy_coef": 0.01}, {"reference": "summary"}
    adapted = changed(generator | lora, inference | lora, microbatches=2)
    users, phases = (
        small.user_batch(0),
        small.parse_phases(("inference 1", "generator 1", "joint 1")),
    )
    one, two = (
        jax.jit(
            partial(popi_update, parts=small.make_parts(cfg, Transforms(SGD, SGD)), phases=phases)
        )
        for cfg in (adapted, changed(generator, inference))
    )
    with jax.set_mesh(small.make_mesh(1, 1, 1)):
        state, frozen = with_adapters(adapted)
        apart = as_whole_models(state, frozen)
        for step, trained in enumerate(
            (("inference",), ("generator",), ("inference", "generator"))
        ):
            after, metrics = one(state._replace(step=jnp.int32(step)), frozen, users)
            expected, of_two = two(apart._replace(step=jnp.int32(step)), frozen, users)
            assert metrics.keys() == of_two.keys()
            for role in ("inference", "generator"):
                found, wanted = getattr(after, role).params, getattr(expected, role).params["lora"]
                np.testing.assert_allclose(flat(found), flat(wanted), atol=1e-5)
                change = np.linalg.norm(flat(found) - flat(getattr(state, role).params))
                assert (change > 1e-3) == (role in trained)
                np.testing.assert_allclose(metrics[f"{role}/grad_norm"].total, change, rtol=1e-4)
            for name in metrics.keys() - {"inference/grad_norm", "generator/grad_norm"}:
                x, y = (m[name].total / np.maximum(m[name].weight, 1e-9) for m in (metrics, of_two))
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=name)


def loops_over_layers(cfg: Config, turn: str) -> int:
    """How often an update runs through the layers, forward or backward. Traced, not run."""
    model = dataclasses.replace(MODEL, num_layers=7)  # a length that nothing else has
    parts = small.make_parts(cfg, Transforms(SGD, SGD))._replace(model=model)
    init = partial(init_state, model=model, transforms=parts.transforms, cfg=cfg)
    base = jax.eval_shape(lambda: unbox(init_boxed(jax.random.key(0), model)))
    update = partial(popi_update, parts=parts, phases=small.parse_phases((turn,)))
    users = jax.tree.map(jnp.asarray, small.user_batch(0))

    def count(jaxpr: Any) -> int:
        own = sum(e.primitive.name == "scan" and e.params["length"] == 7 for e in jaxpr.eqns)
        return own + sum(count(inner) for e in jaxpr.eqns for inner in jaxprs_in_params(e.params))

    return count(
        jax.make_jaxpr(update)(jax.eval_shape(init, jnp.int32(0)), Frozen(base, base), users).jaxpr
    )


def test_the_reference_of_adapters_has_a_pass_of_its_own_where_it_must() -> None:
    """Loops over the layers in an update: sampling has two, a gradient two, and a pass without
    gradient one."""

    def loops(turn: str, **inference: Any) -> int:
        return loops_over_layers(
            changed({"reference": "summary", "lora": LORA}, {**inference, "lora": LORA}), turn
        )

    assert loops("generator 1") == 2 + 2
    of_rewards = 1  # policy and reference on the pairs
    assert loops("inference 1") == 2 + of_rewards + 2
    assert loops("joint 1") == 2 + 2 + of_rewards + 2
    assert loops("inference 1", kl="k1") == 2 + of_rewards + 1 + 2
    assert loops("inference 1", updates_per_rollout=2) == 2 + of_rewards + 1 + 2
    assert loops("joint 1", reward_generator="frozen") == 2 + 2 + (1 + 1) + 2


def test_policy_joins_adapters_and_leaves_whole_models() -> None:
    cfg = changed(generator={"lora": LORA})
    base, lora = {"w": 1}, {"layers": {"mlp": {"down": {"a": jnp.ones(2), "b": jnp.ones(2)}}}}
    joined = policy(lora, base, cfg.generator)
    assert joined["params"] is base
    np.testing.assert_allclose(joined["lora"]["layers"]["mlp"]["down"]["b"], 1.5)
    assert policy(base, {}, cfg.inference) is base


@pytest.mark.parametrize("name", WITH_REFERENCE + REFERENCE_FREE)
def test_every_objective_makes_a_step(name: str) -> None:
    """Traced, not run: the numbers are tested in tests/losses."""
    cfg = changed(generator={"objective": name, "label_smoothing": 0.1, "sft_coef": 1.0})
    state, users = compiled(changed())[0].generator, jax.tree.map(jnp.asarray, small.user_batch(0))
    contexts = jax.tree.map(lambda x: x[:, None], users.context)
    reference = (
        PairLogps(*(jnp.zeros((8, 1, 2)) for _ in range(2))) if name in WITH_REFERENCE else None
    )
    step = partial(generator_step, model=MODEL, tx=SGD, cfg=cfg)
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
        compiled(changed())[0].inference,
        jax.tree.map(lambda x: jnp.asarray(x)[:2], small.user_batch(0)),
    )
    rng = np.random.default_rng(0)
    lengths = jnp.asarray([[4, 2, 4], [1, 4, 3]])
    ids = jnp.asarray(rng.integers(3, 64, (2, 3, 4)))
    rollouts = Rollouts(
        Tokens(ids, lengths), lengths < 4, jnp.asarray(-rng.random((2, 3, 4)) - 3.0, jnp.float32)
    )
    margins = jnp.asarray(rng.normal(size=(2, 3, 2)), jnp.float32)
    step = partial(inference_step, model=MODEL, tx=SGD, glue=small.GLUE, cfg=cfg)
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
    parts = small.make_parts(
        cfg, Transforms(optim.inference_transform(cfg, 3), optim.generator_transform(cfg, 0))
    )
    mesh = small.make_mesh(1, 1, 1)
    with jax.set_mesh(mesh):
        state, frozen = small.make_state(parts, mesh)
        assert jax.tree.leaves(state.generator.opt_state) == []
        program = jax.jit(
            partial(popi_update, parts=parts, phases=small.parse_phases(("inference 3",)))
        )
        after, _ = program(state, frozen, small.user_batch(0))
    np.testing.assert_array_equal(flat(after.generator.params), flat(state.generator.params))
    again = restart_optimizers(after, transforms=parts.transforms, cfg=cfg)
    assert again.inference.step == 0 and again.step == after.step


def test_joined_adapters_change_the_scores_of_pairs() -> None:
    """Adapters in the whole chain of a role: not only in one layer."""
    _, after, _ = run(ADAPTED, 2)
    base = compiled(ADAPTED)[1].generator
    with jax.set_mesh(small.make_mesh(1, 1, 1)):
        users = jax.tree.map(jnp.asarray, small.user_batch(3))
        context = jax.tree.map(lambda x: x[:, None], users.context)
        score = jax.jit(partial(pair_logps, model=MODEL))
        plain = score(base, context, users)
        adapted = score(join(base, after.generator.params, scale=1.5), context, users)
    assert np.abs(plain.chosen - adapted.chosen).max() > 1e-4
