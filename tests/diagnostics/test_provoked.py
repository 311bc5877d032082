"""Real runs in which something goes wrong: each raises the warning of its failure within 50
updates."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from popi_jax.models import packing
from popi_jax.run import open_run
from popi_jax.training import loop
from tests.diagnostics.test_health import FOLLOWS
from tests.tiny_run import config_of, on_devices, read_jsonl

ROOT = Path(__file__).parents[2]
UPDATES = 50


def list_warned(workdir: Path) -> dict[str, int]:
    """Warning -> the update of the main stage at which it was first raised."""
    rows = read_jsonl(workdir / "metrics.jsonl")
    looks = [row["step"] for row in rows if any(name.startswith("probe/") for name in row)]
    start = looks[0] if looks else 0  # the first look is before the first update
    path = workdir / "warnings.jsonl"
    found: dict[str, int] = {}
    for row in read_jsonl(path) if path.exists() else ():
        found.setdefault(row["name"], row["step"] - start)
    return found


# of random weights, whose generator does not follow a summary yet
QUICK = {
    "summaries_cut": {"data.summary_len": 2},
    "beta_too_large": {"generator.beta": 1e5},
    "dead_entropy": {"inference.temperature": 1e-4, "inference.learning_rate": 1e-12},
}


@pytest.mark.parametrize("name", QUICK)
def test_a_run_of_random_weights_warns(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packing, "WORTHWHILE", 0.0)  # no second branch: half to compile
    own = {"warmup.steps": 0, "schedule.phases": "inference 12", "schedule.probe_every": 0}
    own |= QUICK[name]
    flags = [f"--config.{field}={value}" for field, value in own.items()]
    with on_devices(1), caplog.at_level("WARNING", logger="absl"):
        loop.train(open_run(config_of(tmp_path, *flags)))
    warned = list_warned(tmp_path)
    assert 10 <= warned[name] <= 12
    assert f"Update {warned[name]}, {name}: " in caplog.text
    assert f"{name} ({warned[name]})" in caplog.records[-1].getMessage()
    assert warned.keys() <= {name, "summaries_cut", "generator_ignores_summary"}


# what makes each failure, beside a warm start of the default run that all but those with a warm-up
# of their own share
WARM = "--warm_start"
PROVOKED: dict[str, tuple[str, ...]] = {
    "beta_too_large": (WARM, "--config.generator.beta=10"),
    "no_kl": (WARM, "--config.inference.kl_coef=0"),
    "dead_entropy": (WARM, "--config.inference.temperature=0.02"),
    "summaries_cut": (WARM, "--config.inference.temperature=5"),
    # the summaries that it learned behind were noise
    "generator_ignores_oracle": (
        "--config.warmup.wrong=1.0",
        "--config.warmup.drop=1.0",
        "--config.warmup.steps=80",
    ),
    "one_noisy_pair": ("--config.batch.pairs=1", "--config.warmup.steps=150"),
    # so few people that both models know their pairs by heart
    "leaky_reward": (
        "--config.data.sample_people=100",
        "--config.data.validation_fraction=0.4",
        "--config.warmup.steps=150",
        "--config.schedule.phases=('joint 50',)",
        "--config.generator.learning_rate=1e-3",
    ),
}


def train(workdir: Path, *flags: str) -> dict[str, int]:
    """The first updates of a default run, with other settings."""
    phases = f"--config.schedule.phases=('inference {UPDATES}',)"
    own = (
        f"--config.workdir={workdir}",
        *([] if any("schedule.phases" in flag for flag in flags) else [phases]),
        "--config.evaluation.max_users=16",
        *flags,
    )
    command = [sys.executable, "-m", "popi_jax.train", "--config=prism", *own]
    # on one device with threads of its own number, as a user's
    env = {name: x for name, x in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return list_warned(workdir)


@pytest.mark.slow
def test_seven_failures_raise_their_own_warnings(tmp_path: Path) -> None:
    """And the default none. Half an hour on two CPU cores, or a quarter where they have AVX-512."""
    assert train(tmp_path / "default") == {}
    for name, flags in PROVOKED.items():
        given = [f"{WARM}={tmp_path / 'default'}" if flag == WARM else flag for flag in flags]
        warned = train(tmp_path / name, *given)
        assert warned.get(name, UPDATES + 1) <= UPDATES, (name, warned)
        others = {other for other in PROVOKED if other in warned} - {name, *FOLLOWS.get(name, ())}
        assert not others, (name, warned)
