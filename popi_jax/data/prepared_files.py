"""The files of a prepared copy: a TFDS dataset of ArrayRecord shards, one example a user, as JSON.

    <prepared>/<source>/<key>/stats.json      what is in it, and the size of each of its files
                             /1.0.0/          the dataset
                             /bad_rows.jsonl  rows that were set aside
                             /leaks.jsonl     pairs that were left out, as they would leak

TensorFlow is not needed."""

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from popi_jax import files
from popi_jax.data.records import SPLITS, User
from popi_jax.errors import UserError, disk_is_full

VERSION = "1.0.0"
STATS = "stats.json"
_SHARD = 8192  # users
_WAITING = 64  # users that are written together


@dataclasses.dataclass(frozen=True)
class Users(Sequence[User]):
    """The users of a split; `source` is a TFDS data source: it opens its files at the first read
    and can be pickled."""

    source: Any
    home: Path

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"user {index} of {len(self)}")
        try:
            return User.from_json(self.source[position]["user"])
        except Exception as e:  # of several libraries, which promise no common type
            reason = " ".join(str(e).split())[:200]
            raise UserError(
                f"{self.home}: the prepared copy is damaged (user {position}: {reason}); delete "
                "the folder, and it is made again"
            ) from e


class UserWriter:
    """Writes users of all splits, as they come, into the shards of a new dataset."""

    def __init__(self, folder: Path, name: str) -> None:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import sequential_writer

        folder.mkdir(parents=True)
        identity = tfds.core.dataset_info.DatasetIdentity(
            name=name,
            version=tfds.core.Version(VERSION),
            data_dir=str(folder),
            module_name=__name__,
            config_name="",
            release_notes={},
        )
        features = tfds.features.FeaturesDict({"user": tfds.features.Text()})
        info = tfds.core.DatasetInfo(builder=identity, features=features, disable_shuffling=True)
        self._writer = sequential_writer.SequentialWriter(info, _SHARD, file_format="array_record")
        self._waiting: dict[str, list[dict[str, str]]] = {}

    def add(self, user: User) -> None:
        waiting = self._waiting.get(user.split)
        if waiting is None:
            self._writer.initialize_splits([user.split])
            waiting = self._waiting[user.split] = []
        waiting.append({"user": user.to_json()})
        if len(waiting) >= _WAITING:
            self._flush(user.split)

    def close(self) -> None:
        for split in self._waiting:
            self._flush(split)
        self._writer.close_all()

    def _flush(self, split: str) -> None:
        self._writer.add_examples({split: self._waiting[split]})
        self._waiting[split].clear()


def seal(part: Path, stats: dict[str, Any]) -> dict[str, Any]:
    """Writes stats.json, with the size of each file of a copy, as the last of them."""
    sizes = {
        str(path.relative_to(part)): path.stat().st_size
        for path in sorted(part.rglob("*"))
        if path.is_file()
    }
    stats = stats | {"files": sizes}
    (part / STATS).write_text(json.dumps(stats, indent=1) + "\n", encoding="utf-8")
    return stats


def read_stats(home: Path) -> dict[str, Any] | None:
    """What is in a copy; None where there is none that is whole. A damaged one is told and removed,
    so that it is made again.

    Raises: UserError when it cannot be removed."""
    if not home.exists():
        return None
    try:
        stats = dict(json.loads((home / STATS).read_text(encoding="utf-8")))
        for name, size in stats["files"].items():
            found = (home / name).stat().st_size
            if found != size:
                raise ValueError(f"{name} has {found} bytes, not {size}")
        if not all(split in stats for split in (*SPLITS, "rows", "leaks")):
            raise ValueError(f"{STATS} lacks a part")
        return stats
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        told = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        if isinstance(e, OSError) and e.filename:
            told = f"{Path(e.filename).name}: {told}"
    logging.warning("%s: the prepared copy is damaged (%s); it is made again", home, told)
    aside = home.with_name(f".damaged-{home.name}-{uuid.uuid4().hex[:8]}")
    with tell_unwritable(home):
        home.rename(aside)  # first: others may be reading it
        shutil.rmtree(aside, ignore_errors=True)
    return None


@contextlib.contextmanager
def tell_unwritable(place: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError that the disk raises into one line; a full disk stays what it is."""
    try:
        yield
    except OSError as e:
        if disk_is_full(e):
            raise
        told = f"{e.filename or place}: {e.strerror or e}"
        raise UserError(
            f'field "data.prepared": cannot write the prepared copy ({told}); give another folder'
        ) from e


def open_users(home: Path, split: str, stats: dict[str, Any]) -> Sequence[User]:
    import tensorflow_datasets as tfds

    if not stats[split]["users"]:
        return ()
    try:
        builder = tfds.builder_from_directory(home / VERSION)
        return Users(builder.as_data_source(split=split), home)
    except Exception as e:  # of several libraries, which promise no common type
        reason = " ".join(str(e).split())[:200]
        raise UserError(
            f"{home}: the prepared copy cannot be read ({reason}); delete the folder, and it is "
            "made again"
        ) from e


class FileSums:
    """The sha256 of source files. A large file is read once: what was found is kept beside the
    prepared copies with the size and time of the file, which say whether it still holds."""

    def __init__(self, prepared: Path) -> None:
        self._path = prepared / "sums.json"
        try:
            self._known = dict(json.loads(self._path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            self._known = {}

    def read(self, folder: Path, paths: Sequence[Path]) -> dict[str, str]:
        """Name within the folder -> sha256."""
        from popi_jax.data.sources.download import hash_file

        found, new = dict[str, str](), dict[str, Any]()
        for path in paths:
            stat = path.stat()
            seen = [stat.st_size, stat.st_mtime_ns]
            known = self._known.get(str(path.resolve()))
            if not isinstance(known, list) or known[:2] != seen:
                known = new[str(path.resolve())] = [*seen, hash_file(path)]
            found[str(path.relative_to(folder)) if path != folder else path.name] = str(known[2])
        if new:
            self._known |= new
            with contextlib.suppress(OSError):  # a disk that cannot be written is told elsewhere
                files.write_whole(self._path, json.dumps(self._known, indent=1) + "\n")
        return found
