import pytest

from popi_jax.data.records import Comment, Shot, User
from popi_jax.data.selection import select_signals
from popi_jax.errors import UserError

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
