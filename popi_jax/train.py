"""Trains both models of POPI: warm-up (from random weights), then alternating updates; then
evaluates and reports.

The same command again continues a run that was stopped. Results lie in the work directory:
results.json, summaries.jsonl, metrics.jsonl, tensorboard/, checkpoints/."""

import sys

from popi_jax import cli
from popi_jax.config import Config, to_json


def main(config: Config) -> None:
    import jax
    from absl import logging

    from popi_jax import distributed
    from popi_jax.evals.render import evaluate_run
    from popi_jax.run import build
    from popi_jax.training.loop import NotFinite, Stopped, train, whole_models

    logging.set_verbosity(logging.INFO)
    built = build(config, to_json(config))
    logging.info(
        "%s: %d device(s), mesh %s", config.name, jax.device_count(), dict(built.mesh.shape)
    )
    try:
        trained = train(built)
    except Stopped as stopped:
        if distributed.is_main_process():
            print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal_number)
    except NotFinite as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(1)
    inference, generator = whole_models(trained, config)
    step = int(trained.state.step)
    evaluate_run(built, step=step, inference=inference, generator=generator, frozen=trained.frozen)


if __name__ == "__main__":
    cli.run(main, description=__doc__)
