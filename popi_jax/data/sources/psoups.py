"""P-Soups (Personalized Soups, arXiv 2310.11564) in the files of AlignX's benchmark: three files,
each of two opposed personas that answer the same prompts.

The persona is the oracle. The field `profile` is not read: it is derived from the past pairs by a
model of AlignX's axes, so it holds nothing that they do not, with much noise. A past pair one of
whose replies repeats the persona's instruction word for word, as an example sentence, is left out:
it would tell the truth instead of showing it (327 of the 2,400 of friendly_unfriendly.json). Other
replies work on words of that instruction, such as its adjectives: they stay."""

import functools
from pathlib import Path
from typing import Any

from popi_jax.data.sources import alignx_rows as rows
from popi_jax.data.sources import persona_pairs
from popi_jax.data.sources.persona_pairs import Kind
from popi_jax.data.sources.source import Card, Loaded, Source

KIND = Kind(
    name="psoups",
    folder="P-Soups",
    sha256={
        "concise_detail.json": "",
        "friendly_unfriendly.json": (
            "c7545cfd23cee20318934e4751474ee966812622a6304abb4170f1bf3bbc2661"
        ),
        "student_phd.json": "",
    },
    layout=rows.Layout(
        frozenset({rows.PROMPT, rows.CHOSEN, rows.REJECTED, rows.PAIRS, rows.PERSONA})
    ),
    tell_persona=lambda record, file: record.persona,
)


def load(folder: Path, cfg: Any) -> Loaded:
    return persona_pairs.load(folder, cfg, KIND)


SOURCE = Source(
    name="psoups",
    kind="published",
    card=Card(
        title="P-Soups in the format of AlignX (arXiv 2310.11564, 2503.15463)",
        citation="Jang et al., Personalized Soups: Personalized Large Language Model Alignment via "
        f"Post-hoc Parameter Merging, 2023; {persona_pairs.CITATION}",
        page=f"{persona_pairs.CODE}, benchmark/P-Soups",
        licence="none stated in either repository, so there is no right to hand the files on; ask "
        "before you share weights that were trained on them.",
        counts={
            "files": 3,
            "rows of friendly_unfriendly": 600,
            "targets of friendly_unfriendly": 128,
            "past pairs of friendly_unfriendly": 22,
        },
        not_published="user ids, and which draws belong to one person; the numbers of the other "
        "two files were not counted. 128 distinct targets are a smoke test, not evidence",
    ),
    options=persona_pairs.OPTIONS,
    files=rows.list_files,
    load=load,
    find=functools.partial(persona_pairs.find_folder, kind=KIND),
    splits=persona_pairs.SPLITS,
)
