"""The command that a TPU slice would get, and that the shell scripts are sound."""

import os
import pathlib
import shlex
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]


def pod(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], **(env or {})}
    return subprocess.run([ROOT / "launch" / "tpu_pod.sh", *args], env=env, capture_output=True, text=True)


def test_dry_run_prints_one_command_for_all_hosts() -> None:
    done = pod("--dry-run", "slice", "us-east5-a", "make", "train", "ARGS=--config.seed=3 --config.name='a b'")
    words = shlex.split(done.stdout)
    assert words[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice", "--zone=us-east5-a"]
    assert words[7] == "--worker=all"
    remote = words[8].removeprefix("--command=")
    assert shlex.split(remote) == [*"cd popi_jax && make train".split(), "ARGS=--config.seed=3 --config.name='a b'"]
    assert len(words) == 9 and done.returncode == 0


def test_environment_is_passed_on() -> None:
    env = {"PROJECT": "p", "REPO": "my code", "XLA_FLAGS": "--a --b", "LIBTPU_INIT_ARGS": "$(x)"}
    words = shlex.split(pod("--dry-run", "s", "z", "true", env=env).stdout)
    assert words[-1] == "--project=p"
    remote = shlex.split(words[-2].removeprefix("--command="))
    assert remote == ["cd", "my code", "&&", "XLA_FLAGS=--a --b", "LIBTPU_INIT_ARGS=$(x)", "true"]


def test_without_a_command_it_says_how() -> None:
    done = pod("slice", "zone")
    assert done.returncode == 2 and "launch/tpu_pod.sh [--dry-run] NAME ZONE COMMAND..." in done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_and_stop_at_the_first_error(path: pathlib.Path) -> None:
    assert os.access(path, os.X_OK)
    assert "\nset -euo pipefail\n" in path.read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    done = subprocess.run(["shellcheck", *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
