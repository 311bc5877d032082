"""AlignX on made files in the publisher's format, from the files to the first batch."""

import functools
import json
import operator
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from benchmarks import made_alignx
from popi_jax.config import Config
from popi_jax.data import encode, prepared, tokenizer
from popi_jax.data.json_rows import Row
from popi_jax.data.leaks import LeakFinder
from popi_jax.data.prompts import list_training_texts
from popi_jax.data.records import User
from popi_jax.data.row_files import read_values
from popi_jax.data.sources import alignx, alignx_axes, alignx_rows
from popi_jax.errors import UserError
from tests.checkpoints import fake_hub
from tests.data.people import user_batches
from tests.data.sources import alignx_files
from tests.data.sources.alignx_files import (
    COMMENTS,
    DEMOGRAPHICS,
    DIRECTIONS,
    PAIRS,
    TESTS,
    direct,
    load,
    make_row,
    make_rows,
    make_tests,
    refuse,
    write,
    write_published,
)

NEUTRAL = "5" * 90


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: alignx_files.Rows = []
    for n, changes in enumerate(({"comments": 2}, {"pairs": 0}, {"comments": 0, "pairs": 3})):
        rows += make_rows(10, first=100 * (n + 1), **changes)
    rows += make_rows(60)
    return write_published(tmp_path_factory.mktemp("x") / "raw", rows, make_tests(12, first=1000))


def tell_shape(user: User) -> tuple[bool, int, int]:
    return bool(user.profile), len(user.comments), len(user.shots)


def test_a_row_is_a_user(tmp_path: Path) -> None:
    (user,), loaded = load("alignx", write(tmp_path / "a.json", [make_row(2)]), form="pair")
    assert (user.user_id, user.profile, user.survey, user.comments) == ("alignx/1", "", "", ())
    assert [(s.prompt, s.chosen, s.rejected) for s in user.shots][3] == (
        *("past 2 3", "liked 2 3", "disliked 2 3"),
    )
    (pair,) = user.pairs
    assert pair.prompt == [{"role": "user", "content": "what of post 2 ?"}]
    assert (pair.chosen, pair.rejected) == ("good reply 2", "bad reply 2")
    # the 90 numbers are kept; of a family with one axis that is not neutral, its name is a group
    assert json.loads(pair.meta) == {"directions": "1" + "5" * 46 + "1" + "5" * 42}
    assert pair.groups == {"persona axis": "age", "interest axis": "science"}
    assert user.oracle == "This person: young, likes science."
    assert user.groups == {"form": "PAIR"}
    assert (loaded.bad_rows, loaded.left_out) == ([], {})
    assert loaded.counts == {"rows": 1, "PAIR": 1}


@pytest.mark.parametrize(
    ("form", "shape"), [("demo", (True, 0, 0)), ("ugc", (False, 4, 0)), ("pair", (False, 0, 4))]
)
def test_a_form_shows_its_signals_alone(form: str, shape: object, folder: Path) -> None:
    users, loaded = load("alignx", folder, form=form)
    assert {tell_shape(user) for user in users} <= {shape, (False, 2, 0), (False, 0, 3)}
    assert shape in {tell_shape(user) for user in users}
    without = {"demo": 0, "ugc": 10, "pair": 10}[form]
    assert loaded.left_out == ({"the row has no signals of this form": without} if without else {})
    assert len(users) + without == loaded.counts["rows"] == 90


def test_few_past_pairs_are_shown_where_few_are_asked_for(folder: Path) -> None:
    users, _ = load("alignx", folder, form="pair", num_shots=2)
    assert {len(user.shots) for user in users} == {2}
    users, loaded = load("alignx", folder, form="pair", num_shots=0)
    assert users == [] and loaded.left_out == {"the row has no signals of this form": 90}


