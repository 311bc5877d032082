"""A run on AlignX, from files in the publisher's format to its last step; and what a released model
gets."""

import importlib
import json
from pathlib import Path

import pytest

from popi_jax import cli
from popi_jax.models import packing
from popi_jax.run import open_run
from popi_jax.training import loop
from tests.data.sources.alignx_files import make_personas, make_rows, make_tests, write
from tests.data.sources.alignx_files import write_published as write_alignx
from tests.tiny_run import on_devices
from tests.training.test_official_sets import load


def test_alignx_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WORTHWHILE", 0.0)  # halves what is compiled
    write_alignx(tmp_path / "raw", make_rows(80), make_tests(6, first=1000))
    config = load("alignx:scale=laptop", tmp_path)
    with on_devices(1):
        run = open_run(config)
        assert run.measured.truncations.contexts == 0
        assert len(run.dataset.splits["test"]) == 24
        trained = loop.train(run)
    assert int(trained.state.step) == 3
    rows = [json.loads(line) for line in (tmp_path / "work/metrics.jsonl").open()]
    assert any("inference/reward" in row for row in rows)
    assert any("generator/loss" in row for row in rows)


@pytest.mark.parametrize("name", ["alignx", "psoups", "ufp4"])
def test_small_limits_are_a_configuration(name: str, tmp_path: Path) -> None:
    """`make train CONFIG=name` as it is: the data are prepared and measured within its limits."""
    raw = tmp_path / "raw"
    if name == "alignx":
        write_alignx(raw, make_rows(80), make_tests(6, first=1000))
    else:
        write(raw / "honesty.json", make_personas(60, 2))
    own = {"workdir": tmp_path / "work", "data.prepared": tmp_path / "prepared"}
    own |= {"data.path": raw, "data.validation_fraction": 0.2, "mesh.num_devices": 0}
    spec = f"{name}:scale=laptop"
    config = cli.load_config(spec, [f"--config.{key}={value}" for key, value in own.items()])
    with on_devices(1):
        run = open_run(config)
    assert run.measured.truncations.contexts == run.measured.truncations.turns == 0
    assert run.dataset.source.name == name and run.dataset.data == "published"


@pytest.mark.parametrize("name", ["alignx", "psoups", "ufp4"])
def test_a_released_model_gets_the_official_figures(name: str) -> None:
    get_config = importlib.import_module(f"configs.{name}").get_config
    c = get_config("model=llama3-3b,scale=gpu")
    assert (c.generator.beta, c.batch.users, c.batch.pairs) == (0.01, 8, 1)
    assert (c.data.num_shots, c.data.num_pairs, c.data.context_len) == (4, 1, 8192)
    phases = ("inference 60", "stored 60") if name == "psoups" else None
    assert c.schedule.phases == (phases or ("inference 2500", "stored 2500"))
    joint = get_config("model=llama3-3b,scale=gpu,schedule=joint")
    assert joint.schedule.phases == ("inference 420", "joint 80")
