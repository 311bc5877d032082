"""A finished run that is given more updates goes on as if it had been begun with them."""

import dataclasses
import logging as std_logging
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from popi_jax.arrays import TrainState
from popi_jax.config import Config
from popi_jax.errors import UserError
from popi_jax.phases import list_updates, parse_phases
from popi_jax.popi.plan import Reference
from popi_jax.run import open_run
from popi_jax.training import choices, longer, loop, setup
from tests.tiny_run import config_of, on_devices, read_jsonl
from tests.training import small

OWN = {
    "warmup.steps": 0,
    "optimizer.schedule": "constant",
    "schedule.save_every": 2,
    "schedule.probe_every": 0,  # it looks once more where the shorter run ends
    "inference.ema_decay": 0.5,
    "generator.ema_decay": 0.5,
}


def configure(workdir: Path, phases: str, **changed: object) -> Config:
    own = OWN | {name.replace("__", "."): value for name, value in changed.items()}
    flags = [f"--config.{name}={value}" for name, value in own.items()]
    return config_of(workdir, *flags, f"--config.schedule.phases={phases}")


def train(workdir: Path, phases: str, **changed: object) -> TrainState:
    with on_devices(1):
        return jax.device_get(loop.train(open_run(configure(workdir, phases, **changed))).state)


def assert_equal(a: TrainState, b: TrainState) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = map(jax.random.key_data, (x, y))
        np.testing.assert_array_equal(x, y)


def test_it_equals_the_run_that_was_begun_with_all_updates(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Though no update of the shorter one trained the generator, which had no optimizer."""
    short, whole = "inference 2", "inference 2,generator 1,inference 1"
    once = train(tmp_path / "once", whole)
    first = train(tmp_path / "twice", short)
    assert int(first.step) == 2 and jax.tree.leaves(first.generator.opt_state) == []
    with caplog.at_level(std_logging.INFO, logger="absl"):
        twice = train(tmp_path / "twice", whole)
    assert "Continuing at step 2 of 4" in caplog.text
    assert "goes on from 2 to 4 updates" in caplog.text
    assert_equal(once, twice)
    rows = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("once", "twice")]
    assert rows[0] == rows[1] and [row["step"] for row in rows[1]] == list(range(1, 5))
    # neither the shorter one again, nor another beginning
    with pytest.raises(UserError, match="begun with 4 updates and may go on with more, not with 2"):
        train(tmp_path / "twice", short)
    with pytest.raises(UserError, match="update 1 was inference, is joint"):
        train(tmp_path / "twice", "joint 9")
    with pytest.raises(UserError, match="optimizer.final_lr was 0.2, is 0.1"):
        train(tmp_path / "twice", whole, optimizer__final_lr=0.1)
    assert_equal(twice, train(tmp_path / "twice", whole))  # nothing is left to train


def test_a_run_that_stored_no_log_probs_computes_them(tmp_path: Path) -> None:
    """A run that is begun with so many updates stores those of the reference."""
    with on_devices(1):
        run = open_run(configure(tmp_path, "joint 50"))

    def find() -> Reference:
        return choices.plan_run(run).plan.generator.reference

    assert find() is Reference.STORED
    (tmp_path / "reference" / "config").mkdir(parents=True)  # as a shorter run has left it
    assert find() is Reference.PROMPT
    (tmp_path / "reference" / "stored").mkdir()
    assert find() is Reference.STORED


def test_rates_that_are_told() -> None:
    """Cosine from the peak to a fifth of it."""
    cfg = small.replace(small.make_config(), "optimizer", schedule="cosine", final_lr=0.2)
    inference = dataclasses.replace(
        cfg.inference, learning_rate=1e-3, lr_warmup_steps=0, updates_per_rollout=2
    )
    cfg = dataclasses.replace(cfg, inference=inference)
    before = setup.plan_kinds(parse_phases(("inference 10",)))
    now = setup.plan_kinds(parse_phases(("inference 10", "joint 10")))
    cosine = 1e-3 * (0.2 + 0.8 * (1 + math.cos(math.pi * 10 / 20)) / 2)
    generator = cfg.generator.learning_rate
    told = f"inference 0.0002 -> {cosine:.3g}, generator none -> {generator:.3g}"
    assert longer.describe_rates(cfg, before, now, 10) == told


def test_updates_of_phases() -> None:
    phases = ("alternate 2:1 4", "joint 1", "supervised 1", "generator 1", "inference 1")
    found = list_updates(parse_phases(phases))
    assert found == [
        *("inference", "inference", "generator", "inference"),
        *("joint", "supervised", "generator", "inference"),
    ]
