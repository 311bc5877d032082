"""What the generator is told of a user when it is scored, as data: `CONDITIONS` is the list of
today. A new condition is one more value."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from popi_jax.config import Config
from popi_jax.data import encode
from popi_jax.data.encode import Ids
from popi_jax.data.persons import find_others, have_others
from popi_jax.data.records import User
from popi_jax.data.tokenizer import Tokenizer
from popi_jax.errors import UserError, did_you_mean
from popi_jax.evals.sweep_plan import Reads

# names of the models that are scored: as trained, and as they were at the start of the main stage
TRAINED, BEFORE_RL = "trained", "before_rl"


class People(NamedTuple):
    """All that a text about the users of an evaluation can be made of."""

    users: Sequence[User]
    tokenizer: Tokenizer  # of the generator
    config: Config
    summaries: Sequence[Ids] = ()  # one for each user where the condition asks for them


class Condition(NamedTuple):
    """A text about each user, in the place of the summary in the generator's context."""

    name: str
    # in tokens of the generator; what is longer than data.context_len is cut
    make_texts: Callable[[People], Sequence[Ids]]
    # the inference model of which `make_texts` gets summaries, once greedy and once sampled
    summaries_by: str = ""
    reads_signals: bool = False  # whether `make_texts` shows raw signals
    count_users: Callable[[Sequence[User]], Sequence[bool]] | None = None  # None: all count
    version: int = 1  # raise it when the texts change: what was computed before is of another cell


def tell_nothing(people: People) -> list[Ids]:
    return [[] for _ in people.users]


def tell_signals(people: People) -> list[Ids]:
    """The raw signals, shortened as for the inference model."""
    words, config = people.tokenizer, people.config
    return [encode.tell_signals(user, words, config) for user in people.users]


def tell_summary(people: People) -> Sequence[Ids]:
    return people.summaries


def tell_summary_of_another(people: People) -> list[Ids]:
    return [people.summaries[number] for number in find_others(people.users)]


def tell_persona(people: People) -> list[Ids]:
    """The true persona."""
    words, config = people.tokenizer, people.config
    return [encode.tell_persona(user, words, config) for user in people.users]


def have_persona(users: Sequence[User]) -> list[bool]:
    return [bool(user.oracle.strip()) for user in users]


CONDITIONS = (
    Condition("no_signals", tell_nothing),
    Condition("raw_signals", tell_signals, reads_signals=True),
    Condition("summary_before_rl", tell_summary, summaries_by=BEFORE_RL),
    Condition("summary", tell_summary, summaries_by=TRAINED),
    Condition(
        "other_user_summary", tell_summary_of_another, summaries_by=TRAINED, count_users=have_others
    ),
    Condition("oracle", tell_persona, count_users=have_persona),
)


def find_condition(name: str) -> Condition:
    """Raises: UserError."""
    for condition in CONDITIONS:
        if condition.name == name:
            return condition
    names = [condition.name for condition in CONDITIONS]
    raise UserError(
        f'unknown condition "{name}", allowed are {", ".join(names)}.{did_you_mean(name, names)}'
    )


def list_reads() -> dict[str, Reads]:
    """What each condition asks for."""
    return {
        c.name: Reads(c.reads_signals or bool(c.summaries_by), bool(c.summaries_by))
        for c in CONDITIONS
    }
