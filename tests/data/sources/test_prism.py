"""PRISM on a small hand-made copy of its schema: pairs, histories, context and targets, and every
kind of bad input."""

import json
import types
from pathlib import Path
from typing import Any

import pytest

from popi_jax.data.leaks import LeakFinder
from popi_jax.data.records import SPLITS, Reading, User
from popi_jax.data.sources import prism
from popi_jax.errors import UserError

Rows = dict[str, list[dict[str, Any]]]
DEFAULTS = {
    "on_bad_row": "error",
    "split_by": "user",
    "revision": "",
    "validation_fraction": 0.0,
    "test_fraction": 0.0,
    "num_shots": 6,
    "num_pairs": 8,
    "pair_mode": "best_vs_worst",
    "score_margin": 1,
    "turns": "first",
    "use_system_string": False,
}


def options(**changes: object) -> types.SimpleNamespace:
    return types.SimpleNamespace(**{**DEFAULTS, **changes})


def survey_row(user_id: str) -> dict[str, Any]:
    nothing = "Prefer not to say"
    names = (
        "values",
        "creativity",
        "fluency",
        "factuality",
        "diversity",
        "safety",
        "personalisation",
        "helpfulness",
    )
    return {
        "user_id": user_id,
        "self_description": f"I am {user_id}.",
        "system_string": "Be brief.",
        "lm_familiarity": "Very familiar",
        "lm_direct_use": "Unsure",
        "lm_indirect_use": "No",
        "lm_frequency_use": None,
        "lm_usecases": {
            "research": 1,
            "games": 0,
            "well-being_guidance": 1,
            "other": 0,
            "other_text": None,
        },
        "stated_prefs": {**dict.fromkeys((*names, "other"), 50), "other_text": None},
        "age": "25-34 years old",
        "gender": "Female",
        "employment_status": nothing,
        "education": nothing,
        "marital_status": nothing,
        "english_proficiency": "Fluent",
        "religion": {"simplified": "Jewish"},
        "ethnicity": {"simplified": nothing},
        "location": {"birth_country": "Peru", "reside_country": "United Kingdom"},
    }


def add_conversation(
    rows: Rows, number: int, user_id: str, turns: list[list[tuple[str, int]]], day: int = 1
) -> None:
    """`turns` holds the (reply, score) of each turn; the first best reply is the chosen one."""
    conversation_id = f"c{number}"
    rows["conversations"].append(
        {
            "conversation_id": conversation_id,
            "user_id": user_id,
            "generated_datetime": f"2023-12-{day:02d} 10:00:00",
            "opening_prompt": f"question {number}.0",
            "open_feedback": f"feedback {number}",
        }
    )
    for t, replies in enumerate(turns):
        best = max(range(len(replies)), key=lambda i: replies[i][1])
        for i, (reply, score) in enumerate(replies):
            row = {
                "utterance_id": f"ut{number}-{t}-{i}",
                "conversation_id": conversation_id,
                "user_id": user_id,
                "turn": t,
                "within_turn_id": i,
                "user_prompt": f"question {number}.{t}",
                "model_response": reply,
                "score": score,
                "if_chosen": i == best,
            }
            rows["utterances"].append(row)


def world(conversations: int = 4) -> Rows:
    rows: Rows = {"survey": [survey_row("user0")], "conversations": [], "utterances": []}
    for number in range(conversations):
        add_conversation(
            rows, number, "user0", [[(f"good {number}", 80), (f"bad {number}", 20)]], day=number + 1
        )
    return rows


def write(folder: Path, rows: Rows) -> Path:
    for name, items in rows.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(item) + "\n" for item in items), encoding="utf-8"
        )
    return folder


def load(folder: Path, rows: Rows, **changes: object) -> list[User]:
    return prism.load(write(folder, rows), options(**changes)).users


