"""Summaries of users, sampled, and how they enter the generator's prompt."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from popi_jax.arrays import Params, Rollouts, Tokens, UserBatch
from popi_jax.models import decode
from popi_jax.models.packing import Budgets
from popi_jax.models.transformer import TransformerConfig, lay_out_for_rollout
from popi_jax.popi.scorer import map_microbatches, repeat_ids


class PromptTokens(NamedTuple):
    """Token ids of the conversation templates that do not depend on the user."""

    generator_prefix: tuple[int, ...]  # all that comes before a summary in the generator's context
    summary_turn: tuple[int, ...]  # from the end of the signals to the header of the summary


def splice(prefix: tuple[int, ...], summaries: Tokens, finished: Bool[Array, "*rows"]) -> Tokens:
    """The generator's contexts: `prefix`, all that comes before a summary in its conversation, then
    the summary without its end token."""
    head = repeat_ids(prefix, summaries.lengths.shape).ids
    ids = jnp.concatenate([head, summaries.ids], axis=-1)
    return Tokens(ids, len(prefix) + summaries.lengths - finished.astype(jnp.int32))


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Samples summaries of the signals of users."""

    model: TransformerConfig
    summary_turn: tuple[int, ...]  # what asks for a summary: up to the header of the answer
    sampling: decode.Sampling
    microbatches: int = 1
    budgets: Budgets | None = None  # None: all is computed with its padding

    @jax.named_scope("sampling")
    def sample(
        self, params: Params, users: UserBatch, key: Key[Array, ""], group_size: int
    ) -> Rollouts:
        """G summaries for each user, behind one copy of the signals. The key of a summary is folded
        from `key`, the number of its example and its number in the group: devices and microbatches
        do not matter."""
        weights = lay_out_for_rollout(params, self.model)  # once for all microbatches

        def sample(part: UserBatch) -> Rollouts:
            keys = decode.sample_keys(key, part.index, group_size)
            turn = repeat_ids(self.summary_turn, part.index.shape)
            budget = self.budgets and self.budgets.for_sampling()
            draw = partial(decode.sample, model=self.model, sampling=self.sampling)
            return draw(weights, part.context, turn, keys, budget=budget)

        return map_microbatches(sample, users, self.microbatches)
