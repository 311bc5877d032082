"""A folder that is exported takes its place at the end or not at all, and is as readable as any new
file."""

import os
from pathlib import Path

import pytest

from popi_jax.checkpoints import hf_write
from popi_jax.errors import UserError
from tests.checkpoints.test_hf_io import edit, write


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_are_as_readable_as_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "model")
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "model").iterdir()}
    assert len(modes) == 3
    assert set(modes.values()) == {0o666 & ~umask}, modes


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_an_export_replaces_an_earlier_one(tmp_path):
    for step in (1, 2):
        with hf_write.open_export(tmp_path / "out") as folder:
            write(folder)
            (folder / f"{step}.txt").write_text("")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == [
        "2.txt",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_an_export_that_fails_changes_nothing(tmp_path):
    with hf_write.open_export(tmp_path / "out") as folder:
        write(folder)
    with pytest.raises(ZeroDivisionError), hf_write.open_export(tmp_path / "out") as folder:
        (folder / "half.txt").write_text("")
        raise ZeroDivisionError
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["config.json", "generation_config.json", "model.safetensors"]


def test_other_peoples_folders_are_left_alone(tmp_path):
    write(tmp_path / "llama")
    edit(tmp_path / "llama", popi_jax="drop")
    (tmp_path / "file").write_text("x")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    for name in ("llama", "file", "notes"):
        with (
            pytest.raises(UserError, match="something other than an earlier export"),
            hf_write.open_export(tmp_path / name),
        ):
            pass
    with (
        pytest.raises(UserError, match="cannot write in"),
        hf_write.open_export(tmp_path / "file/x/out"),
    ):
        pass
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    with hf_write.open_export(tmp_path / "empty") as folder:
        write(folder)
    assert "config.json" in names(tmp_path / "empty")
