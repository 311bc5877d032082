"""A run that goes on with more updates than it was begun with (`schedule.phases`): what of its
state depends on how many updates there are, and what that does to the learning rates."""

import jax
from absl import logging

from popi_jax.arrays import TrainState
from popi_jax.checkpoints import manager
from popi_jax.config import Config
from popi_jax.phases import parse_phases
from popi_jax.popi.plan import Kind, UpdatePlan
from popi_jax.run import Run
from popi_jax.training import optim, setup


def read_kinds(config: Config, step: int) -> tuple[Kind, ...]:
    """Those of the updates that were planned when a step of the run was saved."""
    stored = manager.read_config(config.workdir, step)
    phases = tuple(stored["schedule"]["phases"]) if stored else config.schedule.phases
    return setup.plan_kinds(parse_phases(phases))


def find_shape(run: Run, kinds: tuple[Kind, ...], step: int, abstract: TrainState) -> TrainState:
    """Shapes and layouts of a step of the main stage that was saved: a role that no update was to
    train then has no optimizer. `abstract` is what they are with updates of `kinds`."""
    before = read_kinds(run.config, step)
    if before == kinds:
        return abstract
    roles = setup.plan_main_roles(run.config, before)
    return setup.abstract_state(run.inference.model, roles, run.mesh, run.config)


def go_on(
    run: Run, plan: UpdatePlan, step: int, state: TrainState, abstract: TrainState
) -> tuple[TrainState, bool]:
    """Returns the restored state of a step of the main stage as the updates of the plan need it
    (`abstract`), and whether a role is trained that was not to be trained before: its optimizer is
    new."""
    before, done = read_kinds(run.config, step), step - run.config.warmup.steps
    if before == plan.kinds:
        return state, False
    logging.info(
        "The run goes on from %d to %d updates. From here on learning rates are those of the "
        "longer schedule: %s",
        *(len(before), len(plan.kinds), describe_rates(run.config, before, plan.kinds, done)),
    )
    begins = False
    for role in manager.ROLES:
        own, shape = getattr(state, role), getattr(abstract, role)
        if jax.tree.structure(own.opt_state) != jax.tree.structure(shape.opt_state):
            layout = setup.get_shardings(shape.opt_state)
            start = jax.jit(getattr(plan, role).role.tx.init, out_shardings=layout)
            state = state._replace(**{role: own._replace(opt_state=start(own.params))})
            begins = True
    return state, begins


def describe_rates(
    config: Config, before: tuple[Kind, ...], now: tuple[Kind, ...], done: int
) -> str:
    """The learning rate of the next update of each role by the shorter and the longer schedule,
    like "inference 2e-07 -> 6e-07"; done: updates of the main stage."""

    def find_rate(kinds: tuple[Kind, ...], role: str) -> str:
        own, times = getattr(config, role), 1
        if role == "inference":
            times = config.inference.updates_per_rollout
        total, count = (
            times * sum(getattr(kind, role) for kind in some) for some in (kinds, now[:done])
        )
        rates = optim.learning_rates(
            config.optimizer, own.learning_rate, own.lr_warmup_steps, total
        )
        return f"{float(rates(count)):.3g}" if total else "none"

    return ", ".join(
        f"{role} {find_rate(before, role)} -> {find_rate(now, role)}" for role in manager.ROLES
    )
