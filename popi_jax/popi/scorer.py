"""Log-probs of what a model answers, every shared prefix computed once, and gradients of losses.

The tree context -> turns -> answers is packed into one row of tokens per context. A token sees the
earlier tokens of its own node and all of its ancestors, at the positions that a separate sequence
would have, so the result equals that of scoring each (context, turn, answer) alone.

A `Scorer` splits a batch into microbatches and chooses budgets. A loss sees the log-probs of one
microbatch; the step gives it what it needs of the whole batch, so that parts add up. Microbatch j
of n holds the users j, n + j, 2n + j, ... so that each device keeps the users that it has."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from popi_jax.arrays import Mean, Metrics, PairLogps, Params, Rollouts, Tokens, UserBatch
from popi_jax.losses.logprobs import score_tokens
from popi_jax.models import packing
from popi_jax.models.packing import Budget, Budgets, Tree
from popi_jax.models.sharded_vocab import score_by_device
from popi_jax.models.transformer import Transformer, TransformerConfig, get_head, variables


class AnswerLogps(NamedTuple):
    """Log-probs (nats) of every answer token, the mask of those that count, and the entropies of
    the distributions that they are from, where asked for."""

    logps: Float[Array, "*rows seq"]
    mask: Bool[Array, "*rows seq"]
    entropies: Float[Array, "*rows seq"] | None = None

    def sums(self) -> Float[Array, "*rows"]:
        return jnp.sum(jnp.where(self.mask, self.logps, 0.0), axis=-1)


def score_answers(
    params: Params,
    tree: Tree,
    *,
    model: TransformerConfig,
    temperature: float = 1.0,
    entropies: bool = False,
    budget: Budget | None = None,
) -> AnswerLogps:
    """Log-probs of each answer given its context and turn: [batch turns answers seq].

    The LM head is applied at the positions that predict an answer token, nowhere else. A turn has
    at least one token. With a budget, which the tree must fit, padding runs neither through the
    layers nor the head."""
    # the last token of an answer is predicted, never read
    answers = tree.answers
    read = Tokens(answers.ids[..., :-1], jnp.maximum(answers.lengths - 1, 0))
    rows, mask = packing.pack(tree._replace(answers=read)), packing.length_mask(answers)
    apply = partial(Transformer(model).apply, variables(params))
    if budget is None:
        hidden, _ = apply(*rows[:3], levels=rows.levels)
        states = _take_predictors(hidden, tree).reshape(mask.shape[0], -1, hidden.shape[-1])
        ids, scored = answers.ids.reshape(mask.shape[0], -1), None
    else:
        places = packing.assign_places(rows.valid, budget.tokens, budget.shards)
        hidden, _ = apply(*rows[:3], levels=rows.levels, places=places)
        flat_mask = mask.reshape(mask.shape[0], -1)
        scored = packing.assign_places(flat_mask, budget.answers, budget.shards)
        slots = _find_predictors(tree, rows.ids.shape[1], budget.shards)
        slots = packing.take(slots.reshape(scored.valid.shape), scored.slot_of)
        states = packing.take(hidden, packing.take(places.place_of, slots))
        ids = packing.take(answers.ids.reshape(scored.valid.shape), scored.slot_of)
    cap = model.final_logit_softcap
    score = partial(score_tokens, temperature=temperature, softcap=cap, entropies=entropies)
    found = score_by_device(score, get_head(params, model), states, ids, model.rules)

    def to_answers(x: Array) -> Array:
        return (x if scored is None else packing.to_slots(x, scored)).reshape(mask.shape)

    logps, entropy = jax.tree.map(to_answers, found)
    return AnswerLogps(logps, mask, entropy)


def _take_predictors(
    hidden: Float[Array, "batch slots embed"], tree: Tree
) -> Float[Array, "batch turns answers seq embed"]:
    """The states that predict each answer token: of the turn's last, then of those before."""
    batch, context_len = tree.context.ids.shape
    _, num_turns, turn_len = tree.turns.ids.shape
    num_answers, answer_len = tree.answers.ids.shape[2:]
    dim, end = hidden.shape[-1], context_len + num_turns * turn_len
    turns = hidden[:, context_len:end].reshape(batch, num_turns, turn_len, dim)
    last = jnp.maximum(tree.turns.lengths - 1, 0)
    first = jnp.take_along_axis(turns, last[..., None, None], axis=2)[:, :, None]
    answers = hidden[:, end:].reshape(batch, num_turns, num_answers, answer_len - 1, dim)
    first = jnp.broadcast_to(first, (*answers.shape[:3], 1, dim))
    return jnp.concatenate([first, answers], axis=3)


