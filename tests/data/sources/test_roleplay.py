"""Roleplay on made files in the publisher's format; test_elix.py has what it shares with ELIX."""

import json
from collections import Counter
from pathlib import Path

import pytest

from popi_jax.data import blocks, prepared
from tests.data.sources import fspo_files
from tests.data.sources.fspo_files import load, make_options, make_roleplay, refuse, write_published


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("roleplay") / "raw"
    return write_published(path, make_roleplay(30, 40), make_roleplay(30, 18, first=40))


def test_a_persona_is_a_person(folder: Path) -> None:
    users, loaded = load("roleplay", folder, form="")
    assert loaded.counts == {"rows": 30 * 58, "people": 30} and loaded.bad_rows == []
    test = [user for user in users if user.split == "test"]
    assert len(test) == 30 * 2  # 18 rows are two blocks of 8 + 1
    assert Counter(user.user_id.split("#")[0] for user in test) == {
        f"roleplay/{n}": 2 for n in range(30)
    }
    for user in users:
        number = user.user_id.split("#")[0].removeprefix("roleplay/")
        assert user.oracle == f"Person {number} keeps bees and dislikes long words."
        assert (len(user.shots), len(user.pairs), user.groups) == (8, 1, {})
        assert all(shot.chosen.endswith(f"good , says {number}") for shot in user.shots)
        assert user.pairs[0].rejected.endswith(f"dull , says {number}")


def test_one_block_a_person_when_there_are_no_passes(folder: Path) -> None:
    users, loaded = load("roleplay", folder, form="", passes=0, num_pairs=5)
    test = [user for user in users if user.split == "test"]
    assert len(test) == 30 and all(user.user_id.endswith("#test") for user in test)
    assert {(len(user.shots), len(user.pairs)) for user in test} == {(8, 5)}
    used = sum(len(user.shots) + len(user.pairs) for user in users)
    assert used + sum(loaded.left_out.values()) == 30 * 58
    assert loaded.left_out[blocks.TOO_MANY] >= 30 * 5


def test_whole_people_are_held_out_when_that_is_asked_for(folder: Path) -> None:
    users, _ = load("roleplay", folder, form="", split_by="user", test_fraction=0.3)
    people = [
        {user.oracle for user in users if user.split == split}
        for split in ("train", "validation", "test")
    ]
    assert all(people) and sum(map(len, people)) == len(set.union(*people)) == 30


def test_a_persona_may_be_a_text_an_object_or_its_json(tmp_path: Path) -> None:
    rows = make_roleplay(3, 20)
    text = [row["score_persona"]["persona_description"] for row in rows]
    for n, row in enumerate(rows):
        persona = row["score_persona"]
        row["score_persona"] = (text[n], persona, json.dumps(persona))[n % 3]
        row["level"] = f"persona {row['level']}"
    fspo_files.write_jsonl(tmp_path / "mine.jsonl", rows)
    options = {"form": "", "split_by": "target", "validation_fraction": 0.0, "test_fraction": 0.0}
    users, _ = load("roleplay", tmp_path / "mine.jsonl", **options)
    assert {user.oracle for user in users} == set(text) and len(users) == 6
    assert users[0].user_id.startswith("roleplay/persona ")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("score_persona", "another", 'found "another", allowed: the persona of level "0" at '),
        ("score_persona", None, 'field "score_persona": found null'),
        ("score_persona", {"name": "n"}, 'no field "score_persona.persona_description"'),
        ("score_persona", "{'persona_description': 'x'}", "also as JSON"),
        ("level", None, 'field "level": found null'),
        ("level", True, 'field "level": found true'),
        ("yl", "day 3 was good , says 0", 'allowed: a text other than "yw"'),
        ("x", ["how"], 'field "x": found ["how"]'),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, field: str, value: object, words: str) -> None:
    rows = make_roleplay(1, 20)
    rows[3][field] = value
    fspo_files.write_jsonl(tmp_path / "roleplay.train.jsonl", rows)
    fspo_files.write_jsonl(tmp_path / "roleplay.test.jsonl", make_roleplay(1, 9, first=20))
    told = refuse("roleplay", tmp_path, form="")
    assert "roleplay.train.jsonl:4: " in told and words in told
    _, loaded = load("roleplay", tmp_path, form="", on_bad_row="skip")
    assert loaded.bad_rows == [told]


def test_prepared_users_leak_nothing(folder: Path) -> None:
    dataset = prepared.prepare(make_options("roleplay", folder), allow_sample=False)
    assert dataset.stats["leaks"] == {} and dataset.stats["counts"]["people"] == 30
    assert all(dataset.stats[split]["users"] for split in ("train", "validation", "test"))
