"""Made rows in the format of AlignX, P-Soups and UF-P-4, and the files that hold them. Fields: the
README and the scripts of github.com/JinaLeejnl/AlignX."""

import gzip
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from popi_jax.config import from_config_dict
from popi_jax.config_data import DataConfig
from popi_jax.data import prepared
from popi_jax.data.records import User
from popi_jax.data.sources.source import Loaded
from popi_jax.errors import UserError

Rows = list[dict[str, Any]]
COMMENTS, PAIRS = "User-Generated Content", "Pair-wise Comparative Feedback"
DIRECTIONS, DEMOGRAPHICS = "Preference Direction", "Demographic Information"
TESTS = ("DEMO", "PAIR", "UGC", "arbitrary")
PERSONAS = ("Generate a reply that is cheerful.", "Generate a reply that is gloomy.")


def direct(**axes: float) -> list[float]:
    """Directions, neutral but for those given: a47=1."""
    return [float(axes.get(f"a{i}", 0.5)) for i in range(90)]


def make_row(
    n: int, comments: int = 4, pairs: int = 4, demographics: bool = True
) -> dict[str, Any]:
    """Even people like science (47) and are young (0), odd ones do not and are older."""
    pole = float(n % 2 == 0)
    item = direct(a47=pole, a3=pole)
    return {
        "prompt": f"what of post {n} ?",
        "chosen": f"good reply {n}",
        "rejected": f"bad reply {n}",
        DIRECTIONS: direct(a0=pole, a47=pole),
        DEMOGRAPHICS: f"person {n} lives in town {n}" if demographics else "",
        COMMENTS: [
            {"prompt": f"seen {n} {i}", "comment": f"said {n} {i}", DIRECTIONS: item}
            for i in range(comments)
        ],
        PAIRS: [
            {
                "prompt": f"past {n} {i}",
                "chosen": f"liked {n} {i}",
                "rejected": f"disliked {n} {i}",
                DIRECTIONS: item,
            }
            for i in range(pairs)
        ],
    }


def make_rows(count: int, first: int = 0, **changes: Any) -> Rows:
    return [make_row(n, **changes) for n in range(first, first + count)]


def make_tests(count: int, first: int) -> dict[str, Rows]:
    """The four published files: the same targets in the same order, `profile` added, and of the
    signals those of the file."""
    made: dict[str, Rows] = {}
    for test in TESTS:
        rows = make_rows(count, first)
        for n, row in enumerate(rows):
            row["profile"] = "PUBLISHED PROFILE"
            if test == "DEMO" or (test == "arbitrary" and n % 3 == 0):
                row[COMMENTS], row[PAIRS] = [], []
            if test in ("PAIR", "UGC"):
                row[DEMOGRAPHICS] = ""
                row[{"PAIR": COMMENTS, "UGC": PAIRS}[test]] = []
        made[f"Reddit_{test}"] = rows
    return made


def make_personas(
    targets: int, draws: int, personas: Sequence[str] = PERSONAS, pool: int = 8
) -> Rows:
    """P-Soups: each persona answers the same prompts, each target occurs with several draws of 4
    past pairs from a pool; sorted by persona."""
    return [
        {
            "prompt": f"write about thing {target}",
            "chosen": f"thing {target} as persona {p} has it",
            "rejected": f"thing {target} as nobody has it",
            "ground_truth_persona": persona,
            "profile": "DERIVED PROFILE",
            PAIRS: [
                {
                    "prompt": f"name example {i % pool}",
                    "chosen": f"example {i % pool} for persona {p}",
                    "rejected": f"example {i % pool} for nobody",
                }
                for i in range(target + 2 * draw, target + 2 * draw + 4)
            ],
        }
        for p, persona in enumerate(personas)
        for target in range(targets)
        for draw in range(draws)
    ]


def write(path: Path, rows: Rows) -> Path:
    """By the ending: .parquet, .json (an array), .jsonl, the latter two also with .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    lines = path.name.removesuffix(".gz").endswith(".jsonl")
    text = "".join(json.dumps(r) + "\n" for r in rows) if lines else json.dumps(rows, indent=4)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_published(folder: Path, rows: Rows, tests: dict[str, Rows], shards: int = 2) -> Path:
    """As the hub has them: shards of parquet, test files as JSON arrays."""
    size = -(-len(rows) // shards)
    for n in range(shards):
        part = rows[n * size : (n + 1) * size]
        write(folder / "train" / f"train-{n:05d}-of-{shards:05d}.parquet", part)
    for name, of_test in tests.items():
        write(folder / "test" / f"{name}.json", of_test)
    return folder


def make_options(name: str, path: Path, **changes: Any) -> DataConfig:
    """The data settings of `configs/<name>.py`."""
    config = importlib.import_module(f"configs.{name}").get_config("scale=laptop")
    own = {"path": str(path), "prepared": str(path.parent / "prepared"), "download": False}
    config.data.update({**own, "validation_fraction": 0.1, "test_fraction": 0.2, **changes})
    return from_config_dict(config).data


def load(name: str, path: Path, **changes: Any) -> tuple[list[User], Loaded]:
    """The users of a source, split by target where nothing else is said, and what else it says."""
    cfg = make_options(name, path, **{"split_by": "target"} | changes)
    source = prepared.find_source(name)
    loaded = source.load(source.find(cfg, cfg.download), cfg)
    return list(loaded.users), loaded


def refuse(name: str, path: Path, **changes: Any) -> str:
    """The one line of the refusal."""
    with pytest.raises(UserError) as caught:
        load(name, path, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)
