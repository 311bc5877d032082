"""What the targets run, and that a failed installation is not taken for a good one."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(
    *args: str, cwd: pathlib.Path = ROOT, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs make without the environment of this process that could change it; pip may not use the
    network."""
    env = {
        "PATH": path or os.environ["PATH"],
        "HOME": str(cwd),
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": os.devnull,
    }
    return subprocess.run(
        ["make", "--no-print-directory", *args], cwd=cwd, env=env, capture_output=True, text=True
    )


def command(*args: str) -> str:
    """The last line that a target would run, the environment taken as installed."""
    done = make("-n", "-o", ".venv/.installed-cpu", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["train"], "popi_jax.train --config=prism --config.workdir='work/prism' "),
        (
            [
                "train",
                "CONFIG=configs/smoke.py",
                "MODEL=small",
                "SCHEDULE=short",
                "ARGS=--config.seed=3",
            ],
            "popi_jax.train --config=configs/smoke.py:model=small,schedule=short"
            " --config.workdir='work/smoke' --config.seed=3",
        ),
        (
            ["train", "SCALE=v5e-8", "WORKDIR=gs://b/r"],
            "popi_jax.train --config=prism:scale=v5e-8 --config.workdir='gs://b/r' ",
        ),
        (
            ["data", "CONFIG=jsonl"],
            "popi_jax.prepare --config=jsonl --config.workdir='work/jsonl' ",
        ),
        (["eval"], "popi_jax.evaluate --config=prism --config.workdir='work/prism' "),
        (
            ["summarize", "ARGS=--users=a"],
            "popi_jax.summarize --config=prism --config.workdir='work/prism' --users=a",
        ),
        (["generate"], "popi_jax.generate --config=prism --config.workdir='work/prism' "),
        (["export"], "popi_jax.export --config=prism --config.workdir='work/prism' "),
        (
            ["print-config"],
            "popi_jax.train --config=prism --config.workdir='work/prism'  --print_config",
        ),
        (["test"], "pytest -q -n 2 --dist loadfile --no-loadscope-reorder "),
        (["bench", "ARGS=--rounds=3"], "benchmarks.bench --rounds=3"),
        (["bench-compare", "BASE=v1"], "benchmarks.compare --base='v1' "),
        (["bench-growth"], "benchmarks.growth "),
        (["bench-restart"], "benchmarks.restart "),
        (["profile"], "benchmarks.profile --program='popi/fused_update' "),
    ],
)
def test_targets_run_plain_commands(args: list[str], line: str) -> None:
    assert command(*args) == f".venv/bin/python -m {line}"


def test_variables_of_the_environment_do_not_leak_in() -> None:
    done = subprocess.run(
        ["make", "-n", "-o", ".venv/.installed-cpu", "train"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "CONFIG": "other", "MODEL": "other"},
        capture_output=True,
        text=True,
    )
    assert "--config=prism " in done.stdout


def test_help_is_the_default_and_names_every_target_and_variable() -> None:
    text = make().stdout
    targets = "setup data train eval summarize generate export print-config lint test test-slow"
    targets += " golden clean bench bench-compare bench-growth bench-restart profile"
    for word in targets.split():
        assert f"make {word} " in text
    for word in "CONFIG MODEL SCALE SCHEDULE WORKDIR ARGS ACCEL BASE PROGRAM PYTHON".split():
        assert f"  {word} " in text


def test_unknown_accelerator_is_refused() -> None:
    done = make("setup", "ACCEL=gpu")
    assert done.returncode != 0 and 'ACCEL = "gpu": must be one of cpu, cuda13, tpu' in done.stderr


@pytest.fixture
def project(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of what installing needs, whose lock asks for nothing."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "make_venv.sh", tmp_path / "launch")
    (tmp_path / "requirements.lock").write_text("# nothing\n")
    return tmp_path


def test_installs_once_again_after_a_change_and_leaves_no_stamp_when_it_fails(
    project: pathlib.Path,
) -> None:
    stamp, lock = project / ".venv" / ".installed-cpu", project / "requirements.lock"
    python = f"PYTHON={sys.executable}"
    assert make("setup", python, cwd=project).returncode == 0
    assert stamp.exists()
    assert "Nothing to be done" in make("setup", python, cwd=project).stdout
    lock.write_text("no-such-package==1\n")
    os.utime(lock, (stamp.stat().st_mtime + 10,) * 2)
    failed = make("setup", python, cwd=project)
    assert (
        failed.returncode != 0
        and "error: installing failed" in failed.stderr
        and "no-such-package" in failed.stderr
    )
    assert not stamp.exists()


def test_old_python_is_refused_in_one_line(project: pathlib.Path) -> None:
    old = project / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make("setup", f"PYTHON={old}", cwd=project)
    assert done.returncode != 0
    assert done.stderr.startswith(f"error: no Python of at least 3.11 among: {old}; name one:")
    assert not (project / ".venv").exists()


def test_broken_newest_python_is_passed_over(project: pathlib.Path) -> None:
    folder = project / "bin"
    folder.mkdir()
    for name, text in (("python3.12", "exit 1"), ("python3.11", f'exec {sys.executable} "$@"')):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    done = make("setup", cwd=project, path=f"{folder}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert (project / ".venv" / ".installed-cpu").exists()


def test_lock_has_exact_versions_of_everything_required() -> None:
    lines = [
        line
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if not line.startswith("#")
    ]
    locked = dict(line.split("==") for line in lines)
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name = line.split(">")[0].strip().lower()
            assert name in locked
            low, _, high = line[len(name) :].removeprefix(">=").partition(",<")
            version = [int(part) for part in locked[name].split(".")]
            assert version >= [int(part) for part in low.split(".")]
            assert not high or version < [int(part) for part in high.split(".")]
    assert (locked["jax"], locked["flax"]) == ("0.10.2", "0.12.8"), "they move as a pair"
    assert not {"torch", "transformers", "tensorflow"} & set(locked)
