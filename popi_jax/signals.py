"""The kinds of a user's signals, and how some of them are named: "profile+shots:2" for the profile
and the newest two past pairs."""

import re

from popi_jax.errors import UserError, did_you_mean

SIGNALS = ("profile", "survey", "shots", "comments")  # fields of `User`; the last two are lists


def parse_signals(selection: str, where: str) -> dict[str, int]:
    """Parses a selection of signals, kinds with plus signs between, like "profile+shots:2": kind ->
    how many of its newest, 0: all. where: how errors begin.

    Raises: UserError."""
    kept: dict[str, int] = {}
    for part in selection.split("+") if selection != "all" else SIGNALS:
        kind, colon, number = part.partition(":")
        if kind not in SIGNALS:
            allowed = f"all, or some of {', '.join(SIGNALS)} with + between."
            hint = did_you_mean(kind, (*SIGNALS, "all"))
            raise UserError(f'{where}: unknown kind "{kind}", allowed: {allowed}{hint}')
        if colon and (kind not in SIGNALS[2:] or not re.fullmatch(r"[1-9]\d*", number)):
            raise UserError(
                f'{where}: "{part}" must be like shots:2 or comments:5, with a whole number of at '
                "least 1"
            )
        kept[kind] = int(number or 0)
    return kept
