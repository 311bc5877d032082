"""P-Soups and UF-P-4 on made files in the format of AlignX's benchmark; P-Soups also on the real
file where it is."""

from collections import Counter
from pathlib import Path

import pytest

from configs.psoups import get_config
from popi_jax.config import from_config_dict
from popi_jax.data import encode, prepared, tokenizer
from popi_jax.data.leaks import LeakFinder, fold
from popi_jax.data.prompts import list_training_texts
from popi_jax.data.records import SPLITS, User
from popi_jax.data.sources import persona_pairs, psoups, ufp4
from tests.data.people import user_batches
from tests.data.sources.alignx_files import (
    PAIRS,
    PERSONAS,
    load,
    make_options,
    make_personas,
    refuse,
    write,
)

NAME = "friendly_unfriendly"
PLACES = [Path(__file__).parents[3] / "data/psoups"]
PLACES += [parent / "shared/data/psoups" for parent in Path(__file__).parents]
REAL = next((p / f"{NAME}.json" for p in PLACES if (p / f"{NAME}.json").exists()), Path("none"))
SPELLED = "past pairs that spell out the persona (their rows stay)"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = make_personas(targets=40, draws=3)
    return write(tmp_path_factory.mktemp("p") / "raw" / f"{NAME}.json", rows)


def list_prompts(users: list[User], split: str) -> set[str]:
    return {fold(u.pairs[0].prompt[0]["content"]) for u in users if u.split == split}


def list_seen(users: list[User], split: str) -> set[str]:
    """Folded prompts of past pairs."""
    return {fold(s.prompt) for user in users if user.split == split for s in user.shots}


def test_a_row_is_a_user_and_a_target_a_person(path: Path) -> None:
    users, loaded = load("psoups", path)
    assert loaded.counts["rows"] == len(users) == loaded.total == 240
    assert [user.user_id for user in users[:4]] == [
        *(f"psoups/{NAME}/1", f"psoups/{NAME}/1#2", f"psoups/{NAME}/1#3", f"psoups/{NAME}/4")
    ]
    assert len({user.user_id.split("#")[0] for user in users}) == 80 == loaded.counts["targets"]
    user = users[5]
    assert (user.profile, user.survey, user.comments, len(user.shots)) == ("", "", (), 4)
    assert user.oracle == PERSONAS[0] == user.groups["persona"]
    assert user.pairs[0].chosen == "thing 1 as persona 0 has it"
    assert all("DERIVED" not in user.to_json() for user in users)
    assert Counter(user.oracle for user in users) == dict.fromkeys(PERSONAS, 120)
    assert loaded.counts["personas"] == 2 and loaded.counts["rows that equal another"] == 0
    assert loaded.left_out == {} and loaded.counts["past pairs"] == 16
    assert {len(u.shots) for u in load("psoups", path, num_shots=2)[0]} == {2}


def test_equal_rows_are_counted(tmp_path: Path) -> None:
    rows = make_personas(targets=2, draws=3, pool=2)  # all three draws are the same
    users, loaded = load("psoups", write(tmp_path / "a.jsonl.gz", rows))
    assert len(users) == 12 and loaded.counts["rows that equal another"] == 8


def test_splits_by_target_are_honest(path: Path) -> None:
    users, _ = load("psoups", path)
    train, validation, test = (list_prompts(users, split) for split in SPLITS)
    assert train and validation and test
    assert not (train & validation or train & test or validation & test)
    finder = LeakFinder(shared_replies=False, shared_people=False)
    assert [leak for user in users for leak in finder.check(user)] == []
    both = {u.oracle for u in users if u.split == "test"}
    assert both == set(PERSONAS), "no split goes by the place in the file, which is sorted"


def test_prompts_of_past_pairs_are_for_training(tmp_path: Path) -> None:
    """A test target that a training user shows as a past pair would be no test."""
    rows = make_personas(targets=40, draws=3)
    for row in rows[:60]:
        target = rows[(rows.index(row) + 30) % 120]
        row[PAIRS][0] = {name: target[name] for name in ("prompt", "chosen", "rejected")}
    path = write(tmp_path / "a.json", rows)
    users, loaded = load("psoups", path, test_fraction=0.5)
    seen = set().union(*(list_seen(users, split) for split in SPLITS))
    assert len(seen & list_prompts(users, "train")) == 20
    assert not seen & (list_prompts(users, "test") | list_prompts(users, "validation"))
    assert loaded.left_out == {}


