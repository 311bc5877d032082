"""The benchmarks run through on a minute work, and what they conclude from measurements is
right."""

import json
import pathlib
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from benchmarks import (
    accelerator,
    bench,
    compare,
    data,
    growth,
    measure,
    operations,
    padding,
    profile,
    programs,
    restart,
)
from benchmarks.growth_chart import choose_step
from benchmarks.programs import make_users
from benchmarks.workloads import TINY, WORKLOADS, Workload
from popi_jax.data.measure import Totals

MINUTE = Workload("minute", "dpo", users=2, pairs=1, prompt_len=8, answer_len=4)
SMALL = TINY._replace(
    vocab_size=64, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32
)


@pytest.fixture(scope="module")
def result() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure.measure_matmul_peak, "__defaults__", (((64, 64, 64),), 1))
        return bench.time_programs([(MINUTE, SMALL, True)], rounds=2)


def test_bench_measures_a_program(result: dict) -> None:
    (program,) = result["programs"]
    assert program["program"] == "minute/generator_step"
    assert program["tokens"] == 2 * (8 + 2 * 4)
    assert program["flops"] > 0 and 0 < program["mfu"]
    assert program["cpu_s"]["min"] <= program["cpu_s"]["median"] <= program["cpu_s"]["max"]
    assert program["memory_bytes"]["alias"] > 0, "the state is donated"
    assert result["compilations_in_timed_rounds"] == 0
    assert result["machine"]["jax"] and result["machine"]["cores"] >= 1


def test_bench_writes_json_and_prints_a_table(
    result: dict,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "time_programs", lambda plan, rounds: result)
    out = tmp_path / "new" / "bench.json"
    assert bench.main([f"--out={out}", "--workloads=dpo", "--no-padding"]) == 0
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert "| minute/generator_step |" in capsys.readouterr().out
    monkeypatch.setattr(
        bench, "time_programs", lambda plan, rounds: result | {"compilations_in_timed_rounds": 1}
    )
    assert bench.main([f"--out={out}", "--no-padding"]) == 1


