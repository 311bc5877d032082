"""The batches of the warm-up, which teaches random weights to answer, to summarise and to read."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from popi_jax.arrays import Demonstrations, WarmupBatch
from popi_jax.data import batches, prompts
from popi_jax.data.encode import EncodedUser, Ids, encode_user, fit_signals, round_up
from popi_jax.data.order import Order
from popi_jax.data.prepared import Dataset
from popi_jax.data.prompts import Tokenizer
from popi_jax.data.records import ITEM_SEPARATOR, User
from popi_jax.data.tokens import Encoded
from popi_jax.errors import UserError

_WRONG_SLOTS = 8  # most wrong items that are added to a summary for the generator
_TASKS = WarmupBatch._fields

Rngs = list[np.random.Generator]
Example = tuple[Ids, list[tuple[Ids, Ids]]]  # a context, and the turns behind it with their answers


class Curriculum(NamedTuple):
    """What all tasks draw from."""

    users: Encoded
    tokenizer: Tokenizer
    cfg: Any
    reading_cfg: Any  # `cfg` with the context length of reading exercises
    items: tuple[str, ...]
    prefix: Ids  # of the generator's contexts
    summary_turn: Ids

    def take(self, numbers: np.ndarray) -> list[EncodedUser]:
        """The users of these numbers."""
        return [self.users.ids[n] for n in numbers.tolist()]


def make_warmup_batches(
    users: Encoded,
    tokenizer: Tokenizer,
    cfg: Any,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    items: tuple[str, ...] = (),
) -> grain.MapDataset:
    """Makes the `WarmupBatch` of each step as `batches.make_user_batches` makes those of the main
    stage.

    Each task has users of its own. Summaries that are lists name items in the order of `items`; ()
    where summaries are free text.

    Raises: UserError as `batches.make_user_batches`, and when `data.turn_len` does not hold the
    request for a summary."""
    sizes = [getattr(cfg.warmup, f"{task}_users") for task in _TASKS]
    rows = [
        batches.pick_own_rows(size, f"warmup.{task}_users", process_index, process_count)
        for task, size in zip(_TASKS, sizes, strict=True)
    ]
    batches.check_users(users)
    parts = Curriculum(
        users=users,
        tokenizer=tokenizer,
        cfg=cfg,
        reading_cfg=_fit_reading_contexts(users.source, tokenizer, cfg),
        items=items,
        prefix=prompts.render_generator_prefix(tokenizer, cfg),
        summary_turn=prompts.render_summary_turn(tokenizer, cfg),
    )
    if len(parts.summary_turn) > cfg.data.turn_len:
        raise UserError(
            f"data.turn_len: {cfg.data.turn_len} is less than the {len(parts.summary_turn)} tokens "
            "of model.summary_instruction with its headers; raise the one or shorten the other"
        )

    loads = batches.list_loads(users.lengths, count_pairs(cfg))
    order = Order(loads, len(users.ids), tuple(sizes), seed=seed)

    def make(step: int) -> WarmupBatch:
        members, rngs = order.take(step), batches.make_rngs(seed, step, sum(sizes))
        made, start = [], 0
        for make_task, size, own in zip(_MAKERS, sizes, rows, strict=True):
            part = slice(start, start + size)
            made.append(make_task(parts, members[part][own], rngs[part][own]))
            start += size
        return WarmupBatch(*made)

    return grain.MapDataset.range(batches.ENDLESS).map(make)


def count_pairs(cfg: Any) -> int:
    """Returns the most pairs of a user from which the generator learns in a step."""
    return min(cfg.warmup.generator_pairs or cfg.batch.pairs, cfg.data.num_pairs)


def find_items(dataset: Dataset, cfg: Any) -> tuple[str, ...]:
    """Returns the `items` of the warm-up of a run; () where it has none."""
    listed = cfg.warmup.steps and dataset.source.lists_items
    return list_summary_items(dataset.splits["train"]) if listed else ()


def list_summary_items(users: Iterable[User]) -> tuple[str, ...]:
    """Returns all items of the users' oracle summaries, in an order that agrees with each summary
    unless they contradict."""
    after: dict[str, set[str]] = {}
    for user in users:
        items = user.oracle.split(ITEM_SEPARATOR) if user.oracle else []
        for i, item in enumerate(items):
            after.setdefault(item, set()).update(items[i + 1 :])

    def count_later(item: str) -> int:
        later, queue = set[str](), [item]
        while queue:
            new = after[queue.pop()] - later
            later |= new
            queue += new
        return len(later)

    return tuple(sorted(after, key=lambda item: (-count_later(item), item)))


def _make_generator_task(parts: Curriculum, members: np.ndarray, rngs: Rngs) -> Demonstrations:
    """Answering: behind a context that tells of the user stand some random prompts with their
    chosen replies."""
    d, count, examples = parts.cfg.data, count_pairs(parts.cfg), list[Example]()
    for user, rng in zip(parts.take(members), rngs, strict=True):
        context = parts.prefix + _tell(user, parts, rng)[: d.summary_len]
        picks = rng.permutation(len(user.turns))[:count]
        examples.append((context, [(user.turns[k], user.chosen[k]) for k in picks]))
    lengths = len(parts.prefix) + d.summary_len, d.turn_len, d.answer_len
    return _pad_examples(examples, count, lengths, parts.tokenizer.pad_id)


def _tell(user: EncodedUser, parts: Curriculum, rng: np.random.Generator) -> Ids:
    """Returns what the generator is told: the oracle summary, else what is stated, at times nothing
    (`warmup.no_summary`).

    It lacks some items (`warmup.drop`), has wrong ones (`warmup.wrong`) and says some twice
    (`warmup.repeat`: saying it again shall add nothing)."""
    w, items = parts.cfg.warmup, parts.items
    told = user.oracle_text or user.stated_text
    if not told or rng.random() < w.no_summary:
        return []
    kept = {item for item in told.split(ITEM_SEPARATOR) if rng.random() >= w.drop}
    kept |= {items[i] for i in rng.permutation(len(items))[: rng.binomial(_WRONG_SLOTS, w.wrong)]}
    named = [item for item in items if item in kept for _ in range(1 + (rng.random() < w.repeat))]
    text = ITEM_SEPARATOR.join(_order(named, parts, rng)) if items else told
    return prompts.encode_summary(parts.tokenizer, text, parts.cfg) if text else []


def _make_summary_task(parts: Curriculum, members: np.ndarray, rngs: Rngs) -> Demonstrations:
    """Summarising: behind the signals stand the request for a summary, and up to `warmup.readings`
    reading exercises."""
    d, w, examples = parts.cfg.data, parts.cfg.warmup, list[Example]()
    for user, rng in zip(parts.take(members), rngs, strict=True):
        summary = _summarise(user, parts, rng)[: d.summary_len]
        picks = rng.permutation(len(user.readings))[: w.readings]
        exercises = [user.readings[k] for k in picks]
        examples.append((user.context, [(parts.summary_turn, summary), *exercises]))
    answer_len = max(d.summary_len, d.answer_len) if w.readings else d.summary_len
    lengths = d.context_len, d.turn_len, answer_len
    return _pad_examples(examples, 1 + w.readings, lengths, parts.tokenizer.pad_id)


def _summarise(user: EncodedUser, parts: Curriculum, rng: np.random.Generator) -> Ids:
    """Returns the summary that is taught, with its end token: what the survey states, else the
    start of the profile; [] without either.

    With probability `warmup.guess` each contrast that past pairs show adds one of its sides by a
    fair coin, so that the summary tells nothing of which side was chosen."""
    if not user.stated_text:
        return [*user.profile, parts.tokenizer.eos_id] if user.profile else []
    named = set(user.stated_text.split(ITEM_SEPARATOR))
    for sides in sorted({tuple(sorted(contrast)) for contrast in user.contrasts}):
        if rng.random() < parts.cfg.warmup.guess and not named & {*sides}:
            named.add(sides[rng.integers(2)])
    listed = [item for item in parts.items if item in named]
    text = ITEM_SEPARATOR.join(_order(listed, parts, rng)) if listed else user.stated_text
    return prompts.encode_answer(parts.tokenizer, text)


def _order(listed: list[str], parts: Curriculum, rng: np.random.Generator) -> list[str]:
    """The items in a random order, with probability `warmup.shuffle`. In a fixed order a summary
    that has passed an item cannot come back to it, and RL learns to leave out the first ones."""
    if parts.cfg.warmup.shuffle and rng.random() < parts.cfg.warmup.shuffle:
        return [listed[i] for i in rng.permutation(len(listed))]
    return listed


def _make_reading_task(parts: Curriculum, members: np.ndarray, rngs: Rngs) -> Demonstrations:
    """Reading short signals. A part `warmup.reading_survey` of them holds the profile and survey
    alone, and the answer is the summary of what they state; the others are reading exercises. Data
    without exercises has only masked rows."""
    d, w, words, examples = parts.cfg.data, parts.cfg.warmup, parts.tokenizer, list[Example]()
    for number, rng in zip(members.tolist(), rngs, strict=True):
        user = parts.users.source[number]
        stated = bool(user.stated) and rng.random() < w.reading_survey
        short = _keep_survey(user) if stated else _draw_exercise(user, w.reading_shots, rng)
        encoded = encode_user(short, words, parts.reading_cfg)
        summary = prompts.encode_answer(words, _reorder(user.stated, parts, rng))[: d.summary_len]
        exercises = [(parts.summary_turn, summary)] if stated else encoded.readings[:1]
        examples.append((encoded.context, exercises))
    answer_len = max(d.summary_len, d.answer_len)
    lengths = parts.reading_cfg.data.context_len, d.turn_len, answer_len
    return _pad_examples(examples, 1, lengths, words.pad_id)


def _reorder(stated: str, parts: Curriculum, rng: np.random.Generator) -> str:
    return ITEM_SEPARATOR.join(_order(stated.split(ITEM_SEPARATOR), parts, rng))


_MAKERS = (_make_generator_task, _make_summary_task, _make_reading_task)  # in the order of _TASKS


def _keep_survey(user: User) -> User:
    return dataclasses.replace(user, comments=(), shots=(), readings=(), pairs=())


def _draw_exercise(user: User, most: int, rng: np.random.Generator) -> User:
    """Reduces a user to 1 to `most` random past pairs and the exercise on one of them."""
    picks = rng.permutation(len(user.shots))[: rng.integers(1, most + 1)].tolist()
    aligned = bool(picks) and len(user.readings) == len(user.shots)
    readings = (user.readings[picks[0]],) if aligned else ()
    shots = tuple(user.shots[k] for k in sorted(picks))
    alone = dataclasses.replace(_keep_survey(user), profile="", survey="")
    return dataclasses.replace(alone, shots=shots, readings=readings)


def _fit_reading_contexts(source: Sequence[User], tokenizer: Tokenizer, cfg: Any) -> Any:
    """Returns `cfg` with the context length of reading exercises: what the longest few past pairs,
    and the longest survey text with a summary, of 512 users need."""
    longest = 1
    for i in range(0, len(source), max(len(source) // 512, 1)):
        user, short = source[i], list[User]()
        if user.readings:
            shots = sorted(
                user.shots, key=lambda s: len(s.prompt) + len(s.chosen) + len(s.rejected)
            )
            few = tuple(shots[max(len(shots) - cfg.warmup.reading_shots, 0) :])
            short.append(dataclasses.replace(user, profile="", survey="", comments=(), shots=few))
        if user.stated:
            short.append(_keep_survey(user))
        for some in short:
            longest = max(longest, len(fit_signals(some, tokenizer, cfg).context))
    fitted = min(cfg.data.context_len, round_up(longest))
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, context_len=fitted))


def _pad_examples(
    examples: list[Example], count: int, lengths: tuple[int, int, int], pad_id: int
) -> Demonstrations:
    """`lengths`: of contexts, turns and answers. An empty answer is masked: there is none to
    teach."""
    context_len, turn_len, answer_len = lengths
    turns = [[turn for turn, _ in exchanges] for _, exchanges in examples]
    answers = [[answer for _, answer in exchanges] for _, exchanges in examples]
    present = [[bool(a) for a in row] + [False] * (count - len(row)) for row in answers]
    return Demonstrations(
        context=batches.pad([context for context, _ in examples], context_len, pad_id),
        turns=batches.pad_nested(turns, count, turn_len, pad_id),
        answers=batches.pad_nested(answers, count, answer_len, pad_id),
        mask=np.array(present),
    )
