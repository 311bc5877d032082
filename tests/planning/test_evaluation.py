"""What the programs of an evaluation need, before there is anything to evaluate."""

import json
import math
from collections.abc import Iterator

import jax
import pytest

from popi_jax import fit
from popi_jax.planning import evaluation, fits, plan, roofline, target
from tests.planning.test_fits import SUMMARY_LEN, TOY, needs_compiler, run_fit, tiny_config

USERS, PAIRS, SIGNALS, TURN, ANSWER = 8, 3, 64, 16, 16


@pytest.fixture(scope="module")
def planned() -> Iterator[plan.Plan]:
    own = (f"evaluation.batch_users={USERS}", f"data.num_pairs={PAIRS}")
    yield plan.make_plan(tiny_config(*own), target.Target(jax.devices(), "", "8"))
    jax.set_mesh(None)


@pytest.fixture(scope="module")
def found(planned: plan.Plan) -> Iterator[evaluation.Evaluation]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(roofline.CHIPS, "toy", TOY)
        patch.setattr(evaluation, "count_torus_axes", lambda mesh: {})
        jax.config.update("jax_enable_compilation_cache", False)
        yield evaluation.fit(planned, target.Target(jax.devices(), "toy", "8 toys"))
        jax.config.update("jax_enable_compilation_cache", True)


def count_matrices(planned: plan.Plan) -> tuple[int, int]:
    """Numbers in the matrices of the layers, and in the head."""
    m = planned.model
    heads = (2 * m.num_heads + 2 * m.num_kv_heads) * m.head_dim
    return m.num_layers * m.embed_dim * (heads + 3 * m.mlp_dim), m.embed_dim * m.vocab_size


def test_products_are_those_of_the_tokens(planned: plan.Plan, found: evaluation.Evaluation) -> None:
    """All but those of attention, which are few here."""
    layers, head = count_matrices(planned)
    answers = PAIRS * 2 * ANSWER
    read = PAIRS * TURN + answers - 2 * PAIRS  # the last token of a reply is never read
    prefill = SIGNALS + plan.TEMPLATE
    expected = [
        # a token of each of two summaries at each step, and the first one's
        prefill * layers + head + 2 * SUMMARY_LEN * (layers + head),
        (plan.TEMPLATE + SUMMARY_LEN + read) * layers + answers * head,
        (plan.TEMPLATE + SIGNALS + read) * layers + answers * head,
    ]
    for needs, numbers in zip(found.needs, expected, strict=True):
        least = 2 * USERS * numbers / planned.mesh.size
        assert least < needs.flops < 1.35 * least, needs.name


def test_memory_and_seconds(planned: plan.Plan, found: evaluation.Evaluation) -> None:
    numbers = sum(math.prod(x.shape) for x in jax.tree.leaves(planned.weights))
    for needs in found.needs:
        assert needs.weights == pytest.approx(4 * numbers / 8, rel=0.05)  # float32, in 8 parts
        assert needs.weights < needs.memory < found.available == TOY.usable_bytes
        assert needs.seconds is not None and needs.seconds.compute == needs.flops / TOY.flops
        serial, best = evaluation.count_seconds(planned, needs.seconds)
        assert serial == pytest.approx(125 * needs.seconds.serial) and best < serial
    short, long = found.needs[1:]
    assert short.flops < long.flops and short.traffic.hbm_bytes < long.traffic.hbm_bytes


def test_what_is_printed_and_stored(found: evaluation.Evaluation) -> None:
    text = evaluation.render(found)
    assert f"{USERS} users x {PAIRS} pairs" in text and "8 toys: mesh data 1, fsdp 4" in text
    assert text.count("1,000 users: ") == text.count("GiB per device of") == 3
    stored = json.loads(json.dumps(evaluation.to_json(found)))
    assert [*stored["programs"]] == [needs.name for needs in found.needs]
    assert stored["programs"]["sampling of summaries"]["seconds_per_1000_users"]["serial"] > 0


def test_what_does_not_fit_is_told_with_a_change(
    planned: plan.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(roofline.CHIPS, "toy", TOY._replace(usable_bytes=1000.0))
    with pytest.raises(fits.DoesNotFit) as failure:
        evaluation.fit(planned, target.Target(jax.devices(), "toy", "8 toys"))
    text = evaluation.render_misfit(planned, "8 toys", failure.value)
    assert "does not fit: sampling of summaries needs" in text and text.endswith("more memory")
    (weights,) = failure.value.state.values()
    more = fits.DoesNotFit(weights + 1, 1000.0, failure.value.state)
    told = evaluation.render_misfit(planned, "8 toys", more)
    assert told.endswith("--config.evaluation.batch_users=4")


@needs_compiler
def test_the_command_compiles_the_evaluation_for_a_tpu_that_is_not_there(tmp_path) -> None:
    path = tmp_path / "fit.json"
    done, _ = run_fit(
        "--config=smoke:scale=v5e:2x4",
        "--program=evaluation",
        *(f"--config.{field}" for field in ("mesh.fsdp=4", "mesh.tensor=2", "data.num_pairs=2")),
        *(f"--config.data.{name}_len=16" for name in ("turn", "answer")),
        "--config.data.context_len=64",
        f"--report={path}",
    )
    assert done.returncode == 0, done.stderr
    assert "v5e:2x4, 8 chips" in done.stdout
    programs = json.loads(path.read_text())["programs"].values()
    assert all(0 < x["memory"] < 15.75 * 2**30 and x["seconds"]["compute"] > 0 for x in programs)
    assert fit.PROGRAM.default == "update"
