"""The reader of compiled programs against counts by hand, on texts for TPUs and on programs
compiled here."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from popi_jax.planning import hlo
from popi_jax.planning.fits import parse_exhausted
from popi_jax.planning.groups import count_ring_hops, find_axes, parse_groups, parse_permute
from popi_jax.planning.program import Traffic, find_own_line, read, read_module
from tests.planning.snippets import KERNEL, SCAN, SLICES

MESH = {"fsdp": 2, "tensor": 2}
KIB, MIB = 2**10, 2**20


@functools.cache
def scan() -> Traffic:
    return read(SCAN, MESH)


def per_trip(traffic: Traffic) -> dict[str, float]:
    return {access.name: access.bytes for access in traffic.accesses}


def test_a_loop_counts_as_often_as_it_runs() -> None:
    (loop,) = scan().loops
    assert (loop.trips, loop.known) == (6, True)
    assert {a.executions for a in scan().accesses if a.name == "fusion.86"} == {6}


def test_of_stacked_layers_one_is_read_and_one_is_written() -> None:
    bytes_of = per_trip(scan())
    layer = 2048 * 512
    assert bytes_of["slice_fusion.4"] == 4 * layer + 2 * layer  # float32 in, bfloat16 out
    assert bytes_of["update_fusion.6"] == 2 * (
        2 * 256 * 1024
    )  # one layer's states, read and written


UPDATES = """HloModule jit_f, num_partitions=1

%inner (a: f32[8,100], b: f32[1,100], at: s32[]) -> {result} {{
  %a = f32[8,100] parameter(0)
  %b = f32[1,100] parameter(1)
  %at = s32[] parameter(2)
  %none = s32[] constant(0)
  %zeros = f32[8,100] broadcast(%none), dimensions={{}}
  %old = f32[8,100] dynamic-update-slice(%a, %b, %at, %none)
  %new = f32[8,100] dynamic-update-slice(%zeros, %b, %at, %none)
  ROOT %root = {result} {root}
}}

