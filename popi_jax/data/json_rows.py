"""Reads files of JSON and checks every field that is used. A complaint is one line: where, field,
found, allowed, fix.

Refuses to guess: a row is either right or a `UserError`; `on_bad_row` decides whether that stops
the program ("error") or sets the row aside ("skip")."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from popi_jax.errors import UserError, did_you_mean

T = TypeVar("T")
U = TypeVar("U")


@dataclasses.dataclass(frozen=True)
class Row:
    """A JSON object and where it stands; `path` names the enclosing fields, such as "signals."."""

    where: str
    fields: dict[str, Any]
    path: str = ""

    def make_error(self, name: str, found: object, allowed: str, fix: str) -> UserError:
        field = f'{self.where}: field "{self.path}{name}"'
        return UserError(f"{field}: found {show(found)}, allowed: {allowed}. {fix}")

    def get_value(self, name: str, allowed: str) -> Any:
        """Returns a field that must exist. Raises: UserError."""
        if name in self.fields:
            return self.fields[name]
        near = did_you_mean(name, self.fields)
        fix = f'{near} Rename it to "{name}".' if near else " Add the field."
        found = shorten(", ".join(sorted(self.fields)) or "no field at all", 200)
        missing = f'{self.where}: no field "{self.path}{name}"'
        raise UserError(f"{missing} (allowed: {allowed}); found {found}.{fix}")

    def get_text(self, name: str, *, empty: bool = False, null: bool = False) -> str:
        """Returns a text without outer white space; with `null`, a null reads as "". Raises:
        UserError."""
        allowed = "a text" if empty else "a text that is not empty"
        value = self.get_value(name, allowed)
        if value is None and null:
            return ""
        if not isinstance(value, str) or not (empty or value.strip()):
            raise self.make_error(name, value, allowed, "Correct the value.")
        if any("\ud800" <= c <= "\udfff" for c in value):
            fix = "Remove the half surrogate pair (\\ud800 to \\udfff)."
            raise self.make_error(name, ascii(value), "Unicode text", fix)
        return value.strip()

    def get_integer(self, name: str, low: int, high: int | None = None) -> int:
        """Returns a whole number of low..high. Raises: UserError."""
        limits = f"at least {low}" if high is None else f"{low} to {high}"
        allowed = f"a whole number of {limits}"
        value = self.get_value(name, allowed)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < low or (high is not None and value > high):
            raise self.make_error(name, value, allowed, "Correct the value.")
        return int(value)

    def get_flag(self, name: str) -> bool:
        """Returns true or false. Raises: UserError."""
        value = self.get_value(name, "true or false")
        if not isinstance(value, bool):
            raise self.make_error(name, value, "true or false", "Correct the value.")
        return value

    def get_object(self, name: str, *, null: bool = False) -> "Row":
        """Returns a nested object; with `null`, a null reads as {}. Raises: UserError."""
        value = self.get_value(name, "an object {...}")
        if not isinstance(value, dict) and not (value is None and null):
            raise self.make_error(name, value, "an object {...}", "Correct the value.")
        return Row(self.where, value or {}, f"{self.path}{name}.")

    def get_objects(self, name: str) -> list["Row"]:
        """Returns a list of nested objects. Raises: UserError."""
        allowed = "a list of objects [{...}, ...]"
        value = self.get_value(name, allowed)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.make_error(name, value, allowed, "Correct the value.")
        return [Row(self.where, item, f"{self.path}{name}[{i}].") for i, item in enumerate(value)]

    def allow_only(self, names: Iterable[str]) -> None:
        """Raises UserError when there is a field of another name."""
        allowed = list(names)
        for name in self.fields:
            if name not in allowed:
                fix = did_you_mean(name, allowed) or " Remove it."
                unknown = f'{self.where}: unknown field "{self.path}{name}"'
                raise UserError(f"{unknown}; allowed: {', '.join(allowed)}.{fix}")

    def check_unique(self, name: str, seen: dict[str, str]) -> None:
        """Adds the row to `seen` (id -> where). Raises: UserError when the id was there."""
        first = seen.setdefault(str(self.fields[name]).strip(), self.where)
        if first != self.where:
            allowed = f"an id that occurs once (first at {first})"
            raise self.make_error(name, self.fields[name], allowed, "Remove one of the rows.")


def show(value: object) -> str:
    """Returns a value as JSON, shortened."""
    return shorten(json.dumps(value, ensure_ascii=False), 60)


def shorten(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 3] + "..."


def check_file(path: Path) -> Path:
    """Returns the path of a file. Raises: UserError when it does not exist or is no file."""
    if path.is_file():
        return path
    if path.exists():
        raise UserError(f"{path}: found a folder, allowed: a file. Check the field data.path.")
    others = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    found = f"found {shorten(', '.join(others), 200)}"
    if not others:
        found = f"{path.parent} is empty or does not exist"
    fix = did_you_mean(path.name, others) or " Check the field data.path."
    raise UserError(f"{path}: no such file; {found}.{fix}")


def read_lines(path: Path, parse: Callable[[Row], T], on_bad_row: str) -> tuple[list[T], list[str]]:
    """Parses a file of one JSON object a line (UTF-8; blank lines are passed over); returns results
    and bad rows.

    Raises: UserError when the file is missing or holds no row, and at the first bad row unless
    on_bad_row is "skip"."""

    def parse_line(number: int, line: bytes) -> T:
        where = f"{path}:{number}"
        if line.startswith(b"version https://git-lfs"):
            fix = "Run `git lfs pull` where it was cloned."
            raise UserError(f"{where}: found a Git LFS pointer, allowed: the file itself. {fix}")
        value = _decode(line, path, number)
        if not isinstance(value, dict):
            allowed = "one JSON object a line, {...}"
            raise UserError(f"{where}: found {show(value)}, allowed: {allowed}. Correct the line.")
        return parse(Row(where, value))

    lines = _read_bytes(path, "one JSON object a line").split(b"\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    return _parse_all(numbered, parse_line, on_bad_row)


def read_array(path: Path, parse: Callable[[Row], T], on_bad_row: str) -> tuple[list[T], list[str]]:
    """Parses a file that is one JSON array of objects; rows are numbered from 1.

    Raises: UserError when the file is missing, empty or not a JSON array (whatever on_bad_row
    says), and at the first bad row unless on_bad_row is "skip"."""

    def parse_item(number: int, item: object) -> T:
        where = f"{path}: row {number}"
        if not isinstance(item, dict):
            allowed = "an object {...}"
            raise UserError(f"{where}: found {show(item)}, allowed: {allowed}. Correct the row.")
        return parse(Row(where, item))

    items = _decode(_read_bytes(path, "a JSON array of objects"), path)
    if not isinstance(items, list) or not items:
        allowed = "a JSON array with at least one object"
        raise UserError(f"{path}: found {show(items)}, allowed: {allowed}. Fetch the file again.")
    return _parse_all(list(enumerate(items, 1)), parse_item, on_bad_row)


def _parse_all(
    items: list[tuple[int, U]], parse: Callable[[int, U], T], on_bad_row: str
) -> tuple[list[T], list[str]]:
    good: list[T] = []
    bad: list[str] = []
    for number, item in items:
        try:
            good.append(parse(number, item))
        except UserError as e:
            if on_bad_row == "error":
                raise
            bad.append(str(e))
    return good, bad


def _read_bytes(path: Path, allowed: str) -> bytes:
    try:
        raw = check_file(path).read_bytes()
    except OSError as e:
        fix = "Check the permissions of the file."
        raise UserError(f"{path}: cannot be read ({e.strerror}). {fix}") from None
    if not raw.strip():
        fix = "Fetch or write the file again."
        raise UserError(f"{path}: the file is empty, allowed: {allowed}. {fix}")
    return raw


def _decode(raw: bytes, path: Path, line: int = 0) -> Any:
    """Returns the JSON value of a line, or with `line` 0 of a whole file. Raises: UserError."""
    where, part = (f"{path}:{line}", " of the line") if line else (f"{path}", "")
    fix = "Write one JSON object a line." if line else "Fetch the file again."
    try:
        return json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as e:
        told = f"{where}: byte {e.start + 1}{part} is not UTF-8. Save the file as UTF-8."
    except json.JSONDecodeError as e:
        told = f"{path}:{line or e.lineno}: not JSON at column {e.colno} ({e.msg}). {fix}"
        if line and (e.pos >= len(e.doc.rstrip()) or e.msg.startswith("Unterminated")):
            told = f"{where}: the line ends in the middle of a JSON object. Fetch the file again."
    except (ValueError, RecursionError) as e:
        told = f"{where}: not JSON ({e}). {fix}"
    raise UserError(told)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
