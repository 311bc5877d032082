"""The cheapest change of a configuration that does not fit: changes in the order of what they cost,
first estimated, then compiled."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from popi_jax.config import Config
from popi_jax.errors import UserError
from popi_jax.planning import plan
from popi_jax.planning.plan import Plan
from popi_jax.planning.target import Target


class Change(NamedTuple):
    fields: dict[str, Any]  # field of the configuration -> value

    def to_flags(self) -> str:
        shown = {name: _show_value(value) for name, value in self.fields.items()}
        return " ".join(f"--config.{name}={value}" for name, value in shown.items())

    def apply(self, config: Config) -> Config:
        for name, value in self.fields.items():
            config = _replace_field(config, name.split("."), value)
        return config


def _replace_field(section: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    inner = _replace_field(getattr(section, name), rest, value) if rest else value
    return dataclasses.replace(section, **{name: inner})


def list_changes(config: Config, num_devices: int, rules: tuple[str, ...]) -> Iterator[Change]:
    """The changes to try, the cheapest first: more microbatches and rematerialisation cost a little
    arithmetic, other sizes of the mesh, with the layout `rules`, communication, fewer users
    throughput; adapters are another training."""
    b, mesh = config.batch, config.mesh
    splits = [n for n in range(b.microbatches + 1, b.users + 1) if b.users % n == 0]
    yield from (Change({"batch.microbatches": n}) for n in splits)
    if config.model.remat not in ("auto", "full"):
        yield Change({"model.remat": "full"})
        yield from (Change({"model.remat": "full", "batch.microbatches": n}) for n in splits)
    data = max(mesh.data, 1)
    for tensor in (2, 4, 8, 16):
        if num_devices % (data * tensor) == 0:
            shape: dict[str, Any] = {"mesh.fsdp": num_devices // data // tensor}
            shape |= {"mesh.tensor": tensor, "mesh.rules": rules, "model.remat": "full"}
            for n in (b.microbatches, *splits):
                yield Change({**shape, "batch.microbatches": n})
    for users in sorted((n for n in range(1, b.users) if b.users % n == 0), reverse=True):
        yield Change({"batch.users": users, "batch.microbatches": 1, "model.remat": "full"})
    has_adapters = config.generator.lora.rank or config.inference.lora.rank
    if config.model.checkpoint and not has_adapters:
        adapters = {"generator.lora.rank": 16, "inference.lora.rank": 16, "model.remat": "full"}
        for n in (b.microbatches, *splits):
            yield Change({**adapters, "batch.microbatches": n})


def find_fitting_changes(
    config: Config, target: Target, available: float, rules: tuple[str, ...]
) -> Iterator[tuple[Change, Plan, float]]:
    """The changes that are estimated to fit, with their bytes per device."""
    for change in list_changes(config, len(target.devices), rules):
        try:
            planned = plan.make_plan(change.apply(config), target)
        except UserError:  # does not divide
            continue
        expected = estimate_bytes(planned)
        if expected < available:
            yield change, planned, expected


def estimate_bytes(planned: Plan) -> float:
    """Bytes per device of an update without compiling it: arguments exactly, and the largest of
    what its parts hold at a time. Within a third of what compilers need for models of billions of
    parameters."""
    return sum(plan.count_state_bytes(planned).values()) + max(
        estimate_temporaries(planned).values()
    )


def estimate_temporaries(planned: Plan) -> dict[str, float]:
    """Bytes per device that sampling, rewards and each gradient step hold beside the arguments."""
    model, c, shards = planned.model, planned.config, planned.count_shards
    rules, number = model.rules, planned.number_bytes
    users = c.batch.users / c.batch.microbatches / shards(rules.batch) / shards(rules.seq)
    texts = planned.told_len + c.batch.pairs * (c.data.turn_len + 2 * c.data.answer_len)
    tokens = {
        "rewards": users * (c.inference.group_size - 1) * texts,
        "generator step": users * texts,
        "inference step": users
        * (c.data.context_len + c.inference.group_size * c.data.summary_len),
    }
    wide = 4 * model.mlp_dim / shards(rules.mlp) + 8 * model.embed_dim
    head = model.embed_dim * model.vocab_size / shards(rules.vocab) * (number + 4)
    params = sum(math.prod(x.shape) for x in jax.tree.leaves(planned.trained))
    rollout = params * number / shards(model.rollout_rules.mlp)
    found = {
        "sampling": rollout + plan.count_cache_bytes(planned),
        "rewards": tokens["rewards"] * wide * number + head,
    }
    gradients = 3 * plan.count_bytes_per_device(planned.trained)
    layers = model.num_layers if c.model.remat == "full" else 8 * model.num_layers
    for name in ("generator step", "inference step"):
        saved = layers * tokens[name] * model.embed_dim * number
        found[name] = saved + tokens[name] * wide * number + 2 * head + gradients
    return found


def _show_value(value: Any) -> str:
    return "'" + ",".join(value) + "'" if isinstance(value, tuple) else str(value)
