"""Users -> padded numpy batches, in an order that depends on the seed alone: not on processes,
threads or workers.

Refuses to touch jax: batches are numpy, and worker processes must not start a device."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import grain
import numpy as np
from jaxtyping import Bool

from popi_jax.arrays import Tokens, UserBatch
from popi_jax.data.encode import EncodedUser, Ids, Truncations, encode_user, get_told_len
from popi_jax.data.prompts import Tokenizer, encode_answer
from popi_jax.data.records import User
from popi_jax.errors import UserError

_MAX_CACHED_USERS = 20_000  # about 5 kB each; others are encoded anew each time


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
    source: Sequence[User],
    tokenizer: Tokenizer,
    cfg: Any,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """Makes endless `UserBatch`es of numpy arrays: this process's rows of the global batch of
    `cfg.batch.users`.

    Users are reshuffled each epoch and an epoch may end inside a batch. K = `cfg.batch.pairs` of a
    user's usable pairs are drawn without replacement; rows beyond those that the user has are
    masked, as are all of a user without persona where the generator reads personas. The global
    batch is the concatenation of the processes' batches and does not depend on their number;
    `index` = step * users + its row in it.

    Raises: UserError when the users of a batch cannot be divided among the processes, or `source`
    is empty."""
    size, count = cfg.batch.users, cfg.batch.pairs
    rows = pick_own_rows(size, "batch.users", process_index, process_count)
    users = EncodedUsers(source, tokenizer, cfg)

    def counts(user: EncodedUser) -> bool:
        return cfg.generator.reads != "persona" or bool(user.oracle)

    def make(step: int, members: np.ndarray, rngs: list[np.random.Generator]) -> UserBatch:
        drawn = users.take(members[rows])
        picks = [
            rng.permutation(np.array(u.usable, int))[: count if counts(u) else 0]
            for u, rng in zip(drawn, rngs[rows], strict=True)
        ]
        index = step * size + np.arange(size)[rows]
        batch = _pad_users(drawn, picks, index, members[rows], tokenizer.pad_id, cfg.data, count)
        return batch._replace(**_add_texts(drawn, tokenizer, cfg))

    return make_steps(len(source), size, make, seed=seed, workers=cfg.data.workers)


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


def make_eval_batches(users: Sequence[User], tokenizer: Tokenizer, cfg: Any) -> Iterator[EvalBatch]:
    """Yields all users in order with all their pairs (at most `data.num_pairs`),
    `evaluation.batch_users` to a batch.

    The last batch is filled with its first user, all of whose pairs are masked: no row is ever
    without a context."""
    size, count, pad_id = cfg.evaluation.batch_users, cfg.data.num_pairs, tokenizer.pad_id
    for start in range(0, len(users), size):
        own = range(start, min(start + size, len(users)))
        rows = [encode_user(users[i], tokenizer, cfg) for i in own]
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


class EncodedUsers:
    """Encodes users of a source on demand and keeps them; a copy sent to a worker process starts
    empty."""

    def __init__(self, source: Sequence[User], tokenizer: Tokenizer, cfg: Any) -> None:
        self._parts = (source, tokenizer, cfg)
        self._cache: dict[int, EncodedUser] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return EncodedUsers, self._parts

    def take(self, numbers: np.ndarray) -> list[EncodedUser]:
        """Returns the users of these numbers."""
        return [self._encode(n) for n in numbers.tolist()]

    def _encode(self, number: int) -> EncodedUser:
        found = self._cache.get(number)
        if found is None:
            source, tokenizer, cfg = self._parts
            found = encode_user(source[number], tokenizer, cfg)
            if len(self._cache) < _MAX_CACHED_USERS:
                self._cache[number] = found
        return found


def make_steps(
    num_users: int,
    size: int,
    make: Callable[[int, np.ndarray, list[np.random.Generator]], Any],
    *,
    seed: int,
    workers: int,
) -> grain.IterDataset:
    """Repeats make(step, user numbers of the global batch, one generator per row of it) for ever.

    What is batched are numbers, which cost nothing; each process then reads its own rows only.
    Batches are made before the dataset becomes an iterator, so that their content does not depend
    on `workers`. Raises: UserError when there is no user."""
    if not num_users:
        raise UserError("data.path: no user in this split; check the path and the split fractions")

    def batch(numbered: tuple[int, np.ndarray], rng: np.random.Generator) -> Any:
        step, members = numbered
        seeds = rng.integers(2**63, size=size)
        return make(int(step), members, [np.random.default_rng(s) for s in seeds])

    numbers = grain.MapDataset.range(num_users).seed(seed).shuffle().repeat().batch(size)
    steps = numbers.map_with_index(lambda step, members: (step, members)).random_map(batch)
    dataset = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    if not workers:
        return dataset
    return dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


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
