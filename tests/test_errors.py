"""What counts as a full disk, and what is near to a word."""

import errno

from popi_jax.errors import did_you_mean, disk_is_full


def test_disk_is_full() -> None:
    assert disk_is_full(OSError(errno.EDQUOT, "quota"))
    assert disk_is_full(RuntimeError("write failed: No space left on device"))
    assert disk_is_full(ExceptionGroup("of threads", [ValueError("a"), OSError(errno.ENOSPC, "b")]))
    later = RuntimeError("the copy failed")
    later.__cause__ = OSError(errno.ENOSPC, "full")
    assert disk_is_full(later)
    assert not disk_is_full(OSError(errno.ENOENT, "no file"))


def test_did_you_mean() -> None:
    assert did_you_mean("prsm", ["prism", "jsonl"]) == ' Did you mean "prism"?'
    assert did_you_mean("xyz", ["prism", "jsonl"]) == ""
