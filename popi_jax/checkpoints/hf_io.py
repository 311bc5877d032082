"""Reads and writes the weights of Hugging Face model folders (safetensors), without torch or
transformers."""

import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from popi_jax.arrays import Params
from popi_jax.checkpoints import hf_names
from popi_jax.checkpoints.hf_config import hf_config, read_json
from popi_jax.errors import UserError
from popi_jax.models.transformer import TransformerConfig

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
MARK_FILE = (
    "popi_jax.json"  # the same of a folder that holds adapters, whose own files have no room for it
)
MARK = "popi_jax"  # key of config.json by which we know a folder as our own export
_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"


def read_params(
    folder: str | Path, cfg: TransformerConfig, abstract: Params | None = None
) -> Params:
    """Returns the weights of a folder as our tree.

    abstract: the tree of jax.ShapeDtypeStruct with shardings that says where each part shall lie
    and in which dtype; each host reads only the slices of its devices, one at a time. None: float32
    numpy arrays, whole.

    Names and shapes of all tensors are checked before any is read. Raises: UserError if a file is
    absent, cut short or broken, or a tensor is missing, unknown, of another shape or type, or not
    finite."""
    folder = Path(folder)
    with contextlib.ExitStack() as stack:
        tensors = _open_folder(folder, stack)
        _check_names(folder, tensors, cfg)

        def read(name: str, index: hf_names.Index) -> np.ndarray:
            path, stored = tensors[name]
            try:
                x = stored[index]
            except SafetensorError as e:
                raise UserError(f"{path}: cannot read {name}: {e}") from e
            if not _all_finite(x):
                raise UserError(
                    f"{path}: {name} of shape {stored.get_shape()} holds numbers that are not finite"
                )
            return x

        def leaf(row: hf_names.Row) -> Any:
            if abstract is None:
                whole = (slice(None),) * (row.stacked + len(row.shape))
                return hf_names.read_part(row, whole, read, cfg, np.float32)
            spec: Any = functools.reduce(lambda node, part: node[part], row.path, abstract)
            parts: dict[Any, jax.Array] = {}  # device -> its part
            places: dict[tuple, list[Any]] = {}
            for device, index in spec.sharding.addressable_devices_indices_map(spec.shape).items():
                key = tuple(
                    axis.indices(size)[:2] for axis, size in zip(index, spec.shape, strict=True)
                )
                places.setdefault(key, []).append(device)
            for key, devices in places.items():
                x = hf_names.read_part(
                    row, tuple(slice(*span) for span in key), read, cfg, spec.dtype
                )
                parts |= {device: jax.device_put(x, device) for device in devices}
                jax.block_until_ready(
                    list(parts.values())
                )  # or the host would hold several parts at a time
            return jax.make_array_from_single_device_arrays(
                spec.shape, spec.sharding, list(parts.values())
            )

        return hf_names.build_tree(leaf, cfg)


