"""Rows in the format of AlignX (github.com/JinaLeejnl/AlignX): a post, two replies, and what is
known of the person who preferred one. AlignX, P-Soups and UF-P-4 have it.

A row that is plainly right is taken quickly; any other is checked field by field, for a complaint
that names the field."""

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from popi_jax.data.json_rows import Row, shorten
from popi_jax.data.leaks import fold, fold_signals, hear
from popi_jax.data.records import Comment, Shot
from popi_jax.data.row_files import check_file
from popi_jax.data.splits import choose_split
from popi_jax.errors import UserError

PROMPT, CHOSEN, REJECTED = "prompt", "chosen", "rejected"
DIRECTIONS = "Preference Direction"
DEMOGRAPHICS = "Demographic Information"
COMMENTS = "User-Generated Content"
PAIRS = "Pair-wise Comparative Feedback"
PERSONA = "ground_truth_persona"
NUM_AXES = 90
ENDINGS = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz")

NO_DATA = ("SOURCE.json", "dataset_info.json", "dataset_infos.json")

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\b.*")
_CODES = {0: "0", 0.5: "5", 1: "1"}
_ALLOWED = f"a list of {NUM_AXES} numbers, each 0, 0.5 or 1"


class Layout(NamedTuple):
    """Which fields a file has."""

    required: frozenset[str]  # the others may be missing; a null is an empty text or list
    item_directions: bool = False  # whether each comment and past pair must have directions
    allowed: tuple[str, ...] = ()  # another field is an error; () = is passed over


class Record(NamedTuple):
    """A row, checked. Directions are written as 90 characters, "1", "0" or "5" for 0.5; "" where
    they are not in the file, () where they were not asked for."""

    where: str  # "path:line" or "path: row n"
    prompt: str
    chosen: str
    rejected: str
    directions: str
    demographics: str
    comments: tuple[Comment, ...]
    comment_directions: tuple[str, ...]
    shots: tuple[Shot, ...]
    shot_directions: tuple[str, ...]
    persona: str

    @property
    def number(self) -> int:
        """Of the row, or line, in its file, from 1."""
        return int(self.where.rpartition(":")[2].removeprefix(" row "))


def list_data(folder: Path) -> list[Path]:
    """Returns the files of a folder and the folders in it that may hold rows, sorted by path."""
    found = (path for path in folder.rglob("*") if path.name.lower().endswith(ENDINGS))
    return sorted(p for p in found if p.is_file() and p.name not in NO_DATA)


def list_files(folder: Path, names: Iterable[str] = ()) -> list[Path]:
    """Returns the file itself, or those of a folder: of the names (without ending) if any are
    given, else all.

    Raises: UserError when there is none, two of one name (their rows would be read twice), or some
    shards of a set are missing."""
    if not folder.is_dir():
        return [check_file(folder)]
    wanted = sorted(names)
    files = [path for path in list_data(folder) if not wanted or name_file(path) in wanted]
    if not files:
        named = f" named {', '.join(wanted)}" if wanted else ""
        told = f"{folder}: found no file *{', *'.join(ENDINGS)}{named} (field data.path)"
        raise UserError(f"{told}. Put the published files there.")
    by_name: dict[Path, Path] = {}
    shards: dict[Path, set[int]] = {}
    for path in files:
        other = by_name.setdefault(path.parent / name_file(path), path)
        if other != path:
            raise UserError(f"{path}: found {other.name} beside it, allowed: one of them.")
        if shard := _SHARD.fullmatch(name_file(path)):
            shards.setdefault(path.parent / f"{shard[1]}-of-{shard[3]}", set()).add(int(shard[2]))
    for name, there in shards.items():
        missing = sorted({*range(int(name.name[-5:]))} - there)
        if missing:
            lacking = shorten(", ".join(f"{number:05d}" for number in missing), 60)
            raise UserError(f"{name}: shards {lacking} are missing. Fetch all of one commit.")
    return files


def name_file(path: Path) -> str:
    """The name of a file without its ending."""
    return path.name.split(".")[0]


def parse_row(row: Row, layout: Layout) -> Record:
    """Raises: UserError, one line, for a row that is not as the layout says."""
    return _take(row, layout) or _check(row, layout)


def make_parser(layout: Layout) -> Callable[[Row], Record]:
    return lambda row: parse_row(row, layout)


def number_target(record: Record) -> int:
    """The same for equal targets, whichever reply was chosen: 56 bits of a hash."""
    return number_texts(record.prompt, record.chosen, record.rejected)


def number_texts(prompt: str, reply: str, other: str) -> int:
    text = "\n".join((fold(prompt), *sorted((fold(reply), fold(other)))))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def split_by_prompt(record: Record, validation_fraction: float, test_fraction: float) -> str:
    """The split of a target: the same for all that have its prompt."""
    return choose_split(fold(record.prompt), validation_fraction, test_fraction)


def count(counts: dict[str, int], name: str, by: int = 1) -> None:
    counts[name] = counts.get(name, 0) + by


def count_parquet(paths: Iterable[Path]) -> int:
    """How many rows the files have, 0 if that cannot be told without reading them."""
    from pyarrow import ArrowException, parquet

    try:
        return sum(parquet.read_metadata(path).num_rows for path in paths)
    except (ArrowException, OSError):
        return 0


