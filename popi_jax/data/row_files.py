"""Reads the rows of a file, one after the other: JSON lines, a JSON array, CSV or parquet; all but
parquet also with .gz.

What the rows hold is checked in json_rows.py. A file that is damaged, or is none of its kind, stops
the program; a row that is (not JSON, a key given twice, NaN) is returned as the complaint about
it, so that the caller may set it aside."""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from popi_jax.errors import UserError, did_you_mean

BLOCK = 1 << 20  # bytes of a JSON array that are read at once
BATCH = 256  # rows of a parquet file that are Python objects at once
BOM = codecs.BOM_UTF8
# how files begin that are often in place of data
OTHERS = (
    (b"version https://git-lfs", "a Git LFS pointer", "Run `git lfs pull` where it was cloned."),
    (b"<!doctype html", "an HTML page", "Fetch the file again."),
    (b"<html", "an HTML page", "Fetch the file again."),
    (b"%pdf", "a PDF", "Check the field data.path."),
    (b"pk\x03\x04", "a zip archive", "Unpack it."),
    (b"\x1f\x8b", "gzip data", "Name the file .gz."),
    (b"par1", "parquet data", "Name the file .parquet."),
)

Fault = UserError
Value = tuple[str, Any]  # where the row stands, and the row or the complaint about it


class Decoder(NamedTuple):
    """A JSON decoder that goes on behind NaN and keys given twice, which it adds to `faults`."""

    json: json.JSONDecoder
    faults: list[str]


def read_values(path: Path) -> Iterator[Value]:
    """Yields where each row of a file stands ("path:line" in JSON lines and CSV, "path: row n" in
    an array and parquet, from 1), and its JSON value, or a UserError in its place.

    The name tells the format: .parquet, .csv (cells are texts, named by the first line), .json (an
    array of objects, or JSON lines), any other one is JSON lines (UTF-8; blank lines are passed
    over). Memory: a line of JSON lines, an item of an array, some pages of parquet.
    Raises: UserError when the file is missing, damaged, of another kind or without any row."""
    name = check_file(path).name.lower()
    head = _read_head(path)
    plain = name.removesuffix(".gz")
    if plain.endswith(".parquet"):
        values = _read_parquet(path)
        allowed = "a parquet file with at least one row"
    elif plain.endswith(".csv"):
        values, allowed = _read_csv(path), "CSV with a line of names and at least one more"
    elif plain.endswith(".json") and head.removeprefix(BOM).lstrip()[:1] != b"{":
        values, allowed = _read_array(path), "a JSON array with at least one object"
    else:
        values, allowed = _read_lines(path, plain), "one JSON object a line"
    first = next(values, None)
    if first is None:
        fix = "Fetch or write the file again."
        raise UserError(f"{path}: the file is empty, allowed: {allowed}. {fix}")
    yield from itertools.chain([first], values)


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object that is all of a file. Raises: UserError."""
    _read_head(check_file(path))
    decoder = _make_decoder()
    with _open(path) as f:
        text = _Text(f, path)
        text.next_character()
        value = _decode_item(text, decoder, "")
        if text.next_character():
            text.refuse("Extra data")
    if decoder.faults:
        raise UserError(f"{path}: {decoder.faults[0]}")
    if not isinstance(value, dict):
        raise UserError(f"{path}: found {show(value)}, allowed: an object {{...}}. Correct it.")
    return value


def check_file(path: Path) -> Path:
    """Returns the path of a file. Raises: UserError when it does not exist or is no file."""
    if path.is_file():
        return path
    if path.exists():
        found = "a folder" if path.is_dir() else "a device or pipe"
        raise UserError(f"{path}: found {found}, allowed: a file. Check the field data.path.")
    others = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    found = f"found {shorten(', '.join(others), 200)}"
    if not others:
        found = f"{path.parent} is empty or does not exist"
    fix = did_you_mean(path.name, others) or " Check the field data.path."
    raise UserError(f"{path}: no such file; {found}.{fix}")


def show(value: object) -> str:
    """Returns a value as JSON on one line, shortened."""
    return shorten(clean(json.dumps(value, ensure_ascii=False, default=repr)), 60)


def shorten(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 3] + "..."


def clean(text: str) -> str:
    """Returns a text that any terminal shows on one line: what is not printable is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Opens a file that may be compressed. Raises: UserError, also for what reading it raises."""
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as f:
            yield f
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        told = f"{path}: cannot be unpacked as gzip ({clean(str(e))}). Fetch the file again."
        raise UserError(told) from None
    except OSError as e:
        fix = "Check the permissions of the file."
        raise UserError(f"{path}: cannot be read ({e.strerror or e}). {fix}") from None


def _read_head(path: Path) -> bytes:
    """Returns the first unpacked bytes; raises UserError when they are those of another format."""
    name = path.name.lower()
    try:
        raw = path.open("rb").read(64)
    except OSError as e:
        fix = "Check the permissions of the file."
        raise UserError(f"{path}: cannot be read ({e.strerror}). {fix}") from None
    right = {".gz": b"\x1f\x8b", ".parquet": b"par1"}.get(path.suffix.lower(), b"")
    for start, found, fix in OTHERS:
        if raw.removeprefix(BOM).lstrip().lower().startswith(start) and start != right:
            raise UserError(f"{path}:1: found {found}, allowed: the file itself. {fix}")
    if name.endswith(".parquet"):
        return raw
    with _open(path) as f:
        return f.read(4096)


def _read_lines(path: Path, plain: str) -> Iterator[Value]:
    decoder = _make_decoder()
    with _open(path) as f:
        lines = _guard(enumerate(f, 1), path)
        for number, line in lines:
            if not line.removeprefix(BOM).strip():
                continue
            value = _decode_line(line, f"{path}:{number}", decoder)
            if isinstance(value, Fault) and plain.endswith(".json") and line.strip() == b"{":
                allowed = "a JSON array of objects, or one JSON object a line"
                raise UserError(
                    f"{path}:{number}: found an object of many lines; allowed: {allowed}."
                )
            yield f"{path}:{number}", value


def _guard(lines: Iterator[tuple[int, bytes]], path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields lines, and says behind which one a compressed file ends too early."""
    number = 0
    try:
        for number, line in lines:
            yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        told = f"{path}:{number + 1}: the gzip data end too early or are damaged ({clean(str(e))})"
        raise UserError(f"{told}. Fetch the file again.") from None


