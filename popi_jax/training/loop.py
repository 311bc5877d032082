"""The host loop: next batch, dispatch, log the previous step, save, resume. All numerics are in the
jitted programs."""

import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from popi_jax import distributed
from popi_jax.arrays import Metrics, Params, UserBatch
from popi_jax.checkpoints import manager as checkpoints
from popi_jax.checkpoints.hf_io import read_params
from popi_jax.config import Config
from popi_jax.config_check import parse_phases
from popi_jax.data import batches
from popi_jax.data import fill as fills
from popi_jax.errors import UserError
from popi_jax.evals import cells
from popi_jax.losses.preference import PairLogps
from popi_jax.metric_writer import MetricWriter
from popi_jax.models.sampling import Sampling
from popi_jax.models.transformer import TransformerConfig
from popi_jax.objectives import preference_objective
from popi_jax.popi.roles import Glue, empty_summary, pair_logps
from popi_jax.popi.steps import warmup_step
from popi_jax.popi.update import Parts, popi_update, role_turns
from popi_jax.progress import Progress
from popi_jax.run import Built
from popi_jax.sharding import place_batch, replicated, shards
from popi_jax.training import optim
from popi_jax.training.budgets import main_budgets, warmup_budgets
from popi_jax.training.state import (
    Frozen,
    RoleState,
    TrainState,
    Transforms,
    abstract_params,
    abstract_state,
    init_state,
    new_state,
    policy,
    restart_optimizers,
    shardings_of,
)

SHOWN = {
    "warmup/generator_nll": "generator nll",
    "warmup/summary_nll": "summary nll",
    "warmup/reading_nll": "reading nll",
    "generator/loss": "loss",
    "inference/reward": "reward",
    "inference/accuracy": "accuracy",
}  # metric -> its name beside the progress bar


