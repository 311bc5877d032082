"""The users of a split as token ids, encoded once and kept beside their prepared copy.

They lie in <prepared copy>/tokens/<key>/: a record of compact arrays for each user in ArrayRecord
files, `lengths.npy` with a row of `LENGTHS` for each user, and `files.json`, which says how large
all of them must be. The key is a sha256 over all that decides about the ids, so that a stale copy
is never read. Where nothing can be kept on the disk, users are encoded on demand.

Refuses to import jax and grain: users are encoded by processes that need neither."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from popi_jax import files, templates
from popi_jax.data.encode import EncodedUser, encode_user
from popi_jax.data.packed import LENGTHS, measure_user, pack, unpack
from popi_jax.data.prompts import WORDING, Tokenizer
from popi_jax.data.records import Comment, Pair, Reading, Shot, User
from popi_jax.errors import UserError
from popi_jax.progress import Progress

FORMAT = 1  # raise it whenever `encode_user` or `pack` makes something else of the same input
_MANY = 4096  # users from which on processes share the work
_WORKERS = 2  # of them, where data.workers is 0
_FILES = 64  # at most, each of at least _MANY users
_KEPT_RECORDS = 20_000  # of users encoded on demand, about 3 kB each


class Host(NamedTuple):
    """The part of a process: the first one writes and shows how far it is; `wait` returns when all
    have come."""

    first: bool = True
    wait: Callable[[int], None] = lambda users: None  # given how many users are encoded


ALONE = Host()


class Encoded(NamedTuple):
    """The users of a split, and the same as token ids, by number."""

    source: Sequence[User]
    ids: "TokenFiles | OnDemand"

    @property
    def lengths(self) -> np.ndarray:
        """[users] LENGTHS"""
        return self.ids.lengths


class TokenFiles(Sequence[EncodedUser]):
    """Reads `folder`. A copy that is sent to another process opens its files anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lengths = np.load(folder / "lengths.npy", mmap_mode="r")
        self._opened: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFiles, (self.folder,)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: Any) -> Any:
        number = range(len(self))[number]
        if self._opened is None:
            self._opened = _open_records(self.folder)
        try:
            return unpack(self._opened[number])
        except (RuntimeError, ValueError) as e:
            fault = " ".join(str(e).split())
            told = f"user {number} cannot be read ({fault}); delete the folder, and it is made anew"
            raise UserError(f"{self.folder}: {told}") from None


class OnDemand(Sequence[EncodedUser]):
    """Encodes users when they are asked for, and keeps the first ones packed."""

    def __init__(
        self, source: Sequence[User], tokenizer: Tokenizer, cfg: Any, lengths: np.ndarray
    ) -> None:
        self._parts = (source, tokenizer, cfg)
        self.lengths = lengths
        self._kept: dict[int, bytes] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return OnDemand, (*self._parts, self.lengths)

    def __len__(self) -> int:
        return len(self._parts[0])

    def __getitem__(self, number: Any) -> Any:
        number = range(len(self))[number]
        if number in self._kept:
            return unpack(self._kept[number])
        source, tokenizer, cfg = self._parts
        user = encode_user(source[number], tokenizer, cfg)
        if len(self._kept) < _KEPT_RECORDS:
            self._kept[number] = pack(user)
        return user


def encode_users(source: Sequence[User], tokenizer: Tokenizer, cfg: Any) -> Encoded:
    """Keeps nothing on the disk: measures all users, and encodes them again on demand."""
    return Encoded(source, _measure(source, tokenizer, cfg, show=False))


def open_encoded(
    source: Sequence[User], tokenizer: Tokenizer, cfg: Any, home: Path, *, host: Host = ALONE
) -> Encoded:
    """The users of a split; encodes them first where `home`, the folder of all keys, does not hold
    them whole. A process that is not the first waits for that, and encodes them itself where it
    then does not see them: its disk is its own.

    Raises: UserError as `encode_user`."""
    folder = home / identify(source, tokenizer, cfg)
    ids: TokenFiles | OnDemand | None = None
    if host.first:
        ids = _open_or_write(folder, source, tokenizer, cfg, show=True)
    host.wait(len(source))
    return Encoded(source, ids or _open_or_write(folder, source, tokenizer, cfg, show=False))


