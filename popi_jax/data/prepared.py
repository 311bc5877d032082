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
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from popi_jax.config import DataConfig
from popi_jax.config_rules import list_settings
from popi_jax.data.json_rows import Loaded
from popi_jax.data.records import User
from popi_jax.data.sources import jsonl, prefeval, prism
from popi_jax.data.sources.download import DownloadFailed, check_source, download_prism, sha256_of
from popi_jax.data.splits import SPLITS
from popi_jax.errors import UserError, did_you_mean

FORMAT = 2  # raise it whenever a source or `User` changes what it makes of the same files
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
    name: str  # prism | prefeval | jsonl
    data: str  # published | sample (made by popi_jax.data.sources.made_people, in PRISM's format) | own (jsonl)
    folder: Path  # of the raw files
    prepared: Path  # of the prepared copy; bad_rows.jsonl lists the rows that were skipped
    splits: dict[str, Sequence[User]]  # train, validation, test
    stats: dict[str, dict[str, int]]  # split -> users, pairs; "rows" -> skipped


def prepare(cfg: Any, *, allow_sample: bool, trained_on: str = "") -> Dataset:
    """Returns the users of a source; writes the prepared copy when there is none yet.

    Args:
        cfg: the `data` part of the configuration. allow_sample: whether made data may stand in for
        PRISM files that are neither there nor to be had. trained_on: `Dataset.data` of the run that
        the users are for, "" for a new one. A run that was trained on the
            sample goes on with it, without another try to download the files.
    Raises: UserError.
    """
    folder, data = _raw_folder(cfg, allow_sample, trained_on)
    files = _module(cfg.source).files(folder)
    sums = {
        str(path.relative_to(folder)) if path != folder else path.name: sha256_of(path)
        for path in files
    }
    if cfg.source == "prism":
        check_source(folder, sums)
    options = {name: getattr(cfg, name) for name in OPTIONS}
    key = hashlib.sha256(json.dumps([FORMAT, options, sums], sort_keys=True).encode()).hexdigest()[
        :12
    ]
    home = Path(cfg.prepared) / cfg.source / key
    if not home.exists():
        logging.info("Preparing %s from %s into %s", cfg.source, folder, home)
        loaded = _module(cfg.source).load(folder, cfg)
        _check_splits(loaded, folder, cfg)
        _write(loaded, home)
    stats = json.loads((home / "stats.json").read_text())
    if stats["rows"]["skipped"]:
        logging.warning(
            "%d bad rows were skipped: see %s", stats["rows"]["skipped"], home / "bad_rows.jsonl"
        )
    return Dataset(cfg.source, data, folder, home, _read(home, stats), stats)


def _module(source: str) -> Any:
    modules = {"prism": prism, "prefeval": prefeval, "jsonl": jsonl}
    if source not in modules:
        near = did_you_mean(source, modules)
        raise UserError(
            f'field "data.source": found "{source}", allowed: {", ".join(modules)}.{near}'
        )
    return modules[source]


def _raw_folder(cfg: Any, allow_sample: bool, trained_on: str) -> tuple[Path, str]:
    """Returns the folder (or, for jsonl, file) of the raw data, and what kind of data they are."""
    path = Path(cfg.path).expanduser()
    if cfg.source == "jsonl":
        return path, "own"
    if cfg.source != "prism":
        return path, "published"
    missing = [name for name in prism.FILES if not (path / name).exists()]
    if not missing:
        return path, "published"
    if len(missing) < len(prism.FILES):
        present = ", ".join(name for name in prism.FILES if name not in missing)
        raise UserError(
            f"{path}: no {', '.join(missing)} beside {present} (field data.path). Add it, or remove the others."
        )
    if allow_sample and trained_on == "sample":
        return _sample(cfg), "sample"
    reason = "field data.download is False"
    if cfg.download:
        try:
            download_prism(path)
            return path, "published"
        except DownloadFailed as e:
            reason = str(e)
    source = "huggingface.co/datasets/HannahRoseKirk/prism-alignment"
    if not allow_sample:
        fix = f"Put {', '.join(prism.FILES)} from {source} there, or set data.path to their folder."
        raise UserError(
            f"{path}: no PRISM files (field data.path), and no download: {reason} {fix}"
        )
    folder = _sample(cfg)
    logging.warning(
        "\n%s\nNo PRISM files in %s, and no download: %s\nGoing on with MADE data in PRISM's format: %s"
        "\nNumbers from it say nothing about PRISM. For the real data put %s\nfrom %s into %s.\n%s",
        *("*" * 100, path, reason, folder, ", ".join(prism.FILES), source, path, "*" * 100),
    )
    return folder, "sample"


