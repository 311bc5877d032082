"""Reads and writes Hugging Face model folders (Llama layout, safetensors), without torch or transformers."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from popi_jax.arrays import Params
from popi_jax.checkpoints import hf_names
from popi_jax.errors import UserError
from popi_jax.models.transformer import TransformerConfig

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
MARK = "popi_jax"  # key of config.json by which we know a folder as our own export
_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"


def hf_config(cfg: TransformerConfig, *, dtype: str, max_len: int, special_ids: dict[str, int]) -> dict[str, Any]:
    """Returns the config.json of a `LlamaForCausalLM`, in the spellings of transformers 4 and 5.

    `max_len` is in tokens, `special_ids` maps `bos_token_id`, `eos_token_id`, `pad_token_id` to ids; absent means none.
    """
    ids = {name: special_ids.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.embed_dim,
        "intermediate_size": cfg.mlp_dim,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_len,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "tie_word_embeddings": cfg.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
        **ids,
    }


def read_config(folder: str | Path, *, dtype: str = "float32", remat: str = "none") -> TransformerConfig:
    """Returns the model that the config.json of a folder describes; `dtype` and `remat` are of our compute.

    Raises: UserError if the file is absent or broken, or describes a model that transformer.py does not compute.
    """
    path = Path(folder) / "config.json"
    c = _read_json(path)
    rope = c.get("rope_parameters") or {}
    scaling = c.get("rope_scaling") or {}
    rope_type = rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    # field -> (found, supported); a field that is absent has the value that Llama gives it
    facts = {
        "model_type": (c.get("model_type"), "llama"),
        "hidden_act": (c.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(c.get("attention_bias", False)), False),
        "mlp_bias": (bool(c.get("mlp_bias", False)), False),
        "rope type": (rope_type, "default"),
        "quantization_config": (c.get("quantization_config"), None),
    }
    for name, (found, supported) in facts.items():
        if found != supported:
            raise UserError(
                f"{path}: {name} is {json.dumps(found)}, supported is {json.dumps(supported)} only; "
                "use an unquantised LlamaForCausalLM without rope scaling or biases"
            )
    try:
        heads, embed = int(c["num_attention_heads"]), int(c["hidden_size"])
        return TransformerConfig(
            vocab_size=int(c["vocab_size"]),
            num_layers=int(c["num_hidden_layers"]),
            embed_dim=embed,
            num_heads=heads,
            num_kv_heads=int(c.get("num_key_value_heads") or heads),
            head_dim=int(c.get("head_dim") or embed // heads),
            mlp_dim=int(c["intermediate_size"]),
            rope_theta=float(rope.get("rope_theta") or c.get("rope_theta") or 10000.0),
            norm_eps=float(c.get("rms_norm_eps", 1e-6)),
            tied_embeddings=bool(c.get("tie_word_embeddings", False)),
            dtype=dtype,
            remat=remat,
        )
    except KeyError as e:
        raise UserError(f"{path}: field {e} is missing; it is needed for a model_type llama") from e
    except (TypeError, ValueError) as e:
        raise UserError(f"{path}: a field has the wrong type: {e}") from e


def read_params(folder: str | Path, cfg: TransformerConfig) -> Params:
    """Returns the weights of a folder as our tree, float32 numpy arrays.

    Raises: UserError if a file is absent or broken, or a tensor is missing, unknown or of another shape.
    """
    folder = Path(folder)
    where = _locate(folder)
    expected = hf_names.stored_shapes(cfg)
    unused = {name for name in where if name.endswith("rotary_emb.inv_freq")}  # a constant that old exports hold
    if cfg.tied_embeddings:
        unused.add("lm_head.weight")
    missing, extra = sorted(expected.keys() - where.keys()), sorted(where.keys() - expected.keys() - unused)
    if missing:
        first = f"{missing[0]} of shape {list(expected[missing[0]])}"
        raise UserError(f"{folder}: config.json asks for {len(missing)} tensors that no file holds, first {first}")
    if extra:
        raise UserError(
            f"{folder}: {len(extra)} tensors are not of the LlamaForCausalLM of config.json, first {extra[0]}"
        )
    with contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(_open(path)) for path in sorted(set(where.values()))}

        def get(name: str) -> np.ndarray:
            path = where[name]
            try:
                found = tuple(files[path].get_slice(name).get_shape())
                if found != expected[name]:
                    raise UserError(f"{path}: {name} has shape {list(found)}, config.json says {list(expected[name])}")
                x = files[path].get_tensor(name)
            except SafetensorError as e:
                raise UserError(f"{path}: cannot read {name}: {e}") from e
            if x.dtype not in (*DTYPES.values(), np.float16):
                raise UserError(f"{path}: {name} is {x.dtype}, allowed are float32, bfloat16 and float16")
            return x

        return hf_names.from_hf(get, cfg)


def write_model(
    folder: Path,
    params: Params,
    cfg: TransformerConfig,
    *,
    dtype: str,
    max_len: int,
    special_ids: dict[str, int],
    mark: dict[str, Any],
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Writes config.json, generation_config.json and the weights into an existing folder.

    `mark` is stored in config.json under `popi_jax`, by which the folder is known as an export.
    """
    config = hf_config(cfg, dtype=dtype, max_len=max_len, special_ids=special_ids) | {MARK: mark}
    _write_json(folder / "config.json", config)
    ids = {name: value for name, value in config.items() if name.endswith("_token_id") and value is not None}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})

    sizes = {name: int(np.prod(shape)) * DTYPES[dtype].itemsize for name, shape in hf_names.stored_shapes(cfg).items()}
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
        files = [_WHOLE]
    tensors = hf_names.to_hf(params, cfg)  # in the order of `sizes`, so that one shard at a time is in memory
    for file, names in zip(files, shards, strict=True):
        shard = {}
        for expected in names:
            name, x = next(tensors)
            assert name == expected, (name, expected)
            shard[name] = x.astype(DTYPES[dtype])
        save_file(shard, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        _write_json(folder / _INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


@contextlib.contextmanager
def new_export(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target` that takes its name at the end; on an error nothing has changed.

    Raises: UserError if `target` is a file, or a folder that holds something other than an earlier export.
    """
    if target.exists() and not _may_replace(target):
        raise UserError(
            f'--out: "{target}" holds something other than an earlier export; move it or give another --out'
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as e:
        raise UserError(f'--out: cannot write in "{target.parent}": {e.strerror}; give another --out') from e
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


def _may_replace(target: Path) -> bool:
    if not target.is_dir():
        return False
    if not any(target.iterdir()):
        return True
    try:
        return MARK in json.loads((target / "config.json").read_text())
    except (OSError, ValueError):
        return False


def _locate(folder: Path) -> dict[str, Path]:
    """Returns tensor name -> file."""
    if (folder / _INDEX).is_file():
        weight_map = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f'{folder / _INDEX}: the object "weight_map" is missing')
        return {name: folder / file for name, file in weight_map.items()}
    if not (folder / _WHOLE).is_file():
        found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: needs {_WHOLE} or {_INDEX}, found {found}; convert the weights to safetensors")
    with _open(folder / _WHOLE) as file:
        return dict.fromkeys(file.keys(), folder / _WHOLE)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        file = safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: cannot be read as safetensors: {e}; fetch the file again") from e
    with file:
        yield file


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; give the folder of a Hugging Face model") from e
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON: {e}") from e
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
