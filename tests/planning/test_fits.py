"""Plans of updates, what a compiled one needs, and what is said of one that does not fit."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from configs.schedules import SCHEDULES
from popi_jax import cli
from popi_jax.config import Config
from popi_jax.errors import UserError
from popi_jax.flops import count_jaxpr_flops
from popi_jax.models.transformer import TransformerConfig
from popi_jax.planning import fit_report, fits, plan, roofline, suggest, target
from popi_jax.run import open_run
from popi_jax.sharding import place_batch
from popi_jax.training.loop import open_batches
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


SUMMARY_LEN = 18
SMALL = ("data.context_len=64", "data.turn_len=16", "data.answer_len=16")


def tiny_config(*overrides: str) -> Config:
    own = [
        "schedule.phases=('generator 2',)",
        "mesh.num_devices=0",
        "mesh.fsdp=4",
        "mesh.tensor=2",
        "batch.pairs=2",
    ]
    own += ["model.embed_dim=64", *SMALL]
    return cli.load_config(
        "smoke:scale=laptop", [f"--config.{field}" for field in (*own, *overrides)]
    )


@pytest.fixture(scope="module", autouse=True)
def alone():
    """Programs are compiled anew, since those of the cache have lost their names; no mesh is left
    behind."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    jax.set_mesh(None)


