"""Review of FSPO (arXiv 2502.19312): people who want reviews to be positive or negative, concise or
verbose, or two of these.

A person is such a wish (`scorer_level`); its rows, one preference each, are cut into blocks of past
and held-out pairs (data/blocks.py), each a user. Column names: official code f88878c6 and FSPO's
loader; the files themselves were not seen."""

import functools
from pathlib import Path
from typing import Any

from popi_jax.data.blocks import Cut, Preference, Splitting
from popi_jax.data.json_rows import Row
from popi_jax.data.sources import fspo
from popi_jax.data.sources.source import Card, Loaded, Source

REPOSITORY = "Asap7772/steered_reviews_full_autolabel_gpt4o_pref"
SINGLE, ALL = FORMS = ("single", "all")
ONE_WISH = ("negative", "positive", "concise", "verbose")
TWO_WISHES = ("positive+concise", "negative+concise", "positive+verbose", "negative+verbose")
COMBINED = "the level is two wishes (data.form=all takes them)"


def load(path: Path, cfg: Any) -> Loaded:
    """Reads the rows of the form `single`, whose level is one wish, or `all`. Raises: UserError."""
    how = Splitting(cfg.split_by, cfg.validation_fraction, cfg.test_fraction, few_people=True)
    cut = Cut(cfg.num_shots, cfg.num_pairs, cfg.passes)
    kind = fspo.Kind("review", functools.partial(_parse, form=cfg.form), few_people=True)
    return fspo.load(path, kind, how, cut, cfg.on_bad_row)


def _parse(row: Row, form: str) -> Preference:
    found = fspo.parse_scored(row)
    fspo.check_level(row, found.person, ONE_WISH + TWO_WISHES)
    wishes = found.person.replace("+", " and ")
    found = found._replace(oracle=f"This user prefers {wishes} reviews.")
    if form == SINGLE and found.person not in ONE_WISH:
        return found._replace(left_out=COMBINED)
    return found


SOURCE = Source(
    name="review",
    kind="published",
    card=Card(
        title="Review (FSPO, arXiv 2502.19312)",
        citation=fspo.CITATION,
        page=f"huggingface.co/datasets/{REPOSITORY}",
        licence=fspo.LICENCE,
        counts={"levels": 8},
        not_published="numbers of rows and of prompts; the licence of the files; a validation "
        "split",
    ),
    options=fspo.OPTIONS,
    files=fspo.list_files,
    load=load,
    find=functools.partial(fspo.find_folder, repository=REPOSITORY),
    forms=FORMS,
    splits=fspo.SPLITS,
)
