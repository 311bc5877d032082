"""Each baseline from users to items, on a run of a few made people."""

import math
from functools import partial

import jax
import numpy as np
import pytest

from popi_jax.baselines import low_rank, pairs, soft_prompt, variational
from popi_jax.baselines.features import compute_splits
from popi_jax.baselines.user_prompts import UserModel
from popi_jax.data.records import SPLITS
from tests.tiny_run import TinyRun, shared_run


def fit_rewards(fit_features, run, params, *users, seed: int, settings) -> pairs.Fit:
    found = compute_splits(run, params, dict(zip(SPLITS, users, strict=True)))
    return fit_features(run, found, users[2], seed, settings)


FITS = {
    "low_rank": partial(
        fit_rewards,
        low_rank.fit_features,
        settings=low_rank.Settings((1, 2), (0.3,), (1e-4,), steps=5, fit_steps=3),
    ),
    "variational": partial(
        fit_rewards,
        variational.fit_features,
        settings=variational.Settings((0.01,), 1, 1, latent=2, hidden=4),
    ),
    "individual": partial(
        soft_prompt.fit_and_score,
        settings=soft_prompt.Settings(UserModel("individual", 2), epochs=1, fit_steps=(1, 3)),
    ),
}


@pytest.fixture(scope="module")
def tiny() -> TinyRun:
    return shared_run(8)


def fit(tiny: TinyRun, name: str) -> pairs.Fit:
    splits = tiny.run.dataset.splits
    users = (splits["train"][:16], splits["validation"] or splits["train"][:3], splits["test"][:5])
    with jax.set_mesh(tiny.run.mesh):
        return FITS[name](tiny.run, tiny.frozen.generator, *users, seed=0)


@pytest.fixture(scope="module", params=list(FITS))
def fitted(request, tiny) -> tuple[str, pairs.Fit]:
    return request.param, fit(tiny, request.param)


def test_items_are_those_of_all_pairs_in_order(fitted, tiny):
    name, found = fitted
    users = tiny.run.dataset.splits["test"][:5]
    expected = [(user.user_id, pair.record_id) for user in users for pair in user.pairs]
    assert set(found.items) == {"generic", "fitted_to_pairs"}
    for items in found.items.values():
        assert [(item["user"], item["pair"]) for item in items] == expected
        for item in items:
            assert item["context_tokens"] == 0 < item["signal_tokens"]
            assert math.isfinite(item["margin"])
            difference = item["chosen"] - item["rejected"]
            if name == "individual":
                known = item["reference_chosen"] - item["reference_rejected"]
                beta = tiny.run.config.generator.beta
                assert item["margin"] == pytest.approx(beta * (difference - known), abs=1e-4)
            else:
                assert item["reference_chosen"] is None is item["reference_rejected"]
                assert item["margin"] == pytest.approx(difference, abs=1e-4)


def test_what_is_known_of_a_user_changes_the_margins(fitted):
    _, found = fitted
    margins = [[item["margin"] for item in items] for items in found.items.values()]
    assert np.abs(np.subtract(*margins)).max() > 1e-6


def test_frozen_weights_stay_and_prompts_alone_are_trained(tiny):
    settings = soft_prompt.Settings(
        UserModel("cluster", 2, 3), train_weights=False, epochs=1, fit_steps=(1, 3)
    )
    users = tiny.run.dataset.splits["train"][:16]
    with jax.set_mesh(tiny.run.mesh):
        model = soft_prompt.train(tiny.run, tiny.frozen.generator, users, settings, 0)
        plan = soft_prompt.make_plan(tiny.run, settings, 1)
        before = soft_prompt.start(tiny.run, tiny.frozen.generator, 16, plan, settings, 0)
    assert model.weights is tiny.frozen.generator
    for name in ("generic", "clusters"):
        assert np.abs(np.asarray(model.shared[name]) - before.shared[name]).max() > 1e-4


def test_the_same_seed_gives_the_same_numbers(tiny):
    first, again = fit(tiny, "low_rank"), fit(tiny, "low_rank")
    assert first == again
