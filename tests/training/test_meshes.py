"""An update gives the same on any mesh, by any rules: tokens exactly, numbers to rounding; and the
compiled program has the layout that the rules promise."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import pytest

from configs import scales
from popi_jax.config_rules import parse_rules
from popi_jax.models.layout import Rules
from popi_jax.planning.program import Traffic, read
from popi_jax.sharding import place_batch
from tests.oracles.plain import MODEL, RULES
from tests.popi.test_update import CFG, values
from tests.training import small

FSDP = Rules(**parse_rules(scales.FSDP_RULES, "rules"))


class Case(NamedTuple):
    shape: tuple[int, int, int, int]  # data, fsdp, tensor, sequence
    rules: Rules


class Run(NamedTuple):
    tokens: np.ndarray
    metrics: dict[str, float]
    state: object
    traffic: Traffic


CASES = {
    "8x1x1": Case((8, 1, 1, 1), RULES),
    "2x2x2": Case((2, 2, 2, 1), RULES),
    "1x4x2": Case((1, 4, 2, 1), RULES),
    "2x2x1 and 2 of the sequence": Case((2, 2, 1, 2), RULES),
    "1x4x2, each device with users of its own": Case((1, 4, 2, 1), FSDP),
}


def joint_update(case: Case) -> Run:
    """Both roles at once, and the summaries that it sampled."""
    mesh, users = small.make_mesh(*case.shape), small.user_batch(0)
    with jax.set_mesh(mesh):
        model = dataclasses.replace(MODEL, rules=case.rules)
        made = small.make_update(CFG, model=model, phases=("joint 1",))
        state, frozen = small.make_state(CFG, small.roles_of(made), mesh, model)
        batch = place_batch(users, mesh, case.rules)
        key = jax.random.fold_in(state.key, state.step)
        draw = jax.jit(partial(made.sampler.sample, group_size=3))
        drawn = draw(state.inference.params, batch, key)
        layouts = jax.tree.map(lambda x: x.sharding, state)
        update = partial(popi_update, **made._asdict())
        options = {"donate_argnums": 0, "out_shardings": (layouts, None), "keep_unused": True}
        program = jax.jit(update, **options).lower(state, frozen, batch).compile()
        state, metrics = program(state, frozen, batch)
        traffic = read(program.as_text(), dict(mesh.shape))
        return Run(small.copied(drawn.summaries), values(metrics), small.copied(state), traffic)


@pytest.fixture(scope="module")
def one_device() -> Run:
    return joint_update(Case((1, 1, 1, 1), RULES))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_mesh_does_not_matter(
    case: Case, one_device: Run, capfd: pytest.CaptureFixture
) -> None:
    run = joint_update(case)
    assert "nvoluntary full rematerialization" not in capfd.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, run.tokens, one_device.tokens)
    assert run.metrics == pytest.approx(one_device.metrics, rel=1e-5, abs=1e-5)

    def check(path: tuple, x: np.ndarray, y: np.ndarray) -> None:
        np.testing.assert_allclose(x, y, atol=1e-5, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, run.state, one_device.state)
    check_layout(run.traffic, case)


def check_layout(traffic: Traffic, case: Case) -> None:
    """No step of sampling moves weights between devices, and the LM head is gathered before the
    chunks of tokens."""
    sampling = [
        c
        for c in traffic.collectives
        if any(loop.says("/decode/") or "decode" in loop.op_name for loop in c.loops)
    ]
    # what does move: sums of activations, and which token is the likeliest of the parts of a
    # vocabulary
    assert {c.kind for c in sampling} <= {"all-reduce", "all-gather"}
    assert all(c.bytes <= 3 * 8 * 32 * 4 for c in sampling)
    heads = [
        c
        for c in traffic.collectives
        if "head/all_gather" in c.op_name and c.kind != "reduce-scatter"
    ]
    if case.shape[1] > 1:
        assert heads
    assert not [c for c in heads if any("/head/" in loop.op_name for loop in c.loops)]