def test_accelerator_compares_attention_and_times_programs(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's counterpart in place of the kernel; a product of matrices as the program."""
    import jax
    import jax.numpy as jnp

    def make(work: Workload, geometry: object, names: set, how: programs.Compute) -> list:
        step = jax.jit(lambda carry, x: (carry + 1, x @ x))
        return [programs.Program("one", step, jnp.zeros(3), (jnp.ones((8, 8)),))]

    monkeypatch.setattr(programs, "make_programs", make)
    monkeypatch.setattr(accelerator, "TREES", {"two": ((1, 6), (2, 4))})
    monkeypatch.setattr(accelerator, "HEADS", (2, 1, 8))
    out = tmp_path / "lines.jsonl"
    flags = "--steps=attention,update,score", "--sizes=2x3", "--rounds=2", "--batch=2"
    assert accelerator.main([f"--out={out}", "--implementation=xla", *flags]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert not [line for line in lines if "error" in line]
    ways = [line for line in lines if "tree" in line]
    assert len(ways) == 3 and all(line[x] < 0.02 for line in ways for x in ("dq", "dk", "dv", "y"))
    timed = [line for line in lines if "mfu" in line]
    assert [line["pairs"] for line in timed] == [6, 6, 512, 512]
    assert timed[0]["tflop"] == pytest.approx(2 * 8**3 / 1e12)


def test_unknown_workload_is_told_with_those_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--workloads=dop"])
    assert f'"dop": must be one of {", ".join(WORKLOADS)}' in capsys.readouterr().err


def test_compilations_are_counted() -> None:
    import jax

    with measure.count_compilations() as count:
        jax.jit(lambda x: x + 1)(np.ones(3))
        assert count[0] == 1
    jax.jit(lambda x: x + 2)(np.ones(3))
    assert count[0] == 1


def test_slower_is_a_median_over_the_threshold() -> None:
    ratios = {"same": [0.9, 1.04, 1.3], "slower": [1.0, 1.06, 1.07], "faster": [0.5, 0.9, 2.0]}
    judged = compare.judge(ratios, threshold=1.05)
    assert judged.slower == ["slower"]
    assert judged.rows[0] == ("same", 0.9, 1.04, 1.3, "same")
    assert [row[4] for row in judged.rows] == ["same", "slower", "faster"]


def test_unknown_revision_is_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = measure.run_git("worktree", "list")
    assert compare.main(["--base=no-such-revision"]) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: BASE = "no-such-revision": ') and error.count("\n") == 1
    assert measure.run_git("worktree", "list") == before


def test_fit_is_that_of_least_squares() -> None:
    exact = growth.fit_line([(1, 5.0), (2, 7.0), (4, 11.0)])
    assert exact == pytest.approx((2.0, 3.0, 1.0))
    x, y = np.arange(6.0), np.array([1.0, 1.5, 3.5, 2.0, 5.0, 4.0])
    slope, intercept = np.polyfit(x, y, 1)
    expected = (slope, intercept, np.corrcoef(x, y)[0, 1] ** 2)
    assert growth.fit_line(list(zip(x.tolist(), y.tolist(), strict=True))) == pytest.approx(
        expected
    )


def test_chart_is_well_formed_and_names_its_lines() -> None:
    line = {
        "label": "signals 256",
        "cpu_s": [(2, 0.1), (16, 0.37)],
        "fit": {"slope": 0.02, "intercept": 0.06},
    }
    text = growth.draw_chart({"lines": [line | {"panel": "samples"}]})
    root = ElementTree.fromstring(text)
    assert len(root.findall("{*}circle")) == 2 and "signals 256" in text
    assert [choose_step(x) for x in (0.37, 8, 16, 60)] == pytest.approx([0.1, 2, 5, 10])


def test_growth_varies_one_number_at_a_time() -> None:
    for series in growth.plan_series(("users", "pairs", "samples")):
        numbers = [n for n, _ in series.works]
        assert len({work._replace(users=0, pairs=0, group=0) for _, work in series.works}) == 1
        assert numbers == sorted(set(numbers)) and len(numbers) >= 3


@pytest.mark.parametrize(
    ("opcodes", "asked_by", "kind"),
    [
        ({"parameter", "dot", "add"}, "", "matrix products"),
        ({"parameter", "dynamic-slice", "bitcast"}, "", "copies and slices"),
        ({"broadcast", "constant"}, "", "fills and conversions"),
        ({"exponential", "reduce"}, "layers/attention/exp", "attention, element by element"),
        ({"multiply", "reduce"}, "layers/attention_norm/reduce_sum", "sums and maxima"),
        ({"gather"}, "", "lookups"),
        ({"multiply", "add"}, "", "other, element by element"),
    ],
)
def test_kinds_of_operations(opcodes: set[str], asked_by: str, kind: str) -> None:
    assert operations.name_kind(opcodes, asked_by) == kind


def test_operations_of_a_compiled_program_know_their_source() -> None:
    import jax
    import jax.numpy as jnp

    def step(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ x), None), x, None, length=3)[0]

    known = operations.read_operations(jax.jit(step).lower(jnp.ones((32, 32))).compile().as_text())
    products = [operation for operation in known.values() if operation.kind == "matrix products"]
    assert products and any(
        pathlib.Path(__file__).name in operation.source for operation in products
    )
    assert not any(name.startswith("while") for name in known)


def test_profile_sums_up_the_operations_of_the_program() -> None:
    known = {
        "dot.1": operations.Operation("matrix products", "jit(f)/dot", "a.py:3"),
        "copy.2": operations.Operation("copies and slices", "", ""),
    }
    events = [
        profile.Event("dot.1", 0.2),
        profile.Event("dot.1", 0.4),
        profile.Event("copy.2", 0.2),
    ]
    totals = profile.sum_by_operation(
        [*events, profile.Event("ThunkExecutor::Execute", 9.0)], known
    )
    assert totals == {"dot.1": (pytest.approx(0.6), 2), "copy.2": (0.2, 1)}
    text = profile.render_page("f", totals, known, steps=2, facts=[("memory", "1 MB")])
    assert "| matrix products | 300 | 75.0 % |" in text and "a.py:3" in text


