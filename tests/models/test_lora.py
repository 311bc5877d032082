"""Adapters: zero at the start, the same applied as merged, and files that peft reads."""

import json
import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from popi_jax.arrays import Tokens
from popi_jax.checkpoints import adapter, hf_io
from popi_jax.flops import count_flops
from popi_jax.models import lora as lora_lib
from popi_jax.models.decode import Sampling, sample, sample_keys
from popi_jax.models.packing import Budget
from popi_jax.models.transformer import init_boxed, unbox
from popi_jax.popi.scorer import answer_logps, answer_logps_of_both
from popi_jax.sharding import make_mesh, param_shardings, place_batch
from tests.oracles import plain
from tests.oracles.plain import MODEL, RULES

RANK, ALPHA = 3, 7.5
SCALE = ALPHA / RANK
RNG = np.random.default_rng(0)
CONTEXT = Tokens(jnp.asarray(RNG.integers(0, 64, (2, 5))), jnp.array([5, 3]))
TURNS = Tokens(jnp.asarray(RNG.integers(0, 64, (2, 1, 4))), jnp.array([[2], [4]]))
ANSWERS = Tokens(jnp.asarray(RNG.integers(0, 64, (2, 1, 2, 4))), jnp.array([[[4, 2]], [[1, 3]]]))


@pytest.fixture(scope="module")
def base() -> dict:
    return plain.random_params(0)


def init(targets: tuple[str, ...] = lora_lib.TARGETS) -> dict:
    return lora_lib.init_lora_boxed(jax.random.key(1), MODEL, rank=RANK, targets=targets)


@pytest.fixture(scope="module")
def trained() -> dict:
    return jax.tree.map(
        lambda x: jnp.asarray(RNG.normal(0, 0.2, x.shape), jnp.float32), unbox(init())
    )


@jax.jit
def grad_of_adapters(base: dict, lora: dict) -> tuple:
    def total(lora: dict) -> tuple:
        params = lora_lib.join(base, lora, scale=SCALE)
        scores = answer_logps(params, CONTEXT, TURNS, ANSWERS, model=MODEL)
        return jnp.sum(scores.sums()), scores.logps

    return jax.grad(total, has_aux=True)(lora)


plain_logps = jax.jit(
    lambda params: answer_logps(params, CONTEXT, TURNS, ANSWERS, model=MODEL).logps
)


def test_a_new_adapter_changes_nothing_and_learns_at_b_first(base: dict) -> None:
    grads, logps = grad_of_adapters(base, unbox(init()))
    np.testing.assert_array_equal(logps, plain_logps(base))
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(np.any(g)) == (path[-1].key == "b"), path


def test_applied_equals_merged(base: dict, trained: dict) -> None:
    """For every target; so the gradient reaches each adapter, and the sampler uses them too."""
    grads, logps = grad_of_adapters(base, trained)
    merged = lora_lib.merge(base, trained, scale=SCALE)
    assert np.abs(np.asarray(logps - plain_logps(base))).max() > 0.1
    np.testing.assert_allclose(logps, plain_logps(merged), atol=1e-4)
    assert all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(grads))
    a, b = trained["layers"]["attention"]["o"]["a"][1], trained["layers"]["attention"]["o"]["b"][1]
    added = SCALE * np.einsum("nhr,rd->nhd", np.asarray(a, np.float64), np.asarray(b, np.float64))
    kernel = np.asarray(base["layers"]["attention"]["o"]["kernel"][1], np.float64)
    np.testing.assert_allclose(
        merged["layers"]["attention"]["o"]["kernel"][1], kernel + added, atol=1e-5
    )
    turn = Tokens(TURNS.ids[:, 0], TURNS.lengths[:, 0])
    draw = jax.jit(partial(sample, model=MODEL, sampling=Sampling(0.0, 4, -1)))
    keys = sample_keys(jax.random.key(0), jnp.arange(2), 1)
    drawn = draw(lora_lib.join(base, trained, scale=SCALE), CONTEXT, turn, keys)
    expected = draw(merged, CONTEXT, turn, keys)
    np.testing.assert_array_equal(drawn.summaries.ids, expected.summaries.ids)
    np.testing.assert_allclose(drawn.logps, expected.logps, atol=1e-4)


TREE = CONTEXT, TURNS, ANSWERS


def of_both(
    lora: dict, base: dict, tree: Any = TREE, *, one_pass: bool, budget: Budget | None = None
) -> Any:
    """(gradient of the adapters, (log-probs, log-probs of the base)) of a loss of both, in one pass
    or in two."""
    settings: Any = {"model": MODEL, "temperature": 0.7, "budget": budget}
    before = None if one_pass else answer_logps(base, *tree, **settings)

    def loss(lora: dict) -> Any:
        params = lora_lib.join(base, lora, scale=SCALE)
        if one_pass:
            scores, of_base = answer_logps_of_both(params, *tree, **settings, entropies=True)
        else:
            scores, of_base = answer_logps(params, *tree, **settings, entropies=True), before
        assert of_base is not None and scores.entropies is not None
        entropies = jnp.sum(jnp.where(scores.mask, scores.entropies, 0.0))
        return jnp.sum(jax.nn.sigmoid(scores.sums() - of_base.sums())) + entropies, (
            scores.logps,
            of_base.logps,
        )

    return jax.grad(loss, has_aux=True)(lora)


