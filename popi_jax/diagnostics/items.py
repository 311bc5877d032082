"""What summaries name, against what their users want, of sources whose summaries are lists of
items; of free text, phrases that repeat. Plain Python and numpy."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from popi_jax.data.records import ITEM_SEPARATOR, User
from popi_jax.diagnostics.estimates import Estimate, Persons, divide

PHRASE = 3  # words


class Counts(NamedTuple):
    """Of one summary; each item counts once."""

    named: int  # known items
    right: int  # of these, what the user wants
    wrong_sign: int  # of these, the opposite of what the user wants
    stated: int  # what the user wants and the profile says ...
    stated_named: int
    implied: int  # ... what it does not say, but at least one past pair shows
    implied_named: int


# name -> (a part, of which whole)
RATES = {
    "precision": ("right", "named"),
    "recall_stated": ("stated_named", "stated"),
    "recall_implied": ("implied_named", "implied"),
    "wrong_sign": ("wrong_sign", "named"),
}


def measure_items(
    summaries: Sequence[str],
    users: Sequence[User],
    contrasts: Sequence[tuple[str, str]],
    persons: Persons,
) -> dict[str, Estimate]:
    """RATES and `repeats`, items of a summary that it has named before, of summaries that are
    lists; a rate whose whole is 0 is NaN."""
    each = [count_items(s, user, contrasts) for s, user in zip(summaries, users, strict=True)]
    columns = {name: np.array([getattr(c, name) for c in each], float) for name in Counts._fields}
    found = {
        name: divide(columns[part], columns[whole], persons)
        for name, (part, whole) in RATES.items()
    }
    repeats = np.array([count_repeated(list_named(summary)) for summary in summaries], float)
    return found | {"repeats": divide(repeats, np.ones(len(repeats)), persons)}


def measure_phrases(summaries: Sequence[str], persons: Persons) -> dict[str, Estimate]:
    """`repeats` of free text: runs of PHRASE words that the summary has had before."""
    repeats = [count_repeated(list_phrases(summary)) for summary in summaries]
    return {"repeats": divide(np.array(repeats, float), np.ones(len(repeats)), persons)}


def count_items(summary: str, user: User, contrasts: Sequence[tuple[str, str]]) -> Counts:
    """`contrasts` hold all known items; what else a summary says is not counted."""
    opposite = {a: b for pair in contrasts for a, b in (pair, pair[::-1])}
    named = {item for item in list_named(summary) if item in opposite}
    wanted = {item for item in user.oracle.split(ITEM_SEPARATOR) if item in opposite}
    stated = wanted & {*user.stated.split(ITEM_SEPARATOR)}
    implied = (wanted - stated) & {reading.answer for reading in user.readings}
    return Counts(
        named=len(named),
        right=len(named & wanted),
        wrong_sign=sum(opposite[item] in wanted for item in named),
        stated=len(stated),
        stated_named=len(stated & named),
        implied=len(implied),
        implied_named=len(implied & named),
    )


def list_named(summary: str) -> list[str]:
    """The items of a summary that is a list of items, in order."""
    parts = (" ".join(part.split()) for part in summary.split(ITEM_SEPARATOR.strip()))
    return [part for part in parts if part]


def count_repeated(parts: Sequence[object]) -> int:
    return len(parts) - len({*parts})


def list_phrases(text: str) -> list[tuple[str, ...]]:
    words = text.casefold().split()
    return [tuple(words[i : i + PHRASE]) for i in range(len(words) - PHRASE + 1)]
