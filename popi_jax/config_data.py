"""The settings of the data, a section of popi_jax/config.py."""

import dataclasses

from popi_jax.config_rules import (
    BELOW_ONE,
    FOLDER,
    HAS_END,
    ON_DISK,
    PLACE,
    at_least,
    one_of,
    setting,
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str = setting(
        "prism",
        "data set",
        one_of(
            *("prism", "elix", "review", "roleplay", "alignx", "psoups", "ufp4", "prefeval"),
            *("personamem", "jsonl"),
        ),
        data=True,
    )
    form: str = setting(
        "", "which of several forms of a data set, see docs/data.md; '' = its first", data=True
    )
    path: str = setting(
        "data/prism", "folder or file of the published files", PLACE, ON_DISK, free=True, path=True
    )
    revision: str = setting(
        "", "commit of the hub to download; '' = the one that the source names", data=True
    )
    prepared: str = setting(
        "data/prepared",
        "folder of the copies, one per content and options",
        FOLDER,
        ON_DISK,
        free=True,
        path=True,
    )
    download: bool = setting(True, "fetch missing files where the source publishes them", free=True)
    on_bad_row: str = setting("error", "skip: list it", one_of("error", "skip"), data=True)
    on_leak: str = setting(
        "error",
        "pairs that the signals or another split give away; skip: leave them out, and count them",
        one_of("error", "skip"),
        data=True,
    )
    split_by: str = setting(
        "",
        "what a split keeps together; published: the publisher's splits; '' = the first that the "
        "data set allows, see docs/data.md",
        one_of("", "user", "topic", "target", "conversation", "published"),
        data=True,
    )
    validation_fraction: float = setting(
        0.03, "of users, or of what data.split_by keeps together", BELOW_ONE, data=True
    )
    test_fraction: float = setting(0.12, "of the same", BELOW_ONE, data=True)
    num_shots: int = setting(6, "most past pairs in a user's signals", at_least(0), data=True)
    num_pairs: int = setting(8, "most held-out pairs kept of a user", at_least(1), data=True)
    passes: int = setting(
        0,
        "how often all rows of a person are cut into blocks of num_shots past and num_pairs "
        "held-out pairs, a user each (elix, review, roleplay); 0 = one block a person",
        at_least(0),
        data=True,
    )
    profile_text: str = setting(
        "demographics",
        "of alignx; directions: phrases of the preference directions of the signals",
        one_of("demographics", "directions"),
        data=True,
    )
    signals: str = setting(
        "all", "kinds that are shown of a user's signals, like profile+shots:2 (the newest two)"
    )
    signals_draw: str = setting(
        "fixed",
        "epoch: another random part of the past pairs and comments in each epoch of the training",
        one_of("fixed", "epoch"),
    )
    pair_mode: str = setting(
        "best_vs_worst",
        "which replies to one prompt make pairs (prism)",
        one_of("best_vs_worst", "best_vs_rest", "all_pairs"),
        data=True,
    )
    score_margin: int = setting(1, "least gap of scores of 100 (prism)", at_least(1), data=True)
    pair_layout: str = setting(
        "paired", "of past pairs; grouped: rejected replies last", one_of("paired", "grouped")
    )
    prompt_aware: bool = setting(
        False, "a summary is of one pair, whose prompt the inference model reads behind the signals"
    )
    turns: str = setting("first", "of a conversation (prism)", one_of("first", "all"), data=True)
    use_system_string: bool = setting(
        False, "signals hold the person's system string, almost an oracle (prism)", data=True
    )
    sample_people: int = setting(4600, "people of the PRISM-format sample", at_least(1))
    context_len: int = setting(2048, "most tokens of an inference context (signals)", at_least(1))
    turn_len: int = setting(256, "most tokens of a prompt with its headers", at_least(1))
    answer_len: int = setting(512, "most tokens of a reply, end token included", HAS_END)
    summary_len: int = setting(128, "most tokens of a summary, end token included", HAS_END)
    workers: int = setting(0, "processes that prepare batches; 0 = threads", at_least(0), free=True)
