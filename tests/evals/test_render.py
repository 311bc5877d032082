import os
from pathlib import Path

import pytest
from etils import epath

from popi_jax.evals import render
from popi_jax.evals.cells import Row

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
    "bayes": {"no_signals": 0.613, "signals": 0.876, "latent": 0.931},
    "rows": [ROW | {"context_tokens": 13.72}],
    "before_rl": {
        "oracle": ROW
        | {"decoding": "none", "accuracy": 0.93, "stderr": None, "context_tokens": 5.0}
    },
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

Best accuracy that any model could reach: 0.613 seeing nothing of the user, 0.876 seeing all signals, 0.931 \
knowing the true preferences.

Accuracy ± standard error, clustered by user.

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


def test_a_file_is_whole_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "rows.jsonl"
    render.write_jsonl(path, [{"a": "é"}, {"a": 2}])
    assert path.read_text(encoding="utf-8") == '{"a": "é"}\n{"a": 2}\n'

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        render.write_text(path, "new")
    assert path.read_text(encoding="utf-8") == '{"a": "é"}\n{"a": 2}\n'


def test_files_in_a_bucket(bucket: str) -> None:
    render.write_jsonl(f"{bucket}/run/rows.jsonl", [{"a": "é"}])
    render.write_jsonl(f"{bucket}/run/rows.jsonl", [{"a": 2}])
    (file,) = epath.Path(f"{bucket}/run").iterdir()
    assert (file.name, file.read_text()) == ("rows.jsonl", '{"a": 2}\n')


def test_an_unknown_error_is_null_in_json():
    row = Row("summary", "greedy", 0.5, float("nan"), 8, 0.7, 3.0)
    assert render._as_json(render.Evaluation([row], {"oracle": row}, None)) == {
        "rows": [row._asdict() | {"stderr": None}],
        "before_rl": {"oracle": {"decoding": "greedy", "accuracy": 0.5, "stderr": None, "n": 8}
        | {"nats": 0.7, "context_tokens": 3.0}},
    }  # fmt: skip
