"""The packed tree scores every answer as if it stood alone behind its context and turn."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.arrays import Tokens
from popi_jax.models import packing
from popi_jax.models.transformer import TransformerConfig
from popi_jax.popi import scorer
from tests.oracles import losses as oracle
from tests.oracles import plain
from tests.oracles.plain import MODEL

BATCH, TURNS, ANSWERS = 2, 3, 2
CONTEXT_LEN, TURN_LEN, ANSWER_LEN = 8, 5, 4


class RandomTree:
    """A random tree whose padding holds random ids."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.context = self.tokens((BATCH,), CONTEXT_LEN)
        self.turns = self.tokens((BATCH, TURNS), TURN_LEN)
        self.answers = self.tokens((BATCH, TURNS, ANSWERS), ANSWER_LEN)
        self.weights = self.rng.normal(size=self.answers.ids.shape).astype(np.float32)

    def tokens(self, rows: tuple[int, ...], length: int) -> Tokens:
        lengths = self.rng.integers(1, length + 1, rows)
        return Tokens(jnp.asarray(self.rng.integers(0, 64, (*rows, length))), jnp.asarray(lengths))

    def alone(self) -> tuple[list[tuple[int, int, int]], list[plain.Scored]]:
        places = list(np.ndindex(BATCH, TURNS, ANSWERS))
        prefixes = [plain.row(self.context, b) + plain.row(self.turns, b, t) for b, t, _ in places]
        answers = [plain.row(self.answers, *place) for place in places]
        return places, [plain.Scored(p, a) for p, a in zip(prefixes, answers, strict=True)]


def grad_program(model: TransformerConfig):
    """Jitted (params, context, turns, answers, weights) -> gradient of the weighted sum,
    (log-probs, mask)."""

    def total(params, context, turns, answers, weights):
        tree = packing.Tree(context, turns, answers)
        scores = scorer.score_answers(params, tree, model=model)
        return jnp.sum(jnp.where(scores.mask, scores.logps, 0.0) * weights), scores

    return jax.jit(jax.grad(total, has_aux=True))


@pytest.fixture(scope="module")
def params() -> dict:
    return plain.random_params(0)


@pytest.fixture(scope="module")
def packed():
    program = grad_program(MODEL)

    def run(params: dict, tree: RandomTree):
        return program(params, tree.context, tree.turns, tree.answers, jnp.asarray(tree.weights))

    return run


def assert_close(a: dict, b: dict, atol: float = 2e-4) -> None:
    def check(path: tuple, x: jax.Array, y: jax.Array) -> None:
        np.testing.assert_allclose(x, y, atol=atol, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, a, b)


@pytest.mark.parametrize("seed", range(5))
def test_equals_each_answer_alone(seed: int, params: dict, packed) -> None:
    tree = RandomTree(seed)
    grads, scores = packed(params, tree)
    places, sequences = tree.alone()
    weights = [
        tree.weights[place][: len(s.answer)] for place, s in zip(places, sequences, strict=True)
    ]
    logps, expected_grads = plain.logps_and_pullback(params, sequences, weights)
    for place, s, expected in zip(places, sequences, logps, strict=True):
        mask = np.asarray(scores.mask)[place]
        assert mask.tolist() == [i < len(s.answer) for i in range(ANSWER_LEN)]
        np.testing.assert_allclose(np.asarray(scores.logps)[place][mask], expected, atol=5e-5)
        np.testing.assert_allclose(scores.sums()[place], expected.sum(), atol=1e-4)
    assert_close(grads, expected_grads)


def test_equals_float64(params: dict, packed) -> None:
    tree = RandomTree(7)
    _, scores = packed(params, tree)
    for place, s in zip(*tree.alone(), strict=True):
        logps = oracle.log_softmax(plain.logits(params, MODEL, s.prefix + s.answer))
        n = len(s.prefix)
        expected = [logps[n - 1 + i, token] for i, token in enumerate(s.answer)]
        np.testing.assert_allclose(
            np.asarray(scores.logps)[place][: len(s.answer)], expected, atol=5e-5
        )


def test_padding_ids_do_not_matter(params: dict, packed) -> None:
    tree = RandomTree(1)
    grads, scores = packed(params, tree)
    for name in ("context", "turns", "answers"):
        tokens = getattr(tree, name)
        ids = np.where(
            packing.length_mask(tokens), tokens.ids, tree.rng.integers(0, 64, tokens.ids.shape)
        )
        setattr(tree, name, Tokens(jnp.asarray(ids), tokens.lengths))
    grads_again, again = packed(params, tree)
    mask = np.asarray(scores.mask)
    np.testing.assert_array_equal(np.asarray(again.logps)[mask], np.asarray(scores.logps)[mask])
    assert_close(grads_again, grads, atol=1e-5)


def test_a_token_depends_on_its_own_past_alone(params: dict, packed) -> None:
    """Every slot of row 0 has its own id, so a row of the embedding's gradient is the gradient by
    that slot's input."""
    tree = RandomTree(2)
    sizes = [CONTEXT_LEN, TURNS * TURN_LEN, TURNS * ANSWERS * ANSWER_LEN]
    ids = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    for name, own, full in zip(
        ("context", "turns", "answers"), ids, (CONTEXT_LEN, TURN_LEN, ANSWER_LEN), strict=True
    ):
        tokens = getattr(tree, name)
        unique = np.full(tokens.ids.shape, 63)
        unique[0] = own.reshape(tokens.ids.shape[1:])
        setattr(tree, name, Tokens(jnp.asarray(unique), jnp.full_like(tokens.lengths, full)))
    places = [(0, t, a, i) for t, a, i in np.ndindex(TURNS, ANSWERS, ANSWER_LEN)]
    for place in places[:: TURNS + 2]:
        tree.weights = np.zeros_like(tree.weights)
        tree.weights[place] = 1.0
        grads, _ = packed(params, tree)
        moved = np.flatnonzero(np.abs(np.asarray(grads["embed"]["embedding"])).max(axis=1) > 0)
        _, t, a, i = place
        past = [*tree.context.ids[0], *tree.turns.ids[0, t], *tree.answers.ids[0, t, a, :i]]
        assert moved.tolist() == sorted(int(x) for x in past)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputing_and_chunks_of_queries_change_nothing(
    remat: str, params: dict, packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of whole nodes, of one node and of parts of one here, and one a level in what it is
    compared with."""
    monkeypatch.setattr("popi_jax.models.attention.QUERY_CHUNK", 6)
    tree = RandomTree(3)
    model = TransformerConfig(**{**vars(MODEL), "remat": remat})
    arguments = (params, tree.context, tree.turns, tree.answers, jnp.asarray(tree.weights))
    grads, scores = grad_program(model)(*arguments)
    expected_grads, expected = packed(params, tree)
    np.testing.assert_allclose(scores.logps, expected.logps, atol=1e-5)
    assert_close(grads, expected_grads, atol=1e-4)


def test_the_temperature_divides_the_logits(params: dict) -> None:
    tree = RandomTree(4)
    score = jax.jit(partial(scorer.score_answers, model=MODEL, temperature=0.5))
    scores = score(params, packing.Tree(tree.context, tree.turns, tree.answers))
    places, sequences = tree.alone()
    logps, _ = plain.logps_and_pullback(params, sequences, temperature=0.5)
    for place, expected in zip(places, logps, strict=True):
        np.testing.assert_allclose(
            np.asarray(scores.logps)[place][: len(expected)], expected, atol=1e-4
        )
