"""Features phi(x, y) of replies for reward models: hidden states of a frozen generator that is told
nothing of the user."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from popi_jax.arrays import Params, UserBatch
from popi_jax.baselines.pairs import check_users, encode_pairs, join_users
from popi_jax.data.records import User
from popi_jax.distributed import is_main_process
from popi_jax.models import packing
from popi_jax.models.layout import count_shards
from popi_jax.models.packing import Tree
from popi_jax.models.transformer import Transformer, TransformerConfig, variables
from popi_jax.popi.scorer import make_pair_tree, repeat_ids
from popi_jax.progress import Progress
from popi_jax.run import Run
from popi_jax.sharding import place_whole


class PairStates(NamedTuple):
    """Features of both replies of each pair, chosen first; anything where `mask` is False."""

    states: Float[Array, "users pairs 2 embed"]
    mask: Bool[Array, "users pairs"]


class Features(NamedTuple):
    """Of users: their held-out pairs, and the past pairs among their signals."""

    index: Int[Array, " users"]  # number of the user
    pairs: PairStates
    shots: PairStates


class Scale(NamedTuple):
    """Mean and standard deviation of each feature over the replies of the training users."""

    mean: Float[Array, " embed"]
    std: Float[Array, " embed"]


def compute_splits(
    run: Run, params: Params, users: Mapping[str, Sequence[User]]
) -> dict[str, Features]:
    """Features of the users of train, validation and test. Raises: UserError when one is empty."""
    check_users(users["train"], users["validation"], users["test"])
    return {name: compute_features(run, params, some, name) for name, some in users.items()}


def compute_features(run: Run, params: Params, users: Sequence[User], label: str = "") -> Features:
    """Features of all replies of the users, float32, in the memory of every process.

    params: of the generator. label: what the progress is of."""
    role, found, done = run.generator, [], itertools.count(1)
    given = [(which, encode_pairs(run, users, which)) for which in ("pairs", "shots")]
    shown, total = is_main_process(), sum(len(made) for _, made in given)
    with Progress(total, label=f"features {label}".strip(), enabled=shown) as progress:
        for _, made in given:
            parts = []
            for batch in made:
                placed = place_whole(batch, run.mesh, role.model.rules)
                states = read_users(params, placed, model=role.model, prefix=role.prompt)
                parts.append(PairStates(jax.device_get(states), batch.pair_mask))
                progress.update(next(done))
            found.append(join_users(parts, len(users)))
    return Features(np.arange(len(users), dtype=np.int32), *found)


@partial(jax.jit, static_argnames=("model", "prefix"), out_shardings=P())
def read_users(
    params: Params, users: UserBatch, *, model: TransformerConfig, prefix: tuple[int, ...]
) -> Float[Array, "users pairs 2 embed"]:
    """Features of the replies to the users' prompts behind no text about them; every process gets
    all."""
    tree = make_pair_tree(repeat_ids(prefix, (users.index.shape[0], 1)), users)
    return read_answers(params, tree, model=model)


def read_answers(
    params: Params, tree: Tree, *, model: TransformerConfig
) -> Float[Array, "batch turns answers embed"]:
    """Mean of the final hidden states over the tokens of each answer given its context and turn,
    float32; 0 for an answer without a token.

    Contexts and turns are computed once for all that continues them, as in popi/scorer.py."""
    rows = packing.pack(tree)
    hidden, _ = Transformer(model).apply(variables(params), *rows[:3], levels=rows.levels)
    mask = packing.length_mask(tree.answers)
    first = tree.context.ids.shape[1] + tree.turns.ids.shape[1] * tree.turns.ids.shape[2]
    states = hidden[:, first:].astype(jnp.float32).reshape(*mask.shape, hidden.shape[-1])
    total = jnp.sum(jnp.where(mask[..., None], states, 0.0), axis=-2)
    return total / jnp.maximum(tree.answers.lengths, 1)[..., None]


def measure_scale(features: Features) -> Scale:
    """In float64 on the host."""
    parts = [p.states[p.mask].reshape(-1, p.states.shape[-1]) for p in features[1:]]
    values = np.concatenate(parts).astype(np.float64)
    mean, std = values.mean(axis=0), values.std(axis=0)
    return Scale(*(x.astype(np.float32) for x in (mean, np.maximum(std, 1e-6))))


def place_features(features: Features, scale: Scale, run: Run, multiple: int = 1) -> Features:
    """Standardised features on the mesh, split by users; users none of whose pairs count fill up to
    `multiple` times the number of shards."""
    size = multiple * count_shards(run.generator.model.rules.batch)
    extra = -len(features.index) % size

    def pad(x: Any) -> np.ndarray:
        return np.pad(np.asarray(x), [(0, extra)] + [(0, 0)] * (np.ndim(x) - 1))

    def standardise(part: PairStates) -> PairStates:
        return part._replace(states=(part.states - scale.mean) / scale.std)

    scaled = Features(features.index, *map(standardise, features[1:]))
    return place_whole(jax.tree.map(pad, scaled), run.mesh, run.generator.model.rules)
