"""PrefEval on small made files of its schema."""

import json
import types
from pathlib import Path
from typing import Any

import pytest

from popi_jax.data.sources import prefeval
from popi_jax.errors import UserError

Topics = dict[
    str, tuple[list[dict[str, Any]], list[dict[str, Any]]]
]  # topic -> rows of options, rows of chats


def options(**changes: object) -> types.SimpleNamespace:
    fields = {
        "on_bad_row": "error",
        "split_by": "user",
        "validation_fraction": 0.1,
        "test_fraction": 0.2,
        "num_pairs": 3,
    }
    return types.SimpleNamespace(**{**fields, **changes})


def world(topics: int = 1, rows: int = 2) -> Topics:
    made: Topics = {}
    for t in range(topics):
        both = [
            {"preference": f"likes {t}.{i}", "question": f"which {t}.{i}?", "explanation": "SECRET"}
            for i in range(rows)
        ]
        picks = {"classification_task_options": ["right", "wrong 1", "wrong 2", "wrong 3"]}
        chat = {str(n): {"user": f"user {n}", "assistant": f"assistant {n}"} for n in range(11)}
        made[f"topic{t}"] = (
            [{**row, **picks} for row in both],
            [{**row, "persona": "a nurse", "conversation": chat} for row in both],
        )
    return made


def write(folder: Path, topics: Topics) -> Path:
    for topic, files in topics.items():
        for kind, rows in zip(
            ("mcq_options", "implicit_preference/persona-driven"), files, strict=True
        ):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            (folder / kind / f"{topic}.json").write_text(json.dumps(rows, indent=1))
    return folder


def error(folder: Path, **changes: object) -> str:
    with pytest.raises(UserError) as caught:
        prefeval.load(folder, options(**changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_row_is_a_user(tmp_path: Path) -> None:
    user, _ = prefeval.load(write(tmp_path, world()), options()).users
    assert (user.profile, user.oracle, user.shots) == ("a nurse", "likes 0.0", ())
    assert [(c.prompt, c.comment) for c in user.comments[:2]] == [
        ("", "user 0"),
        ("assistant 0", "user 1"),
    ]
    assert (
        user.comments[-1].comment == "user 10"
    )  # turns in the order of their numbers, not of their letters
    assert {p.prompt[0]["content"] for p in user.pairs} == {"which 0.0?"}
    assert [(p.chosen, p.rejected) for p in user.pairs] == [
        ("right", f"wrong {n}") for n in (1, 2, 3)
    ]
    assert len({p.record_id for p in user.pairs}) == 3
    assert "SECRET" not in user.to_json()
    assert user.groups == {"topic": "topic0"}


def test_ids_and_splits_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    made = world(rows=40)
    before = {u.user_id: u.split for u in prefeval.load(write(tmp_path, made), options()).users}
    made["topic0"][0].reverse()
    made["topic0"][1].reverse()
    after = {u.user_id: u.split for u in prefeval.load(write(tmp_path, made), options()).users}
    assert (
        before == after
        and len(before) == 40
        and set(before.values()) == {"train", "validation", "test"}
    )


def test_rows_of_one_preference_share_the_split(tmp_path: Path) -> None:
    made = world(rows=40)
    for rows in made["topic0"]:
        for row in rows:
            row["preference"] = "likes tea"
    assert len({u.split for u in prefeval.load(write(tmp_path, made), options()).users}) == 1


def test_split_by_topic_keeps_topics_whole(tmp_path: Path) -> None:
    users = prefeval.load(write(tmp_path, world(topics=10)), options(split_by="topic")).users
    by_split: dict[str, set[str]] = {}
    for user in users:
        by_split.setdefault(user.split, set()).add(user.user_id.split("/")[1])
    assert {split: len(topics) for split, topics in by_split.items()} == {
        "train": 7,
        "validation": 1,
        "test": 2,
    }


@pytest.mark.parametrize(
    ("kind", "field", "value", "words"),
    [
        (0, "classification_task_options", ["a", "b"], 'found "2 texts", allowed: 4 texts'),
        (0, "classification_task_options", ["a", "b", "c", "a"], "the first unlike the others"),
        (0, "classification_task_options", None, "found null"),
        (0, "preference", "another", "a preference and question of mcq_options/topic0.json"),
        (1, "persona", "", "a text that is not empty"),
        (1, "conversation", {}, "at least one turn"),
        (1, "conversation", {"0": {"user": "u"}}, 'no field "conversation.0.assistant"'),
        (
            1,
            "conversation",
            {"0": {"user": "which 0.1?", "assistant": "a"}},
            "without the question",
        ),
        (1, "question", "which 0.0?", "a preference and question of"),
    ],
)
def test_bad_rows_are_named(
    tmp_path: Path, kind: int, field: str, value: object, words: str
) -> None:
    made = world()
    made["topic0"][kind][1][field] = value
    message = error(write(tmp_path, made))
    assert "topic0.json: row 2: " in message and words in message


def test_a_repeated_row_is_named(tmp_path: Path) -> None:
    made = world()
    made["topic0"][0][1] = made["topic0"][0][0]
    assert "topic0.json: row 2: " in error(write(tmp_path, made))


def test_bad_rows_can_be_skipped(tmp_path: Path) -> None:
    made = world(rows=3)
    made["topic0"][1][1]["persona"] = None
    loaded = prefeval.load(write(tmp_path, made), options(on_bad_row="skip"))
    assert len(loaded.users) == 2 and len(loaded.bad_rows) == 1 and "row 2" in loaded.bad_rows[0]
    made["topic0"][0][2][
        "classification_task_options"
    ] = []  # its chat goes with it and is not a second bad row
    loaded = prefeval.load(write(tmp_path, made), options(on_bad_row="skip"))
    assert (
        len(loaded.users) == 1 and len(loaded.bad_rows) == 2 and "mcq_options" in loaded.bad_rows[0]
    )


def test_broken_json_names_line_and_column_even_when_rows_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, world()) / "mcq_options" / "topic0.json"
    path.write_text('[\n {"preference": 1,,\n')
    assert f"{path}:2: not JSON at column 19" in error(tmp_path, on_bad_row="skip")


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "is empty"), ("{}", 'no field "preference"'), ("[]", "at least one object")],
)
def test_empty_files_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, world()) / "mcq_options" / "topic0.json"
    path.write_text(text)
    message = error(tmp_path)
    assert str(path) in message and words in message


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert "mcq_options: found no file *.json" in error(tmp_path)
    write(tmp_path, world(topics=2))
    (tmp_path / "implicit_preference/persona-driven/topic1.json").unlink()
    assert "persona-driven/topic1.json: no such file" in error(tmp_path)
