import subprocess
from types import SimpleNamespace

import pytest

from popi_jax.errors import UserError
from popi_jax.evals import comparison
from popi_jax.evals.records import CellRecord
from tests.tiny_run import command, config_of, flags_set

compare = command("compare")


def make_record(right: float, user: str = "u{}", tokens: int = 0) -> CellRecord:
    """40 people of two pairs, of whose first pairs a part is right."""
    items = []
    for number in range(40):
        for pair in range(2):
            margin = 1.0 if pair == 0 and number < 40 * right else -1.0
            items.append(
                {"user": user.format(number), "person": f"u{number}", "pair": f"{number}-{pair}"}
                | {"chosen": margin, "rejected": 0.0, "margin": margin, "groups": {}}
                | {"reference_chosen": None, "reference_rejected": None}
                | {"chosen_len": 3, "rejected_len": 3, "context_tokens": tokens}
                | {"signal_tokens": 90}
            )
    return CellRecord({}, items)


def test_rows_are_compared_on_the_same_pairs():
    found = {
        comparison.POPULATION: make_record(0.5),
        "POPI, prompt-aware summaries": make_record(1.0, "u{}#pair1", 7),
        comparison.POPI: make_record(0.75, tokens=6),
    }
    text = comparison.render(found, made=True)
    assert text.startswith("# A run and its baselines\n\n**MADE SAMPLE DATA")
    table = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert rows[0][:4] == ["row", "accuracy", "to population DPO", "to POPI"]
    assert [row[0] for row in rows[2:]] == list(found)
    assert rows[2][1].startswith(".250 [") and rows[2][2] == "–"
    assert rows[2][3].startswith("-.125 [")
    assert rows[3][1].startswith(".500 [") and rows[3][3].startswith(".125 [")
    assert rows[4][2].startswith(".125 [") and rows[4][3] == "–"
    assert rows[4][-2:] == ["6.0", "80"]
    assert "SAMPLE" not in comparison.render(found, made=False)


def test_every_row_that_is_trained_has_a_line():
    rows = {line.row for line in comparison.LINES}
    assert rows == set(compare.TRAINED)
    assert set(comparison.PUBLISHED) == set(compare.FITTED)
    told = [line.told for line in comparison.LINES]
    assert comparison.POPI in told and comparison.POPULATION in told


def test_rows_are_trained_by_the_command_for_training(tmp_path, monkeypatch):
    asked = []

    def run(given: list[str], check: bool) -> SimpleNamespace:
        asked.append(given)
        return SimpleNamespace(returncode=int(len(asked) == 3))

    monkeypatch.setattr(subprocess, "run", run)
    arguments = ["--config=smoke:scale=laptop,schedule=short", "--config.seed=3", "--rows=popi"]
    monkeypatch.setattr("sys.argv", ["compare", *arguments, f"--config.workdir={tmp_path}"])
    with flags_set("--config=smoke:scale=laptop,schedule=short"):
        compare._train("popi", str(tmp_path), "")
        compare._train("raw_context", str(tmp_path / "x"), "work/run")
        with pytest.raises(UserError, match="row population: its training ended with status 1"):
            compare._train("population", str(tmp_path / "y"), "work/run")
    own = ["--config=smoke:scale=laptop,schedule=short", "--config.seed=3"]
    assert asked[0][3:] == [*own, f"--config.workdir={tmp_path}", "--noevaluate"]
    assert asked[1][3] == "--config=smoke:scale=laptop,schedule=raw_context"
    there = f"--config.workdir={tmp_path / 'x'}"
    assert asked[1][-3:] == [there, "--noevaluate", "--warm_start=work/run"]


def test_an_unknown_row_is_told(tmp_path):
    told = r'--rows has "rawcontext": must be some of popi, .*Did you mean "raw_context"'
    with flags_set("--rows=popi,rawcontext"), pytest.raises(UserError, match=told):
        compare.main(config_of(tmp_path))
