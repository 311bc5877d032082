"""The parts of the loss against closed forms, and against what drawn labels say by counting."""

from typing import NamedTuple

import numpy as np
import pytest

from popi_jax.data.sources.made_odds import find_odds, write_best_list
from popi_jax.diagnostics import decomposition
from popi_jax.diagnostics.decomposition import Loss, count_mentions, split_loss
from tests.diagnostics.made import ITEMS, RIGHT, Drawn, draw_users

COUNT, PAIRS = 5000, 4
NOISE = -RIGHT * np.log(RIGHT) - (1 - RIGHT) * np.log(1 - RIGHT)


class World(NamedTuple):
    drawn: Drawn
    odds: list  # of all pairs, one user after another
    signals: np.ndarray  # probability of the label that was drawn, given all signals


@pytest.fixture(scope="module")
def world() -> World:
    drawn = draw_users(COUNT, PAIRS, seed=1)
    odds = [pair for user in drawn.users for pair in find_odds(user)]
    return World(drawn, odds, np.array([pair.signals for pair in odds]))


def mentions_of(world: World, summaries: list[str]) -> np.ndarray:
    texts = [text for text in summaries for _ in range(PAIRS)]
    told = [count_mentions(text, pair) for text, pair in zip(texts, world.odds, strict=True)]
    return np.array(told)


def write_summaries(world: World, *, repeats: bool = False) -> list[str]:
    """What the past pairs show by majority, else what the profile says; every tenth item is named
    with the other pole; sometimes an item twice, more often where the pairs agree."""
    rng, drawn, found = np.random.default_rng(2), world.drawn, []
    for stated, shown in zip(drawn.stated, drawn.shown, strict=True):
        items = []
        for a in range(8):
            pole = int(shown[a] < 0) if shown[a] else stated[a]
            if pole < 0:
                continue
            pole = 1 - pole if rng.random() < 0.1 else pole
            items.append(ITEMS[a][pole])
            if repeats and rng.random() < 0.5 * (abs(shown[a]) > 1):
                items.append(ITEMS[a][pole])
        found.append(" ; ".join(items))
    return found


def says(world: World, summaries: list[str]) -> np.ndarray:
    """Of each pair: mentions of the chosen reply's pole less those of the other, at most 2."""
    rows = []
    for n, text in enumerate(summaries):
        named = text.split(" ; ")
        for a, p in zip(world.drawn.attribute[n], world.drawn.pole[n], strict=True):
            rows.append(named.count(ITEMS[a][p]) - named.count(ITEMS[a][1 - p]))
    return np.array(rows)


def means(loss: Loss) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in loss._asdict().items()}


def sum_parts(loss: Loss, *, chance: bool = True) -> float:
    found = means(loss)
    left_out = {"information"} | (set() if chance else {"chance"})
    return sum(value for name, value in found.items() if name not in left_out)


def nats(margins: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(-margins))


def error(values: np.ndarray) -> float:
    """Of the mean, clustered by user."""
    return float(values.reshape(COUNT, -1).mean(axis=1).std() / np.sqrt(COUNT))


def test_the_odds_are_those_of_the_drawn_labels(world):
    """Calibrated in every bin: of the pairs whose first pole has the odds p, the part p has it
    won."""
    first = np.where(world.drawn.pole.reshape(-1) == 0, world.signals, 1 - world.signals)
    won = world.drawn.pole.reshape(-1) == 0
    for low in np.arange(0.05, 0.95, 0.1):
        rows = (first >= low) & (first < low + 0.1)
        if rows.sum() > 100:
            off = won[rows].mean() - first[rows].mean()
            assert abs(off) < 4 * np.sqrt(0.25 / rows.sum())
    truth = np.array([pair.truth for pair in world.odds])
    np.testing.assert_allclose(truth, np.where(world.drawn.right.reshape(-1), RIGHT, 1 - RIGHT))
    assert {pair.nothing for pair in world.odds} == {0.5}


def test_what_signals_leave_open_is_the_loss_of_who_knows_their_odds(world):
    loss = means(split_loss(np.zeros(COUNT * PAIRS), world.odds, mentions_of(world, [""] * COUNT)))
    drawn = -np.log(world.signals)  # with the labels that were drawn
    assert loss["noise"] == pytest.approx(NOISE)
    assert loss["noise"] + loss["lost_by_signals"] == pytest.approx(
        drawn.mean(), abs=4 * error(drawn)
    )


def test_an_empty_summary_and_an_undecided_generator(world):
    """Closed forms: all is lost, by the summary."""
    loss = split_loss(np.zeros(COUNT * PAIRS), world.odds, mentions_of(world, [""] * COUNT))
    found = means(loss)
    assert found["information"] == pytest.approx(0.0)
    assert found["lost_by_generator"] == pytest.approx(0.0)
    assert found["chance"] == pytest.approx(0.0)
    entropy = -world.signals * np.log(world.signals)
    entropy -= (1 - world.signals) * np.log(1 - world.signals)
    assert found["lost_by_summary"] == pytest.approx(np.log(2) - entropy.mean())
    assert sum_parts(loss) == pytest.approx(np.log(2))


