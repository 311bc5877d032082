"""What each starter would run, that shell scripts are sound, that GKE's file fits the APIs of
Kubernetes and JobSet."""

import copy
import os
import pathlib
import shlex
import subprocess
import sys
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), ROOT / ".ci" / "run"]
QUOTED = "ARGS=--config.seed=3 --config.name='a b' \\ \"c\" $(x)"  # must arrive as it is
GKE = ("run1", "tpu-v6e-slice", "4x4", "2", "registry/image", "gs://bucket/")


def start(
    script: str, *args: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], **(env or {})}
    return subprocess.run([LAUNCH / script, *args], env=env, capture_output=True, text=True)


def printed(script: str, *args: str, env: dict[str, str] | None = None) -> list[str]:
    done = start(script, "--dry-run", *args, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return shlex.split(done.stdout)


def jobset(*args: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    done = start("gke.sh", "--dry-run", *args, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return yaml.safe_load(done.stdout)


def check_jobset(document: dict[str, Any]) -> None:
    """Raises when a field has a wrong type, is missing or unknown: the models leave out what they
    do not know."""
    assert JobsetV1alpha2JobSet.from_dict(document).to_dict() == document


def test_pod_gets_one_command_for_all_hosts() -> None:
    words = printed("tpu_pod.sh", "slice", "us-east5-a", "make", "train", QUOTED)
    assert words[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice", "--zone=us-east5-a"]
    assert words[7] == "--worker=all"
    remote = words[8].removeprefix("--command=")
    assert shlex.split(remote) == [*"cd popi_jax && make train".split(), QUOTED]
    assert len(words) == 9


def test_environment_is_passed_on_to_the_pod() -> None:
    env = {"PROJECT": "p", "REPO": "my code", "XLA_FLAGS": "--a --b", "LIBTPU_INIT_ARGS": "$(x)"}
    env |= {"HF_HOME": "/mnt/hf", "HF_TOKEN": "secret"}
    words = printed("tpu_pod.sh", "s", "z", "true", env=env)
    assert words[-1] == "--project=p"
    remote = shlex.split(words[-2].removeprefix("--command="))
    given = ["XLA_FLAGS=--a --b", "LIBTPU_INIT_ARGS=$(x)", "HF_HOME=/mnt/hf"]
    assert remote == ["cd", "my code", "&&", *given, "true"]


def test_slurm_starts_one_process_per_node() -> None:
    words = printed("slurm.sh", "make", "train", QUOTED)
    assert words[0] == "srun" and words[-3:] == ["make", "train", QUOTED]
    assert {"--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= set(words[1:-3])
    options = [
        line
        for line in (LAUNCH / "slurm.sh").read_text().splitlines()
        if line.startswith("#SBATCH ")
    ]
    assert "#SBATCH --requeue" in options and "#SBATCH --ntasks-per-node=1" in options


def test_gpu_node_starts_the_command_without_traces_of_a_launcher() -> None:
    words = printed("gpu_node.sh", "make", "train", QUOTED)
    assert words[0] == "env" and words[-3:] == ["make", "train", QUOTED]
    env = {
        "JAX_COORDINATOR_ADDRESS": "host:1",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "OMPI_COMM_WORLD_SIZE": "2",
        "KEPT": "1",
    }
    done = start("gpu_node.sh", "env", env=env)
    assert "KEPT=1" in done.stdout and not any(f"{name}=" in done.stdout for name in list(env)[:3])


def test_xpk_submits_a_workload() -> None:
    words = printed(
        "xpk.sh",
        "run1",
        "cluster",
        "v6e-16",
        "2",
        "image",
        "make",
        "train",
        QUOTED,
        env={"ZONE": "z"},
    )
    assert words[:3] == ["xpk", "workload", "create"]
    options = dict(word[2:].split("=", 1) for word in words[3:] if "=" in word)
    assert (
        options
        | {"workload": "run1", "tpu-type": "v6e-16", "num-slices": "2", "max-restarts": "50"}
        == options
    )
    assert shlex.split(options["command"]) == ["make", "train", QUOTED]
    assert (options["zone"], options["docker-image"]) == ("z", "image") and "project" not in options


def test_gke_fills_in_the_jobset() -> None:
    document = jobset(*GKE, "make", "train", QUOTED, env={"RESTARTS": "7"})
    check_jobset(document)
    assert document["spec"]["failurePolicy"] == {"maxRestarts": 7}
    (job,) = document["spec"]["replicatedJobs"]
    hosts = job["template"]["spec"]
    assert (job["replicas"], hosts["parallelism"], hosts["completions"], hosts["backoffLimit"]) == (
        2,
        4,
        4,
        0,
    )
    pod = hosts["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    (container,) = pod["containers"]
    assert container["command"] == ["make", "train", QUOTED, "WORKDIR=gs://bucket/run1"]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert {"name": "JAX_COMPILATION_CACHE_DIR", "value": "gs://bucket/compiled"} in container[
        "env"
    ]
    assert "@" not in yaml.safe_dump(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.failurePolicy.maxRestart", 3),
        ("spec.failurePolicy.maxRestarts", "3"),
        ("spec.replicatedJobs.0.replica", 2),
        ("spec.replicatedJobs.0.replicas", "two"),
        ("spec.replicatedJobs.0.template.spec.paralelism", 4),
        ("spec.replicatedJobs.0.template.spec.template.spec.nodeSelectors", {"a": "b"}),
        ("spec.replicatedJobs.0.template.spec.template.spec.containers.0.env.0.value", 900),
    ],
)
def test_the_check_finds_misspelt_and_mistyped_fields(path: str, value: Any) -> None:
    document = copy.deepcopy(jobset(*GKE, "true"))
    node: Any = document
    *folders, last = path.split(".")
    for name in folders:
        node = node[int(name) if name.isdigit() else name]
    node[last] = value
    with pytest.raises((ValueError, AssertionError)):
        check_jobset(document)


@pytest.mark.parametrize(("position", "value"), [(2, "4x"), (2, "3x3"), (3, "two")])
def test_gke_refuses_what_is_no_number(position: int, value: str) -> None:
    args = [value if i == position else arg for i, arg in enumerate(GKE)]
    done = start("gke.sh", "--dry-run", *args, "true")
    assert (done.returncode, done.stdout) == (2, "") and value in done.stderr


@pytest.mark.parametrize(
    ("script", "usage"),
    [
        ("tpu_pod.sh", "NAME ZONE COMMAND..."),
        ("slurm.sh", "COMMAND..."),
        ("gpu_node.sh", "COMMAND..."),
        ("xpk.sh", "NAME CLUSTER TYPE SLICES IMAGE COMMAND..."),
        ("gke.sh", "NAME ACCELERATOR TOPOLOGY SLICES IMAGE BUCKET COMMAND..."),
    ],
)
def test_without_a_command_it_says_how(script: str, usage: str) -> None:
    done = start(script, "--dry-run")
    assert done.returncode == 2 and f"launch/{script} [--dry-run] {usage}" in done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_and_stop_at_the_first_error(path: pathlib.Path) -> None:
    assert os.access(path, os.X_OK)
    assert "\nset -euo pipefail\n" in path.read_text()


def test_shellcheck() -> None:
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
