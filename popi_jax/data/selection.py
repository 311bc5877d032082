"""Parts of a user's signals: kinds that are selected, such as "profile+shots:2" for the profile and
the newest two past pairs; a random part; and whole items that give way where all are too long."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from popi_jax.data.records import User
from popi_jax.errors import UserError
from popi_jax.signals import SIGNALS, parse_signals

_LOOKED_AT = 512  # users, evenly spaced, of whom one must have each kind that is asked for


@dataclasses.dataclass(frozen=True)
class Selected(Sequence[User]):
    """Users with the selected signals alone; each is read when it is asked for."""

    users: Sequence[User]
    selection: str

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return keep_signals(self.users[index], self.selection)


def select_splits(
    splits: Mapping[str, Sequence[User]], selection: str
) -> dict[str, Sequence[User]]:
    """The splits under `data.signals`. Raises: UserError for a kind that none of the training users
    looked at has."""
    if selection == "all":
        return dict(splits)
    train = splits["train"]
    stride = max(len(train) // _LOOKED_AT, 1)
    _check_found([train[i] for i in range(0, len(train), stride)], selection)
    return {name: Selected(users, selection) for name, users in splits.items()}


def select_signals(users: Sequence[User], selection: str) -> list[User]:
    """The users with the selected signals alone; "none" is the name of what reads no signals, and
    leaves the users as they are. Raises: UserError for an unknown kind, or one that none of the
    users has."""
    if selection in ("all", "none"):
        return list(users)
    _check_found(users, selection)
    return [keep_signals(user, selection) for user in users]


def keep_signals(user: User, selection: str) -> User:
    """The user with the selected signals alone. Reading exercises stay with their past pairs; what
    is stated goes with what states it."""
    if selection == "all":
        return user
    kept, changed = _parse(selection), dict[str, Any]()
    for kind in SIGNALS:
        value = getattr(user, kind)
        changed[kind] = value[-kept[kind] :] if kind in kept else value[:0]
    if any(getattr(user, kind) and not changed[kind] for kind in ("profile", "survey")):
        changed["stated"] = ""
    left = range(len(user.shots) - len(changed["shots"]), len(user.shots))
    return dataclasses.replace(user, readings=_pick_readings(user, left), **changed)


def draw_signals(user: User, rng: np.random.Generator) -> User:
    """A random part of the past pairs and of the comments, in their order: of each list any number
    of items, all numbers being as likely. Profile and survey stay.

    Drawn again where nothing at all would be shown of a user who has something."""
    lists = {"shots": user.shots, "comments": user.comments}
    while True:
        drawn = {name: _draw_places(len(items), rng) for name, items in lists.items()}
        if user.profile or user.survey or any(drawn.values()) or not any(lists.values()):
            break
    return dataclasses.replace(
        user,
        shots=tuple(user.shots[k] for k in drawn["shots"]),
        comments=tuple(user.comments[k] for k in drawn["comments"]),
        readings=_pick_readings(user, drawn["shots"]),
    )


def list_item_sizes(user: User) -> list[int]:
    """Characters of each item of the signals, in the order in which they give way: the oldest
    comments, the oldest past pairs, the survey from its end, the profile.

    An item of the survey is a line, or an answer where "; " stands between them."""
    sizes = [len(c.prompt) + len(c.comment) for c in user.comments]
    sizes += [len(s.prompt) + len(s.chosen) + len(s.rejected) for s in user.shots]
    sizes += [len(line) for line in _split_survey(user.survey)[1][::-1]]
    return sizes + [len(user.profile)] * bool(user.profile)


def drop_items(user: User, count: int) -> User:
    """The user without the first `count` items of `list_item_sizes`."""
    between, lines = _split_survey(user.survey)
    comments = min(count, len(user.comments))
    shots = min(count - comments, len(user.shots))
    said = min(count - comments - shots, len(lines))
    return dataclasses.replace(
        user,
        comments=user.comments[comments:],
        shots=user.shots[shots:],
        survey=between.join(lines[: len(lines) - said]),
        profile=user.profile if count <= comments + shots + said else "",
    )


def _split_survey(survey: str) -> tuple[str, list[str]]:
    """What stands between its items, and these."""
    between = "\n" if "\n" in survey else "; "
    return between, survey.split(between) if survey else []


def _draw_places(count: int, rng: np.random.Generator) -> list[int]:
    number = rng.integers(count + 1)
    return sorted(rng.permutation(count)[:number].tolist())


def _pick_readings(user: User, places: Sequence[int]) -> tuple[Any, ...]:
    """The exercises on the past pairs at these places."""
    aligned = len(user.readings) == len(user.shots)
    return tuple(user.readings[k] for k in places) if aligned else ()


def _check_found(users: Sequence[User], selection: str) -> None:
    found = {kind: sum(bool(getattr(user, kind)) for user in users) for kind in SIGNALS}
    for kind in _parse(selection):
        if users and not found[kind]:
            there = ", ".join(kind for kind, count in found.items() if count) or "none"
            raise UserError(
                f'signals "{selection}": no user of these data has {kind}; kinds that are there: '
                f"{there}"
            )


@functools.lru_cache(64)
def _parse(selection: str) -> Mapping[str, int]:
    return parse_signals(selection, f'signals "{selection}"')