ENTRY %main (x: f32[8,100], y: f32[1,100], i: s32[]) -> {result} {{
  %x = f32[8,100] parameter(0)
  %y = f32[1,100] parameter(1)
  %i = s32[] parameter(2)
  ROOT %fusion = {result} fusion(%x, %y, %i), kind=kLoop, calls=%inner
}}
"""


@pytest.mark.parametrize(
    ("result", "root", "moved"),
    (
        ("f32[800]", "bitcast(%old)", 2),  # a row read, a row written in the place of `a`
        ("f32[800]", "bitcast(%new)", 1 + 8),  # made anew
        ("f32[8,100]", "negate(%old)", 8 + 1 + 8),  # all of `a` is needed
        ("(f32[8,100], f32[8,100])", "tuple(%old, %new)", 1 + 1 + 8),
    ),
)
def test_updates_in_fusions(result: str, root: str, moved: int) -> None:
    text = UPDATES.format(result=result, root=root)
    assert read(text, {"x": 1}).hbm_bytes == 4 * 100 * moved + 4  # and the index


def test_what_lies_on_the_chip_is_free() -> None:
    bytes_of = per_trip(scan())
    assert (
        bytes_of["fusion.86"] == 2 * 2048 * 1024 + 2 * 256 * 1024
    )  # the hidden states are in its memory
    assert bytes_of["copy.6"] == 4  # the counter is read, and copied to the chip
    assert not {"hidden", "custom-call"} & set(bytes_of)
    # a: from the main memory to the chip's; b: read; the sum: written
    kernel = per_trip(read(KERNEL, {"x": 4}))
    scalars = 2 * 4 * 3  # as an operand and as a result
    assert sum(kernel.values()) == pytest.approx(3 * 128 * KIB, abs=scalars)


def test_the_total_by_hand() -> None:
    layer, states = 2048 * 512, 256 * 1024
    gathered = 2 * layer + 2 * 2 * layer  # its operand and its result, twice as large
    body = 6 * layer + 4 * states + gathered + 4 * layer + 2 * states + 4 * states
    scattered = 2 * 1024 * 2048 + 2 * 512 * 2048
    assert scan().hbm_bytes == pytest.approx(6 * body + scattered, rel=1e-5)


def test_collectives_their_axes_and_bytes() -> None:
    kinds = scan().sum_by_kind_and_axes()
    gathered, summed, gradient = 2 * 2048 * 1024, 2 * 256 * 1024, 2 * 1024 * 2048
    assert kinds["all-gather", ("fsdp",)] == (6, 6 * gathered, 3 * gathered)
    assert kinds["all-reduce", ("tensor",)] == (6, 6 * summed, 6 * summed)
    assert kinds["reduce-scatter", ("fsdp",)] == (
        1,
        gradient,
        gradient / 2,
    )  # written as an all-reduce in a fusion
    assert len(kinds) == 3
    assert scan().sum_wire_bytes() == 3 * gathered + 6 * summed + gradient / 2


def test_what_follows_a_kernel_is_read() -> None:
    assert [(c.kind, c.axes, c.bytes) for c in read(KERNEL, {"x": 4}).collectives] == [
        ("all-reduce", ("x",), 4)
    ]


def test_between_slices() -> None:
    traffic = read(SLICES, {"data": 2, **MESH})
    (sent,) = traffic.collectives
    assert (sent.kind, sent.axes, sent.group) == ("cross-slice all-reduce", ("data",), 2)
    assert sent.wire_bytes == sent.bytes == 2 * MIB
    assert (traffic.sum_wire_bytes(), traffic.sum_wire_bytes(cross_slice=True)) == (0, 2 * MIB)


def find_kinds(scope: str) -> set[str]:
    return {c.kind for c in scan().collectives if any(loop.is_in(scope) for loop in c.loops)}


def test_collectives_of_a_loop() -> None:
    assert find_kinds("step/scan") == find_kinds("loop.py") == {"all-gather", "all-reduce"}
    assert find_kinds("layers.py") == set()  # lines inside of the loop do not name it
    assert find_kinds("run.py") == set()  # nor do its callers


def test_where_the_bytes_come_from() -> None:
    first = max(scan().accesses, key=lambda access: access.bytes * access.executions)
    assert (first.name, first.executions) == ("slice_fusion.4", 6)
    assert [loop.op_name for loop in first.loops] == ["step/scan/while"]
    module = hlo.parse(SCAN)
    instruction = module.computations["body"].instructions["slice_fusion.4"]
    lines = ("/home/me/layers.py:10", "/home/me/loop.py:13", "/home/me/run.py:30")
    assert module.find_lines(instruction) == lines  # and what called it


def test_groups_in_all_their_forms() -> None:
    mesh = {"data": 1, "fsdp": 16, "tensor": 4}
    along_fsdp = [tuple(range(start, 64, 4)) for start in range(4)]
    listed = "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in along_fsdp) + "}"
    for text in (
        listed,
        "[4,16]<=[16,4]T(1,0)",
        "mesh['axis_0'=16,'axis_1'=1,'axis_2'=4] {'axis_0'}",
        "mesh['axis_0'=4,'axis_1'=1,'axis_2'=16], device_ids=([16,4]T(1,0)) {'axis_2'}",
    ):
        groups = parse_groups(f"replica_groups={text}, dimensions={{0}}", 64)
        assert sorted(groups) == along_fsdp, text
        assert find_axes(groups, mesh) == ("fsdp",)
    whole = parse_groups("channel_id=1, replica_groups={}, to_apply=%add", 64)
    assert find_axes(whole, mesh) == ("fsdp", "tensor")
    assert parse_groups("replica_groups=[4,2]<=[2,2,2]T(2,1,0), ", 8) == [
        (0, 4),
        (2, 6),
        (1, 5),
        (3, 7),
    ]
    halves = parse_groups("replica_groups=mesh['a'=4,'b'=2] {'a':(1)2}, ", 8)
    assert halves == [(0, 4), (1, 5), (2, 6), (3, 7)]
    quarters = parse_groups("replica_groups=mesh['a'=4,'b'=2] {'a':(2)2}, ", 8)
    assert quarters == [(0, 2), (1, 3), (4, 6), (5, 7)]
    with pytest.raises(ValueError, match="outside of the mesh"):
        find_axes([(0, 64)], mesh)
    with pytest.raises(ValueError, match="unknown form"):
        parse_groups("replica_groups=@somewhere, ", 64)


def test_pairs() -> None:
    mesh = {"fsdp": 4, "tensor": 2}
    assert parse_permute("source_target_pairs={{0,2},{2,4},{4,6},{6,0}}", mesh) == (
        ("fsdp",),
        1.0,
    )  # 6 to 0 closes the ring
    assert parse_permute("source_target_pairs={{0,4},{1,0}}", mesh) == (("fsdp", "tensor"), 1.5)


def test_hops_of_an_all_to_all() -> None:
    for n in (2, 3, 4, 8):
        assert count_ring_hops(n) == pytest.approx(sum(min(d, n - d) for d in range(n)) / n)


def test_arrays_and_their_layouts() -> None:
    tiled, scalar, nibbles = hlo.parse_arrays(
        "(bf16[3,100]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/pred[]{:T(512)}, s4[6]{0})"
    )
    assert (str(tiled), tiled.bytes, tiled.space) == ("bf16[3,100]", 8 * 128 * 2, 1)
    assert (scalar.bytes, scalar.dims, nibbles.bytes) == (1, (), 3)
    (turned,) = hlo.parse_arrays("f32[100,8]{0,1:T(8,128)}")
    assert turned.bytes == 8 * 128 * 4  # the first axis is the minor one


def test_no_program() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        read("module @jit_f {", MESH)


def test_messages_of_programs_that_do_not_fit() -> None:
    short = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (70.87G) exceeds available HBM (15.75G)."
    )
    assert parse_exhausted(short) == (round(70.87 * 2**30), round(15.75 * 2**30))
    long = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 512.0M hbm. "
        "Exceeded by 20.0G.\n\n  Largest program allocations in hbm:\n\n  1. Size: 4.00G\n"
    )
    assert parse_exhausted(long) == (20.5 * 2**30, 2**29)
    assert parse_exhausted("RESOURCE_EXHAUSTED: of another form") == (0, 0)
    assert parse_exhausted("INVALID_ARGUMENT: donated twice") is None


# Programs compiled for the 8 simulated devices


def compiled(function, *shapes, mesh=None) -> jax.stages.Compiled:
    with jax.set_mesh(mesh or jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))):
        return jax.jit(function).lower(*shapes).compile()


def test_layers_of_sharded_weights_are_gathered_once_each() -> None:
    """6 layers of two weights [64 128], over 4 devices; their products are summed over 2."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def shape(dims: tuple[int, ...], *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, "float32", sharding=NamedSharding(mesh, P(*axes)))

    def layers(weights: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
        with jax.named_scope("layers"):
            return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w[0]) @ w[1], None), x, weights)[0]

    weights = (
        shape((6, 64, 128), None, "fsdp", "tensor"),
        shape((6, 128, 64), None, "tensor", "fsdp"),
    )
    program = compiled(layers, weights, shape((16, 64), "fsdp"), mesh=mesh)
    traffic = read(program.as_text(), mesh.shape)
    assert [loop.trips for loop in traffic.loops] == [6]
    kinds = traffic.sum_by_kind_and_axes()
    gathered = 4 * 64 * 128 // 2  # a weight without what lies on the other device of `tensor`
    assert kinds["all-gather", ("fsdp",)] == (12, 12 * gathered, 12 * gathered * 3 / 4)
    assert kinds["all-reduce", ("tensor",)][0] == 6
    found = [c for c in traffic.collectives if c.bytes >= gathered]
    assert [c.executions for c in found] == [6, 6]
    assert all(loop.is_in("layers") for c in found for loop in c.loops)


