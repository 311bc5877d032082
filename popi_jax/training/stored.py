"""Stored summaries: at the start of each phase "stored" the inference model, as it is then, writes
one of every training user, and the generator's updates of the phase read them.

They follow from the state at the start of the phase, and such a phase leaves the inference model as
it is. So a run that goes on inside one reads the file that keeps them, and writes it again where it
is gone."""

import dataclasses
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Array

from popi_jax import distributed, files
from popi_jax.arrays import Frozen, Params, StoredSummaries, Tokens, TrainState, UserBatch
from popi_jax.config import Config
from popi_jax.data.batches import make_eval_batches
from popi_jax.errors import UserError
from popi_jax.phases import parse_phases
from popi_jax.progress import Progress
from popi_jax.run import Run
from popi_jax.sharding import place_whole, replicated
from popi_jax.training import choices

STORES = 2**32 - 2  # folded into the key of stored summaries, as no step is


class Segment(NamedTuple):
    """Updates of the main stage up to the step `end`; written: the step at which the summaries that
    they read are written, None where they read none."""

    end: int
    written: int | None


def list_segments(config: Config, step: int) -> list[Segment]:
    """What is left of the main stage behind `step`: each phase "stored", and what lies between."""
    found, end = list[Segment](), config.warmup.steps
    for phase in parse_phases(config.schedule.phases):
        start, end = end, end + phase.steps
        written = start if phase.mode == "stored" else None
        if found and found[-1].written is written is None:
            found.pop()
        found.append(Segment(end, written))
    return [segment for segment in found if segment.end > step]


def add_empty(frozen: Frozen, run: Run) -> Frozen:
    """What updates read before the first summaries are written, of the shape that these have."""
    users, length = len(run.dataset.splits["train"]), run.config.data.summary_len
    tokens = Tokens(np.zeros((users, length), np.int32), np.zeros(users, np.int32))
    return frozen._replace(summaries=_place(tokens, np.zeros(users, bool), run))


def add_summaries(
    frozen: Frozen, run: Run, state: TrainState, *, written: int, step: int
) -> Frozen:
    """With the summaries of the phase that began at the step `written`, for a run at `step`."""
    path = epath.Path(run.config.workdir) / "summaries" / f"train-{written}.jsonl"
    if step > written and distributed.tell_all("there" if path.exists() else ""):
        found = read_summaries(path, run)
    else:  # at its start a file may be of another attempt
        found = write_summaries(path, run, state, frozen, written)
    return frozen._replace(summaries=found)


def write_summaries(
    path: epath.Path, run: Run, state: TrainState, frozen: Frozen, written: int
) -> StoredSummaries:
    """Samples a summary of each training user at `inference.temperature`, behind all of the signals
    that `data.signals` shows; process 0 keeps them as lines {"user", "summary", "tokens",
    "finished", "ids"}, without end tokens.

    The key of a summary is folded from the step and the number of its user: neither the mesh nor
    the batches matter."""
    cfg, users, role = run.config, run.users.ids, run.inference
    made = choices.plan_run(run)
    sampler = dataclasses.replace(made.sampler, microbatches=1, budgets=None)
    policy = made.plan.inference.role

    def write(params: Params, base: Params, batch: UserBatch, key: Array, number: Array) -> Any:
        own = jax.random.fold_in(jax.random.fold_in(key, STORES), number)
        drawn = sampler.sample(policy.join_policy(params, base), batch, own, 1)
        return jax.tree.map(lambda x: x[:, 0], (drawn.summaries, drawn.finished))

    program = jax.jit(write, out_shardings=replicated(run.mesh))
    of = (state.inference.params, frozen.inference)
    ids, found = list[str](), list[Any]()
    count, shown = -(-len(users) // cfg.evaluation.batch_users), distributed.is_main_process()
    with Progress(count, label="summaries", enabled=shown) as progress:
        for number, batch in enumerate(make_eval_batches(users, role.tokenizer.pad_id, cfg)):
            placed = place_whole(batch.batch, run.mesh, role.model.rules)
            found.append(jax.device_get(program(*of, placed, state.key, jnp.int32(written))))
            ids += batch.user_ids
            progress.update(number + 1)
    tokens, finished = jax.tree.map(lambda *x: np.concatenate(x)[: len(users)], *found)
    lengths = tokens.lengths - finished
    logging.info(
        "The inference model of step %d has written summaries of %d training users: %.1f of %d "
        "tokens on average, %.1f %% of them ended by themselves: %s",
        *(written, len(users), lengths.mean(), cfg.data.summary_len),
        *(100 * finished.mean(), path),
    )
    if shown:
        texts = [row[:n].tolist() for row, n in zip(tokens.ids, lengths, strict=True)]
        rows = [
            {
                "user": user,
                "summary": role.tokenizer.decode(text).strip(),
                "tokens": len(text),
                "finished": bool(ended),
                "ids": text,
            }
            for user, text, ended in zip(ids[: len(users)], texts, finished, strict=True)
        ]
        files.write_jsonl(path, rows)
    return _place(tokens, finished, run)


def read_summaries(path: epath.Path, run: Run) -> StoredSummaries:
    """Those that `write_summaries` has kept.

    Raises: UserError where the file does not hold them."""
    users, length = len(run.dataset.splits["train"]), run.config.data.summary_len
    try:
        # not by splitlines, which also splits at characters that a summary may have
        rows = [json.loads(line) for line in path.read_text().split("\n") if line]
        texts, finished = [row["ids"] for row in rows], np.array([row["finished"] for row in rows])
    except (OSError, ValueError, KeyError, TypeError) as e:
        rows, texts, finished = [], [], np.zeros(0, bool)
        logging.error("%s: %s", path, e)
    if len(rows) != users or any(len(text) > length for text in texts):
        raise UserError(
            f'config.workdir: "{path}" does not hold the summaries of the {users} training users; '
            "delete it, and they are written again"
        )
    ids = np.full((users, length), run.inference.sampling.end_id, np.int32)  # as they are sampled
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    lengths = np.array([len(text) for text in texts], np.int32) + finished.astype(np.int32)
    return _place(Tokens(ids, lengths), finished, run)


def _place(tokens: Tokens, finished: np.ndarray, run: Run) -> StoredSummaries:
    """On every device, whole: always laid out the same, so that the update is compiled once."""

    def place(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, replicated(run.mesh), lambda at: x[at])

    return jax.tree.map(place, StoredSummaries(tokens, finished))
