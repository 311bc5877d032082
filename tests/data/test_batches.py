"""Batches: what is drawn, what each row holds, and that the order depends on the seed alone."""

import dataclasses
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from popi_jax.config import Config
from popi_jax.data import batches, warmup_batches
from popi_jax.data.tokenizer import Tokenizer
from popi_jax.errors import UserError
from tests.data.people import ITEMS, USERS, decode_at, make_config, make_tokenizer, make_user, take


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def cfg() -> Config:
    return make_config()


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_rows_belong_together(tokenizer: Tokenizer, cfg: Config) -> None:
    batch = next(iter(batches.make_user_batches(USERS, tokenizer, cfg, seed=0)))
    assert batch.context.ids.shape == (4, 120) and batch.turns.ids.shape == (4, 3, 16)
    assert batch.chosen.ids.shape == batch.rejected.ids.shape == (4, 3, 8)
    assert all(leaf.dtype in (np.int32, np.bool_) for leaf in jax.tree.leaves(batch))
    for row in range(4):
        (n,) = (n for n in range(11) if f"number {n} ." in decode_at(tokenizer, batch.context, row))
        assert batch.pair_mask[row].sum() == min(3, len(USERS[n].pairs))
        seen = set()
        for k in np.flatnonzero(batch.pair_mask[row]):
            words = decode_at(tokenizer, batch.turns, row, k).split()
            assert words[:2] == ["pair", str(n)]
            assert decode_at(tokenizer, batch.chosen, row, k) == f"yes {n} {words[2]}"
            assert decode_at(tokenizer, batch.rejected, row, k) == f"no {n} {words[2]}"
            seen.add(words[2])
        assert len(seen) == batch.pair_mask[row].sum()  # without replacement
    unused = ~batch.pair_mask
    assert (
        not batch.turns.lengths[unused].any()
        and (batch.turns.ids[unused] == tokenizer.pad_id).all()
    )


def test_a_pair_has_the_same_number_wherever_it_is_drawn(tokenizer: Tokenizer, cfg: Config) -> None:
    """In training batches and in those of all pairs, from which the reference's log-probs are
    stored."""
    whole = [batch.batch for batch in batches.make_eval_batches(USERS, tokenizer, cfg)]
    known = {
        int(b.pair_number[at]): (
            decode_at(tokenizer, b.turns, *at),
            decode_at(tokenizer, b.chosen, *at),
        )
        for b in whole
        for at in zip(*np.nonzero(b.pair_mask), strict=True)
    }
    assert len(known) == sum(len(user.pairs) for user in USERS)
    flat = np.concatenate([b.pair_number for b in whole])[: len(USERS)]
    first = np.arange(len(USERS)) * cfg.data.num_pairs
    np.testing.assert_array_equal(flat[:, 0], first)  # rows of users, one after the other
    for b in take(batches.make_user_batches(USERS, tokenizer, cfg, seed=0), 5):
        for at in zip(*np.nonzero(b.pair_mask), strict=True):
            assert known[int(b.pair_number[at])] == (
                decode_at(tokenizer, b.turns, *at),
                decode_at(tokenizer, b.chosen, *at),
            )


def test_every_user_once_per_epoch_and_another_order_each_epoch(
    tokenizer: Tokenizer, cfg: Config
) -> None:
    made = take(
        batches.make_user_batches(USERS, tokenizer, cfg, seed=0), 11
    )  # 4 epochs of 11 users
    who = [decode_at(tokenizer, b.context, row).split("\n")[0] for b in made for row in range(4)]
    epochs = [who[start : start + 11] for start in range(0, 44, 11)]
    assert all(len(set(epoch)) == 11 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert np.concatenate([b.index for b in made]).tolist() == list(range(44))


def test_pairs_are_drawn_anew_and_all_in_the_end(tokenizer: Tokenizer) -> None:
    users, cfg = [make_user(0, 6)], make_config(batch__pairs=2)
    made = take(batches.make_user_batches(users, tokenizer, cfg, seed=0), 5)
    draws = [
        tuple(decode_at(tokenizer, b.turns, row, k) for k in range(2))
        for b in made
        for row in range(4)
    ]
    assert len(set(draws)) > 5 and len({turn for draw in draws for turn in draw}) == 6


def test_seed_alone_decides(tokenizer: Tokenizer, cfg: Config) -> None:
    first = take(batches.make_user_batches(USERS, tokenizer, cfg, seed=3), 4)
    assert_equal(first, take(batches.make_user_batches(USERS, tokenizer, cfg, seed=3), 4))
    other = take(batches.make_user_batches(USERS, tokenizer, cfg, seed=4), 4)
    assert any((a.context.ids != b.context.ids).any() for a, b in zip(first, other, strict=True))


def test_no_stage_of_a_run_has_the_data_seed_of_another() -> None:
    stages = ("warmup", "main")
    derived = [batches.derive_data_seed(seed, stage) for seed in range(50) for stage in stages]
    assert len(set(derived)) == 100
    assert derived[:2] == [0, 1]  # seed 0 draws what it always drew
    assert batches.derive_data_seed(2**31 - 1, "main") < 2**32  # as grain allows


def test_processes_share_the_global_batch(tokenizer: Tokenizer, cfg: Config) -> None:
    whole = take(batches.make_user_batches(USERS, tokenizer, cfg, seed=0), 4)
    warm = take(warmup_batches.make_warmup_batches(USERS, tokenizer, cfg, seed=0, items=ITEMS), 4)
    halves, warm_halves = [], []
    for p in range(2):
        place = {"seed": 0, "process_index": p, "process_count": 2}
        halves.append(take(batches.make_user_batches(USERS, tokenizer, cfg, **place), 4))
        warm_halves.append(
            take(warmup_batches.make_warmup_batches(USERS, tokenizer, cfg, items=ITEMS, **place), 4)
        )
    assert_equal(whole, jax.tree.map(lambda *parts: np.concatenate(parts), *halves))
    assert_equal(warm, jax.tree.map(lambda *parts: np.concatenate(parts), *warm_halves))
    with pytest.raises(
        UserError, match="batch.users: 4 users cannot be divided among 3 processes; try 3"
    ):
        batches.make_user_batches(USERS, tokenizer, cfg, seed=0, process_count=3)


@pytest.mark.parametrize("make", [batches.make_user_batches, warmup_batches.make_warmup_batches])
def test_resume_is_exact(tokenizer: Tokenizer, cfg: Config, make: Any) -> None:
    iterator = iter(make(USERS, tokenizer, cfg, seed=0))
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(4)]
    resumed = iter(make(USERS, tokenizer, cfg, seed=0))
    resumed.set_state(state)
    assert_equal(expected, [next(resumed) for _ in range(4)])


