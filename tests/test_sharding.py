"""The mesh, the rules as data, and that a layout which would not do is refused by the name of the
parameter."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import scales
from popi_jax import sharding
from popi_jax.config import LOGICAL_AXES, MESH_AXES
from popi_jax.config_rules import parse_rules
from popi_jax.errors import UserError
from popi_jax.models.layout import UNSPLIT, Rules, move, spec
from popi_jax.models.transformer import TransformerConfig, init_boxed
from popi_jax.sharding import make_mesh
from tests.oracles import plain
from tests.oracles.plain import MODEL, ROLLOUT_RULES, RULES

FSDP = Rules(**parse_rules(scales.FSDP_RULES, "rules"))


def layout(
    rules: Rules, shape: tuple[int, int, int, int] = (1, 4, 2, 1), model: TransformerConfig = MODEL
) -> dict:
    boxed = jax.eval_shape(partial(init_boxed, cfg=model), jax.eval_shape(jax.random.key, 0))
    return plain.shardings(boxed, make_mesh(*shape), rules)


def test_rules_of_the_configuration_name_the_axes_of_the_code() -> None:
    assert set(LOGICAL_AXES) <= set(Rules._fields)
    assert tuple(make_mesh(2, 2, 2).axis_names) == MESH_AXES


@pytest.mark.parametrize(
    ("rules", "q", "embedding"),
    [
        (RULES, P(None, "fsdp", "tensor", None), P("tensor", "fsdp")),
        (FSDP, P(None, ("fsdp", "tensor"), None, None), P("tensor", "fsdp")),
        (ROLLOUT_RULES, P(None, None, "tensor", None), P("tensor", None)),
    ],
)
def test_every_parameter_lies_as_the_rules_say(rules: Rules, q: P, embedding: P) -> None:
    found = layout(rules)
    assert found["layers"]["attention"]["q"]["kernel"].spec == q
    assert found["embed"]["embedding"].spec == embedding
    assert found["final_norm"]["scale"].spec == P(None)


def test_what_would_not_do_is_refused_by_name() -> None:
    with pytest.raises(
        UserError,
        match=r"parameter embed/embedding: its axis vocab_embed of 36 .* 8 devices .*; at most 4",
    ):
        layout(RULES, (1, 8, 1, 1), dataclasses.replace(MODEL, embed_dim=36))
    with pytest.raises(
        UserError,
        match=r"parameter layers/attention/k/kernel .* split two of its axes by mesh axis tensor",
    ):
        layout(
            RULES._replace(embed=("tensor",), vocab_embed=("fsdp",)),
            model=dataclasses.replace(MODEL, mlp_dim=64),
        )
    with pytest.raises(
        UserError, match=r"parameter embed/embedding .* would be whole on every device"
    ):
        layout(RULES._replace(vocab=(), vocab_embed=()))
    assert layout(UNSPLIT)  # nothing split is a choice
    with pytest.raises(KeyError, match="head_dimension"):
        spec(("embed", "head_dimension"), RULES)
    with pytest.raises(
        UserError, match="the 2 KV heads of the model do not divide over so many devices; at most 2"
    ):
        sharding.check_heads(2, make_mesh(1, 2, 2, 2), RULES)


def test_a_mesh_fills_its_devices() -> None:
    with pytest.raises(
        ValueError, match="data x fsdp x tensor x sequence = 1 x 3 x 2 x 1 does not fill 8 devices"
    ):
        make_mesh(1, 3, 2)


def test_data_goes_across_slices() -> None:
    def chip(number: int) -> SimpleNamespace:
        x, y = divmod(number % 4, 2)
        return SimpleNamespace(
            id=number, slice_index=number // 4, process_index=number // 4, platform="tpu",
            device_kind="TPU v5 lite", coords=(x, y, 0), core_on_chip=0,
        )  # fmt: skip

    devices = [chip(number) for number in range(8)]
    with pytest.raises(
        UserError, match="config.mesh.data = 1: must be a multiple of 2, the TPU slices"
    ):
        make_mesh(1, 4, 2, devices=devices)
    array = sharding.device_array((2, 2, 2, 1), devices)
    assert [{device.slice_index for device in part.flat} for part in array] == [{0}, {1}]


def test_laid_out_anew_it_is_the_same() -> None:
    names = ("layers", "embed", "mlp")
    x = np.arange(2 * 16 * 8, dtype=np.float32).reshape(2, 16, 8)
    mesh = make_mesh(1, 4, 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, spec(names, FSDP)))
        program = jax.jit(lambda x: move(x, names, FSDP, ROLLOUT_RULES))
        found = program(placed)
        assert found.sharding.spec == P(None, None, "tensor")
        text = program.lower(placed).compile().as_text()
    np.testing.assert_array_equal(found, x)
    assert "all-to-all" in text  # what moves between axes moves alone, it is not made whole first
    assert jnp.size(found) == 256


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            ("batsh data",),
            r'mesh.rules\[0\] = "batsh data": must begin with one of batch, .*Did you mean "batch"',
        ),
        (
            ("batch data", "embed fspd"),
            r'mesh.rules\[1\] = "embed fspd": fspd is no mesh axis; .*Did you mean "fsdp"',
        ),
        (("batch data", "batch fsdp"), "batch has a rule already"),
        (("embed fsdp fsdp",), "names a mesh axis twice"),
        (("",), "must begin with one of"),
    ],
)
def test_a_bad_rule_is_told_by_its_number(rules: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_rules(rules, "mesh.rules")
