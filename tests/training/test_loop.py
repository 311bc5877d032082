"""The host loop: what it writes and saves, how it stops, and that a killed run continues as if it
never was."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.arrays import Mean, TrainState
from popi_jax.checkpoints import manager
from popi_jax.diagnostics.watch import Monitor
from popi_jax.distributed import StopRequest
from popi_jax.metric_writer import MetricWriter
from popi_jax.run import Run
from popi_jax.training import loop, stage
from popi_jax.training.loop import StagedBatches
from popi_jax.training.stage import NotFinite, Stopped
from tests.cheap_compiles import CHEAP
from tests.oracles.plain import MODEL
from tests.training import small

ROOT = Path(__file__).parents[2]
STATE = TrainState(None, None, None, None)  # the loop only hands it on


def staged() -> StagedBatches:
    """Three steps of a warm-up: 0, 1, 2; then 100, 101, ..."""
    numbers = grain.MapDataset.range(1000)
    return StagedBatches(numbers, numbers.map(lambda n: 100 + n), 3)


def test_batches_of_both_stages_continue_at_their_position() -> None:
    with contextlib.closing(staged()) as batches:
        assert [next(batches) for _ in range(6)] == [0, 1, 2, 100, 101, 102]
    for taken in (0, 2, 3, 5):
        with contextlib.closing(staged()) as batches, contextlib.closing(staged()) as again:
            for _ in range(taken):
                next(batches)
            next(again)
            again.set_state(batches.get_state())
            assert [next(again) for _ in range(4)] == [next(batches) for _ in range(4)]


def test_positions_of_former_versions_are_read() -> None:
    """They named those of each stage too; the main stage had one from its own start."""
    before = {"step": 5, "warmup": {"next_index": 3}, "main": {"next_index": 2}}
    with contextlib.closing(staged()) as batches:
        batches.set_state(json.dumps(before).encode())
        assert next(batches) == 102
        assert json.loads(batches.get_state()) == {"step": 6}


def test_the_main_stage_begins_at_its_start_without_a_warm_up_of_its_own() -> None:
    with contextlib.closing(staged()) as batches:
        batches.skip_warmup()
        assert [next(batches), next(batches)] == [100, 101]


class Scripted:
    """Runs the loop with a program that counts, and at one step does `event`."""

    SAMPLED = 1000.0

    def __init__(
        self, folder: Path, *, save_every: int, log_every: int, at: int, event: Any
    ) -> None:
        self.saved: list[int] = []
        self.folder, self.at, self.event, self.step = folder, at, event, 0
        self.cfg = small.replace(
            small.make_config(), "schedule", save_every=save_every, log_every=log_every
        )

    def program(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Mean]]:
        self.step += 1
        value = self.event() if self.step == self.at else 1.0 / self.step
        return state, {
            "loss": Mean(jnp.float32(2 * (value or 0.0)), jnp.float32(2.0)),
            "idle": Mean(*jnp.zeros(2)),
            "sampled_tokens": Mean(jnp.float32(self.SAMPLED), jnp.float32(1.0)),
        }

    def run(self, last_step: int, monitor: Monitor | None = None) -> None:
        mesh = small.make_mesh(1, 1, 1)
        batches: Iterator[Any] = iter([small.user_batch(0)] * last_step)
        stop = StopRequest()
        save = lambda step, state: self.saved.append(step)  # noqa: E731
        try:
            with MetricWriter(self.folder) as writer:
                host = stage.Host(self.cfg, mesh, MODEL.rules, batches, writer, stop, save, monitor)
                stage.run_stage(host, self.program, STATE, 0, last_step, "test")
        finally:
            stop.close()

    def rows(self) -> list[dict]:
        return [
            json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()
        ]


@pytest.mark.parametrize("log_every", [1, 3, 50])
def test_writes_every_step_once_and_before_it_saves(tmp_path: Path, log_every: int) -> None:
    scripted = Scripted(tmp_path, save_every=3, log_every=log_every, at=0, event=None)
    scripted.run(8)
    assert scripted.saved == [3, 6, 8]
    assert [row["step"] for row in scripted.rows()] == list(range(1, 9))
    assert [row["loss"] for row in scripted.rows()] == pytest.approx(
        [1 / step for step in range(1, 9)]
    )
    assert all("idle" not in row for row in scripted.rows())  # weight 0: it does not apply


def test_the_rate_counts_data_and_what_was_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the bar; the clock of this test goes by a second whenever it is read."""
    seconds = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: float(next(seconds)))
    monkeypatch.setattr(stage, "time", clock)
    shown: list[dict[str, float]] = []

    class Bar(stage.Progress):
        def update(self, step: int, values: dict[str, float] | None = None) -> None:
            shown.append(values or {})

    monkeypatch.setattr(stage, "Progress", Bar)
    scripted = Scripted(tmp_path, save_every=100, log_every=1, at=0, event=None)
    scripted.run(3)
    data = stage.count_tokens(small.user_batch(0))
    # the first rate is of two batches, of which the metrics of one were read
    rates = [values["tokens/s"] for values in shown if values]
    assert rates[0] == pytest.approx(2 * data + Scripted.SAMPLED)


