"""What P-Soups and UF-P-4 share: files in AlignX's format (alignx_rows.py) whose only signals are
past pairs, answered by few personas.

A user is a row: one draw of past pairs, and a target. Rows with one target and persona are one
person ("psoups/friendly_unfriendly/1#7": the draw of row 7), so that intervals count a target once
for all of its draws. Rows are sorted by persona in the files: no split goes by place."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from popi_jax.data.json_rows import stream_rows
from popi_jax.data.leaks import fold
from popi_jax.data.records import Pair, Shot, User
from popi_jax.data.sources import alignx_rows as rows
from popi_jax.data.sources import download
from popi_jax.data.sources.alignx_rows import Layout, Record
from popi_jax.data.sources.source import Loaded
from popi_jax.data.splits import split_topics
from popi_jax.errors import UserError

COMMIT = "4b86568e89817825f27e2b72f31134b1dec08b21"
CODE = "github.com/JinaLeejnl/AlignX"
RAW = f"https://raw.githubusercontent.com/JinaLeejnl/AlignX/{COMMIT}/benchmark"
CITATION = (
    "Li et al., From 1,000,000 Users to Every User: Scaling Up Personalized Preference for "
    "User-level Alignment, 2025 (its benchmark files)"
)
OPTIONS = ("on_bad_row", "split_by", "validation_fraction", "test_fraction", "num_shots")
SPLITS = ("target", "user")


class Kind(NamedTuple):
    """What the two sets differ in."""

    name: str
    folder: str  # of benchmark/ in the repository
    sha256: dict[str, str]  # file -> its sum, "" where the file was not seen
    layout: Layout
    tell_persona: Callable[[Record, str], str]  # row and name of its file -> the persona


class Sample(NamedTuple):
    """A row that can be a user."""

    user_id: str
    record: Record
    persona: str
    shots: tuple[Shot, ...]
    target: int  # a number: equal targets have the same


def find_folder(cfg: Any, may_download: bool, kind: Kind) -> Path:
    """Returns `data.path`, into which the files are downloaded when there are none.

    Raises: FilesMissing when there are none and none can be had."""
    path = Path(cfg.path)
    if path.is_file() or (path.is_dir() and rows.list_data(path)):
        return path
    names = ", ".join(kind.sha256)
    fix = f"Put {names} of benchmark/{kind.folder} of {CODE} there, or set data.path to a file."

    def fetch() -> None:
        download.download_files(path, f"{RAW}/{kind.folder}", kind.sha256)

    return download.fill_folder(path, may_download, fetch, missing="data files", fix=fix)


def load(folder: Path, cfg: Any, kind: Kind) -> Loaded:
    """Reads all rows. split_by "target": by the prompt, so that equal targets, and those of two
    personas that answer one prompt, share a split; a prompt that occurs among the past pairs of any
    row is for training, so that no test target is seen as a past pair. "user": some personas are
    the test split; validation users are chosen by their prompt.

    Left out are rows whose answer stands in their signals, and past pairs, or rows, that spell out
    the persona.
    Raises: UserError."""
    if cfg.num_shots < 1:
        allowed = f"at least 1 for {kind.name}, whose only signals are past pairs"
        raise UserError(f'field "data.num_shots": found {cfg.num_shots}, allowed: {allowed}')
    found = Loaded((), [], {}, {})
    samples = [
        sample for path in rows.list_files(folder) for sample in _read(path, cfg, kind, found)
    ]
    splits = _choose_splits(samples, cfg)
    counts = {"targets": len({(s.persona, s.target) for s in samples})}
    counts["past pairs"] = len({_number_shot(shot) for s in samples for shot in s.shots})
    counts["personas"] = len({s.persona for s in samples})
    counts["rows that equal another"] = len(samples) - len({_list_content(s) for s in samples})
    found.counts.update(counts)
    users = _make_users(samples, splits, found.left_out)
    return Loaded(users, found.bad_rows, found.left_out, found.counts, total=len(samples))


def _read(path: Path, cfg: Any, kind: Kind, found: Loaded) -> Iterator[Sample]:
    name = rows.name_file(path)
    parse = rows.make_parser(kind.layout)
    for record in stream_rows(path, parse, cfg.on_bad_row, found.bad_rows):
        rows.count(found.counts, "rows")
        if reason := rows.find_answer(record):
            rows.count(found.left_out, reason)
            continue
        persona = kind.tell_persona(record, name)
        said = fold(persona)
        if any(said in fold(t) for t in (record.prompt, record.chosen, record.rejected)):
            rows.count(found.left_out, "the target spells out the persona")
            continue
        kept = tuple(
            s
            for s in record.shots
            if not any(said in fold(t) for t in (s.prompt, s.chosen, s.rejected))
        )
        if len(kept) < len(record.shots):
            reason = "past pairs that spell out the persona (their rows stay)"
            rows.count(found.left_out, reason, len(record.shots) - len(kept))
        if not kept:
            rows.count(found.left_out, "no past pair is left")
            continue
        user_id = f"{kind.name}/{name}/{record.number}"
        yield Sample(user_id, record, persona, kept[: cfg.num_shots], rows.number_target(record))


def _choose_splits(samples: list[Sample], cfg: Any) -> list[str]:
    shown = {fold(shot.prompt) for s in samples for shot in s.shots}
    held_out: set[str] = set()
    test_fraction = cfg.test_fraction
    if cfg.split_by == "user":
        of_persona = split_topics({s.persona for s in samples}, 0.0, cfg.test_fraction)
        held_out = {persona for persona, split in of_persona.items() if split == "test"}
        test_fraction = 0.0
    return [
        "test"
        if s.persona in held_out
        else "train"
        if fold(s.record.prompt) in shown
        else rows.split_by_prompt(s.record, cfg.validation_fraction, test_fraction)
        for s in samples
    ]


def _make_users(
    samples: list[Sample], splits: list[str], left_out: dict[str, int]
) -> Iterator[User]:
    """Yields the users but those whose target users of an earlier split (train, validation, test)
    have as target or among their past pairs: two personas may prefer the same."""
    order = {"train": 0, "validation": 1, "test": 2}
    first: dict[int, int] = {}  # number of a pair -> the earliest split in which it is seen
    for sample, split in zip(samples, splits, strict=True):
        for number in (sample.target, *map(_number_shot, sample.shots)):
            first[number] = min(first.get(number, 2), order[split])
    people: dict[tuple[str, int], str] = {}
    for sample, split in zip(samples, splits, strict=True):
        if first[sample.target] < order[split]:
            rows.count(left_out, "the target is seen in training, or among validation users")
            continue
        person = people.setdefault((sample.persona, sample.target), sample.user_id)
        draw = sample.user_id.rpartition("/")[2]
        user_id = person if person == sample.user_id else f"{person}#{draw}"
        record = sample.record
        prompt = [{"role": "user", "content": record.prompt}]
        yield User(
            user_id=user_id,
            profile="",
            survey="",
            shots=sample.shots,
            comments=(),
            pairs=(Pair(user_id, prompt, record.chosen, record.rejected),),
            oracle=sample.persona,
            split=split,
            groups={"persona": sample.persona},
        )


def _number_shot(shot: Shot) -> int:
    return rows.number_texts(shot.prompt, shot.chosen, shot.rejected)


def _list_content(sample: Sample) -> tuple[str, ...]:
    record = sample.record
    signals = (text for s in sample.shots for text in (s.prompt, s.chosen, s.rejected))
    return (record.prompt, record.chosen, record.rejected, *signals)