def _find_predictors(
    tree: Tree, num_slots: int, shards: int
) -> Int[Array, "batch turns answers seq"]:
    """The slot of the state that predicts each answer token, counted through a shard's rows."""
    context_len, (_, num_turns, turn_len) = tree.context.ids.shape[1], tree.turns.ids.shape
    shape = tree.answers.ids.shape
    row, turn, answer, token = (
        jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(4)
    )
    last = jnp.maximum(tree.turns.lengths - 1, 0)[..., None, None]
    last = context_len + turn * turn_len + last
    nodes = turn * shape[2] + answer
    before = context_len + num_turns * turn_len + nodes * (shape[3] - 1) + token - 1
    return jnp.where(token == 0, last, before) + row % (shape[0] // shards) * num_slots


def make_pair_tree(contexts: Tokens, users: UserBatch) -> Tree:
    """Prompts behind each of a user's contexts [users group seq], both replies to each prompt."""
    num_users, group, _ = contexts.ids.shape

    def repeat(tokens: Tokens) -> Tokens:  # what belongs to a user, for each of the contexts
        return jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), tokens)

    flat = jax.tree.map(lambda x: x.reshape(num_users * group, *x.shape[2:]), contexts)
    answers = jax.tree.map(lambda *x: jnp.stack(x, axis=2), users.chosen, users.rejected)
    return Tree(flat, repeat(users.turns), repeat(answers))


def make_summary_tree(users: UserBatch, rollouts: Rollouts, summary_turn: tuple[int, ...]) -> Tree:
    """All G summaries of a user behind one copy of the signals."""
    turns = repeat_ids(summary_turn, (users.index.shape[0], 1))
    return Tree(users.context, turns, jax.tree.map(lambda x: x[:, None], rollouts.summaries))


def repeat_ids(ids: tuple[int, ...], rows: tuple[int, ...]) -> Tokens:
    """The same tokens in every row: [*rows seq]."""
    tokens = jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (*rows, len(ids)))
    return Tokens(tokens, jnp.full(rows, len(ids), jnp.int32))


