"""Which users are one person, and who stands in for whom where a text about another one is told.

A person whose signals were drawn several times is "ann", "ann#2", ...: one person still."""

from collections.abc import Sequence

import numpy as np

from popi_jax.data.records import User


def name_persons(users: Sequence[User]) -> list[str]:
    return [user.user_id.split("#")[0] for user in users]


def find_others(users: Sequence[User]) -> list[int]:
    """For each user the number of another one.

    The users are rotated by the least number of places that gives the fewest of them a summary of
    themselves."""
    persons = np.unique(name_persons(users), return_inverse=True)[1]
    count = len(persons)
    same = [int((persons == np.roll(persons, -shift)).sum()) for shift in range(1, count)]
    shift = 1 + int(np.argmin(same)) if same else 0
    return [(number + shift) % count for number in range(count)]


def have_others(users: Sequence[User]) -> list[bool]:
    """Whether `find_others` finds another person for each user."""
    names = name_persons(users)
    return [name != names[other] for name, other in zip(names, find_others(users), strict=True)]
