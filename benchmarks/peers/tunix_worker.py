"""Times Tunix's DPOTrainer and GRPOLearner. Runs with the Python of .venv-peers/tunix.

    python -m benchmarks.peers.tunix_worker

Only the public interface is used: configurations, data, reward functions, and
`tunix.rl.common.compute_per_token_logps` in the reward of "popi". The trainers' loops run as they
are; they pause where they ask for the next batch, once all that was dispatched is done. A step is
all that happens from one such request to the next.

What is set for speed, or against waste:
- float32, all steps under jit (the default), one device and one mesh, so rollout and trainer share
  their weights;
- the model is Tunix's Llama3 with tied weights, no rematerialisation (the default);
- generation with a KV cache of exactly the tokens that there will be, no filter of the sampled
  distribution, Tunix's own sampler (no vLLM, no SGLang);
- one optimizer step per rollout, so no forward for the old policy; all sequences in one batch;
- no checkpoints, no evaluation, no metrics kept on disk;
- the reward of "popi": all pairs of a user at once, without gradient.
Tunix computes the logits of all positions and keeps those of the replies: it offers no other way
for this model.

Tunix stores no log-probs of the reference. Under "+stored_reference" DPOTrainer has no reference
model at all, which its interface allows: such a step computes what one with stored log-probs would,
but for a subtraction per reply.

Texts are ids in digits with a tokenizer that reads them, so lengths are exact. The ids of padding
and of the end lie outside the vocabulary: no sample can end early, and no sampled token is taken
for padding."""

import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.rl import common, rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout
from tunix.sft.dpo import dpo_trainer

from benchmarks.peers import protocol
from benchmarks.peers.protocol import Cost, Parts, Pause, Paused, Running
from benchmarks.workloads import Geometry, Workload

NEVER = 1_000_000


