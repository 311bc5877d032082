"""The host loop: next batch, dispatch, log the previous step, save, resume. All numerics are in the
jitted programs."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from popi_jax import distributed
from popi_jax.arrays import Frozen, Params, TrainState
from popi_jax.checkpoints import manager as checkpoints
from popi_jax.checkpoints.hf_io import read_params
from popi_jax.config import Config, flatten_stored
from popi_jax.data.batches import derive_data_seed, iterate, make_user_batches
from popi_jax.data.warmup_batches import make_warmup_batches
from popi_jax.diagnostics.health import Facts
from popi_jax.diagnostics.probe import Probe, open_probe
from popi_jax.diagnostics.watch import Monitor
from popi_jax.errors import UserError
from popi_jax.metric_writer import MetricWriter
from popi_jax.models.transformer import join_adapters
from popi_jax.popi.plan import Kind, UpdatePlan
from popi_jax.popi.warmup_step import warmup_step
from popi_jax.run import Roles, Run
from popi_jax.training import choices, longer, reference, setup, stored
from popi_jax.training.remat import find_memory
from popi_jax.training.restore import restore_start
from popi_jax.training.stage import Host, run_stage

# settings that the warm-up depends on, by their beginnings, but for those that change nothing
_OF_WARMUP = ("seed", "data.", "model.", "warmup.", "dataset.")
_OF_PLACES = (
    *("data.path", "data.prepared", "data.download", "data.workers"),
    *("model.remat", "model.attention"),
)


class Trained(NamedTuple):
    state: TrainState
    frozen: Frozen


class StagedBatches:
    """The batches of both stages. Batch n of a stage follows from n alone, so that a checkpoint
    stores the step, and a run goes on from any of them at once, with any number of hosts and
    workers."""

    def __init__(self, warmup: Any, main: Any, warmup_steps: int, workers: int = 0) -> None:
        self._stages, self._warmup_steps, self._workers = (warmup, main), warmup_steps, workers
        self._step = 0
        # of the stage that goes on, opened at the first batch, so that setting a step costs nothing
        self._opened: tuple[int, contextlib.ExitStack, Iterator[Any]] | None = None

    def __iter__(self) -> "StagedBatches":
        return self

    def __next__(self) -> Any:
        stage = int(self._step >= self._warmup_steps)
        if self._opened is None or self._opened[0] != stage:
            self.close()
            start = self._step - stage * self._warmup_steps
            stack = contextlib.ExitStack()
            made = stack.enter_context(iterate(self._stages[stage], start, self._workers))
            self._opened = stage, stack, made
        batch = next(self._opened[2])
        self._step += 1
        return batch

    def skip_warmup(self) -> None:
        self._go_to(self._warmup_steps)

    def get_state(self) -> bytes:
        return json.dumps({"step": self._step}).encode()

    def set_state(self, state: bytes) -> None:
        """Also reads what former versions stored: positions of each stage beside the step."""
        self._go_to(json.loads(state)["step"])

    def close(self) -> None:
        """Ends the processes that make batches."""
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None

    def _go_to(self, step: int) -> None:
        self.close()
        self._step = step


def open_batches(run: Run) -> StagedBatches:
    cfg, users, words = run.config, run.users, run.inference.tokenizer
    place = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    seed = derive_data_seed(cfg.seed, "warmup")
    warmup = make_warmup_batches(users, words, cfg, seed=seed, items=run.summary_items, **place)
    seed = derive_data_seed(cfg.seed, "main")
    main = make_user_batches(users, words, cfg, seed=seed, **place)
    return StagedBatches(warmup, main, cfg.warmup.steps, cfg.data.workers)


def train(run: Run, *, warm_start: str = "") -> Trained:
    """Runs or continues both stages to their end.

    warm_start: the WORKDIR of a run with the same warm-up, whose models at the end of it a new run
    takes over.
    Raises:
      Stopped: on SIGINT or SIGTERM, after saving.
      NotFinite: when a metric is not finite.
      UserError: as the checkpoint manager does."""
    cfg, model, mesh = run.config, run.inference.model, run.mesh
    plan = choices.plan_run(run).plan
    available = find_memory()
    main_roles = setup.Roles(plan.inference.role, plan.generator.role)
    warmup_roles = setup.plan_warmup_roles(cfg)
    abstract = setup.abstract_state(model, main_roles, mesh, cfg)
    warmup_abstract = setup.abstract_state(model, warmup_roles, mesh, cfg)
    num_users = len(run.dataset.splits["train"])
    warmup_steps, last_step = cfg.warmup.steps, cfg.warmup.steps + len(plan.kinds)
    base = reference.read_base(cfg, model, mesh)
    manager = checkpoints.open_manager(cfg.workdir, cfg.schedule.keep, run.config_json)
    batches = open_batches(run)
    shape_at = partial(find_shape, run, plan.kinds, warmup_abstract, abstract)
    restored = checkpoints.restore_latest(manager, shape_at, batches)
    if restored is None:
        step, state = 0, make_first_state(run, warmup_roles if warmup_steps else main_roles)
        if warm_start and warmup_steps:
            step, state = warmup_steps, take_warmup(run, warm_start, state)
            batches.skip_warmup()
    else:
        step, state = restored
        logging.info("Continuing at step %d of %d in %s", step, last_step, cfg.workdir)
    chosen = choices.read(cfg.workdir, mesh) if step else {}
    if step > warmup_steps:
        state, begins = longer.go_on(run, plan, step, state, abstract)
        if begins:  # another optimizer needs memory
            chosen.pop("remat", "")
    if cfg.model.remat == "auto":
        shapes = setup.abstract_frozen(plan, abstract, mesh, cfg, num_users)
        run, chosen = choices.settle_remat(run, chosen, available, (abstract, shapes))
        model = run.inference.model
    stop = distributed.StopRequest()  # from here on: until then a signal ends the process at once
    with MetricWriter(cfg.workdir, enabled=distributed.is_main_process()) as writer:
        writer.resume(step)
        monitor = open_monitor(cfg, writer)
        save = partial(save_step, manager, batches, run.config_json)
        host = Host(cfg, mesh, model.rules, batches, writer, stop, save, monitor)
        try:
            if step < warmup_steps:
                budgets = setup.plan_warmup_budgets(run.measured.fill, model, cfg)
                role = warmup_roles.inference
                warm_up = partial(warmup_step, model=model, role=role, budgets=budgets)
                program = choices.jit_update(warm_up, warmup_abstract)
                step, state = run_stage(host, program, state, step, warmup_steps, "warm-up")
            if step > warmup_steps:
                shapes = setup.abstract_frozen(plan, abstract, mesh, cfg, num_users)
                frozen = reference.restore_reference(cfg.workdir, shapes, base)
            else:
                frozen = reference.keep_reference(run, plan, state, base)
                restart = partial(setup.restart_optimizers, roles=main_roles)
                layout = setup.get_shardings(abstract)
                state = jax.jit(restart, donate_argnums=0, out_shardings=layout)(state)
            if step < last_step:
                host = host._replace(probe=probe_run(run, plan, frozen, abstract, base))
                at = choices.Start(state, frozen)
                step, state = run_main_stage(run, host, at, abstract, step, chosen)
        finally:
            stop.close()
            monitor.close()
            batches.close()
            checkpoints.close(manager)
    if not setup.reads_frozen_generator(plan):  # but the evaluation does
        shapes = setup.own_params(plan, abstract)
        frozen = reference.restore_reference(cfg.workdir, shapes, base)
    return Trained(state, frozen)


def run_main_stage(
    run: Run, host: Host, at: choices.Start, abstract: TrainState, step: int, chosen: dict[str, Any]
) -> tuple[int, TrainState]:
    """The main stage from `step` to its end. It pauses where summaries are written, which the
    updates behind read, by one program for all."""
    state, frozen = at
    if choices.plan_run(run).plan.stores_summaries:
        frozen = stored.add_empty(frozen, run)
    update = choices.make_main_update(run, choices.Start(state, frozen), abstract, step, chosen)

    def run_segment(frozen: Frozen, state: TrainState, step: int, end: int) -> Any:
        program = lambda state, batch: update(state, frozen, batch)  # noqa: E731
        return run_stage(host, program, state, step, end, "popi")

    for end, written in stored.list_segments(run.config, step):
        if written is not None:
            frozen = stored.add_summaries(frozen, run, state, written=written, step=step)
        step, state = run_segment(frozen, state, step, end)
    return step, state


def find_shape(
    run: Run, kinds: tuple[Kind, ...], warmup: TrainState, main: TrainState, step: int
) -> TrainState:
    """What a checkpoint of `step` holds, from what the two stages end with."""
    if step <= run.config.warmup.steps:
        return warmup
    return longer.find_shape(run, kinds, step, main)


def tell_facts(cfg: Config) -> Facts:
    """What the warnings of a run need and name of its settings."""
    i, g = cfg.inference, cfg.generator
    return Facts(
        beta=1.0 if g.objective in ("orpo", "rrhf") else g.beta,
        per_token=g.length_normalised or g.objective in ("ipo", "simpo", "orpo", "rrhf"),
        kl_coef=i.kl_coef,
        temperature=i.temperature,
        learning_rate=i.learning_rate,
        generator_learning_rate=g.learning_rate,
        length_penalty=i.length_penalty,
        group_size=i.group_size,
        pairs=cfg.batch.pairs,
        users=cfg.batch.users,
        summary_len=cfg.data.summary_len,
        reward_generator=i.reward_generator,
    )


def open_monitor(cfg: Config, writer: MetricWriter) -> Monitor:
    """With what the run measured so far; the writer has resumed before."""
    monitor = Monitor(writer.folder, tell_facts(cfg), enabled=distributed.is_main_process())
    monitor.resume()
    return monitor


def make_first_state(run: Run, roles: setup.Roles) -> TrainState:
    """The state at step 0: random weights, those of a checkpoint, or adapters on them."""
    cfg, model, mesh = run.config, run.inference.model, run.mesh
    layout = setup.get_shardings(setup.abstract_state(model, roles, mesh, cfg))
    init = partial(setup.init_state, model=model, roles=roles, config=cfg)
    seed = jnp.int32(cfg.seed)
    if not cfg.model.checkpoint:
        return jax.jit(init, out_shardings=layout)(seed)

    def start(role: str) -> Params:
        if getattr(roles, role).adapter_scale:
            adapters = getattr(layout, role).params
            return jax.jit(lambda seed: getattr(init(seed), role).params, out_shardings=adapters)(
                seed
            )
        shapes = setup.abstract_params(model, mesh, "float32")
        return read_params(cfg.model.checkpoint, model, shapes)

    begin = jax.jit(
        partial(setup.new_state, roles=roles), out_shardings=layout, donate_argnums=(0, 1)
    )
    return begin(start("inference"), start("generator"), jax.random.key(cfg.seed))


def take_warmup(run: Run, other: str, state: TrainState) -> TrainState:
    """The state at the end of the warm-up of the run in the workdir `other`.

    Raises: UserError where that run had another warm-up, or has not ended it."""
    stored = checkpoints.read_config(other)
    if stored is None:
        raise UserError(f'--warm_start: no run in "{other}"')
    ours, theirs = map(_flatten_warmup, (json.loads(run.config_json), stored))
    for name in sorted(ours.keys() | theirs.keys()):
        if not name.startswith(_OF_WARMUP) or name in _OF_PLACES:
            continue
        if ours.get(name) != theirs.get(name):
            told = f'"{other}" had {name} = {theirs.get(name)!r}, this run {ours.get(name)!r}'
            raise UserError(f"--warm_start: {told}; their warm-ups differ")
    there = Roles(
        dataclasses.replace(run.config, workdir=other), run.mesh, run.inference, run.generator
    )
    found = restore_start(there, {})
    inference = state.inference._replace(params=found.inference)
    generator = state.generator._replace(params=found.generator)
    step = jnp.int32(run.config.warmup.steps)
    return state._replace(inference=inference, generator=generator, step=step)


def _flatten_warmup(stored: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, with those that stand for another as that."""
    flat = flatten_stored(stored)
    flat["warmup.generator_pairs"] = flat.get("warmup.generator_pairs") or flat["batch.pairs"]
    return flat


