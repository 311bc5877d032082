"""Damaged, wrong and odd inputs: each ends in one line that names the file and the line or row, or
is set aside and counted with on_bad_row = skip, or is rightly taken. No bad text reaches a user."""

import copy
import gzip
import io
import json
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from popi_jax.data.records import User
from popi_jax.data.sources import jsonl, personamem, prefeval
from popi_jax.errors import UserError

BAD = "POISON"  # in every bad row


def options(**changes: object) -> types.SimpleNamespace:
    fields = {
        "on_bad_row": "error",
        "form": "",
        "split_by": "user",
        "validation_fraction": 0.0,
        "test_fraction": 0.0,
        "num_shots": 6,
        "num_pairs": 8,
    }
    return types.SimpleNamespace(**{**fields, **changes})


def record(name: str, **changes: object) -> dict[str, Any]:
    fields = {
        "user_id": name,
        "record_id": name,
        "signals": {"profile": f"I am {name}"},
        "prompt": [{"role": "user", "content": f"what now, {name}?"}],
        "chosen": "rest",
        "rejected": "run",
    }
    return {**fields, **changes}


def line(**changes: object) -> bytes:
    """A line whose every user is "bad"."""
    fields = record("bad") | {"signals": {"profile": BAD}} | changes
    return json.dumps(fields, ensure_ascii=True).encode()


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": BAD} for role in roles]


def replace(old: str, new: str) -> bytes:
    found = line().replace(old.encode(), new.encode())
    assert found != line()
    return found


def signals(**parts: object) -> dict[str, Any]:
    return {"signals": {"profile": BAD, **parts}}


GOOD = json.dumps(record("good")).encode()
ALSO = json.dumps(record("also")).encode()
ASKED = {"prompt": [{"role": "user", "content": "tea?"}]}
SHOT = {"prompt": "tea?", "chosen": "a", "rejected": "b"}

# the second line of three -> what is told of it
BAD_LINES: dict[str, tuple[bytes, str]] = {
    "wrong field name": (replace('"chosen"', '"choosen"'), 'Did you mean "chosen"'),
    "unknown field": (line(more=1), 'unknown field "more"'),
    "a number as text": (line(chosen=3), 'field "chosen": found 3'),
    "an id that is a number": (line(user_id=7), 'field "user_id": found 7'),
    "an id that is true": (line(record_id=True), 'field "record_id": found true'),
    "1e400": (replace('"rest"', "1e400"), 'field "chosen": found Infinity'),
    "empty text": (line(chosen=""), 'field "chosen": found ""'),
    "blank text": (line(rejected=" \t\u2028"), 'field "rejected"'),
    "EMPTY STRING": (line(chosen="EMPTY STRING"), "allowed: a real text"),
    "nan as text": (line(rejected="nan"), "allowed: a real text"),
    "None as text": (line(oracle="None"), "allowed: a real text"),
    "null": (line(chosen=None), 'field "chosen": found null'),
    "null signals": (line(signals=None, oracle=BAD), 'field "signals": found null'),
    "NaN": (replace('"rest"', "NaN"), "NaN is not a JSON value"),
    "-Infinity": (replace('"rest"', "-Infinity"), "-Infinity is not a JSON value"),
    "identical replies": (line(chosen="run"), 'a text other than "chosen"'),
    "identical when stripped": (line(chosen=" run\n"), 'a text other than "chosen"'),
    "identical past replies": (
        line(**signals(fewshot=[{**SHOT, "chosen": "b "}])),
        r"signals.fewshot\[0\].rejected",
    ),
    "the id of another line": (line(record_id="good"), "an id that occurs once"),
    "a key given twice": (replace('"chosen"', '"rejected"'), 'the key "rejected" is given twice'),
    "a nested key given twice": (
        replace('"role": "user"', '"role": "user", "role": "user"'),
        'the key "role" is given twice',
    ),
    "not UTF-8": (line(oracle="ue").replace(b"ue", b"\xfc"), "byte .* is not UTF-8"),
    "half a surrogate pair": (line(chosen="\ud800"), "half surrogate"),
    "half a pair in the prompt": (
        line(prompt=[{"role": "user", "content": "\udfff"}]),
        "half surrogate",
    ),
    "half a pair as field": (line(**{"\ud800": 1}), "unknown field"),
    "a list": (b'["POISON"]', "found .*POISON.*, allowed: one JSON object a line"),
    "a text": (b'"POISON"', "allowed: one JSON object a line"),
    "two objects": (line() + b" {}", "not JSON at column .* .Extra data"),
    "no JSON": (b"user POISON wants tea", "not JSON at column 1"),
    "single quotes": (b"{'user_id': 'POISON'}", "not JSON at column 2"),
    "a comma too many": (line()[:-1] + b",}", "not JSON at column"),
    "broken off": (line()[:90], "ends in the middle of a JSON object"),
    "broken off in a text": (line()[:-3], "ends in the middle of a JSON object"),
    "nested too deep": (
        line()[:-1] + b', "meta": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        "not JSON .maximum recursion",
    ),
    "a number of 5,000 digits": (line()[:-1] + b', "meta": ' + b"9" * 5000 + b"}", "not JSON"),
    "a control character": (line(oracle="?").replace(b"?", b"\x01"), "Invalid control character"),
    "ends with assistant": (line(prompt=turns("user", "assistant")), "ends with user"),
    "unknown role": (line(prompt=turns("human")), r'field "prompt": found \["human"\]'),
    "two system messages": (line(prompt=turns("system", "system", "user")), 'field "prompt"'),
    "system in the middle": (line(prompt=turns("user", "system", "user")), 'field "prompt"'),
    "no message": (line(prompt=[]), 'field "prompt"'),
    "prompt as text": (line(prompt="what?"), "a list of objects"),
    "its prompt is a past one": (
        line(**ASKED, **signals(fewshot=[SHOT])),
        "would give the answer away",
    ),
    "its prompt is commented": (
        line(**ASKED, **signals(comments=[{"prompt": "tea?", "comment": "no"}])),
        "no text of the line's own",
    ),
    "another oracle of the user": (
        line(user_id="good", oracle=BAD, **{"signals": record("good")["signals"]}),
        'field "oracle"',
    ),
}