def _decode_line(line: bytes, where: str, decoder: Decoder) -> Any:
    """Returns the JSON value of a line, or the complaint about it."""
    fix = "Write one JSON object a line."
    decoder.faults.clear()
    try:
        text = line.decode("utf-8-sig").strip(" \t\r\n")
        value, end = decoder.json.raw_decode(text)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        if decoder.faults:
            return Fault(f"{where}: {decoder.faults[0]}")
        return value
    except UnicodeDecodeError as e:
        return Fault(f"{where}: byte {e.start + 1} of the line is not UTF-8. Save it as UTF-8.")
    except json.JSONDecodeError as e:
        if e.pos >= len(e.doc) or e.msg.startswith("Unterminated"):
            if e.doc.startswith("["):
                fix = "Name a file .json that is a JSON array."
                return Fault(f"{where}: the line ends in the middle of a JSON array. {fix}")
            told = "the line ends in the middle of a JSON object"
            return Fault(f"{where}: {told}. Fetch the file again.")
        return Fault(f"{where}: not JSON at column {e.colno} ({e.msg}). {fix}")
    except (ValueError, RecursionError) as e:
        return Fault(f"{where}: not JSON ({clean(str(e))}). {fix}")


def _read_csv(path: Path) -> Iterator[Value]:
    """Yields the records of a CSV file; a record may have several lines, the first is named."""
    csv.field_size_limit(1 << 30)
    with _open(path) as f:
        reader = csv.reader(io.TextIOWrapper(f, "utf-8-sig", newline=""), strict=True)
        try:
            names = next(reader, [])
            if twice := [name for name in names if names.count(name) > 1]:
                told = f"the column {show(twice[0])} is given twice, allowed: once. Rename one."
                raise UserError(f"{path}:1: {told}")
            line = reader.line_num + 1
            for cells in reader:
                where, line = f"{path}:{line}", reader.line_num + 1
                if len(cells) == len(names):
                    yield where, dict(zip(names, cells, strict=True))
                elif cells:
                    told = f"found {len(cells)} cells, allowed: {len(names)}, as in line 1"
                    yield where, Fault(f"{where}: {told}. Correct the line.")
        except csv.Error as e:
            fix = "Fetch the file again."
            raise UserError(f"{path}:{reader.line_num}: not CSV ({e}). {fix}") from None
        except UnicodeDecodeError:
            told = f"{path}: not UTF-8 behind line {reader.line_num}. Save the file as UTF-8."
            raise UserError(told) from None


