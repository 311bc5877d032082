"""The metrics file after a resume, and the progress lines."""

import io
import json
import math
import pathlib

import pytest
from etils import epath

from popi_jax.metric_writer import MetricWriter
from popi_jax.progress import Progress, format_number


def write(folder: pathlib.Path, steps: range, restored: int | None = None) -> bytes:
    with MetricWriter(folder) as writer:
        if restored is not None:
            writer.resume(restored)
        for step in steps:
            writer.write(step, {"loss": 1 / (step + 1), "accuracy": 0.5})
    return (folder / "metrics.jsonl").read_bytes()


def test_resumed_file_equals_uninterrupted_one(tmp_path: pathlib.Path) -> None:
    whole = write(tmp_path / "whole", range(10))
    write(tmp_path / "stopped", range(8))
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as f:
        f.write('{"step": 3')  # killed while a line was written
    assert write(tmp_path / "stopped", range(6, 10), restored=5) == whole
    assert not list((tmp_path / "stopped").glob("*.part"))


def test_resume_before_anything_was_written(tmp_path: pathlib.Path) -> None:
    assert write(tmp_path, range(1), restored=0).count(b"\n") == 1


def test_non_finite_values_are_null_so_that_the_file_stays_json(tmp_path: pathlib.Path) -> None:
    with MetricWriter(tmp_path) as writer:
        writer.write(3, {"loss": math.nan, "reward": math.inf, "kl": 0.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 3,
        "loss": None,
        "reward": None,
        "kl": 0.0,
    }


def test_values_are_added_to_the_last_line_or_begin_one(tmp_path: pathlib.Path) -> None:
    with MetricWriter(tmp_path) as writer:
        writer.add(0, {"probe": 1.0})
        writer.write(1, {"loss": 0.5})
        writer.add(1, {"probe": math.inf})
        writer.add(1, {"probe": 2.0, "other": 3.0})
        writer.write(2, {"loss": 0.25})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "probe": 1.0},
        {"step": 1, "loss": 0.5, "probe": 2.0, "other": 3.0},
        {"step": 2, "loss": 0.25},
    ]


def test_values_are_added_again_after_a_resume(tmp_path: pathlib.Path) -> None:
    """Whether the run was stopped before they were there or behind them."""
    found = []
    for name, added in (("before", False), ("behind", True)):
        write(tmp_path / name, range(3))
        for adds in (added, True):
            with MetricWriter(tmp_path / name) as writer:
                writer.resume(2)
                if adds:
                    writer.add(2, {"probe": 4.0})
        found.append((tmp_path / name / "metrics.jsonl").read_bytes())
    assert found[0] == found[1]
    rows = [json.loads(line) for line in found[0].splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[2]["probe"] == 4.0


def test_tensorboard_files_are_written(tmp_path: pathlib.Path) -> None:
    write(tmp_path, range(2))
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"accuracy" in file.read_bytes()


def test_disabled_writer_touches_nothing(tmp_path: pathlib.Path) -> None:
    with MetricWriter(tmp_path / "x", enabled=False) as writer:
        writer.resume(3)
        writer.write(4, {"loss": 1.0})
        writer.add(4, {"probe": 1.0})
    assert not (tmp_path / "x").exists()


def test_progress_in_a_pipe_is_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("popi_jax.progress.time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    with Progress(100, initial=10, label="train", interval=30, stream=stream) as progress:
        for step in range(11, 41):
            clock[0] += 2.0
            progress.update(step, {"loss": 0.6931, "tokens/s": 12345.0})
    lines = stream.getvalue().splitlines()
    assert lines == [
        "train 25/100, 0.5 steps/s, 02:30 left, loss 0.693, tokens/s 12.3k",
        "train 40/100, 0.5 steps/s, 02:00 left, loss 0.693, tokens/s 12.3k",
    ]


def test_progress_shows_the_last_step_of_a_short_run_and_nothing_when_disabled() -> None:
    stream = io.StringIO()
    with Progress(2, stream=stream) as progress:
        progress.update(2)
    assert stream.getvalue().startswith("2/2, ")
    stream = io.StringIO()
    with Progress(2, enabled=False, stream=stream) as progress:
        progress.update(2)
    assert stream.getvalue() == ""


def test_progress_on_a_terminal_is_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(4, label="train", stream=stream) as progress:
        progress.update(2, {"loss": 0.5})
        progress.update(4, {"loss": 0.25})
    assert (
        "\r" in stream.getvalue()
        and "loss 0.25" in stream.getvalue()
        and "4/4" in stream.getvalue()
    )


def test_format_number() -> None:
    assert [format_number(x) for x in (0.0, -1234.0, 2.5e6, 0.00012)] == [
        "0",
        "-1.23k",
        "2.5M",
        "0.00012",
    ]


def test_a_bucket_gets_copies_and_a_resumed_run_continues_them(bucket: str) -> None:
    with MetricWriter(f"{bucket}/run") as writer:
        writer.write(1, {"loss": 1.0})
        writer.flush()
        at_the_flush = epath.Path(f"{bucket}/run/metrics.jsonl").read_text()
        writer.write(2, {"loss": 2.0})
    with MetricWriter(f"{bucket}/run") as writer:
        writer.resume(1)
        writer.write(2, {"loss": 3.0})
    assert at_the_flush == '{"step": 1, "loss": 1.0}\n'
    whole = epath.Path(f"{bucket}/run/metrics.jsonl").read_text()
    assert whole == at_the_flush + '{"step": 2, "loss": 3.0}\n'
    assert list(epath.Path(f"{bucket}/run/tensorboard").iterdir())
