"""What the training users are like in tokens: how long their texts are, what had to be shortened,
and how much of the batches they fill. It decides about shapes and speed alone."""

import json
import math
from collections.abc import Iterable
from itertools import islice
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from popi_jax.arrays import Demonstrations, UserBatch, WarmupBatch
from popi_jax.data.encode import Truncations
from popi_jax.errors import UserError

_BATCHES = 8  # that are looked at
# share of batches, about, that may exceed a budget: they cost more, a larger budget costs always
_TOO_MANY = 0.02


class Spread(NamedTuple):
    """Tokens of one user: mean and standard deviation over users."""

    mean: float
    std: float

    def budget(self, users: int, shards: int) -> int:
        """Returns the tokens that `users` users of a shard have at most, in nearly all batches in
        every shard; at least 1."""
        deviations = NormalDist().inv_cdf(1 - _TOO_MANY / shards)
        return max(math.ceil(users * self.mean + deviations * math.sqrt(users) * self.std), 1)


class TaskFill(NamedTuple):
    """Of one task of the warm-up."""

    tokens: Spread
    answers: Spread


class Fill(NamedTuple):
    """How much of a batch the data fill; how long summaries will be they cannot know."""

    contexts: Spread  # the signals
    pairs: Spread  # prompts, and both replies to each
    answers: Spread  # the replies alone
    warmup: dict[str, TaskFill]  # a task of `WarmupBatch` each; {} without a warm-up
    told: Spread = Spread(0.0, 0.0)  # what the generator is told where it reads no summaries


class Measured(NamedTuple):
    """All that is measured of a run's training users."""

    lengths: dict[str, Any]  # context_len, turn_len, answer_len of `data`, lowered to the need
    truncations: Truncations
    fill: Fill


def measure_fill(main: Iterable[UserBatch], warmup: Iterable[WarmupBatch] | None = None) -> Fill:
    """Looks at the first batches of a run; `warmup`: those of its warm-up, where it has one."""
    made = list(islice(iter(main), _BATCHES))
    replies = [(b.chosen.lengths + b.rejected.lengths).sum(axis=1) for b in made]
    prompt_tokens = [b.turns.lengths.sum(axis=1) for b in made]
    seen = list(islice(iter(warmup or ()), _BATCHES))
    tasks = WarmupBatch._fields if seen else ()
    return Fill(
        contexts=_spread(b.context.lengths for b in made),
        pairs=_spread(p + r for p, r in zip(prompt_tokens, replies, strict=True)),
        answers=_spread(replies),
        warmup={task: _measure_task([getattr(b, task) for b in seen]) for task in tasks},
        told=_spread(np.zeros(1) if b.told is None else b.told.lengths for b in made),
    )


def _measure_task(parts: list[Demonstrations]) -> TaskFill:
    answers = [p.answers.lengths.sum(axis=1) for p in parts]
    tokens = (
        p.context.lengths + p.turns.lengths.sum(axis=1) + a
        for p, a in zip(parts, answers, strict=True)
    )
    return TaskFill(_spread(tokens), _spread(answers))


def _spread(counts: Iterable[np.ndarray]) -> Spread:
    joined = np.concatenate(list(counts))
    return Spread(float(joined.mean()), float(joined.std()))


def to_json(measured: Measured) -> str:
    """Writes all values under their names."""
    return json.dumps(_name_values(measured), indent=2) + "\n"


def _name_values(value: Any) -> Any:
    fields = value._asdict() if hasattr(value, "_asdict") else value
    return {k: _name_values(v) for k, v in fields.items()} if isinstance(fields, dict) else value


def from_json(text: str, path: object = "measured.json") -> Measured:
    """Inverse of `to_json`. Raises: UserError that names `path` when a value is missing."""

    def read(values: dict[str, Any]) -> Spread:
        return Spread(**values)

    try:
        found = json.loads(text)
        fill = dict(found["fill"])
        tasks = fill.pop("warmup").items()
        warmup = {t: TaskFill(**{k: read(v) for k, v in task.items()}) for t, task in tasks}
        spreads = {name: read(values) for name, values in fill.items()}
        truncations = Truncations(**found["truncations"])
        return Measured(found["lengths"], truncations, Fill(**spreads, warmup=warmup))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path}: not readable ({type(e).__name__}: {e}); delete it, and it is measured again"
        ) from None
