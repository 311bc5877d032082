"""A training of three updates on every data set, from files in its publisher's format."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from popi_jax.data.sources.made_people import write_sample
from popi_jax.models import packing
from popi_jax.run import open_run
from popi_jax.training import loop
from tests.data.sources import alignx_files, fspo_files, test_personamem, test_prefeval
from tests.tiny_run import on_devices
from tests.training.test_official_sets import load


def write_fspo(name: str, folder: Path) -> None:
    made = {"elix": fspo_files.make_elix, "review": fspo_files.make_review}
    make = made.get(name, lambda n, first=0: fspo_files.make_roleplay(4, 4 * n, first=4 * first))
    fspo_files.write_published(folder, make(24), make(6, first=24))


def write_prefeval(folder: Path) -> None:
    test_prefeval.write(folder, test_prefeval.world(topics=6, rows=6))


def write_personamem(folder: Path) -> None:
    folder.mkdir()
    questions, contexts = [], {}
    for n in range(40):
        contexts[f"c{n}"] = [
            {"role": "user", "content": f"User: I like {k} of {n}."} for k in range(4)
        ]
        own = {"persona_id": str(n), "question_id": f"q{n}", "shared_context_id": f"c{n}"}
        asked = {"user_question_or_message": f"What do I drink, {n}?"}
        options = str([f"({letter}) tea {letter} of {n}" for letter in "abcd"])
        questions.append(test_personamem.QUESTION | own | asked | {"all_options": options})
    test_personamem.write_v1(folder, questions, contexts)


def write_lines(folder: Path) -> None:
    folder.mkdir()
    for split, first, last in (("train", 0, 30), ("validation", 30, 36), ("test", 36, 44)):
        rows = (
            {
                "user_id": f"u{n}",
                "record_id": str(n),
                "prompt": [{"role": "user", "content": f"what of {n}?"}],
                "chosen": f"tea {n}",
                "rejected": "none",
                "signals": {"profile": f"I am {n}"},
            }
            for n in range(first, last)
        )
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


WRITE: dict[str, Callable[[Path], object]] = {
    "prism": lambda folder: write_sample(folder, people=60),
    "elix": lambda folder: write_fspo("elix", folder),
    "review": lambda folder: write_fspo("review", folder),
    "roleplay": lambda folder: write_fspo("roleplay", folder),
    "alignx": lambda folder: alignx_files.write_published(
        folder, alignx_files.make_rows(80), alignx_files.make_tests(6, first=1000)
    ),
    "psoups": lambda folder: alignx_files.write(
        folder / "friendly_unfriendly.json", alignx_files.make_personas(60, 2)
    ),
    "ufp4": lambda folder: alignx_files.write(
        folder / "honesty.json", alignx_files.make_personas(60, 2)
    ),
    "prefeval": write_prefeval,
    "personamem": write_personamem,
    "jsonl": write_lines,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITE)
def test_a_set_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WORTHWHILE", 0.0)  # halves what is compiled
    WRITE[name](tmp_path / "raw")
    config = load(f"{name}:scale=laptop", tmp_path)
    with on_devices(1):
        run = open_run(config)
        trained = loop.train(run)
    assert int(trained.state.step) == 3
    rows = [json.loads(line) for line in (tmp_path / "work/metrics.jsonl").open()]
    assert any("inference/reward" in row for row in rows)
    assert any("generator/loss" in row for row in rows)
