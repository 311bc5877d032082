"""Log-probs of answers to turns that continue one context, every shared prefix computed once.

The tree context -> turns -> answers is packed into one row of tokens per context. A token sees the
earlier tokens of its own node and all of its ancestors, at the positions that a separate sequence
would have, so the result equals that of scoring each (context, turn, answer) alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from popi_jax.arrays import Params, Tokens
from popi_jax.losses.logprobs import token_logps, token_logps_and_entropy
from popi_jax.models.attention import Level, Levels
from popi_jax.models.packing import Budget, dense, take, to_slots
from popi_jax.models.sharded_vocab import with_head
from popi_jax.models.transformer import Transformer, TransformerConfig, head, variables
from popi_jax.sharding import Axes


class Packed(NamedTuple):
    ids: Int[Array, "batch slots"]
    positions: Int[Array, "batch slots"]
    valid: Bool[Array, "batch slots"]
    levels: Levels


class AnswerLogps(NamedTuple):
    """Log-probs (nats) of every answer token, the mask of those that count, and the entropies where
    asked for."""

    logps: Float[Array, "batch turns answers seq"]
    mask: Bool[Array, "batch turns answers seq"]
    entropies: Float[Array, "batch turns answers seq"] | None = (
        None  # of the distribution that each token is from
    )

    def sums(self) -> Float[Array, "batch turns answers"]:
        return jnp.sum(jnp.where(self.mask, self.logps, 0.0), axis=-1)


def length_mask(tokens: Tokens) -> Bool[Array, "*rows seq"]:
    return (
        jax.lax.broadcasted_iota(jnp.int32, tokens.ids.shape, tokens.ids.ndim - 1)
        < tokens.lengths[..., None]
    )


def pack(context: Tokens, turns: Tokens, answers: Tokens | None = None) -> Packed:
    """Lays a tree out as [context | turns | answers].

    Shapes: [batch seq], [batch turns seq], [batch turns answers seq].
    """
    batch, context_len = context.ids.shape
    _, num_turns, turn_len = turns.ids.shape
    if answers is None:
        answers = Tokens(
            jnp.zeros((batch, num_turns, 0, 0), jnp.int32),
            jnp.zeros((batch, num_turns, 0), jnp.int32),
        )
    num_answers, answer_len = answers.ids.shape[2:]
    turn_start = context.lengths[:, None] + jnp.zeros_like(turns.lengths)
    answer_start = (context.lengths[:, None] + turns.lengths)[..., None] + jnp.zeros_like(
        answers.lengths
    )

    def flat(*parts: Array) -> Array:
        return jnp.concatenate([part.reshape(batch, -1) for part in parts], axis=1)

    ids = flat(context.ids, turns.ids, answers.ids)
    positions = flat(
        jnp.broadcast_to(jnp.arange(context_len)[None, :], (batch, context_len)),
        turn_start[..., None] + jnp.arange(turn_len)[None, None, :],
        answer_start[..., None] + jnp.arange(answer_len)[None, None, None, :],
    )
    valid = flat(length_mask(context), length_mask(turns), length_mask(answers))
    levels = (
        Level(1, context_len),
        Level(num_turns, turn_len),
        Level(num_turns * num_answers, answer_len),
    )
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
    budget: Budget | None = None,
) -> AnswerLogps:
    """Log-probs of each answer given its context and turn, and with `entropies` those too.

    The LM head is applied at the positions that predict an answer token, nowhere else. A turn has
    at least one token. With a budget, which the tree must fit (`dense.within`), padding runs
    neither through the layers nor the head."""
    settings: Any = {
        "model": model,
        "temperature": temperature,
        "entropies": entropies,
        "budget": budget,
    }
    return _scored(params, context, turns, answers, **settings, twin=False)[0]


def answer_logps_of_both(
    params: Params,
    context: Tokens,
    turns: Tokens,
    answers: Tokens,
    *,
    model: TransformerConfig,
    temperature: float = 1.0,
    entropies: bool = False,
    budget: Budget | None = None,
) -> tuple[AnswerLogps, AnswerLogps]:
    """`answer_logps` of a base with adapters and, without gradient and entropies, of the base
    alone: one pass over the layers for both. `params` as lora.join makes them."""
    settings: Any = {
        "model": model,
        "temperature": temperature,
        "entropies": entropies,
        "budget": budget,
    }
    scores, of_base = _scored(params, context, turns, answers, **settings, twin=True)
    return scores, jax.lax.stop_gradient(of_base)


def _scored(
    params: Params,
    context: Tokens,
    turns: Tokens,
    answers: Tokens,
    *,
    model: TransformerConfig,
    temperature: float,
    entropies: bool,
    budget: Budget | None,
    twin: bool,
) -> list[AnswerLogps]:
    """Of the model, and with `twin` of its base."""
    # the last token of an answer is predicted, never read
    answer_len = answers.ids.shape[-1]
    read = Tokens(answers.ids[..., :-1], jnp.minimum(answers.lengths, answer_len - 1))
    packed, mask = pack(context, turns, read), length_mask(answers)
    at = None if budget is None else dense(packed.valid, budget.tokens, budget.shards)
    apply: Any = Transformer(model).apply
    hidden, _ = apply(variables(params), *packed[:3], levels=packed.levels, at=at, twin=twin)
    streams = hidden if twin else (hidden,)
    if at is None or budget is None:
        states = tuple(
            _predictors(x, context, turns, answers).reshape(mask.shape[0], -1, x.shape[-1])
            for x in streams
        )
        ids, scored = answers.ids.reshape(mask.shape[0], -1), None
    else:
        scored = dense(mask.reshape(mask.shape[0], -1), budget.answers, budget.shards)
        slots = _predictor_slots(context, turns, answers, packed, budget.shards).reshape(
            scored.valid.shape
        )
        places = take(at.place_of, take(slots, scored.slot_of))
        states = tuple(take(x, places) for x in streams)
        ids = take(answers.ids.reshape(scored.valid.shape), scored.slot_of)
    settings: Any = {"temperature": temperature, "softcap": model.final_logit_softcap}

    def score(
        head: Array, states: tuple[Array, ...], ids: Array, vocab_axes: Axes
    ) -> list[tuple[Array, ...]]:
        more: Any = {**settings, "vocab_axes": vocab_axes}
        found = [(token_logps(x, head, ids, **more),) for x in states[1:]]
        if entropies:
            return [token_logps_and_entropy(states[0], head, ids, **more), *found]
        return [(token_logps(states[0], head, ids, **more),), *found]

    found = with_head(score, head(params, model), states, ids, model.rules)

    def to_answers(x: Array) -> Array:
        return (x if scored is None else to_slots(x, scored)).reshape(mask.shape)

    return [AnswerLogps(to_answers(x[0]), mask, *map(to_answers, x[1:])) for x in found]


def _predictors(
    hidden: Float[Array, "batch slots embed"], context: Tokens, turns: Tokens, answers: Tokens
) -> Float[Array, "batch turns answers seq embed"]:
    """The states that predict each answer token: of its turn's last token, then of the answer token
    before."""
    batch, context_len = context.ids.shape
    _, num_turns, turn_len = turns.ids.shape
    num_answers, answer_len = answers.ids.shape[2:]
    dim = hidden.shape[-1]
    of_turns = hidden[:, context_len : context_len + num_turns * turn_len].reshape(
        batch, num_turns, turn_len, dim
    )
    last = jnp.maximum(turns.lengths - 1, 0)
    first = jnp.take_along_axis(of_turns, last[..., None, None], axis=2)[
        :, :, None
    ]  # [batch turns 1 1 embed]
    of_answers = hidden[:, context_len + num_turns * turn_len :].reshape(
        batch, num_turns, num_answers, answer_len - 1, dim
    )
    return jnp.concatenate(
        [jnp.broadcast_to(first, (*of_answers.shape[:3], 1, dim)), of_answers], axis=3
    )


def _predictor_slots(
    context: Tokens, turns: Tokens, answers: Tokens, packed: Packed, shards: int
) -> Int[Array, "batch turns answers seq"]:
    """The slots of these states, counted through all rows of a shard."""
    context_len, (_, num_turns, turn_len) = context.ids.shape[1], turns.ids.shape
    row, turn, answer, token = (
        jax.lax.broadcasted_iota(jnp.int32, answers.ids.shape, axis) for axis in range(4)
    )
    last = context_len + turn * turn_len + jnp.maximum(turns.lengths - 1, 0)[..., None, None]
    nodes = turn * answers.ids.shape[2] + answer
    before = context_len + num_turns * turn_len + nodes * (answers.ids.shape[3] - 1) + token - 1
    batch, slots = packed.ids.shape
    return jnp.where(token == 0, last, before) + row % (batch // shards) * slots
