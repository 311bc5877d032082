"""The reference policies of a run: kept at the start of the main stage, read by all that continues
or uses the run."""

import jax
import jax.numpy as jnp
import numpy as np

from popi_jax.arrays import Frozen, PairLogps, Params, TrainState, UserBatch
from popi_jax.checkpoints import manager
from popi_jax.checkpoints.hf_io import read_params
from popi_jax.config import Config
from popi_jax.data.batches import make_eval_batches
from popi_jax.distributed import is_main_process
from popi_jax.errors import UserError
from popi_jax.models.transformer import TransformerConfig
from popi_jax.popi.plan import Reference, UpdatePlan
from popi_jax.popi.scorer import Scorer, repeat_ids
from popi_jax.progress import Progress
from popi_jax.run import Run
from popi_jax.sharding import place_whole, replicated
from popi_jax.training import setup


def read_base(config: Config, model: TransformerConfig, mesh: jax.sharding.Mesh) -> Params:
    """The weights that adapters stand on, in the compute type and laid out on the mesh; {} where no
    role has adapters.

    Raises: UserError when the checkpoint cannot be read."""
    if not (config.inference.lora.rank or config.generator.lora.rank):
        return {}
    shapes = setup.abstract_params(model, mesh, config.model.dtype)
    return read_params(config.model.checkpoint, model, shapes)


def keep_reference(run: Run, plan: UpdatePlan, state: TrainState, base: Params) -> Frozen:
    """Stores the models as they are now as the reference policies; returns what updates read.

    Raises: UserError if the disk is full."""
    own = setup.own_params(plan, state)

    def copy(tree: Frozen) -> Frozen:
        return jax.tree.map(jnp.copy, tree)

    # laid out as a run that continues reads it, so that the program is the same
    own = jax.jit(copy, out_shardings=setup.get_shardings(own))(own)
    frozen = stand_on_base(own, base)
    if plan.generator.reference is Reference.STORED:
        stored = score_training_pairs(frozen.generator, run)
        own, frozen = own._replace(stored=stored), frozen._replace(stored=stored)
    manager.save_frozen(run.config.workdir, own, run.config_json)
    # what training does not read is not kept in memory
    return frozen if setup.reads_frozen_generator(plan) else frozen._replace(generator={})


def restore_reference(workdir: str, shapes: Frozen, base: Params) -> Frozen:
    """The reference policies of a run, as `shapes` say which; stored summaries are no part of them.

    Raises: UserError where they are not there or cannot be read."""
    own = manager.restore_frozen(workdir, shapes._replace(summaries=None))
    if own is None:
        raise UserError(
            f'config.workdir: "{workdir}/reference" is gone, without which the run cannot '
            "continue; put it back, or start again in another WORKDIR"
        )
    return stand_on_base(own, base)


def stand_on_base(own: Frozen, base: Params) -> Frozen:
    """The reference of a role with adapters is their base."""
    return own._replace(inference=own.inference or base, generator=own.generator or base)


def score_training_pairs(params: Params, run: Run) -> PairLogps:
    """The generator's log-probs of all pairs of the training users behind no summary: [users x
    data.num_pairs]."""
    cfg, users, role = run.config, run.users.ids, run.generator
    size, scorer = cfg.evaluation.batch_users, Scorer(role.model)

    def score(params: Params, batch: UserBatch) -> PairLogps:
        nothing = repeat_ids(run.prompt_tokens.generator_prefix, (size, 1))
        return jax.tree.map(lambda x: x[:, 0], scorer.score_pairs(params, nothing, batch))

    program, found = jax.jit(score, out_shardings=replicated(run.mesh)), []
    count, shown = -(-len(users) // size), is_main_process()
    with Progress(count, label="reference", enabled=shown) as progress:
        for number, batch in enumerate(make_eval_batches(users, role.tokenizer.pad_id, cfg)):
            placed = place_whole(batch.batch, run.mesh, role.model.rules)
            found.append(jax.device_get(program(params, placed)))
            progress.update(number + 1)
    table = jax.tree.map(lambda *x: np.concatenate(x)[: len(users)].reshape(-1), *found)

    def place(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, replicated(run.mesh), lambda at: x[at])

    return jax.tree.map(place, table)
