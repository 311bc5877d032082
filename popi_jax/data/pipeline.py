"""Users -> padded numpy batches, in an order that depends on the seed alone: not on processes, threads or workers.

Refuses to touch jax: batches are numpy, and worker processes must not start a device.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from popi_jax.arrays import Demonstrations, Tokens, UserBatch, WarmupBatch
from popi_jax.data import templates
from popi_jax.data.records import Messages, User
from popi_jax.data.tokenizer import Tokenizer
from popi_jax.errors import UserError

_MAX_CACHED_USERS = 20_000  # about 5 kB each; later users of a larger set are encoded anew each time
_MEASURED_USERS = 4096
_LENGTH_MULTIPLE = 4  # padded lengths are multiples of it
_WRONG_SLOTS = 8  # most wrong items that the generator's warm-up adds to a summary
_SEPARATOR = " ; "  # of the items of a summary

Ids = list[int]


class Truncations(NamedTuple):
    """How many texts were shortened to fit, and of how many."""

    contexts: int
    turns: int
    answers: int
    oracles: int
    users: int
    pairs: int


class EncodedUser(NamedTuple):
    """Token ids of one user, each within its limit of the configuration."""

    user_id: str
    context: Ids
    turns: list[Ids]  # one per pair
    chosen: list[Ids]  # one per pair; ends with the end token unless shortened
    rejected: list[Ids]  # one per pair, as `chosen`
    oracle: Ids  # without end token; [] = unknown
    oracle_text: str
    stated: Ids  # without end token; [] = the data has none
    stated_text: str  # items separated by " ; "
    contrasts: list[tuple[str, str]]  # what the replies of each past pair show
    profile: Ids  # its first summary_len - 1 tokens
    readings: list[tuple[Ids, Ids]]  # turn, answer; [] when the context was shortened
    truncations: Truncations


class EvalBatch(NamedTuple):
    """Users with all their pairs; rows that only fill the last batch have `user_mask` False and the id ""."""

    user_ids: list[str]
    batch: UserBatch
    oracle: Tokens  # [users summary_len]
    user_mask: np.ndarray  # [users] bool


def encode_user(user: User, tokenizer: Tokenizer, cfg: Any) -> EncodedUser:
    """Encodes one user within the limits of `cfg.data`.

    Too long a context loses its oldest comments, then its oldest shots, then the tail of the survey, then that of the
    profile. Too long a turn loses its oldest messages, then the start of its last one. Too long an answer loses its
    tail, and with it the end token. At most `num_pairs` pairs are kept.

    Raises: UserError when the fixed parts of a conversation alone exceed a limit.
    """
    d = cfg.data
    pairs = user.pairs[: d.num_pairs]
    context, context_cut = _fit_context(user, tokenizer, cfg)
    turns = [_fit_turn(p.prompt, tokenizer, d.turn_len) for p in pairs]
    chosen = [templates.answer(tokenizer, p.chosen) for p in pairs]
    rejected = [templates.answer(tokenizer, p.rejected) for p in pairs]
    oracle = tokenizer.encode(user.oracle.strip())
    return EncodedUser(
        user_id=user.user_id,
        context=context,
        turns=[turn for turn, _ in turns],
        chosen=[ids[: d.answer_len] for ids in chosen],
        rejected=[ids[: d.answer_len] for ids in rejected],
        oracle=oracle[: d.summary_len],
        oracle_text=user.oracle,
        stated=tokenizer.encode(user.stated.strip())[: d.summary_len],
        stated_text=user.stated,
        profile=tokenizer.encode(user.profile)[: d.summary_len - 1],
        readings=[] if context_cut else [_reading(r.question, r.answer, tokenizer, cfg) for r in user.readings],
        contrasts=[(r.answer, r.contrast) for r in user.readings],
        truncations=Truncations(
            contexts=int(context_cut),
            turns=sum(cut for _, cut in turns),
            answers=sum(len(ids) > d.answer_len for ids in chosen + rejected),
            oracles=int(len(oracle) > d.summary_len),
            users=1,
            pairs=len(pairs),
        ),
    )


def truncations(users: Iterable[EncodedUser]) -> Truncations:
    """Sums of what was shortened over some users, for a report."""
    return Truncations(*np.sum([(0,) * 6, *(u.truncations for u in users)], axis=0).tolist())


def fitted_lengths(users: Sequence[User], tokenizer: Tokenizer, cfg: Any) -> tuple[Any, Truncations]:
    """`cfg.data` with the padded lengths lowered to what the longest texts need, and what had to be shortened.

    At most `_MEASURED_USERS` users, evenly spaced, are measured; later ones that are longer are shortened like any other.
    """
    stride = -(-len(users) // _MEASURED_USERS)
    encoded = [encode_user(users[i], tokenizer, cfg) for i in range(0, len(users), stride)]
    turns = [ids for u in encoded for ids in (*u.turns, *(turn for turn, _ in u.readings))]
    answers = [ids for u in encoded for ids in (*u.chosen, *u.rejected)]

    def fitted(limit: int, rows: list[Ids], least: int) -> int:
        longest = max(map(len, rows), default=least)
        return min(limit, max(-(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, least))

    data = dataclasses.replace(
        cfg.data,
        context_len=fitted(cfg.data.context_len, [u.context for u in encoded], 1),
        turn_len=fitted(cfg.data.turn_len, [*turns, templates.summary_turn(tokenizer, cfg)], 1),
        answer_len=fitted(cfg.data.answer_len, answers, 2),
    )
    return data, truncations(encoded)


def summary_items(users: Iterable[User]) -> tuple[str, ...]:
    """All items of the users' oracle summaries, in an order that agrees with that within each summary where one exists."""
    after: dict[str, set[str]] = {}
    for user in users:
        items = user.oracle.split(" ; ") if user.oracle else []
        for i, item in enumerate(items):
            after.setdefault(item, set()).update(items[i + 1 :])
    return tuple(sorted(after, key=lambda item: (-len(after[item]), item)))


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
    """Endless `UserBatch`es of numpy arrays: this process's rows of the global batch of `cfg.batch.users`.

    Users are reshuffled each epoch and an epoch may end inside a batch. K = `num_pairs` (None: `cfg.batch.pairs`) of a
    user's pairs are drawn without replacement; rows beyond those that the user has are masked. The global batch is the
    concatenation of the processes' batches and does not depend on their number; `index` = step * users + its row in it.

    Raises: UserError when the users of a batch cannot be divided among the processes, or `source` is empty.
    """
    size = cfg.batch.users
    count = cfg.batch.pairs if num_pairs is None else num_pairs
    rows = _process_rows(size, "batch.users", process_index, process_count)
    users = _EncodedUsers(source, tokenizer, cfg)

    def make(step: int, members: np.ndarray, rngs: list[np.random.Generator]) -> UserBatch:
        drawn = users.take(members[rows])
        picks = [rng.permutation(len(u.turns))[:count] for u, rng in zip(drawn, rngs[rows], strict=True)]
        index = step * size + np.arange(size)[rows]
        return _user_batch(drawn, picks, index, tokenizer, cfg, count)

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
    """Endless `WarmupBatch`es of numpy arrays: this process's rows, order and randomness as in `user_batches`.

    Generator: the context ends with the oracle summary, else what is stated, without some items (`warmup.drop`) and with
    random ones (`warmup.wrong`), or with nothing (`warmup.no_summary`); the answers are the chosen replies to K =
    `batch.pairs` random prompts.
    Summary: the answer is what the survey text states; with probability `warmup.guess` each contrast that past pairs show
    adds one of its sides by a fair coin, so that the summary tells nothing of which side was chosen. Data that states
    nothing is summarised by the start of its profile. Up to `warmup.readings` reading exercises on the same signals follow.
    Reading: the signals hold nothing but 1 to `warmup.reading_shots` random past pairs, of which one is asked for; data
    without exercises has only masked rows. Summaries list items in the order of `items`.

    Raises: UserError as `user_batches`.
    """
    w = cfg.warmup
    fields = ("generator_users", "summary_users", "reading_users")
    sizes = [getattr(w, field) for field in fields]
    own_rows = [_process_rows(n, f"warmup.{f}", process_index, process_count) for n, f in zip(sizes, fields, strict=True)]
    users = _EncodedUsers(source, tokenizer, cfg)
    prefix = templates.generator_prefix(tokenizer, cfg)
    summary_turn = templates.summary_turn(tokenizer, cfg)
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
        answer_len = max(cfg.data.summary_len, cfg.data.answer_len) if w.readings else cfg.data.summary_len
        lengths = cfg.data.context_len, cfg.data.turn_len, answer_len
        return _demonstrations(contexts, turns, answers, 1 + w.readings, lengths, tokenizer.pad_id)

    def reading(members: np.ndarray, rngs: list[np.random.Generator]) -> Demonstrations:
        rows = [_reading_exercise(source[int(i)], w.reading_shots, rng) for i, rng in zip(members, rngs, strict=True)]
        encoded = [encode_user(user, tokenizer, reading_cfg) for user in rows]
        turns = [[turn for turn, _ in u.readings[:1]] for u in encoded]
        answers = [[answer for _, answer in u.readings[:1]] for u in encoded]
        lengths = reading_cfg.data.context_len, cfg.data.turn_len, cfg.data.answer_len
        return _demonstrations([u.context for u in encoded], turns, answers, 1, lengths, tokenizer.pad_id)

    def make(step: int, members: np.ndarray, rngs: list[np.random.Generator]) -> WarmupBatch:
        parts, start = [], 0
        for task, size, rows in zip((generator, summary, reading), sizes, own_rows, strict=True):
            part = slice(start, start + size)
            parts.append(task(members[part][rows], rngs[part][rows]))
            start += size
        return WarmupBatch(*parts)

    return _steps(len(source), sum(sizes), make, seed=seed, workers=cfg.data.workers)


