"""The watch of a run: its log, its file, and that a run which goes on has what one that never
stopped has."""

import json
import logging
from pathlib import Path

import pytest

from popi_jax.diagnostics.health import Warned
from popi_jax.diagnostics.watch import Monitor
from popi_jax.metric_writer import MetricWriter
from tests.diagnostics.test_health import FACTS, HEALTHY
from tests.tiny_run import read_jsonl

CUT = HEALTHY | {"inference/finished": 0.1}


def values_at(step: int) -> dict[str, float]:
    return CUT if step > 20 else HEALTHY


def write(folder: Path | str, first: int, last: int, *, enabled: bool = True) -> Monitor:
    """A run from `first` to `last`, that goes on where there is something."""
    with MetricWriter(folder) as writer:
        writer.resume(first - 1)
        monitor = Monitor(writer.folder, FACTS, enabled=enabled)
        monitor.resume()
        for step in range(first, last + 1):
            writer.write(step, values_at(step))
            monitor.see(step, values_at(step))
        monitor.close()
    return monitor


def test_a_warning_is_logged_written_and_counted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="absl"):
        write(tmp_path, 1, 60)
    rows = read_jsonl(tmp_path / "warnings.jsonl")
    assert len(rows) == 1 and rows[0].keys() == set(Warned._fields)
    assert (rows[0]["name"], rows[0]["threshold"]) == ("summaries_cut", 0.8)
    step = rows[0]["step"]
    assert 20 < step <= 30
    records = [(r.levelname, r.getMessage()) for r in caplog.records]
    assert records == [
        ("WARNING", f"Update {step}, summaries_cut: {rows[0]['text']}"),
        ("WARNING", f"Health: 1 warning, at updates: summaries_cut ({step})"),
    ]


def test_a_healthy_run_says_so_and_has_no_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="absl"):
        write(tmp_path, 1, 20)
    assert [r.getMessage() for r in caplog.records] == ["Health: no warning"]
    assert not (tmp_path / "warnings.jsonl").exists()


def test_other_processes_are_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="absl"):
        write(tmp_path, 1, 60, enabled=False)
    assert not caplog.records and not (tmp_path / "warnings.jsonl").exists()


@pytest.mark.parametrize("saved", [15, 24, 40])
def test_a_run_that_goes_on_has_the_warnings_of_one_that_never_stopped(
    saved: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stopped at update 45, saved at `saved`: what came after is dropped, nothing is said twice."""
    write(tmp_path / "once", 1, 60)
    write(tmp_path / "twice", 1, 45)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="absl"):
        write(tmp_path / "twice", saved + 1, 60)
    once, twice = (tmp_path / name / "warnings.jsonl" for name in ("once", "twice"))
    assert once.read_bytes() == twice.read_bytes()
    at = json.loads(once.read_text())["step"]
    assert len(caplog.records) == 1 + (at > saved)


def test_in_a_bucket_the_warnings_go_with_the_metrics(bucket: str) -> None:
    from etils import epath

    write(f"{bucket}/run", 1, 60)
    rows = (epath.Path(bucket) / "run" / "warnings.jsonl").read_text().splitlines()
    assert [json.loads(row)["name"] for row in rows] == ["summaries_cut"]
    write(f"{bucket}/run", 41, 70)
    assert (epath.Path(bucket) / "run" / "warnings.jsonl").read_text().splitlines() == rows
