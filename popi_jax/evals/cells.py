"""Scores a list of conditions on the same users and pairs: each cell is a text about the users and
a generator."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from popi_jax import distributed
from popi_jax.arrays import Frozen, PairLengths, PairLogps, Params
from popi_jax.data import prompts
from popi_jax.data.encode import Ids
from popi_jax.data.records import User
from popi_jax.errors import UserError
from popi_jax.evals import conditions, metrics, render
from popi_jax.evals.conditions import BEFORE_RL, TRAINED, Condition, People
from popi_jax.evals.dealt import deal_pairs, deal_signals
from popi_jax.evals.generators import Generator, Summarizer, encode_users, list_summaries
from popi_jax.losses.preference import PreferenceObjective, pair_margins
from popi_jax.progress import Progress
from popi_jax.run import Run
from popi_jax.training.setup import make_objective

TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}  # how the summaries of a condition are decoded


NUM_EXAMPLES = 3
BOUNDS = ("no_signals", "signals", "latent")  # what a model may know, of which an optimum is known


class Models(NamedTuple):
    """The parameters of both roles at one time."""

    inference: Params
    generator: Params


class Text(NamedTuple):
    """A text about each user."""

    condition: Condition
    decoding: str  # of its summaries, a key of TEMPERATURES; none: it holds no summary


class Cell(NamedTuple):
    text: Text
    generator: str  # the name of its models


NOTHING = Text(Condition("nothing", conditions.tell_nothing), "none")


class Result(NamedTuple):
    """The generator sees `context_tokens` tokens about a user; the other fields as in
    metrics.Score."""

    condition: str
    decoding: str
    accuracy: float
    stderr: float
    n: int
    nats: float
    context_tokens: float  # mean over the users that count


class Evaluation(NamedTuple):
    rows: list[Result]  # of the trained generator
    before_rl: dict[str, Result]  # condition -> the same of the generator before the main stage
    summaries: list[Ids]  # greedy, of the trained inference model, in its tokens


def evaluate(
    run: Run,
    users: Sequence[User],
    models: dict[str, Models],
    told: Sequence[Condition] = conditions.CONDITIONS,
) -> Evaluation:
    """Scores the users' pairs under the conditions `told`, with models of the names that they use.

    Margins are those of the objective of training; their reference, if they have one, is the
    generator before RL, without any text unless `generator.reference` says otherwise. Where that is
    the generator that is scored too, no_signals has margins of 0. A condition under which no pair
    counts is left out."""
    real, _ = encode_users(run, users, run.config)
    size, writer = run.config.evaluation.batch_users, run.inference
    signals = deal_signals(real, writer.model, writer.prompt, run.mesh, size)
    pairs = deal_pairs(real, run.generator.model, run.mesh, size)
    counted = {c: real.pair_mask & _count_users(c, users)[:, None] for c in told}
    cells = _list_cells([c for c in told if counted[c].any()])
    objective = make_objective(run.config)
    references = {cell: _find_reference(run, cell, objective) for cell in cells}
    # all that is drawn and scored, each once
    scored = dict.fromkeys([*cells, *(cell for cell in references.values() if cell)])
    texts = dict.fromkeys(cell.text for cell in scored)
    drawn: dict[str, dict[str, None]] = {TRAINED: {"greedy": None}}  # how, by each model
    for text in texts:
        if text.decoding != "none":
            drawn.setdefault(text.condition.summaries_by, {})[text.decoding] = None
    shown, done = distributed.is_main_process(), itertools.count()
    total = 100 * (len(drawn) + len(scored))
    with Progress(total, label="evaluation", enabled=shown) as progress:

        def follow() -> Callable[[float], None]:
            start = 100 * next(done)
            return lambda part: progress.update(start + round(100 * part))

        summaries: dict[tuple[str, str], list[Ids]] = {}
        for name, decodings in drawn.items():
            summarizer = Summarizer(writer, models[name].inference, run.config.seed)
            heats = [TEMPERATURES[decoding] for decoding in decodings]
            found = summarizer.write(signals, heats, follow())
            summaries |= {(name, d): ids for d, ids in zip(decodings, found, strict=True)}
        written = {text: _write_text(run, users, text, summaries) for text in texts}
        logps: dict[Cell, PairLogps] = {}
        for cell in scored:
            generator = Generator(run.generator, models[cell.generator].generator, run.mesh)
            ids = written[cell.text]
            logps[cell] = generator.score(ids, pairs, _pick_length(run, ids), follow())
    lengths = PairLengths(jnp.asarray(real.chosen.lengths), jnp.asarray(real.rejected.lengths))
    rows, before = [], {}
    for cell in cells:
        reference = references[cell]
        known = logps[reference] if reference else None
        margins = pair_margins(logps[cell], lengths, known, objective=objective)
        mask = counted[cell.text.condition]
        result = _make_result(cell.text, written[cell.text], np.asarray(margins), mask)
        if cell.generator == BEFORE_RL:
            before[result.condition] = result
        else:
            rows.append(result)
    return Evaluation(rows, before, summaries[TRAINED, "greedy"])


def _list_cells(told: Sequence[Condition]) -> list[Cell]:
    cells = []
    for condition in told:
        decodings = TEMPERATURES if condition.summaries_by else ("none",)
        for decoding, name in itertools.product(decodings, condition.scored_by):
            cells.append(Cell(Text(condition, decoding), name))
    return cells


def _find_reference(run: Run, cell: Cell, objective: PreferenceObjective) -> Cell | None:
    """The cell whose log-probs the margins of another are measured from."""
    if not objective.needs_reference:
        return None
    sees_text = run.config.generator.reference == "summary"
    return Cell(cell.text if sees_text else NOTHING, BEFORE_RL)


def _count_users(condition: Condition, users: Sequence[User]) -> Bool[np.ndarray, " users"]:
    counts = condition.count_users
    return np.ones(len(users), bool) if counts is None else np.array(counts(users), bool)


def _write_text(
    run: Run, users: Sequence[User], text: Text, summaries: dict[tuple[str, str], list[Ids]]
) -> list[Ids]:
    """The text about each user in tokens of the generator."""
    words, reader = run.inference.tokenizer, run.generator.tokenizer
    given = summaries.get((text.condition.summaries_by, text.decoding), [])
    if reader is not words:
        read = (words.decode(ids).strip() for ids in given)
        given = [prompts.encode_summary(reader, text, run.config) for text in read]
    texts = text.condition.make_texts(People(users, reader, run.config, given))
    limit = max(_list_lengths(run))
    return [list(ids[:limit]) for ids in texts]


def _make_result(
    text: Text,
    written: Sequence[Ids],
    margins: Float[np.ndarray, "users pairs"],
    mask: Bool[np.ndarray, "users pairs"],
) -> Result:
    seen = [len(ids) for ids, row in zip(written, mask, strict=True) if row.any()]
    score = metrics.score_pairs(margins, mask)
    return Result(text.condition.name, text.decoding, *score, float(np.mean(seen)))


def _pick_length(run: Run, texts: Sequence[Ids]) -> int:
    """The padded length of texts: one of two, so that the conditions share two programs."""
    longest = max(map(len, texts))
    return min(length for length in _list_lengths(run) if longest <= length)


def _list_lengths(run: Run) -> tuple[int, int]:
    return run.config.data.summary_len, run.config.data.context_len


def evaluate_run(
    run: Run,
    *,
    step: int,
    inference: Params,
    generator: Params,
    frozen: Frozen,
    split: str = "test",
) -> dict[str, Any]:
    """Scores the models of a run on a split, writes the result files into its workdir and prints
    the table.

    `frozen` holds both models at the start of the main stage. At most `evaluation.max_users` users
    are scored, the first ones. `render.write_results` says where the files lie. Raises: UserError
    when the split holds no user."""
    config, users = run.config, run.dataset.splits[split]
    users = list(users[: config.evaluation.max_users or len(users)])
    if not users:
        raise UserError(
            f"data.{split}_fraction: the {split} split holds no user; take another --split"
        )
    before = Models(frozen.inference, frozen.generator)
    models = {TRAINED: Models(inference, generator), BEFORE_RL: before}
    evaluation = evaluate(run, users, models)
    summaries = list_summaries(run, users, evaluation.summaries)
    results = {
        "config": dataclasses.asdict(config),
        "data": run.dataset.data,
        "split": split,
        "step": step,
        "bayes": _find_optimum(run, users),
        **_list_results(evaluation),
        "examples": [
            {"user_id": user.user_id, "summary": row["summary"], "truth": user.oracle}
            for user, row in zip(users[:NUM_EXAMPLES], summaries, strict=False)
        ],
    }
    if distributed.is_main_process():
        render.write_results(config.workdir, results, summaries)
        print(render.render(results), end="")
    return results


def _find_optimum(run: Run, users: Sequence[User]) -> dict[str, float | None]:
    """The best accuracy that any model could reach, by what it knows; None where unknown."""
    compute = run.dataset.source.compute_optimum
    return {**dict.fromkeys(BOUNDS), **(compute(users) if compute else {})}


def _list_results(evaluation: Evaluation) -> dict[str, Any]:
    before = {name: _list_fields(row) for name, row in evaluation.before_rl.items()}
    for fields in before.values():
        del fields["condition"]
    return {"rows": [_list_fields(row) for row in evaluation.rows], "before_rl": before}


def _list_fields(row: Result) -> dict[str, Any]:
    return row._asdict() | {"stderr": None if math.isnan(row.stderr) else row.stderr}