def test_warnings_know_the_settings() -> None:
    cfg = small.make_config()
    facts = loop.tell_facts(cfg)
    assert (facts.beta, facts.per_token) == (cfg.generator.beta, False)
    assert (facts.kl_coef, facts.group_size, facts.summary_len) == (0.05, 3, 4)
    assert (facts.pairs, facts.users, facts.temperature) == (2, 8, 0.8)
    rates = cfg.inference.learning_rate, cfg.generator.learning_rate
    assert (facts.learning_rate, facts.generator_learning_rate) == rates and rates[0] != rates[1]
    for objective, beta, per_token in (("orpo", 1.0, True), ("simpo", 0.1, True)):
        other = small.replace(cfg, "generator", objective=objective, beta=0.1)
        found = loop.tell_facts(other)
        assert (found.beta, found.per_token) == (beta, per_token)


def test_the_stage_shows_the_monitor_what_it_writes(tmp_path: Path) -> None:
    seen: list[tuple[int, dict[str, float]]] = []

    class Listening(Monitor):
        def see(self, step: int, values: Any) -> None:
            seen.append((step, values))

    facts = loop.tell_facts(small.make_config())
    scripted = Scripted(tmp_path, save_every=3, log_every=2, at=0, event=None)
    scripted.run(8, Listening(tmp_path, facts, enabled=True))
    assert [{"step": step, **values} for step, values in seen] == scripted.rows()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_at_the_same_step(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    event = lambda: os.kill(os.getpid(), number)  # noqa: E731
    scripted = Scripted(tmp_path, save_every=100, log_every=50, at=4, event=event)
    with pytest.raises(Stopped, match="saved at step 4") as stopped:
        scripted.run(9)
    assert stopped.value.signal_number == number
    assert scripted.saved == [4]
    assert [row["step"] for row in scripted.rows()] == [1, 2, 3, 4]
    assert signal.getsignal(number) == before


def test_a_metric_that_is_not_finite_ends_the_run_before_it_saves(tmp_path: Path) -> None:
    scripted = Scripted(tmp_path, save_every=2, log_every=50, at=3, event=lambda: float("nan"))
    with pytest.raises(NotFinite, match="step 3: loss is not finite"):
        scripted.run(9)
    assert scripted.saved == [2]
    assert [row["step"] for row in scripted.rows()] == [1, 2]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_exit_status_of_a_run_that_was_stopped(
    number: int, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from popi_jax import train

    def stop(run: Run, *, warm_start: str) -> None:
        raise Stopped(int(number), 3)

    run = Run(None, "", small.make_mesh(1, 1, 1), None, None, None, None, None)
    monkeypatch.setattr("popi_jax.run.open_run", lambda _: run)
    monkeypatch.setattr(loop, "train", stop)
    with pytest.raises(SystemExit) as exited:
        train.main(small.make_config())
    assert exited.value.code == status


SETTINGS = {
    "data.path": ROOT / ".pytest_cache" / "nothing",
    "data.prepared": ROOT / ".pytest_cache" / "prepared",
    "data.download": "false",
    "data.sample_people": 60,
    "data.test_fraction": 0.3,
    "data.validation_fraction": 0.1,
    "model.vocab_size": 400,
    "warmup.steps": 2,
    # long enough that a signal comes in time
    "schedule.phases": "('inference 3', 'alternate 1:1 26', 'joint 3')",
    "schedule.save_every": 4,
    "schedule.log_every": 1,
    "schedule.probe_every": 8,
    "evaluation.max_users": 8,
}
LAST = 34


def start(workdir: Path, *more: str, **changed: Any) -> subprocess.Popen:
    settings = SETTINGS | {"workdir": workdir} | changed
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "popi_jax.train", "--config=smoke:scale=laptop", *flags, *more]
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": CHEAP}
    with workdir.with_suffix(".err").open(
        "w"
    ) as errors:  # a pipe that nobody reads would fill and hold the run
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=errors
        )


def end(process: subprocess.Popen, workdir: Path) -> tuple[int, str]:
    status = process.wait(timeout=600)
    return status, workdir.with_suffix(".err").read_text()


def send_at(process: subprocess.Popen, workdir: Path, step: int, number: int) -> tuple[int, str]:
    """Sends a signal as soon as the metrics of a step are there."""
    path = workdir / "metrics.jsonl"
    while process.poll() is None and not (
        path.exists() and f'{{"step": {step},' in path.read_text()
    ):
        time.sleep(0.01)
    process.send_signal(number)
    return end(process, workdir)


