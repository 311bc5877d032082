"""Averages over pairs or users with standard errors. What belongs to one person is not independent,
so all errors are clustered by person. numpy, float64, on the host."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int

Values: TypeAlias = Float[np.ndarray, " rows"]
Persons: TypeAlias = Int[np.ndarray, " rows"]  # the number of the person that each row is of

FOLDS = 5  # of persons, where something is fitted
_MOST = 1e3  # scale of margins


class Estimate(NamedTuple):
    value: float  # NaN where nothing is counted
    stderr: float  # NaN with fewer than two persons


def number_persons(names: Sequence[str]) -> Persons:
    return np.unique(np.asarray(names, dtype=str), return_inverse=True)[1]


def average(values: Values, persons: Persons) -> Estimate:
    return divide(values, np.ones(len(values)), persons)


def divide(sums: Values, weights: Values, persons: Persons) -> Estimate:
    """r = sum of `sums` over sum of `weights`, with the standard error of the linearised ratio:
    sqrt(P / (P - 1) * sum over the P persons of (S - r W)^2) / sum of `weights`; S, W are those of
    a person, who counts where W is not 0."""
    whole = float(np.sum(weights))
    if whole == 0:
        return Estimate(float("nan"), float("nan"))
    ratio = float(np.sum(sums)) / whole
    count = int(persons.max()) + 1
    each, of = (np.bincount(persons, x, count) for x in (sums, weights))
    number = int((of != 0).sum())
    if number < 2:
        return Estimate(ratio, float("nan"))
    variance = number / (number - 1) * np.sum((each - ratio * of) ** 2)
    return Estimate(ratio, float(np.sqrt(variance)) / whole)


def find_nats(margins: Values) -> Values:
    """-log sigmoid(margin) of each pair."""
    return np.logaddexp(0.0, -np.asarray(margins, np.float64))


def calibrate(margins: Values, persons: Persons) -> Values:
    """The margins times the one scale, at least 0, that makes their nats least; the scale of a
    person's pairs is fitted to those of the persons of other folds."""
    margins = np.asarray(margins, np.float64)
    folds, found = persons % FOLDS, np.zeros(len(margins))
    for fold in range(FOLDS):
        own = folds == fold
        rest = margins[~own] if (~own).any() else margins
        found[own] = fit_scale(rest) * margins[own]
    return found


def fit_scale(margins: Values) -> float:
    """The scale between 0 and 1000 with the least nats: their slope is monotone, so it is halved
    in."""

    def slope(scale: float) -> float:
        return -float(np.sum(margins * np.exp(-np.logaddexp(0.0, scale * margins))))

    low, high = 0.0, _MOST
    if slope(low) >= 0:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2
