"""A likelihood step of both roles, which start from random weights: the generator learns to follow
a summary, the inference model to write one and to read its signals."""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import jax
from jaxtyping import Array, Float

from popi_jax.arrays import (
    Demonstrations,
    Mean,
    Metrics,
    Params,
    RoleState,
    TrainState,
    WarmupBatch,
)
from popi_jax.losses.masked import masked_mean, metric
from popi_jax.models.packing import Budget, Tree, run_packed_if_it_fits
from popi_jax.models.transformer import TransformerConfig
from popi_jax.popi.plan import RolePlan
from popi_jax.popi.scorer import score_answers

TASKS = {"inference": ("summary", "reading"), "generator": ("generator",)}


def warmup_step(
    state: TrainState,
    batch: WarmupBatch,
    *,
    model: TransformerConfig,
    role: RolePlan,
    budgets: Mapping[str, Budget] = MappingProxyType({}),
) -> tuple[TrainState, Metrics]:
    """One step of both roles; the inference model's two tasks, summaries and readings, weigh the
    same. `budgets` are those of tasks, see models/packing.py."""
    roles: dict[str, RoleState] = {}
    metrics: Metrics = {}
    for name, tasks in TASKS.items():
        before: RoleState = getattr(state, name)
        gradients = []
        for task in tasks:
            differentiate = partial(
                differentiate_demonstrations, before.params, getattr(batch, task), model=model
            )
            grads, metrics[f"warmup/{task}_nll"] = differentiate(budget=budgets.get(task))
            gradients.append(grads)
        total = jax.tree.map(lambda *parts: sum(parts), *gradients)
        roles[name], norm = role.apply_gradients(before, total)
        metrics[f"warmup/{name}_grad_norm"] = metric(norm)
    return TrainState(**roles, step=state.step + 1, key=state.key), metrics


def differentiate_demonstrations(
    params: Params, batch: Demonstrations, *, model: TransformerConfig, budget: Budget | None
) -> tuple[Params, Mean]:
    """Gradient of `demonstration_loss` and the loss as a metric."""
    tree = Tree(batch.context, batch.turns, jax.tree.map(lambda x: x[:, :, None], batch.answers))

    def run(budget: Budget | None) -> tuple[Params, Mean]:
        loss_fn = partial(
            demonstration_loss, tree=tree, mask=batch.mask, model=model, budget=budget
        )
        return jax.grad(loss_fn, has_aux=True)(params)

    return run_packed_if_it_fits(budget, tree, run)


def demonstration_loss(
    params: Params, *, tree: Tree, mask: Array, model: TransformerConfig, budget: Budget | None
) -> tuple[Float[Array, ""], Mean]:
    """Mean negative log-likelihood of the answers' tokens (nats per token), also as a metric."""
    scores = score_answers(params, tree, model=model, budget=budget)
    counted = scores.mask & mask[:, :, None, None]
    return -masked_mean(scores.logps, counted), metric(-scores.logps, counted)
