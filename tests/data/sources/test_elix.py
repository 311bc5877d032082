"""ELIX on made files in the publisher's format, from the files to the first batch; and what Review
and Roleplay share with it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from popi_jax.config import Config
from popi_jax.data import blocks, encode, prepared, tokenizer
from popi_jax.data.leaks import LeakFinder
from popi_jax.data.prompts import list_training_texts
from popi_jax.data.records import SPLITS, User
from popi_jax.data.sources import elix
from popi_jax.data.sources.source import FilesMissing
from tests.checkpoints import fake_hub
from tests.checkpoints.fake_hub import FakeHub
from tests.data.people import user_batches
from tests.data.sources import fspo_files
from tests.data.sources.fspo_files import load, make_elix, make_options, refuse, write_published

TRAIN, TEST = make_elix(30), make_elix(8, first=30)
BY_USER = {"form": "all", "split_by": "user"}
Triple = tuple[str, str, str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("elix") / "raw", TRAIN, TEST)


def list_triples(users: list[User], split: str) -> set[Triple]:
    own = [user for user in users if user.split == split]
    held = {(p.prompt[0]["content"], p.chosen, p.rejected) for user in own for p in user.pairs}
    return held | {(s.prompt, s.chosen, s.rejected) for user in own for s in user.shots}


def test_a_level_is_a_person_and_a_block_a_user(folder: Path) -> None:
    users, loaded = load("elix", folder)
    rows = {
        (row["prompt"], *(row[f"response_{c}"] for c in ("yx" if row["label"] else "xy")))
        for row in TRAIN + TEST
        if row["scorer_level"] == "young adult"
        and row["scorer_level"] in (row["level_x"], row["level_y"])
    }
    own = [user for user in users if user.oracle == "The user is young adult."]
    assert {triple for s in SPLITS for triple in list_triples(own, s)} <= (rows)
    user = next(user for user in own if user.split == "train")
    assert user.user_id.startswith("elix/young adult#train") and user.groups == {
        "level": "young adult"
    }
    assert (len(user.shots), len(user.pairs), user.profile, user.comments) == (4, 1, "", ())
    assert loaded.bad_rows == [] and loaded.counts == {"rows": 38 * 50, "levels": 5}
    # of 10 pairs of levels a level is in 4
    assert loaded.left_out[elix.OF_OTHERS] == 38 * 30
    # two passes, each of which leaves fewer rows than a block of a level and split
    used = 5 * len(users)
    assert used + loaded.left_out[blocks.TOO_FEW] == 2 * 38 * 20
    assert loaded.left_out[blocks.TOO_FEW] < 2 * 5 * 5 * 3 + 1
    assert loaded.total == len(users) == len({user.user_id for user in users})


def test_the_preferred_reply_is_x_where_the_label_is_0(tmp_path: Path) -> None:
    rows = make_elix(4)
    for n, row in enumerate(rows):
        row["label"] = (0, 1, 2, -1)[n % 4]
    preferred = {
        (
            row["prompt"],
            row["scorer_level"],
            frozenset((row["response_x"], row["response_y"])),
        ): row["response_x" if row["label"] == 0 else "response_y"]
        for row in rows
    }
    write_published(tmp_path, rows, make_elix(2, first=50))
    users, _ = load("elix", tmp_path, form="all", validation_fraction=0.0, passes=1)
    seen = 0
    for user in users:
        for shot in user.shots if user.split == "train" else ():
            replies = frozenset((shot.chosen, shot.rejected))
            assert len(replies) == 2
            assert preferred[shot.prompt, user.groups["level"], replies] == shot.chosen
            seen += 1
    assert seen > 40


def test_form_all_keeps_replies_for_other_levels(folder: Path) -> None:
    own, _ = load("elix", folder)
    every, loaded = load("elix", folder, form="all")
    assert len(every) > 2 * len(own) and elix.OF_OTHERS not in loaded.left_out


def test_splits_are_honest(folder: Path) -> None:
    """The publisher's test rows are test; validation is cut by prompt; nothing leaks."""
    for changes in ({}, {"form": "all"}, {"split_by": "target"}, BY_USER):
        users, loaded = load("elix", folder, **{"test_fraction": 0.25} | changes)
        train, validation, test = (list_triples(users, split) for split in SPLITS)
        assert train and validation and test, changes
        assert not (train & test or train & validation or validation & test), changes
        finder = LeakFinder(shared_replies=False, shared_people=changes != BY_USER)
        assert [leak for user in users for leak in finder.check(user)] == [], changes
        prompts = {t[0] for t in train} & {t[0] for t in validation}
        if changes == BY_USER:
            people = [{u.oracle for u in users if u.split == split} for split in SPLITS]
            assert [len(own) for own in people] == [3, 1, 1]
            assert len(set.union(*people)) == 5
            assert loaded.left_out[blocks.IN_OTHER_SPLIT] > 0
        else:
            assert not prompts
    users, _ = load("elix", folder)
    assert {t[0] for t in list_triples(users, "test")} == {row["prompt"] for row in TEST}


