"""Plans of updates, what a compiled one needs, and what is said of one that does not fit."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from popi_jax import cli
from popi_jax.config import Config
from popi_jax.errors import UserError
from popi_jax.planning import fits, plan, report, roofline, suggest, target
from popi_jax.sharding import place_batch
from popi_jax.training.loop import open_batches
from popi_jax.training.setup import abstract_state
from tests import tiny_run
from tests.oracles.plain import RULES

ROOT = Path(__file__).parents[2]
TOY = roofline.Chip(
    flops=1e12,
    hbm_bytes=1e9,
    usable_bytes=1e9,
    hbm_bandwidth=1e11,
    links=4,
    link_bandwidth=1e9,
    dcn_bandwidth=1e9,
)


def tiny_config(*overrides: str) -> Config:
    own = [
        "schedule.phases=('generator 2',)",
        "mesh.num_devices=0",
        "mesh.fsdp=4",
        "mesh.tensor=2",
        "batch.pairs=2",
    ]
    own += ["model.embed_dim=64", "data.context_len=64", "data.turn_len=16", "data.answer_len=16"]
    return cli.load_config(
        "smoke:scale=laptop", [f"--config.{field}" for field in (*own, *overrides)]
    )


@pytest.fixture(autouse=True)
def alone():
    """No mesh is left behind, and programs are compiled anew: those of the cache have lost their
    names."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    jax.set_mesh(None)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> target.Target:
    """The simulated devices as chips whose rates are known."""
    monkeypatch.setitem(roofline.CHIPS, "toy", TOY)
    monkeypatch.setattr(fits, "torus_axes", lambda mesh: {})
    return target.Target(jax.devices(), "toy", "8 toys")


def test_a_plan_has_what_a_run_gives_to_its_update() -> None:
    built = tiny_run.shared_run(1).built
    with tiny_run.on_devices(1):
        config = dataclasses.replace(
            built.config, mesh=dataclasses.replace(built.config.mesh, fsdp=1)
        )
        made = plan.make_plan(config, target.Target(jax.devices()[:1], "", "one"))
        batch = place_batch(next(open_batches(built)._main), made.mesh, RULES)
    real = abstract_state(built.model, made.parts.transforms, made.mesh, cfg=built.config)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    layers = lambda tree: shapes(tree.inference.params["layers"])  # noqa: E731
    assert layers(made.state) == layers(real)
    assert shapes(made.users) == shapes(batch)
    assert made.frozen.pairs is not None or made.frozen.generator


def test_memory_time_and_layout_of_a_compiled_update(toy: target.Target) -> None:
    made = plan.make_plan(tiny_config(), toy)
    found = fits.fit(made, toy)
    params = sum(math.prod(x.shape) for x in jax.tree.leaves(made.state.inference.params))
    # float32, in 8 parts but for norms; two moments of the one role that trains
    assert found.memory.state["parameters"] == pytest.approx(2 * params * 4 / 8, rel=0.05)
    assert found.memory.state["optimizer"] == pytest.approx(2 * params * 4 / 8, rel=0.05)
    assert found.memory.arguments == pytest.approx(sum(found.memory.state.values()), rel=0.01)
    (turn,) = found.turns
    assert turn.name == "generator" and turn.seconds is not None
    assert turn.flops == sum(fits.flops_of(made, (False, True)).values()) / 8
    assert {"sampling", "generator_step"} <= set(turn.parts)
    for name in ("compute", "hbm", "interconnect"):
        whole = getattr(turn.seconds, name)
        assert sum(getattr(part, name) for part in turn.parts.values()) == pytest.approx(whole)
    assert turn.seconds.compute == turn.flops / TOY.flops
    assert (
        turn.seconds.hbm
        == turn.traffic.hbm_bytes / TOY.hbm_bandwidth
        > 0
        < turn.seconds.interconnect
    )
    assert len(found.checks) == 3 and all(check.holds for check in found.checks)
    text = report.render(made, found)
    assert (
        "update that trains the generator\n" in text
        and "8 toys: mesh data 1, fsdp 4, tensor 2" in text
    )
    stored = json.loads(json.dumps(report.to_json(made, found)))
    assert stored["turns"]["generator"]["serial_fraction"] == turn.seconds.serial_fraction