def test_a_split_by_user_holds_a_persona_out(path: Path) -> None:
    users, loaded = load("psoups", path, split_by="user")
    people = {split: {u.oracle for u in users if u.split == split} for split in SPLITS}
    assert len(people["test"]) == 1 and not people["test"] & people["train"]
    assert people["train"] == people["validation"]
    assert not list_prompts(users, "train") & list_prompts(users, "validation")
    assert len(users) == 240 and loaded.left_out == {}


def test_a_held_out_persona_does_not_repeat_what_another_prefers(tmp_path: Path) -> None:
    rows = make_personas(targets=40, draws=1)
    for n in range(10):  # the second persona prefers what the first does, or the opposite
        prefers = ("chosen", "rejected") if n % 2 else ("rejected", "chosen")
        rows[40 + n]["chosen"], rows[40 + n]["rejected"] = (rows[n][name] for name in prefers)
    users, loaded = load("psoups", write(tmp_path / "a.json", rows), split_by="user")
    assert loaded.left_out == {"the target is seen in training, or among validation users": 10}
    finder = LeakFinder(shared_replies=False, shared_people=False)
    assert [leak for user in users for leak in finder.check(user)] == []


def test_what_spells_out_the_persona_is_left_out(tmp_path: Path) -> None:
    rows = make_personas(targets=10, draws=1)
    rows[0][PAIRS][2]["chosen"] = f"They said: {PERSONAS[0]}"
    rows[1]["chosen"] = PERSONAS[0].upper()
    for pair in rows[2][PAIRS]:
        pair["rejected"] = PERSONAS[0]
    rows[3][PAIRS][1] = {name: rows[3][name] for name in ("prompt", "chosen", "rejected")}
    users, loaded = load("psoups", write(tmp_path / "a.json", rows))
    assert loaded.left_out == {
        SPELLED: 5,
        "the target spells out the persona": 1,
        "no past pair is left": 1,
        "the prompt is among the signals of its row": 1,
    }
    assert len(users) == 17 and len(users[0].shots) == 3
    assert all(fold(u.oracle) not in fold(str((u.shots, u.pairs))) for u in users)


def test_rows_without_what_is_needed_are_named(tmp_path: Path) -> None:
    rows = make_personas(targets=4, draws=1)
    rows[2]["ground_truth_persona"] = None
    told = refuse("psoups", write(tmp_path / "a.json", rows))
    assert 'a.json: row 3: field "ground_truth_persona": found null' in told
    del rows[2][PAIRS]
    assert f'row 3: no field "{PAIRS}"' in refuse("psoups", write(tmp_path / "a.json", rows))
    users, loaded = load("psoups", tmp_path / "a.json", on_bad_row="skip")
    assert len(users) == 7 and len(loaded.bad_rows) == 1
    assert "data.num_shots" in refuse("psoups", tmp_path / "a.json", num_shots=0)
    told = refuse("psoups", tmp_path / "nothing")
    assert "benchmark/P-Soups" in told and "student_phd.json" in told


def test_the_repository_is_where_missing_files_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    fetch = persona_pairs.download
    monkeypatch.setattr(fetch, "download_files", lambda *args: asked.append(args))
    cfg = make_options("psoups", tmp_path / "raw")
    assert psoups.SOURCE.find(cfg, True) == tmp_path / "raw"
    assert ufp4.SOURCE.find(cfg, True) == tmp_path / "raw"
    urls = [f"{persona_pairs.RAW}/{name}" for name in ("P-Soups", "UF-P-4")]
    assert asked == [
        (tmp_path / "raw", url, sums)
        for url, sums in zip(urls, (psoups.KIND.sha256, ufp4.KIND.sha256), strict=True)
    ]


def write_qualities(folder: Path) -> Path:
    """UF-P-4: a file for each quality; the prompts are those of all files."""
    for n, name in enumerate(ufp4.QUALITIES):
        rows = make_personas(30, 2, personas=[f"quality {n}"])
        for row in rows:
            del row["ground_truth_persona"], row["profile"]
            row["chosen"] = f"{row['chosen']} {name}"
            for pair in row[PAIRS]:
                pair["chosen"] = f"{pair['chosen']} {name}"
        write(folder / f"{name}.json", rows)
    return folder


