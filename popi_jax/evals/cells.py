"""Scores a list of conditions on the same users and pairs: each cell is a condition, a way of
decoding its summaries and a generator. Touches no file."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from popi_jax import distributed
from popi_jax.arrays import PairLengths, PairLogps, Params, UserBatch
from popi_jax.data.encode import Ids
from popi_jax.data.records import User
from popi_jax.evals import generators, metrics
from popi_jax.evals.conditions import BEFORE_RL, CONDITIONS, TRAINED, Condition, People
from popi_jax.losses.preference import PreferenceObjective, margins_of
from popi_jax.progress import Progress
from popi_jax.run import Run
from popi_jax.training.setup import make_preference_objective

GREEDY, SAMPLED, NO_SUMMARY = "greedy", "sampled", "none"
TEMPERATURES = {GREEDY: 0.0, SAMPLED: 1.0}


class Models(NamedTuple):
    """The parameters of both roles at one time."""

    inference: Params
    generator: Params


class Text(NamedTuple):
    """A text about each user."""

    condition: Condition
    decoding: str  # of its summaries: greedy | sampled (temperature 1) | none: it holds none


class Cell(NamedTuple):
    text: Text
    generator: str  # trained | before_rl


class Result(NamedTuple):
    """Of a cell: what metrics.Score has, and what the generator sees of the users that count."""

    condition: str
    decoding: str
    accuracy: float
    stderr: float
    n: int
    nats: float
    context_tokens: float  # mean over the users


class Evaluation(NamedTuple):
    rows: list[Result]  # of the trained generator
    before_rl: dict[str, Result]  # of the generator at the start of the main stage
    summaries: list[Ids]  # greedy, of the trained inference model, in its tokens


NOTHING = Text(Condition("", lambda people: [[] for _ in people.users]), NO_SUMMARY)


def evaluate(
    run: Run,
    users: Sequence[User],
    models: dict[str, Models],
    conditions: Sequence[Condition] = CONDITIONS,
) -> Evaluation:
    """Scores the users' pairs; `models` are "trained" and "before_rl", the start of the main stage.

    Margins are those of the objective of training; their reference, if they have one, is the
    generator before RL, without any text unless `generator.reference` says otherwise. So where both
    generators are equal, no_signals has margins of 0. A cell in which no pair counts is left out.
    """
    objective = make_preference_objective(run.config)
    placed = generators.place_users(run, users, run.config)
    mask, lengths = _join_pairs(run, users)
    counted = {c: mask & _count_users(c, users)[:, None] for c in conditions}
    cells = list_cells([c for c in conditions if counted[c].any()])
    references = {cell: _find_reference(run, cell, objective) for cell in cells}
    # what has to be drawn and scored, each once
    drawn = {(TRAINED, GREEDY): None}
    drawn |= {(c.text.condition.summaries_by, c.text.decoding): None for c in cells if c.text.decoding != NO_SUMMARY}
    scored = dict.fromkeys([*cells, *(x for x in references.values() if x)])
    shown, done = distributed.is_main_process(), itertools.count(1)
    ...
