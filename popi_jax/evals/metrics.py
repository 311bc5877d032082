"""Preference margins of pairs -> accuracy, its standard error and nats per pair. numpy, float64, on
the host."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from popi_jax.diagnostics.estimates import divide


class Score(NamedTuple):
    # share of the pairs whose margin is above 0; a margin of exactly 0 counts one half
    accuracy: float
    stderr: float  # of the accuracy, clustered by user; NaN with fewer than two users
    n: int  # pairs
    nats: float  # mean of -log sigmoid(margin); log 2 = 0.693 for a model that cannot tell


def score_pairs(
    margins: Float[np.ndarray, "users pairs"], mask: Bool[np.ndarray, "users pairs"]
) -> Score:
    """Scores the pairs that `mask` counts; margins are in nats, positive where the chosen reply is
    preferred.

    The pairs of a user are not independent, so the standard error of the accuracy is that of a
    ratio of two sums over users, right answers and pairs (`estimates.divide`). Raises: ValueError
    when no pair is counted, or a counted margin is not finite."""
    counts = mask.sum(axis=1)
    n = int(counts.sum())
    if n == 0:
        raise ValueError("no pair to score")
    values = np.where(mask, margins.astype(np.float64), 0.0)
    if not np.isfinite(values).all():
        raise ValueError("a margin is not finite")
    right = np.where(mask, (values > 0) + 0.5 * (values == 0), 0.0).sum(axis=1)
    accuracy = divide(right, counts.astype(np.float64), np.arange(len(counts)))
    nats = np.where(mask, np.logaddexp(0.0, -values), 0.0).sum() / n
    return Score(accuracy.value, accuracy.stderr, n, float(nats))
