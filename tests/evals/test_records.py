import json

import pytest

from popi_jax.evals import records
from popi_jax.evals.records import Damaged, OtherFormat, read, read_done

ITEMS = [{"user": "a", "margin": 0.25}, {"user": "b", "margin": -1e-9}]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "cells" / "0a.jsonl"
    records.write(file, {"kind": "cell", "key": "0a", "status": "done"}, ITEMS)
    return file


def test_what_is_written_is_read(path):
    record = read(path)
    assert record.items == ITEMS
    assert record.header["key"] == "0a" and record.header["count"] == 2
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines[1:]] == ITEMS  # a plain file of lines


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("0.25", "0.75"),
        lambda text: text + '{"user": "c", "margin": 1.0}\n',
        lambda text: "\n".join(text.splitlines()[1:]),
        lambda text: "",
        lambda text: text.replace('"count": 2', '"count": 3'),
    ],
)
def test_a_damaged_file_is_told_and_set_aside(path, damage, caplog):
    whole = path.read_text()
    path.write_text(damage(whole))
    with pytest.raises(Damaged, match="0a.jsonl: damaged"):
        read(path)
    from etils import epath

    assert read_done(epath.Path(path)) is None
    assert "set aside as 0a.jsonl.damaged and computed anew" in caplog.text
    assert not path.exists()
    assert (path.parent / "0a.jsonl.damaged").read_text() == damage(whole)


def test_another_version_is_told_and_stays(path):
    from etils import epath

    text = path.read_text().replace('"format": 1', '"format": 0')
    path.write_text(text)
    with pytest.raises(OtherFormat, match=r"0a.jsonl: of an older version .*move it away"):
        read_done(epath.Path(path))
    assert path.read_text() == text


def test_a_failure_stands_beside_what_is_done(path):
    from etils import epath

    out, labels = str(path.parents[1]), {"model": "m", "condition": "c"}
    records.write_failure(out, labels, "no such thing")
    failure = records.find_failure(out, labels)
    assert failure != records.find_failure(out, labels | {"condition": "d"})
    assert read(failure).header["reason"] == "no such thing"
    assert read_done(failure) is None  # to be computed again
    assert read_done(epath.Path(path)) == read(path)


def test_keys_depend_on_content_alone():
    assert records.make_key({"a": 1, "b": [2, None]}) == records.make_key({"b": [2, None], "a": 1})
    assert records.make_key({"a": 1}) != records.make_key({"a": 1.5})
    assert len(records.make_key({})) == 24
