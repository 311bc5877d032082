"""Rows of a person, one preference each -> splits -> blocks of past and held-out pairs, each block
a user.

For sets whose "person" is a level or a persona that judged very many prompts. Pure functions; the
order of rows in the files has no influence: rows are shuffled by a hash of their text and SEED.
All rows are in memory, each different text once."""

import hashlib
import re
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from popi_jax.data.leaks import Heard, fold, fold_signals, hear
from popi_jax.data.records import SPLITS, Pair, Shot, User
from popi_jax.data.splits import choose_split, split_topics

SEED = 42  # of the order of the rows; that of the official code f88878c6

REPEATED = "the same preference of the same person again"
IN_OTHER_SPLIT = "equal to a pair of the test or validation split"
TOO_FEW = "left of a person's rows after the last whole block"
TOO_MANY = "beyond data.num_shots + data.num_pairs rows of a person"
GIVEN_AWAY = "prompt or a reply among the past pairs of the person"


class Preference(NamedTuple):
    """A row: which of two replies a person prefers."""

    person: str  # level or persona key
    prompt: str
    chosen: str
    rejected: str
    oracle: str  # the true persona in words
    left_out: str = ""  # why the form of the data leaves the row out; "" = it does not


class Splitting(NamedTuple):
    """by: "published", the publisher's test file is the test split and validation is cut from the
    others by prompt; "target", both are cut by prompt; "user", by person.
    few_people: so few that each fraction gets at least one of them."""

    by: str
    validation_fraction: float
    test_fraction: float
    few_people: bool


class Cut(NamedTuple):
    """How the rows of a person become blocks; the settings data.num_shots, num_pairs, passes."""

    num_shots: int
    num_pairs: int
    passes: int


class Block(NamedTuple):
    shots: tuple[Preference, ...]
    pairs: tuple[Preference, ...]


class Planned(NamedTuple):
    user_id: str
    split: str
    block: Block


class Blocks(NamedTuple):
    """Blocks of a person, and how many rows are in none of them, each pass counted."""

    blocks: list[Block]
    unused: dict[str, int]  # reason -> rows


def choose_splits(
    rows: Sequence[Preference], published: Sequence[str], how: Splitting
) -> list[str]:
    """Returns the split of each row; `published`: "train", "test" or "" for each. Rows on one
    prompt, compared by `fold`, share their split, but for those of the publisher's test file."""
    if how.by == "user":
        people = sorted({row.person for row in rows if not row.left_out})
        fractions = how.validation_fraction, how.test_fraction
        of_person = {name: choose_split(name, *fractions) for name in people}
        if how.few_people:
            of_person = split_topics(people, *fractions)
        return [of_person.get(row.person, "train") for row in rows]
    test_fraction = 0.0 if how.by == "published" else how.test_fraction
    of_prompt: dict[str, str] = {}
    splits = []
    for row, file_split in zip(rows, published, strict=True):
        split = "test" if how.by == "published" and file_split == "test" else ""
        if not split and row.prompt not in of_prompt:
            folded = fold(row.prompt)
            of_prompt[row.prompt] = choose_split(folded, how.validation_fraction, test_fraction)
        splits.append(split or of_prompt[row.prompt])
    return splits


def group_rows(
    rows: Sequence[Preference], splits: Sequence[str]
) -> tuple[dict[tuple[str, str], list[Preference]], Counter[str]]:
    """Returns (split, person) -> rows, and how many were left out for which reason.

    Equal prompt and replies (`fold`) are in one split only, whoever judged them: the test split
    keeps them before validation, validation before train. Of one person a split has them once."""
    groups: dict[tuple[str, str], dict[bytes, Preference]] = {}
    left_out: Counter[str] = Counter()
    home: dict[bytes, str] = {}  # of equal prompt and replies: their split
    for wanted in reversed(SPLITS):
        for row, split in zip(rows, splits, strict=True):
            if split != wanted:
                continue
            if row.left_out:
                left_out[row.left_out] += 1
                continue
            key = _digest(*(fold(text) for text in (row.prompt, row.chosen, row.rejected)))
            if home.setdefault(key, split) != split:
                left_out[IN_OTHER_SPLIT] += 1
                continue
            own = groups.setdefault((split, row.person), {})
            left_out[REPEATED] += key in own
            own[key] = min(row, own.get(key, row))  # whichever comes first in the files
    kept = {name: list(own.values()) for name, own in groups.items()}
    return kept, Counter({reason: count for reason, count in left_out.items() if count})


