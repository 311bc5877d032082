"""Writes text files and folders whole: a reader finds all of the old or all of the new, whenever a
program is killed. Text files may lie in a bucket."""

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` beside its place, then renames it; makes the folders above it.

    The temporary name is unique, so that processes that share a disk may write the same file."""
    file = epath.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, as `write_whole` does."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@contextlib.contextmanager
def make_folder(place: Path) -> Iterator[Path]:
    """Yields an empty folder, which becomes `place` in the end unless another process was first; an
    error leaves nothing behind."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=place.parent) as part:
        whole = Path(part) / place.name
        whole.mkdir()
        yield whole
        try:
            whole.rename(place)
        except OSError:
            if not place.exists():
                raise
