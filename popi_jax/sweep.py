"""Scores runs and base models under many conditions, on many data: a sweep. Each cell of it is one
file in the folder --out; a cell that is there is never computed again, so the same command goes on
after a stop, adds what is new, and costs nothing when all is there. Without --models it is the run
in WORKDIR.

A sweep file defines get_sweep(argument), which returns a dict of lists: models (WORKDIR,
WORKDIR@STEP, or hf:BASE of a base model), data (own, or a configuration like prefeval; with @SPLIT
if it is not test), signals (all, or kinds like profile+shots:2), conditions, decodings (greedy,
sampled), generators (trained, before_rl, or a base model that reads the summaries as text), and
baseline, max_users. The flags of the same names replace lists of the file."""

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from popi_jax import cli, config_rules
from popi_jax.config import Config
from popi_jax.errors import UserError

if TYPE_CHECKING:
    from popi_jax.evals.sweep_plan import Sweep

_SWEEP = cli.define_path("sweep", "configs/sweeps/default.py", "file of the sweep")
_OUT = cli.define_path("out", "", "folder of the cells; empty: work/sweeps/<name of the file>")
_SHARE = flags.DEFINE_string("share", "1/1", "part I/N: for N jobs that fill one folder at once")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "list the cells and compute nothing")
_LISTS = {
    name: flags.DEFINE_list(name, [], f"{name} in place of those of the file")
    for name in ("models", "data", "signals", "conditions", "decodings", "generators")
}
_POOL = flags.DEFINE_bool(
    "pool", False, "adds a row of all models together, as of runs that differ in their seed"
)
_EXCHANGE = flags.DEFINE_string(
    "every_eval_ever", "", "organisation: also writes the tables in that exchange format"
)
_MAX_USERS = flags.DEFINE_integer("max_users", None, "of each split; 0: all", lower_bound=0)


def main(config: Config) -> None:
    from popi_jax.evals.sweep_plan import read_sweep

    changed = {name: flag.value for name, flag in _LISTS.items() if flag.value}
    sweep = read_sweep(_SWEEP.value, changed, _MAX_USERS.value, workdir=config.workdir)
    sweep = _expand_homes(sweep)
    models = list(dict.fromkeys(model for grid in sweep.grids for model in grid.models))
    if _POOL.value and len(models) < 2:
        raise UserError(f"--pool: found one model ({models[0]}), must be two or more in --models")
    name = Path(_SWEEP.value.partition(":")[0]).stem
    out = _OUT.value or os.path.join("work", "sweeps", name)

    import sys

    import jax
    from etils import epath

    from popi_jax import distributed
    from popi_jax.evals import every_eval_ever, quality_report, report
    from popi_jax.evals.pooled import pool
    from popi_jax.evals.sweep import FAILED, Place, read_records, run_sweep
    from popi_jax.run import start_devices

    mesh = start_devices(config)
    on_laptop = distributed.is_alone_on_cpu(os.environ) and jax.default_backend() == "cpu"
    place = Place(
        out,
        config,
        _find_released(config),
        mesh,
        lambda name: cli.load_config(name).data,
        on_laptop,
    )
    outcomes = run_sweep(sweep, place, share=_SHARE.value, dry_run=_DRY_RUN.value)
    failed = sum(outcome.status == FAILED for outcome in outcomes)
    if distributed.is_main_process() and not _DRY_RUN.value:
        found = read_records(outcomes, out)
        cells = list(found)
        if _POOL.value:
            cells += pool(found, [outcome.cell.model for outcome in outcomes])
        print(report.write(out, cells, baseline=sweep.baseline))
        quality_report.write_quality(found, out)
        if _EXCHANGE.value:
            lines = report.make_lines(found, baseline=sweep.baseline)
            every_eval_ever.write_exchange(
                lines,
                os.path.join(out, "every_eval_ever"),
                organization=_EXCHANGE.value,
                retrieved=time.time(),
            )
        if len({outcome.cell.generator for outcome in outcomes}) > 1:
            print((epath.Path(out) / "transfer.md").read_text())
        print(f"{out}: table, groups, transfer and summaries as .md, .csv and .jsonl; cells/")
    if failed:
        print(f"{failed} of {len(outcomes)} cells failed; the same command tries them again")
        sys.exit(1)


def _expand_homes(sweep: "Sweep") -> "Sweep":
    """The sweep with home folders in place of "~" in its models and generators."""
    from popi_jax.evals.sweep_plan import BASE

    def expand(names: Sequence[str], field: str) -> tuple[str, ...]:
        parts = ((BASE if n.startswith(BASE) else "", n.removeprefix(BASE)) for n in names)
        return tuple(kind + config_rules.expand_home(path, field) for kind, path in parts)

    grids = (
        grid._replace(
            models=expand(grid.models, "models"), generators=expand(grid.generators, "generators")
        )
        for grid in sweep.grids
    )
    return sweep._replace(grids=tuple(grids))


def _find_released(config: Config) -> Config:
    """The settings of base models: those of the command, unless it names random weights."""
    if config.model.checkpoint:
        return config
    name, _, options = flags.FLAGS.config.partition(":")
    kept = [option for option in options.split(",") if option and not option.startswith("model=")]
    released = cli.load_config(f"{name}:{','.join([*kept, 'model=pretrained'])}")
    return dataclasses.replace(released, mesh=config.mesh, evaluation=config.evaluation)


if __name__ == "__main__":
    cli.run(
        main,
        description=__doc__,
        example="python -m popi_jax.sweep --models=work/prism,work/other@800 "
        "--decodings=greedy,sampled --data=own,prefeval@validation",
    )