def identify(source: Sequence[User], tokenizer: Tokenizer, cfg: Any) -> str:
    """The key of a split's ids: over FORMAT, the tokenizer, the settings and templates that matter,
    how a made user is encoded, which shows what the code does, and the split. Which source it is of
    says the folder."""
    settings = [f.name for f in dataclasses.fields(cfg.data) if not f.metadata["free"]]
    ours = {path.name: path.read_text() for path in sorted(templates.OURS.iterdir())}
    content = [
        FORMAT,
        identify_words(tokenizer),
        {name: getattr(cfg.data, name) for name in settings},
        {name: getattr(cfg.model, name) for name in WORDING},
        ours,
        cfg.generator.reads,
        len(source),
        [source[0].split, source[0].user_id] if len(source) else [],
        hashlib.sha256(pack(_encode_probe(tokenizer, cfg))).hexdigest(),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def identify_words(words: Any) -> str:
    """A hash of all that decides about the ids of a conversation."""
    _, (text, settings, template, _, system_role) = words.__reduce__()
    parts = repr((text, sorted(settings.items()), template, system_role))
    return hashlib.sha256(parts.encode()).hexdigest()[:24]


def _encode_probe(tokenizer: Tokenizer, cfg: Any) -> EncodedUser:
    """A user with something of everything, within limits that cut nothing."""
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    probe = User(
        user_id="probe",
        profile="profile x",
        survey="survey y",
        shots=(Shot("p1", "c1", "r1"), Shot("p2", "c2", "r2")),
        comments=(Comment("p3", "k3"), Comment("p4", "k4")),
        pairs=(Pair("", [*asked, {"role": "user", "content": "c"}], "chosen", "rejected"),),
        oracle="oracle z ; w",
        stated="stated v",
        readings=(Reading("q1", "a1", "b1"), Reading("q2", "a2", "b2")),
    )
    wide = dict.fromkeys(("context_len", "turn_len", "answer_len", "summary_len"), 1 << 20)
    return encode_user(
        probe, tokenizer, dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **wide))
    )


def _open_or_write(
    folder: Path, source: Sequence[User], tokenizer: Tokenizer, cfg: Any, *, show: bool
) -> TokenFiles | OnDemand:
    if folder.exists() and (fault := _find_fault(folder, len(source))):
        logging.warning("%s is damaged (%s): its users are encoded anew", folder, fault)
        with contextlib.suppress(OSError):
            away = folder.with_name(f".damaged-{uuid.uuid4().hex}")
            folder.rename(away)
            shutil.rmtree(away, ignore_errors=True)
    if not folder.exists():
        try:
            _write(folder, source, tokenizer, cfg, show=show)
        except OSError as e:
            logging.warning(
                "The encoded users cannot be kept in %s (%s): they are encoded on demand",
                *(folder.parent, e.strerror or e),
            )
            return _measure(source, tokenizer, cfg, show=show)
    return TokenFiles(folder)


def _find_fault(folder: Path, users: int) -> str:
    """What is wrong with the files of a folder, by their sizes; "" where all is well."""
    try:
        expected = json.loads((folder / "files.json").read_text())
        for name, size in expected.items():
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found} bytes, not {size}"
        lengths = np.load(folder / "lengths.npy", mmap_mode="r")
        if lengths.shape != (users,) or lengths.dtype != LENGTHS:
            return f"lengths.npy is of {lengths.shape} users, not {users}"
    except (OSError, ValueError, AttributeError) as e:
        return f"{type(e).__name__}: {e}"
    return ""


def _open_records(folder: Path) -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource(sorted(map(str, folder.glob("*.array_record"))))


