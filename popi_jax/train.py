"""Trains both models of POPI: warm-up (from random weights), then alternating updates; then
evaluates and reports.

The same command again continues a run that was stopped. Results lie in the work directory:
results.json, results.md, summaries.jsonl, results/, metrics.jsonl, tensorboard/, checkpoints/."""

import sys

from absl import flags

from popi_jax import cli
from popi_jax.config import Config

_WARM_START = cli.define_path(
    "warm_start", "", "WORKDIR of a run with the same warm-up, which a new run takes over"
)
_EVALUATE = flags.DEFINE_bool("evaluate", True, "score the test users at the end")


def main(config: Config) -> None:
    import jax
    from absl import logging

    from popi_jax import distributed
    from popi_jax.evals.results import evaluate_run
    from popi_jax.run import open_run
    from popi_jax.training import loop, stage

    logging.set_verbosity(logging.INFO)
    run = open_run(config)
    mesh = dict(run.mesh.shape)
    logging.info("%s: %d device(s), mesh %s", config.name, jax.device_count(), mesh)
    try:
        trained = loop.train(run, warm_start=_WARM_START.value)
    except stage.Stopped as stopped:
        if distributed.is_main_process():
            print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal_number)
    except stage.NotFinite as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(1)
    if not _EVALUATE.value:
        return
    inference, generator = loop.use_models(trained, config)
    step = int(trained.state.step)
    evaluate_run(run, step=step, inference=inference, generator=generator, frozen=trained.frozen)


if __name__ == "__main__":
    cli.run(main, description=__doc__)
