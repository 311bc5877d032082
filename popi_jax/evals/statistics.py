"""What the scored pairs of evaluation cells say: statistics that are derived when cells are read.
numpy, float64, on the host; bootstrap.py has the intervals.

Two accuracies that are never mixed, both named as in lm-evaluation-harness (`acc`, `acc_stderr`):

- `acc`: share of the pairs whose margin, measured against the reference as the objective has it, is
  above 0;
- `acc_likelihood`: share of the pairs whose chosen reply has the higher log-prob. This is what the
  harness calls `acc` of a task of two choices.

Both are strict: a tie is no right answer. `acc_half` and `acc_likelihood_half` give it one half.
Where the generator is its own reference and sees no text, all margins are 0: there `acc` is 0 and
`acc_half` 0.5, so that differences and the worst group go by `acc_half`.

Estimates are ratios of sums over persons: every pair counts the same. A person whose signals were
drawn several times ("ann", "ann#2") is several users and one cluster."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from popi_jax.errors import UserError
from popi_jax.evals.bootstrap import (
    Estimate,
    estimate_absolute,
    estimate_means,
    estimate_quotient,
    estimate_shares,
)

NUM_BINS = 10  # of the calibration error
MIN_GROUP = 10  # persons of a group that may be called the worst
MAIN = "acc_half"  # of differences and of the worst group
UNKNOWN = "unknown"  # the group of those of whom none is known
SHARES = ("acc", "acc_half", "acc_likelihood", "acc_likelihood_half")
MEANS = ("nats", "brier")
NUMBERS = ("chosen", "rejected", "margin", "context_tokens", "signal_tokens")
NAMES = ("user", "person", "pair")


class Items(NamedTuple):
    """The scored pairs of a cell, in the order of users and pairs."""

    keys: list[tuple[str, str]]  # (user, pair) of each
    persons: list[str]
    chosen: Float[np.ndarray, " items"]  # log-probs, nats
    rejected: Float[np.ndarray, " items"]
    margin: Float[np.ndarray, " items"]  # nats, against the reference
    context_tokens: Float[np.ndarray, " items"]  # of the user's text that the generator saw
    signal_tokens: Float[np.ndarray, " items"]  # of the user's raw signals
    groups: list[dict[str, str]]


class Row(NamedTuple):
    """The statistics of a cell, or of one group of it."""

    n: int  # pairs
    users: int
    persons: int
    attempted: int  # pairs, of which `n` were scored
    left_out: dict[str, int]  # reason -> pairs
    acc: Estimate
    acc_half: Estimate
    acc_likelihood: Estimate
    acc_likelihood_half: Estimate
    nats: Estimate  # mean of -log sigmoid(margin)
    brier: Estimate  # mean of (1 - sigmoid(margin))^2
    ece: Estimate  # expected calibration error of the surer side, 10 bins of equal count
    context_tokens: float  # mean over users
    signal_tokens: float
    compression: float  # signal tokens / context tokens; NaN without any context


class Difference(NamedTuple):
    """One cell minus another, paired on the pairs that both have."""

    metric: str
    estimate: Estimate
    n: int  # pairs that both have
    only_first: int  # pairs that the other lacks
    only_second: int


class Transfer(NamedTuple):
    """How much of a gain survives on another generator."""

    share: Estimate  # NaN where undefined
    defined: bool  # not so if the interval of the first gain holds 0, or persons are too few
    here: Estimate  # the gain on the generator that the summaries were made for
    there: Estimate
    n: int  # pairs that all four cells have
    dropped: int  # pairs that only some of them have


class Grouping(NamedTuple):
    name: str
    rows: dict[str, Row]  # group -> its statistics
    worst: str  # the group of the lowest `acc_half`; "" if none has MIN_GROUP persons
    note: str  # of the worst group


def make_items(rows: Sequence[Mapping[str, Any]]) -> Items:
    """Raises: UserError when a pair occurs twice, a number is not finite or a field is missing."""
    for name in (*NAMES, *NUMBERS):
        if any(name not in row for row in rows):
            raise UserError(f'field "{name}": missing from an item of a cell; score it again')
    rows = sorted(rows, key=lambda row: (row["user"], row["pair"]))
    keys = [(row["user"], row["pair"]) for row in rows]
    for key, following in zip(keys, keys[1:], strict=False):
        if key == following:
            raise UserError(
                f'user "{key[0]}": pair "{key[1]}" occurs twice in a cell, allowed: once'
            )
    numbers = {name: np.array([row[name] for row in rows], np.float64) for name in NUMBERS}
    for name, values in numbers.items():
        if not np.isfinite(values).all():
            user, pair = keys[int(np.argmin(np.isfinite(values)))]
            told = f'user "{user}", pair "{pair}": field "{name}" is not a finite number'
            raise UserError(f"{told}; score the cell again")
    groups = [dict(row.get("groups") or {}) for row in rows]
    return Items(keys, [row["person"] for row in rows], **numbers, groups=groups)


def compute_row(items: Items, coverage: dict[str, Any] | None = None, *, seed: int = 0) -> Row:
    """coverage: that of the header of the cell. Raises: ValueError when there is no pair."""
    if not items.keys:
        raise ValueError("no pair to score")
    sums, counts = _sum_persons(items, [VALUES[name](items) for name in (*SHARES, *MEANS)])
    estimates = estimate_shares(sums[:, : len(SHARES)], counts, seed=seed)
    estimates += estimate_means(sums[:, len(SHARES) :], counts, seed=seed)
    named = dict(zip((*SHARES, *MEANS), estimates, strict=True))
    # the numbers of tokens are the same on all pairs of a user: the first tells them
    _, first = np.unique([user for user, _ in items.keys], return_index=True)
    context = float(items.context_tokens[first].mean())
    signals = float(items.signal_tokens[first].mean())
    told = coverage or {"attempted": len(items.keys), "left_out": {}}
    return Row(
        n=len(items.keys),
        users=len(first),
        persons=len(counts),
        attempted=told["attempted"],
        left_out=dict(told["left_out"]),
        **named,
        ece=_compute_calibration(items, seed),
        context_tokens=context,
        signal_tokens=signals,
        compression=signals / context if context > 0 else math.nan,
    )


def compute_difference(
    first: Items, second: Items, metric: str = MAIN, *, seed: int = 0
) -> Difference:
    """metric: a key of VALUES. Raises: UserError when no pair is in both."""
    one, other = _match([first, second])
    values = VALUES[metric](one) - VALUES[metric](other)
    estimate = _estimate_mean(one, values, seed)
    return _count(metric, estimate, one, first, second)


def compute_information_gain(cell: Items, baseline: Items, *, seed: int = 0) -> Difference:
    """Bits a pair that the text of a cell tells beyond that of the baseline:
    (nats of the baseline - nats of the cell) / ln 2."""
    one, other = _match([cell, baseline])
    values = (VALUES["nats"](other) - VALUES["nats"](one)) / math.log(2)
    return _count("bits", _estimate_mean(one, values, seed), one, cell, baseline)


def compute_transfer(
    here: Items, here_baseline: Items, there: Items, there_baseline: Items, *, seed: int = 0
) -> Transfer:
    """(acc there - acc of the baseline there) / (acc here - acc of the baseline here), by
    `acc_half`, on the pairs that all four cells have.

    here: the summaries on the generator that they were made for; there: on another one."""
    cells = [here, here_baseline, there, there_baseline]
    matched = _match(cells)
    values = [VALUES[MAIN](items) for items in matched]
    gains = [values[0] - values[1], values[2] - values[3]]
    sums, counts = _sum_persons(matched[0], gains)
    gain_here, gain_there = estimate_means(sums, counts, seed=seed)
    found = estimate_quotient(sums[:, 1], sums[:, 0], counts, seed=seed)
    every = set[tuple[str, str]]().union(*(items.keys for items in cells))
    n = len(matched[0].keys)
    return Transfer(*found, gain_here, gain_there, n, len(every) - n)


def compute_gap_recovered(
    cell: Items, baseline: Items, oracle: Items, *, seed: int = 0
) -> Difference:
    """How far a cell goes on the way from the baseline (0) to the oracle (1), by `acc_half`, on the
    pairs that all three have: (acc - acc of the baseline) / (acc of the oracle - acc of the
    baseline), the performance gap recovered of arXiv 2312.09390, section 3. NaN where the interval
    of the whole way holds 0, or persons are too few."""
    top, base, own = _match([oracle, baseline, cell])
    found = compute_transfer(top, base, own, base, seed=seed)
    return _count("gap_recovered", found.share, own, cell, oracle)


def compute_groups(items: Items, *, seed: int = 0) -> list[Grouping]:
    """The statistics of each group of each grouping, by name. Pairs of which no group is told are
    shown as UNKNOWN, and never called the worst. The lowest of several estimates is too low on
    average: see its interval."""
    found = []
    for name in sorted({name for groups in items.groups for name in groups}):
        values = [groups.get(name) or UNKNOWN for groups in items.groups]
        rows = {}
        for value in sorted(set(values)):
            rows[value] = compute_row(_take(items, [v == value for v in values]), seed=seed)
        large = [v for v, r in rows.items() if v != UNKNOWN and r.persons >= MIN_GROUP]
        worst = min(large, key=lambda v: getattr(rows[v], MAIN).value, default="")
        note = f"lowest {MAIN} of the groups of at least {MIN_GROUP} persons ({len(large)})"
        if not large:
            note = f"no group has {MIN_GROUP} persons"
        found.append(Grouping(name, rows, worst, note))
    return found


def list_fields(row: Row) -> dict[str, Any]:
    """The fields of a line of a table: `acc`, `acc_stderr`, `acc_low`, `acc_high`, ...; None where
    a number is not known."""
    fields: dict[str, Any] = {}
    for name, value in row._asdict().items():
        fields |= list_estimate(name, value) if isinstance(value, Estimate) else {name: value}
    return {name: None if value != value else value for name, value in fields.items()}


def list_estimate(name: str, estimate: Estimate) -> dict[str, float | None]:
    value, stderr, low, high = (None if math.isnan(x) else x for x in estimate)
    return {name: value, f"{name}_stderr": stderr, f"{name}_low": low, f"{name}_high": high}


def _count_right(margin: Float[np.ndarray, " items"], tie: float) -> Float[np.ndarray, " items"]:
    return (margin > 0) + tie * (margin == 0)


# what each pair adds to a metric
VALUES: dict[str, Callable[[Items], Float[np.ndarray, " items"]]] = {
    "acc": lambda items: _count_right(items.margin, 0.0),
    "acc_half": lambda items: _count_right(items.margin, 0.5),
    "acc_likelihood": lambda items: _count_right(items.chosen - items.rejected, 0.0),
    "acc_likelihood_half": lambda items: _count_right(items.chosen - items.rejected, 0.5),
    "nats": lambda items: np.logaddexp(0.0, -items.margin),
    "brier": lambda items: _sigmoid(-items.margin) ** 2,
}


def _sigmoid(x: Float[np.ndarray, " items"]) -> Float[np.ndarray, " items"]:
    return np.exp(-np.logaddexp(0.0, -x))


def _compute_calibration(items: Items, seed: int) -> Estimate:
    """The model prefers the reply of the positive margin, with confidence sigmoid(|margin|); it is
    right if that is the chosen one (a tie: one half). Bins are of equal count but for equal
    confidences, which share a bin."""
    sure = _sigmoid(np.abs(items.margin))
    bins = np.searchsorted(np.sort(sure), sure) * NUM_BINS // len(sure)
    wrong = _count_right(items.margin, 0.5) - sure
    columns = [np.where(bins == number, wrong, 0.0) for number in range(NUM_BINS)]
    return estimate_absolute(*_sum_persons(items, columns), seed=seed)


def _estimate_mean(items: Items, values: Float[np.ndarray, " items"], seed: int) -> Estimate:
    return estimate_means(*_sum_persons(items, [values]), seed=seed)[0]


def _sum_persons(
    items: Items, columns: Sequence[Float[np.ndarray, " items"]]
) -> tuple[Float[np.ndarray, "persons columns"], Float[np.ndarray, " persons"]]:
    """Sums over the pairs of each person, in the order of their names, and the number of pairs."""
    names, numbers = np.unique(items.persons, return_inverse=True)
    sums = [np.bincount(numbers, x, len(names)) for x in (*columns, np.ones(len(numbers)))]
    return np.stack(sums[:-1], axis=1), sums[-1]


def _match(cells: Sequence[Items]) -> list[Items]:
    """The same cells with the pairs alone that all have. Raises: UserError when there is none."""
    common = set(cells[0].keys).intersection(*(items.keys for items in cells[1:]))
    if not common:
        raise UserError(
            "cells to compare: found no pair that all have; score them on the same users"
        )
    return [_take(items, [key in common for key in items.keys]) for items in cells]


def _take(items: Items, mask: Sequence[bool]) -> Items:
    at = np.flatnonzero(mask)
    arrays = {name: getattr(items, name)[at] for name in NUMBERS}
    keys, persons = [items.keys[i] for i in at], [items.persons[i] for i in at]
    return Items(keys, persons, **arrays, groups=[items.groups[i] for i in at])


def _count(
    metric: str, estimate: Estimate, common: Items, first: Items, second: Items
) -> Difference:
    n = len(common.keys)
    return Difference(metric, estimate, n, len(first.keys) - n, len(second.keys) - n)
