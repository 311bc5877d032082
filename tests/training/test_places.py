"""Places of summaries: chosen from their lengths, followed while these change, and the same in a
run that continues."""

import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.arrays import Frozen, Mean, RoleState, TrainState
from popi_jax.data.measure import Spread
from popi_jax.training import places
from popi_jax.training.places import PARTS, WINDOW, Follower
from tests.training import small

LONGEST, USERS = 64, 16
CHOOSE = partial(places.choose_parts, users=USERS, shards=1, longest=LONGEST)


def rows(lengths: list[float], unpadded: float = 1.0) -> list[dict[str, float]]:
    return [{"inference/summary_len": x, "inference/unpadded": unpadded} for x in lengths]


@pytest.mark.parametrize(
    ("mean", "std", "expected"), [(64.0, 0.0, 16), (32.0, 0.0, 9), (32.0, 8.0, 10), (1.0, 0.0, 1)]
)
def test_places_for_what_was_measured_and_half_a_part_to_spare(
    mean: float, std: float, expected: int
) -> None:
    assert CHOOSE(Spread(mean, std)) == expected


def test_lengths_are_those_of_the_means_of_users() -> None:
    drawn = [jnp.array([[2, 4], [6, 6]]), jnp.array([[1, 1], [10, 8]])]
    found = places.measure_lengths(drawn, small.make_mesh(1, 1, 1))
    means = np.array([3.0, 6.0, 1.0, 9.0])
    np.testing.assert_allclose(found, (means.mean(), means.std()), rtol=1e-6)


def test_longer_summaries_get_more_places_only_where_they_do_not_fit() -> None:
    follow = partial(places.follow, choose=CHOOSE, batch_users=USERS)
    longer = [40.0] * WINDOW
    assert follow(6, rows(longer, unpadded=0.5)) == 11
    assert follow(6, rows(longer, unpadded=0.95)) == 6
    assert follow(11, rows(longer, unpadded=0.5)) == 12  # it is not the summaries
    assert follow(16, rows(longer, unpadded=0.5)) == 16


def test_shorter_summaries_give_places_back_but_not_few() -> None:
    follow = partial(places.follow, choose=CHOOSE, batch_users=USERS)
    assert follow(16, rows([40.0] * WINDOW)) == 11
    assert follow(13, rows([40.0] * WINDOW)) == 13


def test_the_newest_updates_count_and_too_few_do_not() -> None:
    follow = partial(places.follow, choose=CHOOSE, batch_users=USERS)
    assert follow(16, rows([64.0] * 8 + [20.0] * 8)) == follow(16, rows([20.0] * 16)) == 6
    assert follow(16, rows([20.0] * 3)) == 16
    spread = follow(16, rows([20.0, 24.0] * 8))  # batches differ by 2: users by 8
    assert spread == CHOOSE(Spread(22.0, 2.0 * math.sqrt(USERS)))


def mean(value: float, weight: float = 1.0) -> Mean:
    return Mean(jnp.float32(value * weight), jnp.float32(weight))


class Updates:
    """Counts compilations; summaries become shorter by a token in each update."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def make(self, parts: int) -> places.MainUpdate:
        self.made.append(parts)

        def update(state: TrainState, frozen: Frozen, batch: None) -> tuple[TrainState, dict]:
            length = mean(max(60.0 - int(state.step), 8.0), 3.0)
            skipped = mean(0.0, 0.0)  # does not apply
            names = {"inference/summary_len": length, "inference/unpadded": skipped, "x": skipped}
            return state._replace(step=state.step + 1), names

        return update


def at(step: int) -> TrainState:
    nothing = RoleState(jnp.int32(0), {}, (), None)
    return TrainState(nothing, nothing, jnp.int32(step), jax.random.key(0))


def run(follower: Follower, first: int, last: int) -> list[int]:
    parts, state = [], at(first)
    for _ in range(first, last):
        state, _ = follower(state, Frozen({}, {}), None)
        parts.append(follower.parts)
    return parts


def test_a_run_that_continues_chooses_what_one_that_never_stopped_does(tmp_path: Path) -> None:
    follow = partial(places.follow, choose=CHOOSE, batch_users=USERS)
    updates = Updates()
    whole = run(Follower(updates.make, PARTS, follow), 0, 70)
    assert len(set(whole)) >= 3 and updates.made == sorted(set(whole), reverse=True)
    lines = []
    for step in range(1, 71):
        _, metrics = Updates().make(0)(at(step - 1), Frozen({}, {}), None)
        lines.append(json.dumps({"step": step, **places.read_row(metrics)}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for step in (0, 1, 15, 16, 17, 40, 64):
        again = Follower(Updates().make, PARTS, follow)
        again.catch_up(step, places.read_rows(str(tmp_path), 1, step))
        assert run(again, step, 70) == whole[step:]


def test_rows_are_numbers_as_they_were_written() -> None:
    metrics = {"a": mean(0.1, 3.0), "b": mean(1.0, 0.0)}
    assert places.read_row(metrics) == {"a": float(jnp.float32(0.1 * 3.0)) / 3.0}
    assert places.read_row({"a": 0.5}) == {"a": 0.5}


def test_no_metrics_no_rows(tmp_path: Path) -> None:
    assert places.read_rows(str(tmp_path), 1, 5) == []
