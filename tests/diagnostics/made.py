"""Made users drawn from the process as docs/datasets.md tells it, written anew: no code of the
package draws or infers anything here."""

from typing import NamedTuple

import numpy as np

from popi_jax.data.records import Pair, Shot, User
from popi_jax.data.sources.made_people import ATTRIBUTES

RIGHT = 1 / (1 + np.exp(-2.5))
ITEMS = [[pole.item for pole in sides] for sides in ATTRIBUTES]


class Drawn(NamedTuple):
    users: list[User]
    # of each pair: attribute, pole of the chosen reply, whether that is the preferred one
    attribute: np.ndarray  # [users pairs]
    pole: np.ndarray
    right: np.ndarray
    stated: np.ndarray  # [users 8]: the pole that the profile names, -1
    shown: np.ndarray  # [users 8]: past pairs won by pole 0 less those won by pole 1


def draw_users(count: int, pairs: int, *, seed: int, shots: int = 6) -> Drawn:
    rng = np.random.default_rng(seed)
    active = np.argsort(rng.random((count, 8)), axis=1)[:, :3]
    poles = rng.integers(0, 2, (count, 3))
    wanted = np.full((count, 8), -1)
    np.put_along_axis(wanted, active, poles, axis=1)
    cares = wanted >= 0
    truthful = np.where(rng.random((count, 8)) < 0.9, wanted, 1 - wanted)
    said = rng.random((count, 8)) < np.where(cares, 0.4, 0.04)
    stated = np.where(said, np.where(cares, truthful, rng.integers(0, 2, (count, 8))), -1)

    def compare(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        slot = rng.integers(0, 3, (count, number))
        attribute = np.take_along_axis(active, slot, axis=1)
        right = rng.random((count, number)) < RIGHT
        best = np.take_along_axis(poles, slot, axis=1)
        return attribute, np.where(right, best, 1 - best), right

    past, past_pole, _ = compare(shots)
    attribute, pole, right = compare(pairs)
    shown = np.zeros((count, 8), int)
    for k in range(shots):
        np.add.at(shown, (np.arange(count), past[:, k]), 1 - 2 * past_pole[:, k])

    def reply(a: int, p: int) -> str:
        return ATTRIBUTES[a][p].replies[rng.integers(2)]

    users = []
    for n in range(count):
        profile = "i have two cats . " + " ".join(
            f"i like {ITEMS[a][stated[n, a]]} ." for a in np.flatnonzero(stated[n] >= 0)
        )
        some = [
            Shot("p", reply(a, p), reply(a, 1 - p))
            for a, p in zip(past[n], past_pole[n], strict=True)
        ]
        held_out = [
            Pair(f"{n}-{k}", [], reply(a, p), reply(a, 1 - p))
            for k, (a, p) in enumerate(zip(attribute[n], pole[n], strict=True))
        ]
        oracle = " ; ".join(ITEMS[a][wanted[n, a]] for a in np.flatnonzero(cares[n]))
        users.append(User(f"u{n}", profile, "", tuple(some), (), tuple(held_out), oracle=oracle))
    return Drawn(users, attribute, pole, right, stated, shown)
