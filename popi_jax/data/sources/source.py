"""What the package knows of a data set. A new one is a file beside this one that holds a `SOURCE`,
and its place in `SOURCES` of data/prepared.py."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from popi_jax.data.records import User
from popi_jax.errors import UserError


class FilesMissing(UserError):
    """The files of a source are neither there nor to be had."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a source makes of its files. `users` may be read once; the others are complete when all
    users have been read, so that a large set needs no memory."""

    users: Iterable[User]
    bad_rows: list[str]  # the message of each row that was set aside
    # known peculiarities of a published set: reason -> how many rows were left out for it
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    # what was found in the files, under the names of `Card.counts`
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    # replies come from a small pool that all people share, so equal ones are no leak
    shared_replies: bool = False
    total: int = 0  # how many users there will be, about; 0 = unknown; for the progress bar


class Card(NamedTuple):
    """What those must know who use a data set, or models that were trained on it."""

    title: str  # "PRISM (arXiv 2404.16019)"
    citation: str  # authors, title, year
    page: str  # where it is published: "huggingface.co/datasets/..."
    licence: str  # one sentence, and what it means for weights; "none stated: ..."
    forbids: str = ""  # "" where the licence forbids nothing that training does
    counts: dict[str, int] = {}  # as published: {"rows": 600}
    not_published: str = ""  # what is unknown, so that ours is a choice


class PairOdds(NamedTuple):
    """What is known of a held-out pair of a made user: the probability that the reply that was
    chosen would be, for who knows ..."""

    nothing: float  # ... nothing of the user
    signals: float  # ... all signals
    truth: float  # ... the true preferences
    # items of a summary; no other item says anything of the pair
    item_for: str  # that speaks for the chosen reply
    item_against: str


def take_path(cfg: Any, download: bool) -> Path:
    """Returns `data.path`; nothing is downloaded."""
    del download
    return Path(cfg.path)


class Source(NamedTuple):
    """One data set. `cfg` is the `data` part of the configuration; all functions raise
    UserError."""

    name: str  # the value of data.source
    kind: str  # published | own | sample: made by a program
    card: Card
    options: Sequence[str]  # the fields of `cfg` that `load` reads
    files: Callable[[Path], list[Path]]  # those in a folder, or the file itself, that `load` reads
    load: Callable[[Path, Any], Loaded]
    # (cfg, whether it may download) -> the folder or file; FilesMissing lets a sample stand in
    find: Callable[[Any, bool], Path] = take_path
    forms: tuple[str, ...] = ("",)  # values of data.form, the first is meant by ""
    splits: tuple[str, ...] = ("user",)  # values of data.split_by, the first is meant by ""
    stands_in_for: str = ""  # of a sample: the source in whose format it is
    lists_items: bool = False  # whether oracle summaries are lists of items, not free text
    contrasts: tuple[tuple[str, str], ...] = ()  # items of which a person wants at most one
    find_odds: Callable[[User], list[PairOdds]] | None = None  # of each pair of a made user
    # of a made user: the list of as many items as a persona has that no other from the same
    # signals surpasses
    write_best_list: Callable[[User], str] | None = None

    @property
    def licence(self) -> str:
        """One sentence for `make data` and model cards."""
        return f"{self.card.title}: {self.card.licence}"
