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
from popi_jax.data import batches, encode, tokens
from popi_jax.data.records import User
from popi_jax.data.tokenizer import Tokenizer
from popi_jax.errors import UserError
from tests.data.people import (
    ITEMS,
    USERS,
    decode_at,
    make_config,
    make_tokenizer,
    make_user,
    take,
    user_batches,
    warm_batches,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def cfg() -> Config:
    return make_config()


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def eval_batches(
    tokenizer: Tokenizer, cfg: Config, users: list[User] = USERS
) -> list[batches.EvalBatch]:
    encoded = [encode.encode_user(user, tokenizer, cfg) for user in users]
    return list(batches.make_eval_batches(encoded, tokenizer.pad_id, cfg))


def test_rows_belong_together(tokenizer: Tokenizer, cfg: Config) -> None:
    batch = user_batches(USERS, tokenizer, cfg, seed=0)[0]
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
    whole = [batch.batch for batch in eval_batches(tokenizer, cfg)]
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
    for b in take(user_batches(USERS, tokenizer, cfg, seed=0), 5):
        for at in zip(*np.nonzero(b.pair_mask), strict=True):
            assert known[int(b.pair_number[at])] == (
                decode_at(tokenizer, b.turns, *at),
                decode_at(tokenizer, b.chosen, *at),
            )


def test_every_user_once_per_epoch_and_another_order_each_epoch(
    tokenizer: Tokenizer, cfg: Config
) -> None:
    """Whatever the step: an epoch of 11 users may end inside a batch of 4."""
    made = take(user_batches(USERS, tokenizer, cfg, seed=0), 110)  # 40 epochs
    texts = [decode_at(tokenizer, b.context, row) for b in made for row in range(4)]
    who = np.array([int(text.split("number ")[1].split()[0]) for text in texts])
    for step in range(1, 111):
        drawn = np.bincount(who[: 4 * step], minlength=11)
        assert drawn.max() - drawn.min() <= 1
    assert len({tuple(who[start : start + 44]) for start in range(0, 440, 44)}) == 10
    assert np.concatenate([b.index for b in made]).tolist() == list(range(440))


def test_pairs_are_drawn_anew_and_all_in_the_end(tokenizer: Tokenizer) -> None:
    users, cfg = [make_user(0, 6)], make_config(batch__pairs=2)
    made = take(user_batches(users, tokenizer, cfg, seed=0), 5)
    draws = [
        tuple(decode_at(tokenizer, b.turns, row, k) for k in range(2))
        for b in made
        for row in range(4)
    ]
    assert len(set(draws)) > 5 and len({turn for draw in draws for turn in draw}) == 6


def test_seed_alone_decides(tokenizer: Tokenizer, cfg: Config) -> None:
    first = take(user_batches(USERS, tokenizer, cfg, seed=3), 4)
    assert_equal(first, take(user_batches(USERS, tokenizer, cfg, seed=3), 4))
    other = take(user_batches(USERS, tokenizer, cfg, seed=4), 4)
    assert any((a.context.ids != b.context.ids).any() for a, b in zip(first, other, strict=True))


def test_no_stage_of_a_run_has_the_data_seed_of_another() -> None:
    stages = ("warmup", "main")
    derived = [batches.derive_data_seed(seed, stage) for seed in range(50) for stage in stages]
    assert len(set(derived)) == 100
    assert derived[:2] == [0, 1]  # seed 0 draws what it always drew
    assert batches.derive_data_seed(2**31 - 1, "main") < 2**32  # as grain allows


def test_processes_share_the_global_batch(tokenizer: Tokenizer, cfg: Config) -> None:
    whole = take(user_batches(USERS, tokenizer, cfg, seed=0), 4)
    warm = take(warm_batches(USERS, tokenizer, cfg, seed=0, items=ITEMS), 4)
    halves, warm_halves = [], []
    for p in range(2):
        place = {"seed": 0, "process_index": p, "process_count": 2}
        halves.append(take(user_batches(USERS, tokenizer, cfg, **place), 4))
        warm_halves.append(take(warm_batches(USERS, tokenizer, cfg, items=ITEMS, **place), 4))
    assert_equal(whole, jax.tree.map(lambda *parts: np.concatenate(parts), *halves))
    assert_equal(warm, jax.tree.map(lambda *parts: np.concatenate(parts), *warm_halves))
    with pytest.raises(
        UserError, match="batch.users: 4 users cannot be divided among 3 processes; try 3"
    ):
        user_batches(USERS, tokenizer, cfg, seed=0, process_count=3)


@pytest.mark.parametrize("make", [user_batches, warm_batches])
def test_a_batch_follows_from_its_number_alone(
    tokenizer: Tokenizer, cfg: Config, make: Any
) -> None:
    """From whatever step they are made on, in whatever order they are asked for, on one host or
    more."""
    whole = take(make(USERS, tokenizer, cfg, seed=0), 20)
    again = make(USERS, tokenizer, cfg, seed=0)
    for step in (19, 0, 17, 16):
        assert_equal(whole[step], again[step])
    for start in (1, 15):
        for hosts in (1, 2):
            parts = []
            for host in range(hosts):
                place = {"process_index": host, "process_count": hosts}
                own = make(USERS, tokenizer, cfg, seed=0, **place)
                with batches.iterate(own, start) as iterator:
                    parts.append([next(iterator) for _ in range(2)])
            found = jax.tree.map(lambda *x: np.concatenate(x), *parts)
            assert_equal(whole[start : start + 2], found)
    far = 10**9 + 7  # at once
    assert_equal(again[far], make(USERS, tokenizer, cfg, seed=0)[far])


WORKERS = """
import jax, numpy as np
from absl import flags
from popi_jax.data.batches import iterate
from tests.data.people import ITEMS, USERS, make_config, make_tokenizer, user_batches, warm_batches

if __name__ == "__main__":
    flags.FLAGS(["x"])
    tokenizer, cfg = make_tokenizer(), make_config()
    for make, how in ((user_batches, {}), (warm_batches, {"items": ITEMS})):
        made = make(USERS, tokenizer, cfg, seed=0, **how)
        for workers, start in ((1, 0), (2, 3)):
            with iterate(made, start, workers) as iterator:
                found = [next(iterator) for _ in range(4)]
            expected = [made[start + n] for n in range(4)]
            jax.tree.map(np.testing.assert_array_equal, expected, found)
    print("equal")
"""


@pytest.mark.slow
def test_worker_processes_give_the_same_batches_from_any_step(tmp_path: pathlib.Path) -> None:
    # A process of its own: closures whose shapes are checked, as in these tests, cannot be sent to
    # a worker.
    (tmp_path / "run.py").write_text(WORKERS)
    root = str(pathlib.Path(__file__).parents[2])
    command = [sys.executable, str(tmp_path / "run.py")]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip().endswith("equal"), done.stderr


def test_users_that_are_kept_on_the_disk_give_the_same_batches(
    tokenizer: Tokenizer, cfg: Config, tmp_path: pathlib.Path
) -> None:
    kept = tokens.open_encoded(USERS, tokenizer, cfg, tmp_path)
    assert isinstance(kept.ids, tokens.TokenFiles)
    made = batches.make_user_batches(kept, tokenizer, cfg, seed=0)
    assert_equal(take(made, 5), take(user_batches(USERS, tokenizer, cfg, seed=0), 5))


def test_batches_and_their_halves_hold_about_the_same_tokens(tokenizer: Tokenizer) -> None:
    """Of users whose signals differ tenfold, each batch of 8 rows for one, two or four devices."""
    users = [
        dataclasses.replace(make_user(n, 3), survey="tea " * (9 * (n * 7 % 64))) for n in range(64)
    ]
    cfg = make_config(data__context_len=1000, batch__users=8)
    made = take(user_batches(users, tokenizer, cfg, seed=0), 8)
    lengths = np.stack([b.context.lengths for b in made])  # an epoch
    assert lengths.max() > 8 * lengths.min()
    for users_of_a_shard, most in ((8, 1.02), (4, 1.05), (2, 1.1)):
        totals = lengths.reshape(8, -1, users_of_a_shard).sum(axis=2)
        assert totals.max() <= most * totals.mean(), users_of_a_shard


def test_pairs_with_equal_replies_are_no_pairs(tokenizer: Tokenizer) -> None:
    """They are neither drawn nor counted; the numbers of the others do not change."""
    user, cfg = make_user(0, 4), make_config(batch__pairs=4)
    pairs = [
        dataclasses.replace(p, rejected=p.chosen) if k % 2 else p for k, p in enumerate(user.pairs)
    ]
    user = dataclasses.replace(user, pairs=tuple(pairs))
    for batch in take(user_batches([user], tokenizer, cfg, seed=0), 2):
        assert batch.pair_mask.tolist() == [[True, True, False, False]] * 4
        assert {*batch.pair_number[:, :2].flat} == {0, 2}
    (made,) = eval_batches(tokenizer, cfg, [user])
    assert made.batch.pair_mask[0, :4].tolist() == [True, False, True, False]
    assert made.batch.pair_number[0, :4].tolist() == [0, 1, 2, 3]
    whole, cut = batches.encode_all([user], tokenizer, cfg)
    assert whole.pair_mask.tolist() == [[True, False, True, False]] and cut.equal == 2


@pytest.mark.parametrize("reads", ["summary", "signals"])
def test_signals_are_drawn_anew_in_each_epoch(tokenizer: Tokenizer, reads: str) -> None:
    """And the rest of the batch is the same as without."""
    phases = {"schedule__phases": ("generator 1",), "generator__reads": reads}
    user, cfg = make_user(0, 3), make_config(**phases)
    drawing = make_config(data__signals_draw="epoch", **phases)
    fixed, drawn = (take(user_batches([user], tokenizer, c, seed=0), 4) for c in (cfg, drawing))
    assert_equal([b.turns for b in fixed], [b.turns for b in drawn])
    texts = {decode_at(tokenizer, b.context, row) for b in drawn for row in range(4)}
    whole = decode_at(tokenizer, fixed[0].context, 0)
    assert len(texts) > 5 and all("i keep bees" in text for text in texts)
    for shot in ("shot 0 0", "shot 0 2", "tea ?"):
        assert 0 < sum(shot in text for text in texts) < len(texts) and shot in whole
    again = user_batches([user], tokenizer, drawing, seed=0)
    assert_equal(drawn[3], again[3])
    if reads == "signals":
        for b in drawn:
            for row in range(4):
                told = decode_at(tokenizer, b.told, row)
                assert told in decode_at(tokenizer, b.context, row)


def test_no_users_is_told(tokenizer: Tokenizer, cfg: Config) -> None:
    with pytest.raises(UserError, match="data.path: no user"):
        user_batches([], tokenizer, cfg, seed=0)


def test_eval_batches(tokenizer: Tokenizer) -> None:
    cfg = make_config(data__num_pairs=5)
    made = eval_batches(tokenizer, cfg)
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
