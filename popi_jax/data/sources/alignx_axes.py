"""The 90 axes of AlignX's "Preference Direction" (arXiv 2503.15463), in words.

Order, names and poles are those of `train/profile_utils.py` in github.com/JinaLeejnl/AlignX, commit
4b86568; the phrases are ours. 0-39 are traits and needs of a person, 40-46 qualities of a reply,
47-89 interests. A direction is written as 90 characters: "1" the first pole, "0" the second, "5"
neither."""

import re
from collections.abc import Sequence
from typing import NamedTuple


class Axis(NamedTuple):
    name: str
    high: str  # what 1 says
    low: str  # what 0 says
    family: str  # the name of a group of pairs in evaluations


_TRAITS = (
    ("age", "young", "older"),
    ("gender", "female", "male"),
    ("neuroticism", "high neuroticism", "low neuroticism"),
    ("extraversion", "high extraversion", "low extraversion"),
    ("openness", "high openness", "low openness"),
    ("agreeableness", "high agreeableness", "low agreeableness"),
    ("conscientiousness", "high conscientiousness", "low conscientiousness"),
    ("food", "enjoys certain foods", "avoids certain foods"),
    ("home", "enjoys certain surroundings at home", "avoids certain surroundings at home"),
    ("sleep", "enjoys sleep", "avoids sleep"),
    ("investment", "invests boldly", "invests cautiously"),
    ("saving", "saves money well", "saves money badly"),
    ("physical safety", "cares about physical safety", "indifferent to physical safety"),
    ("environmental safety", "cares about a safe environment", "indifferent to a safe environment"),
    ("depth of contact", "prefers light, casual contact", "prefers deep conversations"),
    ("conflict", "settles conflicts directly", "settles conflicts by avoiding or mediating"),
    ("length", "communicates concisely", "communicates in detail"),
    ("work environment", "needs certain conditions at work", "indifferent to conditions at work"),
    ("recognition", "needs recognition by others", "indifferent to recognition by others"),
    ("achievement", "needs personal achievement", "indifferent to personal achievement"),
    ("field of knowledge", "enjoys certain subjects", "avoids certain subjects"),
    ("way of learning", "enjoys certain ways of learning", "avoids certain ways of learning"),
    ("creative expression", "enjoys certain creative arts", "avoids certain creative arts"),
)
# needs after Murray: name, what it is about
_NEEDS = (
    ("order", "tidiness"),
    ("retention", "keeping what one has"),
    ("inviolacy", "dignity and good name"),
    ("infavoidance", "avoiding failure and shame"),
    ("counteraction", "overcoming setbacks"),
    ("seclusion", "being left alone"),
    ("dominance", "directing others"),
    ("deference", "following authority"),
    ("autonomy", "independence"),
    ("contrariance", "being different"),
    ("abasement", "accepting blame"),
    ("aggression", "prevailing by force"),
    ("affiliation", "close relations"),
    ("rejection", "keeping away from the disliked"),
    ("nurturance", "caring for others"),
    ("succorance", "being helped and comforted"),
    ("play", "fun and ease"),
)
_QUALITIES = (
    *("harmlessness", "instruction-following", "honesty", "truthfulness", "helpfulness"),
    *("coherence", "complexity"),
)
_INTERESTS = (
    *("science", "knowledge", "psychology", "cinema", "entertainment", "gaming", "parenting"),
    *("wild imagination", "anime", "sports", "law", "the workplace", "pets", "travel", "health"),
    *("stories", "cars", "gourmet food", "education", "current events", "home decor"),
    *("international affairs", "finance", "campus life", "digital technology", "emotions", "humor"),
    *("music", "reading", "painting", "dance", "crafts", "photography", "culture", "fitness"),
    *("art", "stationery and planners", "celebrities", "outdoors", "camping", "social sciences"),
    *("weddings", "fashion"),
)
FAMILIES = ("persona axis", "quality axis", "interest axis")

AXES: tuple[Axis, ...] = (
    *(Axis(*trait, FAMILIES[0]) for trait in _TRAITS),
    *(
        Axis(name, f"strong need for {name} ({about})", f"little need for {name}", FAMILIES[0])
        for name, about in _NEEDS
    ),
    *(
        Axis(name, f"cares about {name}", f"indifferent to {name}", FAMILIES[1])
        for name in _QUALITIES
    ),
    *(Axis(name, f"likes {name}", f"dislikes {name}", FAMILIES[2]) for name in _INTERESTS),
)
NEUTRAL = "5"
_ACTIVE = re.compile("[01]")
_HALVES = bytes.maketrans(b"051", bytes((0, 1, 2)))


def write_phrases(directions: str) -> str:
    """The poles of the axes that are not neutral, in the order of the axes, with ", " between."""
    return ", ".join(AXES[i].high if pole == "1" else AXES[i].low for i, pole in _find(directions))


def mean_directions(directions: Sequence[str]) -> str:
    """The mean of several directions: "1" at .51 and above, "0" at .49 and below, as POPI's
    official code (f88878c6) has it; AlignX's own code has .6 and .4. Where all means are neutral
    both take the most extreme one, that is all 90 at once: here they stay neutral."""
    most = 2 * len(directions)  # in halves
    sums = map(sum, zip(*(d.encode().translate(_HALVES) for d in directions), strict=True))
    return "".join(
        "1" if 100 * s >= 51 * most else "0" if 100 * s <= 49 * most else NEUTRAL for s in sums
    )


def group_axes(directions: str) -> dict[str, str]:
    """Family -> the name of its axis that is not neutral, for families where exactly one is."""
    active: dict[str, list[str]] = {}
    for i, _ in _find(directions):
        active.setdefault(AXES[i].family, []).append(AXES[i].name)
    return {family: names[0] for family, names in active.items() if len(names) == 1}


def _find(directions: str) -> list[tuple[int, str]]:
    """The axes that are not neutral, and their poles."""
    return [(found.start(), found[0]) for found in _ACTIVE.finditer(directions)]
