"""Users that another process reads are those that this one would."""

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import pytest

from popi_jax.data import prepared
from popi_jax.data.read_ahead import read_ahead
from popi_jax.data.sources import alignx
from popi_jax.data.sources.source import Loaded
from popi_jax.errors import UserError
from tests.data.sources.alignx_files import make_options, make_row, make_rows, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows = [*make_rows(150), make_row(900, comments=0, pairs=0, demographics=False)]
    return write(tmp_path / "raw" / "a.parquet", rows)


def ahead(path: Path, cfg: Any, load: Any = alignx.load) -> Loaded:
    return read_ahead(alignx.load(path, cfg), load, path, cfg)


def test_another_process_reads_the_same(path: Path) -> None:
    rows = [*make_rows(150), make_row(900, comments=0, pairs=0, demographics=False)]
    rows[70]["chosen"] = ""
    cfg = make_options("alignx", write(path, rows), split_by="target", on_bad_row="skip")
    here, there = alignx.load(path, cfg), ahead(path, cfg)
    assert list(there.users) == list(here.users)
    for part in ("bad_rows", "left_out", "counts"):
        assert getattr(there, part) == getattr(here, part) != [], part
    assert there.total == 151


def test_a_refusal_is_told_as_ever(path: Path) -> None:
    rows = make_rows(150)
    rows[140]["chosen"] = ""
    cfg = make_options("alignx", write(path, rows), split_by="target")
    users = iter(ahead(path, cfg).users)
    assert next(users).user_id == "alignx/1"
    with pytest.raises(UserError, match=r'a\.parquet: row 141: field "chosen"'):
        list(users)


def test_a_process_that_is_lost_is_told(path: Path) -> None:
    cfg = make_options("alignx", path, split_by="target")
    with pytest.raises(UserError, match="ended early .exit status 1."):
        list(ahead(path, cfg, load=int).users)  # which takes no folder


def test_nothing_is_left_of_a_reader_that_stops(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    users = iter(ahead(path, make_options("alignx", path, split_by="target")).users)
    next(users)
    users.close()  # type: ignore[attr-defined]
    assert [process.returncode is not None for process in started] == [True]


def test_large_sets_are_prepared_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = make_options("alignx", path, split_by="target", form="mixed")
    small = prepared.prepare(cfg, allow_sample=False)
    monkeypatch.setattr(prepared, "_LARGE", 100)
    asked: list[Path] = []

    def note(loaded: Loaded, load: Any, folder: Path, cfg: Any) -> Loaded:
        asked.append(folder)
        return read_ahead(loaded, load, folder, cfg)

    monkeypatch.setattr(prepared, "read_ahead", note)
    again = prepared.prepare(
        dataclasses.replace(cfg, prepared=f"{cfg.prepared}2"), allow_sample=False
    )
    assert asked == [path]
    for split, users in small.splits.items():
        assert list(again.splits[split]) == list(users)
    assert again.stats["counts"] == small.stats["counts"] != {}
    assert again.stats["left_out"] == small.stats["left_out"] != {}
