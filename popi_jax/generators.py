"""What the two roles do outside of training, as values: a `Summarizer` writes summaries of users, a
`Generator` scores and writes replies behind a text about a user.

The programs are compiled once per shape: parameters are arguments, and what is static is the model
and its prompt. The roles may have different models and tokenizers: between them goes text."""

import dataclasses
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
from popi_jax.arrays import PairLogps, Params, Tokens
from popi_jax.config import Config
from popi_jax.data import batches, prompts
from popi_jax.data.encode import Ids
from popi_jax.data.prompts import PLAIN, Wording
from popi_jax.data.records import User
from popi_jax.data.selection import keep_signals
from popi_jax.dealt import Dealt, add_texts, count_rows, deal_signals, run_ahead
from popi_jax.models import decode
from popi_jax.models.decode import Sampling
from popi_jax.models.packing import Tree
from popi_jax.models.transformer import TransformerConfig, lay_out_for_rollout
from popi_jax.popi.evaluation import draw_summaries, score_tree
from popi_jax.progress import Progress
from popi_jax.run import RoleParts, Run
from popi_jax.sharding import place_whole


class Summarizer(NamedTuple):
    """An inference model with weights."""

    role: RoleParts
    params: Params
    seed: int

    def write(
        self, signals: Dealt, temperatures: Sequence[float], advance: Callable[[float], None]
    ) -> list[list[Ids]]:
        """For each temperature one summary of each user, without end tokens; the signals are read
        once for all of them.

        A draw depends on the seed, the number of the user, the temperature and how often that came
        before alone. `advance` is called with the finished part after each batch."""
        sampling = self.role.sampling._replace(temperatures=tuple(temperatures))
        fixed = {"model": self.role.model, "turn": self.role.prompt, "sampling": sampling}
        calls, dealt = [], []
        for group in signals.groups:
            draw = partial(draw_summaries, self.params, budget=group.budget, **fixed)
            calls += [partial(draw, *placed, np.uint32(self.seed)) for placed in group.placed]
            dealt += [*group.dealt]
        summaries: list[list[Ids]] = [[[]] * signals.shape[0] for _ in temperatures]
        for users, (ids, lengths) in zip(dealt, run_ahead(calls, advance), strict=True):
            for row in np.flatnonzero(users >= 0):
                for k, found in enumerate(summaries):
                    found[users[row]] = ids[row, k, : lengths[row, k]].tolist()
        return summaries


class Generator(NamedTuple):
    """A generator with weights. Texts about users are token ids of its tokenizer."""

    role: RoleParts
    params: Params
    mesh: Mesh

    def score(
        self, texts: Sequence[Ids], pairs: Dealt, length: int, advance: Callable[[float], None]
    ) -> PairLogps:
        """Log-probs of the replies to each user's prompts behind a text about the user: [users
        pairs], in the memory of every process; 0 where a user has no such pair.

        texts: one for each user, at most `length` tokens, to which attention pads them, and nothing
        else does. `advance` is called with the finished part after each batch."""
        prefix, lengths = self.role.prompt, np.array([len(text) for text in texts])
        calls, dealt = [], []
        for group in pairs.groups:
            budget = add_texts(group, lengths, len(prefix))
            score = partial(score_tree, self.params, model=self.role.model, budget=budget)
            for users, placed in zip(group.dealt, group.placed, strict=True):
                told = [texts[user] if user >= 0 else [] for user in users.tolist()]
                rows = [[*prefix, *text] for text in told]
                context = self.place(batches.pad(rows, len(prefix) + length, 0))
                calls.append(partial(score, Tree(context, *placed)))
            dealt += [*group.dealt]
        logps = np.zeros((*pairs.shape, 2), np.float32)
        for users, found in zip(dealt, run_ahead(calls, advance), strict=True):
            logps[users[users >= 0], : found.shape[1]] = found[users >= 0]
        return PairLogps(jnp.asarray(logps[..., 0]), jnp.asarray(logps[..., 1]))

    def reply(
        self,
        text: Ids,
        prompt: str,
        *,
        sampling: Sampling,
        num: int,
        seed: int,
        wording: Wording = PLAIN,
    ) -> list[str]:
        """`num` answers behind a text about the user; one that reached `sampling.max_len` before
        its end is cut there."""
        words, rows = self.role.tokenizer, count_rows(self.role.model)
        messages = [{"role": "user", "content": prompt.strip()}]
        context = [*self.role.prompt, *text]
        turn = prompts.render_generator_turn(words, messages, wording)
        tokens = [self.place(batches.pad([ids] * rows, len(ids), 0)) for ids in (context, turn)]
        keys = decode.sample_keys(jax.random.key(seed), jnp.arange(rows), num)
        drawn = draw_replies(self.params, *tokens, keys, model=self.role.model, sampling=sampling)
        ids, lengths = jax.device_get(drawn)
        return [words.decode(row[:n]).strip() for row, n in zip(ids[0], lengths[0], strict=True)]

    def place(self, tokens: Tokens) -> Tokens:
        return place_whole(tokens, self.mesh, self.role.model.rules)


def summarize_users(
    run: Run, params: Params, users: Sequence[User], *, config: Config, temperature: float
) -> list[dict[str, Any]]:
    """One {"user_id", "summary", "tokens"} per user, by an inference model.

    config: with the limits as they were given: those of the run are of its training users. At
    temperature 0 the likeliest tokens are taken."""
    role = run.inference
    asked = [bare_signals(keep_signals(user, config.data.signals), config) for user in users]
    encoded, cut = batches.encode_all(asked, role.tokenizer, config)
    if cut.contexts:
        logging.warning(
            "The signals of %d of %d users were too long and shortened (data.context_len = %d).",
            *(cut.contexts, cut.users, config.data.context_len),
        )
    signals = deal_signals(
        encoded, role.model, role.prompt, run.mesh, config.evaluation.batch_users
    )
    summarizer, shown = Summarizer(role, params, run.config.seed), distributed.is_main_process()
    with Progress(100, label="summaries", enabled=shown) as progress:
        advance = lambda part: progress.update(round(100 * part))  # noqa: E731
        (found,) = summarizer.write(signals, [temperature], advance)
    return list_summaries(run, users, found)


def bare_signals(user: User, config: Config) -> User:
    """The user with what a summary is made of: the signals, and with `data.prompt_aware` the pair
    that it is for."""
    return dataclasses.replace(user, pairs=user.pairs[: config.data.prompt_aware], readings=())


def list_summaries(
    run: Run, users: Sequence[User], summaries: Sequence[Ids]
) -> list[dict[str, Any]]:
    """The rows of a file of summaries; `tokens` are those of the inference model."""
    words = run.inference.tokenizer
    return [
        {"user_id": user.user_id, "summary": words.decode(ids).strip(), "tokens": len(ids)}
        for user, ids in zip(users, summaries, strict=True)
    ]


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
