"""What each role does, as pure functions: write summaries of users, score pairs behind a summary.
No gradients here."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from popi_jax.arrays import Params, Rollouts, Tokens, UserBatch
from popi_jax.losses.preference import PairLengths, PairLogps
from popi_jax.models.decode import sample, sample_keys
from popi_jax.models.packing import Budget
from popi_jax.models.sampling import Sampling
from popi_jax.models.transformer import TransformerConfig
from popi_jax.popi.scorer import AnswerLogps, answer_logps, answer_logps_of_both


class Glue(NamedTuple):
    """Token ids of the conversation templates that do not depend on the user."""

    generator_prefix: tuple[int, ...]  # all that comes before a summary in the generator's context
    summary_turn: tuple[int, ...]  # from the end of the signals to the header of the summary


class Budgets(NamedTuple):
    """Tokens that the users of one shard have, as a rule; for rows without padding (dense.py)."""

    shards: int  # parts of the users while training
    rollout_shards: int  # and while sampling
    rollout_signals: (
        int  # of users of such a part: the inference model's contexts, and what asks for a summary
    )
    signals: int  # the same of users of a part while training
    contexts: int  # the generator's, each with a summary of full length
    summaries: int  # one of each user
    pairs: int  # prompts, and both replies to each
    answers: int  # the replies alone


class Tree(NamedTuple):
    """Answers to turns that continue one context, as scoring.py takes them."""

    context: Tokens  # [batch seq]
    turns: Tokens  # [batch turns seq]
    answers: Tokens  # [batch turns answers seq]


class TokenScores(NamedTuple):
    """Of each token of sampled summaries at the sampling temperature, in nats; entropies only where
    asked for."""

    logps: Float[Array, "users group seq"]
    mask: Bool[Array, "users group seq"]
    entropies: Float[Array, "users group seq"] | None


def constant_turn(ids: tuple[int, ...], batch: int) -> Tokens:
    row = jnp.asarray(ids, jnp.int32)
    return Tokens(
        jnp.broadcast_to(row[None, :], (batch, len(ids))), jnp.full((batch,), len(ids), jnp.int32)
    )


def splice(prefix: tuple[int, ...], summaries: Tokens, finished: Bool[Array, "*rows"]) -> Tokens:
    """The generator's contexts: prefix, then the summary without its end token."""
    rows = summaries.lengths.shape
    head = jnp.broadcast_to(jnp.asarray(prefix, jnp.int32), (*rows, len(prefix)))
    ids = jnp.concatenate([head, summaries.ids], axis=-1)
    return Tokens(ids, len(prefix) + summaries.lengths - finished.astype(jnp.int32))


def empty_summary(prefix: tuple[int, ...], batch: int) -> Tokens:
    """The generator's context when nothing is known of the user."""
    return constant_turn(prefix, batch)


def rollout(
    params: Params,
    users: UserBatch,
    key: Key[Array, ""],
    *,
    model: TransformerConfig,
    glue: Glue,
    sampling: Sampling,
    group_size: int,
    budgets: Budgets | None = None,
) -> Rollouts:
    """G summaries for each user; the signals are prefilled once and shared."""
    batch = users.index.shape[0]
    keys = sample_keys(key, users.index, group_size)
    turn = constant_turn(glue.summary_turn, batch)
    budget = None if budgets is None else Budget(budgets.rollout_signals, 0, budgets.rollout_shards)
    return sample(params, users.context, turn, keys, model=model, sampling=sampling, budget=budget)


def pair_tree(contexts: Tokens, users: UserBatch) -> Tree:
    """Prompts behind each of a user's contexts [users group seq], both replies behind each
    prompt."""
    num_users, group, _ = contexts.ids.shape

    def rows(
        tokens: Tokens,
    ) -> Tokens:  # repeats what belongs to a user for each of the user's contexts
        return jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), tokens)

    flat = jax.tree.map(lambda x: x.reshape(num_users * group, *x.shape[2:]), contexts)
    answers = jax.tree.map(lambda *x: jnp.stack(x, axis=2), users.chosen, users.rejected)
    return Tree(flat, rows(users.turns), rows(answers))


