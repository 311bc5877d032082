"""Trains what the run in WORKDIR is compared with, scores all of it on the same test users, and
prints one table.

Rows that are runs of their own are trained by `popi_jax.train` in <workdir>/baselines/<row>, each
with its row of configs/schedules.py; the published methods are fitted to the run's data and its
generator at the start of the main stage. What is there is not trained, fitted or scored again, so
the same command goes on after a stop. docs/evaluation.md says what each row is and how to read
it."""

import os
import subprocess
import sys

from absl import flags

from popi_jax import cli
from popi_jax.config import Config
from popi_jax.errors import UserError, did_you_mean

# rows that are runs: name -> row of configs/schedules.py; "" is the run in WORKDIR
TRAINED = {
    "popi": "",
    "frozen_generator": "inference_only",
    "supervised": "supervised",
    "prompt_aware": "prompt_aware",
    "raw_context": "raw_context",
    "population": "population",
}
FITTED = ("soft_prompt", "vpl", "lore")

_ROWS = flags.DEFINE_list("rows", [*TRAINED, *FITTED], "rows to train or fit, and to compare")
_SPLIT = flags.DEFINE_enum("split", "test", ["test", "validation"], "users to score")
_OUT = cli.define_path("out", "", "folder of the cells; empty: <workdir>/baselines")


def main(config: Config) -> None:
    rows = list(dict.fromkeys(_ROWS.value))
    for row in rows:
        if row not in (*TRAINED, *FITTED):
            names = [*TRAINED, *FITTED]
            raise UserError(
                f'--rows has "{row}": must be some of {", ".join(names)}.{did_you_mean(row, names)}'
            )
    out = _OUT.value or os.path.join(config.workdir, "baselines")
    workdirs = {row: _find_workdir(config, row) for row in TRAINED if row in (*rows, "popi")}
    for row, workdir in workdirs.items():
        own = row in ("popi", "prompt_aware")  # the last one reads prompts from the beginning
        _train(row, workdir, "" if own else config.workdir)

    from popi_jax import distributed
    from popi_jax.evals.comparison import compare

    text = compare(config, workdirs, [r for r in rows if r in FITTED], out, split=_SPLIT.value)
    if distributed.is_main_process():
        print(text, end="")


def _find_workdir(config: Config, row: str) -> str:
    return os.path.join(config.workdir, "baselines", row) if TRAINED[row] else config.workdir


def _train(row: str, workdir: str, warm_start: str) -> None:
    """Trains a row in a process of its own, which goes on where an earlier one ended; a new one
    takes over the warm-up of the run."""
    name, _, options = flags.FLAGS.config.partition(":")
    kept = [option for option in options.split(",") if option]
    if TRAINED[row]:
        kept = [option for option in kept if not option.startswith("schedule=")]
        kept.append(f"schedule={TRAINED[row]}")
    overrides = [arg for arg in sys.argv[1:] if arg.startswith(("--config.", "--noconfig."))]
    overrides = [arg for arg in overrides if not arg.startswith("--config.workdir")]
    command = [sys.executable, "-m", "popi_jax.train", f"--config={name}:{','.join(kept)}"]
    command += [*overrides, f"--config.workdir={workdir}", "--noevaluate"]
    command += [f"--warm_start={warm_start}"] if warm_start else []
    print(f"{row}: {' '.join(command[1:])}", file=sys.stderr, flush=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        raise UserError(f"row {row}: its training ended with status {status}; see above")


if __name__ == "__main__":
    cli.run(
        main,
        description=__doc__,
        example="python -m popi_jax.compare --config=prism --rows=popi,raw_context,population",
    )
