"""Log-probs of answers to turns that continue one context, every shared prefix computed once.

The tree context -> turns -> answers is packed into one row of tokens per context. A token sees the earlier tokens of
its own node and all of its ancestors, at the positions that a separate sequence would have, so the result equals that
of scoring each (context, turn, answer) alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from popi_jax.arrays import Params, Tokens
from popi_jax.losses.logprobs import token_logps, token_logps_and_entropy
from popi_jax.models.attention import Level, Levels
from popi_jax.models.transformer import Transformer, TransformerConfig, head, variables


class Packed(NamedTuple):
    ids: Int[Array, "batch slots"]
    positions: Int[Array, "batch slots"]
    valid: Bool[Array, "batch slots"]
    levels: Levels


class AnswerLogps(NamedTuple):
    """Log-probs (nats) of every answer token, the mask of those that count, and the entropies where asked for."""

    logps: Float[Array, "batch turns answers seq"]
    mask: Bool[Array, "batch turns answers seq"]
    entropies: Float[Array, "batch turns answers seq"] | None = None  # of the distribution that each token is from

    def sums(self) -> Float[Array, "batch turns answers"]:
        return jnp.sum(jnp.where(self.mask, self.logps, 0.0), axis=-1)


def length_mask(tokens: Tokens) -> Bool[Array, "*rows seq"]:
    return jax.lax.broadcasted_iota(jnp.int32, tokens.ids.shape, tokens.ids.ndim - 1) < tokens.lengths[..., None]


def pack(context: Tokens, turns: Tokens, answers: Tokens | None = None) -> Packed:
    """Lays a tree out as [context | turns | answers].

    Shapes: [batch seq], [batch turns seq], [batch turns answers seq].
    """
    batch, context_len = context.ids.shape
    _, num_turns, turn_len = turns.ids.shape
    if answers is None:
        answers = Tokens(jnp.zeros((batch, num_turns, 0, 0), jnp.int32), jnp.zeros((batch, num_turns, 0), jnp.int32))
    num_answers, answer_len = answers.ids.shape[2:]
    turn_start = context.lengths[:, None] + jnp.zeros_like(turns.lengths)
    answer_start = (context.lengths[:, None] + turns.lengths)[..., None] + jnp.zeros_like(answers.lengths)

    def flat(*parts: Array) -> Array:
        return jnp.concatenate([part.reshape(batch, -1) for part in parts], axis=1)

    ids = flat(context.ids, turns.ids, answers.ids)
    positions = flat(
        jnp.broadcast_to(jnp.arange(context_len)[None, :], (batch, context_len)),
        turn_start[..., None] + jnp.arange(turn_len)[None, None, :],
        answer_start[..., None] + jnp.arange(answer_len)[None, None, None, :],
    )
    valid = flat(length_mask(context), length_mask(turns), length_mask(answers))
    levels = Level(1, context_len), Level(num_turns, turn_len), Level(num_turns * num_answers, answer_len)
    return Packed(ids, positions, valid, levels)


def answer_logps(
    params: Params,
    context: Tokens,
    turns: Tokens,
    answers: Tokens,
    *,
    model: TransformerConfig,
    temperature: float = 1.0,
    entropies: bool = False,
) -> AnswerLogps:
    """Log-probs of each answer given its context and turn, and with `entropies` those too.

    The LM head is applied at the positions that predict an answer token, nowhere else. A turn has at least one token.
    """
    batch, context_len = context.ids.shape
    _, num_turns, turn_len = turns.ids.shape
    num_answers, answer_len = answers.ids.shape[2:]
    # the last token of an answer is predicted, never read
    read = Tokens(answers.ids[..., :-1], jnp.minimum(answers.lengths, answer_len - 1))
    packed = pack(context, turns, read)
    hidden, _ = Transformer(model).apply(variables(params), *packed[:3], levels=packed.levels)
    dim = hidden.shape[-1]
    of_turns = hidden[:, context_len : context_len + num_turns * turn_len].reshape(batch, num_turns, turn_len, dim)
    last = jnp.maximum(turns.lengths - 1, 0)
    first = jnp.take_along_axis(of_turns, last[..., None, None], axis=2)[:, :, None]  # [batch turns 1 1 embed]
    of_answers = hidden[:, context_len + num_turns * turn_len :].reshape(
        batch, num_turns, num_answers, answer_len - 1, dim
    )
    first = jnp.broadcast_to(first, (batch, num_turns, num_answers, 1, dim))
    predictors = jnp.concatenate([first, of_answers], axis=3)
    score = token_logps_and_entropy if entropies else token_logps
    kernel, softcap = head(params, model), model.final_logit_softcap
    scores = score(predictors, kernel, answers.ids, temperature=temperature, softcap=softcap)
    logps, entropy = scores if entropies else (scores, None)
    return AnswerLogps(logps, length_mask(answers), entropy)