def _write(
    folder: Path, source: Sequence[User], tokenizer: Tokenizer, cfg: Any, *, show: bool
) -> None:
    with files.make_folder(folder) as part:
        write = functools.partial(_write_file, folder=part)
        lengths = _run_blocks(write, source, tokenizer, cfg, show=show)
        if (found := len(_open_records(part))) != len(source):
            raise OSError(f"{found} of {len(source)} users were written")
        np.save(part / "lengths.npy", lengths)
        sizes = {path.name: path.stat().st_size for path in sorted(part.iterdir())}
        (part / "files.json").write_text(json.dumps(sizes, indent=2) + "\n")


def _measure(source: Sequence[User], tokenizer: Tokenizer, cfg: Any, *, show: bool) -> OnDemand:
    found = OnDemand(source, tokenizer, cfg, np.zeros(0, LENGTHS))
    if len(source) < _MANY:  # they are kept at once
        rows = (measure_user(found[number]) for number in range(len(source)))
        found.lengths = np.fromiter(rows, LENGTHS, len(source))
    else:
        found.lengths = _run_blocks(_measure_block, source, tokenizer, cfg, show=show)
    return found


Block = tuple[int, range]  # number of a file, and of the users in it
Encode = Callable[[int], EncodedUser]


def _measure_block(block: Block, encode: Encode) -> Iterator[tuple[int, ...]]:
    yield from (measure_user(encode(number)) for number in block[1])


def _write_file(block: Block, encode: Encode, folder: Path) -> Iterator[tuple[int, ...]]:
    from array_record.python.array_record_module import ArrayRecordWriter

    number, users = block
    writer = ArrayRecordWriter(str(folder / f"users-{number:05d}.array_record"), "group_size:1")
    try:
        for user in map(encode, users):
            writer.write(pack(user))
            yield measure_user(user)
    finally:
        writer.close()


def _run_blocks(
    run: Callable[[Block, Encode], Iterator[tuple[int, ...]]],
    source: Sequence[User],
    tokenizer: Tokenizer,
    cfg: Any,
    *,
    show: bool,
) -> np.ndarray:
    """The lengths of all users. `run` handles a block of them, here or in other processes."""
    count, lengths = len(source), np.zeros(len(source), LENGTHS)
    size = max(_MANY, -(-count // _FILES))
    blocks = [
        (start // size, range(count)[start : start + size]) for start in range(0, count, size)
    ]
    many = count >= _MANY
    if many and show:
        logging.info("Encoding %d users", count)
    with Progress(count, label="encoding", unit="users", enabled=show and many) as progress:
        if not many:
            for block in blocks:
                encode = functools.partial(_encode_one, source, tokenizer, cfg)
                lengths[block[1].start : block[1].stop] = _collect(block, run(block, encode))
            return lengths
        done, shared = 0, multiprocessing.get_context("spawn")
        counter = shared.Value("q", 0)
        given = (run, source, tokenizer, cfg, counter)
        workers = min(cfg.data.workers or _WORKERS, len(blocks))
        with shared.Pool(workers, _start_worker, given) as pool:
            pending = [pool.apply_async(_run_block, (block,)) for block in blocks]
            for block, result in zip(blocks, pending, strict=True):
                while not result.ready():
                    result.wait(0.5)
                    if (now := counter.value) != done:
                        done = now
                        progress.update(done)
                lengths[block[1].start : block[1].stop] = result.get()
        progress.update(count)
    return lengths


def _encode_one(source: Sequence[User], tokenizer: Tokenizer, cfg: Any, number: int) -> EncodedUser:
    return encode_user(source[number], tokenizer, cfg)


_worker: tuple[Any, ...] = ()  # what a process that encodes was given when it started


def _start_worker(*given: Any) -> None:
    global _worker
    _worker = given


def _run_block(block: Block) -> np.ndarray:
    run, source, tokenizer, cfg, counter = _worker

    def count() -> Iterator[tuple[int, ...]]:
        rows = run(block, functools.partial(_encode_one, source, tokenizer, cfg))
        for number, row in enumerate(rows, 1):
            yield row
            if number % 64 == 0:
                with counter.get_lock():
                    counter.value += 64

    return _collect(block, count())


def _collect(block: Block, rows: Iterator[tuple[int, ...]]) -> np.ndarray:
    return np.fromiter(rows, LENGTHS, len(block[1]))
