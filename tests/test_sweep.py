import json

import pytest

from popi_jax.errors import UserError
from tests.tiny_run import TinyRun, command, config_of, flags_set, on_devices, shared_run

sweep = command("sweep")


@pytest.fixture(autouse=True)
def restored():
    with on_devices(1):
        yield


@pytest.fixture
def tiny() -> TinyRun:
    return shared_run(1)


def test_tables_of_the_run_in_workdir(tiny, tmp_path, capsys):
    config, out = config_of(tiny.workdir), tmp_path / "out"
    given = ["--max_users=12", "--conditions=no_signals,oracle", f"--out={out}"]
    with flags_set(*given, "--every_eval_ever=us"):
        sweep.main(config)
    printed = capsys.readouterr().out
    assert printed.startswith((out / "table.md").read_text().partition("\n## ")[0])
    assert "MADE SAMPLE DATA" in printed and str(tiny.workdir) in printed
    rows = [json.loads(line) for line in (out / "table.jsonl").read_text().splitlines()]
    assert [row["condition"] for row in rows] == ["no_signals", "oracle"]
    assert {row["n"] for row in rows} == {36} and {row["step"] for row in rows} == {7}
    assert rows[1]["difference_n"] == 36 and rows[0]["difference"] is None
    assert len(list(out.glob("every_eval_ever/**/*.json"))) == 1
    for name in ("groups", "transfer", "summaries"):
        assert (out / f"{name}.md").exists() and (out / f"{name}.csv").exists()


def test_a_failed_cell_is_a_row_and_the_status(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["--max_users=12", "--conditions=no_signals,orakle", f"--out={out}"]
    with flags_set(*given, "--decodings=greedy"), pytest.raises(SystemExit) as exited:
        sweep.main(config_of(tiny.workdir))
    assert exited.value.code == 1
    printed = capsys.readouterr().out
    assert 'failed: unknown condition "orakle"' in printed
    assert printed.endswith("1 of 2 cells failed; the same command tries them again\n")


def test_models_together(tiny, tmp_path, capsys):
    out, two = tmp_path / "out", f"--models={tiny.workdir},{tiny.workdir}@7"
    with flags_set("--max_users=12", "--conditions=oracle", f"--out={out}", two, "--pool"):
        sweep.main(config_of(tiny.workdir))
    assert "all 2 models" in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "table.jsonl").read_text().splitlines()]
    assert sorted((row["model"], row["n"]) for row in rows) == sorted(
        [("all 2 models", 72), (str(tiny.workdir), 36), (str(tiny.workdir), 36)]
    )
    assert len({row["acc"] for row in rows}) == 1
    with flags_set("--pool", f"--out={out}"), pytest.raises(UserError, match="found one model"):
        sweep.main(config_of(tiny.workdir))


def test_a_dry_run_computes_and_writes_nothing(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    with flags_set("--dry_run", "--conditions=no_signals,raw_signals", f"--out={out}"):
        sweep.main(config_of(tiny.workdir))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["todo", "todo"]
    assert not (out / "cells").exists()


def test_home_folders_are_known_in_lists(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny.workdir.parent))
    models = f"--models=~/{tiny.workdir.name}@7,hf:~/base"
    out = tmp_path / "out"
    given = ["--dry_run", models, "--conditions=no_signals", f"--out={out}"]
    with flags_set(*given), pytest.raises(SystemExit):  # there is no such base model
        sweep.main(config_of(tiny.workdir))
    printed = capsys.readouterr().out
    assert f"{tiny.workdir}@7" in printed and f"hf:{tiny.workdir.parent}/base" in printed


def test_a_missing_sweep_file_is_told(tiny):
    told = r'--sweep=configs/sweeps/defalt.py: .*Did you mean "default.py"'
    with flags_set("--sweep=configs/sweeps/defalt.py"), pytest.raises(UserError, match=told):
        sweep.main(config_of(tiny.workdir))
