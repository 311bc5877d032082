"""The world of the made people: what they may care about and how likely all that is. It is read by
who draws people (made_people.py) and by who infers them (made_odds.py)."""

from typing import NamedTuple

NUM_ACTIVE = 3  # attributes that a person cares about
UTILITY = 2.5  # of a reply that suits an active attribute, over one that does not (log-odds)
STATED = 0.4  # probability that a self-description mentions an active attribute ...
STATED_RIGHT = 0.9  # ... and that it then names the right pole
STRAY = 0.02  # probability of a mention of either pole of an inactive attribute


class Pole(NamedTuple):
    item: str  # as a summary names it
    replies: tuple[str, str]  # how a reply shows it


# Both poles of an attribute are equally common: who knows nothing of a person can only guess, so
# that what is above one half is personal.
ATTRIBUTES: tuple[tuple[Pole, Pole], ...] = (
    (
        Pole("brief answers", ("that is the short version .", "here it is in one line .")),
        Pole("thorough answers", ("here is the whole story .", "now follows every detail .")),
    ),
    (
        Pole("warm tone", ("happy to help you , friend !", "what a lovely thing to ask !")),
        Pole("formal tone", ("kindly note the following remark .", "one may state it thus .")),
    ),
    (
        Pole(
            "concrete examples", ("for instance , picture a kettle .", "take a garden as a case .")
        ),
        Pole(
            "general principles",
            ("as a rule this always holds .", "the idea behind it matters most ."),
        ),
    ),
    (
        Pole(
            "cited sources", ("a study from 2019 confirms it .", "see the official report on it .")
        ),
        Pole("personal opinion", ("i believe that it is best .", "my own view is clear .")),
    ),
    (
        Pole("plain words", ("put simply , it just works .", "anyone can follow this bit .")),
        Pole(
            "technical terms",
            ("the mechanism is thermodynamic .", "its parameters are quantified ."),
        ),
    ),
    (
        Pole("metric units", ("it spans ten kilometres .", "it weighs two kilograms .")),
        Pole("imperial units", ("it spans six miles .", "it weighs four pounds .")),
    ),
    (
        Pole("bullet points", ("* first * second * third", "- one - two - three")),
        Pole(
            "flowing prose",
            ("and so one thought leads to another .", "which brings us gently onward ."),
        ),
    ),
    (
        Pole("playful jokes", ("cue the drum roll , ha !", "even my toaster laughed !")),
        Pole("serious style", ("this is no laughing matter .", "let us stay sober here .")),
    ),
)


class Person(NamedTuple):
    active: tuple[int, ...]  # attributes, ascending
    poles: tuple[int, ...]  # preferred pole of each
