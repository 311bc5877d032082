"""ELIX of FSPO (arXiv 2502.19312): five levels of knowledge, from child to expert, that judged
explanations.

A person is a level (`scorer_level`); its rows, one preference each, are cut into blocks of past and
held-out pairs (data/blocks.py), each a user. Column names: official code f88878c6 and FSPO's
loader; the files themselves were not seen."""

import functools
from pathlib import Path
from typing import Any

from popi_jax.data.blocks import Cut, Preference, Splitting
from popi_jax.data.json_rows import Row
from popi_jax.data.sources import fspo
from popi_jax.data.sources.source import Card, Loaded, Source

REPOSITORY = "Asap7772/elix_generations_autolabel"
OWN_LEVEL, ALL = FORMS = ("own_level", "all")
OF_OTHERS = "both replies are for levels other than scorer_level (data.form=all takes them)"


def load(path: Path, cfg: Any) -> Loaded:
    """Reads the rows of the form `own_level`, one of whose replies was written for the level that
    judged them, or `all`. Raises: UserError."""
    how = Splitting(cfg.split_by, cfg.validation_fraction, cfg.test_fraction, few_people=True)
    cut = Cut(cfg.num_shots, cfg.num_pairs, cfg.passes)
    kind = fspo.Kind("elix", functools.partial(_parse, form=cfg.form), few_people=True)
    return fspo.load(path, kind, how, cut, cfg.on_bad_row)


def _parse(row: Row, form: str) -> Preference:
    found = fspo.parse_scored(row)
    found = found._replace(oracle=f"The user is {found.person}.")
    if form == OWN_LEVEL and found.person not in (row.get_text("level_x"), row.get_text("level_y")):
        return found._replace(left_out=OF_OTHERS)
    return found


SOURCE = Source(
    name="elix",
    kind="published",
    card=Card(
        title="ELIX (FSPO, arXiv 2502.19312)",
        citation=fspo.CITATION,
        page=f"huggingface.co/datasets/{REPOSITORY}",
        licence=fspo.LICENCE,
        counts={"levels": 5},
        not_published="numbers of rows and of prompts; the licence of the files; a validation "
        "split; which model wrote a reply is told (model_name_x), but not read",
    ),
    options=fspo.OPTIONS,
    files=fspo.list_files,
    load=load,
    find=functools.partial(fspo.find_folder, repository=REPOSITORY),
    forms=FORMS,
    splits=fspo.SPLITS,
)
