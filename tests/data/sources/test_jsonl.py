"""Own data: grouping, splits, every rule of the format, and writing what was read."""

import copy
import dataclasses
import gzip
import json
import types
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pyarrow
import pytest
from pyarrow import parquet

from popi_jax.config_data import DataConfig
from popi_jax.data.prepared import prepare
from popi_jax.data.records import Comment, Pair, Shot, User
from popi_jax.data.sources import jsonl
from popi_jax.data.splits import choose_split
from popi_jax.errors import UserError
from tests.data.people import write_users

RECORD: dict[str, Any] = {
    "user_id": "ann",
    "dataset": "mine",
    "record_id": "1",
    "signals": {
        "profile": "a nurse",
        "survey": "age: 30",
        "fewshot": [{"prompt": "tea?", "chosen": "yes", "rejected": "no"}],
        "comments": [{"prompt": "coffee?", "comment": "too bitter"}],
    },
    "prompt": [{"role": "user", "content": "what now?"}],
    "chosen": "rest",
    "rejected": "run",
    "oracle": "calm",
    "meta": "{}",
}


def options(**changes: object) -> types.SimpleNamespace:
    fields = {
        "split_by": "user",
        "on_bad_row": "error",
        "validation_fraction": 0.2,
        "test_fraction": 0.2,
        "num_shots": 6,
        "num_pairs": 8,
    }
    return types.SimpleNamespace(**{**fields, **changes})


def record(**changes: object) -> dict[str, Any]:
    return copy.deepcopy({**RECORD, **changes})


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def error(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        jsonl.load(path, options())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_lines_with_the_same_signals_are_one_user(tmp_path: Path) -> None:
    (user,) = jsonl.load(
        write(tmp_path / "a.jsonl", [record(record_id=str(i)) for i in range(3)]), options()
    ).users
    assert user == User(
        user_id="ann",
        profile="a nurse",
        survey="age: 30",
        shots=(Shot("tea?", "yes", "no"),),
        comments=(Comment("coffee?", "too bitter"),),
        pairs=tuple(
            Pair(str(i), [{"role": "user", "content": "what now?"}], "rest", "run")
            for i in range(3)
        ),
        oracle="calm",
        split=choose_split("ann", 0.2, 0.2),
    )


def test_other_signals_are_a_further_user_of_the_same_split(tmp_path: Path) -> None:
    records = [
        record(user_id=f"u{i}", record_id=f"{i}-{draw}", signals={"profile": f"draw {draw}"})
        for draw in range(2)
        for i in range(40)
    ]
    users = jsonl.load(write(tmp_path / "a.jsonl", records), options()).users
    split = {u.user_id: u.split for u in users}
    assert len(split) == 80 and all(split[f"u{i}"] == split[f"u{i}#2"] for i in range(40))
    assert set(split.values()) == {"train", "validation", "test"}


def test_counts_are_limited(tmp_path: Path) -> None:
    shots = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(3)]
    records = [record(record_id=str(i), signals={"fewshot": shots}) for i in range(3)]
    (user,) = jsonl.load(
        write(tmp_path / "a.jsonl", records), options(num_shots=2, num_pairs=1)
    ).users
    assert ([s.prompt for s in user.shots], [p.record_id for p in user.pairs]) == (
        ["p0", "p1"],
        ["0"],
    )


