"""PrefEval on small made files of its schema."""

import copy
import io
import json
import shutil
import types
from pathlib import Path
from typing import Any

import pytest

from popi_jax.data.leaks import LeakFinder
from popi_jax.data.records import Comment
from popi_jax.data.sources import prefeval
from popi_jax.data.sources.source import FilesMissing
from popi_jax.errors import UserError

PERSONA = "implicit_preference/persona-driven"
CHOICE = "implicit_preference/choice-based"
Topics = dict[
    str, tuple[list[dict[str, Any]], list[dict[str, Any]]]
]  # topic -> rows of options, rows of chats


def options(**changes: object) -> types.SimpleNamespace:
    fields = {
        "on_bad_row": "error",
        "form": "persona",
        "split_by": "user",
        "validation_fraction": 0.1,
        "test_fraction": 0.2,
        "num_pairs": 3,
        "revision": "",
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
    with pytest.raises(UserError, match="mcq_options: found no file"):
        prefeval.list_files(tmp_path)
    (tmp_path / "mcq-options").mkdir()
    assert 'Did you mean "mcq-options"?' in error(tmp_path)
    write(tmp_path, world(topics=2))
    for topic in range(2):
        (tmp_path / PERSONA / f"topic{topic}.json").unlink()
    assert f"{tmp_path / PERSONA}: found no file *.json" in error(tmp_path)
    (tmp_path / PERSONA / "topic_0.json").write_text("[]")
    message = error(tmp_path)
    assert "mcq_options/topic0.json: no such file in" in message and "topic_0.json" in message


def test_a_topic_without_its_partner_is_told_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = world(topics=4)
    write(tmp_path, made)
    (tmp_path / "mcq_options" / "topic0 copy.json").write_text(json.dumps(made["topic0"][0]))
    (tmp_path / "mcq_options" / "._topic0.json").write_bytes(b"\x00\xff")  # of a file manager
    (tmp_path / PERSONA / "topic9.json").write_text(json.dumps(made["topic1"][1]))
    for form in ("persona", "explicit"):
        caplog.clear()
        loaded = prefeval.load(tmp_path, options(form=form, split_by="topic"))
        assert len(list(loaded.users)) == 8
        assert loaded.counts == {"topics": 4, "rows": 8}
        (told,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert "mcq_options/topic0 copy.json" in told
        assert ("topic9.json" in told) == (form == "persona")
        assert loaded.left_out == {prefeval.NO_PARTNER: 4 if form == "persona" else 2}


def write_choices(folder: Path, topics: Topics) -> Path:
    """With the third kind of file."""
    for topic, (rows, _) in topics.items():
        chats = [
            {
                **{name: row[name] for name in ("preference", "question", "explanation")},
                "implicit_query": "asked",
                "options": ["w", "x", "y", "z"],
                "aligned_op": "SECRET",
                "conversation": {
                    "query": "asked",
                    "assistant_options": "w, x, y or z",
                    "user_selection": "x",
                    "assistant_acknowledgment": "fine",
                },
            }
            for row in rows
        ]
        (folder / CHOICE).mkdir(parents=True, exist_ok=True)
        (folder / CHOICE / f"{topic}.json").write_text(json.dumps(chats))
    return write(folder, topics)


def test_forms_differ_in_their_signals_alone(tmp_path: Path) -> None:
    write_choices(tmp_path, world())
    by_form = {
        form: list(prefeval.load(tmp_path, options(form=form)).users)
        for form in prefeval.SOURCE.forms
    }
    persona, choice, explicit = (by_form[form][0] for form in ("persona", "choice", "explicit"))
    assert prefeval.SOURCE.forms[0] == "persona"
    for user in (choice, explicit):
        assert (user.user_id, user.pairs) == (persona.user_id, persona.pairs)
        assert (user.split, user.groups) == (persona.split, persona.groups)
        assert "SECRET" not in user.to_json()
    assert (choice.profile, choice.oracle) == ("", "likes 0.0")
    assert choice.comments == (Comment("", "asked"), Comment("w, x, y or z", "x"))
    assert (explicit.profile, explicit.oracle, explicit.comments) == ("likes 0.0", "", ())


def test_the_explicit_form_needs_the_options_alone(tmp_path: Path) -> None:
    write(tmp_path, world(topics=2))
    shutil.rmtree(tmp_path / "implicit_preference")
    assert len(list(prefeval.load(tmp_path, options(form="explicit")).users)) == 4
    assert "persona-driven: found no file" in error(tmp_path)
    assert "choice-based: found no file" in error(tmp_path, form="choice")


def test_a_chat_that_holds_an_option_is_left_out(tmp_path: Path) -> None:
    made = world(rows=3)
    for row in made["topic0"][1]:
        row["conversation"] = copy.deepcopy(row["conversation"])
    made["topic0"][1][0]["conversation"]["1"]["assistant"] = " WRONG: 2!"  # all of a message
    said = "a long reply that stands in the middle of another message of the chat"
    made["topic0"][0][1]["classification_task_options"][0] = said
    made["topic0"][1][1]["conversation"]["2"]["user"] = f"well, {said}, and more"
    loaded = prefeval.load(write(tmp_path, made), options())
    assert [user.oracle for user in loaded.users] == ["likes 0.2"]
    assert loaded.left_out == {prefeval.TOLD: 2} and loaded.counts["rows"] == 3


def test_a_preference_said_in_the_chat_is_no_oracle(tmp_path: Path) -> None:
    made = world(rows=2)
    for rows in made["topic0"]:
        rows[0]["preference"] = "I never eat meat."
    chat = copy.deepcopy(made["topic0"][1][0]["conversation"])
    chat["1"]["user"] = "Oh, I never eat meat, you know"
    made["topic0"][1][0]["conversation"] = chat
    users = list(prefeval.load(write(tmp_path, made), options()).users)
    assert [user.oracle for user in users] == ["", "likes 0.1"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"user_selection": None}, 'field "conversation.user_selection"'),
        ({"assistant_options": "which 0.0?"}, "without the question"),
        ({"query": 7}, "found 7"),
    ],
)
def test_bad_choices_are_named(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = write_choices(tmp_path, world()) / CHOICE / "topic0.json"
    rows = json.loads(path.read_text())
    rows[0]["conversation"] |= change
    path.write_text(json.dumps(rows))
    message = error(tmp_path, form="choice")
    assert message.startswith(f"{path}: row 1: ") and words in message


def test_the_whole_repository_may_be_the_path(tmp_path: Path) -> None:
    home = tmp_path / "benchmark_dataset"
    write_choices(home, world(topics=2))
    (home / "filtered_inter_turns.json").write_text("{")
    (home / "rag_retrieval").mkdir()
    (home / "rag_retrieval" / "topic0.json").write_text("[,]")
    (home / "explicit_preference").mkdir()
    (home / "explicit_preference" / "topic0.json").write_text("[]")
    for path in (tmp_path, home):
        assert prefeval.find_folder(options(path=str(path)), False) == path
        assert {p.parent.name for p in prefeval.list_files(path)} == {
            *("mcq_options", "persona-driven", "choice-based", "explicit_preference")
        }
        for form in prefeval.SOURCE.forms:
            assert len(list(prefeval.load(path, options(form=form)).users)) == 4


def test_files_are_downloaded_at_one_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, asked = tmp_path / "site", list[str]()
    made = world(topics=1)
    monkeypatch.setattr(prefeval, "TOPICS", ("topic0",))
    write_choices(site, made)

    def urlopen(url: str, timeout: float) -> Any:
        asked.append(url)
        path = site / url.split("/benchmark_dataset/")[1]
        response = io.BytesIO(path.read_bytes())
        response.headers = {}  # type: ignore[attr-defined]
        return response

    monkeypatch.setattr(prefeval.download.urllib.request, "urlopen", urlopen)
    cfg = options(path=str(tmp_path / "to"), revision="")
    with pytest.raises(FilesMissing, match="data.download is False"):
        prefeval.find_folder(cfg, False)
    folder = prefeval.find_folder(cfg, True)
    assert len(asked) == 3 and len(prefeval.REVISION) == 40
    assert all(prefeval.REVISION in url for url in asked)
    assert len(list(prefeval.load(folder, cfg).users)) == 2
    assert prefeval.find_folder(cfg, True) == folder and len(asked) == 3
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="found no file"):
        prefeval.find_folder(options(path=str(tmp_path / "other"), revision=""), True)


REAL = Path(__file__).parents[4] / "shared" / "data" / "prefeval"


@pytest.mark.skipif(not REAL.is_dir(), reason="no copy of the published files")
@pytest.mark.parametrize(
    ("form", "left_out", "oracles"), [("persona", 0, 736), ("choice", 11, 790), ("explicit", 0, 0)]
)
def test_the_published_files(form: str, left_out: int, oracles: int) -> None:
    loaded = prefeval.load(REAL, options(form=form, split_by="topic"))
    users = list(loaded.users)
    assert loaded.counts == {"topics": 16, "rows": 801} and not loaded.bad_rows
    assert loaded.left_out == ({prefeval.TOLD: left_out} if left_out else {})
    assert len(users) == 801 - left_out and sum(bool(u.oracle) for u in users) == oracles
    assert {len(user.pairs) for user in users} == {3}
    finder = LeakFinder(shared_replies=False, shared_people=False)
    assert not [leak for user in users for leak in finder.check(user)]