WORKERS = """
import itertools
import jax, numpy as np
from absl import flags
from popi_jax.data.batches import make_user_batches
from popi_jax.data.warmup_batches import make_warmup_batches
from tests.data.people import ITEMS, USERS, make_config, make_tokenizer

if __name__ == "__main__":
    flags.FLAGS(["x"])
    tokenizer = make_tokenizer()

    def start(workers, make, **how):
        return iter(make(USERS, tokenizer, make_config(data__workers=workers), seed=0, **how))

    for make, how in ((make_user_batches, {}), (make_warmup_batches, {"items": ITEMS})):
        expected = list(itertools.islice(start(0, make, **how), 6))
        iterator = start(2, make, **how)
        first = [next(iterator) for _ in range(3)]
        state = iterator.get_state()
        next(iterator)
        iterator.set_state(state)
        found = first + [next(iterator) for _ in range(3)]
        jax.tree.map(np.testing.assert_array_equal, expected, found)
        iterator.close()
    print("equal")
"""


@pytest.mark.slow
def test_worker_processes_give_the_same_batches_and_resume(tmp_path: pathlib.Path) -> None:
    # A process of its own: closures whose shapes are checked, as in these tests, cannot be sent to
    # a worker.
    (tmp_path / "run.py").write_text(WORKERS)
    root = str(pathlib.Path(__file__).parents[2])
    command = [sys.executable, str(tmp_path / "run.py")]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip().endswith("equal"), done.stderr


def test_pairs_with_equal_replies_are_no_pairs(tokenizer: Tokenizer) -> None:
    """They are neither drawn nor counted; the numbers of the others do not change."""
    user, cfg = make_user(0, 4), make_config(batch__pairs=4)
    pairs = [
        dataclasses.replace(p, rejected=p.chosen) if k % 2 else p for k, p in enumerate(user.pairs)
    ]
    user = dataclasses.replace(user, pairs=tuple(pairs))
    for batch in take(batches.make_user_batches([user], tokenizer, cfg, seed=0), 2):
        assert batch.pair_mask.tolist() == [[True, True, False, False]] * 4
        assert {*batch.pair_number[:, :2].flat} == {0, 2}
    (made,) = batches.make_eval_batches([user], tokenizer, cfg)
    assert made.batch.pair_mask[0, :4].tolist() == [True, False, True, False]
    assert made.batch.pair_number[0, :4].tolist() == [0, 1, 2, 3]
    whole, cut = batches.encode_all([user], tokenizer, cfg)
    assert whole.pair_mask.tolist() == [[True, False, True, False]] and cut.equal == 2


def test_no_users_is_told(tokenizer: Tokenizer, cfg: Config) -> None:
    with pytest.raises(UserError, match="data.path: no user"):
        batches.make_user_batches([], tokenizer, cfg, seed=0)


def test_eval_batches(tokenizer: Tokenizer) -> None:
    cfg = make_config(data__num_pairs=5)
    made = list(batches.make_eval_batches(USERS, tokenizer, cfg))
    assert [b.user_mask.tolist() for b in made] == [[True] * 4, [True] * 4, [True] * 3 + [False]]
    assert [i for b in made for i in b.user_ids] == [u.user_id for u in USERS] + [""]
    assert np.concatenate([b.batch.index for b in made]).tolist() == list(range(12))
    masks = np.concatenate([b.batch.pair_mask for b in made])
    assert masks.sum(1).tolist() == [min(5, len(u.pairs)) for u in USERS] + [0]
    assert (np.concatenate([b.batch.context.lengths for b in made]) > 0).all()
    for n, user in enumerate(USERS):
        b, row = made[n // 4], n % 4
        assert decode_at(tokenizer, b.oracle, row) == user.oracle
        turns = [
            decode_at(tokenizer, b.batch.turns, row, k)
            for k in np.flatnonzero(b.batch.pair_mask[row])
        ]
        assert turns == [f"pair {n} {k} ?" for k in range(min(5, len(user.pairs)))]