def error(folder: Path) -> str:
    """The message, which must be one line."""
    with pytest.raises(UserError) as caught:
        prism.load(folder, options())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pairs_of(
    folder: Path, turns: list[list[tuple[str, int]]], **changes: object
) -> list[tuple[str, str]]:
    rows = world(1)
    add_conversation(rows, 9, "user0", turns, day=20)
    (user,) = load(folder, rows, **changes)
    return [(p.chosen, p.rejected) for p in user.pairs]


def test_context_is_the_earlier_half(tmp_path: Path) -> None:
    rows = world(4)
    for row in rows.values():
        row.reverse()  # the order of rows must not matter
    (user,) = load(tmp_path, rows)
    assert [s.prompt for s in user.shots] == ["question 0.0", "question 1.0"]
    assert [c.comment for c in user.comments] == ["feedback 0", "feedback 1"]
    assert [p.prompt for p in user.pairs] == [
        [{"role": "user", "content": f"question {n}.0"}] for n in (2, 3)
    ]
    assert (user.pairs[0].chosen, user.pairs[0].rejected) == ("good 2", "bad 2")
    assert user.user_id == "prism/user0"
    assert (user.profile, user.oracle, user.readings) == ("I am user0.", "", ())


@pytest.mark.parametrize(
    ("conversations", "num_shots", "num_pairs", "expected"),
    [
        (2, 3, 4, (1, 1)),
        (5, 3, 4, (2, 3)),
        (6, 3, 4, (3, 3)),
        (6, 2, 4, (2, 4)),
        (9, 2, 4, (2, 4)),
        (6, 4, 1, (4, 1)),
    ],
)
def test_half_of_the_conversations_or_num_shots(
    tmp_path: Path, conversations: int, num_shots: int, num_pairs: int, expected: tuple[int, int]
) -> None:
    (user,) = load(tmp_path, world(conversations), num_shots=num_shots, num_pairs=num_pairs)
    assert (len(user.shots), len(user.pairs)) == expected


def test_equal_times_are_ordered_by_number(tmp_path: Path) -> None:
    rows = world(0)
    for number in (10, 9):
        add_conversation(rows, number, "user0", [[(f"a {number}", 80), (f"b {number}", 20)]])
    (user,) = load(tmp_path, rows)
    assert [s.prompt for s in user.shots] == ["question 9.0"]


def test_people_with_one_conversation_are_left_out(tmp_path: Path) -> None:
    rows = world(2)
    rows["survey"].append(survey_row("user1"))
    add_conversation(rows, 9, "user1", [[("a", 80), ("b", 20)]])
    assert [u.user_id for u in load(tmp_path, rows)] == ["prism/user0"]


REPLIES = [("a", 60), ("b", 90), ("c", 10), ("b", 20), ("EMPTY STRING", 1)]


@pytest.mark.parametrize(
    ("mode", "margin", "expected"),
    [
        ("best_vs_worst", 1, [("b", "c")]),
        ("best_vs_rest", 1, [("b", "c"), ("b", "a")]),
        ("best_vs_rest", 41, [("b", "c")]),
        ("all_pairs", 1, [("b", "c"), ("a", "c"), ("b", "a")]),
        ("all_pairs", 51, [("b", "c")]),
    ],
)
def test_pair_modes(
    tmp_path: Path, mode: str, margin: int, expected: list[tuple[str, str]]
) -> None:
    """An equal reply counts once (the first), the stand-in for an empty one never, a narrow
    difference not at all."""
    assert pairs_of(tmp_path, [REPLIES], pair_mode=mode, score_margin=margin) == expected


def test_if_chosen_never_labels(tmp_path: Path) -> None:
    rows = world(2)
    for row in rows["utterances"]:
        row["if_chosen"] = not row["if_chosen"]
    (user,) = load(tmp_path, rows)
    assert user.pairs[0].chosen == "good 1"


