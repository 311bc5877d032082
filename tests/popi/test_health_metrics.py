"""Signs of health against float64 numpy loops; that neither devices nor microbatches matter is
tested with the update, in test_update.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.arrays import Tokens
from popi_jax.popi.health_metrics import (
    VarianceSums,
    count_distinct,
    health_metrics,
    reliability,
    sum_variances,
)

USERS, GROUP, PAIRS = 5, 3, 4


def divide(mean) -> float:
    return float(mean.total) / float(mean.weight)


def make_case(seed: int = 0):
    rng = np.random.default_rng(seed)
    skill = 2 * rng.normal(size=(USERS, GROUP, 1))  # what a summary adds to all pairs
    margins = 3 * (skill + rng.normal(size=(USERS, 1, PAIRS)) * 2)
    margins = (margins + rng.normal(size=(USERS, GROUP, PAIRS)) * 2).astype(np.float32)
    mask = rng.random((USERS, PAIRS)) < 0.7
    mask[0], mask[1], mask[2] = True, False, [True, False, False, False]
    return margins, mask


def worth(margins: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -np.asarray(margins, np.float64))


def oracle_reliability(margins: np.ndarray, mask: np.ndarray, count: float | None) -> float:
    """Two-way analysis of variance without replication, summaries by pairs, one user at a time."""
    between = within = between_df = between_pairs = within_df = 0.0
    counts = []
    for m, on in zip(margins, mask, strict=True):
        r = worth(m[:, on])
        if not r.shape[1]:
            continue
        g, k = r.shape
        counts.append(k)
        rows, columns = r.mean(1), r.mean(0)
        between += k * np.sum((rows - r.mean()) ** 2)
        within += np.sum((r - rows[:, None] - columns + r.mean()) ** 2)
        between_df, between_pairs = between_df + g - 1, between_pairs + (g - 1) * k
        within_df += (g - 1) * (k - 1)
    noise = within / within_df
    signal = max((between - between_df * noise) / between_pairs, 0.0)
    rho = signal / (signal + noise)
    k = np.mean(counts) if count is None else count
    return k * rho / (1 + (k - 1) * rho)


@pytest.mark.parametrize("count", [None, 1.0, 12.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_reliability_is_that_of_an_analysis_of_variance(count: float | None, seed: int) -> None:
    margins, mask = make_case(seed)
    sums = sum_variances(jnp.asarray(margins), jnp.asarray(mask), kind="log_sigmoid")
    found = divide(reliability(sums, count))
    assert 0.02 < found < 0.98
    np.testing.assert_allclose(found, oracle_reliability(margins, mask, count), rtol=1e-4)
    garbage = np.where(mask[:, None], margins, np.float32(1e30))
    again = sum_variances(jnp.asarray(garbage), jnp.asarray(mask), kind="log_sigmoid")
    jax.tree.map(np.testing.assert_array_equal, again, sums)


def test_sums_of_two_batches_are_those_of_both() -> None:
    (margins, mask), (others, other_mask) = make_case(0), make_case(1)
    pair = [
        sum_variances(jnp.asarray(m), jnp.asarray(on), kind="log_sigmoid")
        for m, on in ((margins, mask), (others, other_mask))
    ]
    both = VarianceSums(*(x + y for x, y in zip(*pair, strict=True)))
    whole = np.concatenate([margins, others]), np.concatenate([mask, other_mask])
    np.testing.assert_allclose(
        divide(reliability(both)), oracle_reliability(*whole, None), rtol=1e-4
    )


def test_reliability_finds_what_rewards_were_made_of() -> None:
    """Of 2,000 users whose summaries differ with variance 1 and pairs with variance 4: rho = 1 / 5,
    of 8 pairs 2 / 3; what a pair adds to all summaries of a user does not count."""
    rng = np.random.default_rng(3)
    margins = rng.normal(size=(2000, 4, 1)) + 2 * rng.normal(size=(2000, 4, 8))
    margins = margins + 30 * rng.normal(size=(2000, 1, 8))
    sums = sum_variances(
        jnp.asarray(margins, jnp.float32), jnp.ones((2000, 8), bool), kind="margin"
    )
    assert divide(reliability(sums, 1.0)) == pytest.approx(0.2, abs=0.01)
    assert divide(reliability(sums)) == pytest.approx(2 / 3, abs=0.02)


def test_where_reliability_does_not_apply_or_is_at_its_bounds() -> None:
    ones = jnp.ones((3, 1), bool)
    one_pair = sum_variances(jnp.asarray(np.eye(3, 4)[..., None], jnp.float32), ones, kind="margin")
    assert reliability(one_pair).weight == 0
    rng = np.random.default_rng(0)
    same = jnp.asarray(np.repeat(rng.normal(size=(3, 1, 4)), 5, axis=1), jnp.float32)
    mask = jnp.ones((3, 4), bool)
    assert reliability(sum_variances(same, mask, kind="log_sigmoid")).weight == 0
    # each summary has the same mean: nothing repeats
    tilted = jnp.asarray([[[1, -1, 0, 0], [0, 0, 1, -1]]] * 3, jnp.float32)
    assert divide(reliability(sum_variances(tilted, mask, kind="margin"))) == 0.0
    # all pairs agree: all repeats
    shifted = same + jnp.arange(5.0).reshape(1, 5, 1)
    assert divide(reliability(sum_variances(shifted, mask, kind="margin"))) == pytest.approx(1.0)


def test_the_other_signs_equal_plain_loops() -> None:
    margins, mask = make_case(2)
    rng = np.random.default_rng(5)
    ids = rng.integers(0, 2, (USERS, GROUP, 3)).astype(np.int32)
    lengths = rng.integers(1, 4, (USERS, GROUP)).astype(np.int32)
    ids[4, 0], lengths[4, 0] = ids[0, 0], lengths[0, 0]
    rewards = rng.normal(size=(USERS, GROUP)).astype(np.float32)
    rewards[1] = 0.25
    rewards[2] = [0.5, 0.5 + 3e-7, 0.5]
    rewards[3] = [0.5, 0.5 + 3e-6, 0.5]
    found = health_metrics(
        *map(jnp.asarray, (margins, mask, rewards)),
        Tokens(jnp.asarray(ids), jnp.asarray(lengths)),
        kind="log_sigmoid",
    )
    assert sorted(found) == [
        *("distinct", "distinct_users", "margin_spread", "reliability", "saturated"),
        "zero_variance",
    ]
    texts = [[tuple(ids[u, g, : lengths[u, g]]) for g in range(GROUP)] for u in range(USERS)]
    real = [(u, k) for u, k in np.ndindex(USERS, PAIRS) if mask[u, k]]
    expected = {
        "zero_variance": 2 / USERS,
        "distinct": np.mean([len(set(group)) / GROUP for group in texts]),
        "distinct_users": len({group[0] for group in texts}) / USERS,
        "saturated": np.mean([[abs(margins[u, g, k]) > 8 for g in range(GROUP)] for u, k in real]),
        "margin_spread": np.mean([margins[u, :, k].astype(float).std(ddof=1) for u, k in real]),
        "reliability": oracle_reliability(margins, mask, None),
    }
    assert 0 < expected["saturated"] < 1
    assert expected["distinct"] < 1 > expected["distinct_users"]
    assert {name: divide(mean) for name, mean in found.items()} == pytest.approx(expected, rel=1e-4)
    # what stands in the padding does not matter
    padded = np.where(np.arange(3) < lengths[..., None], ids, 7 + rng.integers(0, 9, ids.shape))
    texts_again = Tokens(jnp.asarray(padded.astype(np.int32)), jnp.asarray(lengths))
    np.testing.assert_array_equal(count_distinct(texts_again), [len(set(group)) for group in texts])