def test_a_training_row_that_is_in_the_test_file_is_left_out(tmp_path: Path) -> None:
    train, test = make_elix(9), make_elix(4, first=9)
    again = dict(test[0], prompt=test[0]["prompt"].upper())  # equal, but for case
    own_level = [row for row in test if row["scorer_level"] in (row["level_x"], row["level_y"])]
    write_published(tmp_path, [*train, again, *own_level], test, shards=1)
    users, loaded = load("elix", tmp_path, validation_fraction=0.0)
    left_out = loaded.left_out[blocks.IN_OTHER_SPLIT]
    assert left_out == len(own_level) + (
        again["scorer_level"] in (again["level_x"], again["level_y"])
    )
    assert {t[0].lower() for t in list_triples(users, "train")} == {r["prompt"] for r in train}


def test_parquet_and_lines_of_json_are_the_same(folder: Path, tmp_path: Path) -> None:
    fspo_files.write_jsonl(tmp_path / "elix_test.jsonl.gz", TEST)
    fspo_files.write_jsonl(tmp_path / "elix_train.jsonl.gz", TRAIN[::-1])
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "dataset_infos.json").write_text("{}")
    one, other = load("elix", folder)[0], load("elix", tmp_path)[0]
    assert one == other and len(one) > 100


def test_a_single_file_has_no_published_splits(tmp_path: Path) -> None:
    path = fspo_files.write_jsonl(tmp_path / "mine.jsonl", TRAIN)
    told = refuse("elix", path)
    assert 'field "data.split_by": found "published"' in told and "data.split_by=target" in told
    users, _ = load("elix", path, split_by="target", test_fraction=0.2)
    assert {user.split for user in users} == {"train", "validation", "test"}


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("label", None, "found null, allowed: a whole number: 0 where response_x is preferred"),
        ("label", "0", 'found "0", allowed: a whole number'),
        ("label", True, "found true, allowed: a whole number"),
        ("label", 0.5, "found 0.5, allowed: a whole number"),
        ("prompt", " ", "a text that is not empty"),
        ("response_x", None, 'field "response_x": found null'),
        ("scorer_level", 3, 'field "scorer_level": found 3, allowed: a text'),
        ("level_x", None, 'field "level_x": found null'),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, field: str, value: object, words: str) -> None:
    rows = make_elix(12)
    rows[6][field] = value
    fspo_files.write_jsonl(tmp_path / "train.jsonl", rows)
    fspo_files.write_jsonl(tmp_path / "test.jsonl", make_elix(4, first=12))
    told = refuse("elix", tmp_path)
    assert f"{tmp_path}/train.jsonl:7: " in told and words in told
    _, loaded = load("elix", tmp_path, on_bad_row="skip")
    assert loaded.bad_rows == [told] and loaded.counts["rows"] == 16 * 50


