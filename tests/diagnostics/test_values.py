import numpy as np
import pytest

from popi_jax.data.records import User
from popi_jax.data.sources import made_people, prefeval
from popi_jax.diagnostics import values

RNG = np.random.default_rng(0)


def test_values_of_hand_made_margins():
    """Two users, the second with one pair; of the third nothing counts."""
    margins = {
        "none": np.zeros((3, 2)),
        "summary": np.array([[1.0, -2.0], [0.0, 9.0], [9.0, 9.0]]),
        "other": np.array([[1.0, 9.0], [9.0, 9.0], [9.0, 9.0]]),
        "oracle": np.zeros((3, 2)),
    }
    mask = np.array([[True, True], [True, False], [False, False]])
    first = mask & np.array([[True], [False], [False]])
    one, none = first & [[True, False]], np.zeros_like(mask)
    masks = {"none": mask, "summary": mask, "other": one, "oracle": none}
    found = values.describe_margins(margins, masks, np.arange(3))
    own = [np.log1p(np.exp(-m)) for m in (1.0, -2.0, 0.0)]
    assert found["nats_none"] == pytest.approx(np.log(2))
    assert found["nats_summary"] == pytest.approx(np.mean(own))
    assert found["acc_summary"] == pytest.approx((1 + 0.5) / 3)
    assert found["bits_summary"] == pytest.approx((np.log(2) - np.mean(own)) / np.log(2))
    # on the pair that counts alone
    assert found["bits_other"] == pytest.approx(1 - np.log1p(np.exp(-1.0)) / np.log(2))
    assert not any("oracle" in name for name in found)


def test_a_small_beta_is_not_read_as_no_information():
    persons, mask = np.arange(80), np.ones((80, 4), bool)
    right = RNG.random((80, 4)) < 0.8
    margins = {"none": np.zeros((80, 4)), "summary": np.where(right, 0.01, -0.01)}
    found = values.describe_margins(margins, dict.fromkeys(margins, mask), persons)
    assert found["bits_summary"] < 0.01
    share = right.mean()
    entropy = -share * np.log2(share) - (1 - share) * np.log2(1 - share)
    assert found["bits_summary_calibrated"] == pytest.approx(1 - entropy, abs=0.03)


@pytest.mark.parametrize(("of_summary", "rest"), [(1.0, 1.0), (0.3, 1.0), (0.0, 1.0), (0.5, 0.0)])
def test_reliability_is_that_of_the_model_it_is_drawn_from(of_summary, rest):
    users, group, pairs = 3000, 4, 6
    shape = (users, group, pairs)
    rewards = RNG.normal(size=(users, 1, 1)) * 3  # of the user
    rewards = rewards + RNG.normal(size=(users, 1, pairs)) * 2  # of the pair
    rewards = rewards + RNG.normal(size=(users, group, 1)) * of_summary
    rewards = rewards + RNG.normal(size=shape) * rest
    mask = np.arange(pairs) < RNG.integers(1, pairs + 1, users)[:, None]
    found = values.measure_reliability(rewards, mask)
    expected = of_summary**2 / (of_summary**2 + rest**2)
    assert found == pytest.approx(expected, abs=0.03)


def test_reliability_is_the_correlation_of_two_pairs():
    """Of summaries of one user, between the rewards by one pair and by another."""
    users, group = 4000, 2
    rewards = RNG.normal(size=(users, group, 1)) + 1.5 * RNG.normal(size=(users, group, 2))
    found = values.measure_reliability(rewards, np.ones((users, 2), bool))
    differences = rewards[:, 0] - rewards[:, 1]
    correlation = np.corrcoef(differences[:, 0], differences[:, 1])[0, 1]
    assert found == pytest.approx(correlation, abs=0.01)


def test_reliability_without_a_second_pair_or_any_spread():
    assert np.isnan(values.measure_reliability(np.ones((3, 4, 1)), np.ones((3, 1), bool)))
    assert values.measure_reliability(np.ones((3, 4, 2)), np.ones((3, 2), bool)) == 0.0


def test_samples_and_the_judge_count_what_the_mask_counts():
    margins = np.array([[[1.0, 5.0], [-1.0, 5.0]], [[5.0, 5.0], [5.0, 5.0]]])
    mask = np.array([[True, False], [False, False]])
    found = values.describe_samples(margins, mask)
    assert found["nats_sampled"] == pytest.approx(np.mean([np.log1p(np.exp(-1)), np.log1p(np.e)]))
    assert found["acc_sampled"] == 0.5
    judge = values.describe_judge(margins[:, 0], np.zeros((2, 2)), mask)
    assert judge["nats_start_judge"] == pytest.approx(np.log1p(np.exp(-1)))
    assert judge["bits_start_judge"] == pytest.approx(1 - np.log1p(np.exp(-1)) / np.log(2))


def test_lists_are_counted_by_items_and_free_text_by_phrases():
    user = User("u", "", "", (), (), (), oracle="warm tone ; brief answers ; plain words")
    text = "warm tone ; warm tone"
    made = values.describe_texts([text], [user], np.arange(1), made_people.SOURCE)
    assert made["precision"].value == 1.0 and made["repeats"].value == 1.0
    free = values.describe_texts(["a b c a b c"], [user], np.arange(1), prefeval.SOURCE)
    assert {name: rate.value for name, rate in free.items()} == {"repeats": 1.0}
