"""Where the values lie that other implementations computed. Tests that need them are skipped where
they are absent."""

import os
import pathlib

import numpy as np
import pytest

BESIDE = pathlib.Path(__file__).parents[3] / "shared" / "oracles"
FOLDER = pathlib.Path(os.environ.get("POPI_ORACLES", BESIDE))
needed = pytest.mark.skipif(
    not FOLDER.exists(), reason=f"no recorded values of TRL in {FOLDER} (POPI_ORACLES)"
)


def load(name: str) -> dict[str, np.ndarray]:
    """The arrays of one file, none where it is absent."""
    path = FOLDER / name
    return dict(np.load(path)) if path.exists() else {}
