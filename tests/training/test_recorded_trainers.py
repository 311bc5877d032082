"""Our gradient steps against one batch that TRL's trainers computed: loss and the gradient of every
parameter."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from popi_jax.arrays import RoleState, Tokens, UserBatch
from popi_jax.checkpoints import hf_config, hf_io, hf_write
from popi_jax.losses.grpo import PolicyObjective, policy_loss, policy_sums
from popi_jax.models.packing import Tree
from popi_jax.models.transformer import TransformerConfig
from popi_jax.popi.scorer import Scorer, score_answers
from tests.oracles import recorded
from tests.training import small

pytestmark = recorded.needed
SGD = optax.sgd(1.0)


def model(name: str) -> tuple[TransformerConfig, dict]:
    folder = recorded.FOLDER / "models" / name
    cfg = hf_config.read_config(folder)
    return cfg, jax.tree.map(jnp.asarray, hf_io.read_params(folder, cfg))


def rows(sequences: list[list[int]], length: int = 0) -> Tokens:
    length = length or max(map(len, sequences))
    ids = [row + [0] * (length - len(row)) for row in sequences]
    return Tokens(jnp.array(ids, jnp.int32), jnp.array([len(row) for row in sequences], jnp.int32))


def nested(tokens: Tokens, axes: int) -> Tokens:
    return jax.tree.map(lambda x: jnp.expand_dims(x, tuple(range(1, 1 + axes))), tokens)


def assert_gradients(found: dict, values: Any, prefix: str, cfg: TransformerConfig) -> None:
    named = dict(hf_write.list_tensors(jax.device_get(found), cfg))
    expected = {
        key.removeprefix(prefix): values[key] for key in values.files if key.startswith(prefix)
    }
    assert named.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(
            named[name], gradient, rtol=1e-4, atol=1e-4 * np.abs(gradient).max(), err_msg=name
        )


@pytest.mark.parametrize("objective", ["dpo", "ipo", "hinge"])
def test_generator_step_is_the_dpo_trainer(objective: str) -> None:
    values = np.load(recorded.FOLDER / "e2e_dpo.npz")
    cfg, params = model("llama")
    _, reference_params = model("llama_ref")
    prompts, replies = [], []
    for ids, seen, counted in zip(
        *(values[k] for k in ("input_ids", "attention_mask", "completion_mask")), strict=True
    ):
        prompts.append(ids[(seen == 1) & (counted == 0)].tolist())
        replies.append(ids[counted == 1].tolist())
    pairs = len(prompts) // 2
    assert prompts[:pairs] == prompts[pairs:]
    users = UserBatch(
        index=jnp.arange(pairs),
        context=rows([[0]] * pairs),  # of the inference model, which has no part here
        turns=nested(rows([prompt[2:] for prompt in prompts[:pairs]]), 1),
        chosen=nested(rows(replies[:pairs], 9), 1),
        rejected=nested(rows(replies[pairs:], 9), 1),
        pair_mask=jnp.ones((pairs, 1), bool),
        pair_number=jnp.arange(pairs)[:, None],
    )
    contexts = nested(rows([prompt[:2] for prompt in prompts[:pairs]]), 1)
    settings = small.replace(small.make_config(), "generator", objective=objective, beta=0.1)
    reference = jax.jit(Scorer(cfg).score_pairs)(reference_params, contexts, users)
    step = jax.jit(small.generator_program(small.make_update(settings, SGD, model=cfg)))
    role = RoleState(jnp.int32(0), params, SGD.init(params))
    after, metrics, _ = step(role, params, reference, contexts, users)
    name = {"dpo": "sigmoid"}.get(objective, objective)
    loss = metrics["generator/loss"]
    np.testing.assert_allclose(
        loss.total / loss.weight, values[f"{name}_loss"], rtol=1e-5, atol=1e-5
    )
    if objective == "dpo":
        assert_gradients(
            jax.tree.map(jnp.subtract, params, after.params), values, "sigmoid_grad/", cfg
        )


def test_policy_loss_through_the_model_is_the_grpo_trainer() -> None:
    values = np.load(recorded.FOLDER / "e2e_grpo.npz")
    cfg, params = model("llama")
    group = 4
    users = len(values["prompt_ids"]) // group
    prompts = [
        ids[mask == 1].tolist()
        for ids, mask in zip(values["prompt_ids"], values["prompt_mask"], strict=True)
    ]
    assert all(
        prompts[u * group] == prompts[u * group + g] for u in range(users) for g in range(group)
    )
    first = prompts[::group]
    replies = [
        ids[mask == 1].tolist()
        for ids, mask in zip(values["completion_ids"], values["completion_mask"], strict=True)
    ]
    answers = jax.tree.map(lambda x: x.reshape(users, 1, group, *x.shape[1:]), rows(replies, 8))
    context, turns = rows([p[:-1] for p in first]), nested(rows([p[-1:] for p in first]), 1)
    reference, advantages, mask, recorded_logps, entropies = (
        jnp.asarray(values[key]).reshape(users, group, -1)
        for key in (
            "ref_per_token_logps",
            "advantages",
            "completion_mask",
            "policy_per_token_logps",
            "policy_entropies",
        )
    )
    mask = mask == 1
    objective = PolicyObjective(
        normalise="sequences", kl_coef=0.04, kl_corrected=True
    )  # TRL 1.16 corrects by default

    def loss_fn(params: dict) -> tuple[jax.Array, Any]:
        tree = Tree(context, turns, answers)
        scores = score_answers(params, tree, model=cfg, entropies=True)
        scores = jax.tree.map(lambda x: x[:, 0], tuple(scores))
        old = jax.lax.stop_gradient(scores[0])
        sums = policy_sums(scores[0], old, reference, advantages[..., 0], mask, objective=objective)
        return policy_loss(sums, objective=objective), scores

    (loss, scores), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    np.testing.assert_array_equal(scores[1], mask)
    np.testing.assert_allclose(
        np.asarray(scores[0])[mask], np.asarray(recorded_logps)[mask], atol=5e-5
    )
    np.testing.assert_allclose(np.asarray(scores[2])[mask], np.asarray(entropies)[mask], atol=5e-5)
    np.testing.assert_allclose(loss, values["loss_grpo_kl004"], atol=1e-5)
    assert_gradients(gradient, values, "grad/", cfg)
