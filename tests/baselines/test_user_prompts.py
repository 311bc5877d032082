"""Soft prompts against texts: a prompt that is made of embeddings of words is that text."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.arrays import PairLogps, Tokens, UserBatch
from popi_jax.baselines.user_prompts import PromptScorer, UserModel
from popi_jax.losses.preference import PreferenceObjective
from popi_jax.models.layout import UNSPLIT
from popi_jax.models.transformer import get_head
from popi_jax.popi.scorer import Scorer
from popi_jax.sharding import make_mesh
from tests.oracles import losses as oracle
from tests.oracles import plain
from tests.oracles.plain import MODEL

USERS, PAIRS, TOKENS = 8, 2, 3
PREFIX = (5, 6)
BETA = 0.5
RNG = np.random.default_rng(0)


def draw(rows: tuple[int, ...], length: int) -> Tokens:
    lengths = RNG.integers(1, length + 1, rows).astype(np.int32)
    ids = RNG.integers(0, MODEL.vocab_size, (*rows, length)).astype(np.int32)
    return Tokens(jnp.asarray(ids), jnp.asarray(lengths))


@pytest.fixture(scope="module")
def batch() -> UserBatch:
    mask = np.ones((USERS, PAIRS), bool)
    mask[1, 1] = False
    return UserBatch(
        index=jnp.arange(USERS, dtype=jnp.int32),
        context=draw((USERS,), 1),
        turns=draw((USERS, PAIRS), 3),
        chosen=draw((USERS, PAIRS), 4),
        rejected=draw((USERS, PAIRS), 4),
        pair_mask=jnp.asarray(mask),
        pair_number=jnp.zeros((USERS, PAIRS), jnp.int32),
    )


def make(kind: str, *, tied: bool, rules=UNSPLIT) -> tuple[PromptScorer, dict]:
    model = dataclasses.replace(MODEL, tied_embeddings=tied, rules=rules)
    users = UserModel(kind, TOKENS, 2)
    scorer = PromptScorer(model, PREFIX, users, PreferenceObjective(beta=BETA))
    return scorer, plain.random_params(0, model)


def score_text(scorer: PromptScorer, weights: dict, ids: jax.Array, batch: UserBatch) -> PairLogps:
    """Behind the same tokens [users TOKENS] as text."""
    head = jnp.broadcast_to(jnp.array(PREFIX), (USERS, len(PREFIX)))
    rows = jnp.concatenate([head, ids], axis=1)[:, None].astype(jnp.int32)
    contexts = Tokens(rows, jnp.full((USERS, 1), rows.shape[-1], jnp.int32))
    found = Scorer(dataclasses.replace(scorer.model, rules=UNSPLIT)).score_pairs(
        weights, contexts, batch
    )
    return jax.tree.map(lambda x: x[:, 0], found)


@pytest.mark.parametrize("tied", [True, False])
def test_a_prompt_of_words_is_that_text(tied, batch):
    scorer, weights = make("individual", tied=tied)
    ids = RNG.integers(0, MODEL.vocab_size, (USERS, TOKENS))
    table = weights["embed"]["embedding"]
    shared = {"generic": table[jnp.array([7, 8, 9])]}
    own = table[ids] - shared["generic"][None]
    found = jax.jit(scorer.score)(weights, shared, own, batch)
    text = jax.jit(partial(score_text, scorer))
    expected = text(weights, ids, batch)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    nobody = jax.jit(scorer.score)(weights, shared, jnp.zeros_like(own), batch)
    told = text(weights, np.tile([7, 8, 9], (USERS, 1)), batch)
    np.testing.assert_allclose(nobody, told, rtol=1e-4, atol=1e-4)


def test_cluster_prompts_are_mixtures(batch):
    scorer, weights = make("cluster", tied=True)
    table = weights["embed"]["embedding"]
    words = np.array([[1, 2, 3], [4, 5, 6]])
    shared = {"clusters": table[words], "generic": jnp.array([0.0, np.log(3.0)])}
    found = scorer.users.make_prompts(shared, jnp.array([[0.0, 0.0], [80.0, 0.0]]))
    np.testing.assert_allclose(
        found[0], 0.25 * table[words[0]] + 0.75 * table[words[1]], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(found[1], table[words[0]], rtol=1e-5, atol=1e-6)


def test_loss_is_dpo_behind_both_prompts(batch):
    """The gradient by a scale of the own parts, against differences of DPO's loss of texts'
    log-probs in numpy."""
    scorer, weights = make("individual", tied=True)
    shared = {"generic": weights["embed"]["embedding"][:TOKENS]}
    direction = jnp.asarray(RNG.normal(size=(USERS, TOKENS, MODEL.embed_dim)), jnp.float32)
    reference = jax.jit(scorer.score_plain)(weights, batch)
    alpha, mask = 0.3, np.asarray(batch.pair_mask)

    score = jax.jit(scorer.score)

    def loss(step: float) -> float:
        total = 0.0
        for share, own in ((alpha, step * direction), (1 - alpha, 0.0 * direction)):
            logps = score(weights, shared, own, batch)
            losses = oracle.dpo(*np.float64(logps), *np.float64(reference), BETA)[0]
            total += share * float(np.sum(np.where(mask, losses, 0).sum(1) / mask.sum(1)))
        return total

    def whole(params):
        return weights, shared, params["step"] * direction

    differentiate = jax.jit(
        lambda params: scorer.differentiate(params, whole, batch, reference, alpha=alpha)[0]
    )
    expected = (loss(0.11) - loss(0.09)) / 0.02
    found = differentiate({"step": jnp.float32(0.1)})["step"]
    np.testing.assert_allclose(found, expected, rtol=0.02)


def test_devices_do_not_matter(batch):
    """The vocabulary and its extra rows are split over devices, and so are the users."""
    scorer, weights = make("individual", tied=True)
    own = jnp.asarray(RNG.normal(size=(USERS, TOKENS, MODEL.embed_dim)), jnp.float32)
    shared = {"generic": jnp.zeros((TOKENS, MODEL.embed_dim))}
    expected = jax.jit(scorer.score)(weights, shared, own, batch)
    split = dataclasses.replace(scorer, model=dataclasses.replace(scorer.model, rules=plain.RULES))
    with jax.set_mesh(make_mesh(1, 2, 4)):
        found = jax.jit(split.score)(weights, shared, own, batch)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_what_is_read_behind_the_vocabulary_is_never_predicted():
    scorer, weights = make("individual", tied=True)
    joined = scorer._join(weights, 9.0 * jnp.ones((1, TOKENS, MODEL.embed_dim)))
    assert joined["embed"]["embedding"].shape == (MODEL.vocab_size + 64, MODEL.embed_dim)
    model = dataclasses.replace(scorer.model, extra_rows=64)
    np.testing.assert_array_equal(get_head(joined, model), weights["embed"]["embedding"].T)
