"""Adapters: zero at the start, the same applied as merged, and files that peft reads."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from popi_jax.arrays import Tokens
from popi_jax.checkpoints import adapter, hf_write
from popi_jax.models import lora as lora_lib
from popi_jax.models.decode import Sampling, sample, sample_keys
from popi_jax.models.packing import Tree
from popi_jax.models.transformer import join_adapters, unbox
from popi_jax.popi.scorer import score_answers
from popi_jax.sharding import make_mesh
from tests.oracles import plain
from tests.oracles.plain import MODEL, RULES

RANK, ALPHA = 3, 7.5
SCALE = ALPHA / RANK
RNG = np.random.default_rng(0)
CONTEXT = Tokens(jnp.asarray(RNG.integers(0, 64, (2, 5))), jnp.array([5, 3]))
TURNS = Tokens(jnp.asarray(RNG.integers(0, 64, (2, 1, 4))), jnp.array([[2], [4]]))
ANSWERS = Tokens(jnp.asarray(RNG.integers(0, 64, (2, 1, 2, 4))), jnp.array([[[4, 2]], [[1, 3]]]))
TREE = Tree(CONTEXT, TURNS, ANSWERS)


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
        params = join_adapters(base, lora, scale=SCALE)
        scores = score_answers(params, TREE, model=MODEL)
        return jnp.sum(scores.sums()), scores.logps

    return jax.grad(total, has_aux=True)(lora)


plain_logps = jax.jit(lambda params: score_answers(params, TREE, model=MODEL).logps)


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
    drawn = draw(join_adapters(base, trained, scale=SCALE), CONTEXT, turn, keys)
    expected = draw(merged, CONTEXT, turn, keys)
    np.testing.assert_array_equal(drawn.summaries.ids, expected.summaries.ids)
    np.testing.assert_allclose(drawn.logps, expected.logps, atol=1e-4)


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
    layout = plain.shardings(boxed, make_mesh(1, 4, 2), RULES)["layers"]["mlp"]["down"]
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
    config = hf_write.make_config(MODEL, dtype="float32", max_len=64, special_ids={})
    hf_write.write_model(tmp_path / "base", base, MODEL, config)
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
