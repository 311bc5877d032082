"""Compiles the update that `make train` would run for a TPU slice that need not be there, or for
this machine.

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
REPORT = flags.DEFINE_string("report", "", "also write the numbers to this file, as JSON")


def main(config: Config) -> None:
    from popi_jax.planning import target as targets

    if config.mesh.topology:
        targets.set_environment(os.environ, fast=not THOROUGH.value)
    from popi_jax.run import start_devices

    if not config.mesh.topology:
        start_devices(config)
    import jax

    from popi_jax.distributed import Herald
    from popi_jax.planning import report
    from popi_jax.planning.fits import DoesNotFit, fit
    from popi_jax.planning.plan import make_plan

    target = targets.open_target(config)
    plan = make_plan(config, target)
    # programs of JAX's cache may have lost the names that say which part of an update an
    # instruction belongs to
    jax.config.update("jax_enable_compilation_cache", False)
    print(f"compiling for {target.name} ...", file=sys.stderr, flush=True)
    herald = Herald()
    herald.keep("error: the compiler crashed, as told above; with --thorough it takes other ways")
    try:
        found = fit(plan, target)
        herald.withdraw()
    except DoesNotFit as failure:
        herald.withdraw()
        print(report.render_misfit(plan, target.name, failure))
        print(_suggestion(config, target, failure.available))
        sys.exit(1)
    print(report.render(plan, found))
    if REPORT.value:
        Path(REPORT.value).write_text(json.dumps(report.to_json(plan, found), indent=2) + "\n")
    if not all(check.holds for check in found.checks):
        sys.exit(1)


def _suggestion(config: Config, target: Any, available: float) -> str:
    from popi_jax.planning.fits import GIB, DoesNotFit, fit
    from popi_jax.planning.suggest import first_that_may_fit

    rules = cli.load_config("prism:scale=laptop").mesh.rules
    for change, plan, expected in first_that_may_fit(config, target, available, rules):
        if not SUGGEST.value:
            also = (
                f"\ntraining all parameters{_larger(config, available)}"
                if "lora" in change.flags()
                else ""
            )
            return (
                f"should fit, by an estimate of {expected / GIB:.1f} GiB: {change.flags()}{also}\n"
                "--suggest compiles such changes and prints the first that does fit"
            )
        print(f"trying {change.flags()}", file=sys.stderr, flush=True)
        try:
            found = fit(plan, target)
        except DoesNotFit as failure:
            print(f"  {failure}", file=sys.stderr)
            continue
        return f"fits, with {found.memory.total / GIB:.1f} GiB per device: {change.flags()}"
    return "no other microbatches, rematerialisation, mesh, users, nor adapters fit; it" + _larger(
        config, available
    )


def _larger(config: Config, available: float) -> str:
    """The next slice of the same chips that the configuration should fit."""
    from popi_jax.planning.suggest import estimated_bytes
    from popi_jax.planning.target import chips_of, open_target

    spec = flags.FLAGS.config
    name, _, options = spec.partition(":")
    kept = [option for option in options.split(",") if option and not option.startswith("scale=")]
    overrides = [
        arg
        for arg in sys.argv[1:]
        if arg.startswith("--config.") and not arg.startswith("--config.mesh.")
    ]
    kind, chips = config.mesh.topology.partition(":")[0], chips_of(config.mesh.topology)
    for scale in cli.list_scales(kind):
        larger = cli.load_config(f"{name}:{','.join([*kept, f'scale={scale}'])}", overrides)
        if chips_of(larger.mesh.topology) > chips:
            from popi_jax.planning.plan import make_plan

            if (expected := estimated_bytes(make_plan(larger, open_target(larger)))) < available:
                return f" should fit on SCALE={scale}, by an estimate of {expected / 2**30:.1f} GiB"
    return " needs chips with more memory"


if __name__ == "__main__":
    cli.run(main, description=__doc__)