def write_model(
    folder: Path,
    params: Params,
    cfg: TransformerConfig,
    *,
    dtype: str,
    max_len: int,
    special_ids: dict[str, int],
    mark: dict[str, Any],
    model_type: str = "",
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Writes config.json, generation_config.json and the weights into an existing folder.

    `mark` is stored in config.json under `popi_jax`, by which the folder is known as an export;
    `model_type` as in `hf_config`. One file of weights at a time is in memory."""
    config = hf_config(
        cfg, dtype=dtype, max_len=max_len, special_ids=special_ids, model_type=model_type
    ) | {MARK: mark}
    _write_json(folder / "config.json", config)
    ids = {
        name: value
        for name, value in config.items()
        if name.endswith("_token_id") and value is not None
    }
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})

    sizes = {
        name: int(np.prod(shape)) * DTYPES[dtype].itemsize
        for name, shape in hf_names.stored_shapes(cfg).items()
    }
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
    tensors = hf_names.to_hf(
        params, cfg
    )  # in the order of `sizes`, so that one shard at a time is in memory
    for file, names in zip(files, shards, strict=True):
        shard = {}
        for expected in names:
            name, x = next(tensors)
            assert name == expected, (name, expected)
            shard[name] = x.astype(DTYPES[dtype])
        save_file(shard, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        _write_json(
            folder / _INDEX,
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map},
        )


@contextlib.contextmanager
def new_export(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target` that takes its name at the end; on an error nothing
    has changed.

    Raises: UserError if `target` is a file, or a folder that holds something other than an earlier
    export."""
    if target.exists() and not _may_replace(target):
        raise UserError(
            f'--out: "{target}" holds something other than an earlier export; move it or give another --out'
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


def _may_replace(target: Path) -> bool:
    if not target.is_dir():
        return False
    if not any(target.iterdir()) or (target / MARK_FILE).is_file():
        return True
    try:
        return MARK in json.loads((target / "config.json").read_text())
    except (OSError, ValueError):
        return False


Tensors = dict[str, tuple[Path, Any]]  # name in the table -> (file, what safetensors calls a slice)


def _open_folder(folder: Path, stack: contextlib.ExitStack) -> Tensors:
    """Headers of all files; of a folder with a vision tower, the text model under the names that it
    has alone.

    Raises: UserError if a file is absent, cut short or broken, or index and files differ.
    """
    if (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f'{folder / _INDEX}: the object "weight_map" is missing')
        files = sorted(set(weight_map.values()))
    elif (folder / _WHOLE).is_file():
        weight_map, files = None, [_WHOLE]
    else:
        found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise UserError(
            f"{folder}: needs {_WHOLE} or {_INDEX}, found {found}; convert the weights to safetensors"
        )
    tensors: Tensors = {}
    for path in (folder / file for file in files):
        opened = stack.enter_context(_open(path))
        tensors |= {name: (path, opened.get_slice(name)) for name in opened.keys()}
    for name, file in (weight_map or {}).items():
        if name not in tensors or tensors[name][0] != folder / file:
            raise UserError(f"{folder / file}: {name} is missing, {_INDEX} says that it is there")
    unlisted = sorted(tensors.keys() - weight_map.keys()) if weight_map is not None else []
    if unlisted:
        path, tensor = tensors[unlisted[0]]
        raise UserError(
            f"{path}: {unlisted[0]} of shape {tensor.get_shape()} is not listed in {_INDEX}"
        )
    return {_alone(name): where for name, where in tensors.items() if not name.startswith(_VISION)}


_VISION = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
_TEXT = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}


def _alone(name: str) -> str:
    for prefix, replacement in _TEXT.items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def _check_names(folder: Path, tensors: Tensors, cfg: TransformerConfig) -> None:
    expected = hf_names.stored_shapes(cfg)
    unused = {
        name for name in tensors if name.endswith("rotary_emb.inv_freq")
    }  # a constant that old exports hold
    if cfg.tied_embeddings:
        unused.add("lm_head.weight")
    missing, extra = (
        sorted(expected.keys() - tensors.keys()),
        sorted(tensors.keys() - expected.keys() - unused),
    )
    if missing:
        first = f"{missing[0]} of shape {list(expected[missing[0]])}"
        raise UserError(
            f"{folder}: config.json asks for {len(missing)} tensors that no file holds, first {first}"
        )
    if extra:
        path, tensor = tensors[extra[0]]
        first = f"{extra[0]} of shape {tensor.get_shape()}"
        raise UserError(
            f"{path}: {len(extra)} tensors are not of the model of config.json, first {first}"
        )
    for name, shape in expected.items():
        path, tensor = tensors[name]
        if tuple(tensor.get_shape()) != shape:
            raise UserError(
                f"{path}: {name} has shape {tensor.get_shape()}, config.json says {list(shape)}"
            )
        if tensor.get_dtype() not in ("F32", "BF16", "F16"):
            raise UserError(
                f"{path}: {name} is {tensor.get_dtype()}, allowed are F32, BF16 and F16"
            )


def _all_finite(x: np.ndarray) -> bool:
    if x.dtype == ml_dtypes.bfloat16:  # several times faster than its isfinite
        return not bool(np.any((x.view(np.uint16) & 0x7F80) == 0x7F80))
    return bool(np.isfinite(x).all())


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        file = safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as e:
        raise UserError(
            f"{path}: {_cut_short(path) or f'cannot be read as safetensors: {e}'}; fetch it again"
        ) from e
    with file:
        yield file


def _cut_short(path: Path) -> str:
    """Which tensor a file that ends too early lacks first; "" when something else is wrong with
    it."""
    try:
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
        size = path.stat().st_size
        ends = sorted(
            (x["data_offsets"][1] + start, name)
            for name, x in header.items()
            if name != "__metadata__"
        )
        end, name = next((end, name) for end, name in ends if end > size)
    except (OSError, ValueError, KeyError, TypeError, StopIteration, MemoryError, OverflowError):
        return ""
    shape = header[name]["shape"]
    return f"is cut short: {name} of shape {shape} ends at byte {end}, the file at {size}"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
