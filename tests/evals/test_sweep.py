"""Sweeps of a run with random weights: what is there is never computed again."""

import dataclasses
import json
import shutil

import pytest

from popi_jax import cli
from popi_jax.evals import cells, records
from popi_jax.evals.conditions import list_reads
from popi_jax.evals.sweep import Outcome, Place, read_records, run_sweep
from popi_jax.evals.sweep_plan import DEFAULT, Sweep, list_cells
from tests.tiny_run import TinyRun, command, config_of, on_devices, shared_run


@pytest.fixture(scope="module")
def tiny() -> TinyRun:
    return shared_run(1)


@pytest.fixture(autouse=True)
def restored():
    with on_devices(1):
        yield


def make_sweep(tiny: TinyRun, **changed: tuple[str, ...]) -> Sweep:
    grid = DEFAULT._replace(
        models=(str(tiny.workdir),), conditions=("no_signals", "summary", "oracle")
    )
    return Sweep((grid._replace(**changed),), "no_signals", 4)


def run(tiny: TinyRun, out, plan: Sweep, share: str = "1/1", **released: str) -> list[Outcome]:
    """released: how prompts of base models are worded."""
    from popi_jax.run import start_devices

    config = config_of(tiny.workdir)
    mesh = start_devices(config)
    bases = dataclasses.replace(config, model=dataclasses.replace(config.model, **released))
    place = Place(str(out), config, bases, mesh, lambda name: cli.load_config(name).data, True)
    return run_sweep(plan, place, share=share)


