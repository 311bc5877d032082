"""Writes text files whole, on a disk or in a bucket: a reader finds the old file or the new one."""

import json
import os
import uuid
from collections.abc import Iterable, Mapping
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
