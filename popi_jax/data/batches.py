"""Users -> padded numpy batches. Batch s of a stage is a function of the seed and s alone: not of
processes, threads, workers or where a run began.

Refuses to touch jax: batches are numpy, and worker processes must not start a device."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import grain
import numpy as np
from jaxtyping import Bool

from popi_jax.arrays import Tokens, UserBatch
from popi_jax.data.encode import (
    EncodedUser,
    Ids,
    Truncations,
    encode_context,
    encode_user,
    get_told_len,
    tell,
)
from popi_jax.data.order import Order
from popi_jax.data.prompts import Tokenizer, encode_answer
from popi_jax.data.records import User
from popi_jax.data.selection import draw_signals
from popi_jax.data.tokens import Encoded
from popi_jax.errors import UserError

ENDLESS = 1 << 40  # batches
_AHEAD = 4  # that are made while an update runs


class EvalBatch(NamedTuple):
    """Users with all their pairs; rows that only fill the last batch have `user_mask` False and the
    id ""."""

    user_ids: list[str]
    batch: UserBatch
    oracle: Tokens  # [users summary_len]
    user_mask: np.ndarray  # [users] bool


def derive_data_seed(seed: int, stage: Literal["warmup", "main"]) -> int:
    """Returns the seed of a stage's batches, which no stage of a run with another `seed` has."""
    return 2 * seed + (stage == "main")


def make_user_batches(
    users: Encoded,
    tokenizer: Tokenizer,
    cfg: Any,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset:
    """Makes the `UserBatch` of each step, of numpy arrays: this process's rows of the global batch
    of `cfg.batch.users`.

    Users are drawn as `Order` says, each once per epoch. K = `cfg.batch.pairs` of the pairs of a
    user that count are drawn without replacement; rows beyond those that the user has are masked,
    as are all of a user without persona where the generator reads personas. The global batch is the
    concatenation of the processes' batches and does not depend on their number; `index` = step *
    users + its row in it.

    Raises: UserError when the users of a batch cannot be divided among the processes, or there are
    none."""
    size, count = cfg.batch.users, cfg.batch.pairs
    rows = pick_own_rows(size, "batch.users", process_index, process_count)
    check_users(users)
    loads, parts = list_loads(users.lengths, count), cfg.batch.microbatches
    order = Order(loads, len(users.ids), (size,), seed=seed, microbatches=parts)

    def show(user: EncodedUser, some: User) -> EncodedUser:
        told = tell(some, tokenizer, cfg) if cfg.generator.reads == "signals" else user.told
        return user._replace(context=encode_context(some, tokenizer, cfg), told=told)

    def counts(user: EncodedUser) -> bool:
        return cfg.generator.reads != "persona" or bool(user.oracle)

    def make(step: int) -> UserBatch:
        numbers, rngs = order.take(step)[rows], make_rngs(seed, step, size)[rows]
        drawn = [users.ids[n] for n in numbers.tolist()]
        picks = [
            rng.permutation(np.array(u.usable, int))[: count if counts(u) else 0]
            for u, rng in zip(drawn, rngs, strict=True)
        ]
        if cfg.data.signals_draw == "epoch":
            shown = [
                draw_signals(users.source[n], rng)
                for n, rng in zip(numbers.tolist(), rngs, strict=True)
            ]
            drawn = [show(u, some) for u, some in zip(drawn, shown, strict=True)]
        index = step * size + np.arange(size)[rows]
        batch = _pad_users(drawn, picks, index, numbers, tokenizer.pad_id, cfg.data, count)
        return batch._replace(**_add_texts(drawn, tokenizer, cfg))

    return grain.MapDataset.range(ENDLESS).map(make)


def check_users(users: Encoded) -> None:
    """Raises: UserError when there is none."""
    if not len(users.ids):
        raise UserError("data.path: no user in this split; check the path and the split fractions")


def list_loads(lengths: np.ndarray, pairs: int) -> np.ndarray:
    """[users 3] the tokens that each user brings to a batch where `pairs` of the pairs are drawn:
    signals, prompts with both replies, replies. What the generator is told in place of a summary is
    left out: runs that differ in it see the same batches."""
    drawn = np.minimum(lengths["pairs"], pairs) / np.maximum(lengths["pairs"], 1)
    answers = drawn * lengths["answers"]
    kinds = lengths["context"], drawn * lengths["turns"] + answers, answers
    return np.stack(kinds, axis=1).astype(np.float32)


def make_rngs(seed: int, step: int, rows: int) -> list[np.random.Generator]:
    """One generator for each row of the global batch of a step."""
    seeds = np.random.default_rng((seed, step)).integers(2**63, size=rows)
    return [np.random.default_rng(s) for s in seeds]


@contextlib.contextmanager
def iterate(made: grain.MapDataset, start: int = 0, workers: int = 0) -> Iterator[Iterator[Any]]:
    """The batches from step `start` on, made ahead by a thread or by `workers` processes, which end
    with the context."""
    dataset = made[start:].to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
    )
    if workers:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    iterator = iter(dataset)
    try:
        yield iterator
    finally:
        iterator.close()


def check_personas(users: Iterable[User], cfg: Any) -> None:
    """Raises: UserError when a run learns from personas and none of its training users has one."""
    needs = ""
    if teaches(cfg):
        needs = 'schedule.phases: "supervised" phases teach'
    elif cfg.generator.reads == "persona":
        needs = "generator.reads = persona: it reads"
    if needs and not any(user.oracle.strip() for user in users):
        raise UserError(
            f"{needs} the persona of each user, but no training user has one; give it as oracle "
            "(docs/data.md), or take another schedule"
        )


