"""What every data source is turned into: one `User` per person, plain Python, checked once."""

import dataclasses
import json
from typing import Any

SPLITS = ("train", "validation", "test")
ITEM_SEPARATOR = " ; "  # between the items of a summary that is a list of items

# [{"role": "system"|"user"|"assistant", "content": str}]; the last role is "user"
Messages = list[dict[str, str]]
Groups = dict[str, str]  # name of a grouping -> the group: {"age": "25-34 years old"}


@dataclasses.dataclass(frozen=True)
class Shot:
    """A past preference pair among a user's raw signals. `conversation`: where it was, "" where the
    publisher names none; no model sees it."""

    prompt: str
    chosen: str
    rejected: str
    conversation: str = ""


@dataclasses.dataclass(frozen=True)
class Comment:
    """Something that the user wrote about a prompt."""

    prompt: str
    comment: str
    conversation: str = ""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A held-out preference pair: never part of the signals of its user."""

    record_id: str
    prompt: Messages
    chosen: str
    rejected: str
    groups: Groups = dataclasses.field(default_factory=dict, hash=False)
    conversation: str = ""
    meta: str = ""  # JSON of what else the publisher says of the pair; no model sees it


@dataclasses.dataclass(frozen=True)
class Reading:
    """A question about the raw signals and its answer; only made data has them: they teach reading,
    not summarising."""

    question: str
    answer: str  # what the chosen reply shows
    contrast: str  # what the rejected reply shows


@dataclasses.dataclass(frozen=True)
class User:
    """One person. Missing is "" or (), never None.

    `oracle` is the true persona: only the oracle condition, the generator's warm-up and the
    baselines that ask for it (generator.reads = persona, "supervised" phases) may see it, no other
    inference model. `stated` is a summary of what the profile alone says, `readings` are reading
    exercises, one for each shot in order: both for the warm-up only. `groups` of users and pairs
    serve the tables of an evaluation; no model ever sees them."""

    user_id: str
    profile: str
    survey: str
    shots: tuple[Shot, ...]
    comments: tuple[Comment, ...]
    pairs: tuple[Pair, ...]
    oracle: str = ""
    stated: str = ""
    readings: tuple[Reading, ...] = ()
    split: str = "train"  # train | validation | test
    groups: Groups = dataclasses.field(default_factory=dict, hash=False)

    def to_json(self) -> str:
        lists = ("shots", "comments", "pairs", "readings")  # dataclasses.asdict takes 4 x as long
        parts = {name: [vars(item) for item in getattr(self, name)] for name in lists}
        return json.dumps(vars(self) | parts, ensure_ascii=False)

    @staticmethod
    def from_json(text: str | bytes) -> "User":
        d: dict[str, Any] = json.loads(text)
        d["shots"] = tuple(Shot(**s) for s in d["shots"])
        d["comments"] = tuple(Comment(**c) for c in d["comments"])
        d["pairs"] = tuple(Pair(**p) for p in d["pairs"])
        d["readings"] = tuple(Reading(**r) for r in d["readings"])
        return User(**d)
