"""Reads the weights of Hugging Face model folders (safetensors), without torch or transformers."""

import contextlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

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
THREADS = 8
BLOCK_ROWS = 128  # of a tensor, that a thread reads at a time
GAP = 64  # bytes or numbers between two rows of a block
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


class Numbers(NamedTuple):
    """A type of numbers that files hold."""

    dtype: np.dtype
    bits: np.dtype  # as whole numbers
    exponent: int  # its bits, all of which are set in what is not finite


TYPES = {
    "F32": Numbers(DTYPES["float32"], np.dtype(np.uint32), 0x7F800000),
    "BF16": Numbers(DTYPES["bfloat16"], np.dtype(np.uint16), 0x7F80),
    "F16": Numbers(np.dtype(np.float16), np.dtype(np.uint16), 0x7C00),
}


class Stored(NamedTuple):
    """A tensor in an open file."""

    path: Path
    file: int  # descriptor
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    start: int  # byte in the file


Tensors = dict[str, Stored]  # by its name in the table


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

        pool = stack.enter_context(ThreadPoolExecutor(THREADS))

        def read_part(weight: hf_names.Weight, part: hf_names.Index, dtype: Any) -> np.ndarray:
            def read(name: str, index: hf_names.Index) -> Iterator[tuple[int, np.ndarray]]:
                return _read_blocks(name, tensors[name], index, np.dtype(dtype))

            return hf_names.read_part(weight, part, read, cfg, dtype, pool.map)

        def make_leaf(weight: hf_names.Weight) -> Any:
            if abstract is None:
                whole = (slice(None),) * (weight.stacked + len(weight.shape))
                return read_part(weight, whole, np.float32)
            spec = hf_names.find_leaf(abstract, weight)
            places: dict[tuple, list[Any]] = {}  # spans of a part -> the devices that hold it
            for device, index in spec.sharding.addressable_devices_indices_map(spec.shape).items():
                spans = zip(index, spec.shape, strict=True)
                key = tuple(axis.indices(size)[:2] for axis, size in spans)
                places.setdefault(key, []).append(device)
            parts: list[jax.Array] = []
            for key, devices in places.items():
                part = tuple(slice(*span) for span in key)
                x = read_part(weight, part, spec.dtype)
                parts += [jax.device_put(x, device) for device in devices]
                jax.block_until_ready(parts)  # or the host would hold several parts at a time
            return jax.make_array_from_single_device_arrays(spec.shape, spec.sharding, parts)

        return hf_names.build_tree(make_leaf, cfg)


def _open_folder(folder: Path, stack: contextlib.ExitStack) -> Tensors:
    """Headers of all files; of a folder with a vision tower, the text model under the names that it
    has alone.

    Raises: UserError if a file is absent, cut short or broken, or index and files differ."""
    if (folder / WHOLE).is_file():  # before an index, as transformers does
        weight_map, files = None, [WHOLE]
    elif (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(
                f'{folder / INDEX}: the object "weight_map" is missing; fetch the file again'
            )
        files = sorted(set(weight_map.values()))
    else:
        found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise UserError(
            f"{folder}: needs {WHOLE} or {INDEX}, found {found}; convert the weights to safetensors"
        )
    tensors: Tensors = {}
    for path in (folder / file for file in files):
        tensors |= _open(path, stack)
    for name, file in (weight_map or {}).items():
        if name not in tensors or tensors[name].path != folder / file:
            raise UserError(
                f"{folder / file}: {name} is missing, {INDEX} says that it is there; fetch the "
                "folder again"
            )
    unlisted = sorted(tensors.keys() - (weight_map or tensors).keys())
    if unlisted:
        tensor = tensors[unlisted[0]]
        raise UserError(
            f"{tensor.path}: {unlisted[0]} of shape {list(tensor.shape)} is not listed in {INDEX}; "
            "fetch the folder again"
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
        way_out = "use a folder whose files belong together"
        if missing == [_HEAD]:
            way_out = "set tie_word_embeddings to true in it if the head is the embedding"
        raise UserError(
            f"{folder}: config.json asks for {len(missing)} tensors that no file holds, first "
            f"{missing[0]} of shape {list(expected[missing[0]])}; {way_out}"
        )
    extra = sorted(tensors.keys() - expected.keys() - unused)
    if extra:
        tensor = tensors[extra[0]]
        raise UserError(
            f"{tensor.path}: {len(extra)} tensors are not of the model of config.json, first "
            f"{extra[0]} of shape {list(tensor.shape)}; use a folder whose files belong together"
        )
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.path}: {name} has shape {list(tensor.shape)}, config.json says "
                f"{list(shape)}; use a folder whose files belong together"
            )
        if tensor.dtype not in TYPES:
            raise UserError(
                f"{tensor.path}: {name} is {tensor.dtype}, allowed are {', '.join(TYPES)}; use the "
                "folder of the unquantised model"
            )