def cut_blocks(rows: Iterable[Preference], cut: Cut) -> Blocks:
    """Cuts the rows of one person and split, which are all different, into blocks.

    passes = 0: one block: of the shuffled rows the first num_shots are the past pairs, the next, at
    most num_pairs, are held out; a row whose prompt or reply is among the past pairs is passed
    over. passes >= 1: each pass shuffles anew and cuts disjoint blocks of exactly num_shots and
    num_pairs rows; a row that may not be held out behind the past pairs of its block waits for the
    next block, at its front. What fills no block is dropped."""
    rows, blocks, unused = list(rows), list[Block](), Counter[str]()
    least = cut.num_pairs if cut.passes else 1
    for number in range(max(1, cut.passes)):
        queue = deque(shuffle(rows, number))
        block = _take_block(queue, cut)
        while len(block.pairs) >= least:
            blocks.append(block)
            if not cut.passes:
                heard = hear(fold_signals(_make_shots(block.shots)))
                away = sum(_is_given_away(row, heard) for row in queue)
                unused.update({GIVEN_AWAY: away, TOO_MANY: len(queue) - away})
                break
            block = _take_block(queue, cut)
        else:
            unused[TOO_FEW] += len(block.shots) + len(block.pairs) + len(queue)
    return Blocks(blocks, {reason: count for reason, count in unused.items() if count})


def shuffle(rows: Iterable[Preference], number: int) -> list[Preference]:
    """The rows in the order of the sha256 of SEED, the number of the pass and their texts."""
    head = f"{SEED}/{number}"
    return sorted(rows, key=lambda r: _digest(head, r.person, r.prompt, r.chosen, r.rejected))


def plan_users(
    source: str, groups: dict[tuple[str, str], list[Preference]], cut: Cut, left_out: Counter[str]
) -> list[Planned]:
    """The users that the rows become, people and splits mixed: "elix/child#train7" is the seventh
    block of the training rows of "child". Adds to `left_out`."""
    made: list[Planned] = []
    for (split, person), rows in groups.items():
        found = cut_blocks(rows, cut)
        left_out.update(found.unused)
        name = f"{source}/{name_person(person)}#{split}"
        for number, block in enumerate(found.blocks, 1):
            made.append(Planned(f"{name}{number if cut.passes else ''}", split, block))
    return sorted(made, key=lambda planned: _digest(str(SEED), planned.user_id))


def make_user(planned: Planned, *, grouped: bool) -> User:
    """grouped: the person is a group for the tables of an evaluation, "level"."""
    user_id, split, block = planned
    shots = _make_shots(block.shots)
    pairs = (
        Pair(f"{user_id}/{n}", [{"role": "user", "content": row.prompt}], row.chosen, row.rejected)
        for n, row in enumerate(block.pairs, 1)
    )
    first = block.pairs[0]
    return User(
        user_id=user_id,
        profile="",
        survey="",
        shots=shots,
        comments=(),
        pairs=tuple(pairs),
        oracle=first.oracle,
        split=split,
        groups={"level": first.person} if grouped else {},
    )


def name_person(person: str) -> str:
    """The person's name as part of a user_id, in which "#" begins what we add: it, "%" and control
    characters are written %23 and so on; a name of more than 80 characters is cut and gets "%~"
    and a hash."""
    name = re.sub(r"[#%\x00-\x1f]", lambda found: f"%{ord(found[0]):02X}", person)
    return name if len(name) <= 80 else f"{name[:40]}%~{_digest(person).hex()[:12]}"


def _take_block(queue: deque[Preference], cut: Cut) -> Block:
    """Takes what a block needs from the front of the queue, or less when it holds too few."""
    shots = tuple(queue.popleft() for _ in range(min(cut.num_shots, len(queue))))
    heard = hear(fold_signals(_make_shots(shots)))
    pairs: list[Preference] = []
    waiting: list[Preference] = []
    while queue and len(pairs) < cut.num_pairs:
        row = queue.popleft()
        (waiting if _is_given_away(row, heard) else pairs).append(row)
    queue.extendleft(reversed(waiting))
    return Block(shots, tuple(pairs))


def _make_shots(rows: Iterable[Preference]) -> tuple[Shot, ...]:
    return tuple(Shot(row.prompt, row.chosen, row.rejected) for row in rows)


def _is_given_away(row: Preference, heard: Heard) -> bool:
    return heard.holds(row.prompt, row.chosen, row.rejected)


def _digest(*texts: str) -> bytes:
    return hashlib.sha256("\0".join(texts).encode()).digest()[:16]
