"""Masked means: denominators, empty masks, and metrics that add up."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from popi_jax.losses.masked import masked_mean, masked_mean_last, metric

few = hypothesis.settings(max_examples=25, deadline=None)
values = hnp.arrays(np.float32, (4, 6), elements=st.floats(-5, 5, width=32))
masks = hnp.arrays(bool, (4, 6))


@few
@hypothesis.given(values, masks)
def test_equals_numpy(x: np.ndarray, mask: np.ndarray) -> None:
    expected = x[mask].astype(np.float64).mean() if mask.any() else 0.0
    np.testing.assert_allclose(masked_mean(jnp.asarray(x), jnp.asarray(mask)), expected, atol=1e-5)
    rows = [
        row[on].astype(np.float64).mean() if on.any() else 0.0
        for row, on in zip(x, mask, strict=True)
    ]
    np.testing.assert_allclose(masked_mean_last(jnp.asarray(x), jnp.asarray(mask)), rows, atol=1e-5)


@few
@hypothesis.given(values, masks)
def test_what_is_masked_does_not_matter_even_if_not_finite(x: np.ndarray, mask: np.ndarray) -> None:
    broken, on = jnp.asarray(np.where(mask, x, np.nan)), jnp.asarray(mask)
    np.testing.assert_array_equal(masked_mean(broken, on), masked_mean(jnp.asarray(x), on))
    np.testing.assert_array_equal(
        masked_mean_last(broken, on), masked_mean_last(jnp.asarray(x), on)
    )
    np.testing.assert_array_equal(metric(broken, on).total, metric(jnp.asarray(x), on).total)


def test_metrics_of_parts_add_up_to_that_of_the_whole() -> None:
    x, mask = np.arange(12, dtype=np.float32).reshape(4, 3), np.arange(12).reshape(4, 3) % 5 > 0
    whole = metric(jnp.asarray(x), jnp.asarray(mask))
    parts = [metric(jnp.asarray(x[i : i + 2]), jnp.asarray(mask[i : i + 2])) for i in (0, 2)]
    added = jax.tree.map(lambda *m: sum(m), *parts)
    assert (float(whole.total), float(whole.weight)) == (float(added.total), float(added.weight))
    np.testing.assert_allclose(whole.total / whole.weight, x[mask].mean(), rtol=1e-6)


def test_a_mask_of_fewer_axes_is_spread() -> None:
    found = metric(jnp.ones((2, 3)), jnp.array([[True], [False]]))
    assert (float(found.total), float(found.weight)) == (3.0, 3.0)
