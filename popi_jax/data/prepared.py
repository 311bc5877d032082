"""Raw files -> checked users -> a TFDS dataset of ArrayRecord files, read lazily by index.

A prepared copy lies in <prepared>/<source>/<key>/ where the key is a sha256 over the source files,
the options that matter and FORMAT: whoever changes one of them gets another copy, and a stale one
is never read. One example is one user, as JSON. TensorFlow is not needed."""

import contextlib
import dataclasses
import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from popi_jax import files
from popi_jax.config import DataConfig
from popi_jax.config_rules import list_settings
from popi_jax.data.records import SPLITS, User
from popi_jax.data.sources import (
    download,
    elix,
    jsonl,
    made_people,
    prefeval,
    prism,
    review,
    roleplay,
)
from popi_jax.data.sources.source import FilesMissing, Loaded, Source
from popi_jax.errors import UserError, did_you_mean

# all data sets; the values of data.source in config.py are those that stand in for no other
SOURCES = (
    *(prism.SOURCE, elix.SOURCE, review.SOURCE, roleplay.SOURCE, prefeval.SOURCE, jsonl.SOURCE),
    made_people.SOURCE,
)
FORMAT = 4  # raise it whenever a source or `User` changes what it makes of the same files
VERSION = "1.0.0"
OPTIONS = [field.name for field in list_settings(DataConfig) if field.data]


@dataclasses.dataclass(frozen=True)
class Users(Sequence[User]):
    """The users of a split; `source` is a TFDS data source: it opens its files at the first read
    and can be pickled."""

    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"user {index} of {len(self)}")
        return User.from_json(self.source[position]["user"])


class Dataset(NamedTuple):
    source: Source
    folder: Path  # of the raw files
    prepared: Path  # of the prepared copy; bad_rows.jsonl lists the rows that were skipped
    splits: dict[str, Sequence[User]]  # train, validation, test
    stats: dict[str, dict[str, int]]  # split -> users, pairs; "rows" -> skipped

    @property
    def name(self) -> str:
        """The value of data.source."""
        return self.source.stands_in_for or self.source.name

    @property
    def data(self) -> str:
        """published, own or sample."""
        return self.source.kind


def prepare(cfg: Any, *, allow_sample: bool, trained_on: str = "") -> Dataset:
    """Returns the users of a source; writes the prepared copy when there is none yet.

    Args:
        cfg: the `data` part of the configuration.
        allow_sample: whether made data may stand in for files that are neither there nor to be had.
        trained_on: `Dataset.data` of the run that the users are for, "" for a new one. A run that
            was trained on the sample goes on with it, without another try to download the files.
    Raises: UserError."""
    source, folder = _find(cfg, allow_sample, trained_on)
    cfg = _choose_form(cfg, source)
    sums = {
        str(path.relative_to(folder)) if path != folder else path.name: download.hash_file(path)
        for path in source.files(folder)
    }
    download.check_download(folder, sums)
    options = {name: getattr(cfg, name) for name in OPTIONS}
    content = json.dumps([FORMAT, options, sums], sort_keys=True)
    home = Path(cfg.prepared) / cfg.source / hashlib.sha256(content.encode()).hexdigest()[:12]
    if not home.exists():
        logging.info("Preparing %s from %s into %s", cfg.source, folder, home)
        loaded = source.load(folder, cfg)
        loaded = dataclasses.replace(loaded, users=list(loaded.users))
        _check_splits(loaded, folder, cfg)
        _write(loaded, home)
    stats = json.loads((home / "stats.json").read_text())
    if skipped := stats["rows"]["skipped"]:
        logging.warning("%d bad rows were skipped: see %s", skipped, home / "bad_rows.jsonl")
    return Dataset(source, folder, home, _read(home, stats), stats)


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


def _check_splits(loaded: Loaded, folder: Path, cfg: Any) -> None:
    """Raises UserError when a split that must hold users holds none."""
    if not loaded.users:
        told = f"{folder}: found no user with signals and a held-out pair, allowed: at least one"
        bad = loaded.bad_rows
        raise UserError(f"{told}; the first of {len(bad)} bad rows: {bad[0]}" if bad else told)
    fractions = {split: getattr(cfg, f"{split}_fraction") for split in SPLITS[1:]}
    for split, fraction in {"train": 1.0, **fractions}.items():
        if fraction > 0 and not any(user.split == split for user in loaded.users):
            change = f"Raise data.{split}_fraction (now {fraction}), or set it to 0"
            if split == "train":
                change = "Lower the fractions"
            told = f"{folder}: the {split} split of {len(list(loaded.users))} users is empty"
            raise UserError(f"{told}. {change}, or add users.")


def _write(loaded: Loaded, home: Path) -> None:
    splits = {split: [user for user in loaded.users if user.split == split] for split in SPLITS}
    stats = {
        split: {"users": len(users), "pairs": sum(len(u.pairs) for u in users)}
        for split, users in splits.items()
    } | {"rows": {"skipped": len(loaded.bad_rows)}}
    with files.make_folder(home) as part:
        _build(home, {split: users for split, users in splits.items() if users}, part)
        (part / home.parent.name / home.name / VERSION).rename(part / VERSION)
        shutil.rmtree(part / home.parent.name)
        (part / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
        files.write_jsonl(part / "bad_rows.jsonl", [{"error": told} for told in loaded.bad_rows])


def _build(home: Path, splits: dict[str, list[User]], data_dir: Path) -> None:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        name = home.parent.name
        # no checksum file beside the code: TFDS would import importlib_resources to look for one
        code_path = None
        VERSION = tfds.core.Version(VERSION)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=home.name, version=VERSION)]

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict({"user": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(
            self, dl_manager: Any
        ) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
            return {split: self._generate_examples(users) for split, users in splits.items()}

        def _generate_examples(self, users: list[User]) -> Iterator[tuple[int, dict[str, str]]]:
            yield from enumerate({"user": user.to_json()} for user in users)

    # TFDS prints the temporary folder as if it were the final one
    with contextlib.redirect_stdout(io.StringIO()):
        Builder(data_dir=data_dir, file_format="array_record").download_and_prepare()


def _read(home: Path, stats: dict[str, dict[str, int]]) -> dict[str, Sequence[User]]:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(home / VERSION)
    return {
        split: Users(builder.as_data_source(split=split)) if stats[split]["users"] else ()
        for split in SPLITS
    }