def eval_batches(users: Sequence[User], tokenizer: Tokenizer, cfg: Any) -> Iterator[EvalBatch]:
    """All users in order with all their pairs (at most `data.num_pairs`), `evaluation.batch_users` to a batch.

    The last batch is filled with its first user, all of whose pairs are masked: no row is ever without a context.
    """
    size, count = cfg.evaluation.batch_users, cfg.data.num_pairs
    for start in range(0, len(users), size):
        rows = [encode_user(users[i], tokenizer, cfg) for i in range(start, min(start + size, len(users)))]
        fill = size - len(rows)
        user_ids = [u.user_id for u in rows] + [""] * fill
        picks = [np.arange(len(u.turns)) for u in rows] + [np.arange(0)] * fill
        rows += rows[:1] * fill
        yield EvalBatch(
            user_ids=user_ids,
            batch=_user_batch(rows, picks, start + np.arange(size), tokenizer, cfg, count),
            oracle=_pad([u.oracle for u in rows], cfg.data.summary_len, tokenizer.pad_id),
            user_mask=np.arange(size) < size - fill,
        )


class _EncodedUsers:
    """Encodes users of a source on demand and keeps them; a copy sent to a worker process starts empty."""

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

    What is batched are numbers, which cost nothing; each process then reads its own rows only. Batches are made before
    the dataset becomes an iterator, so that their content does not depend on `workers`.
    """
    if not num_users:
        raise UserError("data.path: no user in this split; check the path and the split fractions")

    def batch(numbered: tuple[int, np.ndarray], rng: np.random.Generator) -> Any:
        step, members = numbered
        seeds = rng.integers(2**63, size=size)
        return make(int(step), members, [np.random.default_rng(s) for s in seeds])

    numbers = grain.MapDataset.range(num_users).seed(seed).shuffle().repeat().batch(size)
    steps = numbers.map_with_index(lambda step, members: (step, members)).random_map(batch)
    dataset = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    return dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)) if workers else dataset


def _process_rows(size: int, field: str, process_index: int, process_count: int) -> slice:
    if size % process_count:
        near = max(size // process_count, 1) * process_count
        raise UserError(f"{field}: {size} users cannot be divided among {process_count} processes; try {near}")
    each = size // process_count
    return slice(process_index * each, (process_index + 1) * each)


def _user_batch(
    users: list[EncodedUser],
    picks: list[np.ndarray],
    index: np.ndarray,
    tokenizer: Tokenizer,
    cfg: Any,
    count: int,
) -> UserBatch:
    d, pad_id = cfg.data, tokenizer.pad_id
    chosen_pairs = list(zip(users, picks, strict=True))
    return UserBatch(
        index=index.astype(np.int32),
        context=_pad([u.context for u in users], d.context_len, pad_id),
        turns=_pad_nested([[u.turns[k] for k in ks] for u, ks in chosen_pairs], count, d.turn_len, pad_id),
        chosen=_pad_nested([[u.chosen[k] for k in ks] for u, ks in chosen_pairs], count, d.answer_len, pad_id),
        rejected=_pad_nested([[u.rejected[k] for k in ks] for u, ks in chosen_pairs], count, d.answer_len, pad_id),
        pair_mask=np.array([np.arange(count) < len(ks) for ks in picks]),
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
    flat = _pad([tokens for row in rows for tokens in row + [[]] * (count - len(row))], length, pad_id)
    return Tokens(flat.ids.reshape(len(rows), count, length), flat.lengths.reshape(len(rows), count))


def _known(user: EncodedUser, items: tuple[str, ...], w: Any, rng: np.random.Generator, tokenizer: Tokenizer) -> Ids:
    """What the generator is told of a user in the warm-up: the oracle summary, at times incomplete, partly wrong or absent."""
    told = user.oracle_text or user.stated_text
    if not told or rng.random() < w.no_summary:
        return []
    kept = {item for item in told.split(_SEPARATOR) if rng.random() >= w.drop}
    kept |= {items[i] for i in rng.permutation(len(items))[: rng.binomial(_WRONG_SLOTS, w.wrong)]}
    named = [item for item in items if item in kept] if items else [told]
    return tokenizer.encode(_SEPARATOR.join(named)) if named else []


def _summary_target(
    user: EncodedUser, items: tuple[str, ...], guess: float, rng: np.random.Generator, tokenizer: Tokenizer
) -> Ids:
    """The summary that the inference model is taught, with its end token; [] when there is nothing to teach."""
    if not user.stated_text:
        return [*user.profile, tokenizer.eos_id] if user.profile else []
    named = set(user.stated_text.split(_SEPARATOR))
    for sides in sorted({tuple(sorted(contrast)) for contrast in user.contrasts}):
        if rng.random() < guess and not named & {*sides}:
            named.add(sides[rng.integers(2)])  # either side with the same odds, whichever reply was chosen
    listed = [item for item in items if item in named]
    return templates.answer(tokenizer, _SEPARATOR.join(listed) if listed else user.stated_text)


def _reading_exercise(user: User, most: int, rng: np.random.Generator) -> User:
    """The user reduced to 1 to `most` random past pairs and the exercise on one of them."""
    picks = rng.permutation(len(user.shots))[: rng.integers(1, most + 1)].tolist()
    aligned = bool(picks) and len(user.readings) == len(user.shots)
    readings = (user.readings[picks[0]],) if aligned else ()
    shots = tuple(user.shots[k] for k in sorted(picks))
    return dataclasses.replace(user, profile="", survey="", comments=(), shots=shots, readings=readings, pairs=())


def _reading_contexts(source: Sequence[User], tokenizer: Tokenizer, cfg: Any) -> Any:
    """`cfg` with the context length of reading exercises: what the longest few past pairs of 512 users need."""
    longest = 1
    for i in range(0, len(source), max(len(source) // 512, 1)):
        user = source[i]
        if user.readings:
            shots = sorted(user.shots, key=lambda s: len(s.prompt) + len(s.chosen) + len(s.rejected))
            few = tuple(shots[max(len(shots) - cfg.warmup.reading_shots, 0) :])
            only = dataclasses.replace(user, profile="", survey="", comments=(), shots=few)
            longest = max(longest, len(_fit_context(only, tokenizer, cfg)[0]))
    fitted = min(cfg.data.context_len, -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, context_len=fitted))


def _reading(question: str, text: str, tokenizer: Tokenizer, cfg: Any) -> tuple[Ids, Ids]:
    def turn(part: str) -> Ids:
        return templates.reading_turn(tokenizer, part)

    ids, _ = _fit_text(question, turn, tokenizer, cfg.data.turn_len, "data.turn_len", keep="end")
    return ids, templates.answer(tokenizer, text)[: cfg.data.answer_len]


def _fit_context(user: User, tokenizer: Tokenizer, cfg: Any) -> tuple[Ids, bool]:
    limit = cfg.data.context_len

    def encode(some: User) -> Ids:
        return templates.inference_context(tokenizer, templates.signals_text(some))

    def with_survey(text: str) -> Ids:
        return encode(dataclasses.replace(user, survey=text))

    def with_profile(text: str) -> Ids:
        return encode(dataclasses.replace(user, survey="", profile=text))

    ids, cut = encode(user), False
    while len(ids) > limit and (user.comments or user.shots):
        dropped = {"comments": user.comments[1:]} if user.comments else {"shots": user.shots[1:]}
        user = dataclasses.replace(user, **dropped)
        ids, cut = encode(user), True
    if len(ids) <= limit:
        return ids, cut
    text, part = (user.survey, with_survey) if len(with_survey("")) <= limit else (user.profile, with_profile)
    return _fit_text(text, part, tokenizer, limit, "data.context_len", keep="start")[0], True


def _fit_turn(prompt: Messages, tokenizer: Tokenizer, limit: int) -> tuple[Ids, bool]:
    ids = templates.generator_turn(tokenizer, prompt)
    if len(ids) <= limit:
        return ids, False
    kept = list(prompt)
    while len(ids) > limit and len(kept) > 1:
        kept = kept[1:]
        if kept[0]["role"] == "assistant":  # its question has just gone
            kept = kept[1:]
        ids = templates.generator_turn(tokenizer, kept)
    if len(ids) <= limit:
        return ids, True

    def turn(text: str) -> Ids:
        return templates.generator_turn(tokenizer, [{"role": "user", "content": text}])

    return _fit_text(kept[-1]["content"], turn, tokenizer, limit, "data.turn_len", keep="end")[0], True


def _fit_text(
    text: str, encode: Callable[[str], Ids], tokenizer: Tokenizer, limit: int, field: str, *, keep: str
) -> tuple[Ids, bool]:
    """Longest encode(part) of at most `limit` tokens, where the part is the "start" or the "end" of the text."""
    ids = encode(text)
    if len(ids) <= limit:
        return ids, False
    tokens = tokenizer.encode(text)
    while len(ids) > limit and tokens:  # decoding and encoding again may change the count by a token or two
        excess = min(len(ids) - limit, len(tokens))
        tokens = tokens[:-excess] if keep == "start" else tokens[excess:]
        ids = encode(tokenizer.decode(tokens))
    if len(ids) > limit:
        raise UserError(f"{field}: {limit} is less than the {len(ids)} tokens of the headers and instructions alone")
    return ids, True
