"""Errors of the user, told in one line. Anything else that is raised is a defect of ours and keeps
its traceback."""

import difflib
import errno
import json
import os
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: an entry point prints the message as one line and exits with status 2, without a
    traceback.

    The message names the file and line or the field, what was found, what is allowed and the
    nearest fix."""


def did_you_mean(value: str, allowed: Iterable[str]) -> str:
    """Returns ' Did you mean "x"?' for the nearest allowed word, or '' when none is near."""
    near = difflib.get_close_matches(str(value), list(allowed), n=1)
    return f' Did you mean "{near[0]}"?' if near else ""


def check_field(ok: bool, name: str, value: object, rule: str) -> None:
    """Raises UserError with the field, its value and the rule unless `ok`."""
    if not ok:
        shown = json.dumps(value, ensure_ascii=False, default=repr)
        raise UserError(f"config.{name} = {shown}: {rule}")


def disk_is_full(error: BaseException | None) -> bool:
    """Says whether the error, one that led to it or one of its group means that a disk or a quota
    is full."""
    if error is None:
        return False
    numbers = (errno.ENOSPC, errno.EDQUOT)
    if (isinstance(error, OSError) and error.errno in numbers) or any(
        os.strerror(n) in str(error) for n in numbers
    ):
        return True
    parts = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    return any(disk_is_full(e) for e in (error.__cause__, error.__context__, *parts))