def _check_head(folder: Path, tensors: Tensors, cfg: TransformerConfig) -> None:
    """That a head which a tied model stores is its embedding. Some rows at a time are in memory."""
    if not cfg.tied_embeddings or _HEAD not in tensors:
        return

    def read(name: str) -> Iterator[np.ndarray]:
        whole = tuple(slice(0, size) for size in tensors[name].shape)
        return (x for _, x in _read_blocks(name, tensors[name], whole, np.dtype(np.float32)))

    same = tensors[_HEAD].shape == tensors[_TABLE].shape
    if not same or not all(map(np.array_equal, read(_HEAD), read(_TABLE))):
        raise UserError(
            f"{tensors[_HEAD].path}: {_HEAD} is not {_TABLE}, but config.json says that they are "
            f"tied; set tie_word_embeddings to false in {folder / 'config.json'} to use it, or "
            "remove it"
        )


def _read_blocks(
    name: str, tensor: Stored, index: hf_names.Index, dtype: np.dtype
) -> Iterator[tuple[int, np.ndarray]]:
    """The part of a tensor that `index` selects, in blocks of some rows: (first row, [rows,
    columns] in `dtype`). A tensor of one axis is one row, and its blocks have one axis.

    The memory of a block is that of the next. Its rows lie a little apart: where they begin at
    multiples of a power of two, they push each other out of a cache when they are transposed.
    Raises: UserError if a number is not finite, or the file ends."""
    *lead, columns = index
    rows = lead[0] if lead else slice(0, 1)
    kind, bits, exponent = TYPES[tensor.dtype]
    size, width = kind.itemsize, (columns.stop - columns.start) * kind.itemsize
    count = min(BLOCK_ROWS, rows.stop - rows.start)
    memory = np.empty((count, width + GAP), np.uint8)[:, :width]
    other = np.empty((count, width // size + GAP), dtype)[:, : width // size]
    masked = np.empty((count, width // size), bits)
    lines = [memoryview(line) for line in memory]
    row_bytes = tensor.shape[-1] * size
    for first in range(rows.start, rows.stop, count):
        n = min(count, rows.stop - first)
        at = tensor.start + first * row_bytes + columns.start * size
        if width == row_bytes:
            _read_lines(tensor.path, tensor.file, lines[:n], at)
        else:
            for i in range(n):
                _read_lines(tensor.path, tensor.file, lines[i : i + 1], at + i * row_bytes)
        numbers = memory[:n].view(bits)
        if np.bitwise_and(numbers, exponent, out=masked[:n]).max(initial=0) == exponent:
            raise UserError(
                f"{tensor.path}: {name} of shape {list(tensor.shape)} holds numbers that are not "
                "finite; use another copy of the weights"
            )
        block = numbers.view(kind)
        if tensor.dtype == "BF16" and dtype == np.float32:  # many times faster than its cast
            block = np.left_shift(numbers, 16, out=other[:n].view(np.uint32), dtype=np.uint32)
            block = block.view(np.float32)
        elif kind != dtype:
            other[:n] = block
            block = other[:n]
        yield (first - rows.start, block) if lead else (0, block[0])


def _read_lines(path: Path, file: int, lines: list[memoryview], at: int) -> None:
    """Fills the lines with what lies in the file from byte `at` on, one after the other."""
    try:
        done = os.preadv(file, lines, at)
        if done == sum(map(len, lines)):
            return
        for line in lines:  # the system gave less than it was asked for
            filled = 0
            while filled < len(line):
                got = os.preadv(file, [line[filled:]], at + filled)
                if not got:
                    raise UserError(f"{path}: ends at byte {at + filled}; fetch it again")
                filled += got
            at += len(line)
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}; fetch it again") from e


def _open(path: Path, stack: contextlib.ExitStack) -> Tensors:
    """What a file holds, after safetensors has checked that it is whole."""
    try:
        with safe_open(path, framework="numpy"):
            pass
        file = os.open(path, os.O_RDONLY)
    except (OSError, SafetensorError) as e:
        raise UserError(
            f"{path}: {_find_cut(path) or f'cannot be read as safetensors: {e}'}; fetch it again"
        ) from e
    stack.callback(os.close, file)
    start, header = _read_header(path)
    return {
        name: Stored(path, file, x["dtype"], tuple(x["shape"]), start + x["data_offsets"][0])
        for name, x in header.items()
    }


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a file begin, and what its header says of each."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    return start, {name: x for name, x in header.items() if name != "__metadata__"}


def _find_cut(path: Path) -> str:
    """Which tensor a file that ends too early lacks first; "" when something else is wrong with
    it."""
    try:
        start, header = _read_header(path)
        size = path.stat().st_size
        ends = sorted((x["data_offsets"][1] + start, name) for name, x in header.items())
        end, name = next((end, name) for end, name in ends if end > size)
    except (OSError, ValueError, KeyError, TypeError, StopIteration, MemoryError, OverflowError):
        return ""
    shape = header[name]["shape"]
    return f"is cut short: {name} of shape {shape} ends at byte {end}, the file at {size}"
