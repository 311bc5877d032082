"""What the training users are like in tokens: how long their texts are, what had to be shortened,
and how much of the batches they fill. It decides about shapes and speed alone."""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from itertools import islice
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from popi_jax.arrays import Demonstrations, WarmupBatch
from popi_jax.data import batches, prompts, warmup_batches
from popi_jax.data.encode import Ids, Truncations, encode_user, round_up
from popi_jax.data.records import User
from popi_jax.data.tokenizer import Tokenizer
from popi_jax.errors import UserError

_MEASURED_USERS = 4096
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


class Measured(NamedTuple):
    """All that is measured of a run's training users."""

    lengths: dict[str, Any]  # context_len, turn_len, answer_len of `data`, lowered to the need
    truncations: Truncations
    fill: Fill


def measure(
    users: Sequence[User], tokenizer: Tokenizer, cfg: Any, items: tuple[str, ...]
) -> Measured:
    """Measures users; `items` as `make_warmup_batches` takes them.

    All processes measure the same users, and runs that differ in their seed too, so that their
    programs agree. Raises: UserError as `fit_lengths`."""
    lengths, truncations = fit_lengths(users, tokenizer, cfg)
    data = dataclasses.replace(cfg.data, **lengths)
    fill = measure_fill(users, tokenizer, dataclasses.replace(cfg, data=data), items)
    return Measured(lengths, truncations, fill)


def fit_lengths(
    users: Sequence[User], tokenizer: Tokenizer, cfg: Any
) -> tuple[dict[str, Any], Truncations]:
    """Returns the padded lengths of `cfg.data`, lowered to what the longest texts need, and what
    had to be shortened.

    At most `_MEASURED_USERS` users, evenly spaced, are measured; others that are longer are
    shortened like any other. Raises: UserError when a limit does not hold the headers alone."""
    stride = -(-len(users) // _MEASURED_USERS)
    encoded = [encode_user(users[i], tokenizer, cfg) for i in range(0, len(users), stride)]
    contexts = [u.context for u in encoded]
    turns = [prompts.render_summary_turn(tokenizer, cfg)]
    answers: list[Ids] = []
    for u in encoded:
        turns += [*u.turns, *(turn for turn, _ in u.readings)]
        answers += [*u.chosen, *u.rejected, *(answer for _, answer in u.readings)]
    lengths = {
        name: min(getattr(cfg.data, name), round_up(max(map(len, texts), default=1)))
        for name, texts in (("context_len", contexts), ("turn_len", turns), ("answer_len", answers))
    }
    parts = zip(*(u.truncations for u in encoded), strict=True)
    return lengths, Truncations(*(sum(part) for part in parts))


def measure_fill(
    users: Sequence[User], tokenizer: Tokenizer, cfg: Any, items: tuple[str, ...]
) -> Fill:
    """Looks at some batches such as a run of `cfg` makes."""
    made = list(islice(iter(batches.make_user_batches(users, tokenizer, cfg, seed=0)), _BATCHES))
    replies = [(b.chosen.lengths + b.rejected.lengths).sum(axis=1) for b in made]
    prompt_tokens = [b.turns.lengths.sum(axis=1) for b in made]
    warmup = dict[str, TaskFill]()
    if cfg.warmup.steps:
        endless = warmup_batches.make_warmup_batches(users, tokenizer, cfg, seed=0, items=items)
        seen = list(islice(iter(endless), _BATCHES))
        warmup = {t: _measure_task([getattr(b, t) for b in seen]) for t in WarmupBatch._fields}
    return Fill(
        contexts=_spread(b.context.lengths for b in made),
        pairs=_spread(p + r for p, r in zip(prompt_tokens, replies, strict=True)),
        answers=_spread(replies),
        warmup=warmup,
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
