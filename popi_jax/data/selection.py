"""Which of a user's signals are shown: "all", "none", or kinds with plus signs between, e.g.
"profile+shots:2" for the profile and the newest two past pairs."""

import dataclasses
import re
from collections.abc import Sequence

from popi_jax.data.records import User
from popi_jax.errors import UserError, did_you_mean

KINDS = ("profile", "survey", "shots", "comments")  # fields of `User`; the last two are lists


def select_signals(users: Sequence[User], selection: str) -> list[User]:
    """The users with the chosen signals alone. Raises: UserError for an unknown kind, or one that
    none of the users has."""
    if selection in ("all", "none"):
        return list(users)
    kept = _parse(selection)
    found = {kind: sum(bool(getattr(user, kind)) for user in users) for kind in KINDS}
    for kind in kept:
        if users and not found[kind]:
            there = ", ".join(kind for kind, count in found.items() if count) or "none"
            raise UserError(
                f'signals "{selection}": no user of these data has {kind}; kinds that are there: '
                f"{there}"
            )
    return [_keep(user, kept) for user in users]


def _keep(user: User, kept: dict[str, int]) -> User:
    changed: dict[str, object] = {"readings": ()}
    for kind in KINDS:
        value = getattr(user, kind)
        if kind not in kept:
            changed[kind] = value[:0]
        elif kept[kind]:
            changed[kind] = value[-kept[kind] :]
    return dataclasses.replace(user, **changed)  # type: ignore[arg-type]


def _parse(selection: str) -> dict[str, int]:
    """Kind -> how many of its newest, 0: all."""
    kept: dict[str, int] = {}
    for part in selection.split("+"):
        kind, colon, number = part.partition(":")
        if kind not in KINDS:
            allowed = f"all, or some of {', '.join(KINDS)} with + between."
            raise UserError(
                f'signals "{selection}": unknown kind "{kind}", allowed: {allowed}'
                f"{did_you_mean(kind, (*KINDS, 'all'))}"
            )
        if colon and (kind not in KINDS[2:] or not re.fullmatch(r"[1-9]\d*", number)):
            raise UserError(
                f'signals "{selection}": "{part}" must be like shots:2 or comments:5, with a whole '
                "number of at least 1"
            )
        kept[kind] = int(number or 0)
    return kept