def test_a_folder_gives_the_splits(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl", [record(user_id=f"of {split}")])
    assert [(u.user_id, u.split) for u in jsonl.load(tmp_path, options()).users] == [
        (f"of {split}", split) for split in ("train", "validation", "test")
    ]
    write(tmp_path / "test.jsonl", [record(user_id="of train")])
    message = error(tmp_path)
    assert f"{tmp_path}/test.jsonl:1: " in message and f"{tmp_path}/train.jsonl:1" in message
    (tmp_path / "test.jsonl").unlink()
    assert "test.jsonl: no such file" in error(tmp_path)


ROLES = 'field "prompt"'
CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"user_id": ""}, 'field "user_id"'),
    ({"user_id": 7}, "found 7"),
    ({"chosen": " run "}, 'field "rejected"'),
    ({"chosen": ""}, 'field "chosen"'),
    ({"chosen": "EMPTY STRING"}, "a real text"),
    ({"rejected": "nan"}, "a real text"),
    ({"oracle": "None"}, "a real text"),
    ({"prompt": []}, ROLES),
    ({"prompt": "what now?"}, "a list of objects"),
    ({"prompt": [{"role": "assistant", "content": "hi"}]}, ROLES),
    ({"prompt": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, ROLES),
    ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, ROLES),
    ({"prompt": [{"role": "human", "content": "a"}]}, ROLES),
    ({"prompt": [{"role": "user", "text": "a"}]}, 'unknown field "prompt[0].text"'),
    ({"prompt": [{"role": "user", "content": "tea?"}]}, "signals.fewshot[0].prompt"),
    ({"prompt": [{"role": "user", "content": "coffee?"}]}, "signals.comments[0]"),
    ({"prompt": [{"role": "user", "content": "too bitter"}]}, "signals.comments[0]"),
    ({"signals": {"profil": "x"}}, 'unknown field "signals.profil"; allowed: profile'),
    ({"signals": {"profile": None}}, 'field "signals.profile": found null'),
    (
        {"signals": {"fewshot": [{"prompt": "p", "chosen": "a"}]}},
        'no field "signals.fewshot[0].rejected"',
    ),
    (
        {"signals": {"fewshot": [{"prompt": "p", "chosen": "a", "rejected": "a"}]}},
        "signals.fewshot[0].rejected",
    ),
    ({"signals": {"comments": ["x"]}}, 'field "signals.comments"'),
    ({"orcale": "x"}, 'unknown field "orcale"'),
    ({"groups": "old"}, 'field "groups": found "old", allowed: an object'),
    ({"groups": {"age": 30}}, 'field "groups.age": found 30'),
    ({"groups": {"age": ""}}, 'field "groups.age"'),
]


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=lambda v: str(v)[:40])
def test_rules_are_enforced(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = write(
        tmp_path / "a.jsonl", [record(), record(record_id="2", **{**{"user_id": "bob"}, **change})]
    )
    message = error(path)
    assert message.startswith(f"{path}:2: ") and words in message


def test_missing_and_repeated_are_named(tmp_path: Path) -> None:
    bad = record()
    bad["choosen"] = bad.pop("chosen")
    assert 'Did you mean "chosen"?' in error(write(tmp_path / "a.jsonl", [bad]))
    del bad["choosen"]
    assert 'no field "chosen"' in error(write(tmp_path / "a.jsonl", [bad]))
    assert "a.jsonl:1" in error(write(tmp_path / "a.jsonl", [record(), record()]))
    message = error(write(tmp_path / "a.jsonl", [record(), record(record_id="2", oracle="wild")]))
    assert 'field "oracle"' in message and "a.jsonl:1" in message


def test_groups_are_those_of_the_user(tmp_path: Path) -> None:
    old = {"groups": {"age": "old", "trade": "nurse"}}
    lines = [record(record_id=str(i), **old) for i in range(2)]
    lines.append(record(record_id="3", signals={"profile": "another draw"}, **old))
    users = jsonl.load(write(tmp_path / "a.jsonl", lines), options()).users
    assert [u.user_id for u in users] == ["ann", "ann#2"]
    assert all(u.groups == old["groups"] for u in users)
    assert all(pair.groups == {} for u in users for pair in u.pairs)
    assert User.from_json(users[0].to_json()) == users[0]
    for other in ({}, {"groups": {"age": "young", "trade": "nurse"}}):
        rows = [record(**old), record(record_id="2", **other)]
        message = error(write(tmp_path / "a.jsonl", rows))
        assert 'a.jsonl:2: field "groups": found' in message and "a.jsonl:1" in message
    (read,) = jsonl.read_users(write(tmp_path / "a.jsonl", [record(**old)]), 6)
    assert read.groups == {}  # nothing is scored


def test_bad_rows_can_be_skipped(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", [record(), record(record_id="2", chosen=""), record(record_id="3")]
    )
    path.write_text(path.read_text() + '{"user_id": "a')
    loaded = jsonl.load(path, options(on_bad_row="skip"))
    assert [p.record_id for p in loaded.users[0].pairs] == ["1", "3"]
    assert [message.split(": ")[0] for message in loaded.bad_rows] == [f"{path}:2", f"{path}:4"]


words = (
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
    .map(str.strip)
    .filter(lambda text: text and text not in jsonl.PLACEHOLDERS)
)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(profiles=st.lists(words, min_size=1, max_size=4, unique=True), text=words)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, profiles: list[str], text: str
) -> None:
    users = [
        User(
            user_id=f"user {i}",
            profile=profile,
            survey="",
            shots=(Shot(f"{text} ?", f"{text} a", f"{text} b"),),
            comments=(Comment("", f"{text} !"),),
            pairs=(
                Pair(f"{i}", [{"role": "user", "content": f"{text} x"}], f"{text} 1", f"{text} 2"),
            ),
            split=choose_split(f"user {i}", 0.2, 0.2),
            groups={"kind": profile},
        )
        for i, profile in enumerate(profiles)
    ]
    path = tmp_path_factory.mktemp("written") / "a.jsonl"
    write_users(users, path)
    assert jsonl.load(path, options()).users == users


