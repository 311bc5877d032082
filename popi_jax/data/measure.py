"""What the training users are like in tokens: how long their texts are, what had to be shortened,
and how much of the batches they fill. It decides about shapes and speed alone."""

import json
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import grain
import numpy as np

from popi_jax.arrays import Demonstrations, WarmupBatch
from popi_jax.data import prompts
from popi_jax.data.encode import Truncations, round_up
from popi_jax.data.order import WINDOW
from popi_jax.data.prompts import Tokenizer
from popi_jax.errors import UserError

_BATCHES, _WARMUP_BATCHES = 64, 16  # that are looked at, at most ...
_ROWS = 2048  # ... and about so many users, but at least ...
_LEAST = 8  # ... so many batches
_SPARE = 2.0  # deviations of the mean of a window
# share of batches, about, that may exceed a budget: they cost more, a larger budget costs always
_TOO_MANY = 0.02


class Spread(NamedTuple):
    """Tokens of one user: mean and standard deviation over users who share a batch by chance."""

    mean: float
    std: float

    def budget(self, users: int, shards: int) -> int:
        """Returns the tokens that `users` users of a shard have at most, in nearly all batches in
        every shard; at least 1."""
        deviations = NormalDist().inv_cdf(1 - _TOO_MANY / shards)
        return max(math.ceil(users * self.mean + deviations * math.sqrt(users) * self.std), 1)


class Totals(NamedTuple):
    """Tokens of the users of a shard: (users, shards, tokens) says what `users` users of a
    microbatch have at most, in nearly all batches in each of the shards."""

    most: tuple[tuple[int, int, int], ...]

    def budget(self, users: int, shards: int) -> int:
        """As `Spread.budget`; of a division that was not measured, as if all users of a shard were
        among the largest."""
        known = {(users, shards): tokens for users, shards, tokens in self.most}
        one = max((n for (users, _), n in known.items() if users == 1), default=0)
        return max(known.get((users, shards), users * one), 1)


class TaskFill(NamedTuple):
    """Of one task of the warm-up."""

    tokens: Totals
    answers: Totals


class Fill(NamedTuple):
    """How much of a batch the data fill; how long summaries will be they cannot know."""

    contexts: Totals  # the signals
    pairs: Totals  # prompts, and both replies to each
    answers: Totals  # the replies alone
    warmup: dict[str, TaskFill]  # a task of `WarmupBatch` each; {} without a warm-up
    told: Totals = Totals(())  # what the generator is told where it reads no summaries


class Measured(NamedTuple):
    """All that is measured of a run's training users."""

    lengths: dict[str, Any]  # context_len, turn_len, answer_len of `data`, lowered to the need
    truncations: Truncations
    fill: Fill


def fit_lengths(lengths: np.ndarray, tokenizer: Tokenizer, cfg: Any) -> dict[str, Any]:
    """The padded lengths of `cfg.data`, lowered to what the longest texts of all users need.

    lengths: [users] LENGTHS (data/tokens.py)."""
    turn = len(prompts.render_summary_turn(tokenizer, cfg))
    longest = {
        "context_len": lengths["context"].max(initial=1),
        "turn_len": max(lengths["turn"].max(initial=1), turn),
        "answer_len": lengths["answer"].max(initial=1),
    }
    return {n: min(getattr(cfg.data, n), round_up(int(found))) for n, found in longest.items()}


def count_truncations(lengths: np.ndarray) -> Truncations:
    """What had to be shortened of all users."""
    return Truncations(*(int(lengths[f"cut_{name}"].sum()) for name in Truncations._fields))


