"""Where the loss goes: the nats per pair of a generator behind summaries, as a sum of what nobody
can know, what the signals leave open, what the summary leaves out and what the generator makes of
it.

Exact odds are known of made data alone (`Source.find_odds`). Of a pair let t, u, z be the truth,
the signals and the summary, p the probability of the label that it has, g = sigmoid(margin) that of
the generator, h(p) = -p log p - (1 - p) log(1 - p) and c(p, q) = -p log q - (1 - p) log(1 - q):

    noise              h(p(t))                the choice is random even for who knows the person
    lost_by_signals    h(p(u)) - h(p(t))
    lost_by_summary    c(p(u), p(z)) - h(p(u))
    lost_by_generator  c(p(z), g) - h(p(z))
    chance             -log g - c(p(u), g)    the labels that were drawn, against their odds

Expected labels stand in place of the drawn ones wherever their odds are known. The mean of
c(p(u), p(z)) is the entropy of the label given z, where p(z) are the odds of an ideal reader.

**The ideal reader** knows what a summary means by what it names: it reads how often the two items
of a pair's contrast are named (0, 1, at least 2) and counts, over all pairs, how often the one that
is named more is right (plus one half for either side, with expected labels). It takes all contrasts
and both sides of each as alike, so a summary that names both as often, or neither, tells it
nothing."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from popi_jax.data.sources.source import PairOdds
from popi_jax.diagnostics.estimates import Values, find_nats
from popi_jax.diagnostics.items import list_named

BOUNDS = {"no_signals": "nothing", "signals": "signals", "latent": "truth"}  # name -> who knows it
_COUNTED = 2  # mentions of an item; more are as many
LN2 = float(np.log(2.0))


class Loss(NamedTuple):
    """Nats of each pair; the means of all but `information` add up to the mean of -log g."""

    noise: Values
    lost_by_signals: Values
    lost_by_summary: Values
    lost_by_generator: Values
    chance: Values
    information: Values  # bits that the summary tells an ideal reader


def split_loss(
    margins: Values,
    odds: Sequence[PairOdds],
    mentions: Int[np.ndarray, "rows 2"],
    *,
    of_truth: bool = False,
) -> Loss:
    """Splits the loss of pairs. mentions: as `count_mentions` counts. of_truth: the summaries were
    written from the truth, not from the signals, so that expected labels are those given it."""
    truth, signals, nothing = (
        np.array([getattr(each, name) for each in odds], np.float64)
        for name in ("truth", "signals", "nothing")
    )
    known = truth if of_truth else signals
    read = read_ideally(known, mentions)
    nats, against = find_nats(margins), find_nats(-np.asarray(margins))
    open_to_reader = _cross(known, read)
    return Loss(
        noise=_entropy(truth),
        lost_by_signals=_entropy(signals) - _entropy(truth),
        lost_by_summary=open_to_reader - _entropy(signals),
        lost_by_generator=read * nats + (1 - read) * against - _entropy(read),
        chance=(1 - known) * (nats - against),
        information=(_entropy(nothing) - open_to_reader) / LN2,
    )


def read_ideally(known: Values, mentions: Int[np.ndarray, "rows 2"]) -> Values:
    """The odds of the ideal reader; known: the expected label of each pair, given what the summary
    was written from."""
    counts = np.minimum(mentions, _COUNTED)
    lead = np.sign(counts[:, 0] - counts[:, 1])
    right = np.where(lead > 0, known, 1 - known)  # that the item that leads speaks for the label
    read = np.full(len(known), 0.5)
    for most in range(1, _COUNTED + 1):
        for least in range(most):
            rows = (counts.max(axis=1) == most) & (counts.min(axis=1) == least)
            odds = (right[rows].sum() + 0.5) / (rows.sum() + 1)
            read[rows] = np.where(lead[rows] > 0, odds, 1 - odds)
    return read


def count_mentions(summary: str, pair: PairOdds) -> tuple[int, int]:
    """How often a summary names the item for the chosen reply, and the one against it."""
    items = list_named(summary)
    return items.count(pair.item_for), items.count(pair.item_against)


def expect_accuracy(known: Values, mentions: Int[np.ndarray, "rows 2"]) -> float:
    """Of a reader who follows the item that is named more, and guesses where none is. known: the
    expected label of each pair."""
    lead = np.sign(mentions[:, 0] - mentions[:, 1])
    return float(np.mean(0.5 + lead * (known - 0.5)))


def find_optimum(odds: Sequence[PairOdds]) -> dict[str, float]:
    """The best expected accuracy that any model could reach, by what it knows: BOUNDS."""
    found = {name: [getattr(each, field) for each in odds] for name, field in BOUNDS.items()}
    return {name: float(np.mean(np.maximum(p, 1 - np.array(p)))) for name, p in found.items()}


def _entropy(p: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    """0 at 0 and 1."""
    return _cross(p, np.clip(p, 1e-300, 1.0))


def _cross(p: Values, q: Values) -> Values:
    return -p * np.log(q) - (1 - p) * np.log(np.maximum(1 - q, 1e-300))
