"""A run on one of the official sets, from files in the publisher's format to its last step; and the
figures of the official code that a released model gets."""

import json
from pathlib import Path

import pytest

from configs.official import OFFICIAL, apply_official
from popi_jax import cli
from popi_jax.config import Config
from popi_jax.models import packing
from popi_jax.run import open_run
from popi_jax.training import loop
from tests.data.sources.fspo_files import make_elix, make_review, make_roleplay, write_published
from tests.tiny_run import on_devices

TINY = {
    "data.download": "false",
    "data.validation_fraction": 0.2,
    "data.context_len": 200,
    "data.turn_len": 40,
    "data.answer_len": 24,
    "data.summary_len": 4,
    "model.vocab_size": 400,
    "batch.users": 8,
    "inference.group_size": 2,
    "warmup.steps": 1,
    "warmup.generator_users": 8,
    "warmup.summary_users": 8,
    "warmup.reading_users": 8,
    "warmup.readings": 1,
    "schedule.phases": ("inference 1", "generator 1"),
    "schedule.log_every": 1,
    "mesh.num_devices": 0,
}
SETS = ("elix", "review", "roleplay")


def load(spec: str, tmp_path: Path) -> Config:
    own = {"workdir": tmp_path / "work", "data.prepared": tmp_path / "prepared"}
    own |= TINY | {"data.path": tmp_path / "raw"}
    return cli.load_config(spec, [f"--config.{name}={value}" for name, value in own.items()])


def test_elix_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WORTHWHILE", 0.0)  # halves what is compiled
    write_published(tmp_path / "raw", make_elix(24), make_elix(6, first=24))
    config = load("elix:scale=laptop", tmp_path)
    with on_devices(1):
        run = open_run(config)
        assert run.measured.truncations.contexts == 0
        trained = loop.train(run)
    assert int(trained.state.step) == 3
    rows = [json.loads(line) for line in (tmp_path / "work/metrics.jsonl").open()]
    assert any("inference/reward" in row for row in rows)
    assert any("generator/loss" in row for row in rows)


@pytest.mark.parametrize("name", SETS)
def test_small_limits_are_a_configuration(name: str, tmp_path: Path) -> None:
    """`make train CONFIG=name` as it is: the data are prepared and measured within its limits."""
    rows = {"elix": make_elix, "review": make_review}
    made = rows.get(name, lambda prompts, first=0: make_roleplay(4, 4 * prompts, first=4 * first))
    write_published(tmp_path / "raw", made(24), made(6, first=24))
    own = {"workdir": tmp_path / "work", "data.prepared": tmp_path / "prepared"}
    own |= {"data.path": tmp_path / "raw", "data.validation_fraction": 0.2, "mesh.num_devices": 0}
    spec = f"{name}:scale=laptop"
    config = cli.load_config(spec, [f"--config.{key}={value}" for key, value in own.items()])
    with on_devices(1):
        run = open_run(config)
    assert run.measured.truncations.contexts == run.measured.truncations.turns == 0
    assert run.dataset.source.name == name


@pytest.mark.parametrize("name", SETS)
def test_a_released_model_gets_the_official_figures(name: str) -> None:
    import importlib

    get_config = importlib.import_module(f"configs.{name}").get_config
    c = get_config("model=llama3-3b,scale=gpu")
    found = {key: c.to_dict() for key in OFFICIAL}
    for key, value in OFFICIAL.items():
        at = found[key]
        for part in key.split("."):
            at = at[part]
        assert at == value, key
    blocks = {"elix": (4, 2), "review": (4, 1), "roleplay": (8, 1)}
    assert (c.data.num_shots, c.data.passes) == blocks[name]
    assert c.batch.users == 8 and c.generator.beta == 0.01 and c.generator.over_beta
    assert c.data.summary_len + c.data.turn_len + c.data.answer_len == 6144


def test_what_was_asked_for_stays() -> None:
    """Phases of a schedule, learning rates of adapters, a user for each chip."""
    get_config = __import__("configs.elix", fromlist=["get_config"]).get_config
    c = get_config("model=lora,schedule=joint,scale=v5p-64")
    assert c.schedule.phases == ("inference 420", "joint 80")
    assert c.generator.learning_rate == c.inference.learning_rate == 2e-5
    assert c.batch.users == 32
    assert get_config("model=pretrained,scale=v5e-4").batch.users == 8
    assert get_config("model=pretrained,scale=laptop").batch.users == 8
    again = c.copy_and_resolve_references()
    apply_official(again)
    assert again.to_dict() == c.to_dict() | {"data": c.data.to_dict()}