def test_a_real_name_is_never_that_of_a_draw(tmp_path: Path) -> None:
    draws = [{"profile": f"draw {n}"} for n in range(2)]
    names = ["ann", "ann#2", "ann#pair1", "ann%232", "ann#2", "100%"]
    records = [
        record(user_id=name, record_id=f"{i}/{n}", signals=signals, oracle="")
        for i, name in enumerate(names)
        for n, signals in enumerate(draws)
    ]
    users = jsonl.load(write(tmp_path / "a.jsonl", records), options()).users
    ids = [user.user_id for user in users]
    assert len(set(ids)) == len(ids) == 2 * len(set(names))
    people = {i.split("#")[0] for i in ids}  # as an evaluation takes them
    assert len(people) == len(set(names)) and {"ann", "ann#2"} <= set(ids)
    by_id = {user.user_id: user for user in users}
    assert [p.record_id for p in by_id["ann#2"].pairs] == ["0/1"]  # the second draw of ann
    assert [p.record_id for p in by_id["ann%232"].pairs] == ["1/0", "4/0"]  # the real ann#2
    (read,) = jsonl.read_users(write(tmp_path / "b.jsonl", records[2:3]), 6)
    assert read.user_id == "ann#2"  # nothing is drawn


def test_conversations_are_kept(tmp_path: Path) -> None:
    signals = copy.deepcopy(RECORD["signals"])
    signals["fewshot"][0]["conversation"] = "c1"
    signals["comments"][0]["conversation"] = "c2"
    made = record(signals=signals, conversation="c3")
    (user,) = jsonl.load(write(tmp_path / "a.jsonl", [made]), options()).users
    found = (user.shots[0].conversation, user.comments[0].conversation, user.pairs[0].conversation)
    assert found == ("c1", "c2", "c3")


def write_table(path: Path, records: list[dict[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def write_packed(path: Path, records: list[dict[str, Any]]) -> Path:
    write(path, records)
    path.write_bytes(gzip.compress(path.read_bytes()))
    return path


def test_every_format_gives_the_same_users(tmp_path: Path) -> None:
    records = [record(user_id=f"u{i}", record_id=str(i)) for i in range(20)]
    del records[3]["oracle"], records[3]["signals"]["survey"]
    records[0]["groups"] = {"age": "old"}
    expected = jsonl.load(write(tmp_path / "a.jsonl", records), options()).users
    table = jsonl.load(write_table(tmp_path / "a.parquet", records), options()).users
    packed = jsonl.load(write_packed(tmp_path / "a.jsonl.gz", records), options()).users
    assert expected == table == packed and {user.oracle for user in expected} == {"calm", ""}
    assert jsonl.read_users(tmp_path / "a.parquet", 6) == jsonl.read_users(tmp_path / "a.jsonl", 6)


def test_a_folder_may_hold_any_format_once(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [record(user_id="a")])
    write_packed(tmp_path / "validation.jsonl.gz", [record(user_id="b")])
    write_table(tmp_path / "test.parquet", [record(user_id="c")])
    (tmp_path / "README.md").write_text("not read")
    names = ["train.jsonl", "validation.jsonl.gz", "test.parquet"]
    assert [path.name for path in jsonl.list_files(tmp_path)] == names
    users = jsonl.load(tmp_path, options()).users
    assert [(u.user_id, u.split) for u in users] == [
        ("a", "train"),
        ("b", "validation"),
        ("c", "test"),
    ]
    write(tmp_path / "test.jsonl", [record(user_id="d")])
    assert "found test.jsonl, test.parquet, allowed: one of them" in error(tmp_path)


def test_split_by_conversation(tmp_path: Path) -> None:
    """A person is in several splits with the same signals, a conversation in one alone."""
    rows = [
        {
            "user_id": f"u{n % 4}",
            "record_id": str(n),
            "prompt": [{"role": "user", "content": f"what of {n}?"}],
            "chosen": f"tea {n}",
            "rejected": "b",
            "conversation": f"c{n // 8}",
            "signals": {"profile": f"I am {n % 4}"},
        }
        for n in range(160)
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = dataclasses.replace(
        DataConfig(),
        source="jsonl",
        path=str(path),
        prepared=str(tmp_path / "p"),
        split_by="conversation",
        num_pairs=100,
        validation_fraction=0.2,
        test_fraction=0.2,
    )
    splits = prepare(cfg, allow_sample=False).splits
    assert [sorted(u.user_id for u in users) for users in splits.values()] == [
        [f"u{n}" for n in range(4)]
    ] * 3
    talks = [
        {(u.user_id, p.conversation) for u in users for p in u.pairs} for users in splits.values()
    ]
    assert sum(map(len, talks)) == len(set.union(*talks)) == 80
    del rows[7]["conversation"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"talks.jsonl:8: field \"conversation\".*or split by user"):
        prepare(cfg, allow_sample=False)
