"""PersonaMem on small made files of its three schemas."""

import csv
import json
import types
from pathlib import Path
from typing import Any

import pytest

from popi_jax.data.leaks import LeakFinder
from popi_jax.data.records import Comment, User
from popi_jax.data.sources import personamem
from popi_jax.data.sources.source import FilesMissing, Loaded
from popi_jax.errors import UserError

CHAT = [
    {"role": "system", "content": "Current user persona: Name: Ann. A nurse."},
    {"role": "user", "content": "User: I like tea."},
    {"role": "assistant", "content": "Assistant: Good."},
    {"role": "user", "content": "User: But no longer green tea; User: as they say."},
    {"role": "system", "content": "Current user persona: Name: Ann. A nurse."},
    {"role": "user", "content": "User: I moved."},
]
QUESTION: dict[str, Any] = {
    "persona_id": "0",
    "question_id": "q0",
    "question_type": "recall",
    "topic": "food",
    "context_length_in_tokens": "9",
    "user_question_or_message": "What do I drink,\nthese days?",
    "correct_answer": "(b)",
    "all_options": str(["(a) coffee, it's 'fine'", '(b) black "tea"', "(c) water", "(d) milk"]),
    "shared_context_id": "c0",
    "end_index_in_shared_context": "4",
}


def options(**changes: object) -> types.SimpleNamespace:
    fields = {
        "on_bad_row": "error",
        "form": "v1",
        "validation_fraction": 0.2,
        "test_fraction": 0.2,
        "num_pairs": 8,
        "revision": "",
    }
    return types.SimpleNamespace(**{**fields, **changes})


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_v1(folder: Path, questions: list[dict[str, Any]], contexts: dict[str, Any]) -> Path:
    write_csv(folder / "questions_32k.csv", questions)
    lines = (json.dumps({name: chat}) for name, chat in contexts.items())
    (folder / "shared_contexts_32k.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def read(folder: Path, **changes: object) -> tuple[list[User], Loaded]:
    loaded = personamem.load(folder, options(**changes))
    return list(loaded.users), loaded


def error(folder: Path, **changes: object) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_v1_a_question_gives_a_pair_for_each_other_option(tmp_path: Path) -> None:
    (user,), loaded = read(write_v1(tmp_path, [QUESTION], {"c0": CHAT, "not asked for": []}))
    assert user.comments == (  # what is said behind the question is no signal
        Comment("", "I like tea."),
        Comment("Good.", "But no longer green tea; User: as they say."),
    )
    assert (user.profile, user.survey, user.shots) == ("", "", ())
    assert user.oracle == "Name: Ann. A nurse." and user.user_id == "personamem/v1/0#c0.4"
    assert {p.chosen for p in user.pairs} == {'black "tea"'}
    assert [p.rejected for p in user.pairs] == ["coffee, it's 'fine'", "water", "milk"]
    assert [p.record_id for p in user.pairs] == ["q0/1", "q0/2", "q0/3"]
    assert user.pairs[0].prompt == [{"role": "user", "content": "What do I drink,\nthese days?"}]
    assert user.pairs[0].groups == {"topic": "food", "question_type": "recall"}
    assert loaded.counts == {"questions": 1, "personas": 1, "contexts": 1}
    assert not loaded.left_out and not loaded.bad_rows


def test_v1_users_are_personas_with_a_context_and_splits_are_of_personas(tmp_path: Path) -> None:
    questions = [
        {
            **QUESTION,
            "persona_id": str(n % 5),
            "question_id": f"q{n}",
            "shared_context_id": f"c{n % 10}",
            "end_index_in_shared_context": str(4 + n // 10 % 2),
        }
        for n in range(40)
    ]
    users, loaded = read(write_v1(tmp_path, questions, {f"c{n}": CHAT for n in range(10)}))
    assert len(users) == 20 and len({user.user_id for user in users}) == 20
    assert loaded.counts == {"questions": 40, "personas": 5, "contexts": 10}
    split_by_persona: dict[str, set[str]] = {}
    for user in users:
        split_by_persona.setdefault(user.user_id.split("#")[0], set()).add(user.split)
        assert [p.record_id.split("/")[1] for p in user.pairs] == ["1", "1", "2", "2", "3", "3"]
    assert len(split_by_persona) == 5 and all(len(s) == 1 for s in split_by_persona.values())
    splits = sorted(split for (split,) in split_by_persona.values())
    assert splits == ["test", "train", "train", "train", "validation"]
    assert all(len(user.pairs) == 2 for user in read(tmp_path, num_pairs=2)[0])
    finder = LeakFinder(shared_replies=False, shared_people=False)
    told = {leak.kind for user in users for leak in finder.check(user)}
    assert told == {"split"}  # made: all personas have equal questions


def test_v1_ends_are_those_of_a_slice(tmp_path: Path) -> None:
    for end, count in (("-1", 2), ("99", 3), ("2", 1)):
        made = {**QUESTION, "end_index_in_shared_context": end}
        (user,), _ = read(write_v1(tmp_path, [made], {"c0": CHAT}))
        assert len(user.comments) == count
    made = {**QUESTION, "end_index_in_shared_context": "0"}
    users, loaded = read(write_v1(tmp_path, [made], {"c0": CHAT}))
    assert not users and loaded.left_out == {personamem.SILENT: 1}


def test_v1_what_is_told_is_left_out(tmp_path: Path) -> None:
    said = [*CHAT[:2], {"role": "assistant", "content": "Assistant: WATER!"}, *CHAT[3:]]
    users, loaded = read(write_v1(tmp_path, [QUESTION], {"c0": said}))
    assert not users and loaded.left_out == {personamem.TOLD: 1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"correct_answer": "(e)"}, r"allowed: one of \(a\), \(b\), \(c\), \(d\)"),
        ({"all_options": "['(a) x', '(b) x']"}, "a correct option unlike the others"),
        ({"all_options": "['(a) x']"}, "at least 2 texts"),
        ({"all_options": "['x', '(b) y']"}, "texts that begin with"),
        ({"all_options": "['(b) x', '(b) y']"}, "texts that begin with"),
        ({"all_options": "__import__('os')"}, "as JSON or Python writes it"),
        ({"all_options": '["(a) \\ud800", "(b) y"]'}, "Unicode"),
        ({"end_index_in_shared_context": "4.5"}, "a whole number"),
        ({"user_question_or_message": " "}, "user_question_or_message"),
        ({"shared_context_id": "c9"}, "an id in .*shared_contexts_32k.jsonl"),
        ({"question_id": "first"}, "occurs once"),
    ],
)
def test_v1_bad_questions_are_named_by_line(
    tmp_path: Path, change: dict[str, str], words: str
) -> None:
    rows = [{**QUESTION, "question_id": "first"}, {**QUESTION, **change}]
    write_v1(tmp_path, rows, {"c0": CHAT})
    path = tmp_path / "questions_32k.csv"
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(f"{path}:4: ")  # a question has two lines
    users, loaded = read(tmp_path, on_bad_row="skip")
    assert len(users) == 1 and len(loaded.bad_rows) == 1


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ([{"role": "bot", "content": "x"}], 'field "c0.0..role": found "bot"'),
        ([{"role": "user"}], 'no field "c0.0..content"'),
        ("text", "a list of objects"),
    ],
)
def test_v1_bad_contexts_are_named(tmp_path: Path, chat: object, words: str) -> None:
    write_v1(tmp_path, [QUESTION], {"other": CHAT, "c0": chat})
    message = error(tmp_path)
    place = f"{tmp_path / 'shared_contexts_32k.jsonl'}:2: "
    assert message.startswith(place)
    with pytest.raises(UserError, match=words):
        read(tmp_path)


