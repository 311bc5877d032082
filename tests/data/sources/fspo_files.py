"""Made rows of ELIX, Review and Roleplay in files as the publishers have them on the hub: parquet
shards, or lines of JSON with gzip. Columns: official code f88878c6 and FSPO's loader."""

import gzip
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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
    """The persona is a text, an object or the JSON of one, in turn."""
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
