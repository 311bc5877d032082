"""What the package knows of a data set. A new one is a file beside this one that holds a `SOURCE`,
and its place in `SOURCES` of data/prepared.py."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from popi_jax.data.records import User
from popi_jax.errors import UserError


class FilesMissing(UserError):
    """The files of a source are neither there nor to be had."""


class Loaded(NamedTuple):
    """What a source makes of its files: users, and the message of each row that was set aside."""

    users: list[User]
    bad_rows: list[str]


def take_path(cfg: Any, download: bool) -> Path:
    """Returns `data.path`; nothing is downloaded."""
    del download
    return Path(cfg.path).expanduser()


class Source(NamedTuple):
    """One data set. `cfg` is the `data` part of the configuration; all functions raise
    UserError."""

    name: str  # the value of data.source
    kind: str  # published | own | sample: made by a program
    licence: str  # what those must know who use models that were trained on it
    options: tuple[str, ...]  # the fields of `cfg` that `load` reads
    files: Callable[[Path], list[Path]]  # those in a folder, or the file itself, that `load` reads
    load: Callable[[Path, Any], Loaded]
    # (cfg, whether it may download) -> the folder or file; FilesMissing lets a sample stand in
    find: Callable[[Any, bool], Path] = take_path
    stands_in_for: str = ""  # of a sample: the source in whose format it is
    lists_items: bool = False  # whether oracle summaries are lists of items, not free text
    # users -> the best accuracy that any model could reach on them, by what it knows
    compute_optimum: Callable[[Iterable[User]], dict[str, float]] | None = None