def test_csv_faults_are_named(tmp_path: Path) -> None:
    write_v1(tmp_path, [QUESTION], {"c0": CHAT})
    path = tmp_path / "questions_32k.csv"
    whole = path.read_text()
    path.write_text(f"{whole}1,2,3\n")
    assert f"{path}:4: found 3 cells, allowed: 10, as in line 1" in error(tmp_path)
    path.write_text(whole[:-40])  # in the middle of a quoted cell
    assert f"{path}:" in error(tmp_path)
    path.write_bytes(whole.encode() + b"\xff\n")
    assert f"{path}: not UTF-8 behind line" in error(tmp_path)
    path.write_text(whole.replace("topic", "question_type"))
    assert 'the column "question_type" is given twice' in error(tmp_path)
    path.write_text("﻿" + whole.replace("\n", "\r\n"), encoding="utf-8")
    assert len(read(tmp_path)[0]) == 1
    path.write_text(whole.split("\n", 1)[0] + "\n")
    assert "the file is empty" in error(tmp_path)


def write_v2(folder: Path, **changes: object) -> Path:
    link = "data/chat_history_32k/chat_persona7.json"
    row: dict[str, Any] = {
        "persona_id": "7",
        "chat_history_32k_link": link,
        "user_query": str({"role": "user", "content": "What's new?"}),
        "correct_answer": "a walk",
        "incorrect_answers": json.dumps(["a run", "a swim", "a run"]),
        "topic_query": "Health",
        "pref_type": "neutral_pref",
        "preference": "SECRET",
    }
    write_csv(folder / "benchmark/text/benchmark.csv", [{**row, **changes}])
    history = {"metadata": {"persona_id": 7}, "chat_history": CHAT}
    (folder / link).parent.mkdir(parents=True, exist_ok=True)
    (folder / link).write_text(json.dumps(history, indent=2))
    return folder


