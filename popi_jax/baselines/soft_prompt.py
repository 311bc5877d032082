"""P-DPO: a soft prompt of the user, trained with the generator by DPO (arXiv 2402.05133).

A user is T vectors that stand in the place of the summary: tokens behind the vocabulary, whose rows
of the embedding are made of what is known of the user (`make_prompts`). Each pair of a training
user is scored behind the user's own prompt and behind the generic one, which stands for anybody:

    L = alpha * L_DPO(own prompt) + (1 - alpha) * L_DPO(generic prompt),

the reference being the frozen generator told nothing. The paper gives a new user the generic
prompt. Its natural extension, not in the paper, is fitted: gradient steps on the user's own part,
all else fixed, on the user's shots.

Departures from the paper and its code (HumainLab/Personalized_RLHF): the user's part starts at
zero, not at embeddings of words, so that a new user starts as the generic one (of clusters: at
equal weights); the weights of the generator are trained as the run trains them (all, or adapters),
or not at all; steps of a new user's fit are chosen on the validation users."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from popi_jax.arrays import Mean, PairLogps, Params, RoleState, UserBatch
from popi_jax.baselines.pairs import (
    FITTED,
    GENERIC,
    Fit,
    check_users,
    encode_pairs,
    join_users,
    make_items,
    measure_nats,
)
from popi_jax.baselines.user_prompts import PromptScorer, UserModel
from popi_jax.data.records import User
from popi_jax.distributed import is_main_process
from popi_jax.models.lora import init_lora_boxed
from popi_jax.models.transformer import unbox
from popi_jax.popi.plan import RolePlan
from popi_jax.progress import Progress
from popi_jax.run import Run
from popi_jax.sharding import place_whole, replicated
from popi_jax.training import optim, setup

# what a batch has for each pair
OF_PAIRS = ("turns", "chosen", "rejected", "pair_mask", "pair_number")


class Settings(NamedTuple):
    users: UserModel = UserModel()
    train_weights: bool = True  # of the generator, as generator.lora says; False: prompts alone
    alpha: float = 0.5  # weight of the loss behind the user's own prompt
    epochs: int = 1
    # of a user in an update: few, so that each user is met several times an epoch; as many pairs
    # in all as batch.users x batch.pairs
    pairs: int = 2
    learning_rate: float = 3e-2  # of Adam, on the prompts
    # of Adam on a new user's own part; the best on the validation users is taken
    fit_steps: tuple[int, ...] = (5, 10, 20, 40)
    fit_learning_rate: float = 5e-2


class Plan(NamedTuple):
    """The static half of `update`."""

    scorer: PromptScorer
    role: RolePlan  # of the generator's weights
    tx: optax.GradientTransformation  # of the prompts
    alpha: float
    pairs: int  # of a user in an update


class State(NamedTuple):
    """What training changes."""

    weights: RoleState | None  # None: the generator stays as it is
    shared: Params
    own: Float[Array, "users ..."]  # of the training users
    opt_state: Any  # of shared and own


class Model(NamedTuple):
    """A generator and what its prompts have in common."""

    weights: Params
    shared: Params


@partial(jax.jit, static_argnames=("plan",), donate_argnames=("state",))
def update(
    state: State,
    frozen: Params,
    batch: UserBatch,
    reference: PairLogps | None,
    first: Int[Array, ""],
    *,
    plan: Plan,
) -> tuple[State, Mean]:
    """A step on `plan.pairs` pairs of each user, from number `first` on; also the mean loss."""
    batch, reference = _take_pairs(batch, reference, first, plan.pairs)
    numbers = jnp.minimum(batch.index, state.own.shape[0] - 1)  # of those that fill a batch: any
    trained: dict[str, Any] = {"shared": state.shared, "own": state.own}
    if state.weights is not None:
        trained["weights"] = state.weights.params

    def whole(params: Any) -> tuple[Params, Params, Array]:
        weights = frozen
        if "weights" in params:
            weights = plan.role.join_policy(params["weights"], frozen)
        return weights, params["shared"], params["own"][numbers]

    grads, metrics = plan.scorer.differentiate(trained, whole, batch, reference, alpha=plan.alpha)
    count = jnp.maximum(jnp.sum(jnp.any(batch.pair_mask, axis=1)), 1)
    grads = jax.tree.map(lambda g: g / count, grads)
    weights = state.weights
    if weights is not None:
        weights, _ = plan.role.apply_gradients(weights, grads.pop("weights"))
        del trained["weights"]
    updates, opt_state = plan.tx.update(grads, state.opt_state, trained)
    prompts: Any = optax.apply_updates(trained, updates)
    return State(weights, **prompts, opt_state=opt_state), metrics["loss"]


def train(run: Run, frozen: Params, users: Sequence[User], settings: Settings, seed: int) -> Model:
    """Trains prompts of the users and, if asked, the generator on all their pairs and shots."""
    each, b = settings.pairs, run.config.batch
    size = b.users * max(b.pairs // each, 1)
    encoded = [_pad_pairs(x, each) for x in encode_pairs(run, users, "both", batch_users=size)]
    steps = list(itertools.product(range(len(encoded)), range(0, _count_pairs(encoded[0]), each)))
    plan = make_plan(run, settings, settings.epochs * len(steps))
    state = start(run, frozen, len(users), plan, settings, seed)
    placed = [place_whole(batch, run.mesh, run.generator.model.rules) for batch in encoded]
    rng, done = np.random.default_rng(seed), 0
    total, shown = len(placed) + settings.epochs * len(steps), is_main_process()
    with Progress(total, label="soft prompts", enabled=shown) as progress:
        references = []
        for batch in placed:
            references.append(find_reference(frozen, batch, scorer=plan.scorer))
            progress.update(done := done + 1)
        for _ in range(settings.epochs):
            for number, first in rng.permutation(steps):
                given = (frozen, placed[number], references[number], jnp.int32(first))
                state, loss = update(state, *given, plan=plan)
                progress.update(done := done + 1, _show(loss, done))
    weights = frozen
    if state.weights is not None:
        weights = plan.role.join_policy(state.weights.params, frozen)
    return Model(weights, state.shared)


def _count_pairs(batch: UserBatch) -> int:
    return batch.pair_mask.shape[1]


def _pad_pairs(batch: UserBatch, multiple: int) -> UserBatch:
    """Pairs that do not count, up to a multiple."""
    extra = -_count_pairs(batch) % multiple

    def pad(x: np.ndarray) -> np.ndarray:
        return np.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))

    return batch._replace(**{name: jax.tree.map(pad, getattr(batch, name)) for name in OF_PAIRS})


def _take_pairs(
    batch: UserBatch, reference: PairLogps | None, first: Array, count: int
) -> tuple[UserBatch, PairLogps | None]:
    take = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=count, axis=1)
    own = {name: jax.tree.map(take, getattr(batch, name)) for name in OF_PAIRS}
    return batch._replace(**own), jax.tree.map(take, reference)


def _show(loss: Mean, step: int) -> dict[str, float] | None:
    """Now and then: whoever reads a number waits for it."""
    return {"loss": float(loss.total) / max(float(loss.weight), 1.0)} if step % 20 == 0 else None


def make_plan(run: Run, settings: Settings, steps: int) -> Plan:
    config = run.config
    scorer = PromptScorer(
        run.generator.model,
        run.generator.prompt,
        settings.users,
        setup.make_objective(config),
        config.batch.microbatches,
    )
    scale = setup.adapter_scale(config.generator)
    role = RolePlan(optim.generator_transform(config, steps), adapter_scale=scale)
    tx = optax.adam(optax.cosine_decay_schedule(settings.learning_rate, max(steps, 1)))
    return Plan(scorer, role, tx, settings.alpha, settings.pairs)


def start(
    run: Run, frozen: Params, num_users: int, plan: Plan, settings: Settings, seed: int
) -> State:
    """The state before training, laid out on the mesh: weights as in training, prompts whole on
    every device."""
    model, lora, key = run.generator.model, run.config.generator.lora, jax.random.key(seed)
    words = frozen["embed"]["embedding"]

    def make_prompts(words: Array) -> State:
        prompts = {
            "shared": settings.users.init(jax.random.fold_in(key, 0), words),
            "own": settings.users.init_own(num_users, model.embed_dim),
        }
        return State(None, **prompts, opt_state=plan.tx.init(prompts))

    def make_weights(frozen: Params) -> RoleState:
        own = frozen
        if lora.rank:
            own = unbox(
                init_lora_boxed(
                    jax.random.fold_in(key, 1), model, rank=lora.rank, targets=lora.targets
                )
            )
        return setup.new_role(jax.tree.map(jnp.copy, own), plan.role)

    state = jax.jit(make_prompts, out_shardings=replicated(run.mesh))(words)
    if not settings.train_weights:
        return state
    roles = setup.Roles(plan.role, plan.role)
    abstract = setup.abstract_state(model, roles, run.mesh, run.config).generator
    layout = setup.get_shardings(abstract)
    return state._replace(weights=jax.jit(make_weights, out_shardings=layout)(frozen))


@partial(jax.jit, static_argnames=("scorer",))
def find_reference(frozen: Params, batch: UserBatch, *, scorer: PromptScorer) -> PairLogps | None:
    """Log-probs of the frozen generator told nothing; None where the objective has no reference."""
    return scorer.score_plain(frozen, batch) if scorer.objective.needs_reference else None


@partial(jax.jit, static_argnames=("scorer", "tx"))
def fit_users(
    carry: tuple[Float[Array, "users ..."], Any],
    steps: Int[Array, ""],
    model: Model,
    shots: UserBatch,
    reference: PairLogps | None,
    *,
    scorer: PromptScorer,
    tx: optax.GradientTransformation,
) -> tuple[Float[Array, "users ..."], Any]:
    """`steps` more steps on the own parts of new users and the state of their optimizer. Users do
    not influence each other: the loss is a sum over them, and Adam works number by number."""

    def step(_: Array, carry: Any) -> Any:
        own, state = carry
        whole = lambda params: (*model, params["own"])  # noqa: E731
        grads, _ = scorer.differentiate({"own": own}, whole, shots, reference, alpha=None)
        updates, state = tx.update(grads["own"], state, own)
        return optax.apply_updates(own, updates), state

    return jax.lax.fori_loop(0, steps, step, carry)


@partial(jax.jit, static_argnames=("scorer",), out_shardings=P())
def score_users(
    own: Float[Array, "users ..."],
    model: Model,
    pairs: UserBatch,
    reference: PairLogps | None,
    *,
    scorer: PromptScorer,
) -> tuple[PairLogps, Float[Array, "users pairs"]]:
    """Log-probs and margins of the users' pairs; every process gets all."""
    logps = scorer.score(*model, own, pairs)
    return logps, scorer.find_margins(logps, pairs, reference)


