"""Your own data: one JSON object a line, one preference pair each; what a line may hold is in
docs/data.md.

    {"user_id": "ann", "record_id": "1", "prompt": [{"role": "user", "content": "…"}], "chosen":
    "…", "rejected": "…",
     "oracle": "…", "signals": {"profile": "…", "survey": "…", "comments": [{"prompt": "…",
     "comment": "…"}], "fewshot": [{"prompt": "…", "chosen": "…", "rejected": "…"}]},
     "groups": {"age": "…"}}

`oracle`, `groups`, the parts of `signals` and `conversation` (the id of the conversation that a
line, a comment or an example is from) may be left out; `dataset` and `meta` are not read.
Lines of one user_id with equal signals are one user. With other signals they are a further user,
"ann#2", in the same split: signals are drawn per person, never per prompt. The mark "#" is kept for
that: in an id of the file it is written "%23" (and "%" as "%25"), so that a real "ann#2" is another
person.

The lines may also be rows of parquet, in which null is left out. As a user's lines may stand
anywhere, all lines are in memory while they are grouped: about twice the size of the file."""

import dataclasses
from pathlib import Path
from typing import Any

from popi_jax.data.json_rows import Row, check_file, read_lines, show
from popi_jax.data.records import SPLITS, Comment, Groups, Messages, Pair, Shot, User
from popi_jax.data.sources.source import Card, Loaded, Source
from popi_jax.data.splits import choose_split
from popi_jax.errors import UserError

FIELDS = (
    *("user_id", "dataset", "record_id", "conversation", "signals", "prompt", "chosen"),
    *("rejected", "oracle", "groups", "meta"),
)
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".json", ".json.gz")  # in a folder of splits
SIGNALS = ("profile", "survey", "fewshot", "comments")
PLACEHOLDERS = ("EMPTY STRING", "nan", "NaN", "None")


@dataclasses.dataclass(frozen=True)
class Record:
    """One line: a user, who holds no pair yet, and one pair."""

    user: User
    pair: Pair


def list_files(path: Path) -> list[Path]:
    """Returns the files that `load` reads: the file, or those of a folder in the order of SPLITS.
    Raises: UserError when one is missing, or is there twice."""
    if not path.is_dir():
        return [check_file(path)]
    files = []
    for split in SPLITS:
        found = [path / (split + end) for end in SUFFIXES if (path / (split + end)).exists()]
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise UserError(f"{path}: found {names}, allowed: one of them. Remove the others.")
        files.append(check_file(found[0] if found else path / f"{split}{SUFFIXES[0]}"))
    return files


def load(path: Path, cfg: Any) -> Loaded:
    """Reads a file, split by user_id or by conversation, or a folder of train.jsonl,
    validation.jsonl and test.jsonl (or with another of SUFFIXES).

    Args: cfg: the `data` part of the configuration.
    Raises: UserError, also when what is kept together occurs in two files of a folder."""
    users: list[User] = []
    bad_rows: list[str] = []
    # what is kept together, user_id or conversation -> its split and where it was first seen
    split_by_name: dict[str, tuple[str, str]] = {}
    files = list_files(path)
    for split, file in zip(SPLITS if path.is_dir() else ("",), files, strict=True):
        records, bad = _read_records(file, split, split_by_name, cfg)
        users += _group(records, cfg)
        bad_rows += bad
    return Loaded(users, bad_rows)


