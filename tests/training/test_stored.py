"""Phases of stored summaries: they are written once a phase, the updates read them by the program
of all others, and a run that was killed anywhere goes on as if it never was."""

import logging as std_logging
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from popi_jax.arrays import StoredSummaries, TrainState
from popi_jax.errors import UserError
from popi_jax.models import packing
from popi_jax.phases import find_change, list_writes, parse_phases
from popi_jax.run import Run, open_run
from popi_jax.training import choices, loop, reference, setup, stored
from popi_jax.training.stored import Segment, list_segments
from tests.tiny_run import config_of, on_devices, read_jsonl
from tests.training import small
from tests.training.test_longer import assert_equal

OWN = {
    "warmup.steps": 0,
    "optimizer.schedule": "constant",
    "schedule.save_every": 1,
    "schedule.probe_every": 0,  # it looks once more where the shorter run ends
    "schedule.log_every": 1,
    "schedule.keep": 20,
}
TWO_ROUNDS = "inference 1,stored 2,inference 1,stored 2"


def open_small(workdir: Path, phases: str = TWO_ROUNDS, **changed: object) -> Run:
    own = OWN | {name.replace("__", "."): value for name, value in changed.items()}
    flags = [f"--config.{name}={value}" for name, value in own.items()]
    return open_run(config_of(workdir, *flags, f"--config.schedule.phases={phases}"))


def train(workdir: Path, phases: str = TWO_ROUNDS, **changed: object) -> TrainState:
    with on_devices(1):
        return jax.device_get(loop.train(open_small(workdir, phases, **changed)).state)


def rows_of(workdir: Path) -> list[dict]:
    return read_jsonl(workdir / "metrics.jsonl")


@pytest.fixture(autouse=True)
def without_second_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are computed with their padding, which halves what is compiled."""
    monkeypatch.setattr(packing, "WORTHWHILE", 0.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    """Two rounds without any pause."""
    workdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WORTHWHILE", 0.0)
        return workdir, train(workdir)


def test_segments() -> None:
    cfg = small.replace(small.make_config(), "warmup", steps=3)
    phases = ("inference 2", "generator 1", "stored 2", "stored 1", "joint 4")
    cfg = small.replace(cfg, "schedule", phases=phases)
    whole = [Segment(6, None), Segment(8, 6), Segment(9, 8), Segment(13, None)]
    assert list_segments(cfg, 0) == list_segments(cfg, 5) == whole
    assert list_segments(cfg, 6) == list_segments(cfg, 7) == whole[1:]
    assert list_segments(cfg, 8) == whole[2:] and list_segments(cfg, 13) == []


def test_where_summaries_are_written_may_not_change() -> None:
    phases = ("inference 1", "stored 4")
    assert list_writes(parse_phases(("inference 1", *2 * ("stored 2",)))) == [1, 3]
    assert not find_change(phases, ("inference 1", "stored 9"))
    assert not find_change(phases, (*phases, "stored 2", "inference 1"))
    told = find_change(phases, ("inference 1", "stored 2", "stored 3"))
    assert told.startswith("update 4 was behind earlier summaries, is behind new ones; more may")
    told = find_change(("stored 2", "stored 2"), ("stored 5",))
    assert told.startswith("update 3 was behind new summaries, is behind earlier ones")
    assert find_change(phases, ("inference 1", "generator 4")).startswith("update 2 was stored")
    assert "may go on with more, not with 4" in find_change(phases, ("inference 1", "stored 3"))


def test_two_rounds_write_twice(whole: tuple[Path, TrainState]) -> None:
    """Of every training user, as sampled, and other ones, since the model and the step are."""
    workdir, state = whole
    files = sorted(path.name for path in (workdir / "summaries").iterdir())
    assert files == ["train-1.jsonl", "train-4.jsonl"]
    with on_devices(1):
        run = open_small(workdir)
    first, second = (read_jsonl(workdir / "summaries" / name) for name in files)
    people = [user.user_id for user in run.dataset.splits["train"]]
    for rows in (first, second):
        assert [row["user"] for row in rows] == people
        for row in rows:
            assert row["summary"] == run.inference.tokenizer.decode(row["ids"]).strip()
            assert row["tokens"] == len(row["ids"])
            assert row["finished"] == (row["tokens"] < run.config.data.summary_len)
    assert len({tuple(row["ids"]) for row in first}) > len(first) // 2
    assert np.mean([a["ids"] != b["ids"] for a, b in zip(first, second, strict=True)]) > 0.5
    assert (int(state.inference.step), int(state.generator.step)) == (2, 4)
    rows = rows_of(workdir)
    assert [row["turn/generator"] for row in rows] == [0, 1, 1, 0, 1, 1]
    assert ["sampled_tokens" in row for row in rows] == [True, False, False, True, False, False]
    assert all("generator/loss" in rows[number] for number in (1, 2, 4, 5))


class Killed(Exception):
    pass


def test_a_run_that_was_killed_goes_on_as_if_it_never_was(
    whole: tuple[Path, TrainState], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the phases, before anything was written; and inside one, whose file is lost too."""
    workdir, state = whole
    save, last = loop.save_step, 0

    def save_and_die(manager: Any, batches: Any, config: str, step: int, now: TrainState) -> None:
        save(manager, batches, config, step, now)
        if step == last:
            raise Killed

    kept = tmp_path / "summaries" / "train-1.jsonl"
    for last in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "save_step", save_and_die)
            with pytest.raises(Killed):
                train(tmp_path)
        assert kept.exists() == (last > 1)
        kept.parent.mkdir(exist_ok=True)
        if last == 1:  # of an attempt whose steps were lost: not to be read
            kept.write_text("another")
    kept.unlink()
    assert_equal(train(tmp_path), state)
    assert rows_of(tmp_path) == rows_of(workdir)
    for name in ("train-1.jsonl", "train-4.jsonl"):
        texts = [(path / "summaries" / name).read_text() for path in (tmp_path, workdir)]
        assert texts[0] == texts[1]