def split_microbatches(batch: PyTree, num: int) -> PyTree:
    """[users ...] -> [num users/num ...]; num divides users."""

    def split(x: Array) -> Array:
        return x.reshape(x.shape[0] // num, num, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def join_microbatches(parts: PyTree) -> PyTree:
    """Inverse of `split_microbatches`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


def map_microbatches(function: Callable[[Any], PyTree], batch: PyTree, num: int) -> PyTree:
    """Applies `function`, which returns a row for each user, to one microbatch after another."""
    if num == 1:
        return function(batch)
    return join_microbatches(jax.lax.map(function, split_microbatches(batch, num)))


Loss = Callable[..., tuple[Array, tuple[Metrics, PyTree]]]
# a microbatch's tree, its budget, and the scores of its answers by (params, budget)
Task = tuple[Tree, Budget | None, Callable[[Params, Budget | None], Any]]


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores pairs behind summaries, and summaries behind signals, of whole batches of users.

    A loss is loss_fn(scores, *part) -> (loss, (metrics, rows)): `part` is one microbatch of each
    element of `batch`, `rows` has a row for each user. The loss must be a sum over users divided by
    a weight of the whole batch, so that losses, gradients and metrics of the microbatches add up:
    means of means never occur."""

    model: TransformerConfig
    summary_turn: tuple[int, ...] = ()  # what asks for a summary, behind the signals
    temperature: float = 1.0  # of the sampling of summaries
    microbatches: int = 1
    budgets: Budgets | None = None  # None: all is computed with its padding

    def score_pairs(self, params: Params, contexts: Tokens, users: UserBatch) -> PairLogps:
        """Log-probs of each user's chosen and rejected replies behind each of the user's contexts
        [users group seq]: [users group pairs]."""
        return self._score(self._plan_pairs, params, (contexts, users))

    def score_summaries(
        self, params: Params, users: UserBatch, rollouts: Rollouts
    ) -> Float[Array, "users group seq"]:
        """Log-probs of the tokens of sampled summaries, at the temperature of the sampling."""
        return self._score(self._plan_summaries, params, (users, rollouts)).logps

    def differentiate_pairs(
        self, loss_fn: Loss, params: Params, whole: Callable[[Params], Params], batch: Any
    ) -> tuple[Params, Metrics, PyTree]:
        """(gradient of the loss by `params`, metrics, rows). whole(params) is the model; `batch`
        begins with (contexts, users); the loss sees the `PairLogps`."""
        return self._differentiate(self._plan_pairs, loss_fn, params, whole, batch)

    def differentiate_summaries(
        self,
        loss_fn: Loss,
        params: Params,
        whole: Callable[[Params], Params],
        batch: Any,
        *,
        entropies: bool,
    ) -> tuple[Params, Metrics, PyTree]:
        """The same of sampled summaries: `batch` begins with (users, rollouts); the loss sees the
        `AnswerLogps` [users group seq]."""
        plan = partial(self._plan_summaries, entropies=entropies)
        return self._differentiate(plan, loss_fn, params, whole, batch)

    def _plan_pairs(self, part: Any) -> Task:
        contexts, users = part[:2]
        tree, shape = make_pair_tree(contexts, users), contexts.lengths.shape

        def score(params: Params, budget: Budget | None) -> PairLogps:
            sums = score_answers(params, tree, model=self.model, budget=budget).sums()
            sums = sums.reshape(*shape, -1, 2)
            return PairLogps(sums[..., 0], sums[..., 1])

        return tree, self.budgets and self.budgets.for_pairs(shape[1]), score

    def _plan_summaries(self, part: Any, entropies: bool = False) -> Task:
        users, rollouts = part[:2]
        tree, group = (
            make_summary_tree(users, rollouts, self.summary_turn),
            rollouts.finished.shape[1],
        )

        def score(params: Params, budget: Budget | None) -> AnswerLogps:
            by = partial(score_answers, temperature=self.temperature, entropies=entropies)
            found = by(params, tree, model=self.model, budget=budget)
            return AnswerLogps(*jax.tree.map(lambda x: x[:, 0], tuple(found)))

        return tree, self.budgets and self.budgets.for_summaries(group), score

    def _score(self, plan: Callable[[Any], Task], params: Params, batch: Any) -> Any:
        def run(part: Any) -> Any:
            tree, budget, score = plan(part)
            return packing.run_packed_if_it_fits(budget, tree, partial(score, params))

        return map_microbatches(run, batch, self.microbatches)

    def _differentiate(
        self,
        plan: Callable[[Any], Task],
        loss_fn: Loss,
        params: Params,
        whole: Callable[[Params], Params],
        batch: Any,
    ) -> tuple[Params, Metrics, PyTree]:
        """Sums over the microbatches; those that fit their budget are computed without padding."""

        def run(params: Params, part: Any) -> tuple[Params, tuple[Metrics, PyTree]]:
            tree, budget, score = plan(part)
            full = budget is not None and not packing.spares_padding(budget, tree)

            def differentiate(budget: Budget | None) -> tuple[Params, tuple[Metrics, PyTree]]:
                loss = lambda params: loss_fn(score(whole(params), budget), *part)  # noqa: E731
                grads, (metrics, rows) = jax.grad(loss, has_aux=True)(params)
                unpadded = Mean(jnp.float32(budget is not None or full), jnp.float32(1.0))
                return grads, (metrics | {"unpadded": unpadded}, rows)

            return packing.run_packed_if_it_fits(budget, tree, differentiate)

        if self.microbatches == 1:
            grads, (metrics, rows) = run(params, batch)
            return grads, metrics, rows

        def add(total: Any, part: Any) -> tuple[Any, PyTree]:
            grads, (metrics, rows) = run(params, part)
            return jax.tree.map(jnp.add, total, (grads, metrics)), rows

        parts = split_microbatches(batch, self.microbatches)
        grads, (metrics, _) = jax.eval_shape(run, params, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, metrics))
        (grads, metrics), rows = jax.lax.scan(add, zeros, parts)
        return grads, metrics, join_microbatches(rows)