def _read_records(
    file: Path, split: str, split_by_name: dict[str, tuple[str, str]], cfg: Any
) -> tuple[list[Record], list[str]]:
    """Reads a file whose users all belong to `split`, or with split "" each to the split of its
    name."""
    seen: dict[str, str] = {}
    told: dict[str, tuple[User, str]] = {}

    def parse(row: Row) -> Record:
        record = _parse_record(_leave_out_null(row, file))
        name, talks = record.user.user_id, cfg.split_by == "conversation"
        if talks and not record.pair.conversation:
            allowed = "the id of a conversation, by which data.split_by = conversation splits"
            raise row.make_error("conversation", "", allowed, "Add it, or split by user.")
        kept = f"{name}/{record.pair.conversation}" if talks else name
        own = split or choose_split(kept, cfg.validation_fraction, cfg.test_fraction)
        user, first = told.setdefault(name, (record.user, row.where))
        for field in ("oracle", "groups"):
            found, known = getattr(record.user, field), getattr(user, field)
            if found != known:
                allowed = f"the same of each user_id, {show(known)} at {first}"
                raise row.make_error(field, found, allowed, "Correct it.")
        earlier, first = split_by_name.setdefault(kept, (own, row.where))
        if earlier != own:
            field, what = ("conversation", "conversation") if talks else ("user_id", "user")
            allowed = f"a {what} of one split only (also at {first})"
            raise row.make_error(field, kept, allowed, f"Keep each {what} in one file.")
        row.check_unique("record_id", seen)
        return Record(dataclasses.replace(record.user, split=own), record.pair)

    return read_lines(file, parse, cfg.on_bad_row)


def read_users(path: Path, num_shots: int) -> list[User]:
    """Returns users to summarise, in the order of the file: lines of which only user_id and signals
    are needed and read.

    Users hold no pairs, and the first `num_shots` past pairs, as training shows.
    Raises: UserError naming file and line."""

    def parse(row: Row) -> User:
        row = _leave_out_null(row, path)
        row.allow_only(FIELDS)
        user = _parse_signals(row, num_shots)
        if not (user.profile or user.survey or user.shots or user.comments):
            allowed = f"at least one of {', '.join(SIGNALS)}"
            raise row.make_error("signals", row.fields["signals"], allowed, "Add one.")
        return user

    if not path.is_file():
        raise UserError(f"{path}: no such file; give one with one JSON object a line")
    users, _ = read_lines(path, parse, "error")
    return list(dict.fromkeys(users))


def _leave_out_null(row: Row, file: Path) -> Row:
    """The row without missing values, where the format has no other way to leave something out."""

    def leave_out(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: leave_out(v) for name, v in value.items() if v is not None}
        return [leave_out(v) for v in value] if isinstance(value, list) else value

    if file.suffix.lower() != ".parquet":
        return row
    return dataclasses.replace(row, fields=leave_out(row.fields))


def _parse_record(row: Row) -> Record:
    row.allow_only(FIELDS)
    user = _parse_signals(row)
    chosen, rejected = (_get_text(row, name) for name in ("chosen", "rejected"))
    own = _get_conversation(row)
    pair = Pair(row.get_text("record_id"), _parse_messages(row), chosen, rejected, {}, own)
    _check_differs(row, pair, "line")
    for i, shot in enumerate(user.shots):
        if shot.prompt == pair.prompt[-1]["content"]:
            field = f"signals.fewshot[{i}].prompt"
            allowed = (
                'no prompt that is also the line\'s own "prompt": it would give the answer away'
            )
            raise row.make_error(field, shot.prompt, allowed, "Remove that example.")
    asked = {m["content"] for m in pair.prompt if m["role"] == "user"}
    for i, comment in enumerate(user.comments):
        if comment.prompt in asked or comment.comment in asked:
            field, allowed = f"signals.comments[{i}]", 'no text of the line\'s own "prompt"'
            raise row.make_error(field, comment.prompt, allowed, "Remove that comment.")
    oracle, groups = _get_optional(row, "oracle"), _parse_groups(row)
    return Record(dataclasses.replace(user, oracle=oracle, groups=groups), pair)


def _parse_groups(row: Row) -> Groups:
    groups = row.get_object("groups") if "groups" in row.fields else Row(row.where, {})
    return {name: _get_text(groups, name) for name in groups.fields}


