"""Baselines: updates that sample no summary, against sequences that are written out; a run of one
continues as if it never stopped."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from popi_jax.arrays import Frozen, TrainState, UserBatch
from popi_jax.config import Config
from popi_jax.data.measure import Fill, Totals
from popi_jax.distributed import StopRequest
from popi_jax.errors import UserError
from popi_jax.popi.update import popi_update
from popi_jax.run import open_run
from popi_jax.sharding import place_batch
from popi_jax.training import loop, setup, stage
from tests.oracles import losses as oracle
from tests.oracles import plain
from tests.oracles.plain import MODEL, RULES
from tests.popi.test_steps import assert_close
from tests.tiny_run import load_tiny, on_devices
from tests.training import small
from tests.training.test_advertised_rows import TINY

SGD = optax.sgd(1.0)
TOLD, SUPERVISED = ("generator 1",), ("supervised 1",)


def with_texts() -> UserBatch:
    """Users of whom something is told, and a summary is taught, but for one."""
    rng = np.random.default_rng(9)
    told = small.random_tokens(rng, (8,), 6)
    taught = small.random_tokens(rng, (8,), 4, ended=True)
    taught.lengths[2] = 0
    return small.user_batch(0)._replace(told=told, taught=taught)


def told_config(reads: str, microbatches: int = 1) -> Config:
    cfg = small.replace(small.make_config(), "generator", reads=reads)
    return small.replace(cfg, "batch", microbatches=microbatches)


def budgets_of(cfg: Config, users: UserBatch, shards: int) -> Any:
    """As a run plans them, of the lengths that the users have."""
    fill = Fill(
        contexts=Totals(((1, 1, 10),)),
        pairs=Totals(((1, 1, 26),)),
        answers=Totals(((1, 1, 16),)),
        warmup={},
        told=Totals(() if users.told is None else ((1, 1, 6),)),
    )
    with jax.set_mesh(small.make_mesh(1, shards, 1)):
        return setup.plan_budgets(fill, small.GLUE, MODEL, cfg, summary_fill=1.0)


def update(
    cfg: Config, users: UserBatch, phases: tuple[str, ...], devices: int, *, fits: bool
) -> tuple[TrainState, Frozen, TrainState, dict]:
    """(before, frozen, after, metrics) of one update by plain gradient descent."""
    budgets = budgets_of(cfg, users, devices) if fits else None
    made = small.make_update(cfg, SGD, budgets, phases=phases)
    mesh = small.make_mesh(1, devices, 1)
    with jax.set_mesh(mesh):
        state, frozen = small.make_state(cfg, small.roles_of(made), mesh)
        before = small.copied(state)
        program = jax.jit(partial(popi_update, **made._asdict()))
        after, metrics = program(state, frozen, place_batch(users, mesh, RULES))
        return before, small.copied(frozen), small.copied(after), small.copied(metrics)


def dpo_by_hand(
    params: dict, reference: dict, users: UserBatch, told: list[list[int]], cfg: Config
) -> tuple[float, dict]:
    """The mean loss and its gradient, each reply written out behind all that it follows. The
    reference sees the prompt alone."""
    places = [(u, k) for u, k in np.ndindex(8, 2) if users.pair_mask[u, k]]

    def write(text: list[int], u: int, k: int) -> list[plain.Scored]:
        prefix = [*small.GLUE.generator_prefix, *text, *plain.row(users.turns, u, k)]
        return [plain.Scored(prefix, plain.row(y, u, k)) for y in (users.chosen, users.rejected)]

    own = [s for u, k in places for s in write(told[u], u, k)]
    bare = [s for u, k in places for s in write([], u, k)]
    sums = [
        np.array([x.sum() for x in plain.logps_and_pullback(model, rows)[0]]).reshape(-1, 2).T
        for model, rows in ((params, own), (reference, bare))
    ]
    losses, slopes = oracle.dpo(*sums[0], *sums[1], cfg.generator.beta)
    signs = np.stack([slopes, -slopes], 1).ravel() / len(places)
    weights = [s * np.ones(len(q.answer)) for s, q in zip(signs, own, strict=True)]
    return losses.mean(), plain.logps_and_pullback(params, own, weights)[1]


@pytest.mark.parametrize(
    ("reads", "devices", "microbatches", "fits"),
    [("signals", 1, 1, False), ("signals", 2, 2, True), ("nothing", 1, 1, True)],
)
def test_the_generator_learns_behind_what_it_is_told(
    reads: str, devices: int, microbatches: int, fits: bool
) -> None:
    cfg, users = told_config(reads, microbatches), with_texts()
    told = [plain.row(users.told, u) for u in range(8)]
    if reads == "nothing":
        users, told = users._replace(told=None), [[] for _ in range(8)]
    before, frozen, after, metrics = update(cfg, users, TOLD, devices, fits=fits)
    loss, grads = dpo_by_hand(before.generator.params, frozen.generator, users, told, cfg)
    change = jax.tree.map(lambda x, y: x - y, before.generator.params, after.generator.params)
    assert_close(change, grads)
    np.testing.assert_allclose(metrics["generator/loss"].total / 15, loss, rtol=1e-4)
    assert float(metrics["generator/unpadded"].total) == (microbatches if fits else 0)
    assert int(after.inference.step) == 0 and "sampled_tokens" not in metrics


def test_supervised_is_the_likelihood_of_what_is_taught() -> None:
    """Of tokens, over the batch, not over its parts; a user without persona counts for nothing."""
    users = with_texts()
    sequences = [
        plain.Scored(
            [*plain.row(users.context, u), *small.GLUE.summary_turn], plain.row(users.taught, u)
        )
        for u in range(8)
        if users.taught.lengths[u]
    ]
    count = sum(len(s.answer) for s in sequences)
    assert len(sequences) == 7
    for devices, parts, fits in ((1, 1, False), (2, 2, True)):
        cfg = small.replace(small.make_config(), "batch", microbatches=parts)
        before, _, after, metrics = update(cfg, users, SUPERVISED, devices, fits=fits)
        params = before.inference.params
        weights = [-np.ones(len(s.answer)) / count for s in sequences]
        logps, grads = plain.logps_and_pullback(params, sequences, weights)
        assert_close(jax.tree.map(lambda x, y: x - y, params, after.inference.params), grads)
        nll = metrics["supervised/nll"]
        assert nll.weight == count
        np.testing.assert_allclose(nll.total, -np.concatenate(logps).sum(), rtol=1e-4)
        assert int(after.generator.step) == 0 and "sampled_tokens" not in metrics


@pytest.mark.parametrize(
    ("reads", "phases", "samples"),
    [("signals", TOLD, False), ("summary", SUPERVISED, False), ("summary", TOLD, True)],
)
def test_nothing_is_sampled_in_the_program(
    reads: str, phases: tuple[str, ...], samples: bool
) -> None:
    """Random numbers and loops of unknown length are those of sampling alone."""
    cfg = told_config(reads)
    made = small.make_update(cfg, SGD, phases=phases)
    mesh = small.make_mesh(1, 1, 1)
    with jax.set_mesh(mesh):
        state, frozen = small.make_state(cfg, small.roles_of(made), mesh)
        traced = jax.jit(partial(popi_update, **made._asdict())).trace(
            state, frozen, place_batch(with_texts(), mesh, RULES)
        )
        text = str(traced.jaxpr)
        compiled = traced.lower().compile().as_text()
    assert ("random_bits" in text, "while[" in text) == (samples, samples)
    assert ("/sampling/" in compiled) == samples


def test_a_run_behind_signals_continues_as_if_it_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(name: str, stops: int = 0) -> loop.Trained:
        asked = iter([0] * (stops - 1) + [15])
        if stops:
            monkeypatch.setattr(StopRequest, "agreed", lambda self: next(asked))
        changed = TINY | {"schedule.phases": ("generator 4",), "warmup.steps": 1}
        changed |= {f"warmup.{task}_users": 8 for task in ("generator", "summary", "reading")}
        config = load_tiny("prism:scale=laptop,schedule=raw_context", tmp_path / name, **changed)
        with on_devices(1):
            return loop.train(open_run(config))

    whole = train("whole")
    with pytest.raises(stage.Stopped, match="step 3"):
        train("parts", stops=3)
    monkeypatch.undo()
    parts = train("parts")
    same = jax.tree.map(lambda x, y: bool((x == y).all()), whole.state, parts.state)
    assert all(jax.tree.leaves(same))
    first, second = ((tmp_path / n / "metrics.jsonl").read_text() for n in ("whole", "parts"))
    assert first == second and '"generator/loss"' in first


def test_personas_that_no_training_user_has_are_told(tmp_path: Path) -> None:
    line = '{"user_id": "u%d", "signals": {"profile": "i am %d ."}, "record_id": "%d", '
    line += '"prompt": [{"role": "user", "content": "why %d ?"}], '
    line += '"chosen": "yes", "rejected": "no"}\n'
    (tmp_path / "own.jsonl").write_text("".join(line % (n, n, n, n) for n in range(40)))
    for schedule in ("persona", "supervised"):
        own = {"data.path": tmp_path / "own.jsonl", "batch.pairs": 2}
        config = load_tiny(f"jsonl:scale=laptop,schedule={schedule}", tmp_path / schedule, **own)
        with on_devices(1), pytest.raises(UserError) as error:
            open_run(config)
        assert "no training user has one" in str(error.value) and "\n" not in str(error.value)
