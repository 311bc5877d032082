"""A look at some validation users while the main stage runs: what summaries are worth to them,
where the loss goes and what summaries name. docs/diagnostics.md says what each value means.

It reads the state and changes nothing: no key of the training is used, and the same values come
from any mesh and any number of processes. Summaries are drawn with the same keys at every look, so
looks differ by the models alone."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Bool, Float

from popi_jax.arrays import PairLengths, PairLogps, Params, TrainState, UserBatch
from popi_jax.config import Config
from popi_jax.data import encode
from popi_jax.data.batches import encode_all
from popi_jax.data.dealing import find_longest
from popi_jax.data.encode import Ids
from popi_jax.data.persons import find_others, have_others, name_persons
from popi_jax.data.records import User
from popi_jax.dealt import Dealt, deal_pairs, deal_signals
from popi_jax.diagnostics import values
from popi_jax.diagnostics.estimates import Persons, number_persons
from popi_jax.generators import Generator, Summarizer
from popi_jax.losses.preference import pair_margins
from popi_jax.losses.reward import pair_rewards
from popi_jax.popi.plan import Reference, UpdatePlan
from popi_jax.run import Run

SAMPLES = 4  # summaries of each user at the temperature of the training

Margins: TypeAlias = Float[np.ndarray, "users pairs"]
Joined = tuple[Params, Params]  # the inference model and the generator


class Watched(NamedTuple):
    """The users that are looked at; all is made once."""

    users: Sequence[User]
    persons: Persons
    others: Sequence[int]  # whose summary stands in for one's own
    whole: UserBatch  # all in one batch of numpy arrays
    signals: Dealt
    pairs: Dealt
    fixed: dict[str, Sequence[Ids]]  # texts about the users that no model writes
    masks: dict[str, Bool[np.ndarray, "users pairs"]]  # the pairs that count, of each condition


def open_probe(
    run: Run,
    plan: UpdatePlan,
    join: Callable[[TrainState], Joined],
    read_start: Callable[[], Params],
) -> "Probe | None":
    """None where the run asks for none, or has nobody to look at. join(state): its two models, as a
    run uses them. read_start(): the generator at the start of the main stage; it is held while a
    look needs it, and no longer."""
    schedule = run.config.schedule
    if not schedule.probe_every or not plan.kinds:
        return None
    users = choose_users(run.dataset.splits["validation"], schedule.probe_users)
    if not any(user.pairs for user in users):
        logging.info("No probe: the validation split holds no user (data.validation_fraction)")
        return None
    watched = watch(run, users, summaries=plan.generator.reads_summaries)
    told = (len(users), len(run.dataset.splits["validation"]), int(watched.whole.pair_mask.sum()))
    logging.info(
        "Probe: %d of %d validation users, %d pairs, every %d updates (schedule.probe_every)",
        *(*told, schedule.probe_every),
    )
    return Probe(run, plan, watched, join, read_start)


def choose_users(users: Sequence[User], most: int) -> list[User]:
    """At most so many, evenly spaced: examples of one person lie side by side."""
    count = min(len(users), most)
    return [users[number * len(users) // count] for number in range(count)]


def watch(run: Run, users: Sequence[User], *, summaries: bool) -> Watched:
    """summaries: whether the generator reads them; else it is told something else, or nothing."""
    config, words = give_limits(run), run.generator.tokenizer
    whole, _ = encode_all(users, words, config)
    rows, mesh = config.evaluation.batch_users, run.mesh
    fixed = {values.NOTHING: [list[int]() for _ in users]}
    applies = {values.NOTHING: [True] * len(users)}
    fixed["oracle"] = [encode.tell_persona(user, words, config) for user in users]
    applies["oracle"] = [bool(ids) for ids in fixed["oracle"]]
    if summaries:
        applies |= {"summary": [True] * len(users), "other": have_others(users)}
    elif config.generator.reads == "signals":
        fixed["told"] = [encode.tell(user, words, config) for user in users]
        applies["told"] = [True] * len(users)
    mask = np.asarray(whole.pair_mask)
    return Watched(
        users,
        number_persons(name_persons(users)),
        find_others(users),
        whole,
        deal_signals(whole, run.inference.model, run.inference.prompt, mesh, rows),
        deal_pairs(whole, run.generator.model, mesh, rows),
        {name: texts for name, texts in fixed.items() if any(applies[name])},
        {name: mask & np.array(some)[:, None] for name, some in applies.items()},
    )


def give_limits(run: Run) -> Config:
    """The configuration with the limits of texts as they were given: those of the run are fitted to
    its training users."""
    given = json.loads(run.config_json)["data"]
    limits = {name: given[name] for name in run.measured.lengths}
    return dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, **limits))


class Probe:
    """Looks at the validation users of a run."""

    def __init__(
        self,
        run: Run,
        plan: UpdatePlan,
        watched: Watched,
        join: Callable[[TrainState], Joined],
        read_start: Callable[[], Params],
    ) -> None:
        self.first_step, self._every = plan.first_step, run.config.schedule.probe_every
        self._run, self._plan, self._watched = run, plan, watched
        self._join, self._read_start = join, read_start
        longest = [len(ids) for texts in watched.fixed.values() for ids in texts]
        self._text_len = find_longest([*longest, run.inference.sampling.max_len])
        self._nothing: PairLogps | None = None  # of the start, behind no text
        # margins behind fixed texts, and after how many updates of the generator
        self._fixed: tuple[int, dict[str, Margins]] = (-1, {})

    def is_due(self, step: int, last_step: int) -> bool:
        """Before the first update, after each `schedule.probe_every` and after the last one."""
        return step == last_step or (step - self.first_step) % self._every == 0

    def measure(self, state: TrainState) -> dict[str, float]:
        """Name -> value; what does not apply is left out. Called by all processes."""
        updates = int(jax.device_get(state.generator.step))
        inference, generator = self._join(state)
        start = self._read_start() if updates else generator
        if self._fixed[0] != updates:
            texts = self._watched.fixed.items()
            self._fixed = updates, {n: self._score(generator, start, each) for n, each in texts}
        found = self._look(inference, generator, start)
        return {f"probe/{name}": value for name, value in found.items() if np.isfinite(value)}

    def _look(self, inference: Params, generator: Params, start: Params) -> dict[str, float]:
        seen, role, source = self._watched, self._run.inference, self._run.dataset.source
        margins = dict(self._fixed[1])
        if not self._plan.generator.reads_summaries:
            return values.describe_margins(margins, seen.masks, seen.persons)
        heats = (0.0, *[role.sampling.temperature] * SAMPLES)
        summarizer = Summarizer(role, inference, self._run.config.seed)
        greedy, *sampled = summarizer.write(seen.signals, heats, _ignore)
        margins["summary"] = self._score(generator, start, greedy)
        margins["other"] = self._score(generator, start, [greedy[n] for n in seen.others])
        found = values.describe_margins(margins, seen.masks, seen.persons)
        mask = seen.masks["summary"]
        drawn = np.stack([self._score(generator, start, texts) for texts in sampled], axis=1)
        found |= values.describe_samples(drawn, mask)
        rewards = np.asarray(
            pair_rewards(jnp.asarray(drawn), kind=self._plan.inference.reward.kind)
        )
        found["reliability_1"] = values.measure_reliability(rewards, mask)
        if self._plan.generator.reference is not Reference.SUMMARY:  # else such margins are all 0
            judged = margins["summary"]
            if generator is not start:
                judged = self._score(start, start, greedy)
            found |= values.describe_judge(judged, self._score_nothing(start), mask)
        texts = [role.tokenizer.decode(ids).strip() for ids in greedy]
        rates = values.describe_texts(texts, seen.users, seen.persons, source)
        found |= {name: rate.value for name, rate in rates.items()}
        if odds := values.list_odds(source, seen.users, mask):
            found |= values.describe_loss(margins["summary"][mask], odds, texts)
        return found

    def _score(self, generator: Params, start: Params, texts: Sequence[Ids]) -> Margins:
        """Margins of a generator behind a text about each user, as the objective implies them."""
        logps = self._score_logps(generator, texts)
        match self._plan.generator.reference:
            case Reference.NONE:
                known = None
            case Reference.SUMMARY:
                known = logps if generator is start else self._score_logps(start, texts)
            case _:
                known = self._score_start(start)
        return self._find_margins(logps, known)

    def _score_nothing(self, start: Params) -> Margins:
        """Margins of the start behind no text."""
        logps = self._score_start(start)
        needs = self._plan.generator.reference is not Reference.NONE
        return self._find_margins(logps, logps if needs else None)

    def _score_start(self, start: Params) -> PairLogps:
        """Of the start behind no text: once."""
        if self._nothing is None:
            self._nothing = self._score_logps(start, self._watched.fixed[values.NOTHING])
        return self._nothing

    def _score_logps(self, generator: Params, texts: Sequence[Ids]) -> PairLogps:
        scored = Generator(self._run.generator, generator, self._run.mesh)
        return scored.score(texts, self._watched.pairs, self._text_len, _ignore)

    def _find_margins(self, logps: PairLogps, known: PairLogps | None) -> Margins:
        whole, objective = self._watched.whole, self._plan.generator.objective
        lengths = PairLengths(*map(jnp.asarray, (whole.chosen.lengths, whole.rejected.lengths)))
        return np.asarray(pair_margins(logps, lengths, known, objective=objective), np.float64)


def _ignore(part: float) -> None:
    """Takes the place of a progress bar."""