def probe_run(
    run: Run, plan: UpdatePlan, frozen: Frozen, abstract: TrainState, base: Params
) -> Probe | None:
    """What looks at validation users in the main stage. abstract: shapes of its state; base: as
    `reference.read_base` returns it."""

    def read_start() -> Params:
        if frozen.generator:
            return frozen.generator
        own = Frozen({}, setup.own_params(plan, abstract).generator)
        return reference.restore_reference(run.config.workdir, own, base).generator

    join = lambda state: use_models(Trained(state, frozen), run.config)  # noqa: E731
    return open_probe(run, plan, join, read_start)


def use_models(trained: Trained, config: Config) -> tuple[Params, Params]:
    """(inference, generator) as they are to be used: the averages where the run keeps them,
    adapters on their base."""
    whole = []
    for name in checkpoints.ROLES:
        role, frozen = getattr(trained.state, name), getattr(trained.frozen, name)
        params = role.params if role.ema is None else role.ema
        scale = setup.adapter_scale(getattr(config, name))
        whole.append(join_adapters(frozen, params, scale=scale) if scale else params)
    return whole[0], whole[1]


def save_step(
    manager: Any, batches: StagedBatches, config_json: str, step: int, state: TrainState
) -> None:
    checkpoints.save(manager, step, state, batches, config_json)
