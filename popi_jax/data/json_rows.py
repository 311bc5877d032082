"""Checks every field that is used of the rows of files (row_files.py reads them). A complaint is
one line: where, field, found, allowed, fix.

Refuses to guess: a row is either right or a `UserError`; `on_bad_row` decides whether that stops
the program ("error") or sets the row aside ("skip"). A text is data: any Unicode is taken, control
characters (NUL too), U+2028 and texts that look like special tokens of a model included."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from popi_jax.data.row_files import check_file, clean, read_values, shorten, show
from popi_jax.errors import UserError, did_you_mean

__all__ = ("Row", "check_file", "read_lines", "shorten", "show", "stream_rows")

T = TypeVar("T")
_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair


@dataclasses.dataclass(frozen=True)
class Row:
    """A JSON object and where it stands; `path` names the enclosing fields, such as "signals."."""

    where: str
    fields: dict[str, Any]
    path: str = ""

    def make_error(self, name: str, found: object, allowed: str, fix: str) -> UserError:
        field = f'{self.where}: field "{clean(self.path + name)}"'
        return UserError(f"{field}: found {show(found)}, allowed: {allowed}. {fix}")

    def get_value(self, name: str, allowed: str) -> Any:
        """Returns a field that must exist. Raises: UserError."""
        if name in self.fields:
            return self.fields[name]
        near = did_you_mean(name, self.fields)
        fix = f'{near} Rename it to "{name}".' if near else " Add the field."
        found = shorten(clean(", ".join(sorted(self.fields))) or "no field at all", 200)
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
        if not value.isascii() and _HALF.search(value):
            fix = "Remove the half surrogate pair (\\ud800 to \\udfff)."
            raise self.make_error(name, ascii(value), "Unicode text", fix)
        return value.strip()

    def get_texts(self, name: str) -> list[str]:
        """Returns a list of texts that are not empty, as `get_text` does. Raises: UserError."""
        allowed = "a list of texts that are not empty"
        value = self.get_value(name, allowed)
        if not isinstance(value, list):
            raise self.make_error(name, value, allowed, "Correct the value.")
        numbered = {f"{name}[{i}]": item for i, item in enumerate(value)}
        texts = Row(self.where, numbered, self.path)
        return [texts.get_text(each) for each in numbered]

    def get_integer(self, name: str, low: int, high: int | None = None) -> int:
        """Returns a whole number of low..high, which may be written as 54.0. Raises: UserError."""
        limits = f"at least {low}" if high is None else f"{low} to {high}"
        allowed = f"a whole number of {limits}"
        value = self.get_value(name, allowed)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
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
                unknown = f'{self.where}: unknown field "{clean(self.path + name)}"'
                raise UserError(f"{unknown}; allowed: {', '.join(allowed)}.{fix}")

    def check_unique(self, name: str, seen: dict[str, str]) -> None:
        """Adds the row to `seen` (id -> where). Raises: UserError when the id was there."""
        first = seen.setdefault(str(self.fields[name]).strip(), self.where)
        if first != self.where:
            allowed = f"an id that occurs once (first at {first})"
            raise self.make_error(name, self.fields[name], allowed, "Remove one of the rows.")


def stream_rows(
    path: Path, parse: Callable[[Row], T], on_bad_row: str, bad_rows: list[str]
) -> Iterator[T]:
    """Yields parse(row) of each row of a file, .jsonl, .json or .parquet, JSON also with .gz, as
    row_files.read_values says; with on_bad_row "skip" the complaint about a row goes to `bad_rows`.

    Raises: UserError at the first `next` when the file is missing, at any other when it is damaged
    or holds no row (whatever on_bad_row says), and at the first bad row unless on_bad_row is
    "skip"."""
    for where, value in read_values(path):
        try:
            if isinstance(value, UserError):
                raise value
            if not isinstance(value, dict):
                lines = where.startswith(f"{path}:") and not where.startswith(f"{path}: ")
                allowed = "one JSON object a line, {...}" if lines else "an object {...}"
                raise UserError(f"{where}: found {show(value)}, allowed: {allowed}. Correct it.")
            parsed = parse(Row(where, value))
        except UserError as e:
            if on_bad_row == "error":
                raise
            bad_rows.append(str(e))
            continue
        yield parsed


def read_lines(path: Path, parse: Callable[[Row], T], on_bad_row: str) -> tuple[list[T], list[str]]:
    """Returns what `stream_rows` yields, and the bad rows. Raises: UserError as it does."""
    bad_rows: list[str] = []
    return list(stream_rows(path, parse, on_bad_row, bad_rows)), bad_rows
