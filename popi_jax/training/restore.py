"""The models of a run, read from its checkpoints, for all that uses a run."""

from typing import NamedTuple

from popi_jax.arrays import Frozen, Params, TrainState
from popi_jax.checkpoints import manager
from popi_jax.errors import UserError
from popi_jax.models.transformer import join_adapters
from popi_jax.run import Roles, Run
from popi_jax.training import reference, setup


class Restored(NamedTuple):
    """What a checkpoint holds of both roles, and the models that the main stage started from."""

    step: int
    inference: Params
    generator: Params
    frozen: Frozen


def restore_role(run: Roles | Run, role: str, step: int | None = None) -> tuple[int, Params]:
    """Returns (step, whole model) of one role, laid out on the mesh; no step: the newest readable.

    It is the average of the parameters where the run keeps one; adapters are joined with their
    base. Raises: UserError when it cannot be read."""
    adapted = setup.adapter_scale(getattr(run.config, role))
    base = reference.read_base(run.config, run.inference.model, run.mesh) if adapted else {}
    return _restore_whole(run, role, step, base, _get_shapes(run))


def restore_run(run: Run, step: int | None = None) -> Restored:
    """Returns both roles at a step; None: the newest readable.

    Raises: UserError when it cannot be read, or the run has not reached its main stage."""
    workdir = run.config.workdir
    base = reference.read_base(run.config, run.inference.model, run.mesh)
    shapes = _get_shapes(run)
    frozen = _restore_start(run, base, shapes)
    found, inference = _restore_whole(run, "inference", step, base, shapes)
    other, generator = _restore_whole(run, "generator", step, base, shapes)
    if found != other:
        raise UserError(
            f'config.workdir: in "{workdir}" the newest readable checkpoint of one model is of '
            f"step {found}, of the other {other}; try again if the run is being trained, else "
            f"name one with --step, or continue the training"
        )
    return Restored(found, inference, generator, frozen)


def restore_start(run: Roles | Run, base: Params) -> Frozen:
    """Both models at the start of the main stage. base: what `reference.read_base` returns.

    Raises: UserError as `restore_run`."""
    return _restore_start(run, base, _get_shapes(run))


def _restore_start(run: Roles | Run, base: Params, shapes: TrainState) -> Frozen:
    config = run.config
    own = manager.restore_frozen(
        config.workdir,
        Frozen(
            {} if config.inference.lora.rank else shapes.inference.params,
            {} if config.generator.lora.rank else shapes.generator.params,
        ),
    )
    if own is None:
        raise UserError(
            f'config.workdir: the run in "{config.workdir}" is still in its warm-up; continue the '
            "training"
        )
    return reference.stand_on_base(own, base)


def _restore_whole(
    run: Roles | Run, role: str, step: int | None, base: Params, shapes: TrainState
) -> tuple[int, Params]:
    own = getattr(shapes, role).params
    found, params = manager.restore_params(run.config.workdir, role, own, step)
    scale = setup.adapter_scale(getattr(run.config, role))
    return found, join_adapters(base, params, scale=scale) if scale else params


def _get_shapes(run: Roles | Run) -> TrainState:
    roles = setup.plan_warmup_roles(run.config)  # the parameters have the same shapes in all stages
    return setup.abstract_state(run.inference.model, roles, run.mesh, run.config)
