"""What the two roles do outside of training, as values: a `Summarizer` writes summaries of users, a
`Generator` scores and writes replies behind a text about a user.

The programs are compiled once per shape: parameters are arguments, and what is static is the model
and its prompt. The roles may have different models and tokenizers: between them goes text."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from popi_jax import distributed
from popi_jax.arrays import PairLogps, Params, Tokens, UserBatch
from popi_jax.config import Config
from popi_jax.data import batches, encode, prompts
from popi_jax.data.encode import Ids
from popi_jax.data.records import User
from popi_jax.models import decode
from popi_jax.models.decode import Sampling
from popi_jax.models.layout import count_shards
from popi_jax.models.transformer import TransformerConfig, lay_out_for_rollout
from popi_jax.popi.rollout import Sampler, splice
from popi_jax.popi.scorer import Scorer
from popi_jax.progress import Progress
from popi_jax.run import RoleParts, Roles, Run
from popi_jax.sharding import place_whole

SUMMARY_KEY = 3  # folded into the key of the seed; training uses 0 to 2


class Summarizer(NamedTuple):
    """An inference model with weights."""

    role: RoleParts
    params: Params
    seed: int

    def write(
        self, users: Sequence[UserBatch], temperature: float, advance: Callable[[], None]
    ) -> list[Ids]:
        """One summary for each user of the batches, without end tokens; `advance` is called after
        each batch."""
        sampling = self.role.sampling._replace(temperature=temperature)
        sampler = Sampler(self.role.model, self.role.prompt, sampling)
        summaries: list[Ids] = []
        for batch in users:
            found = jax.device_get(draw_summaries(self.params, batch, self.seed, sampler=sampler))
            summaries += [ids[:n].tolist() for ids, n in zip(*found, strict=True)]
            advance()
        return summaries


class Generator(NamedTuple):
    """A generator with weights. Texts about users are token ids of its tokenizer."""

    role: RoleParts
    params: Params
    mesh: Mesh

    def score(
        self,
        texts: Sequence[Ids],
        users: Sequence[UserBatch],
        length: int,
        advance: Callable[[], None],
    ) -> PairLogps:
        """Log-probs of the replies to each user's prompts behind a text about the user: [users
        pairs], in the memory of every process.

        texts: one for each user, without those that fill the last batch; at most `length` tokens,
        to which all are padded."""
        scorer, size, found = Scorer(self.role.model), len(users[0].index), []
        filled = [*texts, *[[]] * (len(users) * size - len(texts))]
        for number, batch in enumerate(users):
            rows = batches.pad(filled[number * size : (number + 1) * size], length, 0)
            text = self.place(jax.tree.map(lambda x: x[:, None], rows))
            logps = score_texts(self.params, text, batch, scorer=scorer, prefix=self.role.prompt)
            found.append(jax.device_get(logps))
            advance()
        return jax.tree.map(lambda *x: jnp.asarray(np.concatenate(x)[: len(texts)]), *found)

    def reply(
        self, text: Ids, prompt: str, *, sampling: Sampling, num: int, seed: int
    ) -> list[str]:
        """`num` answers behind a text about the user; one that reached `sampling.max_len` before
        its end is cut there."""
        words, rows = self.role.tokenizer, count_rows(self.role.model)
        messages = [{"role": "user", "content": prompt.strip()}]
        context = [*self.role.prompt, *text]
        turn = prompts.render_generator_turn(words, messages)
        tokens = [self.place(batches.pad([ids] * rows, len(ids), 0)) for ids in (context, turn)]
        keys = decode.sample_keys(jax.random.key(seed), jnp.arange(rows), num)
        drawn = draw_replies(self.params, *tokens, keys, model=self.role.model, sampling=sampling)
        ids, lengths = jax.device_get(drawn)
        return [words.decode(row[:n]).strip() for row, n in zip(ids[0], lengths[0], strict=True)]

    def place(self, tokens: Tokens) -> Tokens:
        return place_whole(tokens, self.mesh, self.role.model.rules)


def encode_users(run: Run | Roles, users: Sequence[User], config: Config) -> list[UserBatch]:
    """The users in batches of `evaluation.batch_users`, as numpy arrays: signals in tokens of the
    inference model, prompts and replies in those of the generator.

    The last batch is filled with users none of whose pairs count."""
    words = run.generator.tokenizer
    made = [b.batch for b in batches.make_eval_batches(users, words, config)]
    if run.inference.tokenizer is not words:
        read = batches.make_eval_batches(users, run.inference.tokenizer, config)
        contexts = [b.batch.context for b in read]
        made = [b._replace(context=c) for b, c in zip(made, contexts, strict=True)]
    return made


def summarize_users(
    run: Run, params: Params, users: Sequence[User], *, config: Config, temperature: float
) -> list[dict[str, Any]]:
    """One {"user_id", "summary", "tokens"} per user, by an inference model.

    config: with the limits as they were given. The padded lengths of the run fit its training
    users, so they are fitted anew to these users. At temperature 0 the likeliest tokens are taken.
    """
    words = run.inference.tokenizer
    users = [dataclasses.replace(user, pairs=(), readings=()) for user in users]
    lengths, cut = encode.fit_lengths(users, words, config)
    if cut.contexts:
        logging.warning(
            "The signals of %d of %d users were too long and shortened (data.context_len = %d).",
            *(cut.contexts, cut.users, config.data.context_len),
        )
    rows, evaluation = count_rows(run.inference.model), config.evaluation
    if len(users) <= rows:
        evaluation = dataclasses.replace(evaluation, batch_users=rows)
    data = dataclasses.replace(config.data, num_pairs=1, **lengths)
    config = dataclasses.replace(config, data=data, evaluation=evaluation)
    placed = [
        place_whole(batch, run.mesh, run.inference.model.rules)
        for batch in encode_users(run, users, config)
    ]
    shown, done = distributed.is_main_process(), itertools.count(1)
    with Progress(len(placed), label="summaries", enabled=shown) as progress:
        summarizer = Summarizer(run.inference, params, run.config.seed)
        found = summarizer.write(placed, temperature, lambda: progress.update(next(done)))
    return list_summaries(run, users, found[: len(users)])


def list_summaries(
    run: Run, users: Sequence[User], summaries: Sequence[Ids]
) -> list[dict[str, Any]]:
    """The rows of a file of summaries; `tokens` are those of the inference model."""
    words = run.inference.tokenizer
    return [
        {"user_id": user.user_id, "summary": words.decode(ids).strip(), "tokens": len(ids)}
        for user, ids in zip(users, summaries, strict=True)
    ]


def count_rows(model: TransformerConfig) -> int:
    """The least rows of a batch that divide over the mesh."""
    return math.lcm(*(count_shards(rules.batch) for rules in (model.rules, model.rollout_rules)))


@partial(jax.jit, static_argnames=("seed", "sampler"), out_shardings=P())
def draw_summaries(params: Params, users: UserBatch, seed: int, *, sampler: Sampler) -> Tokens:
    """One summary per user [users seq], without end tokens; every process gets all."""
    key = jax.random.fold_in(jax.random.key(seed), SUMMARY_KEY)
    drawn = sampler.sample(params, users, key, 1)
    lengths = drawn.summaries.lengths - drawn.finished.astype(jnp.int32)
    return Tokens(drawn.summaries.ids[:, 0], lengths[:, 0])


@partial(jax.jit, static_argnames=("scorer", "prefix"), out_shardings=P())
def score_texts(
    params: Params, texts: Tokens, users: UserBatch, *, scorer: Scorer, prefix: tuple[int, ...]
) -> PairLogps:
    """Log-probs of the replies [users pairs] behind texts [users 1 seq]; every process gets all."""
    contexts = splice(prefix, texts, jnp.zeros(texts.lengths.shape, bool))
    return jax.tree.map(lambda x: x[:, 0], scorer.score_pairs(params, contexts, users))


@partial(jax.jit, static_argnames=("model", "sampling"), out_shardings=P())
def draw_replies(
    params: Params,
    context: Tokens,
    turn: Tokens,
    keys: Array,
    *,
    model: TransformerConfig,
    sampling: Sampling,
) -> Tokens:
    """Replies [batch group seq]; every process gets all."""
    weights = lay_out_for_rollout(params, model)
    return decode.sample(weights, context, turn, keys, model=model, sampling=sampling).summaries
