"""What the backward pass computes again instead of keeping it (`model.remat`), chosen by what fits
the memory of a device. It decides about speed and memory alone."""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from popi_jax.arrays import Frozen, TrainState
from popi_jax.config import Config
from popi_jax.data.encode import get_told_len
from popi_jax.data.warmup_batches import count_pairs
from popi_jax.losses.logprobs import CHUNK
from popi_jax.models.layout import UNSPLIT, count_shards
from popi_jax.models.packing import Level
from popi_jax.models.transformer import Transformer, TransformerConfig, init_boxed, unbox, variables
from popi_jax.popi.rollout import PromptTokens

# the first that fits; "none" keeps three times as much as "dots" and is no faster
POLICIES = ("dots", "full")
SHARE = 0.85  # of the memory that may be planned with: the rest is for what nobody foresees
SLACK = 1.3  # what is kept needs about so much more, for gradients on their way through a layer
_SLOTS = 61  # of the row that is traced; no size of a weight


class Need(NamedTuple):
    """Bytes of a device."""

    available: float  # in all
    fixed: float  # what any policy needs
    kept: dict[str, float]  # policy -> activations

    def choose(self) -> str:
        """The first policy that fits; the last where none does."""
        room = SHARE * self.available - self.fixed
        fitting = (policy for policy, size in self.kept.items() if SLACK * size <= room)
        return next(fitting, POLICIES[-1])

    def describe(self, policy: str) -> str:
        """For the log."""
        numbers = self.kept[policy], self.fixed, self.available
        kept, fixed, available = (f"{number / 1e9:.2f}" for number in numbers)
        return f"{kept} GB of activations beside {fixed} GB, of {available} GB"


def estimate_need(
    config: Config,
    model: TransformerConfig,
    prompts: PromptTokens,
    given: tuple[TrainState, Frozen],
    available: float,
) -> Need:
    """What the updates of a run need, on the devices of the mesh that is set.

    given: shapes and layouts of what an update is given. available: bytes of a device, without
    it."""
    state = given[0]
    slots = count_slots(config, prompts) / count_shards(model.rules.batch)
    kept = {policy: slots * count_kept_bytes(model, policy) for policy in POLICIES}
    trained = max(_count_bytes(role.params) for role in (state.inference, state.generator))
    head = model.vocab_size * (3 * 4 * CHUNK + 2 * 4 * model.embed_dim)
    layer = slots * count_kept_bytes(model, "none") / model.num_layers  # while it is computed again
    return Need(available, _count_bytes(given) + trained + head + layer, kept)


def count_slots(config: Config, prompts: PromptTokens) -> int:
    """Slots of the largest tree of one gradient pass: see packing.py."""
    d, b, group = config.data, config.batch, config.inference.group_size
    asked = len(prompts.summary_turn) + group * d.summary_len
    shared = len(prompts.generator_prefix) + max(d.summary_len, get_told_len(config))
    pair = d.turn_len + 2 * d.answer_len
    pairs = shared + b.pairs * pair
    most = b.users // b.microbatches * max(d.context_len + asked, pairs)
    if config.warmup.steps:
        w = config.warmup
        read = d.context_len + len(prompts.summary_turn) + (1 + w.readings) * d.summary_len
        users = max(w.summary_users, w.reading_users)
        answered = shared + count_pairs(config) * pair
        most = max(most, users * read, w.generator_users * answered)
    return most


def count_kept_bytes(model: TransformerConfig, policy: str) -> float:
    """Bytes that the layers keep of one slot until the backward pass."""
    cfg = dataclasses.replace(
        model, remat=policy, kernel=None, rules=UNSPLIT, rollout_rules=UNSPLIT
    )
    params = jax.eval_shape(lambda key: unbox(init_boxed(key, cfg)), jax.random.key(0))
    row = jnp.zeros((1, _SLOTS), jnp.int32)
    levels = (Level(1, _SLOTS),)

    def keep(params: Any) -> Any:
        run = partial(Transformer(cfg).apply, levels=levels)
        forward = lambda params: run(variables(params), row, row, row == 0)[0]  # noqa: E731
        return jax.vjp(forward, params)[1]

    kept = [x for x in jax.tree.leaves(jax.eval_shape(keep, params)) if _SLOTS in x.shape]
    return sum(x.size * x.dtype.itemsize for x in kept) / _SLOTS


def find_memory() -> float:
    """Bytes that one device has, the least of all processes; 0 where nobody says."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {} if device.platform != "cpu" else {}
    found = float(stats.get("bytes_limit", 0))
    if device.platform == "cpu":
        found = read_free_memory() / jax.local_device_count()
    if jax.process_count() > 1:
        found = float(multihost_utils.process_allgather(np.float32(found)).min())
    return found


def read_free_memory(root: Path = Path("/")) -> float:
    """Bytes that this machine can still give, within the limit of the control group; 0 where the
    system does not say."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if ":" in line}
    free = 1024.0 * float(sizes.get("MemAvailable", 0))
    group = root / "sys/fs/cgroup"
    try:
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        return min(free, float(limit) - float(used))
    except (OSError, ValueError):  # there is none, or it is "max"
        return free


def _count_bytes(tree: Any) -> int:
    """Of the part that one device has."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
