"""Preference margins of pairs -> accuracy, its standard error and nats per pair. numpy, float64, on
the host."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


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

    The pairs of a user are not independent. So the accuracy is taken as a ratio of two sums over
    the U users that have a counted pair, S_u right answers and n_u pairs, and its standard error is
    that of the linearised ratio estimator: sqrt(U / (U - 1) * sum_u (S_u - accuracy * n_u)^2) /
    sum_u n_u. Raises: ValueError when no pair is counted, or a counted margin is not finite."""
    counts = mask.sum(axis=1)
    n = int(counts.sum())
    if n == 0:
        raise ValueError("no pair to score")
    values = np.where(mask, margins.astype(np.float64), 0.0)
    if not np.isfinite(values).all():
        raise ValueError("a margin is not finite")
    right = np.where(mask, (values > 0) + 0.5 * (values == 0), 0.0).sum(axis=1)
    accuracy = right.sum() / n
    num_users = int((counts > 0).sum())
    residuals = right - accuracy * counts
    spread = num_users / (num_users - 1) if num_users > 1 else np.nan
    variance = spread * np.sum(residuals**2) / n**2
    nats = np.where(mask, np.logaddexp(0.0, -values), 0.0).sum() / n
    return Score(float(accuracy), float(np.sqrt(variance)), n, float(nats))
