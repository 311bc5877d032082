"""Opens the run of a work directory for use: its configuration, data and models; writes summaries
and answers."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from popi_jax.arrays import Params, Rollouts, Tokens
from popi_jax.checkpoints import manager
from popi_jax.config import Config, to_json
from popi_jax.data import prompts
from popi_jax.data.batches import make_eval_batches
from popi_jax.data.measure import fit_lengths
from popi_jax.data.records import User
from popi_jax.errors import UserError
from popi_jax.evals.cells import place, summarize, summarizer
from popi_jax.models.decode import sample, sample_keys
from popi_jax.models.sampling import Sampling
from popi_jax.progress import Progress
from popi_jax.run import Built, build
from popi_jax.sharding import replicated, shards
from popi_jax.training.loop import lora_base, make_parts, stored_frozen, trains_adapters
from popi_jax.training.state import Frozen, TrainState, abstract_state, policy


class Restored(NamedTuple):
    """What the newest checkpoint holds of both roles, and the models that the main stage started
    from."""

    step: int
    inference: Params
    generator: Params
    frozen: Frozen


def open_run(config: Config) -> Built:
    """Builds everything but the parameters; nothing in the workdir is changed.

    Raises: UserError when the workdir holds no run, or one with other settings or other data.
    """
    if manager.stored_config(config.workdir) is None:
        raise UserError(
            f'config.workdir: no run in "{config.workdir}"; train first, or give the WORKDIR of a run'
        )
    return build(config, to_json(config))


def restore_role(built: Built, role: str) -> tuple[int, Params]:
    """(step, whole model) of one role from the newest checkpoint, laid out on the mesh.

    It is the average of the parameters where the run keeps one; adapters are joined with their
    base. Raises: UserError when none can be read."""
    return _restore_role(
        built, role, lora_base(built) if trains_adapters(built.config, role) else {}
    )


def restore_run(built: Built) -> Restored:
    """Raises: UserError when the checkpoint cannot be read, or the run has not reached its main
    stage."""
    base = lora_base(built)
    frozen = stored_frozen(built, _abstract(built), base)
    if frozen is None:
        raise UserError(
            f'config.workdir: the run in "{built.config.workdir}" is still in its warm-up; continue the training'
        )
    step, inference = _restore_role(built, "inference", base)
    other_step, generator = _restore_role(built, "generator", base)
    if step != other_step:
        raise UserError(
            f'config.workdir: in "{built.config.workdir}" the newest readable checkpoint of one model is of step '
            f"{step}, of the other {other_step}; try again if the run is being trained, else continue the training"
        )
    return Restored(step, inference, generator, frozen)


def _restore_role(built: Built, role: str, base: Params) -> tuple[int, Params]:
    shapes = getattr(_abstract(built), role).params
    step, params = manager.restore_params(built.config.workdir, role, shapes)
    return step, policy(params, base, getattr(built.config, role))


def summaries_of(
    users: Sequence[User], built: Built, params: Params, *, lengths: Config, temperature: float
) -> list[dict[str, Any]]:
    """One {"user_id", "summary", "tokens"} per user; `lengths` is the configuration with the limits
    as they were given.

    The padded lengths of the run fit its training users, so they are fitted anew to these users.
    """
    words = built.tokenizer
    users = [dataclasses.replace(user, pairs=(), readings=()) for user in users]
    fitted, cut = fit_lengths(users, words, lengths)
    if cut.contexts:
        logging.warning(
            "The signals of %d of %d users were too long and shortened (data.context_len = %d).",
            *(cut.contexts, cut.users, lengths.data.context_len),
        )
    config = dataclasses.replace(
        lengths, data=dataclasses.replace(lengths.data, num_pairs=1, **fitted)
    )
    placed = [
        place(batch.batch, built.mesh, built.model.rules)
        for batch in make_eval_batches(users, words, config)
    ]
    sampling = built.sampling._replace(temperature=temperature)
    program = summarizer(
        model=built.model, glue=built.glue, sampling=sampling, seed=config.seed, mesh=built.mesh
    )
    with Progress(len(placed), label="summaries", enabled=jax.process_index() == 0) as progress:
        done = iter(range(1, len(placed) + 1))
        texts = summarize(program, params, placed, len(users), lambda: progress.update(next(done)))
    return [
        {
            "user_id": user.user_id,
            "summary": words.decode(ids[:length]).strip(),
            "tokens": int(length),
        }
        for user, ids, length in zip(users, *texts, strict=True)
    ]


def answers(
    built: Built, params: Params, *, prompt: str, summary: str, sampling: Sampling, num: int
) -> list[str]:
    """`num` answers of the generator; one that reached `sampling.max_len` before its end is cut
    there."""
    words, rows = built.tokenizer, rows_of(built)

    def repeated(ids: list[int]) -> Tokens:
        tokens = Tokens(
            np.tile(np.array(ids, np.int32), (rows, 1)), np.full(rows, len(ids), np.int32)
        )
        return place(tokens, built.mesh, built.model.rules)

    context = repeated([*built.glue.generator_prefix, *words.encode(summary)])
    turn = repeated(
        prompts.render_generator_turn(words, [{"role": "user", "content": prompt.strip()}])
    )

    def program(params: Params, context: Tokens, turn: Tokens) -> Rollouts:
        keys = sample_keys(jax.random.key(built.config.seed), jnp.arange(rows), num)
        return sample(params, context, turn, keys, model=built.model, sampling=sampling)

    drawn = jax.device_get(
        jax.jit(program, out_shardings=replicated(built.mesh))(params, context, turn)
    )
    ids, lengths = drawn.summaries.ids[0], drawn.summaries.lengths[0]
    return [words.decode(row[:length]).strip() for row, length in zip(ids, lengths, strict=True)]


def rows_of(built: Built) -> int:
    """The least rows of a batch that divide over the mesh."""
    return math.lcm(
        *(shards(rules.batch) for rules in (built.model.rules, built.model.rollout_rules))
    )


def _abstract(built: Built) -> TrainState:
    return abstract_state(
        built.model, make_parts(built)[0].transforms, built.mesh, cfg=built.config
    )
