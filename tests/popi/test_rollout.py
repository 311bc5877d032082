"""The summary inside the generator's prompt, as tokens and as text, and scores of pairs behind
it."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.arrays import Rollouts, Tokens, UserBatch
from popi_jax.data import prompts
from popi_jax.data import tokenizer as tokenizer_lib
from popi_jax.models.packing import length_mask
from popi_jax.popi import rollout
from popi_jax.popi.scorer import Scorer, repeat_ids
from tests.oracles import plain
from tests.oracles.plain import MODEL

SUMMARIES = ["likes short answers", "warm tone ; plain words ; likes jokes"]
PROMPT = "how do bees sleep ?"


def padded(rows: list[list[int]], length: int, fill: int) -> Tokens:
    ids = [row + [fill] * (length - len(row)) for row in rows]
    return Tokens(jnp.asarray(ids), jnp.asarray([len(row) for row in rows]))


@pytest.fixture(scope="module")
def tokenizer() -> tokenizer_lib.Tokenizer:
    return tokenizer_lib.train([*SUMMARIES, PROMPT, "answer so that it suits the user :"], 340)


@pytest.mark.parametrize("instruction", ["", "answer so that it suits the user :"])
def test_the_splice_is_the_conversation_of_the_template(
    tokenizer: tokenizer_lib.Tokenizer, instruction: str
) -> None:
    model = types.SimpleNamespace(answer_instruction=instruction, answer_template="")
    cfg = types.SimpleNamespace(model=model)
    prefix = tuple(prompts.render_generator_prefix(tokenizer, cfg))
    length = 48
    written = [prompts.encode_answer(tokenizer, text) for text in SUMMARIES]
    written.append([*tokenizer.encode(SUMMARIES[0])])  # cut at the limit: no end token to leave out
    finished = jnp.array([True, True, False])
    spliced = jax.jit(partial(rollout.splice, prefix))(
        padded(written, length, tokenizer.eos_id), finished
    )
    turn = prompts.render_generator_turn(tokenizer, [{"role": "user", "content": PROMPT}])
    for i, text in enumerate([*SUMMARIES, SUMMARIES[0]]):
        system = f"{instruction}\n{text}" if instruction else text
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": PROMPT + prompts._CUT},
        ]
        before, after = tokenizer.render(messages, cut=prompts._CUT)
        assert tokenizer.eos_id not in plain.row(spliced, i)[len(prefix) :]
        whole = plain.row(spliced, i) + turn
        expected = [*before, *after]
        if (
            not instruction
        ):  # the text that follows a cut is encoded on its own: only then are the ids the same
            assert whole == expected
        assert tokenizer.decode(whole).split() == tokenizer.decode(expected).split()


def test_an_empty_summary_is_the_prefix_alone(tokenizer: tokenizer_lib.Tokenizer) -> None:
    prefix = (1, 2, 3)
    nothing = Tokens(
        jnp.full((2, 4), tokenizer.eos_id), jnp.ones(2, jnp.int32)
    )  # the end token at once
    spliced = rollout.splice(prefix, nothing, jnp.array([True, True]))
    empty = repeat_ids(prefix, (2,))
    assert (
        [plain.row(spliced, i) for i in range(2)]
        == [plain.row(empty, i) for i in range(2)]
        == [[1, 2, 3]] * 2
    )


class Users:
    """Random users, and summaries of them."""

    def __init__(self, num_users: int = 4, pairs: int = 2, group: int = 2) -> None:
        self.rng = np.random.default_rng(0)
        self.batch = UserBatch(
            index=jnp.arange(num_users),
            context=self.tokens((num_users,), 8),
            turns=self.tokens((num_users, pairs), 5),
            chosen=self.tokens((num_users, pairs), 4),
            rejected=self.tokens((num_users, pairs), 4),
            pair_mask=jnp.ones((num_users, pairs), bool),
            pair_number=jnp.arange(num_users * pairs).reshape(num_users, pairs),
        )
        self.summaries = self.tokens((num_users, group), 4)
        self.glue = rollout.PromptTokens((1, 2, 3), (4, 5))

    def tokens(self, rows: tuple[int, ...], length: int) -> Tokens:
        lengths = self.rng.integers(1, length + 1, rows)
        return Tokens(jnp.asarray(self.rng.integers(0, 64, (*rows, length))), jnp.asarray(lengths))


def test_pairs_are_scored_behind_prefix_summary_and_prompt() -> None:
    users, params = Users(), plain.random_params(0)
    unfinished = jnp.zeros(users.summaries.lengths.shape, bool)
    contexts = rollout.splice(users.glue.generator_prefix, users.summaries, unfinished)
    found = jax.jit(Scorer(MODEL).score_pairs)(params, contexts, users.batch)
    places = list(np.ndindex(*found.chosen.shape))
    sequences = []
    for u, g, k in places:
        prefix = [1, 2, 3, *plain.row(users.summaries, u, g), *plain.row(users.batch.turns, u, k)]
        for replies in (users.batch.chosen, users.batch.rejected):
            sequences.append(plain.Scored(prefix, plain.row(replies, u, k)))
    logps, _ = plain.logps_and_pullback(params, sequences)
    sums = np.array([x.sum() for x in logps]).reshape(*found.chosen.shape, 2)
    np.testing.assert_allclose(found.chosen, sums[..., 0], atol=1e-4)
    np.testing.assert_allclose(found.rejected, sums[..., 1], atol=1e-4)


def test_summaries_are_scored_behind_the_signals() -> None:
    users, params = Users(), plain.random_params(0)
    rollouts = Rollouts(users.summaries, jnp.ones((4, 2), bool), jnp.zeros((4, 2, 4)))
    scorer = Scorer(MODEL, users.glue.summary_turn, temperature=1.3)
    score = jax.jit(scorer.score_summaries)
    found, mask = score(params, users.batch, rollouts), length_mask(rollouts.summaries)
    places = list(np.ndindex(4, 2))
    sequences = [
        plain.Scored([*plain.row(users.batch.context, u), 4, 5], plain.row(users.summaries, u, g))
        for u, g in places
    ]
    logps, _ = plain.logps_and_pullback(params, sequences, temperature=1.3)
    for place, expected in zip(places, logps, strict=True):
        assert np.asarray(mask)[place].sum() == len(expected)
        np.testing.assert_allclose(np.asarray(found)[place][: len(expected)], expected, atol=1e-4)


def test_without_a_summary_the_prompts_follow_the_prefix() -> None:
    users, params = Users(), plain.random_params(0)
    context = repeat_ids(users.glue.generator_prefix, (4, 1))
    found = jax.jit(Scorer(MODEL).score_pairs)(params, context, users.batch)
    assert found.chosen.shape == (4, 1, 2)
    sequences = [
        plain.Scored(
            [1, 2, 3, *plain.row(users.batch.turns, u, k)], plain.row(users.batch.rejected, u, k)
        )
        for u, k in np.ndindex(4, 2)
    ]
    logps, _ = plain.logps_and_pullback(params, sequences)
    np.testing.assert_allclose(
        found.rejected[:, 0].reshape(-1), [x.sum() for x in logps], atol=1e-4
    )