def teaches(cfg: Any) -> bool:
    """Whether the main stage teaches the inference model personas."""
    return any(phase.split()[:1] == ["supervised"] for phase in cfg.schedule.phases)


def make_eval_batches(users: Sequence[EncodedUser], pad_id: int, cfg: Any) -> Iterator[EvalBatch]:
    """Yields all users in order with all their pairs (at most `data.num_pairs`),
    `evaluation.batch_users` to a batch.

    The last batch is filled with its first user, all of whose pairs are masked: no row is ever
    without a context."""
    size, count = cfg.evaluation.batch_users, cfg.data.num_pairs
    for start in range(0, len(users), size):
        rows = [users[i] for i in range(start, min(start + size, len(users)))]
        fill = size - len(rows)
        user_ids = [u.user_id for u in rows] + [""] * fill
        picks = [np.arange(len(u.turns)) for u in rows] + [np.arange(0)] * fill
        rows += rows[:1] * fill
        numbers = start + np.arange(size)
        yield EvalBatch(
            user_ids=user_ids,
            batch=_pad_users(rows, picks, numbers, numbers, pad_id, cfg.data, count),
            oracle=pad([u.oracle for u in rows], cfg.data.summary_len, pad_id),
            user_mask=np.arange(size) < size - fill,
        )


def encode_all(
    users: Sequence[User], tokenizer: Tokenizer, cfg: Any
) -> tuple[UserBatch, Truncations]:
    """All users in order with all their pairs (at most `data.num_pairs`), in arrays as long as the
    longest text of each kind, and what had to be shortened."""
    rows = [encode_user(user, tokenizer, cfg) for user in users]
    numbers, picks = np.arange(len(rows)), [np.arange(len(row.turns)) for row in rows]
    texts = {
        "context_len": [row.context for row in rows],
        "turn_len": [turn for row in rows for turn in row.turns],
        "answer_len": [ids for row in rows for ids in row.chosen + row.rejected],
    }
    longest = {name: max(map(len, found), default=1) for name, found in texts.items()}
    limits, count = dataclasses.replace(cfg.data, **longest), max(map(len, picks), default=1)
    made = _pad_users(rows, picks, numbers, numbers, tokenizer.pad_id, limits, max(count, 1))
    cuts = zip(*(row.truncations for row in rows), strict=True)
    return made, Truncations(*map(sum, cuts))


def pick_own_rows(size: int, field: str, process_index: int, process_count: int) -> slice:
    """Returns this process's rows of a global batch. Raises: UserError when they are no equal
    share."""
    if size % process_count:
        near = max(size // process_count, 1) * process_count
        raise UserError(
            f"{field}: {size} users cannot be divided among {process_count} processes; try {near}"
        )
    each = size // process_count
    return slice(process_index * each, (process_index + 1) * each)


def pad(rows: list[Ids], length: int, pad_id: int) -> Tokens:
    """Returns Tokens [rows length]."""
    ids = np.full((len(rows), length), pad_id, np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    return Tokens(ids, np.array([len(tokens) for tokens in rows], np.int32))


def pad_nested(rows: list[list[Ids]], count: int, length: int, pad_id: int) -> Tokens:
    """Returns Tokens [rows count length]; texts that a row lacks have length 0."""
    texts = [tokens for row in rows for tokens in row + [[]] * (count - len(row))]
    flat = pad(texts, length, pad_id)
    shape = len(rows), count
    return Tokens(flat.ids.reshape(*shape, length), flat.lengths.reshape(shape))


def _add_texts(users: list[EncodedUser], tokenizer: Tokenizer, cfg: Any) -> dict[str, Tokens]:
    """Returns the fields of a `UserBatch` that only baselines have."""
    found, d, pad_id = dict[str, Tokens](), cfg.data, tokenizer.pad_id
    if length := get_told_len(cfg):
        found["told"] = pad([u.told for u in users], length, pad_id)
    if teaches(cfg):
        texts = (u.oracle_text.strip() for u in users)
        taught = [encode_answer(tokenizer, text) if text else [] for text in texts]
        found["taught"] = pad([ids[: d.summary_len] for ids in taught], d.summary_len, pad_id)
    return found


def _pad_users(
    users: list[EncodedUser],
    picks: list[np.ndarray],
    index: np.ndarray,
    numbers: np.ndarray,
    pad_id: int,
    limits: Any,
    count: int,
) -> UserBatch:
    """Returns the batch of the picked pairs of each user, of which the usable ones count; `limits`:
    the `data` part of the configuration."""

    def pad_picked(field: str, length: int) -> Tokens:
        texts = [[getattr(u, field)[k] for k in ks] for u, ks in zip(users, picks, strict=True)]
        return pad_nested(texts, count, length, pad_id)

    pair_number = np.zeros((len(users), count), np.int32)
    for row, number, ks in zip(pair_number, numbers, picks, strict=True):
        row[: len(ks)] = number * limits.num_pairs + ks
    return UserBatch(
        index=index.astype(np.int32),
        context=pad([u.context for u in users], limits.context_len, pad_id),
        turns=pad_picked("turns", limits.turn_len),
        chosen=pad_picked("chosen", limits.answer_len),
        rejected=pad_picked("rejected", limits.answer_len),
        pair_mask=_mark_usable(users, picks, count),
        pair_number=pair_number,
    )


def _mark_usable(
    users: list[EncodedUser], picks: list[np.ndarray], count: int
) -> Bool[np.ndarray, "users pairs"]:
    mask = np.zeros((len(users), count), bool)
    for row, user, ks in zip(mask, users, picks, strict=True):
        row[: len(ks)] = [k in user.usable for k in ks.tolist()]
    return mask
