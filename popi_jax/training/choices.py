"""What a run chooses for speed alone: what its backward passes compute again, and how many places
summaries get. Rounding depends on both, so they are kept in `<workdir>/chosen.json` and chosen
once: a run that continues on the same devices gives the same numbers."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from jaxtyping import Array

from popi_jax import distributed, files
from popi_jax.arrays import Frozen, TrainState
from popi_jax.checkpoints import manager
from popi_jax.data.batches import derive_data_seed, make_user_batches
from popi_jax.data.measure import Spread
from popi_jax.models.layout import count_shards
from popi_jax.popi.plan import Reference, UpdatePlan
from popi_jax.popi.update import popi_update
from popi_jax.run import Run
from popi_jax.sharding import place_batch
from popi_jax.training import places, setup
from popi_jax.training.places import MainUpdate
from popi_jax.training.remat import estimate_need

DRAWS = 2**32 - 1  # folded into the key of summaries that nothing is trained on, as no step is


class Start(NamedTuple):
    """Where the main stage begins or goes on."""

    state: TrainState
    frozen: Frozen


def plan_run(run: Run, summary_fill: float = 1.0) -> setup.UpdateSetup:
    """The updates of a run's main stage; summary_fill: as `plan_budgets` takes it. A run that was
    begun without stored log-probs goes on without, though it now has updates enough for them."""
    cfg, model, prompts = run.config, run.inference.model, run.prompt_tokens
    fill = run.measured.fill
    budgets = setup.plan_budgets(fill, prompts, model, cfg, summary_fill=summary_fill)
    num_users = len(run.dataset.splits["train"])
    made = setup.plan_update(
        cfg, model, prompts, run.inference.sampling, num_users=num_users, budgets=budgets
    )
    stores = made.plan.generator.reference is Reference.STORED
    holds = partial(manager.holds_reference, cfg.workdir)
    if stores and holds("config") and not holds("stored"):
        generator = dataclasses.replace(made.plan.generator, reference=Reference.PROMPT)
        made = made._replace(plan=dataclasses.replace(made.plan, generator=generator))
    return made


def jit_update(update: Callable[..., Any], abstract: TrainState) -> Any:
    """Donates the state; what an update returns is laid out as what it is given, so that it is
    compiled once."""
    layout = setup.get_shardings(abstract)
    return jax.jit(update, donate_argnums=(0,), out_shardings=(layout, None))


def describe_devices(mesh: jax.sharding.Mesh) -> str:
    return f"{mesh.size} {mesh.devices.flat[0].device_kind}"


def read(workdir: str, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What the run has chosen on such devices; {} where it has not."""
    path = epath.Path(workdir) / "chosen.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("devices") == describe_devices(mesh) else {}


def keep(run: Run, chosen: dict[str, Any]) -> dict[str, Any]:
    """Writes what `read` reads, and returns it."""
    chosen = {"devices": describe_devices(run.mesh)} | chosen
    if distributed.is_main_process():
        path = epath.Path(run.config.workdir) / "chosen.json"
        files.write_whole(path, json.dumps(chosen, indent=2) + "\n")
    return chosen


def settle_remat(
    run: Run, chosen: dict[str, Any], available: float, given: tuple[TrainState, Frozen]
) -> tuple[Run, dict[str, Any]]:
    """The run with what its backward passes compute again: what was chosen before, else what fits.

    available: bytes of a device. given: the shapes of what an update is given."""
    cfg, model = run.config, run.inference.model
    policy = chosen.get("remat", "")
    if not policy:
        need = estimate_need(cfg, model, run.prompt_tokens, given, available)
        policy = need.choose()
        logging.info("Rematerialisation: %s; %s", policy, need.describe(policy))
        chosen = keep(run, chosen | {"remat": policy})
    model = dataclasses.replace(model, remat=policy)
    inference, generator = (role._replace(model=model) for role in (run.inference, run.generator))
    return run._replace(inference=inference, generator=generator), chosen


def make_main_update(
    run: Run, at: Start, abstract: TrainState, step: int, chosen: dict[str, Any]
) -> MainUpdate:
    """The update of the main stage, behind `step`; where the configuration does not say how long
    summaries are, it follows them."""
    cfg, model = run.config, run.inference.model
    plan = plan_run(run).plan

    def make(fill: float) -> MainUpdate:
        return jit_update(partial(popi_update, **plan_run(run, fill)._asdict()), abstract)

    if cfg.batch.summary_fill or not places.trains_inference(plan):
        return make(cfg.batch.summary_fill or 1.0)
    shards = count_shards(model.rules.batch)
    users = max(cfg.batch.users // (shards * cfg.batch.microbatches), 1)

    def choose(summaries: Spread) -> int:
        return places.choose_parts(summaries, users, shards, cfg.data.summary_len)

    parts = chosen.get("summary_parts", 0)
    if not parts:
        found = draw_lengths(run, plan, at)
        parts = choose(found)
        logging.info(
            "The first summaries have %.1f of %d tokens: places for %d sixteenths",
            *(found.mean, cfg.data.summary_len, parts),
        )
        keep(run, chosen | {"summary_parts": parts})
    follow = partial(places.follow, choose=choose, batch_users=cfg.batch.users)
    follower = places.Follower(lambda parts: make(parts / places.PARTS), parts, follow)
    follower.catch_up(step, places.read_rows(cfg.workdir, cfg.warmup.steps + 1, step))
    return follower


def draw_lengths(run: Run, plan: UpdatePlan, at: Start) -> Spread:
    """How long the summaries of the first batches are, before the first update."""
    cfg, words = run.config, run.inference.tokenizer
    sampler, role = plan_run(run).sampler, plan.inference

    def draw(state: TrainState, frozen: Frozen, batch: Any, number: Array) -> Array:
        writer = role.role.join_policy(state.inference.params, frozen.inference)
        key = jax.random.fold_in(jax.random.fold_in(state.key, DRAWS), number)
        return sampler.sample(writer, batch, key, role.group_size).summaries.lengths

    place = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    seed = derive_data_seed(cfg.seed, "main")
    batches = make_user_batches(run.users, words, cfg, seed=seed, **place)
    program, rules = jax.jit(draw), run.inference.model.rules
    found = [
        program(
            at.state, at.frozen, place_batch(batches[number], run.mesh, rules), jnp.int32(number)
        )
        for number in range(places.BATCHES)
    ]
    return places.measure_lengths(found, run.mesh)
