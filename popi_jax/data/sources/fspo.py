"""What ELIX, Review and Roleplay share, the three sets of FSPO (arXiv 2502.19312): files of the
publisher, rows, splits and blocks.

Files, as the hub has them or as one saves them: in a folder, or in data/ inside of it, one or more
of .parquet, .jsonl, .json (JSON also with .gz) with "train" or "test" in their names, such as
train-00000-of-00002-1a2b.parquet; or a single file, which has no published splits. The rows of all
files are in memory, each different text once."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from popi_jax.data import blocks
from popi_jax.data.blocks import Cut, Preference, Splitting
from popi_jax.data.json_rows import Row, shorten, stream_rows
from popi_jax.data.sources import download
from popi_jax.data.sources.source import Loaded
from popi_jax.errors import UserError, did_you_mean

CITATION = (
    "Singh et al., FSPO: Few-Shot Preference Optimization of Synthetic Preference Data in LLMs "
    "Elicits Effective Personalization to Real Users, 2025"
)
LICENCE = (
    "none stated: the code repository has no licence file and the dataset card was not seen; read "
    "it before you share weights that were trained on it."
)
SPLITS = ("published", "target", "user")
OPTIONS = (
    *("on_bad_row", "form", "split_by", "validation_fraction", "test_fraction"),
    *("num_shots", "num_pairs", "passes"),
)
REVISION = "main"  # no commit could be seen; SOURCE.json records the one that was fetched
PATTERNS = ("train*", "test*", "data/train*", "data/test*", "README.md")
ENDS = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz")
NO_DATA = (download.RECORD, "dataset_info.json", "dataset_infos.json")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\b")


class Kind(NamedTuple):
    """What one of the three sets differs in."""

    name: str
    parse: Callable[[Row], Preference]
    few_people: bool  # levels, of which a table can show each


def find_folder(cfg: Any, may_download: bool, repository: str) -> Path:
    """Returns `data.path`, into which the files are downloaded when there are none.

    Raises: FilesMissing when there are none and none can be had."""
    path = Path(cfg.path)
    if path.is_file() or _list_data(path):
        return path
    page = f"huggingface.co/datasets/{repository}"
    fix = f"Put the train and test files of {page} there ({', '.join(ENDS)})"
    fix += ", or set data.path to their folder."

    def fetch() -> None:
        download.download_hub(path, repository, cfg.revision or REVISION, PATTERNS)

    return download.fill_folder(path, may_download, fetch, missing="data files", fix=fix)


def list_files(path: Path) -> list[Path]:
    """Returns the files that `load` reads. Raises: UserError, see `find_splits`."""
    return [file for files in find_splits(path).values() for file in files]


def find_splits(path: Path) -> dict[str, list[Path]]:
    """Returns "train" and "test" -> their files in order, or "" -> the single file that `path` is.

    Raises: UserError where a file cannot be told to be of one split, or a split is there twice, or
    not whole."""
    if not path.is_dir():
        if path.exists() and not path.name.endswith(ENDS):
            told = f"{path}: found a file of another kind, allowed: {', '.join(ENDS)}"
            raise UserError(f"{told}, or a folder of them. Check the field data.path.")
        return {"": [path]}
    found: dict[str, list[Path]] = {}
    for file in _list_data(path):
        words = {"train", "test"} & {*re.split(r"[^a-z]+", file.name.lower())}
        if len(words) != 1:
            told = f"{file}: found {' and '.join(sorted(words)) or 'no split'} in the name"
            fix = "Rename it, move it away, or give data.path as one file."
            raise UserError(f'{told}, allowed: either "train" or "test". {fix}')
        found.setdefault(words.pop(), []).append(file)
    for split, files in found.items():
        _check_whole(split, files)
    if not found:
        fix = f"Put {', '.join(ENDS)} with train and test in their names there."
        raise UserError(f"{path}: found no data file (field data.path). {fix}")
    return dict(sorted(found.items()))


def load(path: Path, kind: Kind, how: Splitting, cut: Cut, on_bad_row: str) -> Loaded:
    """Reads all rows now; users are made while they are read.

    Raises: UserError."""
    if cut.num_shots < 1:
        allowed = f"at least 1 for {kind.name}, whose only signals are past pairs"
        raise UserError(f'field "data.num_shots": found {cut.num_shots}, allowed: {allowed}')
    files = find_splits(path)
    if how.by == "published" and {*files} != {"train", "test"}:
        there = ", ".join(str(file) for file in list_files(path))
        told = f'field "data.split_by": found "published", but {shorten(there, 200)} '
        told += "is not a folder of train and test files"
        raise UserError(f"{told}. Add the other file, or set data.split_by=target.")
    rows: list[Preference] = []
    published: list[str] = []
    bad_rows: list[str] = []
    known: dict[str, str] = {}  # many rows share prompts and replies
    for split, of_split in files.items():
        for file in of_split:
            for row in stream_rows(file, kind.parse, on_bad_row, bad_rows):
                rows.append(Preference(*(known.setdefault(text, text) for text in row)))
                published.append(split)
    groups, left_out = blocks.group_rows(rows, blocks.choose_splits(rows, published, how))
    counts = {"rows": len(rows) + len(bad_rows)}
    counts["levels" if kind.few_people else "people"] = len({row.person for row in rows})
    planned = blocks.plan_users(kind.name, groups, cut, left_out)
    users = (blocks.make_user(each, grouped=kind.few_people) for each in planned)
    return Loaded(users, bad_rows, left_out, counts, total=len(planned))


def parse_scored(row: Row) -> Preference:
    """A row of ELIX and Review: `scorer_level` preferred `response_x` where `label` is 0, else
    `response_y`. The oracle stays empty. Raises: UserError."""
    person = row.get_text("scorer_level")
    prompt = row.get_text("prompt")
    x, y = row.get_text("response_x"), row.get_text("response_y")
    label = row.get_value("label", "a whole number: 0 where response_x is preferred")
    whole = isinstance(label, int) or (isinstance(label, float) and label.is_integer())
    if not whole or isinstance(label, bool):
        allowed = "a whole number: 0 where response_x is preferred, another for response_y"
        raise row.make_error("label", label, allowed, "Correct the value.")
    check_differs(row, "response_x", x, "response_y", y)
    return Preference(person, prompt, *((x, y) if label == 0 else (y, x)), oracle="")


def check_differs(row: Row, first: str, x: str, second: str, y: str) -> None:
    """Raises UserError when the replies are equal."""
    if x == y:
        fix = "Remove the row, or set data.on_bad_row=skip."
        raise row.make_error(second, y, f'a text other than "{first}"', fix)


def check_level(row: Row, person: str, levels: tuple[str, ...]) -> None:
    """Raises UserError for another level than those of the set."""
    if person not in levels:
        hint = did_you_mean(person, levels).strip() or "Correct the value."
        raise row.make_error("scorer_level", person, f"one of {', '.join(levels)}", hint)


def _list_data(folder: Path) -> list[Path]:
    """The data files of a folder, or of data/ inside of it. Raises: UserError for files in both."""
    inside = folder / "data"
    here, there = (
        sorted(p for p in place.iterdir() if p.name.endswith(ENDS) and p.name not in NO_DATA)
        if place.is_dir()
        else []
        for place in (folder, inside)
    )
    if here and there:
        told = f"{folder}: found {here[0].name} and also data/{there[0].name}"
        raise UserError(f"{told}, allowed: files in one of the two. Move the others away.")
    return here or there


def _check_whole(split: str, files: list[Path]) -> None:
    """Raises UserError unless the files are one format, and all shards of one set."""
    ends = {max((end for end in ENDS if f.name.endswith(end)), key=len) for f in files}
    told = f"{files[0].parent}: found {shorten(', '.join(f.name for f in files), 200)}"
    if len(ends) > 1:
        fix = "Move the others away, or their rows are read twice."
        raise UserError(f"{told}, allowed: {split} files of one format. {fix}")
    shards = [_SHARD.search(file.name) for file in files]
    numbers = [(int(s[1]), int(s[2])) for s in shards if s]
    if numbers and numbers != [(n, len(files)) for n in range(len(files))]:
        total = max(of for _, of in numbers)
        lacking = sorted({*range(total)} - {n for n, _ in numbers})
        lacks = f"; missing: {', '.join(f'{n:05d}' for n in lacking[:5])}" if lacking else ""
        fix = "Fetch all shards of one commit again."
        raise UserError(f"{told}, allowed: each of {total} shards once{lacks}. {fix}")