def pair_budget(budgets: Budgets | None, group: int) -> Budget | None:
    """Of `pair_tree` with contexts that hold a summary each."""
    if budgets is None:
        return None
    return Budget(
        group * (budgets.contexts + budgets.pairs), group * budgets.answers, budgets.shards
    )


def pair_logps(
    params: Params,
    contexts: Tokens,
    users: UserBatch,
    *,
    model: TransformerConfig,
    budget: Budget | None = None,
) -> PairLogps:
    """Log-probs of each user's chosen and rejected replies behind each of the user's contexts
    [users group seq].

    Returns [users group pairs].
    """
    return _of_pairs(
        answer_logps(params, *pair_tree(contexts, users), model=model, budget=budget),
        contexts,
        users,
    )


def pair_logps_of_both(
    params: Params,
    contexts: Tokens,
    users: UserBatch,
    *,
    model: TransformerConfig,
    budget: Budget | None = None,
) -> tuple[PairLogps, PairLogps]:
    """`pair_logps` of a base with adapters and of the base alone, see
    scoring.answer_logps_of_both."""
    both = answer_logps_of_both(params, *pair_tree(contexts, users), model=model, budget=budget)
    return _of_pairs(both[0], contexts, users), _of_pairs(both[1], contexts, users)


def _of_pairs(scores: AnswerLogps, contexts: Tokens, users: UserBatch) -> PairLogps:
    sums = scores.sums().reshape(*contexts.lengths.shape, users.pair_mask.shape[1], 2)
    return PairLogps(sums[..., 0], sums[..., 1])


def pair_lengths(users: UserBatch) -> PairLengths:
    """Tokens of each user's replies: [users 1 pairs], the same behind every context."""
    return PairLengths(users.chosen.lengths[:, None], users.rejected.lengths[:, None])


def summary_tree(users: UserBatch, rollouts: Rollouts, *, glue: Glue) -> Tree:
    """All G summaries of a user behind one copy of the signals."""
    turns = jax.tree.map(
        lambda x: x[:, None], constant_turn(glue.summary_turn, users.index.shape[0])
    )
    return Tree(users.context, turns, jax.tree.map(lambda x: x[:, None], rollouts.summaries))


def summary_budget(budgets: Budgets | None, group: int) -> Budget | None:
    """Of `summary_tree`."""
    if budgets is None:
        return None
    return Budget(
        budgets.signals + group * budgets.summaries, group * budgets.summaries, budgets.shards
    )


def summary_logps(
    params: Params,
    users: UserBatch,
    rollouts: Rollouts,
    *,
    model: TransformerConfig,
    glue: Glue,
    temperature: float,
    entropies: bool = False,
    budget: Budget | None = None,
) -> TokenScores:
    """Log-probs of sampled summaries; the mask holds the end token."""
    tree = summary_tree(users, rollouts, glue=glue)
    scores = answer_logps(
        params, *tree, model=model, temperature=temperature, entropies=entropies, budget=budget
    )
    return _of_summaries(scores)


def summary_logps_of_both(
    params: Params,
    users: UserBatch,
    rollouts: Rollouts,
    *,
    model: TransformerConfig,
    glue: Glue,
    temperature: float,
    entropies: bool = False,
    budget: Budget | None = None,
) -> tuple[TokenScores, TokenScores]:
    """`summary_logps` of a base with adapters and of the base alone, see
    scoring.answer_logps_of_both."""
    tree = summary_tree(users, rollouts, glue=glue)
    settings: Any = {
        "model": model,
        "temperature": temperature,
        "entropies": entropies,
        "budget": budget,
    }
    scores, of_base = answer_logps_of_both(params, *tree, **settings)
    return _of_summaries(scores), _of_summaries(of_base)


def _of_summaries(scores: AnswerLogps) -> TokenScores:
    return TokenScores(*jax.tree.map(lambda x: x[:, 0], tuple(scores)))