def test_v2_takes_the_whole_chat(tmp_path: Path) -> None:
    (user,), loaded = read(write_v2(tmp_path), form="v2")
    assert [c.comment for c in user.comments][::2] == ["User: I like tea.", "User: I moved."]
    assert [(p.chosen, p.rejected) for p in user.pairs] == [
        ("a walk", "a run"),
        ("a walk", "a swim"),
    ]
    assert user.oracle == "" and "SECRET" not in user.to_json() and "Ann" not in user.to_json()
    assert user.pairs[0].groups == {"topic": "Health", "question_type": "neutral_pref"}
    assert loaded.counts == {"questions": 1, "personas": 1, "contexts": 1}
    for change, words in (
        ({"chat_history_32k_link": "../other.json"}, "a file of data/chat_history_32k/"),
        ({"chat_history_32k_link": "data/chat_history_32k/no.json"}, "no such file"),
        ({"user_query": "what"}, "as JSON or Python writes it"),
        ({"incorrect_answers": "['a walk']"}, "unlike the others"),
        ({"incorrect_answers": "['', 'b']"}, r"incorrect_answers\[0\]"),
    ):
        with pytest.raises(UserError, match=words):
            read(write_v2(tmp_path, **change), form="v2")
    chat = write_v2(tmp_path) / "data/chat_history_32k/chat_persona7.json"
    chat.write_text('{"chat_history": [')
    assert "not JSON" in error(tmp_path, form="v2")


def write_v3(folder: Path, **changes: object) -> Path:
    event: dict[str, Any] = {
        "source_object_id": "1",
        "source_timestamp": 1000,
        "conversation": [
            {"role": "user", "content": "date night ideas?", "embeds_pref_idx": [1]},
            {"role": "assistant", "content": "soup"},
            {"role": "user", "content": "cozy ones"},
        ],
        "preferences": [{"persona_item": "SECRET"}],
    }
    later = {**event, "source_timestamp": 3000, "conversation": [{**event["conversation"][0]}]}
    silent = {**event, "source_timestamp": 1500, "conversation": None}
    query: dict[str, Any] = {
        "query_id": "8:0001:aaa",
        "task_type": "chatbot_personalized_response",
        "ts": 2000,
        "user_query": "what should i cook",
        "prior_conversation": None,
        "example_response": "pepper stew",
        "inferior_response": {"text": "a steak", "flaw_kind": "SECRET"},
        "groundtruth_preference": "SECRET",
        "instance_full": {"prior_conversation": []},
    }
    rows = [
        query | changes,
        query | {"query_id": "2", "task_type": "personalized_recommendation"},
        query | {"query_id": "3", "inferior_response": None},
        query | {"query_id": "4", "user_query": None},
        query | {"query_id": "5", "example_response": {"ranked": [1]}, "inferior_response": ""},
        query | {"query_id": "6", "ts": 500},
        query | {"query_id": "7", "ts": 3001},
    ]
    for persona in ("8", "26"):
        home = folder / "backend" / persona
        home.mkdir(parents=True, exist_ok=True)
        (home / "test.json").write_text(json.dumps(rows))
        (home / "chatbot.json").write_text(json.dumps([later, event, silent]))
        (home / "profile.json").write_text("{")  # never read
    return folder


