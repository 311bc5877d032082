"""Files of a sweep: one for each cell, one for each list of summaries that cells read.

JSON lines: a header, then an item for each scored pair, or for each user. A file is written whole
and named by its key, a hash of what changes its content; statistics are derived when it is read.
docs/evaluation.md has the fields."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from popi_jax import files
from popi_jax.errors import UserError

FORMAT = 1  # of the files; raise it when a reader of before cannot read them
CELLS, SUMMARIES = "cells", "summaries"


class CellRecord(NamedTuple):
    """The content of a file: header["status"] is done, or failed with a header["reason"]."""

    header: dict[str, Any]
    items: list[dict[str, Any]]


class Damaged(UserError):
    """A file that is not whole, or not ours."""


class OtherFormat(UserError):
    """A file of an older or newer version."""


def make_key(identity: Mapping[str, Any]) -> str:
    """24 hexadecimal digits of what changes the content of a file."""
    text = json.dumps([FORMAT, identity], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def find_file(out: str, kind: str, key: str) -> epath.Path:
    return epath.Path(out) / kind / f"{key}.jsonl"


def find_failure(out: str, labels: Mapping[str, Any]) -> epath.Path:
    """Where the reason of a cell that failed is kept; by its labels, as its key may be unknown."""
    return find_file(out, CELLS, f"failed-{make_key(labels)}")


def write(
    path: str | os.PathLike[str], header: Mapping[str, Any], items: Sequence[Mapping[str, Any]]
) -> None:
    """Writes a file whole; `format`, `count` and `sha256` are added to the header."""
    body = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    whole = hashlib.sha256(body.encode()).hexdigest()
    head = {"format": FORMAT} | dict(header) | {"count": len(items), "sha256": whole}
    files.write_whole(path, json.dumps(head, ensure_ascii=False) + "\n" + body)


def read(path: str | os.PathLike[str]) -> CellRecord:
    """Raises: OtherFormat; Damaged, for all else that is wrong; FileNotFoundError."""
    try:
        text = epath.Path(path).read_text(encoding="utf-8")
        first, _, body = text.partition("\n")
        header = json.loads(first)
        found = header["format"]
        if found != FORMAT:
            age = "an older" if isinstance(found, int) and found < FORMAT else "another"
            raise OtherFormat(
                f"{path}: of {age} version of these files ({found!r}, this one writes {FORMAT}); "
                "move it away, and its cell is computed anew"
            )
        whole = hashlib.sha256(body.encode()).hexdigest()
        items = [json.loads(line) for line in body.splitlines()]
        if (header["sha256"], header["count"]) != (whole, len(items)):
            raise ValueError(f"{len(items)} items, not the {header['count']} that were written")
    except (FileNotFoundError, OtherFormat):
        raise
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise Damaged(f"{path}: damaged ({' '.join(str(e).split())[:200]})") from None
    return CellRecord(header, items)


def read_done(path: epath.Path) -> CellRecord | None:
    """What is there of a cell or of summaries; None: compute it. A damaged file is told and set
    aside as *.damaged, one of another version is told and left.

    Raises: OtherFormat."""
    try:
        found = read(path)
    except FileNotFoundError:
        return None
    except Damaged as e:
        aside = path.with_name(f"{path.name}.damaged")
        logging.error("%s; set aside as %s and computed anew", e, aside.name)
        path.replace(aside)
        return None
    return found if found.header.get("status") == "done" else None


def write_failure(out: str, labels: Mapping[str, Any], reason: str, **more: Any) -> None:
    header = {"kind": "cell", "status": "failed", "reason": reason, "labels": dict(labels)} | more
    write(find_failure(out, labels), header, [])
