import json

import jax
import numpy as np
import pytest

from popi_jax import finished_run
from popi_jax.data.sources.made_people import compute_bayes_optimum
from popi_jax.errors import UserError
from popi_jax.evals.render import evaluate_run
from tests.tiny_run import (
    STEP,
    Run,
    command,
    config_of,
    flags_set,
    on_devices,
    read_jsonl,
    shared_run,
)

evaluate = command("evaluate")


@pytest.fixture(autouse=True)
def restored():
    with on_devices(1):
        yield


@pytest.fixture
def run() -> Run:
    return shared_run(1)


def test_results_of_the_test_users(run, capsys):
    config = config_of(run.workdir, "--config.evaluation.max_users=8")
    with flags_set():
        evaluate.main(config)
    results = json.loads((run.workdir / "results.json").read_text())
    users = run.built.dataset.splits["test"][:8]
    assert list(results)[:6] == ["config", "data", "split", "step", "bayes", "rows"]
    assert (results["data"], results["split"], results["step"]) == ("sample", "test", STEP)
    assert results["config"]["evaluation"]["max_users"] == 8
    assert results["bayes"] == compute_bayes_optimum(users)
    assert len(results["rows"]) == 9
    assert set(results["before_rl"]) == {"oracle"}
    rows = read_jsonl(run.workdir / "summaries.jsonl")
    assert [row["user_id"] for row in rows] == [user.user_id for user in users]
    greedy = [
        row
        for row in results["rows"]
        if (row["condition"], row["decoding"]) == ("summary", "greedy")
    ]
    assert greedy[0]["context_tokens"] == pytest.approx(np.mean([row["tokens"] for row in rows]))
    assert [e["truth"] for e in results["examples"]] == [user.oracle for user in users[:3]]
    printed = capsys.readouterr().out
    assert printed == (run.workdir / "results.md").read_text()
    assert "MADE SAMPLE DATA" in printed

    (run.workdir / "results.json").write_text("{}")
    with flags_set("--split=validation"):
        evaluate.main(config)
    assert (run.workdir / "results.json").read_text() == "{}"
    results = json.loads((run.workdir / "results_validation.json").read_text())
    assert results["split"] == "validation"
    users = list(run.built.dataset.splits["validation"])
    rows = read_jsonl(run.workdir / "summaries_validation.jsonl")
    assert [row["user_id"] for row in rows] == [user.user_id for user in users][:8]


def test_both_roles_and_the_reference_come_back(run):
    built = finished_run.open_run(config_of(run.workdir))
    restored = finished_run.restore_run(built)
    assert restored.step == STEP
    jax.tree.map(np.testing.assert_array_equal, restored.inference, run.now.inference.params)
    jax.tree.map(np.testing.assert_array_equal, restored.generator, run.now.generator.params)
    jax.tree.map(np.testing.assert_array_equal, restored.frozen, run.frozen)


def test_a_folder_without_a_run_stays_empty(tmp_path):
    with pytest.raises(UserError, match=r"no run in .*train first"):
        finished_run.open_run(config_of(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_other_settings_and_other_data_are_refused(run):
    with pytest.raises(UserError, match=r"model.num_layers was 2, is 3"):
        finished_run.open_run(config_of(run.workdir, "--config.model.num_layers=3"))
    config = config_of(run.workdir)
    stored = run.workdir / "checkpoints" / str(STEP) / "config" / "metadata"
    before = stored.read_text()
    try:
        stored.write_text(
            json.dumps(json.loads(before) | {"dataset": {"data": "published", "prepared": "other"}})
        )
        with pytest.raises(UserError, match=r'dataset.data was "published", is "sample"'):
            finished_run.open_run(config)
    finally:
        stored.write_text(before)


def test_a_run_in_its_warm_up_has_nothing_to_compare_with(run, tmp_path):
    built = run.built._replace(config=config_of(tmp_path))
    with pytest.raises(UserError, match="still in its warm-up"):
        finished_run.restore_run(built)


def test_roles_of_different_steps_are_not_mixed(run, monkeypatch):
    steps = {"inference": 7, "generator": 5}
    monkeypatch.setattr(finished_run, "_restore_role", lambda built, role, base: (steps[role], {}))
    with pytest.raises(UserError, match="of step 7, of the other 5"):
        finished_run.restore_run(run.built)


def test_an_empty_split_is_told(run):
    built = run.built._replace(dataset=run.built.dataset._replace(splits={"test": ()}))
    with pytest.raises(UserError, match="data.test_fraction: the test split holds no user"):
        evaluate_run(built, step=1, inference={}, generator={}, frozen=run.frozen)
