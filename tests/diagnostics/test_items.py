import numpy as np
import pytest

from popi_jax.data.records import Reading, User
from popi_jax.diagnostics import items

CONTRASTS = (("brief", "thorough"), ("warm", "formal"), ("plain", "technical"), ("jokes", "grave"))


def make_user(oracle: str, stated: str = "", shown: tuple[str, ...] = ()) -> User:
    readings = tuple(Reading("tea", item, "") for item in shown)
    return User("u", "", "", (), (), (), oracle=oracle, stated=stated, readings=readings)


USER = make_user("brief ; warm ; plain", "brief ; formal", ("warm", "warm", "technical", "brief"))


@pytest.mark.parametrize(
    ("summary", "counts"),
    [
        # named right wrong | stated named | implied named; "plain" is neither stated nor shown
        ("brief ; warm ; plain", (3, 3, 0, 1, 1, 1, 1)),
        ("brief ; thorough ; grave", (3, 1, 1, 1, 1, 1, 0)),
        ("warm ; warm ; warm", (1, 1, 0, 1, 0, 1, 1)),
        ("formal ;warm;  plain", (3, 2, 1, 1, 0, 1, 1)),
        ("no strong preference", (0, 0, 0, 1, 0, 1, 0)),
        ("", (0, 0, 0, 1, 0, 1, 0)),
        ("warm ton ; briefly", (0, 0, 0, 1, 0, 1, 0)),  # cut off, or no item
    ],
)
def test_counts_of_one_summary(summary, counts):
    assert tuple(items.count_items(summary, USER, CONTRASTS)) == counts


def test_what_the_profile_gets_wrong_is_not_stated():
    user = make_user("warm", "formal", ("warm",))
    assert items.count_items("warm", user, CONTRASTS)[3:] == (0, 0, 1, 1)


def test_rates_are_ratios_of_sums_over_users():
    users = [USER, make_user("grave", "no strong preference"), make_user("thorough", "thorough")]
    summaries = ["brief ; brief ; thorough ; jokes", "jokes", ""]
    found = items.measure_items(summaries, users, CONTRASTS, np.arange(3))
    values = {name: estimate.value for name, estimate in found.items()}
    assert values == {
        "precision": pytest.approx(1 / 4),
        "wrong_sign": pytest.approx(2 / 4),
        "recall_stated": pytest.approx(1 / 2),
        "recall_implied": pytest.approx(0 / 1),
        "repeats": pytest.approx(1 / 3),
    }
    # the second user names 1 of 4 items, all of them wrong; the third none
    residuals = np.array([1 - 3 / 4, 0 - 1 / 4])
    assert found["precision"].stderr == pytest.approx(np.sqrt(2 * np.sum(residuals**2)) / 4)


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("one two three four", 0),
        ("likes it short and Likes it  short", 1),
        ("a b c a b c a b c", 4),  # a b c twice more, b c a and c a b once more
        ("one two", 0),
        ("", 0),
    ],
)
def test_repeated_phrases_of_free_text(text, repeats):
    found = items.measure_phrases([text], np.arange(1))
    assert found["repeats"].value == repeats
