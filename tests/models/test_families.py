"""Every behaviour of the decoder: against float64 numpy in the packed tree and the cache, and
against transformers.

The second needs values that transformers computed, in $POPI_ORACLES or beside the project, and is
skipped without."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.arrays import Tokens
from popi_jax.checkpoints import hf_config, hf_io, hf_write
from popi_jax.losses.logprobs import token_logits
from popi_jax.models.attention import RopeScaling, frequencies
from popi_jax.models.decode import Sampling, sample, sample_keys
from popi_jax.models.packing import Level, Tree
from popi_jax.models.transformer import (
    Transformer,
    TransformerConfig,
    get_head,
    init_boxed,
    unbox,
    variables,
)
from popi_jax.popi.scorer import score_answers
from tests.oracles import decoder, recorded
from tests.oracles import losses as oracle
from tests.oracles.plain import row

SIZES = {
    "vocab_size": 64,
    "num_layers": 3,
    "embed_dim": 24,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
}
EVERYTHING = (
    TransformerConfig(  # no released model has all of it; each behaviour shows in the numbers
        **SIZES,
        mlp_dim=40,
        rope_theta=500.0,
        activation="gelu_tanh",
        qkv_bias=True,
        out_bias=True,
        qk_norm=True,
        norm_plus_one=True,
        post_norms=True,
        embed_scale=True,
        score_dim=5,
        attn_logit_softcap=1.5,
        final_logit_softcap=4.0,
        rope_scaling=RopeScaling(
            "yarn", 3.0, original_len=60, beta_fast=4.0, attention_factor=1.3, truncate=False
        ),
        sliding_window=4,
        local_layers=(True, False, True),
        local_rope_theta=50.0,
    )
)


@pytest.fixture(scope="module")
def params() -> dict:
    """Random everywhere, norms and biases too."""
    abstract = unbox(jax.eval_shape(partial(init_boxed, cfg=EVERYTHING), jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), jnp.float32), abstract)


@pytest.fixture(scope="module")
def tensors(params: dict) -> dict[str, np.ndarray]:
    return dict(hf_write.list_tensors(params, EVERYTHING))


def tokens(rng: np.random.Generator, rows: tuple[int, ...], length: int) -> Tokens:
    ids, lengths = rng.integers(0, 64, (*rows, length)), rng.integers(1, length + 1, rows)
    return Tokens(jnp.asarray(ids), jnp.asarray(lengths))


def test_each_behaviour_matters(tensors: dict[str, np.ndarray]) -> None:
    """Or the two tests below would say nothing about it."""
    ids = list(range(20, 35))
    expected = decoder.logits(tensors, EVERYTHING, ids)
    off = {
        **{
            "activation": "silu",
            "qkv_bias": False,
            "out_bias": False,
            "qk_norm": False,
            "norm_plus_one": False,
            "embed_scale": False,
        },
        **{
            "score_dim": None,
            "attn_logit_softcap": None,
            "final_logit_softcap": None,
            "rope_scaling": None,
        },
        **{
            "local_rope_theta": None,
            "local_layers": (False, True, False),
            "sliding_window": 5,
            "rope_theta": 400.0,
        },
    }
    scaling = {"kind": "linear", "attention_factor": 1.0}, {"factor": 2.0}, {"truncate": True}
    scaling = *scaling, {"original_len": 90}, {"beta_fast": 9.0}, {"beta_slow": 2.0}
    scaling = *scaling, {"attention_factor": 1.0}
    cases = list(off.items())
    cases += [
        ("rope_scaling", dataclasses.replace(EVERYTHING.rope_scaling, **change))
        for change in scaling
    ]
    for name, value in cases:
        changed = TransformerConfig(**{**vars(EVERYTHING), name: value})
        assert np.abs(decoder.logits(tensors, changed, ids) - expected).max() > 1e-3, name


def test_packed_tree_equals_separate_sequences(
    params: dict, tensors: dict[str, np.ndarray]
) -> None:
    """Windows end inside contexts, turns and answers, whose slots are not in the order of
    positions."""
    rng = np.random.default_rng(1)
    context, turns, answers = (
        tokens(rng, (2,), 8),
        tokens(rng, (2, 2), 5),
        tokens(rng, (2, 2, 2), 6),
    )
    score = jax.jit(partial(score_answers, model=EVERYTHING))
    scores = score(params, Tree(context, turns, answers))
    for place in np.ndindex(2, 2, 2):
        prefix, answer = row(context, place[0]) + row(turns, *place[:2]), row(answers, *place)
        logps = oracle.log_softmax(decoder.logits(tensors, EVERYTHING, prefix + answer))
        expected = [logps[len(prefix) - 1 + i, token] for i, token in enumerate(answer)]
        np.testing.assert_allclose(
            np.asarray(scores.logps)[place][: len(answer)], expected, atol=5e-5
        )


def test_cached_decoding_equals_repeated_forward(
    params: dict, tensors: dict[str, np.ndarray]
) -> None:
    rng = np.random.default_rng(2)
    context, turn = tokens(rng, (3,), 8), tokens(rng, (3,), 4)
    keys = sample_keys(jax.random.key(0), jnp.arange(3), 2)
    drawn = jax.jit(partial(sample, model=EVERYTHING, sampling=Sampling(0.0, 8, -1)))(
        params, context, turn, keys
    )
    for u, g in np.ndindex(3, 2):
        prefix, ids = row(context, u) + row(turn, u), row(drawn.summaries, u, g)
        logps = oracle.log_softmax(decoder.logits(tensors, EVERYTHING, prefix + ids))[
            len(prefix) - 1 : -1
        ]
        assert ids == logps.argmax(-1).tolist()
        np.testing.assert_allclose(np.asarray(drawn.logps)[u, g], logps.max(-1), atol=5e-5)


@pytest.mark.parametrize("half", [8, 32, 64])
def test_llama3_frequencies(half: int) -> None:
    cfg = TransformerConfig(**{**SIZES, "head_dim": 2 * half}, mlp_dim=8, rope_theta=5e5)
    scaled = TransformerConfig(**{**vars(cfg), "rope_scaling": RopeScaling("llama3", 8.0)})
    found = frequencies(half, 5e5, scaled.rope_scaling)
    np.testing.assert_allclose(found, decoder.inverse_frequencies(scaled, False), rtol=1e-6)
    plain = frequencies(half, 5e5, None)
    kinds = {"kept": np.isclose(found, plain), "divided": np.isclose(found, plain / 8)}
    assert all(x.any() for x in kinds.values()) and not np.all(
        kinds["kept"] | kinds["divided"]
    )  # some lie between


RECORDED = json.loads((Path(__file__).parent / "rope_scalings.json").read_text())


@pytest.mark.parametrize("name", RECORDED["cases"])
def test_scaled_frequencies_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """`inv_freq` and `attention_scaling` of LlamaRotaryEmbedding, recorded for config.json files
    that leave out this and that."""
    case = RECORDED["cases"][name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | case["config"]))
    cfg = hf_config.read_config(tmp_path)
    found = frequencies(cfg.head_dim // 2, cfg.rope_theta, cfg.rope_scaling)
    np.testing.assert_allclose(found, case["inv_freq"], rtol=5e-7)
    np.testing.assert_allclose(cfg.rope_scaling.attention_factor, case["attention_factor"])
    np.testing.assert_allclose(found, decoder.inverse_frequencies(cfg, False), rtol=1e-6)


FAMILIES = ("llama", "llama31_ropescaled", "qwen2", "qwen3", "gemma2", "gemma3_text")


@partial(jax.jit, static_argnames="cfg")
def padded_logits(
    params: dict, ids: jax.Array, positions: jax.Array, valid: jax.Array, *, cfg: TransformerConfig
):
    hidden, _ = Transformer(cfg).apply(
        variables(params), ids, positions, valid, levels=(Level(1, ids.shape[1]),)
    )
    return token_logits(hidden, get_head(params, cfg), softcap=cfg.final_logit_softcap)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family: str) -> None:
    folder = recorded.FOLDER / "models" / family
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    cfg = hf_config.read_config(folder)
    params = hf_io.read_params(folder, cfg)
    io = {name: np.asarray(x) for name, x in np.load(folder / "io.npz").items()}
    for side in ("right", "left"):
        ids, valid = io[f"{side}_input_ids"], io[f"{side}_attention_mask"] == 1
        positions = jnp.asarray(io[f"{side}_position_ids"], jnp.int32)
        found = padded_logits(
            params, jnp.asarray(ids, jnp.int32), positions, jnp.asarray(valid), cfg=cfg
        )
        np.testing.assert_allclose(np.asarray(found)[valid], io[f"{side}_logits"][valid], atol=5e-5)
        logps = oracle.log_softmax(np.asarray(found, np.float64)[:, :-1])
        logps = np.take_along_axis(logps, ids[:, 1:, None], axis=-1)[..., 0]
        counts = io[f"{side}_next_token_mask"] == 1
        np.testing.assert_allclose(logps[counts], io[f"{side}_next_token_logps"][counts], atol=5e-5)
    # 12 greedy tokens through the cache; the prompts are read from the left-padded rows
    lengths = valid.sum(axis=1)
    prompts = np.stack([np.roll(r, n) for r, n in zip(ids, lengths, strict=True)])  # right-padded
    split = lengths - 3
    turn = np.stack([r[n : n + 3] for r, n in zip(prompts, split, strict=True)])
    drawn = jax.jit(partial(sample, model=cfg, sampling=Sampling(0.0, 12, -1)))(
        params,
        Tokens(jnp.asarray(prompts, jnp.int32), jnp.asarray(split, jnp.int32)),
        Tokens(jnp.asarray(turn, jnp.int32), jnp.full(3, 3, jnp.int32)),
        sample_keys(jax.random.key(0), jnp.arange(3), 1),
    )
    np.testing.assert_array_equal(np.asarray(drawn.summaries.ids)[:, 0], io["left_greedy_12"])