def test_a_bad_row_of_a_shard_is_named(tmp_path: Path) -> None:
    rows = make_elix(12)
    rows[302]["response_y"] = rows[302]["response_x"]
    rows[303]["label"] = None
    write_published(tmp_path, rows, make_elix(4, first=12))
    told = refuse("elix", tmp_path)
    assert "train-00001-of-00002-0000000000000001.parquet: row 3: " in told
    assert 'field "response_y"' in told and 'allowed: a text other than "response_x"' in told
    _, loaded = load("elix", tmp_path, on_bad_row="skip")
    assert [": row 3: " in each or ": row 4: " in each for each in loaded.bad_rows] == [True, True]


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    rows = [{("scorer" if k == "scorer_level" else k): v for k, v in row.items()} for row in TRAIN]
    write_published(tmp_path, rows, rows)
    told = refuse("elix", tmp_path)
    assert 'row 1: no field "scorer_level"' in told and 'Rename it to "scorer_level"' in told


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "no data files (field data.path), and no download: field data.download is False."),
        (["train.jsonl"], "is not a folder of train and test files"),
        (["train.jsonl", "test.jsonl", "more.jsonl"], "more.jsonl: found no split in the name"),
        (["train_test.jsonl"], "found test and train in the name"),
        (["train.jsonl", "train.parquet", "test.jsonl"], "train files of one format"),
        (["train.jsonl", "data/test.jsonl"], "files in one of the two"),
        (
            [
                "data/train-00000-of-00003.jsonl",
                "data/train-00002-of-00003.jsonl",
                "data/test.jsonl",
            ],
            "each of 3 shards once; missing: 00001",
        ),
        (
            ["train-00000-of-00001-aa.jsonl", "train-00000-of-00001-bb.jsonl", "test.jsonl"],
            "each of 1 shards once. Fetch all shards of one commit",
        ),
        (["train-00000-of-00001-aa.jsonl", "train.jsonl", "test.jsonl"], "each of 1 shards once"),
    ],
)
def test_files_that_cannot_be_told_apart_are_refused(
    tmp_path: Path, names: list[str], words: str
) -> None:
    for name in names:
        fspo_files.write_jsonl(tmp_path / "raw" / name, TRAIN[:2])
    told = refuse("elix", tmp_path / "raw")
    assert words in told and str(tmp_path) in told


def test_what_to_put_where_is_told(tmp_path: Path) -> None:
    told = refuse("elix", tmp_path / "none")
    assert "huggingface.co/datasets/Asap7772/elix_generations_autolabel there (.parquet" in told
    (tmp_path / "notes.txt").write_text("")
    assert "a file of another kind" in refuse("elix", tmp_path / "notes.txt")
    path = fspo_files.write_jsonl(tmp_path / "mine.jsonl", TRAIN)
    assert 'field "data.num_shots": found 0, allowed: at least 1' in refuse(
        "elix", path, num_shots=0
    )


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub.serve(tmp_path / "home") as served:
        yield served


def test_missing_files_are_fetched_at_a_commit(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    files = {f"data/{p.name}": p.read_bytes() for p in (folder / "data").iterdir()}
    commit = hub.push(elix.REPOSITORY, files | {"README.md": b"card", "notes.bin": b"x"})
    users, _ = load("elix", tmp_path / "new", download=True)
    assert users == load("elix", folder)[0]
    record = json.loads((tmp_path / "new" / "SOURCE.json").read_text())
    assert record["commit"] == commit and {*record["sha256"]} == {*files, "README.md"}
    with pytest.raises(FilesMissing, match=r"data.revision.*Put the train and test files"):
        load("elix", tmp_path / "other", download=True, revision="v9")


def test_from_the_files_to_the_first_batch(folder: Path) -> None:
    dataset = prepared.prepare(make_options("elix", folder), allow_sample=False)
    assert dataset.stats["leaks"] == {} and dataset.stats["counts"]["levels"] == 5
    assert dataset.stats["left_out"][elix.OF_OTHERS] == 38 * 30
    train = dataset.splits["train"]
    config = read_config(folder)
    words = tokenizer.train(list_training_texts(train, config), 400)
    batch = user_batches(train, words, config, seed=1)[0]
    assert batch.chosen.ids.shape[:2] == (config.batch.users, 1)
    encoded = encode.encode_user(train[0], words, config)
    assert encoded.oracle_text == train[0].oracle and encoded.truncations.contexts == 0
    first = {user.oracle for user in train[:20]}
    assert len(first) == 5, "levels are mixed, so that the first users are of all"


def read_config(folder: Path) -> Config:
    from configs import elix as elix_config
    from popi_jax.config import from_config_dict

    c = elix_config.get_config("scale=laptop")
    c.data.path = str(folder)
    c.batch.users = 4
    return from_config_dict(c)


def test_the_made_files_are_in_the_format_of_the_publisher(folder: Path) -> None:
    (test,) = (folder / "data").glob("test-00000-of-00001-*.parquet")
    assert (
        pq.read_schema(test).names
        == (
            "prompt response_x response_y level_x level_y level_id_x level_id_y model_name_x "
            "model_name_y scorer_level scorer_level_id label det_choice"
        ).split()
    )