def test_padding_is_the_share_without_a_token() -> None:
    users = make_users(MINUTE, 64)
    half = users._replace(chosen=users.chosen._replace(lengths=users.chosen.lengths // 2))
    pairs = users.turns.ids.shape[-1] + 6

    def measure_with(pairs: int, replies: int) -> dict[str, padding.Padding]:
        most = {"signals": 8, "prompts and replies": pairs, "replies": replies}
        budgets = {name: Totals(((1, 1, tokens),)) for name, tokens in most.items()}
        return padding.measure_padding([half], budgets)

    found = measure_with(pairs, 6)
    slots = users.turns.ids.size + 2 * users.chosen.ids.size
    assert found["prompts and replies"].slots == pytest.approx(users.chosen.ids.size / 2 / slots)
    assert found["replies"] == pytest.approx((0.25, 0.0, 1.0))
    # one token too few in the budget: computed padded
    found = measure_with(pairs - 1, 7)
    assert found["prompts and replies"][1:] == pytest.approx(
        (found["prompts and replies"].slots, 0.0)
    )
    assert found["replies"].computed == pytest.approx(1 / 7)


def test_uneven_texts_leave_the_arrays_as_they_are() -> None:
    users = make_users(WORKLOADS["popi"], 64)
    cut = padding.cut_texts(users)
    assert cut.chosen.ids is users.chosen.ids
    assert 0.4 < cut.chosen.lengths.mean() / users.chosen.ids.shape[-1] < 0.7
    assert cut.chosen.lengths.min() >= 4


def test_settings_that_are_none_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        padding.main(["--no-steps", "--confg.seed=1"])
    assert "--confg.seed=1: unknown" in capsys.readouterr().err


def test_starts_end_at_a_whole_line_of_metrics(tmp_path: pathlib.Path) -> None:
    assert restart.read_last_step(tmp_path) == 0
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "loss": 0.')
    assert restart.read_last_step(tmp_path) == 1
    path.write_text('{"step": 1}\n{"step": 2, "loss": 0.5}\n')
    assert restart.read_last_step(tmp_path) == 2
    text = restart.render({"smoke": {"cold": [6.0, 8.0], "warm": [2.0, 4.0]}})
    assert "| smoke | 7 | 3 | 2.5 | 2.00 to 3.00 |" in text


def test_rows_become_batches(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages in this process, on a minute's work; what they say is told per user."""
    monkeypatch.setattr(data, "measure", lambda stage, *given: data._measure_here(stage, *given))
    monkeypatch.setattr(data, "WORKERS", (0,))
    monkeypatch.setattr(data, "BATCHES", 2)
    settings = ["--config.batch.users=4", "--config.mesh.num_devices=0"]
    found = data.run_stages(tmp_path, 40, settings, updates=False)
    assert found["prepare"]["users"] == 40 and not found["prepare"]["again"]
    assert 0 < found["encode"]["users"] <= 40
    reading = found["batches, 0 workers"]
    assert reading["users_per_s"] == pytest.approx(8 / reading["seconds"])
    again = data.run_stages(tmp_path, 40, settings, updates=False)
    assert again["prepare"]["again"] and again["encode"]["again"]
    found["updates"] = {"seconds": 1.0, "users_per_s": reading["users_per_s"] / 12, "peak_mb": 1.0}
    found["updates"]["workers_peak_mb"] = 0.0
    lines = data.render(found).splitlines()
    assert next(line for line in lines if "0 workers" in line).endswith("| 12 |")
    with pytest.raises(SystemExit):
        data.main(["--rows=0"])
