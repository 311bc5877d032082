"""Reads files of JSON and checks every field that is used. A complaint is one line: where, field,
found, allowed, fix.

Refuses to guess: a row is either right or a `UserError`; `on_bad_row` decides whether that stops
the program ("error") or sets the row aside ("skip")."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from popi_jax.data.records import User
from popi_jax.errors import UserError, did_you_mean

T = TypeVar("T")


class Loaded(NamedTuple):
    """What a source returns: its users, and the message of each row that was set aside."""

    users: list[User]
    bad_rows: list[str]


@dataclasses.dataclass(frozen=True)
class Row:
    """A JSON object and where it stands; `path` names the enclosing fields, such as "signals."."""

    where: str
    fields: dict[str, Any]
    path: str = ""

    def error(self, name: str, found: object, allowed: str, fix: str) -> UserError:
        return UserError(
            f'{self.where}: field "{self.path}{name}": found {show(found)}, allowed: {allowed}. {fix}'
        )

    def value(self, name: str, allowed: str) -> Any:
        """Returns a field that must exist. Raises: UserError."""
        if name not in self.fields:
            near = did_you_mean(name, self.fields)
            fix = f'{near} Rename it to "{name}".' if near else " Add the field."
            found = ", ".join(sorted(self.fields)) or "no field at all"
            raise UserError(
                f'{self.where}: no field "{self.path}{name}" (allowed: {allowed}); found {shorten(found, 200)}.{fix}'
            )
        return self.fields[name]

    def text(self, name: str, *, empty: bool = False, null: bool = False) -> str:
        """Returns a text without outer white space; with `null`, a null reads as "". Raises:
        UserError."""
        allowed = "a text" if empty else "a text that is not empty"
        value = self.value(name, allowed)
        if value is None and null:
            return ""
        if not isinstance(value, str) or not (empty or value.strip()):
            raise self.error(name, value, allowed, "Correct the value.")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise self.error(
                name,
                ascii(value),
                "Unicode text",
                "Remove the half surrogate pair (\\ud800 to \\udfff).",
            )
        return value.strip()

    def integer(self, name: str, low: int, high: int | None = None) -> int:
        """Returns a whole number of low..high. Raises: UserError."""
        allowed = (
            f"a whole number of at least {low}"
            if high is None
            else f"a whole number of {low} to {high}"
        )
        value = self.value(name, allowed)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < low or (high is not None and value > high):
            raise self.error(name, value, allowed, "Correct the value.")
        return int(value)

    def flag(self, name: str) -> bool:
        value = self.value(name, "true or false")
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false", "Correct the value.")
        return value

    def object(self, name: str, *, null: bool = False) -> "Row":
        """Returns a nested object; with `null`, a null reads as {}. Raises: UserError."""
        value = self.value(name, "an object {...}")
        if not isinstance(value, dict) and not (value is None and null):
            raise self.error(name, value, "an object {...}", "Correct the value.")
        return Row(self.where, value or {}, f"{self.path}{name}.")

    def objects(self, name: str) -> list["Row"]:
        """Returns a list of nested objects. Raises: UserError."""
        allowed = "a list of objects [{...}, ...]"
        value = self.value(name, allowed)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(name, value, allowed, "Correct the value.")
        return [Row(self.where, item, f"{self.path}{name}[{i}].") for i, item in enumerate(value)]

    def only(self, names: Iterable[str]) -> None:
        """Raises UserError when there is a field of another name."""
        allowed = list(names)
        for name in self.fields:
            if name not in allowed:
                fix = did_you_mean(name, allowed) or " Remove it."
                raise UserError(
                    f'{self.where}: unknown field "{self.path}{name}"; allowed: {", ".join(allowed)}.{fix}'
                )

    def unique(self, name: str, seen: dict[str, str]) -> None:
        """Adds the row to `seen` (id -> where). Raises: UserError when the id was there."""
        first = seen.setdefault(self.fields[name], self.where)
        if first != self.where:
            raise self.error(
                name,
                self.fields[name],
                f"an id that occurs once (first at {first})",
                "Remove one of the rows.",
            )


def show(value: object) -> str:
    return shorten(json.dumps(value, ensure_ascii=False), 60)


def shorten(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 3] + "..."


def existing(path: Path) -> Path:
    """Returns the path of a file. Raises: UserError when it does not exist or is no file."""
    if not path.exists():
        others = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        found = (
            f"found {shorten(', '.join(sorted(others)), 200)}"
            if others
            else f"{path.parent} is empty or does not exist"
        )
        raise UserError(
            f"{path}: no such file; {found}.{did_you_mean(path.name, others) or ' Check the field data.path.'}"
        )
    if not path.is_file():
        raise UserError(f"{path}: found a folder, allowed: a file. Check the field data.path.")
    return path


def read_lines(path: Path, parse: Callable[[Row], T], on_bad_row: str) -> tuple[list[T], list[str]]:
    """Parses a file of one JSON object a line (UTF-8; blank lines are passed over); returns results
    and bad rows.

    Raises: UserError when the file is missing or holds no row, and at the first bad row unless
    on_bad_row is "skip"."""
    lines = [
        (f"{path}:{number}", line)
        for number, line in enumerate(_bytes(path).split(b"\n"), 1)
        if line.strip()
    ]
    if not lines:
        raise UserError(
            f"{path}: the file is empty, allowed: one JSON object a line. Fetch or write the file again."
        )
    return _parse_all(
        lines, lambda where, line: parse(Row(where, _decode(where, line))), on_bad_row
    )


def read_array(path: Path, parse: Callable[[Row], T], on_bad_row: str) -> tuple[list[T], list[str]]:
    """Parses a file that is one JSON array of objects; rows are numbered from 1.

    Raises: UserError when the file is missing, empty or not a JSON array (whatever on_bad_row
    says), and at the first bad row unless on_bad_row is "skip"."""
    raw = _bytes(path)
    if not raw.strip():
        raise UserError(
            f"{path}: the file is empty, allowed: a JSON array of objects. Fetch the file again."
        )
    try:
        items = json.loads(raw.decode("utf-8-sig"), parse_constant=_no_constant)
    except UnicodeDecodeError as e:
        raise UserError(
            f"{path}: byte {e.start + 1} is not UTF-8. Save the file as UTF-8."
        ) from None
    except json.JSONDecodeError as e:
        raise UserError(
            f"{path}:{e.lineno}: not JSON at column {e.colno} ({e.msg}). Fetch the file again."
        ) from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not JSON ({e}). Fetch the file again.") from None
    if not isinstance(items, list) or not items:
        raise UserError(
            f"{path}: found {show(items)}, allowed: a JSON array with at least one object. Fetch the file again."
        )

    def parse_item(where: str, item: object) -> T:
        if not isinstance(item, dict):
            raise UserError(
                f"{where}: found {show(item)}, allowed: an object {{...}}. Correct the row."
            )
        return parse(Row(where, item))

    return _parse_all(
        [(f"{path}: row {i}", item) for i, item in enumerate(items, 1)], parse_item, on_bad_row
    )


U = TypeVar("U")


def _parse_all(
    items: list[tuple[str, U]], parse: Callable[[str, U], T], on_bad_row: str
) -> tuple[list[T], list[str]]:
    good: list[T] = []
    bad: list[str] = []
    for where, item in items:
        try:
            good.append(parse(where, item))
        except UserError as e:
            if on_bad_row == "error":
                raise
            bad.append(str(e))
    return good, bad


def _bytes(path: Path) -> bytes:
    try:
        return existing(path).read_bytes()
    except OSError as e:
        raise UserError(
            f"{path}: cannot be read ({e.strerror}). Check the permissions of the file."
        ) from None


def _decode(where: str, line: bytes) -> dict[str, Any]:
    if line.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{where}: found a Git LFS pointer, allowed: the file itself. Run `git lfs pull` where it was cloned."
        )
    try:
        value = json.loads(line.decode("utf-8-sig"), parse_constant=_no_constant)
    except UnicodeDecodeError as e:
        raise UserError(
            f"{where}: byte {e.start + 1} of the line is not UTF-8. Save the file as UTF-8."
        ) from None
    except json.JSONDecodeError as e:
        if e.pos >= len(e.doc.rstrip()) or e.msg.startswith("Unterminated"):
            raise UserError(
                f"{where}: the line ends in the middle of a JSON object. Fetch the file again."
            ) from None
        raise UserError(
            f"{where}: not JSON at column {e.colno} ({e.msg}). Write one JSON object a line."
        ) from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not JSON ({e}). Write one JSON object a line.") from None
    if not isinstance(value, dict):
        raise UserError(
            f"{where}: found {show(value)}, allowed: one JSON object a line, {{...}}. Correct the line."
        )
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
