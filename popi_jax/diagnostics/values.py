"""The values of a look at some users, by name, from the margins of their pairs and the texts of
their summaries. numpy on the host; docs/diagnostics.md says what each means."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float

from popi_jax.data.records import User
from popi_jax.data.sources.source import PairOdds, Source
from popi_jax.diagnostics.decomposition import LN2, Loss, count_mentions, split_loss
from popi_jax.diagnostics.estimates import Estimate, Persons, calibrate, find_nats
from popi_jax.diagnostics.items import measure_items, measure_phrases

Margins: TypeAlias = Float[np.ndarray, "users pairs"]
Mask: TypeAlias = Bool[np.ndarray, "users pairs"]

NOTHING = "none"  # the condition that others are compared with
OF_THE_LOSS = ("noise", "lost_by_signals", "lost_by_summary", "lost_by_generator", "chance")


def describe_margins(
    margins: Mapping[str, Margins], masks: Mapping[str, Mask], persons: Persons
) -> dict[str, float]:
    """nats, acc and, against no text on the same pairs, bits of each condition: as they are, and
    after one scale of the margins that is fitted to other persons. masks: the pairs that count."""
    found = dict[str, float]()
    for name, mask in masks.items():
        if not mask.any():
            continue
        own, nothing = margins[name][mask], margins[NOTHING][mask]
        found[f"nats_{name}"] = float(find_nats(own).mean())
        found[f"acc_{name}"] = float(np.mean((own > 0) + 0.5 * (own == 0)))
        if name != NOTHING:
            found[f"bits_{name}"] = find_gain(nothing, own)
            who = np.broadcast_to(persons[:, None], mask.shape)[mask]
            scaled = (calibrate(each, who) for each in (nothing, own))
            found[f"bits_{name}_calibrated"] = find_gain(*scaled)
    return found


def find_gain(before: Float[np.ndarray, " pairs"], after: Float[np.ndarray, " pairs"]) -> float:
    """Bits per pair that the second margins save."""
    return float(np.mean(find_nats(before) - find_nats(after))) / LN2


def describe_samples(
    margins: Float[np.ndarray, "users group pairs"], mask: Mask
) -> dict[str, float]:
    """nats and acc of sampled summaries."""
    own = margins[np.broadcast_to(mask[:, None], margins.shape)]
    right = np.mean((own > 0) + 0.5 * (own == 0))
    return {"nats_sampled": float(find_nats(own).mean()), "acc_sampled": float(right)}


def describe_judge(margins: Margins, nothing: Margins, mask: Mask) -> dict[str, float]:
    """nats and bits by a generator that was not trained with the summaries."""
    own = margins[mask]
    gain = find_gain(nothing[mask], own)
    return {"nats_start_judge": float(find_nats(own).mean()), "bits_start_judge": gain}


def measure_reliability(rewards: Float[np.ndarray, "users group pairs"], mask: Mask) -> float:
    """The share of the variance, within the group of a user, of the reward of a summary on one pair
    that another pair would repeat: a / (a + e) of the model user + summary (variance a) + pair +
    rest (e), by analysis of variance over all users with at least two pairs; 0 where a is estimated
    below 0."""
    group, rest, freedom = rewards.shape[1] - 1, 0.0, 0.0
    between, weight, users = 0.0, 0.0, 0
    for own, counted in zip(rewards.astype(np.float64), mask, strict=True):
        r = own[:, counted]
        if r.shape[1] < 2:
            continue
        of_summary, of_pair = r.mean(axis=1, keepdims=True), r.mean(axis=0, keepdims=True)
        rest += np.sum((r - of_summary - of_pair + r.mean()) ** 2)
        freedom += group * (r.shape[1] - 1)
        between += r.shape[1] * np.sum((of_summary - r.mean()) ** 2)
        weight += r.shape[1] * group
        users += 1
    if freedom == 0:
        return float("nan")
    error = rest / freedom
    signal = max((between - users * group * error) / weight, 0.0)
    return signal / (signal + error) if signal + error > 0 else 0.0


def list_odds(source: Source, users: Sequence[User], mask: Mask) -> list[list[PairOdds]]:
    """The odds of the pairs that count of each user; [] where the source knows none."""
    if source.find_odds is None:
        return []
    found = [source.find_odds(user) for user in users]
    return [
        [odds[k] for k in np.flatnonzero(counted)]
        for odds, counted in zip(found, mask, strict=True)
    ]


def split_nats(
    margins: Float[np.ndarray, " pairs"],
    odds: Sequence[Sequence[PairOdds]],
    summaries: Sequence[str],
    *,
    of_truth: bool = False,
) -> Loss:
    """The parts of the loss of the pairs that count; odds: as `list_odds` gives them; margins: of
    these pairs, one user after another."""
    told = [
        count_mentions(summary, pair)
        for summary, own in zip(summaries, odds, strict=True)
        for pair in own
    ]
    mentions = np.array(told).reshape(-1, 2)
    return split_loss(margins, [p for own in odds for p in own], mentions, of_truth=of_truth)


def describe_loss(
    margins: Float[np.ndarray, " pairs"],
    odds: Sequence[Sequence[PairOdds]],
    summaries: Sequence[str],
) -> dict[str, float]:
    """The parts of the loss, which add up, and the information in the summaries."""
    loss = split_nats(margins, odds, summaries)._asdict()
    return {name: float(loss[name].mean()) for name in (*OF_THE_LOSS, "information")}


def describe_texts(
    summaries: Sequence[str], users: Sequence[User], persons: Persons, source: Source
) -> dict[str, Estimate]:
    """What summaries name where they are lists of known items, else the phrases that repeat."""
    if source.lists_items and source.contrasts:
        return measure_items(summaries, users, source.contrasts, persons)
    return measure_phrases(summaries, persons)
