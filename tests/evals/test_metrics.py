import math

import numpy as np
import pytest

from popi_jax.evals.metrics import score_pairs


def test_hand_computed():
    """Users with 2, 1 and 3 pairs: right answers 1.5, 0 and 3, so accuracy 4.5 / 6 = 3/4 and
    residuals 0, -3/4, 3/4."""
    margins = np.array([[2.0, 0.0, -9.0], [-1.0, 9.0, 9.0], [0.5, 0.5, 3.0]], np.float32)
    mask = np.array([[True, True, False], [True, False, False], [True, True, True]])
    score = score_pairs(margins, mask)
    assert score.accuracy == 0.75
    assert score.n == 6
    assert score.stderr == pytest.approx(math.sqrt(3 / 2 * (9 / 16 + 9 / 16) / 36), rel=1e-12)
    nats = [math.log1p(math.exp(-m)) for m in (2.0, 0.0, -1.0, 0.5, 0.5, 3.0)]
    assert score.nats == pytest.approx(sum(nats) / 6, rel=1e-12)


def test_margins_of_zero_are_ties():
    score = score_pairs(np.zeros((5, 2), np.float32), np.ones((5, 2), bool))
    assert (score.accuracy, score.stderr, score.n) == (0.5, 0.0, 10)
    assert score.nats == pytest.approx(math.log(2), rel=1e-12)


def test_with_one_pair_a_user_it_is_the_binomial_error():
    margins = np.array([[1.0]] * 30 + [[-1.0]] * 20)
    score = score_pairs(margins, np.ones((50, 1), bool))
    assert score.stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 49), rel=1e-12)


def test_equal_answers_of_a_user_count_once():
    """Eight copies of each pair carry no more information than one."""
    margins = np.random.default_rng(0).normal(size=(40, 1))
    once = score_pairs(margins, np.ones((40, 1), bool))
    copied = score_pairs(np.repeat(margins, 8, axis=1), np.ones((40, 8), bool))
    assert copied.n == 8 * once.n
    assert copied.stderr == pytest.approx(once.stderr, rel=1e-12)


def test_users_without_a_counted_pair_change_nothing():
    margins = np.array([[1.0, -1.0], [2.0, 3.0], [-4.0, 5.0]])
    mask = np.array([[True, True], [True, False], [True, True]])
    more = (
        np.concatenate([margins, np.full((7, 2), 9.0)]),
        np.concatenate([mask, np.zeros((7, 2), bool)]),
    )
    assert score_pairs(*more) == score_pairs(margins, mask)


def test_of_one_user_no_error_can_be_said():
    assert math.isnan(score_pairs(np.ones((1, 4)), np.ones((1, 4), bool)).stderr)


def test_large_margins_stay_finite():
    score = score_pairs(np.array([[-2000.0], [2000.0]]), np.ones((2, 1), bool))
    assert score.nats == 1000.0


def test_nothing_to_score_and_broken_numbers():
    with pytest.raises(ValueError, match="no pair"):
        score_pairs(np.ones((2, 2)), np.zeros((2, 2), bool))
    with pytest.raises(ValueError, match="not finite"):
        score_pairs(np.array([[1.0, np.nan]]), np.ones((1, 2), bool))
    assert score_pairs(np.array([[1.0, np.nan]]), np.array([[True, False]])).n == 1