def measure_fill(
    main: grain.MapDataset, warmup: grain.MapDataset | None = None, *, users: int
) -> Fill:
    """Looks at the first batches of a run; `warmup`: those of its warm-up, where it has one.

    users: of the training split. Where windows hold a part of them, later windows may be heavier
    than the first, for which some places are spared."""
    made = _take(main, _BATCHES, lambda batch: len(batch.index))
    replies = [(b.chosen.lengths + b.rejected.lengths).sum(axis=1) for b in made]
    prompt_tokens = [b.turns.lengths.sum(axis=1) for b in made]
    seen = _take(warmup, _WARMUP_BATCHES, count_rows) if warmup is not None else []
    tasks = WarmupBatch._fields if seen else ()
    # how much the mean of a window differs from that of all users, in deviations of a user
    spare = _SPARE * math.sqrt(max(1 / WINDOW - 1 / max(users, 1), 0))

    def total(counts: Sequence[np.ndarray]) -> Totals:
        return measure_totals(counts, spare)

    return Fill(
        contexts=total([b.context.lengths for b in made]),
        pairs=total([p + r for p, r in zip(prompt_tokens, replies, strict=True)]),
        answers=total(replies),
        warmup={task: _measure_task([getattr(b, task) for b in seen], total) for task in tasks},
        told=total([b.told.lengths for b in made if b.told is not None]),
    )


def count_rows(batch: WarmupBatch) -> int:
    return sum(len(task.mask) for task in batch)


def _take(batches: grain.MapDataset, most: int, count: Callable[[Any], int]) -> list[Any]:
    first = batches[0]
    number = min(max(_ROWS // count(first), _LEAST), most)
    return [first, *(batches[step] for step in range(1, number))]


def _measure_task(
    parts: list[Demonstrations], total: Callable[[Sequence[np.ndarray]], Totals]
) -> TaskFill:
    answers = [p.answers.lengths.sum(axis=1) for p in parts]
    tokens = [
        p.context.lengths + p.turns.lengths.sum(axis=1) + a
        for p, a in zip(parts, answers, strict=True)
    ]
    return TaskFill(total(tokens), total(answers))


def measure_totals(counts: Sequence[np.ndarray], spare: float = 0.0) -> Totals:
    """counts: [rows] the tokens of each row of some batches. spare: deviations of a row that are
    added for each row. Each way of dividing a batch into
    shards and microbatches is measured, so that a run may go on with other devices."""
    if not counts:
        return Totals(())
    tokens = np.stack(counts)
    rows, most = tokens.shape[1], list[tuple[int, int, int]]()
    for shards in _list_divisors(rows):
        for users in _list_divisors(rows // shards):
            # row i of microbatch j of a shard is row i * microbatches + j of the shard
            parts = tokens.reshape(len(tokens), shards, users, -1).sum(axis=2)
            heaviest = parts.max(axis=1).reshape(-1)
            found = np.quantile(heaviest, 1 - _TOO_MANY / 2, method="higher")
            most.append((users, shards, math.ceil(found + users * spare * tokens.std())))
    return Totals(tuple(most))


def _list_divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def to_json(measured: Measured) -> str:
    """Writes all values under their names."""
    return json.dumps(_name_values(measured), indent=2) + "\n"


def _name_values(value: Any) -> Any:
    fields = value._asdict() if hasattr(value, "_asdict") else value
    return {k: _name_values(v) for k, v in fields.items()} if isinstance(fields, dict) else value


def is_outdated(text: str) -> bool:
    """Whether former versions wrote it, which measured some of the users."""
    return '"std":' in text


def from_json(text: str, path: object = "measured.json") -> Measured:
    """Inverse of `to_json`. Raises: UserError that names `path` when a value is missing."""

    def read(values: dict[str, Any]) -> Totals:
        return Totals(tuple((users, shards, n) for users, shards, n in values["most"]))

    try:
        found = json.loads(text)
        fill = dict(found["fill"])
        tasks = fill.pop("warmup").items()
        warmup = {t: TaskFill(**{k: read(v) for k, v in task.items()}) for t, task in tasks}
        totals = {name: read(values) for name, values in fill.items()}
        truncations = Truncations(**found["truncations"])
        return Measured(found["lengths"], truncations, Fill(**totals, warmup=warmup))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path}: not readable ({type(e).__name__}: {e}); delete it, and it is measured again"
        ) from None
