"""The PRISM-format sample: that it is what its module says, and that made_odds.py knows the best
that is possible."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from popi_jax.data import prompts, tokenizer
from popi_jax.data.records import User
from popi_jax.data.sources import made_odds, made_people, prism, prism_rows
from popi_jax.diagnostics.decomposition import find_optimum

PEOPLE = 300
SIGMA = 1 / (1 + math.exp(-2.5))
POLES = [[pole.item for pole in sides] for sides in made_people.ATTRIBUTES]
PLACE = {item: (a, p) for a, items in enumerate(POLES) for p, item in enumerate(items)}
SHOWN = {
    reply: (a, p)
    for a, sides in enumerate(made_people.ATTRIBUTES)
    for p, pole in enumerate(sides)
    for reply in pole.replies
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample")
    made_people.write_sample(path, people=PEOPLE)
    return path


@pytest.fixture(scope="module")
def users(folder: Path) -> list[User]:
    options = SimpleNamespace(
        on_bad_row="error",
        split_by="user",
        validation_fraction=0.1,
        test_fraction=0.1,
        num_shots=6,
        num_pairs=8,
        turns="first",
        pair_mode="best_vs_worst",
        score_margin=1,
        use_system_string=False,
    )
    loaded = prism.load(folder, options)
    assert loaded.bad_rows == []
    return loaded.users


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def pearson(counts: list[int], expected: list[float]) -> float:
    return sum((n - e) ** 2 / e for n, e in zip(counts, expected, strict=True))


def test_the_prism_loader_reads_it_like_any_other(users: list[User]) -> None:
    assert len(users) == PEOPLE
    for user in users:
        assert (len(user.shots), len(user.pairs), len(user.readings)) == (6, 8, 6)
        assert len({PLACE[item][0] for item in user.oracle.split(" ; ")}) == 3
        assert user.profile and user.survey
        for shot, reading in zip(user.shots, user.readings, strict=True):
            assert reading.question in shot.prompt.split()
            (a, chosen), (b, rejected) = SHOWN[shot.chosen], SHOWN[shot.rejected]
            assert a == b and {chosen, rejected} == {0, 1}
            assert (reading.answer, reading.contrast) == (POLES[a][chosen], POLES[a][rejected])
    assert {user.split for user in users} == {"train", "validation", "test"}


def test_files_tell_one_story(folder: Path) -> None:
    utterances = {
        (u["conversation_id"], u["within_turn_id"]): u for u in rows(folder, "utterances")
    }
    conversations = rows(folder, "conversations")
    assert len(conversations) == 14 * PEOPLE and len(utterances) == 2 * len(conversations)
    for conversation in conversations:
        first, *replies = conversation["conversation_history"]
        assert first["content"] == conversation["opening_prompt"]
        for reply in replies:
            row = utterances[conversation["conversation_id"], reply["within_turn_id"]]
            assert (row["model_response"], row["user_prompt"]) == (
                reply["content"],
                first["content"],
            )
            assert (row["score"], row["if_chosen"]) == (reply["score"], reply["if_chosen"])
        (best,) = (reply["score"] for reply in replies if reply["if_chosen"])
        assert 100 >= best > min(reply["score"] for reply in replies) >= 1


def test_same_seed_same_bytes_and_more_people_change_nothing_before_them(tmp_path: Path) -> None:
    for name, people, seed in (("a", 4, 0), ("b", 4, 0), ("more", 6, 0), ("other", 4, 1)):
        made_people.write_sample(tmp_path / name, people=people, seed=seed)
    for file in (*prism_rows.FILES, prism_rows.LATENTS):
        a, b, more, other = (
            (tmp_path / name / file).read_bytes() for name in ("a", "b", "more", "other")
        )
        assert a == b and more.startswith(a) and len(more) > len(a) and a != other


def test_verdicts_follow_bradley_terry(users: list[User]) -> None:
    hits, counts = np.zeros(8, int), np.zeros(8, int)
    for user in users:
        wanted = {PLACE[item] for item in user.oracle.split(" ; ")}
        for pair in (*user.shots, *user.pairs):
            shown = SHOWN[pair.chosen]
            assert (
                shown in wanted or (shown[0], 1 - shown[1]) in wanted
            )  # of an attribute that the person cares about
            hits[shown[0]] += shown in wanted
            counts[shown[0]] += 1
    total = int(counts.sum())
    assert total == 14 * PEOPLE
    assert abs(hits.sum() / total - SIGMA) < 4 * math.sqrt(SIGMA * (1 - SIGMA) / total)
    misses = counts - hits
    assert (
        pearson([*hits, *misses], [*(counts * SIGMA), *(counts * (1 - SIGMA))]) < 26.1
    )  # 8 degrees, one in a thousand


def test_people_and_self_descriptions_have_the_stated_odds(folder: Path) -> None:
    active, first, said, right, stray = np.zeros(8, int), np.zeros(8, int), 0, 0, 0
    for survey, latent in zip(rows(folder, "survey"), rows(folder, "latents"), strict=True):
        wanted = dict(PLACE[item] for item in latent["oracle"].split(" ; "))
        stated = dict(PLACE[i] for i in PLACE if f" {i} ." in survey["self_description"])
        for a, pole in wanted.items():
            active[a] += 1
            first[a] += pole == 0
        said += len(stated.keys() & wanted.keys())
        right += len(stated.items() & wanted.items())
        stray += len(stated.keys() - wanted.keys())
    assert pearson(active.tolist(), [PEOPLE * 3 / 8] * 8) < 24.3  # 7 degrees, one in a thousand
    assert pearson([*first, *(active - first)], [*(active / 2), *(active / 2)]) < 26.1
    for count, of, share in (
        (said, 3 * PEOPLE, 0.4),
        (right, said, 0.9),
        (stray, 5 * PEOPLE, 0.04),
    ):
        assert abs(count / of - share) < 3.3 * math.sqrt(share * (1 - share) / of)


def test_stated_summaries_follow_from_the_self_description_alone(folder: Path) -> None:
    nothing = 0
    for survey, latent in zip(rows(folder, "survey"), rows(folder, "latents"), strict=True):
        items = [
            item for items in POLES for item in items if f" {item} ." in survey["self_description"]
        ]
        assert latent["stated"] == (" ; ".join(items) or "no strong preference")
        nothing += not items
    assert 0 < nothing < PEOPLE


def test_raw_signals_are_ten_times_as_long_as_the_truth(users: list[User]) -> None:
    words = tokenizer.train((prompts.render_signals(u) + f"\n{u.oracle}" for u in users), 1024)
    for user in users:
        signals = prompts.render_signals(user)
        assert len(signals.split()) >= 10 * len(user.oracle.split())
        assert len(words.encode(signals)) >= 10 * len(words.encode(user.oracle))


def list_people(user: User, knows: str) -> list[tuple[float, dict[int, int]]]:
    """Everybody that the user could be: the process told in the module, written down."""
    people = []  # (probability of all that is known, what the person prefers)
    for active in itertools.combinations(range(8), 3):
        for poles in itertools.product((0, 1), repeat=3):
            prefers = dict(zip(active, poles, strict=True))
            weight = 1.0
            if knows == "latent":
                weight = float(
                    {POLES[a][p] for a, p in prefers.items()} == set(user.oracle.split(" ; "))
                )
            if knows == "signals":
                for a in range(8):
                    said = [p for p in (0, 1) if POLES[a][p] in user.profile]
                    if a not in prefers:
                        weight *= 0.02 if said else 0.96
                    elif said:
                        weight *= 0.4 * (0.9 if said == [prefers[a]] else 0.1)
                    else:
                        weight *= 0.6
                for shot in user.shots:
                    a, pole = SHOWN[shot.chosen]
                    weight *= (
                        0.0
                        if a not in prefers
                        else (SIGMA if prefers[a] == pole else 1 - SIGMA) / 3
                    )
            people.append((weight, prefers))
    return people


def plain_optimum(user: User, knows: str) -> float:
    """Sums over everybody that the user could be, one after another."""
    people, values = list_people(user, knows), []
    for pair in user.pairs:
        a = SHOWN[pair.chosen][0]
        wins = [
            sum(w * (SIGMA if s[a] == pole else 1 - SIGMA) / 3 for w, s in people if a in s)
            for pole in (0, 1)
        ]
        values.append(max(wins) / sum(wins))
    return sum(values) / len(values)


def test_bayes_optimum_equals_the_plain_sum(users: list[User]) -> None:
    for some in ([users[0]], users[1:6]):
        found = find_optimum([odds for user in some for odds in made_odds.find_odds(user)])
        for knows in ("no_signals", "signals", "latent"):
            assert found[knows] == pytest.approx(
                np.mean([plain_optimum(user, knows) for user in some]), abs=1e-9
            )


def test_no_list_as_long_is_better_than_the_best(users: list[User]) -> None:
    lengths = set()
    for user in [*users[:3], dataclasses.replace(users[3], profile="", shots=())]:
        people = list_people(user, "signals")

        def score(items: dict[int, int], people: Any = people) -> float:
            """Expected accuracy on a pair of who follows the items, and guesses elsewhere."""
            right = sum(
                w * (SIGMA if items[a] == pole else 1 - SIGMA) if a in items else w / 2
                for w, prefers in people
                for a, pole in prefers.items()
            )
            return right / sum(3 * w for w, _ in people)

        best = made_odds.write_best_list(user)
        named = [PLACE[item] for item in best.split(" ; ") if item]
        lengths.add(len(named))
        every = [
            score(dict(zip(about, poles, strict=True)))
            for about in itertools.combinations(range(8), 3)
            for poles in itertools.product((0, 1), repeat=3)
        ]
        assert score(dict(named)) == pytest.approx(max(every), abs=1e-9)
    assert 0 in lengths and 3 in lengths  # nothing is named where nothing speaks for it


def test_more_knowledge_is_better_and_no_classifier_beats_it(users: list[User]) -> None:
    best = find_optimum([odds for user in users for odds in made_odds.find_odds(user)])
    assert (
        best["no_signals"] == 0.5 < best["signals"] - 0.1
        and best["signals"] < best["latent"] - 0.02
    )
    assert best["latent"] == pytest.approx(SIGMA)
    hits = [
        SHOWN[pair.chosen] in {PLACE[item] for item in user.oracle.split(" ; ")}
        for user in users
        for pair in user.pairs
    ]
    assert abs(np.mean(hits) - best["latent"]) < 4 * math.sqrt(SIGMA * (1 - SIGMA) / len(hits))


def test_read_reply() -> None:
    assert made_odds.read_reply("put simply , it just works .") == PLACE["plain words"]
    with pytest.raises(KeyError):
        made_odds.read_reply("something else")