def train_only(workdir: Path, *more: str, **changed: Any) -> None:
    """Runs to the last checkpoint; what the evaluation does is not tested here."""
    process = start(workdir, *more, **changed)
    while process.poll() is None and not (workdir / "checkpoints" / str(LAST)).exists():
        time.sleep(0.05)
    process.kill()
    _, errors = end(process, workdir)
    assert (workdir / "checkpoints" / str(LAST)).exists(), errors


def read_rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(a: Path, b: Path) -> None:
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    assert_same_models(a, b)


def assert_same_models(a: Path, b: Path) -> None:
    for role in manager.ROLES:
        (step, params), (other_step, others) = (
            manager.restore_params(str(w), role) for w in (a, b)
        )
        assert step == other_step == LAST
        jax.tree.map(np.testing.assert_array_equal, params, others)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted")
    train_only(workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, LAST + 1))
    for (
        role
    ) in manager.ROLES:  # of the users of this run, most batches fit the places that its rows have
        assert any(row.get(f"{role}/unpadded") == 1.0 for row in rows)
    assert (
        workdir / "reference" / "stored"
    ).exists()  # so that what is stored is read again by runs that continue
    return workdir


def test_a_killed_run_continues_as_if_it_never_was(uninterrupted: Path, tmp_path: Path) -> None:
    status, _ = send_at(start(tmp_path), tmp_path, 7, signal.SIGKILL)
    assert status == -signal.SIGKILL
    steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert 4 <= max(steps) < LAST
    train_only(tmp_path)
    assert_same_run(tmp_path, uninterrupted)


def test_a_run_takes_over_the_warm_up_of_another(uninterrupted: Path, tmp_path: Path) -> None:
    """To the same end, without any step of its own; another warm-up is refused."""
    take_over = f"--warm_start={uninterrupted}"
    train_only(tmp_path, take_over)
    own, whole = (read_rows(workdir) for workdir in (tmp_path, uninterrupted))
    at, *rows = whole[SETTINGS["warmup.steps"] - 1 :]
    assert own[1:] == rows
    # the end of the warm-up, of which the look before the first update is its own
    assert own[0] == {"step": at["step"]} | {k: v for k, v in at.items() if k.startswith("probe/")}
    assert_same_models(tmp_path, uninterrupted)
    other = tmp_path / "other"
    status, errors = end(start(other, take_over, seed=5), other)
    assert status == 2 and "had seed = 0, this run 5; their warm-ups differ" in errors
    assert not list((other / "checkpoints").iterdir())


def test_the_pairs_of_a_warm_up_are_compared_not_those_of_updates() -> None:
    def flatten(pairs: int, own: int) -> dict[str, Any]:
        flat = loop._flatten_warmup({"batch": {"pairs": pairs}, "warmup": {"generator_pairs": own}})
        return {name: x for name, x in flat.items() if name.startswith(loop._OF_WARMUP)}

    assert flatten(8, 0) == flatten(1, 8) == {"warmup.generator_pairs": 8}


def test_looks_are_taken_at_their_steps_and_change_nothing(
    uninterrupted: Path, tmp_path: Path
) -> None:
    rows = read_rows(uninterrupted)
    looked = [row for row in rows if any(name.startswith("probe/") for name in row)]
    assert [row["step"] for row in looked] == [2, 10, 18, 26, 34]
    assert all(row["probe/nats_summary"] > 0 for row in looked)
    # until the generator is trained, it is the judge from the start; then another
    same = [row["probe/nats_start_judge"] == row["probe/nats_summary"] for row in looked]
    assert same == [True, False, False, False, False]
    train_only(tmp_path, f"--warm_start={uninterrupted}", **{"schedule.probe_every": 0})
    assert_same_models(tmp_path, uninterrupted)
    assert read_rows(tmp_path) == [
        {name: value for name, value in row.items() if not name.startswith("probe/")}
        for row in rows[SETTINGS["warmup.steps"] :]
    ]


def test_a_workdir_of_another_run_is_refused(uninterrupted: Path) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    status, errors = end(start(uninterrupted, seed=5), uninterrupted)
    assert status == 2
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "seed was 0, is 5" in told[0] and "Traceback" not in errors
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_run_stopped_twice_and_killed_in_its_warm_up_continues(
    uninterrupted: Path, tmp_path: Path
) -> None:
    status, _ = send_at(start(tmp_path), tmp_path, 1, signal.SIGKILL)
    assert status == -signal.SIGKILL
    for step, number, expected in ((3, signal.SIGTERM, 143), (8, signal.SIGINT, 130)):
        status, errors = send_at(start(tmp_path), tmp_path, step, number)
        assert status == expected, errors
        assert "the same command continues" in errors and "Traceback" not in errors
    train_only(tmp_path)
    assert_same_run(tmp_path, uninterrupted)
    status, errors = end(start(tmp_path), tmp_path)  # nothing is left to train: it evaluates
    assert status == 0 and (tmp_path / "results.json").exists(), errors
    assert_same_run(tmp_path, uninterrupted)