def test_a_file_of_ufp4_is_a_quality(tmp_path: Path) -> None:
    folder = write_qualities(tmp_path / "raw")
    users, loaded = load("ufp4", folder)
    assert loaded.counts["rows"] == 240 and loaded.counts["personas"] == 4
    assert users[0].user_id == "ufp4/helpfulness/1"
    assert {u.oracle for u in users if u.user_id.startswith("ufp4/instruction_following/")} == {
        "This person cares about the instruction-following of replies above all."
    }
    assert not list_prompts(users, "train") & list_prompts(users, "test")
    users, _ = load("ufp4", folder, split_by="user")
    assert len({u.oracle for u in users if u.split == "test"}) == 1
    assert len({u.oracle for u in users if u.split == "train"}) == 3
    assert len({u.oracle for u in users if u.split == "validation"}) == 3


def test_what_was_not_known_of_ufp4_is_told(tmp_path: Path) -> None:
    rows = make_personas(3, 1)
    rows[1]["survey_options"] = True
    told = refuse("ufp4", write(tmp_path / "honesty.json", rows))
    assert 'honesty.json: row 2: unknown field "survey_options"; allowed: prompt, chosen' in told
    rows = make_personas(3, 1)
    assert {u.oracle for u in load("ufp4", write(tmp_path / "x.json", rows))[0]} == set(PERSONAS)
    del rows[0]["ground_truth_persona"]
    told = refuse("ufp4", write(tmp_path / "honest.json", rows))
    assert 'row 1: no field "ground_truth_persona", and the file is named "honest"' in told
    assert 'Did you mean "honesty"?' in told


@pytest.mark.parametrize("name", ["psoups", "ufp4"])
def test_from_the_files_to_the_first_batch(name: str, path: Path, tmp_path: Path) -> None:
    files = path if name == "psoups" else write_qualities(tmp_path / "raw")
    _go_to_a_batch(name, files, tmp_path)


def _go_to_a_batch(name: str, files: Path, tmp_path: Path) -> prepared.Dataset:
    cfg = make_options(name, files, prepared=str(tmp_path / "prepared"))
    dataset = prepared.prepare(cfg, allow_sample=False)
    assert dataset.stats["leaks"] == {} and all(len(dataset.splits[s]) for s in SPLITS)
    c = get_config("scale=laptop")
    c.data.path, c.batch.users = str(files), 4
    config = from_config_dict(c)
    words = tokenizer.train(list_training_texts(dataset.splits["train"], config), 400)
    batch = user_batches(dataset.splits["train"], words, config, seed=1)[0]
    assert batch.chosen.ids.shape[:2] == (4, 1)
    user = dataset.splits["train"][0]
    assert encode.encode_user(user, words, config).oracle_text == user.oracle
    return dataset


@pytest.mark.skipif(not REAL.exists(), reason="the file is not handed on: no licence")
def test_the_published_file_has_its_counts(tmp_path: Path) -> None:
    """Counts as two others have them (600 rows, 128 targets, 22 past pairs, 300 a persona), less
    what is left out: the one row that shows its prompt, 2 whose target spells out the persona and
    the past pairs that do."""
    users, loaded = load("psoups", REAL)
    assert loaded.counts["rows"] == 600 and loaded.bad_rows == []
    assert loaded.left_out == {
        "the prompt is among the signals of its row": 1,
        "the target spells out the persona": 2,
        "no past pair is left": 1,
        SPELLED: 324,
    }
    of_targets = len({u.user_id.split("#")[0] for u in users})
    assert of_targets == loaded.counts["targets"] == 127  # a target of the rows left out
    assert loaded.counts["past pairs"] == 22 - 3  # three that spell out the persona
    assert sorted(Counter(user.oracle for user in users).values()) == [296, 300]
    seen = set().union(*(list_seen(users, split) for split in SPLITS))
    assert not seen & (list_prompts(users, "test") | list_prompts(users, "validation"))
    dataset = _go_to_a_batch("psoups", REAL, tmp_path)
    assert sum(len(dataset.splits[split]) for split in SPLITS) == 596