def find_answer(record: Record) -> str:
    """Says what of the target stands in the signals of its own row, "" if nothing. Texts are
    compared as data/leaks.py does."""
    heard = hear(fold_signals(record.shots, record.comments), (fold(record.demographics),))
    if heard.holds(record.prompt):
        return "the prompt is among the signals of its row"
    if heard.holds(record.chosen, record.rejected):
        return "a reply is among the signals of its row"
    return ""


def _take(row: Row, layout: Layout) -> Record | None:
    """The record of a row in which all is as it should be, else None."""
    fields = row.fields
    if not layout.required <= fields.keys() or (
        layout.allowed and not fields.keys() <= set(layout.allowed)
    ):
        return None
    try:
        prompt, chosen = fields[PROMPT].strip(), fields[CHOSEN].strip()
        rejected = fields[REJECTED].strip()
        found, pairs = _list_items(fields, COMMENTS), _list_items(fields, PAIRS)
        comments = tuple([Comment(c["prompt"].strip(), c["comment"].strip()) for c in found])
        shots = tuple(
            [Shot(p["prompt"].strip(), p["chosen"].strip(), p["rejected"].strip()) for p in pairs]
        )
        demographics, persona = _strip(fields, DEMOGRAPHICS), _strip(fields, PERSONA)
        values = fields.get(DIRECTIONS)
        directions = "".join(map(_CODES.__getitem__, values)) if values is not None else ""
        of_comments: tuple[str, ...] = ()
        of_shots: tuple[str, ...] = ()
        if layout.item_directions:
            of_comments = tuple(["".join(map(_CODES.__getitem__, c[DIRECTIONS])) for c in found])
            of_shots = tuple(["".join(map(_CODES.__getitem__, p[DIRECTIONS])) for p in pairs])
        written = [prompt, chosen, rejected, *(c.comment for c in comments)]
        written += [text for s in shots for text in (s.prompt, s.chosen, s.rejected)]
        others = [demographics, persona, *(c.prompt for c in comments)]
        "\n".join(written + others).encode()  # half surrogates cannot be encoded
    except (AttributeError, KeyError, TypeError, UnicodeEncodeError):
        return None
    lists = [directions] * (values is not None) + [*of_comments, *of_shots]
    whole = all(len(each) == NUM_AXES for each in lists) and all(written)
    given = (values is not None) or DIRECTIONS not in layout.required
    if not whole or not given or chosen == rejected or (PERSONA in layout.required and not persona):
        return None
    return Record(
        *(row.where, prompt, chosen, rejected, directions, demographics),
        *(comments, of_comments, shots, of_shots, persona),
    )


def _list_items(fields: dict[str, Any], name: str) -> list[Any]:
    """Raises: TypeError."""
    items = fields.get(name)
    if items is None:
        return []
    if not isinstance(items, list):
        raise TypeError(name)
    return items


def _strip(fields: dict[str, Any], name: str) -> str:
    text = fields.get(name)
    return "" if text is None else text.strip()


def _check(row: Row, layout: Layout) -> Record:
    """The record of a row. Raises: UserError for the first fault in it."""
    for name in (PROMPT, CHOSEN, REJECTED, DIRECTIONS, DEMOGRAPHICS, COMMENTS, PAIRS, PERSONA):
        if name in layout.required:
            row.get_value(name, "a field of this file")
    if layout.allowed:
        row.allow_only(layout.allowed)
    prompt, chosen = row.get_text(PROMPT), row.get_text(CHOSEN)
    rejected = row.get_text(REJECTED)
    if chosen == rejected:
        raise row.make_error(REJECTED, rejected, "a reply unlike the chosen one", "Remove the row.")
    comments, shots = _get_items(row, COMMENTS), _get_items(row, PAIRS)
    known = DIRECTIONS in layout.required or row.fields.get(DIRECTIONS) is not None
    of_items = [
        tuple(_get_directions(item) for item in items) if layout.item_directions else ()
        for items in (comments, shots)
    ]
    return Record(
        where=row.where,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        directions=_get_directions(row) if known else "",
        demographics=_get_optional(row, DEMOGRAPHICS),
        comments=tuple(
            Comment(item.get_text("prompt", empty=True), item.get_text("comment"))
            for item in comments
        ),
        comment_directions=of_items[0],
        shots=tuple(
            Shot(item.get_text("prompt"), item.get_text("chosen"), item.get_text("rejected"))
            for item in shots
        ),
        shot_directions=of_items[1],
        persona=row.get_text(PERSONA)
        if PERSONA in layout.required
        else _get_optional(row, PERSONA),
    )


def _get_optional(row: Row, name: str) -> str:
    return row.get_text(name, empty=True, null=True) if name in row.fields else ""


def _get_items(row: Row, name: str) -> list[Row]:
    return [] if row.fields.get(name) is None else row.get_objects(name)


def _get_directions(row: Row) -> str:
    values: Any = row.get_value(DIRECTIONS, _ALLOWED)
    if not isinstance(values, list):
        raise row.make_error(DIRECTIONS, values, _ALLOWED, "Correct the value.")
    if len(values) != NUM_AXES:
        raise row.make_error(DIRECTIONS, f"{len(values)} numbers", _ALLOWED, "Correct the list.")
    for value in values:
        if not isinstance(value, int | float) or value not in _CODES:
            raise row.make_error(DIRECTIONS, value, _ALLOWED, "Correct the number.")
    return "".join(_CODES[value] for value in values)
