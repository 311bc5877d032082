"""Writes Hugging Face model folders: config.json, weights (safetensors), and the folder as a whole.

What hf_config.py, hf_names.py and hf_io.py read, without torch or transformers."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from popi_jax.arrays import Params
from popi_jax.checkpoints import hf_config, hf_io, hf_names
from popi_jax.errors import UserError
from popi_jax.models.transformer import TransformerConfig

MARK = "popi_jax"  # key of config.json by which we know a folder as our own export
# the same of a folder that holds adapters, whose own files have no room for it
MARK_FILE = "popi_jax.json"
MAX_SHARD_BYTES = 4 * 2**30


def make_config(
    cfg: TransformerConfig,
    *,
    dtype: str,
    max_len: int,
    special_ids: dict[str, int],
    model_type: str = "",
) -> dict[str, Any]:
    """Returns the config.json of a model, in the spellings of transformers 4 and 5.

    `max_len` is in tokens, `special_ids` maps `bos_token_id`, `eos_token_id`, `pad_token_id` to
    ids; absent means none. `model_type` names the family; "" is the first that computes `cfg`.
    Raises: ValueError if the family does not compute `cfg`."""
    model_type = find_family(cfg, model_type)
    ids = {name: special_ids.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = {
        "architectures": [hf_config.FAMILIES[model_type].architecture],
        "model_type": model_type,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.embed_dim,
        "intermediate_size": cfg.mlp_dim,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": next(
            name for name, ours in hf_config.ACTIVATIONS.items() if ours == cfg.activation
        ),
        "max_position_embeddings": max_len,
        "rms_norm_eps": cfg.norm_eps,
        **_make_rope_fields(cfg, model_type),
        "tie_word_embeddings": cfg.tied_embeddings,
        "attention_bias": cfg.out_bias,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
        **ids,
    }
    if model_type == "mistral":
        config["sliding_window"] = cfg.sliding_window
    if model_type in ("qwen2", "qwen3"):
        first = cfg.local_layers.index(True) if cfg.local_layers else cfg.num_layers
        config |= {
            "use_sliding_window": bool(cfg.local_layers),
            "sliding_window": cfg.sliding_window,
        }
        config |= {"max_window_layers": first, "layer_types": _list_layer_types(cfg)}
    if model_type in ("gemma2", "gemma3_text"):
        config |= {
            "hidden_activation": config["hidden_act"],
            "query_pre_attn_scalar": cfg.score_dim or cfg.head_dim,
            "attn_logit_softcapping": cfg.attn_logit_softcap,
            "final_logit_softcapping": cfg.final_logit_softcap,
            "sliding_window": cfg.sliding_window,
            "layer_types": _list_layer_types(cfg),
        }
    return config


def find_family(cfg: TransformerConfig, model_type: str = "") -> str:
    """`model_type`, or the first family that computes `cfg`. Raises: ValueError if it does not
    compute it."""
    model_type = model_type or next(
        (name for name in hf_config.FAMILIES if hf_config.computes(name, cfg)), ""
    )
    if not hf_config.computes(model_type, cfg):
        raise ValueError(f'no such family, or it does not compute this model: "{model_type}"')
    return model_type


def _list_layer_types(cfg: TransformerConfig) -> list[str]:
    return [
        hf_config.LOCAL if local else hf_config.GLOBAL
        for local in cfg.local_layers or (False,) * cfg.num_layers
    ]


def _make_rope_fields(cfg: TransformerConfig, model_type: str) -> dict[str, Any]:
    scaling: dict[str, Any] | None = None
    if cfg.rope_scaling is not None:
        scaling = {"rope_type": cfg.rope_scaling.kind, "factor": cfg.rope_scaling.factor}
        if cfg.rope_scaling.kind == "llama3":
            scaling |= {
                "low_freq_factor": cfg.rope_scaling.low_freq_factor,
                "high_freq_factor": cfg.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": cfg.rope_scaling.original_len,
            }
        elif cfg.rope_scaling.kind == "yarn":
            scaling |= {
                "original_max_position_embeddings": cfg.rope_scaling.original_len,
                "beta_fast": cfg.rope_scaling.beta_fast,
                "beta_slow": cfg.rope_scaling.beta_slow,
                "attention_factor": cfg.rope_scaling.attention_factor,
                "truncate": cfg.rope_scaling.truncate,
            }
    parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": cfg.rope_theta}
    # transformers 5 takes rope_scaling, where there is one, for the whole of rope_parameters, so it
    # holds theta too
    flat = {
        "rope_theta": cfg.rope_theta,
        "rope_scaling": scaling and parameters,
        "rope_parameters": parameters,
    }
    if model_type != "gemma3_text":
        return flat
    local = {"rope_type": "default", "rope_theta": cfg.local_rope_theta}
    by_kind = {"rope_parameters": {hf_config.GLOBAL: parameters, hf_config.LOCAL: local}}
    return flat | by_kind | {"rope_scaling": scaling, "rope_local_base_freq": cfg.local_rope_theta}


def write_model(
    folder: Path,
    params: Params,
    cfg: TransformerConfig,
    config: dict[str, Any],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes config.json, generation_config.json and the weights into an existing folder.

    `config` is that of `make_config`, with what else shall be in the file; its "dtype" is that of
    the weights. One file of weights at a time is in memory."""
    write_json(folder / "config.json", config)
    ids = {k: v for k, v in config.items() if k.endswith("_token_id") and v is not None}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})

    dtype = hf_io.DTYPES[config["dtype"]]
    shapes = hf_names.list_stored_shapes(cfg)
    sizes = {name: int(np.prod(shape)) * dtype.itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(files) == 1:
        files = [hf_io.WHOLE]
    tensors = list_tensors(params, cfg)  # in the order of `sizes`
    weight_map = {}
    for file, names in zip(files, shards, strict=True):
        shard = {}
        for expected in names:
            name, x = next(tensors)
            assert name == expected, (name, expected)
            shard[name] = x.astype(dtype)
            weight_map[name] = file
        save_tensors(shard, folder / file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / hf_io.INDEX, index)


def save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes a safetensors file whose mode is that of any new file: what the umask says.

    The arrays must be C-contiguous. Its metadata says {"format": "pt"}, without which transformers
    4 does not read a file."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(tensors, path, metadata={"format": "pt"})  # which leaves a file of mode 0600
    path.chmod(mode)


def list_tensors(params: Params, cfg: TransformerConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, C-contiguous array) of every tensor, one at a time; dtypes are kept.

    A leaf may be a jax.Array on many devices: one layer of it at a time is brought to the host.
    Raises: KeyError or ValueError if the tree is not that of `cfg`."""
    weights = hf_names.list_weights(cfg)
    extra = set(_list_paths(params)) - {weight.path for weight in weights}
    if extra:
        raise ValueError(f"parameters that have no name in a file: {sorted(extra)}")
    for weight in weights:
        leaf = hf_names.find_leaf(params, weight)
        names = weight.names(cfg)
        expected = (len(names), *weight.shape) if weight.stacked else weight.shape
        if leaf.shape != expected:
            raise ValueError(f"{'/'.join(weight.path)}: shape {leaf.shape}, expected {expected}")
        order = [axis for group in weight.groups for axis in group]
        for i, name in enumerate(names):
            x = np.asarray(leaf[i] if weight.stacked else leaf).transpose(order)
            # safetensors writes the memory of an array as it lies, so a transposed view would be
            # written wrong
            yield name, np.ascontiguousarray(x.reshape(weight.stored_shape))


@contextlib.contextmanager
def open_export(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target` that takes its name at the end; on an error nothing
    has changed.

    Raises: UserError if `target` is a file, or a folder that holds something other than an earlier
    export."""
    if target.exists() and not _may_replace(target):
        raise UserError(
            f'--out: "{target}" holds something other than an earlier export; move it or give '
            "another --out"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as e:
        raise UserError(
            f'--out: cannot write in "{target.parent}": {e.strerror}; give another --out'
        ) from e
    try:
        new.chmod(0o755)
        yield new
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            os.replace(target, old / target.name)
            os.replace(new, target)
            shutil.rmtree(old)
        else:
            os.replace(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _may_replace(target: Path) -> bool:
    if not target.is_dir():
        return False
    if not any(target.iterdir()) or (target / MARK_FILE).is_file():
        return True
    try:
        return MARK in json.loads((target / "config.json").read_text())
    except (OSError, ValueError):
        return False


def _list_paths(tree: Params, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _list_paths(value, (*prefix, name))
        else:
            yield (*prefix, name)