def _sample(cfg: Any) -> Path:
    """Returns the folder of the made data; writes it unless the present code has made that number
    of people before."""
    from popi_jax.data.sources import made_people

    code = sha256_of(Path(made_people.__file__))[:8]
    folder = Path(cfg.prepared) / f"prism-sample-{cfg.sample_people}-{code}"
    if not folder.exists():
        part = _temporary(folder.parent)
        try:
            made_people.write_sample(part / "sample", people=cfg.sample_people)
            _rename(part / "sample", folder)
        finally:
            shutil.rmtree(part)
    return folder


def _check_splits(loaded: Loaded, folder: Path, cfg: Any) -> None:
    """Raises UserError when a split that must hold users holds none."""
    if not loaded.users:
        first = (
            f"; the first of {len(loaded.bad_rows)} bad rows: {loaded.bad_rows[0]}"
            if loaded.bad_rows
            else ""
        )
        raise UserError(
            f"{folder}: found no user with signals and a held-out pair, allowed: at least one{first}"
        )
    wanted = {"train": 1.0, "validation": cfg.validation_fraction, "test": cfg.test_fraction}
    for split, fraction in wanted.items():
        if fraction > 0 and not any(user.split == split for user in loaded.users):
            field = "the fractions" if split == "train" else f"data.{split}_fraction"
            change = (
                f"Lower {field}"
                if split == "train"
                else f"Raise {field} (now {fraction}), or set it to 0"
            )
            raise UserError(
                f"{folder}: the {split} split of {len(loaded.users)} users is empty. {change}, or add users."
            )


def _write(loaded: Loaded, home: Path) -> None:
    """Writes the copy beside its place and renames it."""
    splits = {split: [user for user in loaded.users if user.split == split] for split in SPLITS}
    stats = {
        split: {"users": len(users), "pairs": sum(len(u.pairs) for u in users)}
        for split, users in splits.items()
    }
    part = _temporary(home.parent.parent)
    try:
        _build(home, {split: users for split, users in splits.items() if users}, part)
        built = part / home.parent.name / home.name
        (built / "stats.json").write_text(
            json.dumps({**stats, "rows": {"skipped": len(loaded.bad_rows)}}, indent=2) + "\n"
        )
        lines = [
            json.dumps({"error": message}, ensure_ascii=False) + "\n" for message in loaded.bad_rows
        ]
        (built / "bad_rows.jsonl").write_text("".join(lines), encoding="utf-8")
        home.parent.mkdir(parents=True, exist_ok=True)
        _rename(built, home)
    finally:
        shutil.rmtree(part)


def _build(home: Path, splits: dict[str, list[User]], data_dir: Path) -> None:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        name = home.parent.name
        code_path = None  # no checksum file beside the code; TFDS would import importlib_resources to look for one
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

    with contextlib.redirect_stdout(
        io.StringIO()
    ):  # TFDS prints the temporary folder as if it were the final one
        Builder(data_dir=data_dir, file_format="array_record").download_and_prepare()


def _read(home: Path, stats: dict[str, dict[str, int]]) -> dict[str, Sequence[User]]:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(home / VERSION)
    return {
        split: Users(builder.as_data_source(split=split)) if stats[split]["users"] else ()
        for split in SPLITS
    }


def _temporary(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=".part-", dir=folder))


def _rename(built: Path, place: Path) -> None:
    """Moves a finished folder to its place; another process that was first is left in peace."""
    try:
        built.rename(place)
    except OSError:
        if not place.exists():
            raise
