"""Every row that the README and the Makefile advertise trains from its start to its end, tiny."""

import re
from pathlib import Path

import jax
import pytest

from configs.models import MODELS
from configs.schedules import SCHEDULES
from popi_jax import cli
from popi_jax.config import Config
from popi_jax.models import packing
from popi_jax.run import open_run
from popi_jax.training import choices, loop, restore
from tests.tiny_run import command, load_tiny, on_devices, shared_run

TINY = {
    "data.context_len": 160,
    "data.turn_len": 48,
    "data.answer_len": 24,
    "data.summary_len": 4,
    "batch.users": 8,
    "batch.pairs": 2,
    "inference.group_size": 2,
    "evaluation.batch_users": 8,
}


def shorten(spec: str, workdir: Path, **changed: object) -> Config:
    """A row with the phases and stages that it has, each of a step or two."""
    whole = cli.load_config(spec)
    phases = tuple(re.sub(r"\d+$", "2", phase) for phase in whole.schedule.phases)
    own = TINY | {"schedule.phases": phases, **changed}
    if whole.warmup.steps:
        own |= {"warmup.steps": 1, "warmup.generator_users": 8, "warmup.summary_users": 8}
        own |= {"warmup.reading_users": 8, "warmup.readings": 1}
    return load_tiny(spec, workdir, **own)


def train_twice(config: Config) -> None:
    """To the end, and once more, which finds nothing to do; then what a user of the run reads."""
    with on_devices(1):
        run = open_run(config)
        steps = len(choices.plan_run(run).plan.kinds) + config.warmup.steps
        first = loop.train(run)
        assert int(first.state.step) == steps
        again = loop.train(run)
        assert int(again.state.step) == steps
        restored = restore.restore_run(run)
        used = loop.use_models(again, config)
        for x, y in zip(
            jax.tree.leaves((restored.inference, restored.generator)),
            jax.tree.leaves(used),
            strict=True,
        ):
            assert (x == y).all()


@pytest.fixture(autouse=True)
def without_second_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are computed with their padding, which halves what is compiled."""
    monkeypatch.setattr(packing, "WORTHWHILE", 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Hugging Face folder."""
    path = tmp_path_factory.mktemp("base")
    command("export").export_role(shared_run(8).workdir, "generator", path / "model")
    return path / "model"


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule(name: str, tmp_path: Path) -> None:
    own = {field: value for field, value in SCHEDULES[name].items() if field == "batch.pairs"}
    train_twice(shorten(f"prism:scale=laptop,schedule={name}", tmp_path / "run", **own))


def find_settings(name: str) -> dict[str, object]:
    """A row of MODELS without its folder."""
    return {field: value for field, value in MODELS[name].items() if field != "model.checkpoint"}


# of rows that differ in their folder alone one is trained
NAMES = list(MODELS)
DIFFERENT = [
    name
    for number, name in enumerate(NAMES)
    if all(find_settings(name) != find_settings(other) for other in NAMES[:number])
]


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_model(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """In the schedule of fewest steps."""
    spec, changed = f"prism:scale=laptop,model={name},schedule=generator_only", {}
    if MODELS[name].get("model.checkpoint", "a folder"):
        changed["model.checkpoint"] = request.getfixturevalue("folder")
    train_twice(shorten(spec, tmp_path / "run", **changed))
