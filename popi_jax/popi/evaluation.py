"""The two programs of an evaluation: summaries are drawn, and pairs scored behind texts.

Parameters are arguments; what is static is the model, its prompt and how many tokens a batch holds,
so each is compiled once per shape."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from popi_jax.arrays import Params, Tokens
from popi_jax.models import decode
from popi_jax.models.decode import Sampling
from popi_jax.models.packing import Budget, Tree, spares_padding
from popi_jax.models.transformer import TransformerConfig, lay_out_for_rollout
from popi_jax.popi.scorer import repeat_ids, score_answers

SUMMARY_KEY = 3  # folded into the key of the seed; training uses 0 to 2


@partial(jax.jit, static_argnames=("model", "turn", "sampling", "budget"), out_shardings=P())
@jax.named_scope("sampling")
def draw_summaries(
    params: Params,
    context: Tokens,
    index: Array,
    seed: Array,
    *,
    model: TransformerConfig,
    turn: tuple[int, ...],
    sampling: Sampling,
    budget: Budget | None,
) -> Tokens:
    """Summaries [users temperatures seq] of signals [users seq], without end tokens; every process
    gets all. The key of a draw is folded from the number of the user, and from how many draws of
    the user at the same temperature come before it."""
    key = jax.random.fold_in(jax.random.key(seed), SUMMARY_KEY)
    heats = sampling.temperatures
    before = jnp.array([heats[:k].count(t) for k, t in enumerate(heats)])
    keys = decode.sample_keys(key, index, len(heats))[:, before]
    weights = lay_out_for_rollout(params, model)
    asked = repeat_ids(turn, index.shape)
    drawn = decode.sample(
        weights, context, asked, keys, model=model, sampling=sampling, budget=budget
    )
    lengths = drawn.summaries.lengths - drawn.finished.astype(jnp.int32)
    return Tokens(drawn.summaries.ids, lengths)


@partial(jax.jit, static_argnames=("model", "budget"), out_shardings=P())
def score_tree(
    params: Params, tree: Tree, *, model: TransformerConfig, budget: Budget | None
) -> Float[Array, "rows pairs 2"]:
    """Log-probs of the chosen and the rejected reply of each pair; every process gets all."""
    spares = spares_padding(budget, tree)
    return score_answers(params, tree, model=model, budget=budget if spares else None).sums()
