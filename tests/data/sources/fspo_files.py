"""Made rows of ELIX, Review and Roleplay in files as the publishers have them on the hub: parquet
shards, or lines of JSON with gzip. Columns: official code f88878c6 and FSPO's loader."""

import gzip
import importlib
import itertools
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
LEVELS = ("child", "preteen", "teenager", "young adult", "expert")
WISHES = ("negative", "positive", "concise", "verbose")
WISHES += ("positive+concise", "negative+concise", "positive+verbose", "negative+verbose")


def make_elix(prompts: int, *, first: int = 0, levels: Sequence[str] = LEVELS) -> Rows:
    """Every level judges the replies for each two levels; it prefers the nearer one."""
    rows = []
    for n in range(first, first + prompts):
        for (i, x), (j, y) in itertools.combinations(enumerate(levels), 2):
            for k, scorer in enumerate(levels):
                swap = (n + i + j + k) % 2
                (a, level_x), (b, level_y) = ((j, y), (i, x)) if swap else ((i, x), (j, y))
                rows.append(
                    {
                        "prompt": f"why does thing {n} fall ?",
                        "response_x": f"answer {n} for the {level_x}",
                        "response_y": f"answer {n} for the {level_y}",
                        "level_x": level_x,
                        "level_y": level_y,
                        "level_id_x": a,
                        "level_id_y": b,
                        "model_name_x": "gpt-4o-mini",
                        "model_name_y": "gpt-4o-mini",
                        "scorer_level": scorer,
                        "scorer_level_id": k,
                        "label": int(abs(b - k) < abs(a - k)),
                        "det_choice": True,
                    }
                )
    return rows


def make_review(prompts: int, *, first: int = 0) -> Rows:
    rows = make_elix(prompts, first=first, levels=WISHES)
    for row in rows:
        row["prompt"] = row["prompt"].replace("why does thing", "review the film")
    return rows


def make_roleplay(people: int, prompts: int, *, first: int = 0) -> Rows:
    """Personas are objects, as parquet keeps them."""
    rows = []
    for person in range(people):
        text = f"Person {person} keeps bees and dislikes long words."
        about = {"persona_description": text, "name": f"n{person}"}
        for n in range(first, first + prompts):
            rows.append(
                {
                    "x": f"how was day {n} ?",
                    "yw": f"day {n} was good , says {person}",
                    "yl": f"day {n} was dull , says {person}",
                    "level": person,
                    "score_persona": about,
                }
            )
    return rows


def write_parquet(folder: Path, split: str, rows: Rows, shards: int = 1) -> list[Path]:
    """As the hub names them: data/train-00000-of-00002-<hash>.parquet."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    size = -(-len(rows) // shards)
    paths = []
    for n in range(shards):
        name = f"{split}-{n:05d}-of-{shards:05d}-{n:016x}.parquet"
        table = pa.Table.from_pylist(rows[n * size : (n + 1) * size])
        pq.write_table(table, folder / "data" / name)
        paths.append(folder / "data" / name)
    return paths


def write_jsonl(path: Path, rows: Rows) -> Path:
    """.jsonl, or .jsonl.gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_published(folder: Path, train: Rows, test: Rows, shards: int = 2) -> Path:
    write_parquet(folder, "train", train, shards)
    write_parquet(folder, "test", test)
    return folder


def make_options(name: str, folder: Path, **changes: Any) -> DataConfig:
    """The data settings of `configs/<name>.py`."""
    config = importlib.import_module(f"configs.{name}").get_config("scale=laptop")
    config.data.update(
        {
            "path": str(folder),
            "prepared": str(folder.parent / "prepared"),
            "download": False,
            "validation_fraction": 0.2,
            **changes,
        }
    )
    return from_config_dict(config).data


def load(name: str, folder: Path, **changes: Any) -> tuple[list[User], Loaded]:
    """The users of a source, with the form and splits that "" stands for, and what else it says."""
    source = prepared.find_source(name)
    cfg = make_options(name, folder, **{"form": source.forms[0], "split_by": "published"} | changes)
    loaded = source.load(source.find(cfg, cfg.download), cfg)
    return list(loaded.users), loaded


def refuse(name: str, folder: Path, **changes: Any) -> str:
    """The one line of the refusal."""
    with pytest.raises(UserError) as caught:
        load(name, folder, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)