class Scored(NamedTuple):
    """All pairs of some users, on the host."""

    mask: np.ndarray  # [users pairs]
    reference: PairLogps | None
    by_steps: dict[int, tuple[PairLogps, np.ndarray]]  # steps of the fit -> log-probs and margins


def fit_and_score_users(
    run: Run,
    frozen: Params,
    model: Model,
    users: Sequence[User],
    stops: tuple[int, ...],
    settings: Settings,
) -> Scored:
    """Fits users to their shots, and scores their pairs after each number of steps of `stops`,
    which ascend; 0 is the generic prompt."""
    scorer, rules = make_plan(run, settings, 0).scorer, run.generator.model.rules
    tx, found = optax.adam(settings.fit_learning_rate), []
    made = [encode_pairs(run, users, which) for which in ("shots", "pairs")]
    whole = jax.jit(lambda x: x, out_shardings=P())
    with Progress(len(made[0]), label="new users", enabled=is_main_process()) as progress:
        for number, both in enumerate(zip(*made, strict=True)):
            shots, pairs = (place_whole(batch, run.mesh, rules) for batch in both)
            of_shots, of_pairs = (find_reference(frozen, b, scorer=scorer) for b in (shots, pairs))
            own = settings.users.init_own(shots.index.shape[0], run.generator.model.embed_dim)
            carry = (own, tx.init(own))
            by_steps = {}
            for before, after in zip((0, *stops), stops, strict=False):
                by = {"scorer": scorer, "tx": tx}
                steps = jnp.int32(after - before)
                carry = fit_users(carry, steps, model, shots, of_shots, **by)
                scored = score_users(carry[0], model, pairs, of_pairs, scorer=scorer)
                by_steps[after] = jax.device_get(scored)
            known = jax.device_get(whole(of_pairs))
            found.append(Scored(both[1].pair_mask, known, by_steps))
            progress.update(number + 1)
    return join_users(found, len(users))


