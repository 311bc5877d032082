"""Reads the weights of Hugging Face model folders (safetensors), without torch or transformers."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from popi_jax.arrays import Params
from popi_jax.checkpoints import hf_names
from popi_jax.checkpoints.hf_config import read_json
from popi_jax.errors import UserError
from popi_jax.models.transformer import TransformerConfig

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
COMPARED_BYTES = 2**26  # at most, of an embedding and a head at a time
_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
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

Tensors = dict[str, tuple[Path, Any]]  # name in the table -> (file, what safetensors calls a slice)


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
        _check_head(folder, tensors, cfg)

        def read(name: str, index: hf_names.Index) -> np.ndarray:
            path, stored = tensors[name]
            try:
                x = stored[index]
            except SafetensorError as e:
                raise UserError(f"{path}: cannot read {name}: {e}") from e
            if not _is_finite(x):
                raise UserError(
                    f"{path}: {name} of shape {stored.get_shape()} holds numbers that are not "
                    "finite"
                )
            return x

        def make_leaf(weight: hf_names.Weight) -> Any:
            if abstract is None:
                whole = (slice(None),) * (weight.stacked + len(weight.shape))
                return hf_names.read_part(weight, whole, read, cfg, np.float32)
            spec = hf_names.find_leaf(abstract, weight)
            places: dict[tuple, list[Any]] = {}  # spans of a part -> the devices that hold it
            for device, index in spec.sharding.addressable_devices_indices_map(spec.shape).items():
                spans = zip(index, spec.shape, strict=True)
                key = tuple(axis.indices(size)[:2] for axis, size in spans)
                places.setdefault(key, []).append(device)
            parts: list[jax.Array] = []
            for key, devices in places.items():
                part = tuple(slice(*span) for span in key)
                x = hf_names.read_part(weight, part, read, cfg, spec.dtype)
                parts += [jax.device_put(x, device) for device in devices]
                jax.block_until_ready(parts)  # or the host would hold several parts at a time
            return jax.make_array_from_single_device_arrays(spec.shape, spec.sharding, parts)

        return hf_names.build_tree(make_leaf, cfg)


def _open_folder(folder: Path, stack: contextlib.ExitStack) -> Tensors:
    """Headers of all files; of a folder with a vision tower, the text model under the names that it
    has alone.

    Raises: UserError if a file is absent, cut short or broken, or index and files differ."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f'{folder / INDEX}: the object "weight_map" is missing')
        files = sorted(set(weight_map.values()))
    elif (folder / WHOLE).is_file():
        weight_map, files = None, [WHOLE]
    else:
        found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise UserError(
            f"{folder}: needs {WHOLE} or {INDEX}, found {found}; convert the weights to safetensors"
        )
    tensors: Tensors = {}
    for path in (folder / file for file in files):
        opened = stack.enter_context(_open(path))
        tensors |= {name: (path, opened.get_slice(name)) for name in opened.keys()}
    for name, file in (weight_map or {}).items():
        if name not in tensors or tensors[name][0] != folder / file:
            raise UserError(f"{folder / file}: {name} is missing, {INDEX} says that it is there")
    unlisted = sorted(tensors.keys() - (weight_map or tensors).keys())
    if unlisted:
        path, tensor = tensors[unlisted[0]]
        raise UserError(
            f"{path}: {unlisted[0]} of shape {tensor.get_shape()} is not listed in {INDEX}"
        )
    text = {name: where for name, where in tensors.items() if not name.startswith(_VISION)}
    return {_strip_prefix(name): where for name, where in text.items()}


def _strip_prefix(name: str) -> str:
    for prefix, replacement in _TEXT.items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def _check_names(folder: Path, tensors: Tensors, cfg: TransformerConfig) -> None:
    expected = hf_names.list_stored_shapes(cfg)
    # a constant that old exports hold
    unused = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}
    if cfg.tied_embeddings:
        unused.add(_HEAD)
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise UserError(
            f"{folder}: config.json asks for {len(missing)} tensors that no file holds, first "
            f"{missing[0]} of shape {list(expected[missing[0]])}"
        )
    extra = sorted(tensors.keys() - expected.keys() - unused)
    if extra:
        path, tensor = tensors[extra[0]]
        raise UserError(
            f"{path}: {len(extra)} tensors are not of the model of config.json, first {extra[0]} "
            f"of shape {tensor.get_shape()}"
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


def _check_head(folder: Path, tensors: Tensors, cfg: TransformerConfig) -> None:
    """That a head which a tied model stores is its embedding. Some rows at a time are in memory."""
    if not cfg.tied_embeddings or _HEAD not in tensors:
        return
    (path, head), (_, table) = tensors[_HEAD], tensors[_TABLE]
    rows, width = cfg.vocab_size, 4 * cfg.embed_dim
    step = max(1, COMPARED_BYTES // width)
    spans = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
    same = head.get_shape() == table.get_shape() and all(
        _equal(head[span], table[span]) for span in spans
    )
    if not same:
        raise UserError(
            f"{path}: {_HEAD} is not {_TABLE}, but config.json says that they are tied; set "
            f"tie_word_embeddings to false in {folder / 'config.json'} to use it, or remove it"
        )


def _equal(x: np.ndarray, y: np.ndarray) -> bool:
    if x.dtype == y.dtype and np.array_equal(x.view(np.uint8), y.view(np.uint8)):
        return True
    return np.array_equal(x.astype(np.float32), y.astype(np.float32))


def _is_finite(x: np.ndarray) -> bool:
    if x.dtype == ml_dtypes.bfloat16:  # several times faster than its isfinite
        return not bool(np.any((x.view(np.uint16) & 0x7F80) == 0x7F80))
    return bool(np.isfinite(x).all())


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        file = safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as e:
        raise UserError(
            f"{path}: {_find_cut(path) or f'cannot be read as safetensors: {e}'}; fetch it again"
        ) from e
    with file:
        yield file


def _find_cut(path: Path) -> str:
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
