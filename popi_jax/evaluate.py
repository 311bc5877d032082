"""Scores the newest checkpoint of a run on its test users and prints the table; results.json is
written anew."""

from absl import flags

from popi_jax import cli
from popi_jax.config import Config

_SPLIT = flags.DEFINE_enum("split", "test", ["test", "validation"], "users to score")


def main(config: Config) -> None:
    from popi_jax.evals.render import evaluate_run
    from popi_jax.finished_run import open_run, restore_run

    built = open_run(config)
    evaluate_run(built, **restore_run(built)._asdict(), split=_SPLIT.value)


if __name__ == "__main__":
    cli.run(
        main,
        description=__doc__,
        example="python -m popi_jax.evaluate --config=prism --split=validation --config.evaluation.max_users=100",
    )
