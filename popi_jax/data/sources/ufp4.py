"""UF-P-4 (UltraFeedback answered by four users, each of whom cares about one quality, arXiv
2408.10075) in the files of AlignX's benchmark: one file for each quality.

Only the names of the files were seen (commit 4b86568). Rows are taken to be as those of P-Soups
beside them; `ground_truth_persona` may be missing, then the name of the file says the persona. A
field that AlignX's format does not have is an error, so that the first contact with the files shows
what else they hold."""

import functools
from pathlib import Path
from typing import Any

from popi_jax.data.sources import alignx_rows as rows
from popi_jax.data.sources import persona_pairs
from popi_jax.data.sources.alignx_rows import Record
from popi_jax.data.sources.persona_pairs import Kind
from popi_jax.data.sources.source import Card, Loaded, Source
from popi_jax.errors import UserError, did_you_mean

QUALITIES = {
    "helpfulness": "helpfulness",
    "honesty": "honesty",
    "instruction_following": "instruction-following",
    "truthfulness": "truthfulness",
}


def tell_persona(record: Record, file: str) -> str:
    """Raises: UserError for a file of another name, if the row does not say the persona."""
    if record.persona:
        return record.persona
    if file not in QUALITIES:
        told = f'{record.where}: no field "{rows.PERSONA}", and the file is named "{file}"'
        allowed = f"one of {', '.join(QUALITIES)}"
        raise UserError(f"{told}, allowed: {allowed}.{did_you_mean(file, QUALITIES)}")
    return f"This person cares about the {QUALITIES[file]} of replies above all."


KIND = Kind(
    name="ufp4",
    folder="UF-P-4",
    sha256={f"{file}.json": "" for file in QUALITIES},
    layout=rows.Layout(
        required=frozenset({rows.PROMPT, rows.CHOSEN, rows.REJECTED, rows.PAIRS}),
        allowed=(
            *(rows.PROMPT, rows.CHOSEN, rows.REJECTED, rows.PAIRS, rows.PERSONA, "profile"),
            *(rows.COMMENTS, rows.DEMOGRAPHICS, rows.DIRECTIONS),
        ),
    ),
    tell_persona=tell_persona,
)


def load(folder: Path, cfg: Any) -> Loaded:
    return persona_pairs.load(folder, cfg, KIND)


SOURCE = Source(
    name="ufp4",
    kind="published",
    card=Card(
        title="UF-P-4 in the format of AlignX (arXiv 2408.10075, 2503.15463)",
        citation="Poddar et al., Personalizing Reinforcement Learning from Human Feedback with "
        f"Variational Preference Learning, 2024; {persona_pairs.CITATION}",
        page=f"{persona_pairs.CODE}, benchmark/UF-P-4",
        licence="none stated in the repository, so there is no right to hand the files on; ask "
        "before you share weights that were trained on them.",
        counts={"files": 4},
        not_published="the fields and numbers of rows: the files were not seen",
    ),
    options=persona_pairs.OPTIONS,
    files=rows.list_files,
    load=load,
    find=functools.partial(persona_pairs.find_folder, kind=KIND),
    splits=persona_pairs.SPLITS,
)
