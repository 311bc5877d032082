import dataclasses
import json

import jax
import numpy as np
import pytest

from popi_jax.data.sources.made_odds import find_odds, write_best_list
from popi_jax.diagnostics.decomposition import count_mentions, expect_accuracy, find_optimum
from popi_jax.errors import UserError
from popi_jax.evals import results as evaluation
from popi_jax.evals.results import evaluate_run
from popi_jax.evals.sweep import Outcome
from popi_jax.run import open_run
from popi_jax.training import restore
from tests.tiny_run import (
    STEP,
    TinyRun,
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
def tiny() -> TinyRun:
    return shared_run(1)


def test_results_of_the_test_users(tiny, capsys):
    config = config_of(tiny.workdir, "--config.evaluation.max_users=8")
    with flags_set():
        evaluate.main(config)
    results = json.loads((tiny.workdir / "results.json").read_text())
    users = tiny.run.dataset.splits["test"][:8]
    assert list(results)[:6] == ["config", "data", "split", "step", "bayes", "rows"]
    assert (results["data"], results["split"], results["step"]) == ("sample", "test", STEP)
    assert results["config"]["evaluation"]["max_users"] == 8
    odds = [found for user in users for found in find_odds(user)]
    lists = [write_best_list(user) for user in users for _ in user.pairs]
    told = np.array([count_mentions(z, pair) for z, pair in zip(lists, odds, strict=True)])
    best = expect_accuracy(np.array([pair.signals for pair in odds]), told)
    assert results["bayes"] == find_optimum(odds) | {"best_list": best}
    assert len(results["rows"]) == 9
    assert set(results["before_rl"]) == {"oracle"}
    rows = read_jsonl(tiny.workdir / "summaries.jsonl")
    assert [row["user_id"] for row in rows] == [user.user_id for user in users]
    greedy = [
        row
        for row in results["rows"]
        if (row["condition"], row["decoding"]) == ("summary", "greedy")
    ]
    assert greedy[0]["context_tokens"] == pytest.approx(np.mean([row["tokens"] for row in rows]))
    assert results["loss"]["summary"]["nats"]["value"] == pytest.approx(greedy[0]["nats"])
    names = results["names"]
    assert list(names) == ["summary_before_rl", "summary", "best_list"]
    assert "precision" in names["summary"]
    assert [e["truth"] for e in results["examples"]] == [user.oracle for user in users[:3]]
    printed = capsys.readouterr().out
    assert printed == (tiny.workdir / "results.md").read_text()
    assert "MADE SAMPLE DATA" in printed

    (tiny.workdir / "results.json").write_text("{}")
    with flags_set("--split=validation"):
        evaluate.main(config)
    assert (tiny.workdir / "results.json").read_text() == "{}"
    results = json.loads((tiny.workdir / "results_validation.json").read_text())
    assert results["split"] == "validation"
    users = list(tiny.run.dataset.splits["validation"])
    rows = read_jsonl(tiny.workdir / "summaries_validation.jsonl")
    assert [row["user_id"] for row in rows] == [user.user_id for user in users][:8]


def test_both_roles_and_the_reference_come_back(tiny):
    opened = open_run(config_of(tiny.workdir), must_exist=True)
    restored = restore.restore_run(opened)
    assert restored.step == STEP
    jax.tree.map(np.testing.assert_array_equal, restored.inference, tiny.now.inference.params)
    jax.tree.map(np.testing.assert_array_equal, restored.generator, tiny.now.generator.params)
    jax.tree.map(np.testing.assert_array_equal, restored.frozen, tiny.frozen)


def test_a_folder_without_a_run_stays_empty(tmp_path):
    with pytest.raises(UserError, match=r"no run in .*train first"):
        open_run(config_of(tmp_path / "none"), must_exist=True)
    assert not (tmp_path / "none").exists()


def test_other_settings_and_other_data_are_refused(tiny):
    with pytest.raises(UserError, match=r"model.num_layers was 2, is 3"):
        open_run(config_of(tiny.workdir, "--config.model.num_layers=3"))
    config = config_of(tiny.workdir)
    stored = tiny.workdir / "checkpoints" / str(STEP) / "config" / "metadata"
    before = stored.read_text()
    try:
        fields = json.loads(before)
        fields["dataset"] |= {"data": "published", "prepared": "other"}
        stored.write_text(json.dumps(fields))
        with pytest.raises(UserError, match=r'dataset.data was "published", is "sample"'):
            open_run(config)
    finally:
        stored.write_text(before)


def test_a_run_in_its_warm_up_has_nothing_to_compare_with(tiny, tmp_path):
    data = tiny.run.config.data  # with the fitted lengths
    config = dataclasses.replace(config_of(tmp_path), data=data)
    with pytest.raises(UserError, match="still in its warm-up"):
        restore.restore_run(tiny.run._replace(config=config))


def test_roles_of_different_steps_are_not_mixed(tiny, monkeypatch):
    steps = {"inference": 7, "generator": 5}
    monkeypatch.setattr(restore, "_restore_whole", lambda run, role, *rest: (steps[role], {}))
    with pytest.raises(UserError, match="of step 7, of the other 5"):
        restore.restore_run(tiny.run)


def test_an_absent_step_is_told_by_each_reader(tiny):
    """And one that is there is taken."""
    config, told = config_of(tiny.workdir), rf"--step=9: not in .*that are there: {STEP}$"
    opened = open_run(config, must_exist=True)
    for read in (
        restore.restore_run,
        lambda run, step: restore.restore_role(run, "generator", step),
    ):
        assert read(opened, STEP)[0] == STEP
        with pytest.raises(UserError, match=told):
            read(opened, 9)
    with flags_set("--step=9"), pytest.raises(UserError, match=told):
        evaluate.main(config)


def test_an_empty_split_is_told(tiny):
    empty = tiny.run._replace(dataset=tiny.run.dataset._replace(splits={"test": ()}))
    with pytest.raises(UserError, match="data.test_fraction: the test split holds no user"):
        evaluate_run(empty, step=STEP, inference={}, generator={}, frozen=tiny.frozen)


def test_only_process_0_reads_the_files_of_cells(tmp_path, monkeypatch):
    """Another process may come there before the last of them is written."""
    monkeypatch.setattr(evaluation.distributed, "is_main_process", lambda: False)
    monkeypatch.setattr(evaluation.distributed, "tell_all", lambda text: '{"rows": [1]}' + text)
    outcome = Outcome(cell=None, labels={}, key="not-there-yet", status="done")
    explain = {}.update  # not called
    assert evaluation._share_results([outcome], str(tmp_path), explain) == {"rows": [1]}
