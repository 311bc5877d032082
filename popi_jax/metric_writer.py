"""Writes the metrics of a run to `metrics.jsonl` and to TensorBoard files. Only process 0 writes.

After a resume the file must equal that of a run that never stopped: `resume` drops what came after
the checkpoint. Files in a bucket cannot be appended to, so those of a bucket are written on the
disk and copied there by `flush`."""

import json
import math
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

from etils import epath


class MetricWriter:
    """One line of JSON per step: {"step": 10, "loss": 0.7, …}. A number that is not finite is
    written as null.

    Use it as a context manager, or call `close`."""

    def __init__(self, folder: str | os.PathLike[str], *, enabled: bool = True) -> None:
        in_bucket = "://" in os.fspath(folder)
        self._bucket = epath.Path(folder) if in_bucket else None
        self._disk = tempfile.TemporaryDirectory() if in_bucket and enabled else None
        self._folder = pathlib.Path(self._disk.name if self._disk else folder)
        self._path = self._folder / "metrics.jsonl"
        self._enabled = enabled
        self._purge_step: int | None = None
        self._board: Any = None
        self._last: tuple[int, dict[str, Any]] = (0, {})  # where the last line begins, and it
        if enabled:
            self._folder.mkdir(parents=True, exist_ok=True)

    @property
    def folder(self) -> pathlib.Path:
        """Where its files lie on the disk; `flush` copies all that lies there to a bucket."""
        return self._folder

    def resume(self, step: int) -> None:
        """Drops the lines of steps after `step` and a line that was cut off; call it before the
        first `write`."""
        if not self._enabled:
            return
        self._purge_step = step + 1
        if self._bucket is not None and (self._bucket / self._path.name).exists():
            self._path.write_bytes((self._bucket / self._path.name).read_bytes())
        if not self._path.exists():
            return
        kept = [
            line
            for line in self._path.read_bytes().splitlines(keepends=True)
            if _read_step(line) <= step
        ]
        part = self._path.with_suffix(".part")
        with part.open("wb") as f:
            f.writelines(kept)
            f.flush()
            os.fsync(f.fileno())
        part.replace(self._path)
        if kept:
            self._last = sum(map(len, kept[:-1])), json.loads(kept[-1])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends the values of a step, at once."""
        if not self._enabled:
            return
        row = _to_row(values)
        with self._path.open("ab") as f:
            self._last = f.seek(0, os.SEEK_END), {"step": int(step), **row}
            f.write(_to_line(self._last[1]))
        self._show(step, row)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Adds values to the line of a step where that is the last one; else as `write`."""
        start, last = self._last
        if not self._enabled:
            return
        if last.get("step") != step:
            return self.write(step, values)
        row = _to_row(values)
        self._last = start, last | row
        with self._path.open("r+b") as f:
            f.seek(start)
            f.write(_to_line(self._last[1]))
            f.truncate()
        self._show(step, row)

    def _show(self, step: int, row: Mapping[str, float | None]) -> None:
        for name, value in row.items():
            if value is not None:
                self._tensorboard().add_scalar(name, value, step)

    def flush(self) -> None:
        """Copies what was written to the bucket, if the folder is in one."""
        if self._board is not None:
            self._board.flush()
        if self._bucket is None or not self._enabled:
            return
        for file in (path for path in self._folder.rglob("*") if path.is_file()):
            copy = self._bucket / file.relative_to(self._folder).as_posix()
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())

    def close(self) -> None:
        self.flush()
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._disk is not None:
            self._disk.cleanup()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tensorboard(self) -> Any:
        if self._board is None:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(
                str(self._folder / "tensorboard"), purge_step=self._purge_step
            )
        return self._board


def _to_row(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}


def _to_line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row) + "\n").encode()


def _read_step(line: bytes) -> float:
    """The step of a line; infinity for one that was cut while it was written."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
