"""One table of a run and its baselines, all on the same pairs of the same users."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from popi_jax import distributed, files
from popi_jax.arrays import Params
from popi_jax.baselines import low_rank, soft_prompt, variational
from popi_jax.baselines.features import Features, compute_splits
from popi_jax.baselines.pairs import FITTED, GENERIC, Fit
from popi_jax.checkpoints.content import Hashes
from popi_jax.config import Config
from popi_jax.data.selection import select_signals
from popi_jax.errors import UserError
from popi_jax.evals import records, statistics
from popi_jax.evals.conditions import BEFORE_RL, TRAINED
from popi_jax.evals.records import CellRecord
from popi_jax.evals.render import MADE_DATA, align_table
from popi_jax.evals.report import show_interval
from popi_jax.evals.subjects import open_subject
from popi_jax.evals.sweep import FAILED, Place, make_split, read_records, run_sweep
from popi_jax.evals.sweep_plan import DEFAULT, OWN, Sweep
from popi_jax.run import Run, open_run
from popi_jax.training.restore import restore_run

# on states of the frozen generator, which are computed once for both
REWARDS: dict[str, Callable[..., Fit]] = {
    "vpl": variational.fit_features,
    "lore": low_rank.fit_features,
}
FITTING = 1  # raise it when the published methods are fitted otherwise


class Wanted(NamedTuple):
    """A line of the table: a cell of a row, and what it is."""

    row: str  # of compare.TRAINED
    condition: str
    generator: str
    told: str


# in the order of the table
LINES = (
    Wanted("popi", "no_signals", BEFORE_RL, "start of the main stage, no context"),
    Wanted("popi", "raw_signals", BEFORE_RL, "the same, raw signals"),
    Wanted("popi", "summary_before_rl", BEFORE_RL, "the same, untrained summaries"),
    Wanted("population", "no_signals", TRAINED, "population DPO, no context"),
    Wanted("raw_context", "raw_signals", TRAINED, "trained on raw signals"),
    Wanted("supervised", "summary", TRAINED, "supervised summaries"),
    Wanted("frozen_generator", "summary", TRAINED, "RL summaries, frozen generator"),
    Wanted("prompt_aware", "summary", TRAINED, "POPI, prompt-aware summaries"),
    Wanted("popi", "summary", TRAINED, "POPI"),
    Wanted("popi", "other_user_summary", TRAINED, "POPI, another user's summary"),
    Wanted("popi", "oracle", TRAINED, "POPI, the true persona"),
)
PUBLISHED = {
    "soft_prompt": "P-DPO: soft prompt of the user",
    "vpl": "VPL: latent of the user",
    "lore": "LoRe: weights of the user",
}
KNOWN = {GENERIC: "unknown user", FITTED: "fitted to past pairs"}
POPULATION, POPI = "population DPO, no context", "POPI"
_NOTES = """\
Accuracy by the margin (a tie counts one half) and its difference, on the same pairs, to population
DPO and to POPI; [95 % interval] by a bootstrap over persons. context tokens: what the generator
reads of the user; fitted methods read none, but train numbers of each new user on past pairs, which
no other model can use. How to read each row: docs/evaluation.md."""


def compare(
    config: Config,
    workdirs: Mapping[str, str],
    fitted: Sequence[str],
    out: str,
    *,
    split: str = "test",
) -> str:
    """Scores the runs in `workdirs` and fits the methods `fitted`; returns the table, which is
    written to `out` too. Raises: UserError when a cell or a fit fails."""
    run = open_run(config, must_exist=True)
    found = _score_runs(run, workdirs, out, split)
    fitting = Fitting(run, out, split)
    for name in fitted:
        found |= fitting.fit(name)
    text = render(found, made=run.dataset.data == "sample")
    if distributed.is_main_process():
        files.write_whole(epath.Path(out) / "baselines.md", text)
    return text


def _score_runs(
    run: Run, workdirs: Mapping[str, str], out: str, split: str
) -> dict[str, CellRecord]:
    grids, lines = [], [line for line in LINES if line.row in workdirs]
    for line in lines:
        names = {"models": workdirs[line.row], "data": f"{OWN}@{split}"}
        names |= {"conditions": line.condition, "generators": line.generator}
        grids.append(DEFAULT._replace(**{field: (name,) for field, name in names.items()}))
    most = run.config.evaluation.max_users
    sweep = Sweep(tuple(grids), "no_signals", most)
    sample = run.dataset.data == "sample"
    place = Place(out, run.config, run.config, run.mesh, lambda name: run.config.data, sample)
    outcomes = {outcome.cell: outcome for outcome in run_sweep(sweep, place)}
    found = {}
    for grid, line in zip(grids, lines, strict=True):
        outcome = next(
            o
            for cell, o in outcomes.items()
            if (cell.model, cell.condition, cell.generator)
            == (grid.models[0], line.condition, line.generator)
        )
        no_pair = "no pair counts" in outcome.reason  # such as of data without personas
        if outcome.status == FAILED and not no_pair:
            raise UserError(f"{line.told}: {outcome.reason}")
        if outcome.status != FAILED:
            found[line.told] = read_records([outcome], out)[0]
    return found


class Fitting:
    """The published methods on the data of a run; what they share is computed once."""

    def __init__(self, run: Run, out: str, split: str) -> None:
        self._run, self._out, self._split = run, out, split
        self._subject = open_subject(run.config.workdir, run.config, run.mesh)
        data, most = self._subject.roles.config.data, run.config.evaluation.max_users
        self._users = make_split(run.dataset, split, data, most)
        self._features: dict[str, Features] = {}
        self._frozen: Params = {}

    def fit(self, name: str) -> dict[str, CellRecord]:
        """Both records of a method: of users who are unknown, and fitted to their pairs."""
        identity, keys = {}, ""
        if distributed.is_main_process():
            identity = self._identify(name)
            keys = ",".join(records.make_key(identity | {"condition": c}) for c in KNOWN)
        paths = [
            records.find_file(self._out, records.CELLS, key)
            for key in distributed.tell_all(keys).split(",")
        ]
        told = ""
        if distributed.is_main_process():
            told = "there" if all(records.read_done(path) for path in paths) else ""
        if not distributed.tell_all(told):
            with jax.set_mesh(self._run.mesh):
                fit = self._compute(name)
            if distributed.is_main_process():
                for condition, path in zip(KNOWN, paths, strict=True):
                    self._write(path, identity, fit, name, condition)
            distributed.wait_for_all(f"the cells of {name}")
        return {
            f"{PUBLISHED[name]}, {known}": records.read(path)
            for known, path in zip(KNOWN.values(), paths, strict=True)
        }

    def _identify(self, name: str) -> dict[str, Any]:
        hashes = Hashes(epath.Path(self._out) / "hashes.json", files.write_whole)
        data = self._subject.roles.config.data
        some = data.signals != "all"
        return {
            "fitting": FITTING,
            "method": name,
            "weights": self._subject.readers[BEFORE_RL].weights.identify(hashes),
            "data": dict(self._users.identity) | ({"signals": data.signals} if some else {}),
            "limits": [data.num_pairs, data.turn_len, data.answer_len],
            "seed": self._run.config.seed,
        }

    def _compute(self, name: str) -> Fit:
        splits, seed = self._run.dataset.splits, self._run.config.seed
        users = {"train": splits["train"], "validation": splits["validation"]}
        users["test"] = select_signals(self._users.users, self._users.data.signals)
        self._frozen = self._frozen or restore_run(self._run).frozen.generator
        if name not in REWARDS:
            given = (users["train"], users["validation"], users["test"], seed)
            return soft_prompt.fit_and_score(self._run, self._frozen, *given)
        self._features = self._features or compute_splits(self._run, self._frozen, users)
        return REWARDS[name](self._run, self._features, users["test"], seed)

    def _write(
        self, path: epath.Path, identity: dict[str, Any], fit: Fit, name: str, condition: str
    ) -> None:
        labels = {"model": self._run.config.workdir, "step": "", "data": OWN, "split": self._split}
        labels |= {"signals": "shots", "condition": condition, "decoding": "none"}
        header = {"kind": "cell", "key": path.stem, "status": "done", "reason": ""}
        header |= {"labels": labels | {"generator": name}, "settings": fit.settings}
        items = fit.items[condition]
        coverage: dict[str, Any] = dict.fromkeys(("attempted", "scored"), len(items))
        coverage |= {"users": len(self._users.users)}
        header |= {"coverage": coverage | {"left_out": {}}, "data_kind": self._users.kind}
        records.write(path, header | {"identity": identity | {"condition": condition}}, items)


def render(found: Mapping[str, CellRecord], *, made: bool) -> str:
    """The table, as Markdown. found: the cell of each line."""
    items = {told: statistics.make_items(_name_people(r.items)) for told, r in found.items()}
    heads = ["row", "accuracy", f"to {POPULATION.partition(',')[0]}", f"to {POPI}"]
    table = [[*heads, "likelihood", "nats", "context tokens", "pairs"]]
    for told, own in items.items():
        row = statistics.compute_row(own)
        differences = []
        for other in (POPULATION, POPI):
            if other in items and other != told:
                estimate = statistics.compute_difference(own, items[other]).estimate
                differences.append(_show(estimate))
            else:
                differences.append("–")
        numbers = [_show(row.acc_half), *differences]
        plain = "–" if row.acc_likelihood is None else _show(row.acc_likelihood)
        numbers += [plain, _show(row.nats), f"{row.context_tokens:.1f}", str(row.n)]
        table.append([told, *numbers])
    parts = ["# A run and its baselines", *([f"**{MADE_DATA}**"] if made else [])]
    return "\n\n".join([*parts, align_table(table), _NOTES]) + "\n"


def _name_people(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Users by their person, so that rows whose users are examples of one pair are comparable."""
    return [{**item, "user": item["person"]} for item in items]


def _show(estimate: Any) -> str:
    value, _, low, high = (None if x != x else x for x in estimate)
    return show_interval(value, low, high)
