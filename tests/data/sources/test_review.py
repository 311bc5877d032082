"""Review on made files in the publisher's format; test_elix.py has what it shares with ELIX."""

from pathlib import Path

import pytest

from popi_jax.data import prepared
from popi_jax.data.sources import review
from tests.data.sources import fspo_files
from tests.data.sources.fspo_files import load, make_options, make_review, refuse, write_published


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("review") / "raw"
    return write_published(path, make_review(12), make_review(4, first=12))


def test_single_wishes_alone_are_read_unless_all_are_asked_for(folder: Path) -> None:
    users, loaded = load("review", folder)
    assert {user.groups["level"] for user in users} == {
        *("negative", "positive", "concise", "verbose")
    }
    assert loaded.left_out[review.COMBINED] == 16 * 28 * 4
    assert loaded.counts == {"rows": 16 * 28 * 8, "levels": 8}
    every, loaded = load("review", folder, form="all")
    assert review.COMBINED not in loaded.left_out
    assert {user.groups["level"] for user in every} == set(fspo_files.WISHES)
    oracles = {user.groups["level"]: user.oracle for user in every}
    assert oracles["verbose"] == "This user prefers verbose reviews."
    assert oracles["positive+concise"] == "This user prefers positive and concise reviews."
    user = users[0]
    assert (len(user.shots), len(user.pairs)) == (4, 1)
    assert user.user_id.startswith(f"review/{user.groups['level']}#{user.split}")


@pytest.mark.parametrize(
    ("level", "hint"),
    [
        ("postive", 'Did you mean "positive"?'),
        ("concise+positive", "one of negative, positive, concise, verbose, positive+concise,"),
    ],
)
def test_an_unknown_wish_is_named(tmp_path: Path, level: str, hint: str) -> None:
    rows = make_review(2)
    rows[3]["scorer_level"] = level
    fspo_files.write_jsonl(tmp_path / "train.jsonl", rows)
    fspo_files.write_jsonl(tmp_path / "test.jsonl", make_review(2, first=2))
    told = refuse("review", tmp_path)
    assert f'train.jsonl:4: field "scorer_level": found "{level}", allowed: one of' in told
    assert hint in told


def test_prepared_users_leak_nothing(folder: Path) -> None:
    for form in ("", "all"):
        cfg = make_options("review", folder, form=form)
        dataset = prepared.prepare(cfg, allow_sample=False)
        assert dataset.stats["leaks"] == {}
        assert all(dataset.stats[split]["users"] for split in ("train", "validation", "test"))
