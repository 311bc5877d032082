"""Raw files -> checked users -> a prepared copy, read lazily by index.

A copy lies in <prepared>/<source>/<key>/ where the key is a sha256 over the source files, the
options that matter and FORMAT: whoever changes one of them gets another copy, and a stale one is
never read. Users are written as the source yields them, so that memory does not grow with the
rows."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from popi_jax import files
from popi_jax.config_data import DataConfig
from popi_jax.config_rules import list_settings
from popi_jax.data import leaks, prepared_files
from popi_jax.data.leaks import Leak, LeakFinder
from popi_jax.data.prepared_files import FileSums, UserWriter
from popi_jax.data.read_ahead import read_ahead
from popi_jax.data.records import SPLITS, User
from popi_jax.data.sources import (
    alignx,
    download,
    elix,
    jsonl,
    made_people,
    personamem,
    prefeval,
    prism,
    psoups,
    review,
    roleplay,
    ufp4,
)
from popi_jax.data.sources.source import FilesMissing, Loaded, Source
from popi_jax.errors import UserError, did_you_mean
from popi_jax.progress import Progress

# all data sets; the values of data.source in config_data.py are those that stand in for no other
SOURCES = (
    prism.SOURCE,
    elix.SOURCE,
    review.SOURCE,
    roleplay.SOURCE,
    alignx.SOURCE,
    psoups.SOURCE,
    ufp4.SOURCE,
    prefeval.SOURCE,
    personamem.SOURCE,
    jsonl.SOURCE,
    made_people.SOURCE,
)
FORMAT = 4  # raise it whenever a source or `User` changes what it makes of the same files
OPTIONS = [field.name for field in list_settings(DataConfig) if field.data]
_LARGE = 10_000  # users: from so many on, another process reads them
_SHOWN = 8  # leaks of a kind that an error names
_TOLD_AFTER = 2000  # users: so often the progress is shown


class Dataset(NamedTuple):
    source: Source
    folder: Path  # of the raw files
    prepared: Path  # of the prepared copy; prepared_files.py says what is in it
    splits: dict[str, Sequence[User]]  # train, validation, test
    # split -> users, pairs, and what `_Tally` counts; "rows" -> skipped; "leaks", "left_out",
    # "counts" -> numbers by name
    stats: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        """The value of data.source."""
        return self.source.stands_in_for or self.source.name

    @property
    def data(self) -> str:
        """published, own or sample."""
        return self.source.kind


def prepare(cfg: Any, *, allow_sample: bool, trained_on: str = "") -> Dataset:
    """Returns the users of a source; writes the prepared copy when there is none yet, or it is
    damaged.

    Args:
        cfg: the `data` part of the configuration.
        allow_sample: whether made data may stand in for files that are neither there nor to be had.
        trained_on: `Dataset.data` of the run that the users are for, "" for a new one. A run that
            was trained on the sample goes on with it, without another try to download the files.
    Raises: UserError."""
    source, folder = _find(cfg, allow_sample, trained_on)
    cfg = _choose_form(cfg, source)
    sums = FileSums(Path(cfg.prepared)).read(folder, source.files(folder))
    download.check_download(folder, sums, cfg.revision)
    options = {name: getattr(cfg, name) for name in OPTIONS}
    content = json.dumps([FORMAT, options, sums], sort_keys=True)
    home = Path(cfg.prepared) / cfg.source / hashlib.sha256(content.encode()).hexdigest()[:12]
    stats = prepared_files.read_stats(home)
    if stats is None:
        logging.info("Preparing %s from %s into %s", cfg.source, folder, home)
        with prepared_files.tell_unwritable(cfg.prepared):
            _write(source, folder, cfg, home)
        stats = prepared_files.read_stats(home) or {}
    if skipped := stats["rows"]["skipped"]:
        logging.warning("%d bad rows were skipped: see %s", skipped, home / "bad_rows.jsonl")
    if count := sum(stats["leaks"].values()):
        logging.warning("%d leaks were left out: see %s", count, home / "leaks.jsonl")
    splits = {split: prepared_files.open_users(home, split, stats) for split in SPLITS}
    return Dataset(source, folder, home, splits, stats)


def _choose_form(cfg: Any, source: Source) -> Any:
    """`cfg` with the form and the way of splitting that "" stands for. Raises: UserError for one
    that the source does not have."""
    chosen = {}
    for field, allowed in (("form", source.forms), ("split_by", source.splits)):
        value = getattr(cfg, field) or allowed[0]
        if value not in allowed:
            words = ", ".join(filter(None, allowed)) or "none"
            hint = did_you_mean(value, allowed)
            raise UserError(
                f'field "data.{field}": found "{value}", allowed for {source.name}: {words}.{hint}'
            )
        chosen[field] = value
    return dataclasses.replace(cfg, **chosen)


def find_source(name: str, kind: str = "") -> Source:
    """Returns the source of a value of data.source; with kind "sample" the one that stands in for
    it.

    Raises: UserError."""
    names = [source.name for source in SOURCES if not source.stands_in_for]
    if name not in names:
        near = did_you_mean(name, names)
        raise UserError(f'field "data.source": found "{name}", allowed: {", ".join(names)}.{near}')
    wanted = "stands_in_for" if kind == "sample" else "name"
    return next(source for source in SOURCES if getattr(source, wanted) == name)


def _find(cfg: Any, allow_sample: bool, trained_on: str) -> tuple[Source, Path]:
    """Returns the source of the data, and the folder or file where they are."""
    source = find_source(cfg.source)
    made = [other for other in SOURCES if allow_sample and other.stands_in_for == source.name]
    goes_on = trained_on in [other.kind for other in made]
    try:
        return source, source.find(cfg, cfg.download and not goes_on)
    except FilesMissing as e:
        if not made:
            raise
        folder = made[0].find(cfg, False)
        if not goes_on:
            logging.warning(
                "\n%s\n%s\nGoing on with MADE data in the format of %s: %s\nNumbers from it say "
                "nothing about %s.\n%s",
                *("*" * 100, e, source.name, folder, source.name, "*" * 100),
            )
        return made[0], folder


def _write(source: Source, folder: Path, cfg: Any, home: Path) -> None:
    """Writes a prepared copy. Raises: UserError, after which nothing of it is left."""
    loaded = source.load(folder, cfg)
    if loaded.total >= _LARGE:
        loaded = read_ahead(loaded, source.load, folder, cfg)
    finder = LeakFinder(shared_replies=loaded.shared_replies, shared_people=cfg.split_by != "user")
    tally, found = _Tally(), list[Leak]()
    total = loaded.total or (len(loaded.users) if isinstance(loaded.users, Sized) else 0)
    progress = Progress(total, label=f"preparing {source.name}", unit="users")
    with files.make_folder(home) as part, progress:
        writer = UserWriter(part / prepared_files.VERSION, home.parent.name)
        for number, user in enumerate(loaded.users, 1):
            leaking = finder.check(user)
            if leaking:
                found += leaking
                user = leaks.leave_out(user, leaking)
            if not leaking or user.pairs:
                tally.add(user)
                writer.add(user)
            if number % _TOLD_AFTER == 0:
                progress.update(number)
        writer.close()
        if found and cfg.on_leak == "error":
            raise UserError(_tell_leaks(found, folder))
        _check_splits(loaded, tally, folder, cfg)
        files.write_jsonl(part / "bad_rows.jsonl", [{"error": told} for told in loaded.bad_rows])
        files.write_jsonl(part / "leaks.jsonl", [leak._asdict() for leak in found])
        stats = tally.to_json(finder.duplicates) | {
            "rows": {"skipped": len(loaded.bad_rows)},
            "leaks": dict(Counter(leak.kind for leak in found)),
            "looked_for": finder.kinds,
            "left_out": loaded.left_out,
            "counts": loaded.counts,
        }
        prepared_files.seal(part, stats)


class _Tally:
    """Counts what is written, by split."""

    def __init__(self) -> None:
        self._ids: dict[str, set[str]] = {split: set() for split in SPLITS}
        self._pairs: dict[str, Counter[int]] = {split: Counter() for split in SPLITS}
        self._longer: Counter[str] = Counter()

    def add(self, user: User) -> None:
        """Raises: UserError for a user who was there."""
        if user.user_id in self._ids[user.split]:
            raise UserError(f'{user.split}: two users have the id "{user.user_id}"; rename one')
        self._ids[user.split].add(user.user_id)
        self._pairs[user.split][len(user.pairs)] += 1
        self._longer[user.split] += sum(len(p.chosen) > len(p.rejected) for p in user.pairs)

    def count_users(self, split: str = "") -> int:
        return sum(len(ids) for name, ids in self._ids.items() if split in ("", name))

    def to_json(self, duplicates: Counter[str]) -> dict[str, Any]:
        return {
            split: {
                "users": self.count_users(split),
                "pairs": sum(n * users for n, users in self._pairs[split].items()),
                "pairs_per_user": dict(sorted(self._pairs[split].items())),
                "chosen_longer": self._longer[split],
                "duplicates": duplicates[split],
            }
            for split in SPLITS
        }


def _tell_leaks(found: list[Leak], folder: Path) -> str:
    parts = []
    for kind, meaning in leaks.KINDS.items():
        own = [leak.tell() for leak in found if leak.kind == kind]
        if own:
            more = f", and {len(own) - _SHOWN} more" if len(own) > _SHOWN else ""
            parts.append(f"{len(own)} where {meaning} ({', '.join(own[:_SHOWN])}{more})")
    return (
        f"{folder}: held-out pairs leak: {'; '.join(parts)}. Correct the data, or leave them out "
        "with data.on_leak=skip"
    )


def _check_splits(loaded: Loaded, tally: _Tally, folder: Path, cfg: Any) -> None:
    """Raises UserError when a split that must hold users holds none."""
    total = tally.count_users()
    if not total:
        told = f"{folder}: found no user with signals and a held-out pair, allowed: at least one"
        bad = loaded.bad_rows
        raise UserError(f"{told}; the first of {len(bad)} bad rows: {bad[0]}" if bad else told)
    fractions = {split: getattr(cfg, f"{split}_fraction") for split in SPLITS[1:]}
    for split, fraction in {"train": 1.0, **fractions}.items():
        if fraction > 0 and not tally.count_users(split):
            change = f"Raise data.{split}_fraction (now {fraction}), or set it to 0"
            if split == "train":
                change = "Lower the fractions"
            told = f"{folder}: the {split} split of {total} users is empty"
            raise UserError(f"{told}. {change}, or add users.")
