"""What an update trains and by which objectives: `training/setup.py: plan_update` decides it once,
from the configuration, and the steps of this folder only read it."""

import dataclasses
import enum
from typing import Any, NamedTuple

import optax
from jaxtyping import Array, Float

from popi_jax.arrays import Params, RoleState
from popi_jax.losses.grpo import PolicyObjective
from popi_jax.losses.preference import PreferenceObjective
from popi_jax.losses.reward import RewardObjective
from popi_jax.models.transformer import join_adapters


class Reference(enum.Enum):
    """Where the log-probs come from that the generator's objective compares with."""

    NONE = "none"  # the objective has no reference
    STORED = "stored"  # PROMPT of all training pairs, computed before the main stage
    PROMPT = "prompt"  # the frozen generator given an empty summary, in each update
    SUMMARY = "summary"  # the frozen generator given the summary


class Judge(enum.Enum):
    """The generator whose margins are the reward of a summary."""

    CURRENT = "current"
    EMA = "ema"  # the average of its parameters
    FROZEN = "frozen"  # the reference


class Kind(NamedTuple):
    """Which roles an update trains; supervised: the inference model by likelihood, on
    `UserBatch.taught`, else by reward; stored: the generator behind `Frozen.summaries`, else behind
    new ones."""

    inference: bool
    generator: bool
    supervised: bool = False
    stored: bool = False


@dataclasses.dataclass(frozen=True)
class RolePlan:
    """How the parameters of a role are trained."""

    tx: optax.GradientTransformation
    ema_decay: float = 0.0  # of an average of the parameters; 0: none is kept
    adapter_scale: float = 0.0  # alpha / rank of its adapters; 0: all parameters are trained

    def join_policy(self, params: Params, frozen: Params) -> Params:
        """The whole model, from what is trained of it and the role's frozen weights."""
        if not self.adapter_scale:
            return params
        return join_adapters(frozen, params, scale=self.adapter_scale)

    def apply_gradients(
        self, state: RoleState, grads: Params
    ) -> tuple[RoleState, Float[Array, ""]]:
        """The updated role and the norm of its gradient before clipping."""
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        ema: Any = state.ema
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1.0 - self.ema_decay)
        return RoleState(state.step + 1, params, opt_state, ema), optax.tree.norm(grads)


@dataclasses.dataclass(frozen=True)
class GeneratorPlan:
    """How the generator is trained, and what its reference sees."""

    role: RolePlan
    objective: PreferenceObjective
    reference: Reference
    # False: it reads `UserBatch.told`, nothing where that is None, and no summary is sampled
    reads_summaries: bool = True


@dataclasses.dataclass(frozen=True)
class InferencePlan:
    """How the inference model is trained; config.py explains its settings."""

    role: RolePlan
    objective: PolicyObjective
    judge: Judge
    group_size: int
    reward: RewardObjective
    reward_baseline: bool  # whether the reward of no summary is subtracted
    advantage_scale: str
    advantage_baseline: str
    skip_unfinished: bool
    high_entropy_share: float
    steps_per_rollout: int


@dataclasses.dataclass(frozen=True)
class UpdatePlan:
    """`kinds` are those of the updates of the main stage, which begins at `first_step`."""

    kinds: tuple[Kind, ...]
    first_step: int
    generator: GeneratorPlan
    inference: InferencePlan
    generator_prefix: tuple[int, ...]  # tokens before a summary in the generator's conversation
    num_pairs: int  # of a user, by which `UserBatch.pair_number` counts

    @property
    def stores_summaries(self) -> bool:
        """Whether some updates read stored summaries."""
        return any(kind.stored for kind in self.kinds)