def test_v3_only_chats_before_the_query_are_signals(tmp_path: Path) -> None:
    before = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    write_v3(tmp_path, instance_full={"prior_conversation": before})
    users, loaded = read(tmp_path, form="v3")
    by_id = {user.user_id: user for user in users}
    assert {i.split("/")[2] for i in by_id} == {"8#2000", "8#3001", "26#2000", "26#3001"}
    user = by_id["personamem/v3/8#2000"]
    assert user.comments == (Comment("", "date night ideas?"), Comment("soup", "cozy ones"))
    (pair,) = user.pairs
    assert pair.prompt == [*before, {"role": "user", "content": "what should i cook"}]
    assert (pair.chosen, pair.rejected) == ("pepper stew", "a steak")
    assert pair.groups == {"question_type": "chatbot_personalized_response"}
    late = by_id["personamem/v3/8#3001"].comments
    assert late == (*user.comments, Comment("", "date night ideas?"))  # another chat
    assert "SECRET" not in "".join(u.to_json() for u in users) and user.oracle == ""
    assert loaded.counts == {"personas": 2, "questions": 14}
    assert loaded.left_out == {
        personamem.SILENT: 2,
        "query of a task that is no chat": 4,
        "query without a pair of replies": 4,
    }
    assert len({u.split for u in users if "/8#" in u.user_id}) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inferior_response": "pepper stew "}, 'a text other than "example_response"'),
        ({"ts": "2000"}, 'field "ts"'),
        ({"ts": 2000.5}, 'field "ts"'),
        ({"user_query": 7}, 'field "user_query"'),
        ({"instance_full": {"prior_conversation": ["x"]}}, "instance_full.prior_conversation"),
    ],
)
def test_v3_bad_queries_are_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    write_v3(tmp_path, **change)
    message = error(tmp_path, form="v3")
    assert "test.json: row 1: " in message and words in message
    users, loaded = read(tmp_path, form="v3", on_bad_row="skip")
    assert len(users) == 2 and len(loaded.bad_rows) == 2


def test_files_of_all_forms_are_found_and_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def download_hub(folder: Path, *arguments: Any) -> None:
        asked.append(arguments)
        write_v1(folder, [QUESTION], {"c0": CHAT})

    monkeypatch.setattr(personamem.download, "download_hub", download_hub)
    home = tmp_path / "to"
    home.mkdir()
    cfg = options(path=str(home), form="")
    with pytest.raises(FilesMissing, match="questions_32k.csv and shared_contexts_32k.jsonl"):
        personamem.find_folder(cfg, False)
    assert personamem.find_folder(cfg, True) == home
    (place,) = asked
    assert place[0] == "bowen-upenn/PersonaMem-v1" and len(place[1]) == 40
    assert personamem.find_folder(cfg, True) == home and len(asked) == 1
    with pytest.raises(FilesMissing, match="PersonaMem-v3"):
        personamem.find_folder(options(path=str(home), form="v3"), False)
    write_v2(write_v3(home))
    names = [path.name for path in personamem.list_files(home)]
    assert len(names) == 8 and "profile.json" not in names
    with pytest.raises(UserError, match="found no backend"):
        read(tmp_path, form="v3")
