"""Writes adapters as a directory that `peft` loads onto the base: adapter_config.json,
adapter_model.safetensors."""

import math
from pathlib import Path

import numpy as np

from popi_jax.arrays import Params
from popi_jax.checkpoints import hf_names, hf_write
from popi_jax.models.transformer import TransformerConfig


def write_adapter(
    folder: Path,
    lora: Params,
    cfg: TransformerConfig,
    *,
    alpha: float,
    base: str,
    revision: str | None = None,
    decoder: str = "model",
) -> None:
    """Writes into an existing folder, float32. peft multiplies by alpha / rank, so `lora` holds A
    and B without it.

    `base` is what peft loads the base model by: its name on the hub, with the commit as `revision`,
    or its folder. `decoder` is where its class keeps the decoder: "model" in all text models,
    "model.language_model" in a Gemma 3 with a vision tower."""
    tensors: dict[str, np.ndarray] = {}
    modules: set[str] = set()
    rank = 0
    for weight in hf_names.list_weights(cfg):
        group, name = weight.path[1:3] if len(weight.path) == 4 else ("", "")
        adapter = lora["layers"].get(group, {}).get(name)
        if adapter is None or weight.path[-1] != "kernel":
            continue
        a, b = np.asarray(adapter["a"], np.float32), np.asarray(adapter["b"], np.float32)
        rank = a.shape[-1]
        fan_out, fan_in = weight.stored_shape
        for i, stored in enumerate(weight.names(cfg)):
            module = stored.removesuffix(".weight")
            module = module.replace("model.", f"base_model.model.{decoder}.", 1)
            modules.add(module.split(".")[-1])
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a[i].reshape(fan_in, rank).T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b[i].reshape(rank, fan_out).T)
    expected = 2 * cfg.num_layers * sum(len(members) for members in lora["layers"].values())
    if len(tensors) != expected:
        raise ValueError(
            f"{len(tensors)} of {expected} adapter tensors belong to a kernel of this model"
        )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": alpha if alpha != math.floor(alpha) else int(alpha),
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    hf_write.write_json(folder / "adapter_config.json", config)
    hf_write.save_tensors(tensors, folder / "adapter_model.safetensors")
