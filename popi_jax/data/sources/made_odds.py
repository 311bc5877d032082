"""What can be known of the made people, exactly: how probable each held-out preference is for who
knows nothing, all signals or the truth, by summing over everybody that a user could be."""

import itertools

import numpy as np
from jaxtyping import Float

from popi_jax.data.records import ITEM_SEPARATOR, User
from popi_jax.data.sources.made_world import (
    ATTRIBUTES,
    NUM_ACTIVE,
    STATED,
    STATED_RIGHT,
    STRAY,
    UTILITY,
    Person,
)
from popi_jax.data.sources.source import PairOdds

# items of which a person prefers at most one
CONTRASTS = tuple((first.item, second.item) for first, second in ATTRIBUTES)
_REPLIES = {
    reply: (a, p)
    for a, sides in enumerate(ATTRIBUTES)
    for p, pole in enumerate(sides)
    for reply in pole.replies
}
_STATES = [
    Person(active, poles)
    for active in itertools.combinations(range(len(ATTRIBUTES)), NUM_ACTIVE)
    for poles in itertools.product(range(2), repeat=NUM_ACTIVE)
]
# pole that each state prefers in each attribute, -1 where it does not care
_POLES = np.array(
    [
        [dict(zip(s.active, s.poles, strict=True)).get(a, -1) for a in range(len(ATTRIBUTES))]
        for s in _STATES
    ]
)
_PRIOR = np.ones(len(_STATES))  # weights; all states are equally likely
_ROUNDING = 1e-9  # probabilities that differ by less are equal
_RIGHT = 1.0 / (1.0 + np.exp(-UTILITY))  # probability that the suiting reply wins


def read_reply(reply: str) -> tuple[int, int]:
    """Returns (attribute, pole) that a reply of the sample shows."""
    return _REPLIES[reply]


def find_odds(user: User) -> list[PairOdds]:
    """Returns the odds of each held-out pair of a made user, of `data.score_margin` = 1."""
    items = user.oracle.split(ITEM_SEPARATOR)
    wanted = [[pole.item in items for pole in sides] for sides in ATTRIBUTES]
    truth = np.array([sides.index(True) if any(sides) else -1 for sides in wanted])
    known = (truth == _POLES).all(axis=1).astype(float)
    signals, found = _infer_states(user), []
    for pair in user.pairs:
        a, pole = read_reply(pair.chosen)
        odds = PairOdds(
            nothing=_weigh_pair(_PRIOR, a, pole),
            signals=_weigh_pair(signals, a, pole),
            truth=_weigh_pair(known, a, pole),
            item_for=CONTRASTS[a][pole],
            item_against=CONTRASTS[a][1 - pole],
        )
        found.append(odds)
    return found


def write_best_list(user: User) -> str:
    """The list of at most NUM_ACTIVE items whose reader ranks the most held-out pairs rightly, as
    far as all signals can tell: those of the largest P(wanted) - P(opposite wanted), as a pair is
    about each attribute that a person cares about as often. What nothing speaks for is left out."""
    weights = _infer_states(user)
    surplus: dict[str, float] = {}
    for a, sides in enumerate(ATTRIBUTES):
        wanted = [weights[_POLES[:, a] == p].sum() for p in (0, 1)]
        surplus |= {pole.item: wanted[p] - wanted[1 - p] for p, pole in enumerate(sides)}
    best = sorted(surplus, key=lambda item: -surplus[item])[:NUM_ACTIVE]
    return ITEM_SEPARATOR.join(item for item in best if surplus[item] > _ROUNDING)


def _infer_states(user: User) -> Float[np.ndarray, " states"]:
    """Returns the probability of each state given the self-description and the past pairs."""
    weights = _PRIOR.copy()
    for a, sides in enumerate(ATTRIBUTES):
        cares = _POLES[:, a] >= 0
        said = [p for p, pole in enumerate(sides) if f" {pole.item} ." in f" {user.profile}"]
        if said:
            match = np.where(_POLES[:, a] == said[0], STATED_RIGHT, 1 - STATED_RIGHT)
            weights *= np.where(cares, STATED * match, STRAY)
        else:
            weights *= np.where(cares, 1 - STATED, 1 - 2 * STRAY)
    for shot in user.shots:
        a, pole = read_reply(shot.chosen)
        weights *= np.where(
            _POLES[:, a] < 0, 0.0, np.where(_POLES[:, a] == pole, _RIGHT, 1 - _RIGHT) / NUM_ACTIVE
        )
    return weights / weights.sum()


def _weigh_pair(weights: Float[np.ndarray, " states"], attribute: int, pole: int) -> float:
    """Returns the probability that the reply with this pole wins. That there is a pair about the
    attribute says that the person cares about it."""
    suits, not_suits = (weights[_POLES[:, attribute] == p].sum() for p in (pole, 1 - pole))
    return float((suits * _RIGHT + not_suits * (1 - _RIGHT)) / (suits + not_suits))
