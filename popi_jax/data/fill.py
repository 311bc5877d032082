"""How many tokens users have in the batches of a run: what rows without padding are made for
(models/dense.py)."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from popi_jax.arrays import Demonstrations, UserBatch, WarmupBatch
from popi_jax.data.batches import user_batches, warmup_batches
from popi_jax.data.records import User
from popi_jax.data.tokenizer import Tokenizer

_BATCHES = 8  # that are looked at
_TOO_MANY = 0.02  # share of batches, about, that may exceed a budget: they cost more, a larger budget costs always


class Spread(NamedTuple):
    """Tokens of one user: mean and standard deviation over users."""

    mean: float
    std: float

    def budget(self, users: int, shards: int) -> int:
        """Tokens that `users` users of a shard have at most, in nearly all batches in every shard;
        at least 1."""
        deviations = NormalDist().inv_cdf(1 - _TOO_MANY / shards)
        return max(math.ceil(users * self.mean + deviations * math.sqrt(users) * self.std), 1)


class TaskFill(NamedTuple):
    """Of one task of the warm-up."""

    tokens: Spread
    answers: Spread


class Fill(NamedTuple):
    """Of what the data give; how long summaries will be they cannot know."""

    contexts: Spread  # the signals
    pairs: Spread  # prompts, and both replies to each
    answers: Spread  # the replies alone
    warmup: dict[str, TaskFill]  # a task of `WarmupBatch` each; {} without a warm-up


def measured_fill(
    source: Sequence[User], tokenizer: Tokenizer, cfg: Any, *, items: tuple[str, ...]
) -> Fill:
    """Looks at some batches such as a run of `cfg` makes; `items` as `warmup_batches` takes them.

    All processes look at the same whole batches, and runs that differ in their seed too, so that
    their programs agree."""
    batches = list(islice(iter(user_batches(source, tokenizer, cfg, seed=0)), _BATCHES))

    def of_users(count: Callable[[UserBatch], np.ndarray]) -> Spread:
        return _spread(count(batch) for batch in batches)

    def replies(batch: UserBatch) -> np.ndarray:
        return (batch.chosen.lengths + batch.rejected.lengths).sum(axis=1)

    warmup = islice(iter(warmup_batches(source, tokenizer, cfg, seed=0, items=items)), _BATCHES)
    return Fill(
        contexts=of_users(lambda batch: batch.context.lengths),
        pairs=of_users(lambda batch: batch.turns.lengths.sum(axis=1) + replies(batch)),
        answers=of_users(replies),
        warmup=_of_warmup(warmup) if cfg.warmup.steps else {},
    )


def _of_warmup(batches: Iterator[WarmupBatch]) -> dict[str, TaskFill]:
    seen = list(batches)

    def of_task(task: str) -> TaskFill:
        parts: list[Demonstrations] = [getattr(batch, task) for batch in seen]
        return TaskFill(
            _spread(
                p.context.lengths + (p.turns.lengths + p.answers.lengths).sum(axis=1) for p in parts
            ),
            _spread(p.answers.lengths.sum(axis=1) for p in parts),
        )

    return {task: of_task(task) for task in WarmupBatch._fields}


def _spread(counts: Iterable[np.ndarray]) -> Spread:
    joined = np.concatenate(list(counts))
    return Spread(float(joined.mean()), float(joined.std()))


def to_json(fill: Fill) -> dict[str, Any]:
    return {**fill._asdict(), "warmup": {task: list(found) for task, found in fill.warmup.items()}}


def from_json(content: dict[str, Any]) -> Fill:
    """Inverse of `to_json`, also after its content was written and read as JSON."""
    spreads = {name: Spread(*content[name]) for name in ("contexts", "pairs", "answers")}
    return Fill(
        **spreads,
        warmup={t: TaskFill(*(Spread(*x) for x in s)) for t, s in content["warmup"].items()},
    )
