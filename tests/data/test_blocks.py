"""Splits and blocks of the rows of a person, against a plain statement of the same rules."""

import hashlib
import random
from collections import Counter

import pytest

from popi_jax.data import blocks
from popi_jax.data.blocks import Cut, Preference, Splitting

PUBLISHED = Splitting("published", 0.2, 0.9, few_people=True)


def make_rows(count: int, *, prompts: int = 0, person: str = "child") -> list[Preference]:
    """`prompts`: how many different prompts the rows share; 0 = each its own."""
    return [
        Preference(person, f"why {n % (prompts or count)} ?", f"good {n}", f"bad {n}", "young")
        for n in range(count)
    ]


def state(rows: list[Preference], shots: int, pairs: int, passes: int) -> list[tuple[list, list]]:
    """The rules for rows whose replies all differ, in lists, nothing shared with the package."""

    def fold(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    def place(row: Preference, number: int) -> str:
        texts = [f"42/{number}", row.person, row.prompt, row.chosen, row.rejected]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()

    found = []
    for number in range(max(1, passes)):
        left = sorted(rows, key=lambda row: place(row, number))
        while True:
            past, rest = left[:shots], left[shots:]
            asked = [fold(row.prompt) for row in past]
            held = [row for row in rest if fold(row.prompt) not in asked][:pairs]
            if len(held) < (pairs if passes else 1):
                break
            found.append((past, held))
            left = [row for row in rest if row not in held]
            if not passes:
                break
    return found


@pytest.mark.parametrize("passes", [0, 1, 2])
@pytest.mark.parametrize(("shots", "pairs"), [(4, 1), (8, 1), (2, 3), (1, 1)])
@pytest.mark.parametrize(("count", "prompts"), [(0, 0), (1, 0), (47, 0), (60, 7), (60, 2), (9, 1)])
def test_blocks_are_as_stated(
    shots: int, pairs: int, passes: int, count: int, prompts: int
) -> None:
    rows = make_rows(count, prompts=prompts)
    random.Random(count).shuffle(rows)
    found = blocks.cut_blocks(rows, Cut(shots, pairs, passes))
    as_lists = [(list(block.shots), list(block.pairs)) for block in found.blocks]
    assert as_lists == state(rows, shots, pairs, passes)
    used = sum(len(block.shots) + len(block.pairs) for block in found.blocks)
    assert used + sum(found.unused.values()) == count * max(1, passes)
    assert set(found.unused) <= (
        {blocks.TOO_FEW} if passes else {blocks.TOO_FEW, blocks.TOO_MANY, blocks.GIVEN_AWAY}
    )


def test_a_pass_uses_each_row_once_and_the_next_pass_mixes_anew() -> None:
    found = blocks.cut_blocks(make_rows(53), Cut(4, 1, 2)).blocks
    first, second = found[:10], found[10:]
    for one_pass in (first, second):
        assert len(one_pass) == 10
        used = Counter(row for block in one_pass for row in block.shots + block.pairs)
        assert len(used) == 50 and set(used.values()) == {1}
    assert {frozenset(b.shots) for b in first}.isdisjoint(frozenset(b.shots) for b in second)


def test_one_block_of_a_person_counts_what_it_does_not_use() -> None:
    found = blocks.cut_blocks(make_rows(30), Cut(4, 6, 0))
    assert [(len(b.shots), len(b.pairs)) for b in found.blocks] == [(4, 6)]
    assert found.unused == {blocks.TOO_MANY: 20}
    few = blocks.cut_blocks(make_rows(4), Cut(4, 6, 0))
    assert (few.blocks, few.unused) == ([], {blocks.TOO_FEW: 4})
    same = blocks.cut_blocks(make_rows(30, prompts=2), Cut(1, 6, 0))
    assert same.unused == {blocks.GIVEN_AWAY: 14, blocks.TOO_MANY: 9}


@pytest.mark.parametrize("passes", [0, 1])
def test_no_block_holds_out_what_its_past_pairs_tell(passes: int) -> None:
    long = "because " * 8 + "it is heavy"
    rows = [Preference("p", f"q {n}", f"good {n}", f"bad {n}", "") for n in range(12)]
    rows += [
        Preference("p", f"Q, {n}!", f"fine {n}", f"poor {n}", "") for n in range(12)
    ]  # prompts
    rows += [Preference("p", f"r {n}", f"Good {n}.", f"no {n}", "") for n in range(12)]  # replies
    rows += [Preference("p", f"s {n}", f"{long} {n}.", f"{long} {n}. So!", "") for n in range(9)]
    rows += [
        Preference("p", f"t {n}", f"well, {long} {n}. So it is", f"z {n}", "") for n in range(9)
    ]
    held = 0
    for block in blocks.cut_blocks(rows, Cut(5, 3, passes)).blocks:
        heard = [blocks.fold(t) for s in block.shots for t in (s.prompt, s.chosen, s.rejected)]
        for row in block.pairs:
            for text in map(blocks.fold, (row.prompt, row.chosen, row.rejected)):
                assert text not in heard
                assert len(text) < 40 or not any(text in other for other in heard)
            held += 1
    assert held >= 3


def test_the_order_of_the_files_has_no_influence() -> None:
    rows = make_rows(60, prompts=9) + make_rows(60, prompts=9, person="expert")
    rows += [row._replace(prompt=row.prompt.upper()) for row in rows[:20]]  # equal, but for case
    one, other = (plan(order) for order in (rows, rows[::-1]))
    assert one == other and len(one) > 10


def plan(rows: list[Preference]) -> list[blocks.Planned]:
    splits = blocks.choose_splits(rows, ["train"] * len(rows), PUBLISHED)
    groups, left_out = blocks.group_rows(rows, splits)
    return blocks.plan_users("elix", groups, Cut(2, 1, 1), left_out)


def test_validation_is_cut_by_prompt_and_the_test_file_is_the_test_split() -> None:
    rows = make_rows(600, prompts=60) + make_rows(60, person="expert")
    published = ["train"] * 600 + ["test"] * 60
    splits = blocks.choose_splits(rows, published, PUBLISHED)
    assert splits[600:] == ["test"] * 60
    of_prompt: dict[str, set[str]] = {}
    for row, split in zip(rows[:600], splits, strict=False):
        of_prompt.setdefault(row.prompt, set()).add(split)
    assert all(len(found) == 1 for found in of_prompt.values())
    count = Counter(splits[:600])
    assert set(count) == {"train", "validation"} and 60 <= count["validation"] <= 200


def test_other_splits_are_cut_by_prompt_or_by_person() -> None:
    levels = ("child", "preteen", "teenager", "young adult", "expert")
    rows = [row for level in levels for row in make_rows(60, person=level)]
    rows += [row._replace(left_out="why") for row in make_rows(9, person="aaa")]
    unknown = [""] * len(rows)
    by_prompt = blocks.choose_splits(rows, unknown, Splitting("target", 0.2, 0.2, True))
    assert len({(row.prompt, split) for row, split in zip(rows, by_prompt, strict=True)}) == 60
    assert set(by_prompt) == {"train", "validation", "test"}
    by_person = blocks.choose_splits(rows, unknown, Splitting("user", 0.03, 0.12, True))
    whole = {(row.person, split) for row, split in zip(rows, by_person, strict=True)}
    assert Counter(split for person, split in whole if person != "aaa") == {
        "train": 3,
        "validation": 1,
        "test": 1,
    }


def test_equal_pairs_are_in_one_split_only() -> None:
    """Those of another person too, as replies and preferences are shared."""
    rows = make_rows(10) + make_rows(10, person="expert") + make_rows(3)
    rows[0] = rows[0]._replace(prompt="WHY? 0")
    splits = ["train"] * 10 + ["test"] * 5 + ["validation"] * 5 + ["train"] * 3
    groups, left_out = blocks.group_rows(rows, splits)
    assert left_out == {blocks.IN_OTHER_SPLIT: 13}
    assert {name: len(own) for name, own in groups.items()} == {
        ("test", "expert"): 5,
        ("validation", "expert"): 5,
    }
    again = blocks.group_rows(rows[10:13] * 2, ["train"] * 6)
    assert again[1] == {blocks.REPEATED: 3} and len(again[0]["train", "expert"]) == 3
    both = blocks.group_rows(rows[1:3] + rows[11:13], ["train"] * 4)
    assert both[1] == {} and len(both[0]) == 2


def test_names_of_blocks_never_meet_real_names() -> None:
    people = ["a", "a#train1", "a%23train1", "x" * 90, "x" * 91, "x" * 40, "b\nc", "level 3"]
    rows = [row for person in people for row in make_rows(9, person=person)]
    groups, left_out = blocks.group_rows(rows, ["train"] * len(rows))
    planned = blocks.plan_users("elix", groups, Cut(2, 1, 1), left_out)
    ids = [each.user_id for each in planned]
    assert len(set(ids)) == len(ids) == 3 * len(people) and left_out == {}
    assert all(one.count("#") == 1 and one.isprintable() for one in ids)
    assert len({one.split("#")[0] for one in ids}) == len(people)
    assert max(map(len, ids)) < 80
    user = blocks.make_user(planned[0], grouped=True)
    assert user.groups == {"level": planned[0].block.shots[0].person} and user.oracle == "young"
    assert user.pairs[0].record_id == f"{user.user_id}/1"
