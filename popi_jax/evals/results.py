"""The evaluation of one run, at the end of its training or by `make eval`: a sweep of one, kept in
the workdir of the run, and its results.json."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from etils import epath

from popi_jax import distributed, files
from popi_jax.arrays import Frozen, Params
from popi_jax.checkpoints.content import Hashes
from popi_jax.data.records import User
from popi_jax.diagnostics.decomposition import BOUNDS, count_mentions, expect_accuracy, find_optimum
from popi_jax.errors import UserError
from popi_jax.evals import metrics, render
from popi_jax.evals.cells import Unit
from popi_jax.evals.conditions import BEFORE_RL, CONDITIONS, TRAINED, list_reads
from popi_jax.evals.diagnosis import diagnose
from popi_jax.evals.records import CellRecord
from popi_jax.evals.subjects import Subject, Weights, open_subject
from popi_jax.evals.sweep import FAILED, Outcome, compute_cells, make_split, read_records
from popi_jax.evals.sweep_plan import DECODINGS, DEFAULT, OWN, Cell, Sweep, list_cells
from popi_jax.run import Run

NUM_EXAMPLES = 3
SHOWN = ("condition", "decoding", "accuracy", "stderr", "n", "nats", "context_tokens")


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
    the table. Cells that are there are not computed again.

    `frozen` holds both models at the start of the main stage. At most `evaluation.max_users` users
    are scored, the first ones. `render.write_results` says where the files lie. A condition under
    which no pair counts is left out. Raises: UserError when the split holds no user, or a condition
    fails."""
    config = run.config
    out = str(epath.Path(config.workdir) / "results")
    subject = open_subject(f"{config.workdir}@{step}", config, run.mesh)
    data = subject.roles.config.data  # with the limits as they were given
    users = make_split(run.dataset, split, data, config.evaluation.max_users)
    models = {TRAINED: (inference, generator), BEFORE_RL: (frozen.inference, frozen.generator)}
    subject = _put_weights(subject, models)
    hashes = Hashes(epath.Path(out) / "hashes.json", files.write_whole)
    unit = Unit(subject, users, subject.readers, list(DECODINGS), out, hashes)
    cells = _list_cells(config.workdir, split, users.users)
    outcomes = compute_cells(dict.fromkeys(cells, unit), out, own=cells)
    if bad := [outcome for outcome in outcomes if outcome.status == FAILED]:
        raise UserError(f"the evaluation failed: {bad[0].cell.condition}: {bad[0].reason}")
    written = {
        writer: unit.read_summaries(writer, "all", "greedy", lambda part: None)
        for writer in (BEFORE_RL, TRAINED)
    }
    summaries = [
        {"user_id": item["user"], "summary": item["summary"], "tokens": item["tokens"]}
        for item in written[TRAINED]
    ]
    texts = {name: [item["summary"] for item in items] for name, items in written.items()}
    explain = partial(diagnose, summaries=texts, users=users.users, source=run.dataset.source)
    results = {
        "config": dataclasses.asdict(config),
        "data": run.dataset.data,
        "split": split,
        "step": step,
        "bayes": _find_optimum(run, users.users),
        **_share_results(outcomes, out, explain),
        "examples": [
            {"user_id": user.user_id, "summary": row["summary"], "truth": user.oracle}
            for user, row in zip(users.users[:NUM_EXAMPLES], summaries, strict=False)
        ],
    }
    if distributed.is_main_process():
        render.write_results(config.workdir, results, summaries)
        print(render.render(results), end="")
    return results


def _put_weights(subject: Subject, models: dict[str, tuple[Params, Params]]) -> Subject:
    """The subject with weights that are in memory already."""

    def hold(weights: Weights, params: Params) -> Weights:
        return weights._replace(load=lambda: params)

    writers = {name: hold(weights, models[name][0]) for name, weights in subject.writers.items()}
    reference = hold(subject.readers[BEFORE_RL].weights, models[BEFORE_RL][1])
    trained = hold(subject.readers[TRAINED].weights, models[TRAINED][1])
    readers = {
        TRAINED: subject.readers[TRAINED]._replace(weights=trained, reference=reference),
        BEFORE_RL: subject.readers[BEFORE_RL]._replace(weights=reference, reference=reference),
    }
    return subject._replace(writers=writers, readers=readers)


def _list_cells(workdir: str, split: str, users: Sequence[User]) -> list[Cell]:
    """Every condition, and the generator before the main stage behind the true persona."""
    counting = [c.name for c in CONDITIONS if c.count_users is None or any(c.count_users(users))]
    grid = DEFAULT._replace(
        models=(workdir,),
        data=(f"{OWN}@{split}",),
        conditions=tuple(counting),
        decodings=tuple(DECODINGS),
    )
    before = grid._replace(generators=(BEFORE_RL,), conditions=("oracle",))
    grids = (grid, before) if "oracle" in counting else (grid,)
    return list_cells(Sweep(grids, "no_signals", 0), list_reads())


def _find_optimum(run: Run, users: Sequence[User]) -> dict[str, float | None]:
    """The best accuracy that any model could reach, by what it knows; None where unknown."""
    source = run.dataset.source
    odds = [source.find_odds(user) for user in users] if source.find_odds else []
    flat = [pair for pairs in odds for pair in pairs]
    found = {**dict.fromkeys([*BOUNDS, "best_list"]), **(find_optimum(flat) if flat else {})}
    if flat and source.write_best_list:
        lists = map(source.write_best_list, users)
        told = [count_mentions(z, pair) for z, own in zip(lists, odds, strict=True) for pair in own]
        known = np.array([pair.signals for pair in flat])
        found["best_list"] = expect_accuracy(known, np.array(told))
    return found


def _share_results(
    outcomes: Sequence[Outcome], out: str, explain: Callable[[Sequence[CellRecord]], dict[str, Any]]
) -> dict[str, Any]:
    """Process 0 reads the files and tells all: it may still be writing the last of them when
    another process comes here, and disks that are shared show files late.

    explain: what else is said of them."""
    told = ""
    if distributed.is_main_process():
        found = read_records(outcomes, out)
        told = json.dumps(_list_results(found) | explain(found))
    return json.loads(distributed.tell_all(told))


def _list_results(found: Sequence[CellRecord]) -> dict[str, Any]:
    rows, before = [], {}
    for record in found:
        row = _score(record)
        if record.header["labels"]["generator"] == BEFORE_RL:
            before[row.pop("condition")] = row
        else:
            rows.append(row)
    return {"rows": rows, "before_rl": before}


def _score(record: CellRecord) -> dict[str, Any]:
    people: dict[str, list[dict[str, Any]]] = {}
    for item in record.items:
        people.setdefault(item["user"], []).append(item)
    most = max(map(len, people.values()))
    mask = np.array([np.arange(most) < len(items) for items in people.values()])
    margins = np.zeros(mask.shape)
    margins[mask] = [item["margin"] for items in people.values() for item in items]
    score = metrics.score_pairs(margins, mask)
    labels = record.header["labels"]
    seen = float(np.mean([items[0]["context_tokens"] for items in people.values()]))
    values = (labels["condition"], labels["decoding"], *score, seen)
    row = dict(zip(SHOWN, values, strict=True))
    return row | {"stderr": None if math.isnan(row["stderr"]) else row["stderr"]}
