"""Compiles the update that `make train` would run, or the programs of `make eval`, for a TPU slice
that need not be there, or for this machine.

Prints the memory of a device, the work of an update and the time it takes at the rates of the chip,
and checks the layout. What does not fit is an error with the change that would make it fit."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import flags

from popi_jax import cli
from popi_jax.config import Config

SUGGEST = flags.DEFINE_bool(
    "suggest", False, "when it does not fit, compile changes until one does"
)
THOROUGH = flags.DEFINE_bool(
    "thorough", False, "compile as for a run: three times as long, and times nearer to it"
)
PROGRAM = flags.DEFINE_enum(
    "program", "update", ["update", "evaluation"], "what is compiled: training, or make eval"
)
REPORT = cli.define_path("report", "", "also write the numbers to this file, as JSON")


def main(config: Config) -> None:
    from popi_jax.planning import target as targets

    if config.mesh.topology:
        targets.set_environment(os.environ, fast=not THOROUGH.value)
    from popi_jax.run import start_devices

    if not config.mesh.topology:
        start_devices(config)
    import jax

    from popi_jax.distributed import Herald
    from popi_jax.planning import evaluation, fit_report, fits, plan

    target = targets.open_target(config)
    planned = plan.make_plan(config, target)
    # programs of JAX's cache may have lost the names that say which scope of an update an
    # instruction belongs to
    jax.config.update("jax_enable_compilation_cache", False)
    print(f"compiling for {target.name} ...", file=sys.stderr, flush=True)
    herald = Herald()
    herald.keep("error: the compiler crashed, as told above; with --thorough it takes other ways")
    if PROGRAM.value == "evaluation":
        try:
            scored = evaluation.fit(planned, target)
        except fits.DoesNotFit as failure:
            herald.withdraw()
            print(evaluation.render_misfit(planned, target.name, failure))
            sys.exit(1)
        herald.withdraw()
        print(evaluation.render(scored))
        write_report(evaluation.to_json(scored))
        return
    try:
        found = fits.fit(planned, target)
        herald.withdraw()
    except fits.DoesNotFit as failure:
        herald.withdraw()
        print(fit_report.render_misfit(planned, target.name, failure))
        print(suggest_change(config, target, failure.available))
        sys.exit(1)
    print(fit_report.render(planned, found))
    write_report(fit_report.to_json(planned, found))
    if not all(check.holds for check in found.checks):
        sys.exit(1)


def write_report(numbers: dict[str, Any]) -> None:
    if REPORT.value:
        Path(REPORT.value).write_text(json.dumps(numbers, indent=2) + "\n")


def suggest_change(config: Config, target: Any, available: float) -> str:
    """The cheapest change that should fit; with --suggest the cheapest that does."""
    from popi_jax.planning import fits, suggest

    rules = cli.load_config("prism:scale=laptop").mesh.rules
    for change, planned, expected in suggest.find_fitting_changes(config, target, available, rules):
        change_flags = change.to_flags()
        if not SUGGEST.value:
            also = ""
            if "lora" in change_flags:
                also = f"\ntraining all parameters {suggest_larger_slice(config, available)}"
            return (
                f"should fit, by an estimate of {expected / fits.GIB:.1f} GiB: {change_flags}"
                f"{also}\n--suggest compiles such changes and prints the first that does fit"
            )
        print(f"trying {change_flags}", file=sys.stderr, flush=True)
        try:
            total = fits.fit(planned, target).memory.total
        except fits.DoesNotFit as failure:
            print(f"  {failure}", file=sys.stderr)
            continue
        return f"fits, with {total / fits.GIB:.1f} GiB per device: {change_flags}"
    return (
        "no other microbatches, rematerialisation, mesh, users, nor adapters fit; it "
        + suggest_larger_slice(config, available)
    )


def suggest_larger_slice(config: Config, available: float) -> str:
    """The next slice of the same chips that the configuration should fit."""
    from popi_jax.planning import plan, suggest, target

    name, _, options = flags.FLAGS.config.partition(":")
    kept = [option for option in options.split(",") if option and not option.startswith("scale=")]
    overrides = [
        arg
        for arg in sys.argv[1:]
        if arg.startswith("--config.") and not arg.startswith("--config.mesh.")
    ]
    topology = config.mesh.topology
    for scale in cli.list_scales(topology.partition(":")[0]):
        larger = cli.load_config(f"{name}:{','.join([*kept, f'scale={scale}'])}", overrides)
        if target.count_chips(larger.mesh.topology) <= target.count_chips(topology):
            continue
        planned = plan.make_plan(larger, target.open_target(larger))
        if (expected := suggest.estimate_bytes(planned)) < available:
            return f"should fit on SCALE={scale}, by an estimate of {expected / 2**30:.1f} GiB"
    return "needs chips with more memory"


if __name__ == "__main__":
    cli.run(main, description=__doc__)
