import numpy as np
import pytest

from popi_jax.diagnostics import estimates

RNG = np.random.default_rng(0)


def test_the_error_of_a_ratio_is_that_of_persons_drawn_anew():
    """A bootstrap over persons, each with pairs that are alike."""
    count = 60
    persons = np.repeat(np.arange(count), RNG.integers(1, 9, count))
    own = RNG.normal(size=count)
    values = own[persons] + 0.3 * RNG.normal(size=len(persons))
    found = estimates.average(values, persons)
    assert found.value == pytest.approx(values.mean())
    rows = [np.flatnonzero(persons == person) for person in range(count)]
    drawn = []
    for _ in range(3000):
        picked = np.concatenate([rows[p] for p in RNG.integers(0, count, count)])
        drawn.append(values[picked].mean())
    assert found.stderr == pytest.approx(np.std(drawn), rel=0.08)
    naive = values.std() / np.sqrt(len(values))
    assert found.stderr > 1.5 * naive


def test_a_ratio_of_sums_is_no_mean_of_ratios():
    found = estimates.divide(np.array([1.0, 0.0, 3.0]), np.array([1.0, 0.0, 9.0]), np.arange(3))
    # two persons count: residuals 1 - .4 and 3 - 3.6
    assert found == pytest.approx((0.4, np.sqrt(2 * 2 * 0.36) / 10))


def test_nothing_and_one_person_have_no_error():
    none = estimates.divide(np.zeros(2), np.zeros(2), np.arange(2))
    assert np.isnan(none.value) and np.isnan(none.stderr)
    one = estimates.average(np.array([1.0, 2.0]), np.zeros(2, int))
    assert one.value == 1.5 and np.isnan(one.stderr)


def test_persons_are_numbered_by_their_names():
    assert estimates.number_persons(["b", "a", "b", "c"]).tolist() == [1, 0, 1, 2]


def test_the_scale_is_that_of_a_fine_grid():
    margins = RNG.normal(0.3, 1.0, 400)
    grid = np.linspace(0, 5, 5001)
    nats = [np.mean(np.log1p(np.exp(-scale * margins))) for scale in grid]
    assert estimates.fit_scale(margins) == pytest.approx(grid[np.argmin(nats)], abs=2e-3)


def test_margins_that_mislead_are_scaled_away_and_certain_ones_are_bounded():
    assert estimates.fit_scale(np.array([-1.0, -2.0, 0.5])) == 0.0
    assert estimates.fit_scale(np.zeros(3)) == 0.0
    assert estimates.fit_scale(np.array([1.0, 2.0])) > 100.0


def test_small_margins_are_as_informative_as_large_ones():
    persons = np.repeat(np.arange(50), 8)
    margins = RNG.normal(0.5, 1.0, 400)
    small, large = (estimates.calibrate(scale * margins, persons) for scale in (0.01, 3.0))
    np.testing.assert_allclose(small, large, rtol=1e-6)


def test_the_scale_of_a_person_is_fitted_to_others():
    persons = np.repeat(np.arange(10), 4)
    margins = RNG.normal(0.5, 1.0, 40)
    before = estimates.calibrate(margins, persons)[:4] / margins[:4]
    margins[:4] *= -7.0
    after = estimates.calibrate(margins, persons)[:4] / margins[:4]
    np.testing.assert_allclose(before, after)
