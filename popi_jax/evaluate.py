"""Scores a checkpoint of a run on its test users, writes results.json and prints the table.

The results of each step are kept in the folder results/ of the WORKDIR."""

from absl import flags

from popi_jax import cli
from popi_jax.config import Config

_SPLIT = flags.DEFINE_enum("split", "test", ["test", "validation"], "users to score")
_STEP = flags.DEFINE_integer("step", None, "checkpoint to score; default: the newest")


def main(config: Config) -> None:
    from popi_jax.evals.results import evaluate_run
    from popi_jax.run import open_run
    from popi_jax.training.restore import restore_run

    run = open_run(config, must_exist=True)
    evaluate_run(run, **restore_run(run, _STEP.value)._asdict(), split=_SPLIT.value)


if __name__ == "__main__":
    cli.run(
        main,
        description=__doc__,
        example="python -m popi_jax.evaluate --config=prism --split=validation "
        "--config.evaluation.max_users=100",
    )
