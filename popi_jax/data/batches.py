"""Users -> padded numpy batches, in an order that depends on the seed alone: not on processes,
threads or workers.

Refuses to touch jax: batches are numpy, and worker processes must not start a device.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from popi_jax.arrays import Demonstrations, Tokens, UserBatch, WarmupBatch
from popi_jax.data import prompts
from popi_jax.data.encode import EncodedUser, Ids, encode_user, fit_context, padded
from popi_jax.data.records import User
from popi_jax.data.tokenizer import Tokenizer
from popi_jax.errors import UserError

_MAX_CACHED_USERS = (
    20_000  # about 5 kB each; later users of a larger set are encoded anew each time
)
_WRONG_SLOTS = 8  # most wrong items that the generator's warm-up adds to a summary
_SEPARATOR = " ; "  # of the items of a summary


class EvalBatch(NamedTuple):
    """Users with all their pairs; rows that only fill the last batch have `user_mask` False and the
    id ""."""

    user_ids: list[str]
    batch: UserBatch
    oracle: Tokens  # [users summary_len]
    user_mask: np.ndarray  # [users] bool


def summary_items(users: Iterable[User]) -> tuple[str, ...]:
    """All items of the users' oracle summaries, in an order that agrees with each summary unless
    they contradict."""
    after: dict[str, set[str]] = {}
    for user in users:
        items = user.oracle.split(_SEPARATOR) if user.oracle else []
        for i, item in enumerate(items):
            after.setdefault(item, set()).update(items[i + 1 :])

    def num_later(item: str) -> int:
        later, queue = set[str](), [item]
        while queue:
            new = after[queue.pop()] - later
            later |= new
            queue += new
        return len(later)

    return tuple(sorted(after, key=lambda item: (-num_later(item), item)))


def user_batches(
    source: Sequence[User],
    tokenizer: Tokenizer,
    cfg: Any,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_pairs: int | None = None,
) -> grain.IterDataset:
    """Endless `UserBatch`es of numpy arrays: this process's rows of the global batch of
    `cfg.batch.users`.

    Users are reshuffled each epoch and an epoch may end inside a batch. K = `num_pairs` (None:
    `cfg.batch.pairs`) of a user's pairs are drawn without replacement; rows beyond those that the
    user has are masked. The global batch is the concatenation of the processes' batches and does
    not depend on their number; `index` = step * users + its row in it.

    Raises: UserError when the users of a batch cannot be divided among the processes, or `source`
    is empty."""
    size = cfg.batch.users
    count = cfg.batch.pairs if num_pairs is None else num_pairs
    rows = _process_rows(size, "batch.users", process_index, process_count)
    users = _EncodedUsers(source, tokenizer, cfg)

    def make(step: int, members: np.ndarray, rngs: list[np.random.Generator]) -> UserBatch:
        drawn = users.take(members[rows])
        picks = [
            rng.permutation(len(u.turns))[:count] for u, rng in zip(drawn, rngs[rows], strict=True)
        ]
        index = step * size + np.arange(size)[rows]
        return _user_batch(drawn, picks, index, members[rows], tokenizer, cfg, count)

    return _steps(len(source), size, make, seed=seed, workers=cfg.data.workers)


def warmup_batches(
    source: Sequence[User],
    tokenizer: Tokenizer,
    cfg: Any,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    items: tuple[str, ...] = (),
) -> grain.IterDataset:
    """Endless `WarmupBatch`es of numpy arrays: this process's rows, order and randomness as in
    `user_batches`.

    Generator: the context ends with the oracle summary, else what is stated, without some items
    (`warmup.drop`), with some said twice (`warmup.repeat`: saying it again shall add nothing) and
    with random ones (`warmup.wrong`), or with nothing (`warmup.no_summary`); the answers are the
    chosen replies to K = `batch.pairs` random prompts. Summary: the answer is what the survey text
    states; with probability `warmup.guess` each contrast that past pairs show adds one of its sides
    by a fair coin, so that the summary tells nothing of which side was chosen. Data that states
    nothing is summarised by the start of its profile. Up to `warmup.readings` reading exercises on
    the same signals follow. Reading: short signals. A part `warmup.reading_survey` of them holds
    the profile and survey alone, and the answer is the summary of what they state; the others hold
    nothing but 1 to `warmup.reading_shots` random past pairs, of which one is asked for. Data
    without exercises has only masked rows. Summaries list items in the order of `items`.

    Raises: UserError as `user_batches`.
    """
    w = cfg.warmup
    fields = ("generator_users", "summary_users", "reading_users")
    sizes = [getattr(w, field) for field in fields]
    place = process_index, process_count
    own_rows = [_process_rows(n, f"warmup.{f}", *place) for n, f in zip(sizes, fields, strict=True)]
    users = _EncodedUsers(source, tokenizer, cfg)
    prefix = prompts.generator_prefix(tokenizer, cfg)
    summary_turn = prompts.summary_turn(tokenizer, cfg)
    if len(summary_turn) > cfg.data.turn_len:
        raise UserError(
            f"data.turn_len: {cfg.data.turn_len} is less than the {len(summary_turn)} tokens of "
            "model.summary_instruction with its headers; raise the one or shorten the other"
        )
    reading_cfg = _reading_contexts(source, tokenizer, cfg)

    def generator(members: np.ndarray, rngs: list[np.random.Generator]) -> Demonstrations:
        contexts, turns, answers = [], [], []
        for user, rng in zip(users.take(members), rngs, strict=True):
            contexts.append(prefix + _known(user, items, w, rng, tokenizer)[: cfg.data.summary_len])
            picks = rng.permutation(len(user.turns))[: cfg.batch.pairs]
            turns.append([user.turns[k] for k in picks])
            answers.append([user.chosen[k] for k in picks])
        lengths = len(prefix) + cfg.data.summary_len, cfg.data.turn_len, cfg.data.answer_len
        return _demonstrations(contexts, turns, answers, cfg.batch.pairs, lengths, tokenizer.pad_id)

    def summary(members: np.ndarray, rngs: list[np.random.Generator]) -> Demonstrations:
        contexts, turns, answers = [], [], []
        for user, rng in zip(users.take(members), rngs, strict=True):
            target = _summary_target(user, items, w.guess, rng, tokenizer)[: cfg.data.summary_len]
            picks = rng.permutation(len(user.readings))[: w.readings]
            contexts.append(user.context)
            turns.append([summary_turn, *(user.readings[k][0] for k in picks)])
            answers.append([target, *(user.readings[k][1] for k in picks)])
        answer_len = (
            max(cfg.data.summary_len, cfg.data.answer_len) if w.readings else cfg.data.summary_len
        )
        lengths = cfg.data.context_len, cfg.data.turn_len, answer_len
        return _demonstrations(contexts, turns, answers, 1 + w.readings, lengths, tokenizer.pad_id)

    def reading(members: np.ndarray, rngs: list[np.random.Generator]) -> Demonstrations:
        contexts, turns, answers = [], [], []
        for number, rng in zip(members.tolist(), rngs, strict=True):
            user = source[number]
            stated = bool(user.stated) and rng.random() < w.reading_survey
            short = _survey_alone(user) if stated else _reading_exercise(user, w.reading_shots, rng)
            encoded = encode_user(short, tokenizer, reading_cfg)
            summary = summary_turn, prompts.answer(tokenizer, user.stated)[: cfg.data.summary_len]
            exercises = [summary] if stated else encoded.readings[:1]
            contexts.append(encoded.context)
            turns.append([turn for turn, _ in exercises])
            answers.append([answer for _, answer in exercises])
        lengths = (
            reading_cfg.data.context_len,
            cfg.data.turn_len,
            max(cfg.data.summary_len, cfg.data.answer_len),
        )
        return _demonstrations(contexts, turns, answers, 1, lengths, tokenizer.pad_id)

    def make(step: int, members: np.ndarray, rngs: list[np.random.Generator]) -> WarmupBatch:
        parts, start = [], 0
        for task, size, rows in zip((generator, summary, reading), sizes, own_rows, strict=True):
            part = slice(start, start + size)
            parts.append(task(members[part][rows], rngs[part][rows]))
            start += size
        return WarmupBatch(*parts)

    return _steps(len(source), sum(sizes), make, seed=seed, workers=cfg.data.workers)


def eval_batches(users: Sequence[User], tokenizer: Tokenizer, cfg: Any) -> Iterator[EvalBatch]:
    """All users in order with all their pairs (at most `data.num_pairs`), `evaluation.batch_users`
    to a batch.

    The last batch is filled with its first user, all of whose pairs are masked: no row is ever
    without a context."""
    size, count = cfg.evaluation.batch_users, cfg.data.num_pairs
    for start in range(0, len(users), size):
        rows = [
            encode_user(users[i], tokenizer, cfg)
            for i in range(start, min(start + size, len(users)))
        ]
        fill = size - len(rows)
        user_ids = [u.user_id for u in rows] + [""] * fill
        picks = [np.arange(len(u.turns)) for u in rows] + [np.arange(0)] * fill
        rows += rows[:1] * fill
        yield EvalBatch(
            user_ids=user_ids,
            batch=_user_batch(
                rows, picks, start + np.arange(size), start + np.arange(size), tokenizer, cfg, count
            ),
            oracle=_pad([u.oracle for u in rows], cfg.data.summary_len, tokenizer.pad_id),
            user_mask=np.arange(size) < size - fill,
        )


class _EncodedUsers:
    """Encodes users of a source on demand and keeps them; a copy sent to a worker process starts
    empty."""

    def __init__(self, source: Sequence[User], tokenizer: Tokenizer, cfg: Any) -> None:
        self._parts = (source, tokenizer, cfg)
        self._cache: dict[int, EncodedUser] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _EncodedUsers, self._parts

    def take(self, numbers: np.ndarray) -> list[EncodedUser]:
        return [self._one(n) for n in numbers.tolist()]

    def _one(self, number: int) -> EncodedUser:
        found = self._cache.get(number)
        if found is None:
            source, tokenizer, cfg = self._parts
            found = encode_user(source[number], tokenizer, cfg)
            if len(self._cache) < _MAX_CACHED_USERS:
                self._cache[number] = found
        return found


def _steps(
    num_users: int,
    size: int,
    make: Callable[[int, np.ndarray, list[np.random.Generator]], Any],
    *,
    seed: int,
    workers: int,
) -> grain.IterDataset:
    """Endless make(step, user numbers of the global batch, one generator per row of it).

    What is batched are numbers, which cost nothing; each process then reads its own rows only.
    Batches are made before the dataset becomes an iterator, so that their content does not depend
    on `workers`."""
    if not num_users:
        raise UserError("data.path: no user in this split; check the path and the split fractions")

    def batch(numbered: tuple[int, np.ndarray], rng: np.random.Generator) -> Any:
        step, members = numbered
        seeds = rng.integers(2**63, size=size)
        return make(int(step), members, [np.random.default_rng(s) for s in seeds])

    numbers = grain.MapDataset.range(num_users).seed(seed).shuffle().repeat().batch(size)
    steps = numbers.map_with_index(lambda step, members: (step, members)).random_map(batch)
    dataset = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    return (
        dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        if workers
        else dataset
    )


def _process_rows(size: int, field: str, process_index: int, process_count: int) -> slice:
    if size % process_count:
        near = max(size // process_count, 1) * process_count
        raise UserError(
            f"{field}: {size} users cannot be divided among {process_count} processes; try {near}"
        )
    each = size // process_count
    return slice(process_index * each, (process_index + 1) * each)


def _user_batch(
    users: list[EncodedUser],
    picks: list[np.ndarray],
    index: np.ndarray,
    numbers: np.ndarray,
    tokenizer: Tokenizer,
    cfg: Any,
    count: int,
) -> UserBatch:
    d, pad_id = cfg.data, tokenizer.pad_id
    chosen_pairs = list(zip(users, picks, strict=True))
    return UserBatch(
        index=index.astype(np.int32),
        context=_pad([u.context for u in users], d.context_len, pad_id),
        turns=_pad_nested(
            [[u.turns[k] for k in ks] for u, ks in chosen_pairs], count, d.turn_len, pad_id
        ),
        chosen=_pad_nested(
            [[u.chosen[k] for k in ks] for u, ks in chosen_pairs], count, d.answer_len, pad_id
        ),
        rejected=_pad_nested(
            [[u.rejected[k] for k in ks] for u, ks in chosen_pairs], count, d.answer_len, pad_id
        ),
        pair_mask=np.array([np.arange(count) < len(ks) for ks in picks]),
        pair_number=np.array(
            [
                np.pad(number * d.num_pairs + ks, (0, count - len(ks)))
                for number, ks in zip(numbers, picks, strict=True)
            ],
            np.int32,
        ),
    )


def _demonstrations(
    contexts: list[Ids],
    turns: list[list[Ids]],
    answers: list[list[Ids]],
    count: int,
    lengths: tuple[int, int, int],
    pad_id: int,
) -> Demonstrations:
    context_len, turn_len, answer_len = lengths
    present = [[bool(a) for a in row] + [False] * (count - len(row)) for row in answers]
    return Demonstrations(
        context=_pad(contexts, context_len, pad_id),
        turns=_pad_nested(turns, count, turn_len, pad_id),
        answers=_pad_nested(answers, count, answer_len, pad_id),
        mask=np.array(present),
    )


def _pad(rows: list[Ids], length: int, pad_id: int) -> Tokens:
    ids = np.full((len(rows), length), pad_id, np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    return Tokens(ids, np.array([len(tokens) for tokens in rows], np.int32))


def _pad_nested(rows: list[list[Ids]], count: int, length: int, pad_id: int) -> Tokens:
    flat = _pad(
        [tokens for row in rows for tokens in row + [[]] * (count - len(row))], length, pad_id
    )
    return Tokens(
        flat.ids.reshape(len(rows), count, length), flat.lengths.reshape(len(rows), count)
    )


def _known(
    user: EncodedUser,
    items: tuple[str, ...],
    w: Any,
    rng: np.random.Generator,
    tokenizer: Tokenizer,
) -> Ids:
    """What the generator is told of a user in the warm-up: the oracle summary, often not quite, at
    times nothing."""
    told = user.oracle_text or user.stated_text
    if not told or rng.random() < w.no_summary:
        return []
    kept = {item for item in told.split(_SEPARATOR) if rng.random() >= w.drop}
    kept |= {items[i] for i in rng.permutation(len(items))[: rng.binomial(_WRONG_SLOTS, w.wrong)]}
    named = (
        [item for item in items if item in kept for _ in range(1 + (rng.random() < w.repeat))]
        if items
        else [told]
    )
    return tokenizer.encode(_SEPARATOR.join(named)) if named else []


def _summary_target(
    user: EncodedUser,
    items: tuple[str, ...],
    guess: float,
    rng: np.random.Generator,
    tokenizer: Tokenizer,
) -> Ids:
    """The summary that the inference model is taught, with its end token; [] when there is nothing
    to teach."""
    if not user.stated_text:
        return [*user.profile, tokenizer.eos_id] if user.profile else []
    named = set(user.stated_text.split(_SEPARATOR))
    for sides in sorted({tuple(sorted(contrast)) for contrast in user.contrasts}):
        if rng.random() < guess and not named & {*sides}:
            named.add(
                sides[rng.integers(2)]
            )  # either side with the same odds, whichever reply was chosen
    listed = [item for item in items if item in named]
    return prompts.answer(tokenizer, _SEPARATOR.join(listed) if listed else user.stated_text)


def _survey_alone(user: User) -> User:
    return dataclasses.replace(user, comments=(), shots=(), readings=(), pairs=())


def _reading_exercise(user: User, most: int, rng: np.random.Generator) -> User:
    """The user reduced to 1 to `most` random past pairs and the exercise on one of them."""
    picks = rng.permutation(len(user.shots))[: rng.integers(1, most + 1)].tolist()
    aligned = bool(picks) and len(user.readings) == len(user.shots)
    readings = (user.readings[picks[0]],) if aligned else ()
    shots = tuple(user.shots[k] for k in sorted(picks))
    return dataclasses.replace(
        user, profile="", survey="", comments=(), shots=shots, readings=readings, pairs=()
    )


def _reading_contexts(source: Sequence[User], tokenizer: Tokenizer, cfg: Any) -> Any:
    """`cfg` with the context length of reading exercises: what the longest few past pairs, and the
    longest survey text with a summary, of 512 users need."""
    longest = 1
    for i in range(0, len(source), max(len(source) // 512, 1)):
        user = source[i]
        if user.readings:
            shots = sorted(
                user.shots, key=lambda s: len(s.prompt) + len(s.chosen) + len(s.rejected)
            )
            few = tuple(shots[max(len(shots) - cfg.warmup.reading_shots, 0) :])
            only = dataclasses.replace(user, profile="", survey="", comments=(), shots=few)
            longest = max(longest, len(fit_context(only, tokenizer, cfg)[0]))
        if user.stated:
            longest = max(longest, len(fit_context(_survey_alone(user), tokenizer, cfg)[0]))
    fitted = min(cfg.data.context_len, padded(longest))
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, context_len=fitted))