def test_later_turns_continue_the_chosen_reply(tmp_path: Path) -> None:
    turns = [[("a", 10), ("b", 90)], [("c", 30), ("d", 20)]]
    assert pairs_of(tmp_path, turns) == [("b", "a")]
    rows = world(1)
    add_conversation(rows, 9, "user0", turns, day=20)
    (user,) = load(tmp_path, rows, turns="all")
    assert [(p.chosen, p.rejected) for p in user.pairs] == [("b", "a"), ("c", "d")]
    assert user.pairs[1].prompt == [
        {"role": "user", "content": "question 9.0"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "question 9.1"},
    ]


def test_shots_come_from_opening_turns(tmp_path: Path) -> None:
    rows = world(1)
    add_conversation(rows, 9, "user0", [[("a", 50), ("b", 50)], [("c", 90), ("d", 10)]], day=20)
    add_conversation(rows, 10, "user0", [[("e", 90), ("f", 10)]], day=21)
    add_conversation(rows, 11, "user0", [[("g", 90), ("h", 10)]], day=22)
    (user,) = load(tmp_path, rows, turns="all")
    assert [s.prompt for s in user.shots] == ["question 0.0"]
    assert [c.comment for c in user.comments] == ["feedback 0", "feedback 9"]


def test_no_history_no_later_turn(tmp_path: Path) -> None:
    rows = world(1)
    add_conversation(rows, 9, "user0", [[("a", 10), ("b", 90)], [("c", 30), ("d", 20)]], day=20)
    for row in rows["utterances"]:
        row["if_chosen"] = False
    (user,) = load(tmp_path, rows, turns="all")
    assert [p.chosen for p in user.pairs] == ["b"]


def test_targets_take_every_conversation_before_a_second_pair_of_one(tmp_path: Path) -> None:
    rows = world(2)
    for number in (8, 9):
        turns = [[(f"best {number}", 90), (f"worst {number}", 10), (f"middle {number}", 50)]]
        add_conversation(rows, number, "user0", turns, day=number + 1)
    (user,) = load(tmp_path, rows, pair_mode="best_vs_rest", num_pairs=3)
    assert [p.rejected for p in user.pairs] == ["worst 8", "worst 9", "middle 8"]


def test_a_target_whose_prompt_was_shown_is_dropped(tmp_path: Path) -> None:
    rows = world(4)
    for row in rows["utterances"]:
        if row["conversation_id"] == "c3":
            row["user_prompt"] = " Question  1.0"  # that of a shot, but for case and white space
    (user,) = load(tmp_path, rows)
    assert [p.chosen for p in user.pairs] == ["good 2"]
    rows["conversations"][0]["open_feedback"] = "question 2.0"
    assert load(tmp_path, rows) == []


def test_a_pair_that_the_signals_hold_is_left_out(tmp_path: Path) -> None:
    rows = world(4)
    for row in rows["utterances"]:
        if row["conversation_id"] == "c3" and row["if_chosen"]:
            row["model_response"] = "Good: 1"  # that of a shot, but for signs
    loaded = prism.load(write(tmp_path, rows), options())
    assert [p.chosen for user in loaded.users for p in user.pairs] == ["good 2"]
    assert loaded.left_out == {"pair where a reply is among the signals of its user": 1}


def test_what_is_counted_and_left_out(tmp_path: Path) -> None:
    rows = world(4)
    rows["survey"] += [survey_row("user1"), survey_row("user2")]
    add_conversation(rows, 9, "user1", [[("a", 80), ("b", 20)]])
    loaded = prism.load(write(tmp_path, rows), options())
    assert loaded.counts == {"people": 3, "conversations": 5, "utterances": 10}
    assert loaded.counts.keys() == prism.SOURCE.card.counts.keys()
    few = "person with fewer than 2 conversations that hold a pair"
    assert loaded.left_out == {few: 2}