@pytest.fixture(scope="module")
def toy() -> Iterator[target.Target]:
    """The simulated devices as chips whose rates are known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(roofline.CHIPS, "toy", TOY)
        patch.setattr(fits, "count_torus_axes", lambda mesh: {})
        yield target.Target(jax.devices(), "toy", "8 toys")


class Compiled(NamedTuple):
    planned: plan.Plan
    program: fits.Program
    found: fits.Fit


@pytest.fixture(scope="module")
def compiled(toy: target.Target) -> Compiled:
    planned = plan.make_plan(tiny_config(), toy)
    program = fits.compile_plan(planned)
    return Compiled(planned, program, fits.read_fit(planned, toy, program))


def test_a_plan_has_what_a_run_gives_to_its_update(tmp_path: Path) -> None:
    config = tiny_run.config_of(tmp_path)
    with tiny_run.on_devices(1):
        run = open_run(config)
        mesh = dataclasses.replace(config.mesh, fsdp=1)
        config = dataclasses.replace(run.config, mesh=mesh)
        made = plan.make_plan(config, target.Target(jax.devices()[:1], "", "one"))
        batches = open_batches(run)
        batches.skip_warmup()
        batch = place_batch(next(batches), made.mesh, RULES)
    model = dataclasses.replace(made.model, vocab_size=run.inference.model.vocab_size)
    assert model == run.inference.model
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(made.users) == shapes(batch)
    assert made.frozen.stored is not None or made.frozen.generator


@pytest.mark.parametrize("row", ["raw_context", "supervised"])
def test_a_baseline_samples_nothing(row: str, toy: target.Target) -> None:
    rows = [f"{name}={value}" for name, value in SCHEDULES[row].items()]
    planned = plan.make_plan(tiny_config(*rows), toy)
    found = fits.read_fit(planned, toy, fits.compile_plan(planned))
    assert all(check.holds for check in found.checks), found.checks
    (turn,) = found.turns
    assert "sampling" not in turn.scopes and found.memory.cache == 0
    assert planned.told_len == (64 if row == "raw_context" else SUMMARY_LEN)
    assert ("1 text x 2 pairs" in fit_report.render(planned, found)) and turn.flops > 0


def test_stored_summaries_are_planned_for(toy: target.Target) -> None:
    """Their updates sample nothing; every device holds the table whole."""
    planned = plan.make_plan(tiny_config("schedule.phases=('stored 2',)"), toy)
    found = fits.read_fit(planned, toy, fits.compile_plan(planned))
    assert all(check.holds for check in found.checks), found.checks
    (turn,) = found.turns
    assert turn.name == "stored" and "sampling" not in turn.scopes and found.memory.cache == 0
    assert found.memory.state["stored summaries"] == plan.USERS * (4 * SUMMARY_LEN + 4 + 1)
    aware = ("data.prompt_aware=true", "batch.pairs=1", "data.num_pairs=3")
    planned = plan.make_plan(tiny_config("schedule.phases=('stored 2',)", *aware), toy)
    assert planned.frozen.summaries.finished.shape == (3 * plan.USERS,)  # of each pair
    both = tiny_config("schedule.phases=('inference 1', 'stored 1', 'generator 1')")
    assert sorted(plan.make_plan(both, toy).turns) == ["generator", "inference", "stored"]


def test_memory_time_and_layout_of_a_compiled_update(compiled: Compiled) -> None:
    planned, found = compiled.planned, compiled.found
    params = sum(math.prod(x.shape) for x in jax.tree.leaves(planned.trained))
    # float32, in 8 parts but for norms; two moments of the one role that trains
    assert found.memory.state["parameters"] == pytest.approx(2 * params * 4 / 8, rel=0.05)
    assert found.memory.state["optimizer"] == pytest.approx(2 * params * 4 / 8, rel=0.05)
    assert found.memory.arguments == pytest.approx(sum(found.memory.state.values()), rel=0.01)
    (turn,) = found.turns
    assert turn.name == "generator" and turn.seconds is not None
    assert turn.flops == count_jaxpr_flops(compiled.program.jaxpr, while_trips=SUMMARY_LEN) / 8
    assert {"sampling", "generator_step"} <= set(turn.scopes)
    for name in ("compute", "hbm", "interconnect"):
        whole = getattr(turn.seconds, name)
        assert sum(getattr(x, name) for x in turn.scopes.values()) == pytest.approx(whole)
    assert turn.seconds.compute == turn.flops / TOY.flops
    assert turn.seconds.hbm == turn.traffic.hbm_bytes / TOY.hbm_bandwidth > 0
    assert turn.seconds.interconnect > 0
    assert len(found.checks) == 4 and all(check.holds for check in found.checks)


def test_what_is_printed_and_stored_of_a_fit(compiled: Compiled) -> None:
    text = fit_report.render(compiled.planned, compiled.found)
    assert "update that trains the generator\n" in text
    assert "8 toys: mesh data 1, fsdp 4, tensor 2" in text
    stored = json.loads(json.dumps(fit_report.to_json(compiled.planned, compiled.found)))
    (turn,) = compiled.found.turns
    assert turn.seconds is not None
    assert stored["turns"]["generator"]["serial_fraction"] == turn.seconds.serial_fraction


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("/generator_step/", "/preference_step/", "does not name: generator_step"),
        ("/sampling/", "/drawing/", "does not name: sampling"),
        ("decode", "draw", "step of sampling: no loop is named decode"),
        ("/head/", "/vocabulary/", "generator turn: none is named head"),
    ],
)
def test_a_check_that_does_not_find_its_scope_fails(
    compiled: Compiled, old: str, new: str, told: str
) -> None:
    """As if a scope of the update had been renamed."""
    renamed = compiled.program._replace(text=compiled.program.text.replace(old, new))
    turns = fits.read_turns(compiled.planned, renamed, TOY)
    (failed,) = (x for x in fits.check_layout(compiled.planned, turns) if not x.holds)
    assert failed.text.endswith(told)


def test_arguments_that_are_too_many_are_told_before_compiling(
    toy: target.Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(roofline.CHIPS, "toy", TOY._replace(usable_bytes=1000.0))
    planned = plan.make_plan(tiny_config(), toy)
    with pytest.raises(fits.DoesNotFit) as failure:
        fits.fit(planned, toy)
    text = fit_report.render_misfit(planned, toy.name, failure.value)
    assert "does not fit" in text and text.index("optimizer") < text.index("batch ")


def test_the_suggestion_is_the_cheapest_change_that_is_expected_to_fit(toy: target.Target) -> None:
    config = tiny_config("batch.users=16", "mesh.fsdp=8", "mesh.tensor=1")
    planned = plan.make_plan(config, toy)
    needed, rules = suggest.estimate_bytes(planned), config.mesh.rules
    change, smaller, expected = next(suggest.find_fitting_changes(config, toy, needed - 1, rules))
    assert change.to_flags() == "--config.batch.microbatches=2"
    assert expected == suggest.estimate_bytes(smaller) < needed
    assert smaller.config.batch.microbatches == 2
    # adapters come last, and then the state leaves room for them
    model = dataclasses.replace(config.model, checkpoint="x")
    *_, last = suggest.list_changes(dataclasses.replace(config, model=model), 8, ())
    adapted = last.apply(config)
    assert adapted.inference.lora.rank == adapted.generator.lora.rank == 16
    # where the state leaves no room, nothing of it helps
    state = sum(plan.count_state_bytes(planned).values())
    assert not list(suggest.find_fitting_changes(config, toy, state / 2, rules))


def test_released_models_need_no_folder() -> None:
    config = cli.load_config("prism:model=llama3-8b,scale=v5p:4x4x4")
    assert plan.plan_model(config).num_layers == 32

    def plan_named(checkpoint: str) -> TransformerConfig:
        model = dataclasses.replace(config.model, checkpoint=checkpoint)
        return plan.plan_model(dataclasses.replace(config, model=model))

    assert plan_named("meta-llama/Llama-3.1-8B-Instruct@main") == plan.plan_model(config)
    assert plan_named("mistralai/Mistral-7B-Instruct-v0.3").vocab_size == 32768
    assert plan_named("gs://bucket/google/gemma-3-12b-it").num_layers == 48
    told = 'not on this disk, and lama-3.1-8b is no .*Did you mean "llama-3.1-8b"'
    with pytest.raises(UserError, match=told):
        plan_named("checkpoints/lama-3.1-8b")


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
        *(f"--config.{field}" for field in SMALL),
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
