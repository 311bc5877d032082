"""Reads a large data set in a process of its own, so that rows are parsed while those before them
are checked and written.

The process is a new Python, told by a pipe what to do: neither a fork of one that may have started
a device, nor another run of the program's main module."""

import dataclasses
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from popi_jax.data.records import User
from popi_jax.data.sources.source import Loaded
from popi_jax.errors import UserError

BATCH = 64  # users that pass at once
AHEAD = 16  # batches that may wait

Load = Callable[[Path, Any], Loaded]


def read_ahead(loaded: Loaded, load: Load, folder: Path, cfg: Any) -> Loaded:
    """Returns what `load(folder, cfg)` does, read by another process from the first user on.

    loaded: what `load` returned, of which no user has been read; its lists are filled."""
    return dataclasses.replace(loaded, users=_receive(loaded, pickle.dumps((load, folder, cfg))))


def _receive(loaded: Loaded, task: bytes) -> Iterator[User]:
    """Raises: UserError, those of `load` too."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), *sys.path)))
    with subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
    ) as process:
        assert process.stdin and process.stdout
        try:
            process.stdin.write(task)
            process.stdin.close()
            while isinstance(received := pickle.load(process.stdout), list):
                yield from received
            if isinstance(received, UserError):
                raise received
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = process.wait()
            told = f"the process that reads the data ended early (exit status {code})"
            raise UserError(f"{told}; what it said stands above") from None
        finally:
            process.kill()  # it has nothing to do any more
        loaded.bad_rows.extend(received.bad_rows)
        loaded.left_out.update(received.left_out)
        loaded.counts.update(received.counts)


def _send(task: bytes, out: BinaryIO) -> None:
    """Writes lists of users, then the rest of `Loaded` or the UserError that ended them."""
    waiting: queue.Queue[Any] = queue.Queue(AHEAD)

    def write() -> None:
        try:
            while (item := waiting.get()) is not None:
                out.write(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
            out.flush()
        except BrokenPipeError:  # nobody reads any more
            os._exit(1)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        load, folder, cfg = pickle.loads(task)
        loaded = load(folder, cfg)
        batch: list[User] = []
        for user in loaded.users:
            batch.append(user)
            if len(batch) == BATCH:
                waiting.put(batch)
                batch = []
        waiting.put(batch)
        waiting.put(dataclasses.replace(loaded, users=()))
    except UserError as e:
        waiting.put(UserError(str(e)))
    finally:
        waiting.put(None)
        writer.join()


if __name__ == "__main__":
    answer = os.fdopen(os.dup(1), "wb", buffering=1 << 20)
    os.dup2(2, 1)  # what is printed is no answer
    _send(sys.stdin.buffer.read(), answer)