class Digits:
    """The tokenizer: the text "5 17" is the ids 5 and 17."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        return None

    def pad_id(self) -> int:
        return self._vocab_size

    def eos_id(self) -> int:
        return self._vocab_size + 1


def make_model(geometry: Geometry, seed: int) -> nnx.Module:
    """Random weights in all matrices; Tunix starts those of the feed-forward at 0."""
    config = llama.ModelConfig(
        num_layers=geometry.num_layers,
        vocab_size=geometry.vocab_size,
        embed_dim=geometry.embed_dim,
        hidden_dim=geometry.mlp_dim,
        num_heads=geometry.num_heads,
        head_dim=geometry.head_dim,
        num_kv_heads=geometry.num_kv_heads,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=True,
    )
    model = llama.Llama3(config, rngs=nnx.Rngs(seed))
    random = np.random.default_rng(seed)
    state = nnx.state(model)
    nnx.update(
        model,
        jax.tree.map(
            lambda x: (
                jax.numpy.asarray(random.normal(0, 0.02, x.shape), x.dtype) if x.ndim > 1 else x
            ),
            state,
        ),
    )
    return model


def make_optimizer() -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(protocol.MAX_GRAD_NORM),
        optax.adamw(protocol.LEARNING_RATE, weight_decay=0.0),
    )


class Forwards:
    """Notes the shapes that models are traced with while it is attached."""

    def __init__(self) -> None:
        self._shapes: set[str] = set()
        self._original = original = llama.Llama3.__call__

        @functools.wraps(original)
        def noted(
            model: Any, input_tokens: Any, positions: Any, cache: Any, attention_mask: Any
        ) -> Any:
            kind = "" if cache is None else " with cache"
            self._shapes.add(f"{input_tokens.shape[0]}x{input_tokens.shape[1]}{kind}")
            return original(model, input_tokens, positions, cache, attention_mask)

        llama.Llama3.__call__ = noted

    def take(self) -> dict[str, Any]:
        llama.Llama3.__call__ = self._original
        return {"forwards": sorted(self._shapes)}


def make_preference_loop(
    work: Workload, geometry: Geometry, stored_reference: bool
) -> tuple[nnx.Module, Callable[[Pause], None]]:
    """The model of a DPOTrainer and its loop."""
    policy = make_model(geometry, seed=0)
    trainer = dpo_trainer.DPOTrainer(
        model=policy,
        ref_model=None if stored_reference else nnx.clone(policy),
        optimizer=make_optimizer(),
        training_config=dpo_trainer.DPOTrainingConfig(
            eval_every_n_steps=NEVER, beta=protocol.DPO_BETA
        ),
    )
    random = np.random.default_rng(0)
    shared_len = work.summary_len if work.kind == "popi" else work.signals_len

    def batches(pause: Pause) -> Iterator[dpo_trainer.TrainingInput]:
        def ids(*shape: int) -> np.ndarray:
            return random.integers(0, geometry.vocab_size, shape, dtype=np.int32)

        rows = work.users * work.pairs
        while True:
            shared = np.repeat(ids(work.users, shared_len), work.pairs, axis=0)
            prompts = np.concatenate([shared, ids(rows, work.prompt_len)], axis=1)
            chosen, rejected = ids(rows, work.answer_len), ids(rows, work.answer_len)
            jax.block_until_ready(nnx.state(policy))
            pause()
            yield dpo_trainer.TrainingInput(
                prompt_ids=prompts,
                prompt_mask=np.ones_like(prompts),
                chosen_ids=chosen,
                chosen_mask=np.ones_like(chosen),
                rejected_ids=rejected,
                rejected_mask=np.ones_like(rejected),
            )

    return policy, lambda pause: trainer.train(batches(pause))


def make_policy_loop(
    work: Workload,
    geometry: Geometry,
    parts: Parts,
    reward: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> tuple[nnx.Module, Callable[[Pause], None]]:
    """The model of a GRPOLearner and its loop. `reward` is given the ids of the samples and whose
    they are."""
    tokenizer = Digits(geometry.vocab_size)
    policy = make_model(geometry, seed=0)
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=policy,
        reference=nnx.clone(policy),
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=make_optimizer(), eval_every_n_steps=NEVER, max_steps=NEVER
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=work.summary_len,
                max_prompt_length=work.signals_len,
                kv_cache_size=work.signals_len + work.summary_len,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
                eos_tokens=[tokenizer.eos_id()],
            ),
        ),
    )
    cluster.generate = parts.wrap("rollout", cluster.generate)

    def reward_samples(
        prompts: list[str], completions: list[str], user: np.ndarray, **kwargs: Any
    ) -> list[float]:
        samples = [tokenizer.encode(text) for text in completions]
        lengths = {len(ids) for ids in samples}
        if lengths != {work.summary_len} or len(samples) != work.users * work.group:
            raise ValueError(f"{len(samples)} samples of {lengths} tokens")
        return reward(np.array(samples, np.int32), np.array(user)).tolist()

    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        algo_config=grpo_learner.GRPOConfig(
            num_generations=work.group, num_iterations=1, beta=protocol.KL_BETA, epsilon=0.2
        ),
        reward_fns=parts.wrap("reward", reward_samples),
    )
    random = np.random.default_rng(0)
    trained = cluster.actor_trainer.model

    def batches(pause: Pause) -> Iterator[dict[str, Any]]:
        while True:
            signals = random.integers(0, geometry.vocab_size, (work.users, work.signals_len))
            prompts = np.array([tokenizer.decode(ids.tolist()) for ids in signals])
            jax.block_until_ready(nnx.state(trained))
            pause()
            yield {"prompts": prompts, "user": np.arange(work.users)}

    return trained, lambda pause: learner.train(batches(pause))


def make_margin_reward(
    work: Workload, geometry: Geometry, generator: nnx.Module
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Mean over the user's pairs of log sigmoid(beta * (log-prob of chosen - of rejected)) behind
    the summary."""
    random = np.random.default_rng(1)
    tokenizer = Digits(geometry.vocab_size)
    shape = work.users, 2 * work.pairs, work.prompt_len + work.answer_len  # chosen, then rejected
    turns = random.integers(0, geometry.vocab_size, shape, dtype=np.int32)

    def reward(samples: np.ndarray, user: np.ndarray) -> np.ndarray:
        graphdef, state = nnx.split(generator)
        logps = []
        for start in range(0, len(samples), work.group):  # the samples of one user at a time
            summaries = samples[start : start + work.group, None].repeat(2 * work.pairs, axis=1)
            rows = np.concatenate([summaries, turns[user[start : start + work.group]]], axis=-1)
            rows = rows.reshape(-1, rows.shape[-1])
            logps.append(
                common.compute_per_token_logps(
                    graphdef,
                    state,
                    prompt_tokens=rows[:, : -work.answer_len],
                    completion_tokens=rows[:, -work.answer_len :],
                    pad_id=tokenizer.pad_id(),
                    eos_id=tokenizer.eos_id(),
                )
            )
        sums = np.concatenate(logps).sum(-1).reshape(len(samples), 2, work.pairs)
        margins = protocol.DPO_BETA * (sums[:, 0] - sums[:, 1])
        return -np.logaddexp(0.0, -margins).mean(-1)

    return reward


def average_ids(samples: np.ndarray, user: np.ndarray) -> np.ndarray:
    return samples.mean(-1)


def compute_checksum(model: nnx.Module) -> float:
    return float(
        sum(np.abs(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(nnx.state(model)))
    )


def open_workload(name: str, geometry: Geometry) -> Running:
    work, stored_reference = protocol.find_workload(name)
    parts = Parts()
    loops: dict[str, Paused] = {}
    trained: dict[str, nnx.Module] = {}
    if work.kind in ("dpo", "popi"):
        trained["dpo"], loop = make_preference_loop(work, geometry, stored_reference)
        loops["dpo"] = Paused(loop)
    if work.kind in ("grpo", "popi"):
        reward = (
            make_margin_reward(work, geometry, trained["dpo"])
            if work.kind == "popi"
            else average_ids
        )
        trained["grpo"], loop = make_policy_loop(work, geometry, parts, reward)
        loops["grpo"] = Paused(loop, parts)

    def step() -> Cost:
        return protocol.step_loops(loops)

    forwards = Forwards()
    first = protocol.make_first_step(step, trained, compute_checksum)
    counts = forwards.take()
    notes = (
        ["no reference model at all: Tunix cannot store its log-probs"] if stored_reference else []
    )
    return Running(step, counts, notes, first)


if __name__ == "__main__":
    packages = ("google-tunix", "jax", "flax", "optax")
    protocol.serve(
        "tunix",
        open_workload,
        {package: importlib.metadata.version(package) for package in packages},
    )