def load(path: Path, **changes: object) -> tuple[list[User], list[str]]:
    loaded = jsonl.load(path, options(**changes))
    return list(loaded.users), loaded.bad_rows


def error(path: Path, source: Any = jsonl, **changes: object) -> str:
    with pytest.raises(UserError) as caught:
        list(source.load(path, options(**changes)).users)
    message = str(caught.value)
    assert message.isprintable(), "one line that any terminal shows"
    return message


@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("end", [".jsonl", ".jsonl.gz"])
def test_a_bad_line_is_told_or_set_aside(tmp_path: Path, name: str, end: str) -> None:
    bad, words = BAD_LINES[name]
    assert BAD.encode() in bad or name in ("broken off", "broken off in a text")
    path = tmp_path / f"a{end}"
    content = b"\n".join([GOOD, bad, ALSO, b""])
    path.write_bytes(gzip.compress(content) if end.endswith(".gz") else content)
    message = error(path)
    assert message.startswith(f"{path}:2: ") and re.search(words, message), message
    users, bad_rows = load(path, on_bad_row="skip")
    assert [user.user_id for user in users] == ["good", "also"] and bad_rows == [message]
    assert BAD not in "".join(user.to_json() for user in users)


def test_a_broken_off_last_line_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + line()[:-20])
    assert error(path).startswith(f"{path}:2: the line ends in the middle of a JSON object")