def test_every_text_tells_its_conversation(tmp_path: Path) -> None:
    (user,) = load(tmp_path, world(4))
    assert [x.conversation for x in user.shots] == ["c0", "c1"]
    assert [x.conversation for x in user.comments] == ["c0", "c1"]
    assert [x.conversation for x in user.pairs] == ["c2", "c3"]


def crowd(people: int, conversations: int, prompt: str = "") -> Rows:
    """People who all chat alike, about the same prompt if one is given."""
    rows: Rows = {"survey": [], "conversations": [], "utterances": []}
    for number in range(people):
        rows["survey"].append(survey_row(f"user{number}"))
        for k in range(conversations):
            name = conversations * number + k
            turns = [[(f"good {name}", 80), (f"bad {name}", 20)]]
            if prompt and k == conversations - 1:
                turns = [[("hello to you", 80), ("hi", 20)]]
            add_conversation(rows, name, f"user{number}", turns, day=k + 1)
            if prompt and k == conversations - 1:
                for row in rows["utterances"][-2:]:
                    row["user_prompt"] = prompt
    return rows


@pytest.mark.parametrize("split_by", ["user", "conversation"])
def test_equal_pairs_of_two_splits_stay_in_training(tmp_path: Path, split_by: str) -> None:
    changes = {"validation_fraction": 0.3, "test_fraction": 0.3, "split_by": split_by}
    users = load(tmp_path, crowd(40, 4, "Hello!"), **changes)
    splits = {split: [u for u in users if u.split == split] for split in SPLITS}
    assert all(len(found) > 3 for found in splits.values())
    greeted = {
        split: sum(p.prompt[0]["content"] == "Hello!" for u in found for p in u.pairs)
        for split, found in splits.items()
    }
    assert greeted["train"] > 1 and greeted["validation"] == greeted["test"] == 0
    finder = LeakFinder(shared_replies=False, shared_people=split_by == "conversation")
    assert [leak for user in users for leak in finder.check(user)] == []
    loaded = prism.load(tmp_path, options(**changes))
    told = "pair where the same prompt with the same replies is in another split"
    assert loaded.left_out == {told: 40 - greeted["train"]}


def test_without_training_equal_pairs_stay_in_test(tmp_path: Path) -> None:
    changes = {"validation_fraction": 0.5, "test_fraction": 0.5}
    users = load(tmp_path, crowd(20, 4, "Hello!"), **changes)
    greeted = {u.split for u in users for p in u.pairs if p.prompt[0]["content"] == "Hello!"}
    assert greeted == {"test"}


def test_conversations_of_a_person_are_dealt_to_splits(tmp_path: Path) -> None:
    rows = crowd(12, 10)
    changes = {"validation_fraction": 0.3, "test_fraction": 0.3, "num_shots": 3, "num_pairs": 4}
    users = load(tmp_path, rows, split_by="conversation", **changes)
    by_person: dict[str, list[User]] = {}
    for user in users:
        by_person.setdefault(user.user_id, []).append(user)
    assert len(by_person) == 12 and max(map(len, by_person.values())) == 3
    places: dict[str, set[str]] = {}
    for same in by_person.values():
        assert len({user.split for user in same}) == len(same)
        assert len({(user.shots, user.comments, user.profile, user.survey) for user in same}) == 1
        assert len(same[0].shots) == 3
        told = {shot.conversation for shot in same[0].shots}
        for user in same:
            assert 1 <= len(user.pairs) <= 4
            for pair in user.pairs:
                places.setdefault(pair.conversation, set()).add(user.split)
                assert pair.conversation not in told
    assert all(len(splits) == 1 for splits in places.values()) and len(places) > 60
    # where a conversation is does not depend on the others
    few = {c for c in places if int(c[1:]) < 60}
    rows = {k: [r for r in v if int(r["user_id"][4:]) < 6] for k, v in rows.items()}
    again = {
        pair.conversation: user.split
        for user in load(tmp_path, rows, split_by="conversation", **changes)
        for pair in user.pairs
    }
    assert again == {c: next(iter(places[c])) for c in few}