def test_agrees_with_xla_where_nothing_loops() -> None:
    """XLA counts the same bytes, here where all memory is the main memory."""

    def network(x: jax.Array, stacked: jax.Array, cache: jax.Array) -> tuple[jax.Array, jax.Array]:
        for i in range(3):
            x = jnp.tanh(x @ stacked[2 * i])
        return jnp.sum(x, axis=0), jax.lax.dynamic_update_slice(cache, x[None], (2, 0, 0))

    shapes = (
        jax.ShapeDtypeStruct(dims, "float32") for dims in ((256, 512), (6, 512, 512), (4, 256, 512))
    )
    program = compiled(network, *shapes)
    expected = program.cost_analysis()["bytes accessed"]
    assert read(program.as_text(), {"x": 1}).hbm_bytes == pytest.approx(expected, rel=0.03)


def test_loops_that_may_end_early_and_branches() -> None:
    def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        step, x = state
        return step + 2, jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x * 2.0, x)

    def function(x: jax.Array) -> jax.Array:
        start = jnp.int32(3), x
        return jax.lax.while_loop(lambda s: (s[0] <= 20) & ~jnp.all(s[1] > 0), body, start)[1]

    text = compiled(function, jax.ShapeDtypeStruct((64, 64), "float32")).as_text()
    assert [loop.trips for loop in read(text, {"x": 1}).loops] == [9]  # 3, 5, ... 19


