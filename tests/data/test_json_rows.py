"""Reading rows: formats, compression, memory, and what is refused, against json and pyarrow."""

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from popi_jax.data import row_files
from popi_jax.data.json_rows import Row, read_lines, stream_rows
from popi_jax.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"name": f"row {i}\u2028é", "items": [{"n": i}], "none": None} for i in range(600)
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def compress(write: Callable[[Path, list[dict[str, Any]]], None]) -> Any:
    def write_gz(path: Path, rows: list[dict[str, Any]]) -> None:
        write(path, rows)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return write_gz


WRITERS = {
    "a.jsonl": write_jsonl,
    "lines.json": write_jsonl,
    "a.jsonl.gz": compress(write_jsonl),
    "a.json": write_json,
    "a.json.gz": compress(write_json),
    "a.parquet": write_parquet,
}


def read(path: Path, on_bad_row: str = "error") -> tuple[list[Row], list[str]]:
    return read_lines(path, lambda row: row, on_bad_row)


def error(path: Path, on_bad_row: str = "error") -> str:
    with pytest.raises(UserError) as caught:
        read(path, on_bad_row)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(row_files, "BLOCK", 50)  # smaller than a row
    path = tmp_path / name
    WRITERS[name](path, ROWS)
    rows, bad = read(path)
    assert [row.fields for row in rows] == ROWS and not bad
    by_line = "lines" in name or "jsonl" in name
    place = f"{path}:600" if by_line else f"{path}: row 600"
    assert rows[-1].where == place


def test_an_array_is_read_at_any_length_of_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"a": 1.5, "é": ["\u2028", True, -12, 1e5]}, {"b": {"c": "😀"}}, {}]
    path = tmp_path / "a.json"
    path.write_text("\ufeff \n" + json.dumps(rows, ensure_ascii=False, indent=1) + " \r\n")
    for size in range(1, 120):
        monkeypatch.setattr(row_files, "BLOCK", size)
        assert [row.fields for row in read(path)[0]] == rows, size
    path.write_text('[{"a": 1},\n\n {"b": 12 x}]')
    for size in range(1, 40):
        monkeypatch.setattr(row_files, "BLOCK", size)
        assert f"{path}:3: not JSON at column 11" in error(path), size


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_a_large_file_is_never_in_memory(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"{i}" + "x" * 100_000} for i in range(300)]  # 30 MB
    path = tmp_path / name
    if name == "a.parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=10)
    else:
        WRITERS[name](path, rows)
    row_files.BATCH, batch = 10, row_files.BATCH
    tracemalloc.start()
    try:
        count = sum(1 for _ in stream_rows(path, lambda row: row.get_text("text"), "error", []))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        row_files.BATCH = batch
    assert count == 300 and peak < 12e6, peak


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_bad_rows_are_set_aside(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path, [{"a": "1"}, {"a": " "}, {"a": "3"}])
    bad: list[str] = []
    rows = stream_rows(path, lambda row: row.get_text("a"), "skip", bad)
    assert next(rows) == "1" and not bad
    assert list(rows) == ["3"] and len(bad) == 1
    assert bad[0].startswith(f"{path}:2: " if "jsonl" in name else f"{path}: row 2: ")
    with pytest.raises(UserError, match='field "a"'):
        list(stream_rows(path, lambda row: row.get_text("a"), "error", []))


TWICE = '{"a": 1, "b": [{"c": {"d": 1, "e": 2, "d": 1}}]}'


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    for name, text, place in (
        ("a.jsonl", f'{{"a": 0}}\n{TWICE}\n{{"a": 2}}', ":2"),
        ("a.json", f'[{{"a": 0}}, {TWICE}, {{"a": 2}}]', ": row 2"),
    ):
        path = tmp_path / name
        path.write_text(text)
        told = f'{path}{place}: the key "d" is given twice'
        assert error(path).startswith(told)
        rows, bad = read(path, "skip")
        assert [row.fields["a"] for row in rows] == [0, 2]
        assert len(bad) == 1 and bad[0].startswith(told)


def test_whole_numbers_may_be_written_as_floats(tmp_path: Path) -> None:
    numbers = [54, 54.0, 5.4e1]
    for name in ("a.jsonl", "a.parquet"):
        path = tmp_path / name
        WRITERS[name](path, [{"n": n} for n in numbers])
        found, _ = read_lines(path, lambda row: row.get_integer("n", 1, 100), "error")
        assert found == [54, 54, 54] and all(type(n) is int for n in found)
    for value in (54.5, True, "54", None, [54], 1e400, float("nan")):
        with pytest.raises(UserError, match="a whole number of 1 to 100"):
            Row("a:1", {"n": value}).get_integer("n", 1, 100)


def test_unreadable_names_and_values_are_told_on_one_line() -> None:
    row = Row("a:1", {"a\nb\ud800": b"\x00\n", "day": object()})
    for call in (
        lambda: row.get_text("a\nb\ud800"),
        lambda: row.get_text("day"),
        lambda: row.get_text("other"),
        lambda: row.allow_only(["day"]),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert str(caught.value).isprintable()
        str(caught.value).encode()


def test_texts_of_a_list_are_checked() -> None:
    assert Row("a:1", {"t": [" a", "b "]}).get_texts("t") == ["a", "b"]
    for value, field in ((["a", 1], r"t\[1\]"), (["\ud800"], r"t\[0\]"), (["a", " "], r"t\[1\]")):
        with pytest.raises(UserError, match=field):
            Row("a:1", {"t": value}).get_texts("t")


def test_parquet_gives_none_and_refuses_two_columns_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [{"a": None, "b": "x"}, {"a": 1, "b": None}])
    assert [row.fields for row in read(path)[0]] == [{"a": None, "b": "x"}, {"a": 1, "b": None}]
    parquet.write_table(pyarrow.Table.from_arrays([[1], [2]], names=["a", "a"]), path)
    assert 'two columns "a"' in error(path)
    write_parquet(path, [])
    assert "the file is empty" in error(path)


def test_the_object_over_many_lines_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{\n "a": 1\n}')
    assert f"{path}:1: found an object of many lines" in error(path, "skip")
    path.write_text('"a"')
    assert 'found "a", allowed: a JSON array' in error(path, "skip")
    path.write_text('[{"a": 1}')
    assert f"{path}:1: not JSON at column 10 (the file ends in the array)" in error(path, "skip")
    path.write_text('[{"a": 1}] []')
    assert "Extra data" in error(path, "skip")
    path.write_text('[{"a": 1},]')
    assert f"{path}:1: not JSON at column 11" in error(path, "skip")