@pytest.mark.parametrize("slope", [2.5, 0.5, -1.0])
def test_the_truth_as_summary(world, slope):
    """Closed forms: the summary gives back what the signals leave open; a generator whose margins
    are of another slope than 2.5 loses a divergence."""
    texts = [user.oracle for user in world.drawn.users]
    margins = slope * np.where(world.drawn.right.reshape(-1), 1.0, -1.0)
    loss = split_loss(margins, world.odds, mentions_of(world, texts), of_truth=True)
    found = means(loss)
    own = 1 / (1 + np.exp(-slope))
    divergence = RIGHT * np.log(RIGHT / own) + (1 - RIGHT) * np.log((1 - RIGHT) / (1 - own))
    assert found["noise"] == pytest.approx(NOISE)
    assert found["lost_by_summary"] == pytest.approx(-found["lost_by_signals"], abs=1e-4)
    assert found["lost_by_generator"] == pytest.approx(divergence, abs=1e-3)
    assert found["information"] == pytest.approx(1 - NOISE / np.log(2), abs=1e-4)
    assert sum_parts(loss) == pytest.approx(nats(margins).mean(), abs=1e-4)


@pytest.mark.parametrize("repeats", [False, True])
def test_information_is_that_of_counting_drawn_labels(world, repeats):
    """The entropy of the drawn labels given what the summary says of the contrast, by counting."""
    texts = write_summaries(world, repeats=repeats)
    told = says(world, texts)
    loss = split_loss(np.zeros(len(told)), world.odds, mentions_of(world, texts))
    lost = np.full(len(told), np.log(2))
    for size in (1, 2):
        rows = np.abs(told) == size
        assert rows.sum() > 1000 or (size == 2 and not repeats)
        p = np.mean(told[rows] > 0) if rows.any() else 0.5
        lost[rows] = np.where(told[rows] > 0, -np.log(p), -np.log(1 - p))
    information = (np.log(2) - lost.mean()) / np.log(2)
    found = loss.information.mean()
    assert 0.2 < found < 0.5
    assert found == pytest.approx(information, abs=4 * error(lost) / np.log(2))
    # labels are expected ones, so that the error is smaller than that of drawn ones
    assert error(loss.information) < 0.8 * error(lost) / np.log(2)


@pytest.mark.parametrize("kind", ["good", "bad", "wild"])
def test_the_parts_add_up_to_what_is_measured(world, kind):
    """Of a generator that follows what is said, of one that follows the contrary, and of one whose
    margins vary with the prompt; each part alone is what it must be."""
    texts = write_summaries(world, repeats=True)
    told = says(world, texts).astype(float)
    rng = np.random.default_rng(5)
    # one bias for all: towards a pole, not towards the chosen reply
    side = np.where(world.drawn.pole.reshape(-1) == 0, 1.0, -1.0)
    margins = {
        "good": 1.4 * told + 0.2 * side,
        "bad": -2.0 * told + 0.2 * side,
        "wild": 1.4 * told + rng.normal(0, 1.5, len(told)),
    }[kind]
    loss = split_loss(margins, world.odds, mentions_of(world, texts))
    found = means(loss)
    measured = nats(margins)
    assert sum_parts(loss) == pytest.approx(measured.mean(), abs=0.01)
    # without the fifth part: as far as the labels that were drawn allow
    chance = 4 * error(loss.chance)
    assert sum_parts(loss, chance=False) == pytest.approx(measured.mean(), abs=0.01 + chance)
    # the generator against the reader, by counting drawn labels: what it loses over the best use of
    # what is said
    best = np.full(len(told), np.log(2))
    for size in (1, 2):
        rows = np.abs(told) == size
        p = np.mean(told[rows] > 0)
        best[rows] = np.where(told[rows] > 0, -np.log(p), -np.log(1 - p))
    difference = measured - best
    assert found["lost_by_generator"] == pytest.approx(difference.mean(), abs=4 * error(difference))
    assert (found["lost_by_generator"] < 0.03) == (kind == "good")


def test_expected_accuracy_is_what_counting_labels_finds(world):
    texts = write_summaries(world, repeats=True)
    told = says(world, texts)
    found = decomposition.expect_accuracy(world.signals, mentions_of(world, texts))
    right = np.where(told == 0, 0.5, told > 0)
    assert found == pytest.approx(right.mean(), abs=4 * error(right))
    assert 0.6 < found < 0.9
    # a reader of all signals is not surpassed, and nothing is as good as a guess
    best = [write_best_list(user) for user in world.drawn.users]
    best = decomposition.expect_accuracy(world.signals, mentions_of(world, best))
    assert found < best < decomposition.find_optimum(world.odds)["signals"]
    nothing = mentions_of(world, ["no strong preference"] * COUNT)
    assert decomposition.expect_accuracy(world.signals, nothing) == 0.5
    told = np.array([[1, 0], [0, 2], [1, 1], [2, 1]])
    known = np.array([0.9, 0.8, 0.7, 0.6])
    expected = np.mean([0.9, 1 - 0.8, 0.5, 0.6])
    assert decomposition.expect_accuracy(known, told) == pytest.approx(expected)


def test_another_users_summary_tells_nothing(world):
    texts = write_summaries(world)
    texts = texts[1:] + texts[:1]
    loss = means(split_loss(np.zeros(COUNT * PAIRS), world.odds, mentions_of(world, texts)))
    assert abs(loss["information"]) < 0.001


def test_many_mentions_are_as_two():
    odds = draw_users(1, 1, seed=0)
    (pair,) = find_odds(odds.users[0])
    text = " ; ".join([pair.item_for] * 3 + [pair.item_against])
    assert count_mentions(text, pair) == (3, 1)
    known = np.array([0.8, 0.8, 0.6])
    mentions = np.array([[3, 1], [2, 1], [1, 0]])
    read = decomposition.read_ideally(known, mentions)
    np.testing.assert_allclose(read, [2.1 / 3, 2.1 / 3, 1.1 / 2])
    mirrored = decomposition.read_ideally(1 - known, mentions[:, ::-1])
    np.testing.assert_allclose(mirrored, 1 - read)
