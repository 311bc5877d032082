"""Roleplay of FSPO (arXiv 2502.19312): personas that prefer one of two replies.

A person is a persona (`level`); its rows, one preference each, are cut into blocks of past and
held-out pairs (data/blocks.py), each a user. Column names: official code f88878c6 and FSPO's
loader; the files themselves were not seen."""

import functools
import json
from pathlib import Path
from typing import Any

from popi_jax.data.blocks import Cut, Preference, Splitting
from popi_jax.data.json_rows import Row
from popi_jax.data.sources import fspo
from popi_jax.data.sources.source import Card, Loaded, Source

REPOSITORY = "sher222/persona-iterative-responses"
TEXT_FIELD = "persona_description"


def load(path: Path, cfg: Any) -> Loaded:
    """Reads the rows. Raises: UserError, also where a level has two personas."""
    how = Splitting(cfg.split_by, cfg.validation_fraction, cfg.test_fraction, few_people=False)
    cut = Cut(cfg.num_shots, cfg.num_pairs, cfg.passes)
    told: dict[str, tuple[str, str]] = {}
    kind = fspo.Kind("roleplay", functools.partial(_parse, told=told), few_people=False)
    return fspo.load(path, kind, how, cut, cfg.on_bad_row)


def _parse(row: Row, told: dict[str, tuple[str, str]]) -> Preference:
    """`told`: level -> its persona and where it was first seen; added to."""
    person = _get_level(row)
    prompt, chosen, rejected = (row.get_text(name) for name in ("x", "yw", "yl"))
    fspo.check_differs(row, "yw", chosen, "yl", rejected)
    persona = _get_persona(row)
    known, first = told.setdefault(person, (persona, row.where))
    if persona != known:
        allowed = f'the persona of level "{person}" at {first}'
        fix = "Give each persona a level of its own, or set data.on_bad_row=skip."
        raise row.make_error("score_persona", persona, allowed, fix)
    return Preference(person, prompt, chosen, rejected, oracle=persona)


def _get_level(row: Row) -> str:
    value = row.get_value("level", "a text or a whole number")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return row.get_text("level")


def _get_persona(row: Row) -> str:
    """The text of `score_persona`, which may be an object that holds it, or the JSON of one."""
    value = row.get_value("score_persona", "the persona in words")
    if isinstance(value, str) and value.strip().startswith("{"):
        allowed = f'a text, or an object {{"{TEXT_FIELD}": text}}, also as JSON'
        try:
            value = json.loads(value)
        except ValueError:
            fix = "Correct the value."
            raise row.make_error("score_persona", value, allowed, fix) from None
    if isinstance(value, dict):
        return Row(row.where, value, f"{row.path}score_persona.").get_text(TEXT_FIELD)
    return row.get_text("score_persona")


SOURCE = Source(
    name="roleplay",
    kind="published",
    card=Card(
        title="Roleplay (FSPO, arXiv 2502.19312)",
        citation=fspo.CITATION,
        page=f"huggingface.co/datasets/{REPOSITORY}",
        licence=fspo.LICENCE,
        not_published="numbers of rows and of personas (the paper has up to 1,500 people in its "
        "three sets together); the licence of the files; a validation split",
    ),
    options=tuple(name for name in fspo.OPTIONS if name != "form"),
    files=fspo.list_files,
    load=load,
    find=functools.partial(fspo.find_folder, repository=REPOSITORY),
    splits=fspo.SPLITS,
)