def test_arbitrary_draws_each_number_and_half_of_the_profiles(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", make_rows(600))
    users, _ = load("alignx", path, form="arbitrary")
    shapes = [tell_shape(user) for user in users]
    for part in (1, 2):  # 5 numbers, 120 each
        assert set(Counter(s[part] for s in shapes)) == {0, 1, 2, 3, 4}
        assert all(85 < n < 160 for n in Counter(s[part] for s in shapes).values())
    some = [s for s in shapes if s[1] or s[2]]
    assert all(s[0] for s in shapes if not (s[1] or s[2])) and len(some) < 600
    assert 0.43 < sum(s[0] for s in some) / len(some) < 0.57
    # no comment or pair is more likely than another
    seen = Counter(c.comment.split()[2] for user in users for c in user.comments)
    assert set(seen) == {"0", "1", "2", "3"} and max(seen.values()) < 1.25 * min(seen.values())


def test_draws_depend_on_the_row_alone(tmp_path: Path) -> None:
    rows = make_rows(40)

    def list_views(order: list[dict[str, Any]], name: str) -> dict[str, object]:
        users, _ = load("alignx", write(tmp_path / name, order), form="arbitrary")
        return {u.pairs[0].chosen: (u.profile, u.comments, u.shots, u.split) for u in users}

    assert list_views(rows, "a.jsonl") == list_views(rows[::-1], "b.parquet")


def test_an_empty_draw_shows_all(tmp_path: Path) -> None:
    rows = make_rows(200, comments=1, pairs=0, demographics=False)
    users, loaded = load("alignx", write(tmp_path / "a.json", rows), form="arbitrary")
    assert {tell_shape(user) for user in users} == {(False, 1, 0)} and len(users) == 200
    nothing = make_rows(3, first=900, comments=0, pairs=0, demographics=False)
    users, loaded = load("alignx", write(tmp_path / "b.json", rows + nothing), form="mixed")
    assert len(users) == 200  # too few comments for UGC, no text for DEMO: all is shown
    assert loaded.left_out == {"the row has no signals of this form": 3}


def test_mixed_is_the_official_preparation(folder: Path) -> None:
    """What a row lacks decides; the others even out the forms."""
    users, loaded = load("alignx", folder, form="mixed")
    forms = Counter(user.groups["form"] for user in users)
    # 10 rows without 4 comments, 10 without pairs, 10 without both, 60 with all
    assert {form: loaded.counts[form] for form in TESTS} == forms
    assert max(forms.values()) - min(forms.values()) <= 1 and sum(forms.values()) == 90
    for user in users:
        shape = tell_shape(user)
        if user.groups["form"] != "arbitrary":
            full = {"DEMO": (True, 0, 0), "UGC": (False, 4, 0), "PAIR": (False, 0, 4)}
            assert shape == full[user.groups["form"]]
    by_row = {int(u.user_id.split("/")[1]): u.groups["form"] for u in users}
    assert {by_row[n] for n in range(1, 11)} == {"PAIR"}
    assert {by_row[n] for n in range(11, 21)} == {"UGC"}
    assert {by_row[n] for n in range(21, 31)} == {"DEMO"}


def test_directions_make_the_profile(tmp_path: Path) -> None:
    """The mean of what is shown; the target's counts where the demographic text is shown."""
    row = make_row(1)
    row[DIRECTIONS] = direct(a1=1, a89=0)
    for item, axes in zip(row[PAIRS], ({"a47": 1}, {"a47": 1}, {"a47": 0, "a40": 1}, {}), strict=1):
        item[DIRECTIONS] = direct(**axes)
    path = write(tmp_path / "a.json", [row])
    directions = {"profile_text": "directions"}
    (user,), _ = load("alignx", path, form="pair", **directions)
    # science: (1 + 1 + 0 + .5) / 4 = .625; harmlessness: (.5 + .5 + 1 + .5) / 4
    assert user.profile == "cares about harmlessness, likes science" and len(user.shots) == 4
    (user,), _ = load("alignx", path, form="pair", num_shots=2, **directions)
    assert user.profile == "likes science"
    (user,), _ = load("alignx", path, form="demo", **directions)
    assert user.profile == "female, dislikes fashion" and row[DEMOGRAPHICS] not in user.to_json()
    assert user.oracle == "This person: female, dislikes fashion."
    del row[PAIRS][1][DIRECTIONS]
    told = refuse("alignx", write(tmp_path / "b.json", [row]), form="pair", **directions)
    assert f'b.json: row 1: no field "{PAIRS}[1].{DIRECTIONS}"' in told
    assert load("alignx", tmp_path / "b.json", form="pair")[0]  # not used, so not checked


def test_means_have_the_thresholds_of_the_official_code() -> None:
    def mean(*poles: str) -> str:
        return alignx_axes.mean_directions([pole + "5" * 89 for pole in poles])[0]

    assert [mean("1"), mean("0"), mean("5"), mean("1", "0")] == ["1", "0", "5", "5"]
    assert mean("1", *"5555") == "1" and mean("0", *"55555555") == "0"  # .6 and .444
    assert mean("1", "1", "0") == "1"
    assert alignx_axes.write_phrases(NEUTRAL) == "" and alignx_axes.group_axes(NEUTRAL) == {}


def test_axes_have_words() -> None:
    axes = alignx_axes.AXES
    assert len(axes) == 90 == len({axis.name for axis in axes})
    phrases = [phrase for axis in axes for phrase in (axis.high, axis.low)]
    assert len(set(phrases)) == 180 and all(phrase == phrase.strip() for phrase in phrases)
    # places that the publisher's list has
    named = {0: "age", 2: "neuroticism", 23: "order", 39: "play", 40: "harmlessness"}
    named |= {46: "complexity", 47: "science", 63: "cars", 73: "humor", 89: "fashion"}
    assert {n: axes[n].name for n in named} == named
    assert (axes[0].high, axes[1].low, axes[2].high) == ("young", "male", "high neuroticism")
    assert Counter(axis.family for axis in axes) == {
        **{"persona axis": 40, "quality axis": 7, "interest axis": 43}
    }
    assert alignx_axes.group_axes("1" + "5" * 39 + "10" + "5" * 48) == {"persona axis": "age"}


def test_equal_posts_share_a_split(tmp_path: Path) -> None:
    rows = make_rows(300)
    for n, row in enumerate(rows):
        row["prompt"] = f"what of post {n % 60} ?"
        row["chosen"] = f"reply {n % 120}"
    path = write(tmp_path / "a.parquet", rows)
    users, _ = load("alignx", path)
    splits: dict[str, set[str]] = {}
    for user in users:
        splits.setdefault(user.pairs[0].prompt[0]["content"], set()).add(user.split)
    assert {len(found) for found in splits.values()} == {1} and len(splits) == 60
    assert {user.split for user in users} == {"train", "validation", "test"}
    finder = LeakFinder(shared_replies=False, shared_people=False)
    assert [leak for user in users for leak in finder.check(user)] == []


def test_a_row_that_gives_its_answer_away_is_left_out(tmp_path: Path) -> None:
    rows = make_rows(6)
    rows[0][PAIRS][1]["prompt"] = "What of POST 0?"
    rows[1][COMMENTS][0]["prompt"] = "what of post 1"
    rows[2][COMMENTS][0]["comment"] = "Good reply: 2"
    rows[3][DEMOGRAPHICS] = "They wrote: bad reply 3 at much greater length than any other."
    rows[3]["rejected"] = "Bad reply 3, at much greater length than any other"
    rows[4][PAIRS][0]["chosen"] = "bad reply 4"
    users, loaded = load("alignx", write(tmp_path / "a.json", rows), form="demo")
    assert [user.user_id for user in users] == ["alignx/6"]
    assert loaded.left_out == {
        "the prompt is among the signals of its row": 2,
        "a reply is among the signals of its row": 3,
    }


def test_published_test_files(folder: Path) -> None:
    users, loaded = load("alignx", folder, form="mixed", split_by="published")
    tests = [user for user in users if user.split == "test"]
    assert loaded.counts["test rows"] == len(tests) == 48 and loaded.counts["rows"] == 90
    ids = {user.user_id for user in tests}
    assert {"alignx/test/1#DEMO", "alignx/test/12#PAIR"} <= ids and len(ids) == 48
    assert {user.user_id.split("#")[0] for user in tests} == {
        f"alignx/test/{n}" for n in range(1, 13)
    }
    shapes = {test: {tell_shape(u) for u in tests if u.groups["form"] == test} for test in TESTS}
    assert shapes == {
        "DEMO": {(True, 0, 0)},
        "PAIR": {(False, 0, 4)},
        "UGC": {(False, 4, 0)},
        "arbitrary": {(True, 0, 0), (True, 4, 4)},
    }
    assert all(u.oracle and "PUBLISHED" not in u.to_json() for u in tests)
    others = Counter(user.split for user in users) - Counter(test=48)
    assert set(others) == {"train", "validation"} and sum(others.values()) == 90


@pytest.mark.parametrize(
    ("form", "tests"),
    [("demo", {"DEMO"}), ("ugc", {"UGC"}), ("pair", {"PAIR"}), ("arbitrary", {*TESTS})],
)
def test_a_form_has_its_own_test(form: str, tests: set[str], folder: Path) -> None:
    users, _ = load("alignx", folder, form=form, split_by="published")
    assert {user.groups["form"] for user in users if user.split == "test"} == tests


def test_a_published_test_target_is_not_trained_on(tmp_path: Path) -> None:
    rows, tests = make_rows(20), make_tests(5, first=1000)
    again = make_row(1001)
    again["prompt"] = again["prompt"].upper()
    again["chosen"], again["rejected"] = again["rejected"], again["chosen"]  # the other persona
    write_published(tmp_path / "raw", [*rows, again], tests)
    users, loaded = load("alignx", tmp_path / "raw", split_by="published")
    assert loaded.left_out == {"the target is one of the published test files": 1}
    assert len(users) == 20 + 20


def test_test_files_are_left_alone_where_splits_are_ours(folder: Path, tmp_path: Path) -> None:
    users, loaded = load("alignx", folder)
    assert "test rows" not in loaded.counts and len(users) == 90
    users, _ = load("alignx", folder / "test" / "Reddit_arbitrary.json", form="arbitrary")
    assert len(users) == 12 and users[0].user_id == "alignx/1"
    told = refuse("alignx", folder / "train", split_by="published")
    assert "has no Reddit_DEMO, Reddit_PAIR, Reddit_UGC, Reddit_arbitrary" in told
    assert "data.split_by=target" in told


def test_formats_are_the_same(tmp_path: Path) -> None:
    """Rows are numbered over all files, whatever they are."""
    rows = make_rows(31, comments=3)
    read = []
    for ending in ("parquet", "json", "jsonl", "json.gz", "jsonl.gz"):
        for n, part in enumerate((rows[:12], rows[12:])):
            write(tmp_path / ending / f"part{n}.{ending}", part)
        users, loaded = load("alignx", tmp_path / ending, form="arbitrary")
        assert loaded.total == (31 if ending == "parquet" else 0)
        read.append(users)
    assert all(users == read[0] for users in read)
    assert [u.user_id for u in read[0]] == [f"alignx/{n}" for n in range(1, 32)]


def test_files_that_are_not_whole_are_told(tmp_path: Path) -> None:
    write_published(tmp_path / "a", make_rows(9), {}, shards=3)
    (tmp_path / "a/train/train-00001-of-00003.parquet").unlink()
    assert "train-of-00003: shards 00001 are missing" in refuse("alignx", tmp_path / "a")
    for ending in ("json", "jsonl"):
        write(tmp_path / "b" / f"part.{ending}", make_rows(3))
    assert "part.jsonl: found part.json beside it" in refuse("alignx", tmp_path / "b")
    assert "no data files (field data.path)" in refuse("alignx", tmp_path / "c")
    (tmp_path / "c").mkdir()
    told = refuse("alignx", tmp_path / "c")
    assert "field data.download is False" in told and alignx.REPOSITORY in told


FAULTS = [
    ("prompt", " ", "a text that is not empty"),
    ("chosen", None, "found null"),
    ("rejected", "good reply 1 ", "a reply unlike the chosen one"),
    ("rejected", ["no"], "allowed: a text that is not empty"),
    (DIRECTIONS, [0.5] * 89, 'found "89 numbers", allowed: a list of 90 numbers'),
    (DIRECTIONS, [0.5] * 89 + [0.7], "found 0.7, allowed: a list of 90 numbers, each 0, 0.5 or 1"),
    (DIRECTIONS, None, "found null, allowed: a list of 90 numbers"),
    (DIRECTIONS, "5" * 90, "allowed: a list of 90 numbers"),
    (DEMOGRAPHICS, 5, "found 5, allowed: a text"),
    (COMMENTS, "none", "a list of objects"),
    (COMMENTS, [{"prompt": "a"}], f'no field "{COMMENTS}[0].comment"'),
    (PAIRS, [{"prompt": "a", "chosen": "", "rejected": "b"}], f'field "{PAIRS}[0].chosen"'),
    (PAIRS, [7], "a list of objects"),
    ("chosen", "half \ud800", "half surrogate pair"),
]


@pytest.mark.parametrize(("field", "value", "words"), FAULTS)
def test_bad_rows_are_named(field: str, value: object, words: str, tmp_path: Path) -> None:
    rows = make_rows(3)
    rows[1][field] = value
    path = write(tmp_path / "a.json", rows)
    told = refuse("alignx", path)
    assert told.startswith(f"{path}: row 2: ") and words in told and field in told
    users, loaded = load("alignx", path, on_bad_row="skip")
    assert loaded.bad_rows == [told]
    assert [user.user_id for user in users] == ["alignx/1", "alignx/3"]


def test_missing_fields_are_named(tmp_path: Path) -> None:
    rows = make_rows(2)
    rows[1]["User Generated Content"] = rows[1].pop(COMMENTS)
    told = refuse("alignx", write(tmp_path / "a.jsonl", rows))
    assert f'a.jsonl:2: no field "{COMMENTS}"' in told
    assert 'Did you mean "User Generated Content"?' in told


def test_lists_and_texts_may_be_null(tmp_path: Path) -> None:
    rows = make_rows(3)
    rows[1] |= {DEMOGRAPHICS: None, COMMENTS: None}
    users, loaded = load("alignx", write(tmp_path / "a.parquet", rows), form="pair")
    assert len(users) == 3 and not loaded.bad_rows


def test_what_is_taken_quickly_is_what_is_checked() -> None:
    """Both ways to a record agree, on a right row and on it with any one thing changed."""
    needed = ("prompt", "chosen", "rejected")
    layouts = [
        alignx_rows.Layout(frozenset((*needed, DIRECTIONS, PAIRS)), True),
        alignx_rows.Layout(frozenset(needed)),
        alignx_rows.Layout(frozenset((*needed, alignx_rows.PERSONA)), False, (*needed, PAIRS)),
    ]
    others: list[Any] = [None, "", " a ", 0, 1.5, True, [], {}, [None], ["a"], [{}], "\udc80"]
    others += [[0.5] * 90, [1] * 89 + [True], [0.5] * 91, [float("nan")] * 90, "5" * 90]
    places: list[list[Any]] = [[], [COMMENTS, 1], [PAIRS, 3]]
    outcomes = Counter[str]()
    for at, missing in ((at, missing) for at in places for missing in (False, True)):
        row = make_row(1)
        for name in list(functools.reduce(operator.getitem, at, row)) + [alignx_rows.PERSONA]:
            for other in others[:1] if missing else others:
                row = make_row(1)
                place: Any = functools.reduce(operator.getitem, at, row)
                place.pop(name, None)
                if not missing:
                    place[name] = other
                for layout in layouts:
                    outcomes[_compare(Row("f: row 1", row), layout)] += 1
    assert set(outcomes) == {"right", "refused"} and min(outcomes.values()) > 100


def _compare(row: Row, layout: alignx_rows.Layout) -> str:
    quick = alignx_rows._take(row, layout)
    try:
        slow = alignx_rows._check(row, layout)
    except UserError:
        return "refused" if quick is None else f"wrongly taken: {row.fields}"
    return "right" if quick == slow else "other" if quick else f"needlessly slow: {row.fields}"


def test_missing_files_are_fetched(tmp_path: Path) -> None:
    raw = write_published(tmp_path / "raw", make_rows(40), make_tests(3, first=100))
    with fake_hub.serve(tmp_path / "home") as hub:
        for repository, part in ((alignx.REPOSITORY, "train"), (alignx.TESTS, "test")):
            hub.push_folder(repository, raw / part)
        own = {"download": True, "split_by": "published"}
        users, _ = load("alignx", tmp_path / "got", **own)
        assert users == load("alignx", raw, split_by="published")[0] and len(users) == 52
        requests = len(hub.requests)
        assert load("alignx", tmp_path / "got", **own)[0] == users
        assert len(hub.requests) == requests


def test_from_the_files_to_the_first_batch(folder: Path) -> None:
    cfg = alignx_files.make_options("alignx", folder)
    dataset = prepared.prepare(cfg, allow_sample=False)
    assert dataset.source.name == "alignx" and {*dataset.splits} == {"train", "validation", "test"}
    assert len(dataset.splits["test"]) == 48
    user = dataset.splits["train"][0]
    assert json.loads(user.pairs[0].meta)["directions"].strip("015") == ""
    config = _make_config(folder)
    texts = list_training_texts(dataset.splits["train"], config)
    words = tokenizer.train(texts, 400)
    batch = user_batches(dataset.splits["train"], words, config, seed=1)[0]
    assert batch.chosen.ids.shape[:2] == (config.batch.users, 1)
    encoded = encode.encode_user(user, words, config)
    assert encoded.oracle_text == user.oracle and encoded.truncations.contexts == 0


def _make_config(folder: Path) -> Config:
    from configs.alignx import get_config
    from popi_jax.config import from_config_dict

    c = get_config("scale=laptop")
    c.data.path, c.batch.users = str(folder), 4
    return from_config_dict(c)


def test_made_files_are_in_the_format(tmp_path: Path) -> None:
    """The generator of large files: the same rows for the same seed, of 3 to 8 kB, no leak."""
    paths = [tmp_path / f"{name}.parquet" for name in "abc"]
    for path, rows, seed in zip(paths, (300, 100, 100), (0, 0, 1), strict=True):
        assert made_alignx.main([f"--rows={rows}", f"--out={path}", f"--seed={seed}"]) == 0
    users, loaded = load("alignx", paths[0], form="arbitrary", profile_text="directions")
    assert loaded.bad_rows == [] and loaded.counts["rows"] == 300 == loaded.total
    assert set(loaded.left_out) <= {"the row has no signals of this form"}
    assert (
        users[:90] == load("alignx", paths[1], form="arbitrary", profile_text="directions")[0][:90]
    )
    assert users[:9] != load("alignx", paths[2], form="arbitrary", profile_text="directions")[0][:9]
    sizes = [sum(map(len, re.findall(r"\w+ ", user.to_json()))) for user in users]
    assert 500 < sum(sizes) / len(sizes) < 8000
    finder = LeakFinder(shared_replies=False, shared_people=False)
    assert [leak for user in users for leak in finder.check(user)] == []


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    made_alignx.write(path, 20_000, seed=0)
    most = 0
    for number, _ in enumerate(read_values(path)):
        most = max(most, pa.total_allocated_bytes()) if number % 200 == 0 else most
    assert number == 19_999 and path.stat().st_size > 75e6 > 1.25 * most
