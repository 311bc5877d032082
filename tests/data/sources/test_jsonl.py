"""Own data: grouping, splits, every rule of the format, and writing what was read."""

import copy
import json
import types
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

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
