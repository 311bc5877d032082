"""Finds what would make a score on held-out pairs a lie: an answer among the signals, or the same
in two splits.

Texts are compared by their letters and digits alone, without case: "So, tea?" equals "so tea". One
user is looked at at a time; of those before are kept a number for each pair and the user's id."""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from popi_jax.data.records import Comment, Pair, Shot, User

# kind -> what it means
KINDS = {
    "prompt": "the prompt is among the signals of its user",
    "reply": "a reply is among the signals of its user",
    "oracle": "the true persona stands in the signals",
    "conversation": "its conversation is among the signals, or in another split",
    "split": "the same prompt with the same replies is in another split",
    "person": "its user is in another split",
}
LONG = 40  # letters and digits: so long a text is also looked for inside others
SPOKEN = 8  # of an oracle: a shorter one may stand anywhere

_KEPT = bytes(code for code in range(128) if chr(code).isalnum())
_ASCII = bytes(set(range(128)) - set(_KEPT))


class Leak(NamedTuple):
    kind: str  # of KINDS
    user_id: str
    record_id: str  # of the pair; "" = all pairs of the user
    other: str = ""  # the user who has the same in another split

    def tell(self) -> str:
        where = f"{self.user_id}: {self.record_id}" if self.record_id else self.user_id
        return f"{where} (also of {self.other})" if self.other else where


@functools.lru_cache(256)  # a source and the finder ask for the same texts
def fold(text: str) -> str:
    """The letters and digits of a text, without case; a text that has none stays as it is."""
    lower = text.casefold()
    # bytes are translated ten times as fast as texts
    kept = lower.encode(errors="surrogatepass").translate(None, _ASCII)
    folded = kept.decode(errors="surrogatepass")
    for c in set(kept.translate(None, _KEPT).decode(errors="surrogatepass")):
        folded = folded if c.isalnum() else folded.replace(c, "")
    return folded or lower.strip()


class Heard(NamedTuple):
    """What is told of a user, folded."""

    texts: frozenset[str]
    whole: str  # all of them, and longer texts that are only looked into

    def holds(self, *texts: str) -> bool:
        """Whether one of the texts is one of those, or, where it is long, stands inside of them."""
        folded = map(fold, texts)
        return any(t in self.texts or (len(t) >= LONG and t in self.whole) for t in folded)


def hear(folded: Iterable[str], inside: Iterable[str] = ()) -> Heard:
    """Of folded texts; `inside`: those that are only looked into."""
    texts = frozenset(folded)
    return Heard(texts, "\n".join([*texts, *inside]))


def fold_signals(shots: Iterable[Shot], comments: Iterable[Comment] = ()) -> list[str]:
    """The folded texts of past pairs and comments."""
    texts = [text for s in shots for text in (s.prompt, s.chosen, s.rejected)]
    texts += [text for c in comments for text in (c.prompt, c.comment) if text]
    return [fold(text) for text in texts]


class LeakFinder:
    """Looks at users one after the other.

    shared_replies: replies come from a small pool (Loaded.shared_replies), so that equal ones tell
    nothing. shared_people: a split keeps something else together, not
    people."""

    def __init__(self, *, shared_replies: bool, shared_people: bool) -> None:
        self._shared_replies, self._shared_people = shared_replies, shared_people
        self._users: list[tuple[str, str]] = []  # id and split, in order
        self._pairs: dict[int, int] = {}  # number of an equal pair -> position of its first user
        self._conversations: dict[str, int] = {}
        self._people: dict[str, int] = {}
        self.duplicates: Counter[str] = Counter()  # split -> pairs that equal an earlier one

    @property
    def kinds(self) -> list[str]:
        """Of KINDS, those that it looks for."""
        passed = {"reply", "split"} if self._shared_replies else set()
        passed |= {"person"} if self._shared_people else set()
        return [kind for kind in KINDS if kind not in passed]

    def check(self, user: User) -> list[Leak]:
        """What leaks in the pairs of a user, given all users before."""
        position = len(self._users)
        self._users.append((user.user_id, user.split))
        person = user.user_id.partition("#")[0]  # "ann#2" is ann with other signals
        first = self._people.setdefault(person, position)
        if self._users[first][1] != user.split and not self._shared_people:
            return [Leak("person", user.user_id, "", self._users[first][0])]
        heard = hear(
            fold_signals(user.shots, user.comments), (fold(user.profile), fold(user.survey))
        )
        persona = fold(user.oracle)
        if len(persona) >= SPOKEN and persona in heard.whole:
            return [Leak("oracle", user.user_id, "")]
        told = {s.conversation for s in user.shots} | {c.conversation for c in user.comments}
        told -= {""}
        found = []
        for pair in user.pairs:
            kinds = [*self._look_inside(pair, heard)]
            other = ""
            if pair.conversation in told:
                kinds.append("conversation")
            elif pair.conversation:
                first = self._conversations.setdefault(f"{person}/{pair.conversation}", position)
                if self._users[first][1] != user.split:
                    kinds, other = [*kinds, "conversation"], self._users[first][0]
            if not kinds:
                kinds, other = self._look_back(pair, position)
            found += [Leak(kind, user.user_id, pair.record_id, other) for kind in kinds[:1]]
        return found

    def _look_back(self, pair: Pair, position: int) -> tuple[list[str], str]:
        known = len(self._pairs)
        first = self._pairs.setdefault(_number(pair), position)
        (other, theirs), (_, own) = self._users[first], self._users[position]
        if theirs == own:
            self.duplicates[own] += len(self._pairs) == known
        elif not self._shared_replies:
            return ["split"], other
        return [], ""

    def _look_inside(self, pair: Pair, heard: Heard) -> Iterator[str]:
        if heard.holds(pair.prompt[-1]["content"]):
            yield "prompt"
        if not self._shared_replies and heard.holds(pair.chosen, pair.rejected):
            yield "reply"


def leave_out(user: User, leaks: list[Leak]) -> User:
    """The user without the pairs that leak."""
    leaking = {leak.record_id for leak in leaks}
    kept = () if "" in leaking else tuple(p for p in user.pairs if p.record_id not in leaking)
    return dataclasses.replace(user, pairs=kept)


def _number(pair: Pair) -> int:
    """The same for equal pairs: 56 bits of a hash."""
    texts = (*(m["content"] for m in pair.prompt), pair.chosen, pair.rejected)
    text = "\n".join(map(fold, texts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
