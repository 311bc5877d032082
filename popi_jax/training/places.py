"""How many places summaries get in a batch without padding (packing.py), from the lengths that they
really have: those of the first batches are drawn before the update is compiled, later ones are
followed while it runs. It decides about the speed alone, but rounding depends on it: so it follows
from what is kept with the run, and a run that continues chooses the same."""

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from jaxtyping import Array, Float, Int

from popi_jax.arrays import Frozen, Mean, Metrics, TrainState
from popi_jax.data.measure import Spread
from popi_jax.popi.plan import UpdatePlan
from popi_jax.sharding import replicated

PARTS = 16  # of the longest summaries: how finely places are chosen, so that runs share programs
WINDOW = 16  # updates after which it is looked whether the places still are the right ones
ENOUGH = 0.9  # of updates must run without padding
BATCHES = 1  # whose summaries are drawn at the start

MainUpdate = Callable[[TrainState, Frozen, Any], tuple[TrainState, Metrics]]
Row = Mapping[str, float]  # metrics of an update, without those that do not apply


def measure_lengths(
    lengths: Sequence[Int[Array, "users group"]], mesh: jax.sharding.Mesh
) -> Spread:
    """Of the mean length of a user's summaries."""

    def describe(lengths: list[Array]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        means = jnp.concatenate([jnp.mean(x.astype(jnp.float32), axis=1) for x in lengths])
        return jnp.mean(means), jnp.std(means)

    mean, std = jax.jit(describe, out_shardings=replicated(mesh))(list(lengths))
    return Spread(float(mean), float(std))


def choose_parts(summaries: Spread, users: int, shards: int, longest: int) -> int:
    """Sixteenths of the places of full summaries, half of one at least to spare, that the summaries
    of the `users` of a shard need in nearly all batches."""
    needed = summaries.budget(users, shards) / (users * longest)
    return min(math.ceil(PARTS * needed + 0.5), PARTS)


def follow(
    parts: int, rows: Sequence[Row], choose: Callable[[Spread], int], batch_users: int
) -> int:
    """The parts for the next updates, from the metrics of the last WINDOW. More where too few of
    them ran without padding, be it for their signals, which share the places; fewer where at least
    three are spared.

    choose: `choose_parts` of the run. The means of batches tell how much those of users differ."""
    lengths = [row["inference/summary_len"] for row in rows if "inference/summary_len" in row]
    if len(lengths) < WINDOW // 4:
        return parts
    newest = lengths[len(lengths) // 2 :]
    wanted = choose(Spread(fmean(newest), pstdev(newest) * math.sqrt(batch_users)))
    fits = [row["inference/unpadded"] for row in rows if "inference/unpadded" in row]
    if fits and fmean(fits) < ENOUGH:
        return min(max(wanted, parts + 1), PARTS)
    return wanted if wanted <= parts - 3 else parts


class Follower:
    """The update of the main stage, compiled anew where summaries have become longer or shorter.

    Looks at steps that are multiples of WINDOW, so a run that continues, with the metrics of the
    steps before (`catch_up`), does as one that never stopped."""

    def __init__(
        self, make: Callable[[int], MainUpdate], parts: int, choose: Callable[[int, list[Row]], int]
    ) -> None:
        """make(parts): the update. choose(parts, rows): those of the next updates."""
        self._make, self._choose, self.parts = make, choose, parts
        self._rows: deque[tuple[int, Row | Metrics]] = deque(maxlen=WINDOW)
        self._update: MainUpdate | None = None
        self._step = 0

    def catch_up(self, step: int, rows: Iterable[tuple[int, Row]]) -> None:
        """Continues behind `step`; rows: (step, metrics) of the main stage up to there."""
        for number, row in rows:
            self._note(number, row)
        self._step = step

    def __call__(self, state: TrainState, frozen: Frozen, batch: Any) -> tuple[TrainState, Metrics]:
        if self._update is None:
            self._update = self._make(self.parts)
        state, metrics = self._update(state, frozen, batch)
        self._step += 1
        before = self.parts
        self._note(self._step, metrics)
        if self.parts != before:
            logging.info(
                "Summaries fill %d sixteenths of their length, no longer %d: compiling again",
                *(self.parts, before),
            )
            self._update = None
        return state, metrics

    def _note(self, step: int, metrics: Row | Metrics) -> None:
        self._rows.append((step, {k: v for k, v in metrics.items() if k in FOLLOWED}))
        if step % WINDOW == 0:
            rows = [row for number, row in self._rows if number > step - WINDOW]
            self.parts = self._choose(self.parts, list(map(read_row, rows)))


FOLLOWED = ("inference/summary_len", "inference/unpadded")


def read_row(metrics: Row | Metrics) -> Row:
    """The numbers of an update as metrics.jsonl has them."""
    read = {k: jax.device_get(v) if isinstance(v, Mean) else v for k, v in metrics.items()}
    return {
        name: float(x.total) / float(x.weight) if isinstance(x, Mean) else x
        for name, x in read.items()
        if not isinstance(x, Mean) or float(x.weight) > 0
    }


def read_rows(workdir: str, first: int, last: int) -> list[tuple[int, Row]]:
    """(step, metrics) of the steps from `first` to `last` of a run."""
    path = epath.Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = (json.loads(line) for line in lines)
    return [(row["step"], row) for row in rows if first <= row["step"] <= last]


def trains_inference(plan: UpdatePlan) -> bool:
    """By reward: only then are summaries sampled in groups."""
    return any(kind.inference and not kind.supervised for kind in plan.kinds)