def test_a_finished_run_goes_on(
    whole: tuple[Path, TrainState], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Inside a phase it reads the file, and then writes those of another round."""
    workdir, state = whole
    assert int(train(tmp_path, "inference 1,stored 1").step) == 2
    path = tmp_path / "summaries" / "train-1.jsonl"
    text = path.read_text()
    path.write_text("".join(text.splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match="does not hold the summaries of the .* training users"):
        train(tmp_path)
    path.write_text(text.replace('"ids"', '"others"'))
    with pytest.raises(UserError, match="delete it, and they are written again"):
        train(tmp_path)
    path.write_text(text)
    caplog.clear()  # the first run has said what it wrote
    with caplog.at_level(std_logging.INFO, logger="absl"):
        assert_equal(train(tmp_path), state)
    assert "model of step 1 has written" not in caplog.text and path.read_text() == text
    assert "model of step 4 has written summaries of" in caplog.text
    assert rows_of(tmp_path) == rows_of(workdir)


def write_on(count: int, users: int, workdir: Path) -> StoredSummaries:
    with on_devices(count):
        run = open_small(workdir, evaluation__batch_users=users)
        plan = choices.plan_run(run).plan
        roles = setup.Roles(plan.inference.role, plan.generator.role)
        state = loop.make_first_state(run, roles)
        frozen = reference.keep_reference(run, plan, state, {})
        add = partial(stored.add_summaries, frozen, run, state)
        found, later = (jax.device_get(add(written=n, step=n).summaries) for n in (5, 6))
        assert (found.summaries.ids != later.summaries.ids).any(axis=1).mean() > 0.5
        return found


def test_neither_devices_nor_batches_matter(tmp_path: Path) -> None:
    one = write_on(1, 8, tmp_path / "one")
    many = write_on(8, 16, tmp_path / "many")
    jax.tree.map(np.testing.assert_array_equal, one, many)
    paths = [tmp_path / name / "summaries" / "train-5.jsonl" for name in ("one", "many")]
    assert paths[0].read_text() == paths[1].read_text()
    # what is read is what was written, padding included
    with on_devices(1):
        run = open_small(tmp_path / "one", evaluation__batch_users=8)
        again = jax.device_get(stored.read_summaries(epath.Path(paths[0]), run))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert 0 < one.finished.sum() and one.summaries.lengths.max() <= run.config.data.summary_len
