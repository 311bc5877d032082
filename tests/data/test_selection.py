import dataclasses

import numpy as np
import pytest

from popi_jax.data.records import Comment, Reading, Shot, User
from popi_jax.data.selection import draw_signals, keep_signals, select_signals, select_splits
from popi_jax.errors import UserError
from tests.data.people import make_config

SHOTS = tuple(Shot(f"p{i}", f"c{i}", f"r{i}") for i in range(3))
COMMENTS = (Comment("p", "old"), Comment("p", "new"))
USERS = [
    User("a", "profile of a", "survey of a", SHOTS, COMMENTS, (), oracle="truth"),
    User("b", "", "survey of b", SHOTS[:1], (), ()),
]


def test_kinds_and_counts():
    first, second = select_signals(USERS, "profile+shots:2")
    assert (first.profile, first.survey, first.shots, first.comments) == (
        "profile of a",
        "",
        SHOTS[1:],
        (),
    )
    assert (second.profile, second.survey, second.shots) == ("", "", SHOTS[:1])
    assert (first.user_id, first.pairs, first.oracle) == ("a", (), "truth")
    assert select_signals(USERS, "all") == USERS
    assert select_signals(USERS, "comments:1")[0].comments == COMMENTS[1:]


@pytest.mark.parametrize(
    ("selection", "told"),
    [
        ("shot", 'unknown kind "shot".*Did you mean "shots"'),
        ("shots:0", "must be like shots:2"),
        ("profile:1", "must be like shots:2"),
        ("shots:x", "must be like shots:2"),
        ("", 'unknown kind ""'),
    ],
)
def test_what_is_unknown_is_told(selection, told):
    with pytest.raises(UserError, match=told):
        select_signals(USERS, selection)


def test_a_kind_that_no_user_has_names_those_that_are_there():
    with pytest.raises(UserError, match="no user of these data has comments; .* survey, shots$"):
        select_signals(USERS[1:], "survey+comments")


READER = dataclasses.replace(
    USERS[0], stated="bees", readings=tuple(Reading(f"q{i}", f"a{i}", "") for i in range(3))
)


def test_exercises_stay_with_their_past_pairs():
    newest = keep_signals(READER, "profile+shots:2")
    assert [r.question for r in newest.readings] == ["q1", "q2"]
    assert newest.stated == ""  # the survey, which may state it, is not shown
    assert keep_signals(READER, "profile+survey").readings == ()
    assert keep_signals(READER, "profile+survey").stated == "bees"
    odd = dataclasses.replace(READER, readings=READER.readings[:2])
    assert keep_signals(odd, "shots:2").readings == ()
    assert keep_signals(READER, "all") is READER


def test_a_run_reads_the_selected_signals_of_each_user_when_it_is_asked_for():
    class Counted(list):
        read = 0

        def __getitem__(self, index):
            Counted.read += 1
            return super().__getitem__(index)

    splits = {"train": Counted(USERS * 1000), "test": USERS[1:]}
    assert select_splits(splits, "all")["train"] is splits["train"]
    found = select_splits(splits, "shots:1")
    assert Counted.read < 1000
    assert len(found["train"]) == 2000 and found["train"][-2].shots == SHOTS[2:]
    assert found["train"][-2].profile == "" and len(found["train"][:3]) == 3
    assert found["test"][0].survey == ""
    assert select_splits({"train": [], "test": []}, "shots")["train"][:] == []
    with pytest.raises(UserError, match="no user of these data has comments"):
        select_splits({"train": USERS[1:]}, "comments")


def test_draws_are_parts_in_order_and_all_numbers_come():
    seen, orders = set(), set()
    for seed in range(300):
        drawn = draw_signals(READER, np.random.default_rng(seed))
        assert drawn == draw_signals(READER, np.random.default_rng(seed))
        kept = [SHOTS.index(s) for s in drawn.shots]
        assert kept == sorted(set(kept))
        assert [r.question for r in drawn.readings] == [f"q{k}" for k in kept]
        assert {*drawn.comments} <= {*COMMENTS} and drawn.profile == READER.profile
        seen.add((len(drawn.shots), len(drawn.comments)))
        orders.add(tuple(kept))
    assert seen == {(n, m) for n in range(4) for m in range(3)} and len(orders) == 8
    bare = dataclasses.replace(READER, profile="", survey="", comments=())
    found = [len(draw_signals(bare, np.random.default_rng(seed)).shots) for seed in range(100)]
    assert {*found} == {1, 2, 3}  # never nothing
    nothing = dataclasses.replace(bare, shots=())
    assert draw_signals(nothing, np.random.default_rng(0)).shots == ()


@pytest.mark.parametrize(
    ("selection", "told"),
    [
        ("profil", r'^config.data.signals = "profil": unknown kind "profil".*mean "profile"'),
        ("none", 'unknown kind "none"'),
        ("shots:", "must be like shots:2"),
    ],
)
def test_the_setting_is_checked_with_the_configuration(selection, told):
    with pytest.raises(UserError, match=told):
        make_config(data__signals=selection)
    assert make_config(data__signals="survey+comments:3").data.signals == "survey+comments:3"