class Stopped(Exception):
    """The run was asked to stop and has saved; the same command continues it."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(
            f"stopped by signal {signal_number}; saved at step {step}: the same command continues"
        )
        self.signal_number = signal_number


class NotFinite(Exception):
    """A metric became infinite or not a number; nothing was saved after it."""


class Trained(NamedTuple):
    state: TrainState
    frozen: Frozen


class StagedBatches:
    """The batches of both stages behind one position, which a checkpoint stores."""

    def __init__(self, warmup: Any, main: Any, warmup_steps: int) -> None:
        self._warmup, self._main = iter(warmup), iter(main)
        self._warmup_steps, self._step = warmup_steps, 0

    def __iter__(self) -> "StagedBatches":
        return self

    def __next__(self) -> Any:
        source = self._warmup if self._step < self._warmup_steps else self._main
        batch = next(source)
        self._step += 1
        return batch

    def get_state(self) -> bytes:
        states = {
            "step": self._step,
            "warmup": self._warmup.get_state(),
            "main": self._main.get_state(),
        }
        return json.dumps(states).encode()

    def set_state(self, state: bytes) -> None:
        states = json.loads(state)
        self._step = states["step"]
        self._warmup.set_state(states["warmup"])
        self._main.set_state(states["main"])


def open_batches(built: Built) -> StagedBatches:
    cfg, users = built.config, built.dataset.splits["train"]
    place = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    warmup = batches.warmup_batches(
        users, built.tokenizer, cfg, seed=cfg.seed, items=_items(built), **place
    )
    main = batches.user_batches(users, built.tokenizer, cfg, seed=cfg.seed + 1, **place)
    return StagedBatches(warmup, main, cfg.warmup.steps)


def _items(built: Built) -> tuple[str, ...]:
    made = built.dataset.data == "sample"  # only there are oracles lists of items, not free text
    return (
        batches.summary_items(built.dataset.splits["train"])
        if built.config.warmup.steps and made
        else ()
    )


def open_fill(built: Built) -> fills.Fill:
    """How many tokens the users of the run have: measured once, and kept beside the tokenizer."""
    path = epath.Path(built.config.workdir) / "tokenizer" / "fill.json"
    if path.exists() and checkpoints.stored_config(
        built.config.workdir
    ):  # else it may be of other settings
        return fills.from_json(json.loads(path.read_text()))
    fill = fills.measured_fill(
        built.dataset.splits["train"], built.tokenizer, built.config, items=_items(built)
    )
    if distributed.is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(fills.to_json(fill)))
    return fill


def make_parts(built: Built, fill: fills.Fill | None = None) -> tuple[Parts, Transforms]:
    """The static parts of the main stage, and the optimizers of the warm-up."""
    return static_parts(built.config, built.model, built.glue, built.sampling, fill)


def static_parts(
    config: Config,
    model: TransformerConfig,
    glue: Glue,
    sampling: Sampling,
    fill: fills.Fill | None,
) -> tuple[Parts, Transforms]:
    """`make_parts` of a run that need not exist."""
    cfg = config
    turns = role_turns(parse_phases(cfg.schedule.phases)).sum(axis=0)
    main = Transforms(
        optim.inference_transform(cfg, int(turns[0])), optim.generator_transform(cfg, int(turns[1]))
    )
    warmup = optim.warmup_transform(cfg)
    budgets = None
    if fill is not None:
        budgets = main_budgets(
            fill, glue, shards(model.rules.batch), shards(model.rollout_rules.batch), cfg=cfg
        )
    parts = Parts(model, main, glue, sampling, cfg, cfg.warmup.steps, budgets)
    return parts, Transforms(warmup, warmup)


def train(built: Built) -> Trained:
    """Runs or continues both stages to their end.

    Raises:
      Stopped: on SIGINT or SIGTERM, after saving.
      NotFinite: when a metric is not finite.
      UserError: as the checkpoint manager does.
    """
    cfg, num_users = built.config, len(built.dataset.splits["train"])
    fill = open_fill(built)
    parts, warmup_transforms = make_parts(built, fill)
    phases = parse_phases(cfg.schedule.phases)
    warmup_steps, last_step = (
        cfg.warmup.steps,
        cfg.warmup.steps + sum(phase.steps for phase in phases),
    )
    base = lora_base(built)
    budgets_of_warmup = warmup_budgets(fill, shards(built.model.rules.batch), cfg=cfg)
    manager = checkpoints.open_manager(cfg.workdir, cfg.schedule.keep, built.config_json)
    abstract = abstract_state(built.model, parts.transforms, built.mesh, cfg=cfg)
    # the layout of what an update returns is that of what it is given, so that it is compiled once
    updating: Any = {"donate_argnums": (0,), "out_shardings": (shardings_of(abstract), None)}
    warmup_update = partial(
        warmup_step, model=built.model, transforms=warmup_transforms, budgets=budgets_of_warmup
    )
    warmup = jax.jit(warmup_update, **updating)
    main_update = partial(popi_update, parts=parts, phases=phases)
    main = jax.jit(main_update, **updating)

    batches = open_batches(built)
    restored = checkpoints.restore_latest(manager, abstract, batches)
    if restored is None:
        transforms = warmup_transforms if warmup_steps else parts.transforms
        step, state = 0, _first_state(built, transforms, abstract)
    else:
        step, state = restored
        logging.info("Continuing at step %d of %d in %s", step, last_step, cfg.workdir)

    stop = distributed.StopRequest()
    with MetricWriter(cfg.workdir, enabled=distributed.is_main_process()) as writer:
        writer.resume(step)
        save = partial(_save, manager, batches, built.config_json)
        loop = partial(_run, built=built, batches=batches, writer=writer, stop=stop, save=save)
        try:
            if step < warmup_steps:
                step, state = loop(warmup, state, step, warmup_steps, label="warm-up")
            if step > warmup_steps:
                frozen = _still_there(stored_frozen(built, abstract, base, for_training=True), cfg)
            else:
                copies = {
                    r: {} if trains_adapters(cfg, r) else getattr(state, r).params
                    for r in checkpoints.ROLES
                }
                own = Frozen(
                    **copies
                )  # laid out as a run that continues reads it, so that the program is the same
                own = jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=shardings_of(own))(own)
                frozen = _on_base(own, base)
                pairs = (
                    reference_pairs(frozen.generator, built)
                    if stores_pairs(cfg, num_users)
                    else None
                )
                checkpoints.save_frozen(cfg.workdir, own._replace(pairs=pairs), built.config_json)
                frozen = frozen._replace(
                    pairs=pairs,
                    generator=frozen.generator if reads_generator(cfg, num_users) else {},
                )
                del own, copies  # what training does not read is not kept in memory
                restart = partial(restart_optimizers, transforms=parts.transforms, cfg=parts.cfg)
                state = jax.jit(restart, donate_argnums=0, out_shardings=shardings_of(abstract))(
                    state
                )
            if step < last_step:
                update = lambda state, batch: main(state, frozen, batch)  # noqa: E731
                step, state = loop(update, state, step, last_step, label="popi")
        finally:
            stop.close()
            checkpoints.close(manager)
    if not reads_generator(cfg, num_users):
        frozen = _still_there(stored_frozen(built, abstract, base), cfg)
    return Trained(state, frozen)


def whole_models(trained: Trained, cfg: Config) -> tuple[Params, Params]:
    """(inference, generator) as they are to be used: the averages where the run keeps them,
    adapters on their base."""

    def whole(role: str) -> Params:
        state: RoleState = getattr(trained.state, role)
        params = state.params if state.ema is None else state.ema
        return policy(params, getattr(trained.frozen, role), getattr(cfg, role))

    return whole("inference"), whole("generator")


def trains_adapters(cfg: Config, role: str) -> bool:
    return getattr(cfg, role).lora.rank > 0


def lora_base(built: Built) -> Params:
    """The weights that adapters stand on, in the compute type and laid out on the mesh; {} when no
    role has adapters.

    Raises: UserError when the checkpoint cannot be read.
    """
    cfg = built.config
    if not any(trains_adapters(cfg, role) for role in checkpoints.ROLES):
        return {}
    return read_params(
        cfg.model.checkpoint, built.model, abstract_params(built.model, built.mesh, cfg.model.dtype)
    )


def stored_frozen(
    built: Built, abstract: TrainState, base: Params, *, for_training: bool = False
) -> Frozen | None:
    """The reference policies of a run; None while it is in its warm-up. `for_training`: as updates
    read them.

    Raises: UserError.
    """
    if for_training:
        shapes = abstract_frozen(
            built.config, abstract, built.mesh, len(built.dataset.splits["train"])
        )
    else:
        shapes = _own_params(built.config, abstract)
    own = checkpoints.restore_frozen(built.config.workdir, shapes)
    return None if own is None else _on_base(own, base)


def abstract_frozen(cfg: Config, abstract: TrainState, mesh: Mesh, num_users: int) -> Frozen:
    """Shapes and shardings of what updates read of the reference policies, all but the base under
    adapters."""
    own = _own_params(cfg, abstract)
    if not reads_generator(cfg, num_users):
        own = own._replace(generator={})
    if not stores_pairs(cfg, num_users):
        return own
    column = jax.ShapeDtypeStruct(
        (num_users * cfg.data.num_pairs,), jnp.float32, sharding=replicated(mesh)
    )
    return own._replace(pairs=PairLogps(column, column))


def _own_params(cfg: Config, abstract: TrainState) -> Frozen:
    """Of both roles, as a run stores them: of a role with adapters nothing."""
    shapes = {
        r: {} if trains_adapters(cfg, r) else getattr(abstract, r).params for r in checkpoints.ROLES
    }
    return Frozen(**shapes)


def _on_base(own: Frozen, base: Params) -> Frozen:
    return own._replace(inference=own.inference or base, generator=own.generator or base)


def _still_there(frozen: Frozen | None, cfg: Config) -> Frozen:
    if frozen is None:
        raise UserError(
            f'config.workdir: "{cfg.workdir}/reference" is gone, without which the run cannot continue; '
            "put it back, or start again in another WORKDIR"
        )
    return frozen


def reads_generator(cfg: Config, num_users: int) -> bool:
    """Whether updates read the reference generator's weights: not where they need nothing but its
    stored log-probs."""
    scores = preference_objective(cfg).needs_reference and not stores_pairs(cfg, num_users)
    return scores or trains_adapters(cfg, "generator") or cfg.inference.reward_generator == "frozen"


def stores_pairs(cfg: Config, num_users: int) -> bool:
    """Whether the reference's log-probs are computed beforehand: where they never change, and each
    is read at least about once. num_users: of the training split."""
    draws = cfg.batch.users * sum(phase.steps for phase in parse_phases(cfg.schedule.phases))
    fixed = preference_objective(cfg).needs_reference and cfg.generator.reference == "prompt"
    return fixed and draws >= num_users


def reference_pairs(params: Params, built: Built) -> PairLogps:
    """The generator's log-probs of all pairs of the training users behind no summary: [users x
    data.num_pairs]."""
    cfg, users, size = (
        built.config,
        built.dataset.splits["train"],
        built.config.evaluation.batch_users,
    )

    def score(params: Params, batch: UserBatch) -> PairLogps:
        nothing = jax.tree.map(
            lambda x: x[:, None], empty_summary(built.glue.generator_prefix, size)
        )
        return jax.tree.map(
            lambda x: x[:, 0], pair_logps(params, nothing, batch, model=built.model)
        )

    program = jax.jit(score, out_shardings=replicated(built.mesh))
    found = []
    found_batches = batches.eval_batches(users, built.tokenizer, cfg)
    with Progress(
        -(-len(users) // size), label="reference", enabled=distributed.is_main_process()
    ) as progress:
        for number, batch in enumerate(found_batches):
            found.append(
                jax.device_get(
                    program(params, cells.place(batch.batch, built.mesh, built.model.rules))
                )
            )
            progress.update(number + 1)
    table = jax.tree.map(lambda *x: np.concatenate(x)[: len(users)].reshape(-1), *found)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, replicated(built.mesh), lambda at: x[at]),
        table,
    )


def _first_state(built: Built, transforms: Transforms, abstract: TrainState) -> TrainState:
    cfg, layout = built.config, shardings_of(abstract)
    init = partial(init_state, model=built.model, transforms=transforms, cfg=cfg)
    if not cfg.model.checkpoint:
        return jax.jit(init, out_shardings=layout)(jnp.int32(cfg.seed))

    def start(role: str) -> Params:
        if trains_adapters(cfg, role):
            made = jax.jit(
                lambda seed: getattr(init(seed), role).params,
                out_shardings=getattr(layout, role).params,
            )
            return made(jnp.int32(cfg.seed))
        return read_params(
            cfg.model.checkpoint, built.model, abstract_params(built.model, built.mesh, "float32")
        )

    begin = partial(new_state, transforms=transforms, cfg=cfg)
    program = jax.jit(begin, out_shardings=layout, donate_argnums=(0, 1))
    return program(start("inference"), start("generator"), jax.random.key(cfg.seed))


def _save(
    manager: Any, batches: StagedBatches, config_json: str, step: int, state: TrainState
) -> None:
    checkpoints.save(manager, step, state, batches, config_json)


def _run(
    program: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    state: TrainState,
    step: int,
    last_step: int,
    *,
    built: Built,
    batches: Iterator[Any],
    writer: MetricWriter,
    stop: distributed.StopRequest,
    save: Callable[[int, TrainState], None],
    label: str,
) -> tuple[int, TrainState]:
    """Runs one stage. Metrics of a step are read only after the next one is dispatched, so the
    device never waits."""
    schedule = built.config.schedule
    pending: list[tuple[int, Metrics]] = []
    tokens, since = 0, time.monotonic()
    batch, placed = _next(batches, built)
    logging.info("%s: compiling, then steps %d to %d", label, step + 1, last_step)
    with Progress(
        last_step, initial=step, label=label, enabled=distributed.is_main_process()
    ) as progress:
        while step < last_step:
            tokens += _num_tokens(batch)
            state, metrics = program(state, placed)
            step += 1
            saving = step % schedule.save_every == 0 or step == last_step
            number = (
                stop.agreed()
                if saving or step % schedule.log_every == 0 or jax.process_count() == 1
                else 0
            )
            pending.append((step, metrics))
            if saving or number:
                _write(pending, writer)
                pending = []
                writer.flush()
                save(step, state)
                if number:
                    raise Stopped(number, step)
            elif len(pending) > schedule.log_every:
                values = _write(pending[:-1], writer)
                pending = pending[-1:]
                rate = {"tokens/s": tokens / max(time.monotonic() - since, 1e-9)}
                tokens, since = 0, time.monotonic()
                progress.update(step, {SHOWN[k]: v for k, v in values.items() if k in SHOWN} | rate)
            else:
                progress.update(step)
            if step < last_step:
                batch, placed = _next(batches, built)
    return step, state


def _next(batches: Iterator[Any], built: Built) -> tuple[Any, Any]:
    """The next batch on the host, and on the devices: its copy runs while the update before it
    does."""
    batch = next(batches)
    return batch, place_batch(batch, built.mesh, built.model.rules)


def _num_tokens(batch: Any) -> int:
    """Tokens of data in a batch of this process, padding left out."""
    lengths = [
        x for path, x in jax.tree.leaves_with_path(batch) if "lengths" in jax.tree_util.keystr(path)
    ]
    return int(sum(x.sum() for x in lengths)) * jax.process_count()


def _write(pending: list[tuple[int, Metrics]], writer: MetricWriter) -> dict[str, float]:
    """Writes the metrics of some steps; returns their means over these steps.

    Raises: NotFinite.
    """
    totals: dict[str, list[float]] = {}
    for step, metrics in jax.device_get(pending):
        values = {
            name: float(m.total) / float(m.weight)
            for name, m in metrics.items()
            if float(m.weight) > 0
        }
        bad = sorted(name for name, value in values.items() if not math.isfinite(value))
        if bad:
            raise NotFinite(
                f"step {step}: {', '.join(bad)} is not finite; lower the learning rate of that role"
            )
        writer.write(step, values)
        for name, value in values.items():
            totals.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in totals.items()}