def test_arguments_that_are_too_many_are_told_before_compiling(
    toy: target.Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(roofline.CHIPS, "toy", TOY._replace(usable_bytes=1000.0))
    made = plan.make_plan(tiny_config(), toy)
    with pytest.raises(fits.DoesNotFit) as failure:
        fits.fit(made, toy)
    text = report.render_misfit(made, toy.name, failure.value)
    assert "does not fit" in text and text.index("optimizer") < text.index("batch ")


def test_the_suggestion_is_the_cheapest_change_that_is_expected_to_fit(toy: target.Target) -> None:
    config = tiny_config("batch.users=32", "mesh.fsdp=8", "mesh.tensor=1")
    made = plan.make_plan(config, toy)
    needed = suggest.estimated_bytes(made)
    change, smaller, expected = next(
        suggest.first_that_may_fit(config, toy, needed - 1, config.mesh.rules)
    )
    assert change.flags() == "--config.batch.microbatches=2"
    assert expected == suggest.estimated_bytes(smaller) < needed
    assert smaller.config.batch.microbatches == 2
    # adapters come last, and then the state leaves room for them
    last = list(
        suggest.changes(
            dataclasses.replace(config, model=dataclasses.replace(config.model, checkpoint="x")),
            8,
            (),
        )
    )[-1]
    assert (
        last.applied(config).inference.lora.rank == last.applied(config).generator.lora.rank == 16
    )
    # where the state leaves no room, nothing of it helps
    state = sum(plan.state_bytes(made).values())
    assert not list(suggest.first_that_may_fit(config, toy, state / 2, config.mesh.rules))


def test_released_models_need_no_folder() -> None:
    config = cli.load_config("prism:model=llama3-8b,scale=v5p:4x4x4")
    assert plan.planned_model(config).num_layers == 32
    with pytest.raises(
        UserError, match='no such folder, and lama-3.1-8b is no .*Did you mean "llama-3.1-8b"'
    ):
        model = dataclasses.replace(config.model, checkpoint="checkpoints/lama-3.1-8b")
        plan.planned_model(dataclasses.replace(config, model=model))


def run_fit(*args: str, timeout: int = 240) -> tuple[subprocess.CompletedProcess[str], float]:
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))
    }
    began = time.monotonic()
    command = [sys.executable, "-m", "popi_jax.fit", *args]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )
    return done, time.monotonic() - began


needs_compiler = pytest.mark.skipif(
    not target.LIBRARY.exists(),
    reason="libtpu is not installed: make fit does that, on Linux on x86-64",
)


@needs_compiler
def test_the_command_compiles_for_a_tpu_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    mesh = "--config.mesh.fsdp=4", "--config.mesh.tensor=2"
    done, _ = run_fit(
        "--config=smoke:scale=v5e:2x4",
        *mesh,
        "--config.schedule.phases=generator 1",
        f"--report={path}",
    )
    assert done.returncode == 0, done.stderr
    assert (
        "v5e:2x4, 8 chips: mesh data 1, fsdp 4, tensor 2" in done.stdout
        and "FAILED" not in done.stdout
    )
    found = json.loads(path.read_text())
    assert 0 < found["memory"]["total"] < found["available"] == 15.75 * 2**30
    assert set(found["turns"]) == {"generator"}


@needs_compiler
def test_what_does_not_fit_ends_soon_with_a_suggestion() -> None:
    done, seconds = run_fit("--config=prism:model=llama3-8b,scale=v5e:2x2")
    assert done.returncode == 1 and seconds < 30
    assert "does not fit: the update needs" in done.stdout and "SCALE=v5e-" in done.stdout
    assert not done.stderr.count("Traceback")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config=prism:scale=v5q:4x4"], "Or name the topology of a TPU"),
        (
            ["--config=prism:scale=v5p:4x4x4", "--config.mesh.fsdp=3"],
            "config.batch.users = 64: must be a multiple of 12",
        ),
        (["--config=prism:model=lama3-8b"], 'Did you mean "llama3-8b"?'),
    ],
)
def test_bad_input_is_one_line(args: list[str], message: str) -> None:
    done, _ = run_fit(*args)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
