"""One jitted update through all phases: what it trains, how often it compiles, and that devices do
not matter."""

import dataclasses
import logging
import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from popi_jax.arrays import Frozen, TrainState
from popi_jax.phases import parse_phases
from popi_jax.popi.plan import Kind, Reference
from popi_jax.popi.scorer import repeat_ids
from popi_jax.popi.update import popi_update
from popi_jax.sharding import place_batch
from popi_jax.training.setup import UpdateSetup, plan_kinds
from tests.oracles import losses as oracle
from tests.oracles import plain
from tests.oracles.plain import RULES
from tests.training import small

CFG = small.make_config()
KINDS = plan_kinds(small.phases())


def make_program(made: UpdateSetup, state: TrainState):
    layouts = jax.tree.map(lambda x: x.sharding, state)
    update = partial(popi_update, **made._asdict())
    return jax.jit(update, donate_argnums=0, out_shardings=(layouts, None))


def values(metrics: dict) -> dict[str, float]:
    return {
        name: float(m.total) / float(m.weight) for name, m in metrics.items() if float(m.weight) > 0
    }


def assert_same(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def differs(a, b) -> bool:
    return any((x != y).any() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture
def on_one_device():
    mesh = small.make_mesh(1, 1, 1)
    with jax.set_mesh(mesh):
        yield mesh


def test_kinds_of_the_phases() -> None:
    both, inference, generator = Kind(True, True), Kind(True, False), Kind(False, True)
    expected = (
        [inference] * 2 + [generator] * 2 + [inference, inference, generator] * 2 + [both] * 2
    )
    assert list(KINDS) == expected
    # an alternation may end inside a cycle, and the next phase begins with a new one
    cut = plan_kinds(parse_phases(("alternate 1:2 2", "alternate 1:2 2")))
    assert list(cut) == [inference, generator] * 2


def test_a_whole_schedule_is_one_compilation(
    on_one_device: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    """And in each update the idle role is untouched, and counts for nothing in the metrics."""
    made = small.make_update(CFG)
    state, frozen = small.make_state(CFG, small.roles_of(made), on_one_device)
    program = make_program(made, state)
    reference = small.copied(frozen)
    before = small.copied(state)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for step, (inference, generator, *_) in enumerate(KINDS):
            donated = state
            batch = place_batch(small.user_batch(step), on_one_device, RULES)
            with jax.transfer_guard("disallow"):
                state, metrics = program(state, frozen, batch)
            assert all(x.is_deleted() for x in jax.tree.leaves(donated.inference.params))
            assert all(x.is_deleted() for x in jax.tree.leaves(donated.generator.opt_state))
            after = small.copied(state)
            for name, trained in (("inference", inference), ("generator", generator)):
                if trained:
                    assert differs(getattr(before, name).params, getattr(after, name).params)
                else:
                    assert_same(getattr(before, name), getattr(after, name))
                weights = {
                    k: float(m.weight) for k, m in metrics.items() if k.startswith(f"{name}/")
                }
                assert len(weights) >= 4
                assert all((weight > 0) == bool(trained) for weight in weights.values()), weights
                assert values(metrics)[f"turn/{name}"] == float(trained)
            assert all(np.isfinite(list(values(metrics).values())))
            assert int(after.step) == step + 1
            np.testing.assert_array_equal(after.key, before.key)
            before = after
    assert program._cache_size() == 1
    finished = [
        m for r in caplog.records if (m := r.getMessage()).startswith("Finished XLA compilation")
    ]
    assert sum("popi_update" in message for message in finished) == 1
    assert (int(before.inference.step), int(before.generator.step)) == tuple(
        map(sum, zip(*(kind[:2] for kind in KINDS), strict=True))
    )
    assert_same(reference, small.copied(frozen))


def joint_start(state: TrainState) -> TrainState:
    """The state moved to the first update that trains both."""
    return state._replace(step=jax.device_put(jnp.int32(len(KINDS) - 2), state.step.sharding))


def test_a_joint_update_is_both_kinds_at_once(on_one_device: Mesh) -> None:
    """Though it takes the first margins from the generator's gradient; and stored log-probs of the
    reference change nothing."""
    whole = small.make_update(CFG)
    state, frozen = small.make_state(CFG, small.roles_of(whole), on_one_device)
    users = jax.tree.map(jnp.asarray, small.user_batch(0))

    def run(phase: str, reference: Reference, frozen: Frozen) -> TrainState:
        # the optimizers of the whole schedule, so that one state serves all
        made = small.with_roles(small.make_update(CFG, phases=(phase,)), small.roles_of(whole))
        generator = dataclasses.replace(made.plan.generator, reference=reference)
        made = made._replace(plan=dataclasses.replace(made.plan, generator=generator))
        return jax.jit(partial(popi_update, **made._asdict()))(state, frozen, users)[0]

    inference = run("inference 2", Reference.PROMPT, frozen).inference
    generator = run("generator 2", Reference.PROMPT, frozen).generator
    nothing = repeat_ids(small.GLUE.generator_prefix, (8, 1))
    logps = jax.jit(whole.scorer.score_pairs)(frozen.generator, nothing, users)
    stored = Frozen(frozen.inference, {}, jax.tree.map(jnp.ravel, logps))
    for joint in (
        run("joint 2", Reference.PROMPT, frozen),
        run("joint 2", Reference.STORED, stored),
    ):
        for found, expected in ((joint.inference, inference), (joint.generator, generator)):
            close = partial(np.testing.assert_allclose, atol=1e-5)
            jax.tree.map(close, found.params, expected.params)
        assert differs(joint.inference.params, state.inference.params)
        assert differs(joint.generator.params, state.generator.params)


class Run(NamedTuple):
    state: TrainState
    metrics: list[dict[str, float]]  # of each update
    compilations: int


def two_updates(shape: tuple[int, int, int], *, unpadded: bool = False) -> Run:
    mesh = small.make_mesh(*shape)
    with jax.set_mesh(mesh):
        budgets = small.fitting(
            [small.user_batch(0), small.user_batch(1)], shape[0] * shape[1], CFG
        )
        # the last phase alone, with the optimizers of the whole schedule: less to compile
        whole = small.make_update(CFG)
        made = small.make_update(CFG, budgets=budgets if unpadded else None, phases=("joint 2",))
        made = small.with_roles(made, small.roles_of(whole))
        state, frozen = small.make_state(CFG, small.roles_of(made), mesh)
        program = make_program(made, state)
        state = joint_start(state)
        seen = []
        for step in range(2):
            state, metrics = program(
                state, frozen, place_batch(small.user_batch(step), mesh, RULES)
            )
            seen.append(values(metrics))
        return Run(small.copied(state), seen, program._cache_size())


@pytest.fixture(scope="module")
def one_device() -> Run:
    return two_updates((1, 1, 1))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_rows_without_padding_give_the_same(
    shape: tuple[int, int, int], one_device: Run, capfd: pytest.CaptureFixture
) -> None:
    run = two_updates(shape, unpadded=True)
    names = ("inference/unpadded", "generator/unpadded")
    for found, whether in ((run, 1.0), (one_device, 0.0)):
        assert [[metrics[name] for name in names] for metrics in found.metrics] == [
            [whether] * 2
        ] * 2
    check_same_run(
        run._replace(metrics=[metrics | dict.fromkeys(names, 0.0) for metrics in run.metrics]),
        one_device,
        capfd,
    )


def check_same_run(run: Run, one_device: Run, capfd: pytest.CaptureFixture) -> None:
    assert run.compilations == 1
    assert "nvoluntary full rematerialization" not in capfd.readouterr().err
    for found, expected in zip(run.metrics, one_device.metrics, strict=True):
        for name in ("inference/summary_len", "inference/finished"):  # of the sampled tokens
            assert found[name] == expected[name]
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)

    def check(path: tuple, x: np.ndarray, y: np.ndarray) -> None:
        np.testing.assert_allclose(x, y, atol=1e-5, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, run.state, one_device.state)


GOLDEN = {
    "generator/loss": 0.7089832,
    "generator/margin": -0.0094208,
    "generator/grad_norm": 0.6985641,
    "inference/loss": 0.2476147,
    "inference/reward": -0.7717168,
    "inference/reward_std": 0.0285804,
    "inference/kl": 4.2557081,
    "inference/entropy": 3.2349399,
    "inference/grad_norm": 12.6188402,
    "inference/summary_len": 3.6666667,
    "inference/finished": 0.1666667,
}


def test_golden_update(one_device: Run) -> None:
    found = {name: value for name, value in one_device.metrics[1].items() if name in GOLDEN}
    message = (
        "Two updates of the smallest run give other numbers. Legitimate only if you meant to "
        "change the numerics (initial weights, sampling keys, losses, optimizer, model): say so in "
        f"the commit, and take over what is new from {one_device.metrics[1]}"
    )
    assert found == pytest.approx(GOLDEN, rel=2e-4, abs=1e-5), message


def test_metrics_are_those_of_plain_sequences_and_the_models_before_the_update(
    one_device: Run, on_one_device: Mesh
) -> None:
    made, users = small.make_update(CFG), small.user_batch(0)
    state, frozen = small.make_state(CFG, small.roles_of(made), on_one_device)
    state = joint_start(state)
    draw = jax.jit(partial(made.sampler.sample, group_size=3))
    rollouts = draw(
        state.inference.params,
        jax.tree.map(jnp.asarray, users),
        jax.random.fold_in(state.key, state.step),
    )
    assert 0 < rollouts.finished.sum() < rollouts.finished.size

    def pair_sums(params: dict, summaries: list[list[int]]) -> np.ndarray:
        """[users pairs 2]: one summary per user."""
        sequences = [
            plain.Scored(
                [*small.GLUE.generator_prefix, *summaries[u], *plain.row(users.turns, u, k)],
                plain.row(y, u, k),
            )
            for u, k in np.ndindex(8, 2)
            for y in (users.chosen, users.rejected)
        ]
        return np.array([x.sum() for x in plain.logps_and_pullback(params, sequences)[0]]).reshape(
            8, 2, 2
        )

    reference = pair_sums(frozen.generator, [[]] * 8)
    losses = []
    for g in range(3):
        summaries = [
            plain.row(rollouts.summaries, u, g)[: -1 if rollouts.finished[u, g] else None]
            for u in range(8)
        ]
        policy = pair_sums(state.generator.params, summaries)
        found, _ = oracle.dpo(
            *np.moveaxis(policy, -1, 0), *np.moveaxis(reference, -1, 0), CFG.generator.beta
        )
        losses.append(found)
    losses = np.stack(losses, axis=1)  # [users group pairs]
    lengths = np.asarray(rollouts.summaries.lengths)
    mask = users.pair_mask[:, None]
    rewards = -(losses * mask).sum(-1) / mask.sum(-1) - CFG.inference.length_penalty * lengths
    metrics = one_device.metrics[0]
    np.testing.assert_allclose(
        metrics["generator/loss"], losses[:, 0][users.pair_mask].mean(), rtol=1e-4
    )
    np.testing.assert_allclose(metrics["inference/reward"], rewards.mean(), rtol=1e-4)
    np.testing.assert_allclose(
        metrics["inference/reward_std"], rewards.std(-1, ddof=1).mean(), rtol=1e-3
    )
    correct = (losses < np.log(2))[np.broadcast_to(mask, losses.shape)]
    np.testing.assert_allclose(metrics["inference/accuracy"], correct.mean(), rtol=1e-4)
    assert metrics["inference/summary_len"] == pytest.approx(lengths.mean())
    assert metrics["inference/finished"] == pytest.approx(np.mean(rollouts.finished))


def test_the_compiled_update_never_leaves_the_device(on_one_device: Mesh) -> None:
    made = small.make_update(CFG)
    state, frozen = small.make_state(CFG, small.roles_of(made), on_one_device)
    batch = place_batch(small.user_batch(0), on_one_device, RULES)
    text = make_program(made, state).lower(state, frozen, batch).compile().as_text()
    assert "while(" in text and "conditional(" in text
    assert not re.findall(r"infeed|outfeed|\w*callback\w*|\bsend\b|\brecv\b|MoveToHost", text)
    aliases = text[: text.index("\n")].split("input_output_alias=")[1].split("}, entry")[0]
    assert (
        aliases.count("alias)") >= len(jax.tree.leaves(state)) - 1
    )  # all of the state is donated but the key