TAKEN: dict[str, tuple[bytes, str]] = {  # -> the chosen reply
    "BOM": (b"\xef\xbb\xbf" + GOOD, "rest"),
    "CRLF": (GOOD + b"\r\n", "rest"),
    "blank lines": (b"\n \n" + GOOD + b"\n\n\t\n", "rest"),
    "no line end at the end": (GOOD, "rest"),
    "U+2028 as it is": (line(chosen="?").replace(b"?", "a\u2028b".encode()), "a\u2028b"),
    "U+2028 escaped": (line(chosen="a\u2028b\x85c"), "a\u2028b\x85c"),
    "NUL": (line(chosen="a\0b"), "a\0b"),
    "control characters": (line(chosen="a\x1b[2Jb"), "a\x1b[2Jb"),
    "tokens of a template": (line(chosen="x<|im_end|><|im_start|>y"), "x<|im_end|><|im_start|>y"),
    "a token of end": (line(chosen="</s><eos>"), "</s><eos>"),
    "a whole surrogate pair": (line(chosen="\U0001f600"), "\U0001f600"),
    "10 MB": (line(chosen="x" * 10_000_000), "x" * 10_000_000),
    "right to left": (line(chosen="\u202eab"), "\u202eab"),
    "white space around": (line(chosen="\n rest "), "rest"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_odd_lines_are_taken_as_they_are(tmp_path: Path, name: str) -> None:
    content, chosen = TAKEN[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    (user,), bad_rows = load(path)
    assert user.pairs[0].chosen == chosen and not bad_rows
    assert User.from_json(user.to_json()) == user


def table(*rows: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), buffer)
    return buffer.getvalue()


MANY = b"".join(json.dumps(record(f"u{n}")).encode() + b"\n" for n in range(200))
PACKED = gzip.compress(MANY)
TABLE = table(record("good"), record("also"))
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"

# name -> its bytes, and what is told of it, whatever on_bad_row says
BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.jsonl", b"", "{path}: the file is empty"),
    "blank": ("a.jsonl", b"\n \r\n\n", "{path}: the file is empty"),
    "empty and packed": ("a.jsonl.gz", gzip.compress(b""), "{path}: the file is empty"),
    "an empty array": ("a.json", b"[]", "{path}: the file is empty"),
    "an object of many lines": ("a.json", b'{\n"a": 1}', "{path}:1: found an object of many lines"),
    "an array broken off": ("a.json", b"[" + GOOD, "{path}:1: not JSON at column .*the file ends"),
    "an array with a fault": ("a.json", b"[" + GOOD + b",\n{,}]", "{path}:2: not JSON at column 2"),
    "an array not in UTF-8": ("a.json", b'["\xfc"]', "{path}: byte 3 is not UTF-8"),
    "a Git LFS pointer": ("a.jsonl", LFS, "{path}:1: found a Git LFS pointer"),
    "a Git LFS pointer, packed": ("a.jsonl.gz", LFS, "{path}:1: found a Git LFS pointer"),
    "a Git LFS pointer, parquet": ("a.parquet", LFS, "{path}:1: found a Git LFS pointer"),
    "an HTML page": ("a.jsonl", b"\n<!DOCTYPE html><html>", "{path}:1: found an HTML page"),
    "an HTML page, packed": ("a.jsonl.gz", b"<html>403", "{path}:1: found an HTML page"),
    "a PDF": ("a.jsonl", b"%PDF-1.7\n", "{path}:1: found a PDF"),
    "a zip archive": ("a.jsonl", b"PK\x03\x04rest", "{path}:1: found a zip archive"),
    "packed without .gz": ("a.jsonl", PACKED, "{path}:1: found gzip data.* Name the file .gz"),
    "parquet without .parquet": ("a.jsonl", TABLE, "{path}:1: found parquet data"),
    "gzip broken off": ("a.jsonl.gz", PACKED[:-100], "{path}:\\d+: the gzip data end too early"),
    "gzip with a wrong sum": (
        "a.jsonl.gz",
        PACKED[:-8] + b"\0" * 8,
        "{path}:201: the gzip data end too early or are damaged",
    ),
    "no gzip": ("a.jsonl.gz", GOOD, "{path}: cannot be unpacked as gzip"),
    "parquet broken off": ("a.parquet", TABLE[:-100], "{path}: not parquet, or damaged"),
    "text as parquet": ("a.parquet", GOOD, "{path}: not parquet, or damaged"),
    "empty parquet": ("a.parquet", b"", "{path}: not parquet, or damaged"),
    "parquet without rows": ("a.parquet", table(), "{path}: the file is empty"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_told_even_where_bad_rows_are_skipped(tmp_path: Path, name: str) -> None:
    file, content, words = BAD_FILES[name]
    path = tmp_path / file
    path.write_bytes(content)
    expected = words.replace("{path}", re.escape(str(path)))
    for on_bad_row in ("error", "skip"):
        message = error(path, on_bad_row=on_bad_row)
        assert re.match(expected, message), message


def test_a_csv_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,tea\n")
    assert error(path).startswith(f'{path}:2: unknown field "id"')
    path = path.rename(tmp_path / "a.jsonl")
    assert error(path).startswith(f"{path}:1: not JSON at column 1")


def test_utf_16_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD.decode(), encoding="utf-16")
    assert error(path).startswith(f"{path}:1: byte 1 of the line is not UTF-8")


def test_missing_and_unreadable_files_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "a.jsonl: no such file; found b.jsonl" not in error(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    assert 'Did you mean "b.jsonl"?' in error(tmp_path / "a.jsonl")
    assert f"{tmp_path}/train.jsonl: no such file" in error(tmp_path)  # a folder

    def refuse(self: Path, *args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    message = error(tmp_path / "b.jsonl", on_bad_row="skip")
    assert message.startswith(f"{tmp_path}/b.jsonl: cannot be read (Permission denied)")


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {  # of parquet
    "missing text": ({"chosen": None}, 'no field "chosen"'),
    "missing part of a struct": ({"prompt": [{"role": None, "content": BAD}]}, "prompt.0..role"),
    "empty text": ({"rejected": " "}, 'field "rejected"'),
    "identical": ({"rejected": "rest "}, 'a text other than "chosen"'),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_of_parquet_is_told_or_set_aside(tmp_path: Path, name: str) -> None:
    change, words = BAD_ROWS[name]
    path = tmp_path / "a.parquet"
    bad = record("bad", signals={"profile": BAD}) | change
    path.write_bytes(table(record("good"), bad, record("also")))
    message = error(path)
    assert message.startswith(f"{path}: row 2: ") and re.search(words, message)
    users, bad_rows = load(path, on_bad_row="skip")
    assert [user.user_id for user in users] == ["good", "also"] and bad_rows == [message]


def test_columns_of_parquet_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(table({"prompt": "x", "answer": b"\xff\0"}))
    assert error(path).startswith(f'{path}: row 1: unknown field "answer"')
    number = {name: value for name, value in record("a").items() if name != "chosen"}
    path.write_bytes(table({**number, "chosen": float("nan")}))
    assert error(path).startswith(f'{path}: row 1: field "chosen": found NaN')


def test_a_user_belongs_to_one_file(tmp_path: Path) -> None:
    for split, name in (("train", "a"), ("validation", "b"), ("test", "a")):
        row = record(name, record_id=split)
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
    (tmp_path / "notes.txt").write_bytes(b"\xff")  # not read
    message = error(tmp_path)
    assert message.startswith(f'{tmp_path}/test.jsonl:1: field "user_id": found "a"')
    assert f"also at {tmp_path}/train.jsonl:1" in message
    users, bad_rows = load(tmp_path, on_bad_row="skip")
    assert [(u.user_id, u.split) for u in users] == [("a", "train"), ("b", "validation")]
    assert bad_rows == [message]


Rows = list[dict[str, Any]]


def write_topic(folder: Path, change: Callable[[Rows, Rows], None] | None = None) -> Path:
    """A topic of three rows; `change` damages those of the options and of the chats."""
    both = [{"preference": f"likes {n}", "question": f"which {n}?"} for n in range(3)]
    picks = {"classification_task_options": ["right", "wrong 1", "wrong 2", "wrong 3"]}
    chat = {"0": {"user": "hello", "assistant": "hi"}}
    rows = [copy.deepcopy({**row, **picks}) for row in both]
    chats = [{**row, "persona": "a nurse", "conversation": chat} for row in both]
    if change:
        change(rows, chats)
    for kind, found in ((prefeval.OPTIONS, rows), (prefeval.CHATS["persona"], chats)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind / "pets.json").write_text(json.dumps(found))
    return folder


BAD_TOPICS: dict[str, tuple[Callable[[Rows, Rows], Any], str]] = {
    "three options": (lambda o, c: o[1]["classification_task_options"].pop(), "3 texts"),
    "an option that is a number": (
        lambda o, c: o[1]["classification_task_options"].__setitem__(2, 5),
        r"classification_task_options\[2\]",
    ),
    "the first option twice": (
        lambda o, c: o[1].update(classification_task_options=["a", "b", "a ", "c"]),
        "the first unlike the others",
    ),
    "half a surrogate pair": (
        lambda o, c: o[1].update(classification_task_options=["a", "b", "\ud800", "c"]),
        "half surrogate",
    ),
    "no preference": (lambda o, c: o[1].update(preference=None), 'field "preference"'),
    "a renamed field": (lambda o, c: o[1].update(quest=o[1].pop("question")), "Did you mean"),
    "an empty persona": (lambda o, c: c[1].update(persona=""), 'field "persona"'),
    "a chat that is a list": (lambda o, c: c[1].update(conversation=[]), "an object"),
    "no answer in the chat": (
        lambda o, c: c[1].update(conversation={"0": {"user": "x"}}),
        "conversation.0.assistant",
    ),
    "the question in the chat": (
        lambda o, c: c[1].update(conversation={"0": {"user": "which 1?", "assistant": "x"}}),
        "without the question that is held out",
    ),
    "a row twice": (lambda o, c: o.__setitem__(1, o[0]), "occur once"),
    "no such row of options": (lambda o, c: c[1].update(question="what?"), "of mcq_options/"),
}


@pytest.mark.parametrize("name", BAD_TOPICS)
def test_a_bad_row_of_prefeval_is_told_or_set_aside(tmp_path: Path, name: str) -> None:
    change, words = BAD_TOPICS[name]
    write_topic(tmp_path, change)
    message = error(tmp_path, prefeval, form="persona")
    assert re.search(words, message) and re.match(r".*/pets\.json: row [12]: ", message), message
    loaded = prefeval.load(tmp_path, options(form="persona", on_bad_row="skip"))
    users = list(loaded.users)
    assert message in loaded.bad_rows and {u.oracle for u in users} >= {"likes 2"}
    assert len(users) == 2 or name == "a row twice"


def test_bad_files_of_prefeval_are_told(tmp_path: Path) -> None:
    for kind in (prefeval.OPTIONS, prefeval.CHATS["persona"]):
        path = write_topic(tmp_path) / kind / "pets.json"
        whole = path.read_bytes()
        for content, words in (
            (whole[:-30], f"{path}:1: not JSON"),
            (
                whole.replace(b'"preference"', b'"question"', 1),
                f'{path}: row 1: the key "question"',
            ),
            (whole.replace(b'"likes 1"', b"NaN"), f"{path}: row 2: not JSON (NaN"),
            (b"<html>", f"{path}:1: found an HTML page"),
            (LFS, f"{path}:1: found a Git LFS pointer"),
            (b"", f"{path}: the file is empty"),
            (b"null", f"{path}: found null, allowed: a JSON array"),
            (b"[[1]]", f"{path}: row 1: found [1], allowed: an object"),
        ):
            path.write_bytes(content)
            assert error(tmp_path, prefeval, form="persona").startswith(words), words
        path.write_bytes(b"\xef\xbb\xbf" + whole)
        assert len(list(prefeval.load(tmp_path, options(form="persona")).users)) == 3
        path.unlink()
        assert "found no file *.json" in error(tmp_path, prefeval, form="persona")
    (tmp_path / prefeval.OPTIONS / "dogs.json").write_text("[]")
    (tmp_path / prefeval.CHATS["persona"] / "cats.json").write_text("[]")
    assert "no other topic has both" in error(tmp_path, prefeval, form="persona")


def test_true_is_no_number(tmp_path: Path) -> None:
    home = tmp_path / "backend" / "8"
    home.mkdir(parents=True)
    query = {
        "query_id": "1",
        "task_type": "chatbot_personalized_response",
        "user_query": "what?",
        "example_response": "a",
        "inferior_response": "b",
    }
    (home / "chatbot.json").write_text('[{"source_timestamp": 1}]')
    for time, found in (("true", "true"), ("1e400", "Infinity"), ("2.5", "2.5"), ('"2"', '"2"')):
        text = json.dumps([query])[:-2] + f', "ts": {time}}}]'
        (home / "test.json").write_text(text)
        message = error(tmp_path, personamem, form="v3")
        assert message.startswith(f'{home}/test.json: row 1: field "ts": found {found}')


def test_there_are_forty_cases() -> None:
    assert len(BAD_LINES) + len(TAKEN) + len(BAD_FILES) + len(BAD_ROWS) + len(BAD_TOPICS) >= 40
