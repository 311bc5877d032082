import json
import math
from pathlib import Path

import pytest

from popi_jax.evals import render, results
from popi_jax.evals.records import CellRecord

ROW = {
    "condition": "summary",
    "decoding": "greedy",
    "accuracy": 0.75,
    "stderr": 0.0125,
    "n": 4336,
    "nats": 0.5,
}
RESULTS = {
    "config": {"name": "prism"},
    "data": "sample",
    "split": "test",
    "step": 750,
    "bayes": {"no_signals": 0.613, "signals": 0.876, "latent": 0.931, "best_list": 0.87},
    "rows": [ROW | {"context_tokens": 13.72}],
    "before_rl": {
        "oracle": ROW
        | {"decoding": "none", "accuracy": 0.93, "stderr": None, "context_tokens": 5.0}
    },
    "loss": {
        "summary": {
            "nats": {"value": 0.5, "stderr": 0.01},
            "noise": {"value": 0.269, "stderr": 0.0},
            "chance": {"value": -0.0001, "stderr": 0.001},
            "bits": {"value": 0.25, "stderr": None},
            "gap_recovered": {"value": 0.8, "stderr": 0.02},
        },
        "other_user_summary": {"nats": {"value": 0.7, "stderr": 0.02}},
    },
    "names": {"summary_before_rl": {"repeats": {"value": 0.125, "stderr": 0.5}}, "summary": {}},
    "examples": [
        {"user_id": "u1", "summary": "warm tone ;\nbullets", "truth": "warm tone"},
        {"user_id": "u2", "summary": "", "truth": ""},
    ],
}


def test_what_a_reader_sees():
    assert (
        render.render(RESULTS)
        == f"""\
# prism: test users at step 750

**{render.MADE_DATA}**

| condition                   | decoding |      accuracy | pairs | nats per pair | context tokens |
| --------------------------- | -------- | ------------: | ----: | ------------: | -------------: |
| summary                     | greedy   | 0.750 ± 0.013 |  4336 |         0.500 |           13.7 |
| oracle, generator before RL | none     |         0.930 |  4336 |         0.500 |            5.0 |

Best accuracy that any model could reach: 0.613 seeing nothing of the user, 0.876 seeing all \
signals, 0.870 reading the best list as long as the truth, 0.931 knowing the true preferences.

Accuracy ± standard error, clustered by user.

## Where the loss goes

| nats per pair, greedy                      | after         | another user's |
| ------------------------------------------ | ------------- | -------------: |
| measured                                   | 0.500 ± 0.010 |  0.700 ± 0.020 |
| of it: random even for who knows the truth | 0.269 ± 0.000 |              – |
| chance of the labels                       | 0.000 ± 0.001 |              – |
| bits gained over no_signals                | 0.250         |              – |
| gap recovered (accuracy, to the oracle)    | 0.800 ± 0.020 |              – |

## What summaries name

| greedy              | before RL     | after |
| ------------------- | ------------- | ----: |
| repeats per summary | 0.125 ± 0.500 |     – |

- u1: warm tone ; bullets
  (truth: warm tone)
- u2: (empty)
  (truth: unknown)
"""
    )


def test_made_data_are_called_made_and_real_data_are_not():
    assert "MADE SAMPLE DATA" in render.render(RESULTS).splitlines()[2]
    unknown = dict.fromkeys(RESULTS["bayes"])
    text = render.render(RESULTS | {"data": "published", "bayes": unknown})
    assert "SAMPLE" not in text
    assert "Best accuracy" not in text


def write(workdir: Path, step: int, split: str = "test") -> None:
    found = RESULTS | {"step": step, "split": split}
    render.write_results(str(workdir), found, [{"user_id": "u1", "summary": f"é{step}"}])


def read_step(path: Path) -> int:
    return json.loads(path.read_text())["step"]


def test_each_step_is_kept_and_the_newest_is_shown(tmp_path):
    for step in (5, 7):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    write(tmp_path, 5)
    write(tmp_path, 7)
    assert read_step(tmp_path / "results.json") == 7
    write(tmp_path, 5)  # an older one again
    write(tmp_path, 5, "validation")
    assert read_step(tmp_path / "results.json") == 7
    assert "at step 7" in (tmp_path / "results.md").read_text()
    assert "é7" in (tmp_path / "summaries.jsonl").read_text(encoding="utf-8")
    assert read_step(tmp_path / "results_validation.json") == 5
    for name, step in (("test-5", 5), ("test-7", 7), ("validation-5", 5)):
        folder = tmp_path / "results" / name
        assert sorted(p.name for p in folder.iterdir()) == [
            "results.json",
            "results.md",
            "summaries.jsonl",
        ]
        assert read_step(folder / "results.json") == step
        assert f"at step {step}" in (folder / "results.md").read_text()
        assert f"é{step}" in (folder / "summaries.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("left", ['{"step": 700}', "{}", "[1"])
def test_results_of_a_run_that_is_gone_are_replaced(tmp_path, left):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "results.json").write_text(left)
    write(tmp_path, 5)
    assert read_step(tmp_path / "results.json") == 5


def test_an_unknown_error_is_null_in_json():
    """That of a single user."""
    labels = {"condition": "summary", "decoding": "greedy", "generator": "trained"}
    items = [{"user": "a", "margin": margin, "context_tokens": 3} for margin in (1.0, 1.0, -1.0)]
    before = labels | {"condition": "oracle", "generator": "before_rl"}
    found = [CellRecord({"labels": each}, items) for each in (labels, before)]
    nats = pytest.approx((2 * math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 3)
    row = {"decoding": "greedy", "accuracy": pytest.approx(2 / 3), "stderr": None, "n": 3}
    row |= {"nats": nats, "context_tokens": 3.0}
    assert results._list_results(found) == {
        "rows": [{"condition": "summary"} | row],
        "before_rl": {"oracle": row},
    }
