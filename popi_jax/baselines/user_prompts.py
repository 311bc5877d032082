"""Soft prompts of users: how they are made, and pairs scored behind them.

A prompt is T vectors that stand in the place of the summary. They enter the generator as tokens
behind its vocabulary: the rows of the embedding there are the prompts of the users of the batch."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from popi_jax.arrays import Metrics, PairLengths, PairLogps, Params, Tokens, UserBatch
from popi_jax.losses.masked import metric
from popi_jax.losses.preference import (
    PreferenceObjective,
    batch_terms,
    pair_margins,
    preference_losses,
)
from popi_jax.models.layout import constrain
from popi_jax.models.transformer import TransformerConfig, variables
from popi_jax.popi.scorer import Scorer, repeat_ids
from popi_jax.run import VOCAB_MULTIPLE


class UserModel(NamedTuple):
    """How the prompt of a user is made. Of each kind, `own` is what belongs to one user, and
    `shared` what all have."""

    kind: str = "individual"  # or cluster: a mixture of a few prompts
    tokens: int = 4  # T
    clusters: int = 8

    def init(self, key: Key[Array, ""], words: Float[Array, "vocab embed"]) -> Params:
        """What all users share: embeddings of words drawn at random."""
        count = 1 if self.kind == "individual" else self.clusters
        rows = jax.random.randint(key, (count, self.tokens), 0, words.shape[0])
        prompts = words[rows].astype(jnp.float32)
        if self.kind == "individual":
            return {"generic": prompts[0]}
        return {"clusters": prompts, "generic": jnp.zeros(count)}

    def init_own(self, num_users: int, embed: int) -> Float[Array, "users ..."]:
        if self.kind == "individual":
            return jnp.zeros((num_users, self.tokens, embed))
        return jnp.zeros((num_users, self.clusters))

    def make_prompts(
        self, shared: Params, own: Float[Array, "users ..."]
    ) -> Float[Array, "users tokens embed"]:
        """own = 0 gives the generic prompt.

        individual: generic + own. cluster: the clusters' prompts weighted by
        softmax(generic + own)."""
        if self.kind == "individual":
            return shared["generic"][None] + own
        weights = jax.nn.softmax(shared["generic"][None] + own, axis=-1)
        return jnp.einsum("uk,kte->ute", weights, shared["clusters"])


@dataclasses.dataclass(frozen=True)
class PromptScorer:
    """Scores users' pairs behind soft prompts, and differentiates the objective. Static."""

    model: TransformerConfig
    prefix: tuple[int, ...]  # tokens before the prompt
    users: UserModel
    objective: PreferenceObjective
    microbatches: int = 1

    def score(self, weights: Params, shared: Params, own: Array, batch: UserBatch) -> PairLogps:
        """Log-probs of the replies behind the users' own prompts: [users pairs]."""
        contexts, scorer = self._plan(own.shape[0], generic=False)
        whole = self._join(weights, self.users.make_prompts(shared, own))
        logps = scorer.score_pairs(whole, contexts, batch)
        return jax.tree.map(lambda x: x[:, 0], logps)

    def score_plain(self, weights: Params, batch: UserBatch) -> PairLogps:
        """The same behind no prompt."""
        contexts = repeat_ids(self.prefix, (batch.index.shape[0], 1))
        scorer = Scorer(self.model, microbatches=self.microbatches)
        return jax.tree.map(lambda x: x[:, 0], scorer.score_pairs(weights, contexts, batch))

    def differentiate(
        self,
        params: Params,
        whole: Callable[[Params], tuple[Params, Params, Array]],
        batch: UserBatch,
        reference: PairLogps | None,
        *,
        alpha: float | None,
    ) -> tuple[Params, Metrics]:
        """(gradient by `params`, metrics) of the sum over users of the mean loss of their pairs.

        whole(params) is (weights, shared, own). alpha: the weight of the users' own prompts, the
        rest that of the generic one; None: the generic prompt is not scored."""
        o, generic = self.objective, alpha is not None
        contexts, scorer = self._plan(batch.index.shape[0], generic=generic)
        shape = (*contexts.lengths.shape, batch.pair_mask.shape[1])
        shares = jnp.asarray([alpha, 1.0 - alpha] if alpha is not None else [1.0])
        counts = jnp.maximum(jnp.sum(batch.pair_mask, axis=1), 1)
        scale = shares[None, :, None] * batch.pair_mask[:, None] / counts[:, None, None]
        lengths = PairLengths(
            *(
                jnp.broadcast_to(replies.lengths[:, None], shape)
                for replies in (batch.chosen, batch.rejected)
            )
        )
        known = jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], shape), reference)
        mask = jnp.broadcast_to(batch.pair_mask[:, None], shape)
        terms = None  # of the whole batch; of each microbatch where they need log-probs
        if not o.needs_batch_logps:
            terms = batch_terms(None, lengths, known, mask, objective=o)

        def build(params: Params) -> Params:
            weights, shared, own = whole(params)
            prompts = self.users.make_prompts(shared, own)
            if generic:
                nobody = self.users.make_prompts(shared, jnp.zeros_like(own[:1]))
                prompts = jnp.concatenate([prompts, nobody])
            return self._join(weights, prompts)

        def loss_fn(
            logps: PairLogps,
            contexts: Tokens,
            users: UserBatch,
            scale: Array,
            lengths: PairLengths,
            known: PairLogps | None,
            mask: Array,
        ) -> tuple[Array, tuple[Metrics, tuple]]:
            own = terms or batch_terms(logps, lengths, known, mask, objective=o)
            losses = preference_losses(logps, lengths, known, own, objective=o)
            return jnp.sum(scale * losses), ({"loss": metric(losses, mask)}, ())

        given = (contexts, batch, scale, lengths, known, mask)
        grads, metrics, _ = scorer.differentiate_pairs(loss_fn, params, build, given)
        return grads, metrics

    def find_margins(
        self, logps: PairLogps, batch: UserBatch, reference: PairLogps | None
    ) -> Float[Array, "users pairs"]:
        lengths = PairLengths(batch.chosen.lengths, batch.rejected.lengths)
        return pair_margins(logps, lengths, reference, objective=self.objective)

    def _plan(self, num_users: int, *, generic: bool) -> tuple[Tokens, Scorer]:
        """Contexts [users 1 or 2 seq] of the tokens behind the vocabulary, and their scorer."""
        num, first = self.users.tokens, self.model.vocab_size
        rows = jnp.arange(num_users)[:, None]
        if generic:
            rows = jnp.concatenate([rows, jnp.full_like(rows, num_users)], axis=1)
        ids = first + rows[..., None] * num + jnp.arange(num)[None, None]
        head = repeat_ids(self.prefix, rows.shape)
        contexts = Tokens(jnp.concatenate([head.ids, ids], axis=-1), head.lengths + num)
        extra = _count_rows((num_users + generic) * num)
        model = dataclasses.replace(self.model, extra_rows=extra)
        return contexts, Scorer(model, microbatches=self.microbatches)

    def _join(self, weights: Params, prompts: Float[Array, "users tokens embed"]) -> Params:
        """The model with the prompts as rows behind the vocabulary."""
        tree = variables(weights)["params"]
        table, rows = tree["embed"]["embedding"], prompts.reshape(-1, prompts.shape[-1])
        rows = jnp.pad(rows, ((0, _count_rows(rows.shape[0]) - rows.shape[0]), (0, 0)))
        table = jnp.concatenate([table, rows.astype(table.dtype)])
        table = constrain(table, ("vocab", "vocab_embed"), self.model.rules)
        joined = {**tree, "embed": {"embedding": table}}
        return {**weights, "params": joined} if "lora" in weights else joined


def _count_rows(num: int) -> int:
    """At least `num` rows, that divide over devices as the vocabulary does."""
    return -(-num // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
