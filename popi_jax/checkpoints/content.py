"""What weights are, by the content of their files: never by their place, or when they were
written."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from etils import epath

from popi_jax.errors import UserError

_CHUNK = 16 * 2**20
_WEIGHTS = ("*.safetensors", "config.json")  # of a Hugging Face folder


class Hashes:
    """Hashes of folders. A large one is read once: what was found is kept in a file, beside the
    sizes and times of its files, which say whether it still holds."""

    def __init__(self, kept: str | os.PathLike[str], write: Callable[[epath.Path, str], None]):
        self._path, self._write = epath.Path(kept), write
        try:
            self._known = dict(json.loads(self._path.read_text()))
        except (OSError, ValueError, TypeError):
            self._known = {}

    def hash_saved(self, folder: epath.Path) -> str:
        """Of all files of a folder, such as one item of a checkpoint."""
        return self._find(folder, _list_files(folder))

    def hash_model(self, folder: str) -> str:
        """Of the weights and the shape of a Hugging Face folder."""
        files = [path for pattern in _WEIGHTS for path in sorted(Path(folder).glob(pattern))]
        return self._find(epath.Path(folder), [epath.Path(path) for path in files])

    def _find(self, folder: epath.Path, files: Sequence[epath.Path]) -> str:
        if not files:
            raise UserError(f"{folder}: no weights there")
        stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
        seen = [[name, stat.length, stat.mtime] for name, stat in stats]
        known = self._known.get(str(folder.resolve()), {})
        if known.get("files") == seen:
            return known["sha256"]
        whole = hashlib.sha256()
        for path, (name, stat) in zip(files, stats, strict=True):
            whole.update(f"{name} {stat.length}\n".encode())
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    whole.update(chunk)
        found = whole.hexdigest()[:24]
        self._known[str(folder.resolve())] = {"files": seen, "sha256": found}
        self._write(self._path, json.dumps(self._known, indent=1) + "\n")
        return found


def _list_files(folder: epath.Path) -> list[epath.Path]:
    """All files below a folder, which may lie in a bucket, in order."""
    if not folder.is_dir():
        return []
    parts = sorted(folder.iterdir())
    return [file for p in parts for file in (_list_files(p) if p.is_dir() else [p])]
