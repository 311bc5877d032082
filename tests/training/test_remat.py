"""What is computed again in the backward pass: chosen by what fits."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import pytest

from popi_jax.models.transformer import TransformerConfig
from popi_jax.popi.update import popi_update
from popi_jax.training import abstract, remat, setup
from popi_jax.training.remat import POLICIES, Need
from tests.oracles.plain import MODEL
from tests.training import small

KEPT = {"dots": 4e9, "full": 1e9}


@pytest.mark.parametrize(
    ("available", "policy"), [(40e9, "dots"), (9e9, "dots"), (8e9, "full"), (0, "full")]
)
def test_the_first_that_fits(available: float, policy: str) -> None:
    assert Need(available, 2e9, KEPT).choose() == policy


def test_what_is_kept_of_a_slot() -> None:
    kept = [remat.count_kept_bytes(MODEL, policy) for policy in ("none", *POLICIES)]
    assert kept == sorted(kept, reverse=True) and kept[-1] > 0
    # the stream between the layers, and what the head and the embedding keep
    layers, width = MODEL.num_layers, 4 * MODEL.embed_dim
    assert layers * width <= kept[-1] <= (layers + 6) * width
    deeper = dataclasses.replace(MODEL, num_layers=2 * layers)
    assert remat.count_kept_bytes(deeper, "none") > 1.8 * kept[0]


def test_the_largest_gradient_pass_counts() -> None:
    cfg = small.make_config()
    d = cfg.data
    summaries = 8 * (d.context_len + 2 + 3 * d.summary_len)
    pairs = 8 * (3 + d.summary_len + 2 * (d.turn_len + 2 * d.answer_len))
    assert remat.count_slots(cfg, small.GLUE) == max(summaries, pairs)
    halved = small.replace(cfg, "batch", microbatches=2)
    assert remat.count_slots(halved, small.GLUE) == max(summaries, pairs) // 2
    warm = small.replace(cfg, "warmup", steps=1, summary_users=100)
    assert remat.count_slots(warm, small.GLUE) > 100 * d.context_len


def test_an_estimate_is_near_what_the_compiler_needs() -> None:
    """Of a step whose activations are most of it; neither much less nor twice as much."""
    model = TransformerConfig(
        vocab_size=512,
        num_layers=6,
        embed_dim=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=192,
    )
    lengths = {"context_len": 256, "summary_len": 4, "turn_len": 5, "answer_len": 4}
    cfg = small.replace(small.make_config(), "data", **lengths)
    with jax.set_mesh(small.make_mesh(1, 1, 1)):
        for policy in POLICIES:
            chosen = dataclasses.replace(model, remat=policy)
            made = small.make_update(cfg, model=chosen, phases=("inference 1",))
            roles = small.roles_of(made)
            state = setup.abstract_state(chosen, roles, small.make_mesh(1, 1, 1), cfg)
            frozen = setup.own_params(made.plan, state)
            need = remat.estimate_need(cfg, chosen, small.GLUE, (state, frozen), 1e12)
            users = abstract.abstract_users(cfg, chosen, small.make_mesh(1, 1, 1))
            update = jax.jit(partial(popi_update, **made._asdict()))
            compiled = update.lower(state, frozen, users).compile()
            temporaries = compiled.memory_analysis().temp_size_in_bytes
            assert need.kept[policy] < temporaries
            assert temporaries < remat.SLACK * need.kept[policy] + need.fixed


def test_free_memory_is_within_the_limit_of_the_group(tmp_path: Path) -> None:
    assert remat.read_free_memory(tmp_path) == 0
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert remat.read_free_memory(tmp_path) == 4000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1000\n")
    (group / "memory.max").write_text("max\n")
    assert remat.read_free_memory(tmp_path) == 4000 * 1024
    (group / "memory.max").write_text("3000\n")
    assert remat.read_free_memory(tmp_path) == 2000
    assert remat.find_memory() > 0