@pytest.mark.parametrize("budget", [None, Budget(21, 10)])
def test_one_pass_over_the_layers_scores_the_base_too(
    budget: Budget | None, base: dict, trained: dict
) -> None:
    """The same numbers as two passes, for the same FLOPs: nothing goes back through the base's
    stream."""
    one, two = (partial(of_both, one_pass=one_pass, budget=budget) for one_pass in (True, False))
    found, expected = jax.jit(one)(trained, base), jax.jit(two)(trained, base)
    logps, of_base = expected[1]
    mask = np.arange(4) < np.asarray(ANSWERS.lengths)[..., None]
    assert np.abs(np.asarray(logps - of_base))[mask].max() > 0.1
    for x, y in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(np.asarray(x)[mask], np.asarray(y)[mask], atol=1e-5)
    for x, y in zip(jax.tree.leaves(found[0]), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
        assert np.abs(y).max() > 1e-3
    assert count_flops(one, trained, base) == pytest.approx(
        count_flops(two, trained, base), rel=0.01
    )


def test_one_pass_gathers_each_sharded_weight_once(base: dict, trained: dict) -> None:
    tree = jax.tree.map(lambda x: np.tile(x, (4,) + (1,) * (x.ndim - 1)), TREE)
    mesh = make_mesh(1, 8, 1)
    with jax.set_mesh(mesh):
        boxed = jax.eval_shape(partial(init_boxed, cfg=MODEL), jax.random.key(0))
        layouts = param_shardings(init(), mesh, RULES), param_shardings(boxed, mesh, RULES)
        params = jax.device_put((trained, base), layouts)
        gathered = {}
        for one_pass in (True, False):
            program = jax.jit(partial(of_both, one_pass=one_pass), out_shardings=(layouts[0], None))
            text = program.lower(*params, place_batch(tree, mesh, RULES)).compile().as_text()
            results = re.findall(r"= \(?\w+\[([\d,]*)\]\S* all-gather\(", text)
            gathered[one_pass] = sum(math.prod(map(int, shape.split(","))) for shape in results)
    layer = sum(
        math.prod(x["kernel"].shape[1:])
        for group in ("attention", "mlp")
        for x in base["layers"][group].values()
    )
    assert 0 < gathered[True] <= gathered[False] - layer


def test_targets_size_start_and_layout() -> None:
    boxed = init(("v", "down"))
    lora = unbox(boxed)
    assert jax.tree.map(jnp.shape, lora) == {
        "layers": {
            "attention": {"v": {"a": (2, 32, RANK), "b": (2, RANK, 2, 8)}},
            "mlp": {"down": {"a": (2, 64, RANK), "b": (2, RANK, 32)}},
        }
    }
    assert lora_lib.num_params(lora) == 2 * RANK * (32 + 16 + 64 + 32)
    a = np.asarray(lora["layers"]["mlp"]["down"]["a"])
    assert (
        0.9 / 8 < np.abs(a).max() <= 1 / 8 and abs(a.std() - 1 / 8 / 3**0.5) < 0.01
    )  # uniform within 1 / sqrt(64)
    layout = param_shardings(boxed, make_mesh(1, 4, 2), RULES)["layers"]["mlp"]["down"]
    assert layout["a"].spec == P(None, "tensor", None) and layout["b"].spec == P(None, None, "fsdp")
    for targets in ((), ("query",)):
        with pytest.raises(ValueError, match="must be some of q, k, v, o, gate, up, down"):
            init(targets)


def test_peft_directory(base: dict, trained: dict, tmp_path) -> None:
    adapter.write_adapter(tmp_path, trained, MODEL, alpha=ALPHA, base="somewhere")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", RANK, ALPHA)
    projections = [f"{name}_proj" for name in ("down", "gate", "k", "o", "q", "up", "v")]
    assert config["target_modules"] == projections
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * MODEL.num_layers
    # what peft does with them, in the layout of the stored weights
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    update = SCALE * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
    merged = lora_lib.merge(base, trained, scale=SCALE)
    kernels = (
        np.asarray(p["layers"]["attention"]["q"]["kernel"][1]).reshape(32, -1).T
        for p in (merged, base)
    )
    np.testing.assert_allclose(next(kernels) - next(kernels), update, atol=1e-5)


def test_peft_loads_it_and_computes_the_same(base: dict, trained: dict, tmp_path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    (tmp_path / "base").mkdir(), (tmp_path / "adapter").mkdir()
    hf_io.write_model(
        tmp_path / "base", base, MODEL, dtype="float32", max_len=64, special_ids={}, mark={}
    )
    adapter.write_adapter(
        tmp_path / "adapter", trained, MODEL, alpha=ALPHA, base=str(tmp_path / "base")
    )
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32),
        tmp_path / "adapter",
    )
    ids = RNG.integers(0, 64, 9)
    with torch.no_grad():
        found = theirs(torch.tensor(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(
        found, plain.logits(lora_lib.merge(base, trained, scale=SCALE), MODEL, ids), atol=1e-4
    )