def test_one_branch_of_the_outermost_conditional_and_the_dearest_of_others() -> None:
    def double(x: jax.Array) -> jax.Array:
        return x * 2.0

    def choose(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 1] > 0, double, lambda x: x @ x, x)

    def function(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda x: choose(x) @ x @ x, double, x)

    shape = jax.ShapeDtypeStruct((64, 64), "float32")
    module = hlo.parse(compiled(function, shape).as_text())
    moved = [read_module(module, {"x": 1}, branch=n).hbm_bytes for n in (None, 0, 1)]
    assert moved[0] == moved[2] > moved[1]  # the branch for True is the last


def test_loops_that_count_otherwise() -> None:
    def up(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(
            lambda s: s[0] <= 20, lambda s: (s[0] + 4, s[1] * 2.0), (jnp.int32(0), x)
        )[1]

    def down(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(
            lambda s: 4 < s[0], lambda s: (s[0] - 5, s[1] * 2.0), (jnp.int32(20), x)
        )[1]

    shape = jax.ShapeDtypeStruct((64, 64), "float32")
    for function, trips in ((up, 6), (down, 4)):  # 0, 4, ... 20; 20, 15, 10, 5
        text = re.sub(
            r'"known_trip_count":\{.*?\}', "", compiled(function, shape).as_text()
        )  # programs for TPUs lack it
        assert [loop.trips for loop in read(text, {"x": 1}).loops] == [trips]


COUNTING = """HloModule jit_f, num_partitions=1

%body (s: (s32[])) -> (s32[]) {{
  %s = (s32[]) parameter(0)
  %before = s32[] get-tuple-element(%s), index=0
  %by = s32[] constant(3)
  %after = s32[] {change}
  ROOT %next = (s32[]) tuple(%after)
}}

%condition (s.1: (s32[])) -> pred[] {{
  %s.1 = (s32[]) parameter(0)
  %counter = s32[] get-tuple-element(%s.1), index=0
  %bound = s32[] constant(2)
  ROOT %on = pred[] compare({sides}), direction={direction}
}}

ENTRY %main () -> (s32[]) {{
  %start = s32[] constant({start})
  %carried = (s32[]) tuple(%start)
  ROOT %loop = (s32[]) while(%carried), condition=%condition, body=%body
}}
"""


@pytest.mark.parametrize(
    ("start", "change", "sides", "direction", "trips"),
    (
        (11, "subtract(%before, %by)", "%counter, %bound", "GE", 4),  # 11, 8, 5, 2
        (11, "subtract(%before, %by)", "%bound, %counter", "LT", 3),
        (-7, "add(%by, %before)", "%bound, %counter", "GT", 3),  # -7, -4, -1
        (-7, "add(%before, %by)", "%counter, %bound", "NE", 3),
        (5, "add(%before, %by)", "%counter, %bound", "LT", 0),
        (1, "multiply(%before, %by)", "%counter, %bound", "LT", None),
        (1, "subtract(%by, %before)", "%counter, %bound", "LT", None),
    ),
)
def test_ways_to_count(
    start: int, change: str, sides: str, direction: str, trips: int | None
) -> None:
    text = COUNTING.format(start=start, change=change, sides=sides, direction=direction)
    (loop,) = read(text, {"x": 1}).loops
    assert (loop.trips, loop.known) == (1 if trips is None else trips, trips is not None)


def test_lines_of_libraries() -> None:
    assert (
        find_own_line(("/site-packages/flax/core.py:3", "/me/model.py:7", "/me/run.py:1"))
        == "/me/model.py:7"
    )
    assert (find_own_line(("/site-packages/flax/core.py:3",)), find_own_line(())) == (
        "/site-packages/flax/core.py:3",
        "",
    )


def test_a_loop_whose_end_depends_on_data() -> None:
    def function(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x * 2.0, x)

    text = compiled(function, jax.ShapeDtypeStruct((64, 64), "float32")).as_text()
    (loop,) = read(text, {"x": 1}).loops
    assert (loop.trips, loop.known) == (1, False)