def test_the_path_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "survey.jsonl").write_text("")
    for name, found in (("link", "a link to nothing"), ("survey.jsonl", "a file")):
        with pytest.raises(UserError, match=f"{name}: found {found} .*allowed: a folder"):
            prism.find_folder(options(path=tmp_path / name), True)


def test_survey_tells_what_is_known(tmp_path: Path) -> None:
    (user,) = load(tmp_path, world(2))
    assert user.survey == (
        "age: 25-34 years old; gender: female; english proficiency: fluent; religion: Jewish; "
        "birth country: Peru; reside country: United Kingdom; language model familiarity: very "
        "familiar; language model indirect use: no; uses: research, well-being guidance; "
        "what matters (0-100): values 50, creativity 50, fluency 50, "
        "factuality 50, diversity 50, safety 50, personalisation 50, helpfulness 50"
    )


def test_groups_are_answers_that_say_something(tmp_path: Path) -> None:
    rows = world(4)
    (user,) = load(tmp_path, rows)
    known = {"age": "25-34 years old", "gender": "Female", "english_proficiency": "Fluent"}
    assert user.groups == known | {"religion": "Jewish"}
    assert [pair.groups for pair in user.pairs] == [{}, {}]
    rows["survey"][0]["location"]["special_region"] = "Latin America"
    for number, row in enumerate(rows["conversations"]):
        row["conversation_type"] = f"kind {number}"
    (user,) = load(tmp_path, rows)
    assert user.groups == known | {"religion": "Jewish", "region": "Latin America"}
    assert [(p.chosen, p.groups) for p in user.pairs] == [
        (f"good {n}", {"conversation_type": f"kind {n}"}) for n in (2, 3)
    ]
    assert User.from_json(user.to_json()) == user


def test_system_string_is_off_by_default(tmp_path: Path) -> None:
    (user,) = load(tmp_path, world(2), use_system_string=True)
    assert user.profile == "I am user0.\nBe brief."


def test_latents_fill_oracle_and_readings_of_the_shots(tmp_path: Path) -> None:
    readings = {
        f"c{n}": {"question": f"q{n}", "answer": f"a{n}", "contrast": f"b{n}"} for n in range(4)
    }
    latents = [{"user_id": "user0", "oracle": "terse", "stated": "brief", "readings": readings}]
    (user,) = load(tmp_path, {**world(4), "latents": latents})
    assert (user.oracle, user.stated) == ("terse", "brief")
    assert user.readings == (Reading("q0", "a0", "b0"), Reading("q1", "a1", "b1"))


def test_splits_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    rows = crowd(60, 2)
    changes = {"validation_fraction": 0.2, "test_fraction": 0.3}
    before = {u.user_id: u.split for u in load(tmp_path, rows, **changes)}
    rows["survey"] = rows["survey"][::-1][:30]
    kept = {row["user_id"] for row in rows["survey"]}
    for name in ("conversations", "utterances"):
        rows[name] = [row for row in rows[name] if row["user_id"] in kept]
    after = {u.user_id: u.split for u in load(tmp_path, rows, **changes)}
    assert after == {user_id: before[user_id] for user_id in after}
    assert set(before.values()) == {"train", "validation", "test"}