def fit_and_score(
    run: Run,
    frozen_generator_params: Params,
    train_users: Sequence[User],
    validation_users: Sequence[User],
    test_users: Sequence[User],
    seed: int,
    settings: Settings = Settings(),  # noqa: B008
) -> Fit:
    """Trains on the training users, chooses the steps of a new user's fit on the validation users,
    and scores the test users: behind the generic prompt, and behind prompts fitted to their
    shots."""
    check_users(train_users, validation_users, test_users)
    frozen = frozen_generator_params
    model = train(run, frozen, train_users, settings, seed)
    given = (run, frozen, model)
    valid = fit_and_score_users(*given, validation_users, (0, *settings.fit_steps), settings)
    tried = {
        steps: measure_nats(margins, valid.mask) for steps, (_, margins) in valid.by_steps.items()
    }
    steps = min(settings.fit_steps, key=tried.__getitem__)
    test = fit_and_score_users(*given, test_users, (0, steps), settings)
    items = {
        condition: make_items(run, test_users, *test.by_steps[at], test.reference)
        for condition, at in ((GENERIC, 0), (FITTED, steps))
    }
    chosen = {"chosen_fit_steps": steps, "validation_nats": tried, "seed": seed}
    return Fit(items, settings._asdict() | {"users": settings.users._asdict()} | chosen)