def _parse_signals(row: Row, num_shots: int | None = None) -> User:
    """Returns the user of a line, without pairs and oracle."""
    signals = row.get_object("signals")
    signals.allow_only(SIGNALS)
    shots, comments = (
        signals.get_objects(name) if name in signals.fields else []
        for name in ("fewshot", "comments")
    )
    return User(
        user_id=row.get_text("user_id"),
        profile=_get_optional(signals, "profile"),
        survey=_get_optional(signals, "survey"),
        shots=tuple([_parse_shot(item) for item in shots][:num_shots]),
        comments=tuple(_parse_comment(item) for item in comments),
        pairs=(),
    )


def _escape(user_id: str) -> str:
    """An id without "#", another one for each id."""
    return user_id.replace("%", "%25").replace("#", "%23")


def _group(records: list[Record], cfg: Any) -> list[User]:
    """Joins the lines of equal user and signals, and gives each draw its id; keeps the first
    num_shots examples and the first num_pairs pairs."""
    pairs: dict[User, list[Pair]] = {}
    for record in records:
        pairs.setdefault(record.user, []).append(record.pair)
    draws: dict[str, dict[User, int]] = {}  # of the signals of each name, in any split
    users: list[User] = []
    for user, held_out in pairs.items():
        known = draws.setdefault(user.user_id, {})
        draw = known.setdefault(dataclasses.replace(user, split=""), len(known) + 1)
        name = _escape(user.user_id)
        user_id = name if draw == 1 else f"{name}#{draw}"
        shots, kept = user.shots[: cfg.num_shots], tuple(held_out[: cfg.num_pairs])
        users.append(dataclasses.replace(user, user_id=user_id, shots=shots, pairs=kept))
    return users


def _parse_shot(row: Row) -> Shot:
    names = ("prompt", "chosen", "rejected")
    row.allow_only((*names, "conversation"))
    prompt, chosen, rejected = (_get_text(row, name) for name in names)
    shot = Shot(prompt, chosen, rejected, _get_conversation(row))
    _check_differs(row, shot, "example")
    return shot


def _check_differs(row: Row, pair: Pair | Shot, what: str) -> None:
    if pair.chosen == pair.rejected:
        allowed, fix = 'a text other than "chosen"', f"Correct or remove the {what}."
        raise row.make_error("rejected", pair.rejected, allowed, fix)


def _parse_comment(row: Row) -> Comment:
    row.allow_only(("prompt", "comment", "conversation"))
    comment = _get_text(row, "comment")
    return Comment(_get_optional(row, "prompt"), comment, _get_conversation(row))


def _parse_messages(row: Row) -> Messages:
    items = row.get_objects("prompt")
    messages: Messages = []
    for item in items:
        item.allow_only(("role", "content"))
        messages.append({"role": item.get_text("role"), "content": _get_text(item, "content")})
    roles = [m["role"] for m in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        allowed = "an optional system message, then user, assistant, user, ... that ends with user"
        raise row.make_error("prompt", roles, allowed, "Correct the roles.")
    return messages


def _get_text(row: Row, name: str) -> str:
    return _check_real(row, name, row.get_text(name))


def _get_optional(row: Row, name: str) -> str:
    return _check_real(row, name, row.get_text(name, empty=True)) if name in row.fields else ""


def _get_conversation(row: Row) -> str:
    return row.get_text("conversation") if "conversation" in row.fields else ""


def _check_real(row: Row, name: str, text: str) -> str:
    if text in PLACEHOLDERS:
        allowed = "a real text; what is missing is left out or empty"
        raise row.make_error(name, text, allowed, "Correct or remove the line.")
    return text


SOURCE = Source(
    name="jsonl",
    kind="own",
    card=Card(
        title="Own data",
        citation="",
        page="",
        licence="the licence is that of the person who provided them.",
    ),
    options=(
        *("on_bad_row", "split_by", "validation_fraction", "test_fraction", "num_shots"),
        "num_pairs",
    ),
    files=list_files,
    load=load,
    splits=("user", "conversation"),
)
