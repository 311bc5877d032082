"""Files that are either the old one or the whole new one, on a disk and in a bucket."""

import json
import os
import threading
from pathlib import Path

import pytest
from etils import epath

from popi_jax import files


def test_a_file_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    files.write_jsonl(path, [{"a": "é"}, {"a": 2}])
    assert path.read_text(encoding="utf-8") == '{"a": "é"}\n{"a": 2}\n'

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(path, "new")
    assert path.read_text(encoding="utf-8") == '{"a": "é"}\n{"a": 2}\n'
    assert [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]  # no temporary file stays


def test_several_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    failed: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for _ in range(30):
                files.write_whole(path, json.dumps([number] * 1000))
                assert len(json.loads(path.read_text())) == 1000
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and [p.name for p in tmp_path.iterdir()] == ["measured.json"]


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "copy"
    with pytest.raises(OSError, match="disk full"), files.make_folder(place) as part:
        (part / "half").write_text("")
        raise OSError("disk full")
    assert [*place.parent.iterdir()] == []
    with files.make_folder(place) as part, files.make_folder(place) as other:
        (part / "name").write_text("late")
        (other / "name").write_text("first")
        assert not place.exists()
    assert (place / "name").read_text() == "first"
    assert [*place.parent.iterdir()] == [place]  # no temporary folder stays


def test_files_in_a_bucket(bucket: str) -> None:
    files.write_jsonl(f"{bucket}/run/rows.jsonl", [{"a": "é"}])
    files.write_jsonl(f"{bucket}/run/rows.jsonl", [{"a": 2}])
    (file,) = epath.Path(f"{bucket}/run").iterdir()
    assert (file.name, file.read_text()) == ("rows.jsonl", '{"a": 2}\n')