CHANGES: list[tuple[str, str, Any, list[str]]] = [
    ("survey", "user_id", None, ["found null", "a text that is not empty"]),
    ("survey", "self_description", 3, ['"self_description"', "found 3"]),
    (
        "survey",
        "stated_prefs",
        {"value": 1},
        ['no field "stated_prefs.values"', 'Did you mean "value"'],
    ),
    ("survey", "religion", "none", ['"religion"', "an object"]),
    ("conversations", "user_id", "user7", ['"user7"', "a user of survey.jsonl"]),
    ("utterances", "score", 101, ['"score"', "found 101", "1 to 100"]),
    ("utterances", "score", 0, ["found 0", "1 to 100"]),
    ("utterances", "score", None, ["found null", "1 to 100"]),
    ("utterances", "score", "80", ['found "80"', "whole number"]),
    ("utterances", "score", True, ["found true", "whole number"]),
    ("utterances", "if_chosen", 1, ['"if_chosen"', "true or false"]),
    ("utterances", "conversation_id", "c77", ['"c77"', "a conversation of conversations.jsonl"]),
    ("utterances", "user_id", "user7", ['"user7"', '"user0", the user of c0']),
    ("utterances", "user_prompt", "another", ['"user_prompt"', "question 0.0"]),
    ("utterances", "model_response", "\ud800", ["surrogate"]),
]


@pytest.mark.parametrize(("file", "field", "value", "words"), CHANGES, ids=lambda v: str(v)[:20])
def test_bad_values_are_named(
    tmp_path: Path, file: str, field: str, value: object, words: list[str]
) -> None:
    rows = world(2)
    line = 2 if file == "utterances" else 1
    rows[file][line - 1][field] = value
    message = error(write(tmp_path, rows))
    for word in [f"{file}.jsonl:{line}: ", field, *words]:
        assert word in message


def test_a_renamed_field_is_recognised(tmp_path: Path) -> None:
    rows = world(2)
    rows["utterances"][2]["scores"] = rows["utterances"][2].pop("score")
    message = error(write(tmp_path, rows))
    assert f'{tmp_path}/utterances.jsonl:3: no field "score"' in message
    assert 'Did you mean "scores"? Rename it to "score".' in message


@pytest.mark.parametrize("file", ["survey", "conversations", "utterances"])
def test_ids_occur_once(tmp_path: Path, file: str) -> None:
    rows = world(2)
    rows[file].append(rows[file][0])
    message = error(write(tmp_path, rows))
    assert (
        f"{file}.jsonl:{len(rows[file])}: " in message
        and f"first at {tmp_path}/{file}.jsonl:1" in message
    )


@pytest.mark.parametrize("file", ["survey", "conversations", "utterances"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: b"", "the file is empty"),
        (lambda raw: raw[:-20], ": the line ends in the middle of a JSON object"),
        (lambda raw: raw[:1] + b"\xff" + raw[1:], ":1: byte 2 of the line is not UTF-8"),
        (lambda raw: b"{'user_id': 1}\n" + raw, ":1: not JSON at column 2"),
        (lambda raw: b'{"a": NaN}\n' + raw, ":1: not JSON (NaN"),
        (lambda raw: b"[1]\n" + raw, ":1: found [1], allowed: one JSON object a line"),
        (lambda raw: b"[" * 100_000, ":1: not JSON"),
        (lambda raw: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, file: str, damage: Any, words: str) -> None:
    path = write(tmp_path, world(2)) / f"{file}.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    message = error(tmp_path)
    assert str(path) in message and words in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (write(tmp_path, world(2)) / "utterances.jsonl").rename(tmp_path / "utterance.jsonl")
    message = error(tmp_path)
    assert (
        f"{tmp_path}/utterances.jsonl: no such file" in message
        and 'Did you mean "utterance.jsonl"' in message
    )


def test_bad_rows_can_be_skipped_and_are_listed(tmp_path: Path) -> None:
    rows = world(6)
    rows["utterances"][-1]["score"] = 200
    rows["utterances"][0]["score"] = "high"
    loaded = prism.load(write(tmp_path, rows), options(on_bad_row="skip"))
    assert [m.split(": ")[0] for m in loaded.bad_rows] == [
        f"{tmp_path}/utterances.jsonl:{n}" for n in (1, 12)
    ]
    (user,) = loaded.users
    assert [s.prompt for s in user.shots] == ["question 1.0", "question 2.0"]
    assert [p.chosen for p in user.pairs] == ["good 3", "good 4"]
