import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.arrays import Tokens
from popi_jax.baselines import features, pairs
from popi_jax.data import prompts
from popi_jax.models.packing import Tree
from tests.oracles import plain
from tests.oracles.plain import MODEL
from tests.tiny_run import TinyRun, shared_run


@pytest.fixture(scope="module")
def tiny() -> TinyRun:
    return shared_run(8)


def test_states_are_those_of_separate_sequences():
    """The oracle's logits behind the identity as LM head are its hidden states."""
    rng = np.random.default_rng(0)

    def draw(rows: tuple[int, ...], length: int) -> Tokens:
        lengths = rng.integers(1, length + 1, rows).astype(np.int32)
        ids = rng.integers(0, MODEL.embed_dim, (*rows, length)).astype(np.int32)
        return Tokens(jnp.asarray(ids), jnp.asarray(lengths))

    tree = Tree(draw((2,), 5), draw((2, 3), 4), draw((2, 3, 2), 6))
    params = plain.random_params(0)
    found = features.read_answers(params, tree, model=MODEL)
    eye = params | {"lm_head": {"kernel": np.eye(MODEL.embed_dim)}}
    for b, t, a in np.ndindex(2, 3, 2):
        before = plain.row(tree.context, b) + plain.row(tree.turns, b, t)
        ids = before + plain.row(tree.answers, b, t, a)
        expected = plain.logits(eye, MODEL, np.array(ids))[len(before) :].mean(axis=0)
        np.testing.assert_allclose(found[b, t, a], expected, rtol=1e-3, atol=1e-4)


def test_shots_are_pairs_like_others(tiny):
    users = tiny.run.dataset.splits["test"][:3]
    words, num = tiny.run.generator.tokenizer, tiny.run.config.data.num_pairs
    made = {
        which: pairs.join_users(pairs.encode_pairs(tiny.run, users, which), len(users))
        for which in ("pairs", "shots", "both")
    }
    assert made["both"].pair_mask.shape[1] == num + 1
    for row, user in enumerate(users):
        (shot,) = user.shots
        texts = [(p.prompt, p.chosen, p.rejected) for p in user.pairs]
        texts = [([{"role": "user", "content": shot.prompt}], shot.chosen, shot.rejected), *texts]
        for k, (prompt, *replies) in enumerate(texts):
            turn = prompts.render_generator_turn(words, prompt)
            assert plain.row(made["both"].turns, row, k) == turn
            which, at = ("shots", 0) if k == 0 else ("pairs", k - 1)
            for side, reply in zip(("chosen", "rejected"), replies, strict=True):
                ids = prompts.encode_answer(words, reply)
                assert plain.row(getattr(made["both"], side), row, k) == ids
                assert plain.row(getattr(made[which], side), row, at) == ids


def test_features_do_not_depend_on_batches_and_devices(tiny):
    """Of all users in batches on 8 devices, and of each alone on one."""
    run = tiny.run
    users = run.dataset.splits["test"][:5]
    with jax.set_mesh(run.mesh):
        found = features.compute_features(run, tiny.frozen.generator, users)
    assert found.pairs.mask.sum() == sum(len(user.pairs) for user in users)
    params = jax.device_get(tiny.frozen.generator)
    model = dataclasses.replace(run.generator.model, rules=MODEL.rules)
    given = {"model": model, "prefix": run.generator.prompt}
    for which, part in (("pairs", found.pairs), ("shots", found.shots)):
        (batch,) = pairs.encode_pairs(run, users, which, batch_users=len(users))
        alone = jax.jit(partial(features.read_users.__wrapped__, **given))
        states = np.asarray(alone(params, batch))
        np.testing.assert_allclose(part.states[part.mask], states[part.mask], rtol=1e-4, atol=1e-5)


def test_scale_is_of_the_replies_that_count():
    rng = np.random.default_rng(0)
    parts = [
        features.PairStates(
            rng.normal(3.0, 2.0, (4, n, 2, 5)).astype(np.float32), rng.random((4, n)) < 0.6
        )
        for n in (2, 3)
    ]
    found = features.measure_scale(features.Features(np.arange(4, dtype=np.int32), *parts))
    rows = np.concatenate([p.states[u, k] for p in parts for u, k in np.argwhere(p.mask)])
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found.std, rows.std(axis=0), rtol=1e-4)
