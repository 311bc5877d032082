"""Each way in which a held-out pair can be given away, and what is no leak."""

import dataclasses
import json
from pathlib import Path

import pytest

from popi_jax.config_data import DataConfig
from popi_jax.data import prepared
from popi_jax.data.leaks import Leak, LeakFinder, fold, leave_out
from popi_jax.data.records import Comment, Pair, Shot, User
from popi_jax.errors import UserError
from tests.data.people import write_users

LONG = "Boil fresh water, warm the pot, and let the leaves stand for exactly four minutes."


def pair(number: int = 0, **changes: object) -> Pair:
    prompt = [{"role": "user", "content": f"How is tea made, number {number}?"}]
    own = Pair(f"p{number}", prompt, f"Slowly, with care {number}.", f"In a hurry {number}.")
    return dataclasses.replace(own, **changes)


def user(name: str = "ann", **changes: object) -> User:
    own = User(
        user_id=name,
        profile="I grow roses.",
        survey="age: 40",
        shots=(Shot("What is rust?", "Iron and oxygen.", "No idea."),),
        comments=(Comment("Say hello", "Hello, but shorter!"),),
        pairs=(pair(0), pair(1)),
        oracle="likes short replies",
    )
    return dataclasses.replace(own, **changes)


def look(*users: User, shared_replies: bool = False, shared_people: bool = False) -> list[Leak]:
    finder = LeakFinder(shared_replies=shared_replies, shared_people=shared_people)
    return [leak for user in users for leak in finder.check(user)]


def test_folding() -> None:
    assert fold("So,  TEA?\n") == "sotea" == fold("so tea")
    assert fold("Zürich — “ruhig”\u00a0") == "zürichruhig" and fold("STRASSE") == fold("straße")
    assert fold(" ?! ") == "?!" and fold("🙂") == "🙂"


def test_what_does_not_leak() -> None:
    assert look(user(), user("bob", pairs=(pair(2),), split="test")) == []


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"shots": (Shot("how is tea made -- number 0", "a", "b"),)}, "prompt"),
        ({"comments": (Comment("", "HOW IS TEA MADE, NUMBER 0"),)}, "prompt"),
        ({"shots": (Shot("x", "slowly with care 0", "b"),)}, "reply"),
        ({"shots": (Shot("x", "a", "In a hurry 0"),)}, "reply"),
        ({"comments": (Comment("Slowly, with care 0", "thanks"),)}, "reply"),
        ({"shots": (Shot("x", "a", "b", conversation="c7"),)}, "conversation"),
    ],
)
def test_a_pair_among_its_own_signals(changes: dict[str, object], kind: str) -> None:
    ann = user(**changes, pairs=(pair(0, conversation="c7"), pair(1)))
    leaks = look(ann)
    assert leaks == [Leak(kind, "ann", "p0")]
    assert [p.record_id for p in leave_out(ann, leaks).pairs] == ["p1"]


def test_a_long_reply_inside_the_profile_and_a_short_one() -> None:
    told = user(profile=f"My mother says: {LONG.upper()} So do I.", pairs=(pair(0, chosen=LONG),))
    assert [leak.kind for leak in look(told)] == ["reply"]
    assert look(user(profile="I say yes to tea.", pairs=(pair(0, chosen="yes"),))) == []


def test_the_persona_in_the_signals() -> None:
    ann = user(survey="says: LIKES short, replies")
    assert look(ann) == [Leak("oracle", "ann", "")]
    assert leave_out(ann, look(ann)).pairs == ()
    assert look(user(oracle="tea", survey="tea")) == []  # too short to tell anything


def test_two_splits() -> None:
    same = {"pairs": (pair(0, record_id="q", chosen="slowly with care 0"),), "split": "test"}
    assert look(user(), user("bob", **same)) == [Leak("split", "bob", "q", "ann")]
    assert look(user(), user("bob", **same), shared_replies=True) == []
    assert look(user(), user("bob", **same | {"split": "train"})) == []
    again = user(pairs=(pair(2),), split="test")
    assert look(user(), again) == [Leak("person", "ann", "", "ann")]
    assert look(user(), again, shared_people=True) == []
    draw = user("ann#2", pairs=(pair(2),), split="test")
    assert look(user(), draw) == [Leak("person", "ann#2", "", "ann")]
    talk = [
        user(pairs=(pair(n, conversation="c1"),), split=s) for n, s in ((0, "train"), (2, "test"))
    ]
    assert look(*talk, shared_people=True) == [Leak("conversation", "ann", "p2", "ann")]


def test_duplicates_within_a_split_are_counted() -> None:
    finder = LeakFinder(shared_replies=False, shared_people=False)
    assert not finder.check(user()) and not finder.check(user("bob"))
    assert finder.duplicates == {"train": 2}


@pytest.fixture
def leaking(tmp_path: Path) -> DataConfig:
    """Own data of 40 people in two files; one pair of a test user is also a training user's."""
    users = [
        user(f"u{i}", pairs=(pair(2 * i), pair(2 * i + 1)), oracle=f"likes number {i}")
        for i in range(40)
    ]
    users[39] = dataclasses.replace(
        users[39], pairs=(dataclasses.replace(pair(0), record_id="twice"), users[39].pairs[1])
    )
    folder = tmp_path / "raw"
    folder.mkdir()
    for name, own in (("train", users[:30]), ("validation", users[30:35]), ("test", users[35:])):
        write_users(own, folder / f"{name}.jsonl")
    return dataclasses.replace(
        DataConfig(), source="jsonl", path=str(folder), prepared=str(tmp_path / "prepared")
    )


def test_preparing_fails_with_the_ids(leaking: DataConfig, tmp_path: Path) -> None:
    told = (
        r"1 where the same prompt .* in another split \(u39: twice \(also of u0\)\).*on_leak=skip"
    )
    with pytest.raises(UserError, match=told):
        prepared.prepare(leaking, allow_sample=False)
    assert not list((tmp_path / "prepared").rglob("stats.json"))


def test_preparing_without_them(leaking: DataConfig) -> None:
    dataset = prepared.prepare(dataclasses.replace(leaking, on_leak="skip"), allow_sample=False)
    assert dataset.stats["leaks"] == {"split": 1} and dataset.stats["test"]["pairs"] == 9
    (row,) = (dataset.prepared / "leaks.jsonl").read_text().splitlines()
    assert json.loads(row) == dict(zip(Leak._fields, ("split", "u39", "twice", "u0"), strict=True))
    assert [p.record_id for p in dataset.splits["test"][-1].pairs] == ["p79"]