def list_bytes(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*/*")}


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of a sweep that was not disturbed."""
    out = tmp_path_factory.mktemp("whole")
    with on_devices(1):
        outcomes = run(tiny, out, make_sweep(tiny))
    assert [outcome.status for outcome in outcomes] == ["done"] * 3
    return out


@pytest.fixture
def out(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "out")


class Asked(BaseException):
    """Nothing that a sweep takes for a failure of a cell."""


def forbid(monkeypatch) -> list[str]:
    """Computing is noted, and fails."""
    asked: list[str] = []

    def score(self, cell, advance):
        asked.append(cell.condition)
        raise Asked

    monkeypatch.setattr(cells.Unit, "score", score)
    return asked


def test_what_is_there_is_not_computed_again(tiny, out, monkeypatch):
    before = list_bytes(out)
    asked = forbid(monkeypatch)
    outcomes = run(tiny, out, make_sweep(tiny))
    assert not asked and {outcome.status for outcome in outcomes} == {"done"}
    assert list_bytes(out) == before
    found = read_records(outcomes, str(out))
    assert [record.header["labels"]["condition"] for record in found] == list(
        make_sweep(tiny).grids[0].conditions
    )
    assert {len(record.items) for record in found} == {12}
    with pytest.raises(Asked):
        run(tiny, out, make_sweep(tiny, conditions=("no_signals", "raw_signals")))
    assert asked == ["raw_signals"]


def test_a_damaged_cell_is_computed_anew_to_the_same(tiny, out, whole, caplog):
    (path,) = [p for p in (out / "cells").iterdir() if b'"oracle"' in p.read_bytes()]
    text = path.read_text()
    path.write_text(text[:-40])
    outcomes = run(tiny, out, make_sweep(tiny))
    assert {outcome.status for outcome in outcomes} == {"done"}
    assert f"{path.name}.damaged" in caplog.text
    assert records.read(path).items == records.read(whole / "cells" / path.name).items
    assert (out / "cells" / f"{path.name}.damaged").read_text() == text[:-40]


def test_a_cell_that_fails_is_told_recorded_and_tried_again(tiny, out, monkeypatch, caplog):
    plan = make_sweep(tiny, conditions=("no_signals", "orakle", "raw_signals"))
    score = cells.Unit.score

    def fail(self, cell, advance):
        if cell.condition == "raw_signals":
            raise RuntimeError("out of memory")
        return score(self, cell, advance)

    monkeypatch.setattr(cells.Unit, "score", fail)
    outcomes = run(tiny, out, plan)
    assert [outcome.status for outcome in outcomes] == ["done", "failed", "failed"]
    assert 'unknown condition "orakle"' in outcomes[1].reason
    assert outcomes[2].reason == "RuntimeError: out of memory"
    found = read_records(outcomes, str(out))
    assert [record.header["status"] for record in found] == ["done", "failed", "failed"]
    failure = records.find_failure(str(out), outcomes[2].cell.labels())
    assert records.read(failure).header["reason"] == "RuntimeError: out of memory"
    monkeypatch.undo()
    with on_devices(1):
        outcomes = run(tiny, out, plan)
    assert [outcome.status for outcome in outcomes] == ["done", "failed", "done"]
    assert not failure.exists()


def test_a_missing_run_fails_and_the_others_go_on(tiny, out, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    models = (nowhere, str(tiny.workdir), f"{tiny.workdir}@5")
    outcomes = run(tiny, out, make_sweep(tiny, models=models, conditions=("no_signals",)))
    assert [outcome.status for outcome in outcomes] == ["failed", "done", "failed"]
    assert f'no run in "{nowhere}"' in outcomes[0].reason
    assert "has no step 5; the steps that are there: 7" in outcomes[2].reason


def test_shares_in_turn_are_the_whole(tiny, whole, tmp_path, monkeypatch):
    asked = []
    score = cells.Unit.score

    def count(self, cell, advance):
        asked.append(cell)
        return score(self, cell, advance)

    monkeypatch.setattr(cells.Unit, "score", count)
    first = run(tiny, tmp_path, make_sweep(tiny), share="1/2")
    assert sorted(o.status for o in first) == ["done", "done", "missing"]
    with on_devices(1):
        second = run(tiny, tmp_path, make_sweep(tiny), share="2/2")
    assert {outcome.status for outcome in second} == {"done"}
    assert sorted(asked) == sorted(list_cells(make_sweep(tiny), list_reads()))
    assert {p.name for p in tmp_path.glob("cells/*")} == {p.name for p in whole.glob("cells/*")}
    for path in tmp_path.glob("cells/*"):
        assert records.read(path).items == records.read(whole / "cells" / path.name).items


def test_a_cell_of_another_version_is_left_alone(tiny, out):
    (path,) = [p for p in (out / "cells").iterdir() if b'"oracle"' in p.read_bytes()]
    text = path.read_text().replace('{"format": 1', '{"format": 9')
    path.write_text(text)
    outcomes = run(tiny, out, make_sweep(tiny))
    assert [outcome.status for outcome in outcomes] == ["done", "done", "failed"]
    assert "of another version of these files" in outcomes[2].reason
    assert path.read_text() == text


def test_what_a_file_says(whole, tiny):
    (path,) = [p for p in (whole / "cells").iterdir() if b'"oracle"' in p.read_bytes()]
    header = json.loads(path.read_text().partition("\n")[0])
    assert header["key"] == path.stem
    assert header["labels"]["model"] == str(tiny.workdir)
    assert header["step"] == 7 and header["data_kind"] == "sample"
    assert header["coverage"] == {"users": 4, "attempted": 12, "scored": 12, "left_out": {}}
    assert str(tiny.workdir) not in json.dumps(header["identity"])
    assert records.make_key(header["identity"]) == path.stem


def test_an_export_of_ours_reads_as_the_run_does(tiny, tmp_path):
    """Whatever is said before a summary to base models."""
    folder = tmp_path / "generator"
    command("export").export_role(tiny.workdir, "generator", folder)
    plan = make_sweep(tiny, conditions=("oracle",), generators=("trained", str(folder)))
    outcomes = run(tiny, tmp_path / "out", plan, answer_instruction="What is known:")
    own, exported = read_records(outcomes, str(tmp_path / "out"))
    assert own.header["identity"]["instruction"] == exported.header["identity"]["instruction"]
    for name in ("chosen", "rejected", "context_tokens"):
        ours, theirs = ([item[name] for item in found.items] for found in (own, exported))
        assert ours == pytest.approx(theirs, abs=1e-5)