def _read_array(path: Path) -> Iterator[Value]:
    """Yields the items of a JSON array. A syntax error in it is one of the file."""
    decoder = _make_decoder()
    with _open(path) as f:
        text = _Text(f, path)
        start = text.next_character()
        if start != "[":
            if start:
                value = _decode_item(text, decoder, "")
                allowed = "a JSON array with at least one object"
                fix = "Fetch the file again."
                raise UserError(f"{path}: found {show(value)}, allowed: {allowed}. {fix}")
            return
        text.position += 1
        for number in itertools.count(1):
            if text.next_character() == "]" and number == 1:
                text.position += 1
                break
            where = f"{path}: row {number}"
            decoder.faults.clear()
            value = _decode_item(text, decoder, where)
            yield where, Fault(f"{where}: {decoder.faults[0]}") if decoder.faults else value
            mark = text.next_character()
            if mark not in (",", "]"):
                text.refuse("Expecting ',' delimiter" if mark else "the file ends in the array")
            text.position += 1
            if mark == "]":
                break
        if text.next_character():
            text.refuse("Extra data")


class _Text:
    """The text of a file from `position` on; what is before it is forgotten with the next block."""

    def __init__(self, file: Any, path: Path) -> None:
        self.file, self.path = file, path
        self.decode = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.position, self.at_end = "", 0, False
        self.lines, self.columns, self.bytes = 0, 0, 0  # before `text`

    def read_more(self) -> None:
        """Adds a block, as long as what is there already at least."""
        gone = self.text[: self.position]
        self.lines += gone.count("\n")
        self.columns = len(gone) - gone.rfind("\n") - 1 + ("\n" not in gone and self.columns)
        rest = self.text[self.position :]
        raw = self.file.read(max(BLOCK, len(rest)))
        try:
            more = self.decode.decode(raw, final=not raw)
        except UnicodeDecodeError as e:
            at = self.bytes - len(self.decode.getstate()[0]) + e.start + 1
            raise UserError(
                f"{self.path}: byte {at} is not UTF-8. Save the file as UTF-8."
            ) from None
        self.bytes += len(raw)
        self.text, self.position, self.at_end = rest + more, 0, not raw

    def next_character(self) -> str:
        """Moves to the next character that is no white space, "" at the end."""
        while True:
            while self.position < len(self.text):
                if self.text[self.position] not in " \t\r\n":
                    return self.text[self.position]
                self.position += 1
            if self.at_end:
                return ""
            self.read_more()

    def refuse(self, told: str, position: int | None = None) -> None:
        """Raises: UserError with line and column."""
        at = self.position if position is None else position
        line = self.lines + self.text.count("\n", 0, at) + 1
        column = at - self.text.rfind("\n", 0, at)
        column += self.columns if "\n" not in self.text[:at] else 0
        where = f"{self.path}:{line}: not JSON at column {column}"
        raise UserError(f"{where} ({told}). Fetch the file again.")


def _decode_item(text: _Text, decoder: Decoder, where: str) -> Any:
    """Returns the JSON value at the position of `text`, and moves behind it. Raises: UserError."""
    while True:
        kept = len(decoder.faults)
        try:
            value, end = decoder.json.raw_decode(text.text, text.position)
            # a number may go on in the next block
            if end < len(text.text) or text.at_end:
                text.position = end
                return value
        except json.JSONDecodeError as e:
            inside = e.pos < len(text.text) - 16 and not e.msg.startswith("Unterminated")
            if inside or text.at_end:
                text.refuse(e.msg, e.pos)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{where or text.path}: not JSON ({clean(str(e))}).") from None
        del decoder.faults[kept:]
        text.read_more()


def _read_parquet(path: Path) -> Iterator[Value]:
    from pyarrow import ArrowException, parquet

    number = 0
    damaged = (ArrowException, OSError, ValueError)

    def ask(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except damaged as e:
            told = clean(shorten(" ".join(str(e).split()), 200))
            where = f"{path}: row {number + 1} or one of the next {BATCH}" if number else str(path)
            raise UserError(f"{where}: not parquet, or damaged ({told}).") from None

    # as it is, pyarrow keeps all that was read of a file, and reads a row group at once
    streamed = {"pre_buffer": False, "buffer_size": BLOCK}
    with ask(lambda: parquet.ParquetFile(path, **streamed)) as file:
        names = file.schema_arrow.names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"{path}: two columns {show(twice[0])}, allowed: one. Rename one.")
        batches = file.iter_batches(batch_size=BATCH)
        while (batch := ask(lambda: next(batches, None))) is not None:
            for row in ask(batch.to_pylist):
                number += 1
                yield f"{path}: row {number}", row


def _make_decoder() -> Decoder:
    faults: list[str] = []

    def take_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            faults.append(f"the key {show(twice)} is given twice, allowed: once. Remove one.")
        return found

    def take_constant(name: str) -> None:
        faults.append(f"not JSON ({name} is not a JSON value). Correct the value.")

    decoder = json.JSONDecoder(object_pairs_hook=take_pairs, parse_constant=take_constant)
    return Decoder(decoder, faults)
