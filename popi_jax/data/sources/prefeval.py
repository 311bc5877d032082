"""PrefEval (arXiv 2502.09597), as in benchmark_dataset/ of its repository: a preference dropped
once in a long chat.

A user is a row of `implicit_preference/persona-driven/<topic>.json`, joined with the row of
`mcq_options/<topic>.json` that has the same preference and question. The signals are the persona
and the chat; the prompt is the question; option 0 is chosen over options 1 to 3; the preference is
the oracle. `explanation` gives the answer away: it is never read."""

import hashlib
from pathlib import Path
from typing import Any

from popi_jax.data.json_rows import Row, read_lines
from popi_jax.data.records import Comment, Pair, User
from popi_jax.data.sources.source import Card, Loaded, Source
from popi_jax.data.splits import choose_split, split_topics
from popi_jax.errors import UserError, did_you_mean

PAGE = "github.com/amazon-science/PrefEval"
OPTIONS = "mcq_options"
CHATS = "implicit_preference/persona-driven"


def list_files(folder: Path) -> list[Path]:
    """Returns the files that `load` reads: two per topic. Raises: UserError when one of them is
    missing."""
    topics = {kind: {p.name for p in (folder / kind).glob("*.json")} for kind in (OPTIONS, CHATS)}
    for kind, names in topics.items():
        if not names:
            fix = f"Copy benchmark_dataset/ of {PAGE} there (CC-BY-NC-4.0)."
            raise UserError(f"{folder / kind}: found no file *.json (field data.path). {fix}")
    for here, there in ((OPTIONS, CHATS), (CHATS, OPTIONS)):
        for name in sorted(topics[here] - topics[there]):
            near = did_you_mean(name, topics[there])
            found = f"no such file, but {folder / here / name} exists.{near}"
            raise UserError(f"{folder / there / name}: {found} Add it or remove the other.")
    return [folder / kind / name for name in sorted(topics[OPTIONS]) for kind in (OPTIONS, CHATS)]


def load(folder: Path, cfg: Any) -> Loaded:
    """Reads all topics. Users are split by their preference (split_by "user") or by whole topics
    (split_by "topic").

    Args: cfg: the `data` part of the configuration.
    Raises: UserError."""
    topics = sorted(path.stem for path in list_files(folder) if path.parent.name == OPTIONS)
    topic_split = split_topics(topics, cfg.validation_fraction, cfg.test_fraction)
    users: list[User] = []
    bad_rows: list[str] = []
    for topic in topics:
        options, bad_options = _read_options(folder / OPTIONS / f"{topic}.json", cfg.on_bad_row)
        loaded, bad_chats = _read_users(
            folder / CHATS / f"{topic}.json", topic, options, topic_split[topic], cfg
        )
        users += [user for user in loaded if user]
        bad_rows += bad_options + bad_chats
    return Loaded(users, bad_rows)


def _read_options(
    path: Path, on_bad_row: str
) -> tuple[dict[tuple[str, str], list[str]], list[str]]:
    """Returns (preference, question) -> the four options, the first of which respects the
    preference.

    A skipped row has no options: its chat is passed over, so that one bad row counts once."""
    seen: dict[tuple[str, str], str] = {}

    def parse(row: Row) -> tuple[tuple[str, str], list[str]]:
        key = _read_key(row, seen)
        name, allowed = "classification_task_options", "4 texts, the first unlike the others"
        options = row.get_value(name, allowed)
        texts = isinstance(options, list) and all(isinstance(o, str) for o in options)
        if not texts or not all(map(str.strip, options)):
            raise row.make_error(name, options, allowed, "Correct the row.")
        if len(options) != 4:
            raise row.make_error(name, f"{len(options)} texts", allowed, "Correct the row.")
        options = [option.strip() for option in options]
        if options[0] in options[1:]:
            raise row.make_error(name, options[0], allowed, "Correct the row.")
        return key, options

    rows, bad = read_lines(path, parse, on_bad_row)
    return {key: [] for key in seen} | dict(rows), bad


def _read_users(
    path: Path, topic: str, options: dict[tuple[str, str], list[str]], topic_split: str, cfg: Any
) -> tuple[list[User | None], list[str]]:
    seen: dict[tuple[str, str], str] = {}

    def parse(row: Row) -> User | None:
        preference, question = key = _read_key(row, seen)
        if options.get(key) == []:
            return None
        if key not in options:
            allowed = f"a preference and question of {OPTIONS}/{path.name}"
            fix = "Take both files from the same release."
            raise row.make_error("question", question, allowed, fix)
        comments = _read_comments(row, question)
        # not the row number: rows may move
        digest = hashlib.sha256(f"{preference}\n{question}".encode()).hexdigest()[:10]
        user_id = f"prefeval/{topic}/{digest}"
        prompt = [{"role": "user", "content": question}]
        chosen, *others = options[key]
        pairs = [
            Pair(f"{user_id}/{i}", prompt, chosen, other)
            for i, other in enumerate(dict.fromkeys(others), 1)
        ]
        if cfg.split_by == "topic":
            split = topic_split
        else:  # two rows may share a preference: they share the split
            split = choose_split(preference, cfg.validation_fraction, cfg.test_fraction)
        return User(
            user_id=user_id,
            profile=row.get_text("persona"),
            survey="",
            shots=(),
            comments=comments,
            pairs=tuple(pairs[: cfg.num_pairs]),
            oracle=preference,
            split=split,
            groups={"topic": topic},
        )

    return read_lines(path, parse, cfg.on_bad_row)


def _read_comments(row: Row, question: str) -> tuple[Comment, ...]:
    """Returns each message of the person together with the assistant's message that it answers (""
    at the start)."""
    chat = row.get_object("conversation")
    comments: list[Comment] = []
    answered = ""
    for name in sorted(chat.fields, key=lambda n: (len(n), n)):  # "0", "1", ..., "10"
        turn = chat.get_object(name)
        said = turn.get_text("user")
        if question in (said, answered):
            allowed = "a chat without the question that is held out"
            raise turn.make_error("user", said, allowed, "Remove the row.")
        comments.append(Comment(answered, said))
        answered = turn.get_text("assistant")
    if not comments:
        raise row.make_error("conversation", {}, "at least one turn", "Correct the row.")
    return tuple(comments)


def _read_key(row: Row, seen: dict[tuple[str, str], str]) -> tuple[str, str]:
    key = row.get_text("preference"), row.get_text("question")
    first = seen.setdefault(key, row.where)
    if first != row.where:
        allowed = f"a preference and question that occur once (first at {first})"
        raise row.make_error("question", key[1], allowed, "Remove one.")
    return key


SOURCE = Source(
    name="prefeval",
    kind="published",
    card=Card(
        title="PrefEval (arXiv 2502.09597)",
        citation="Zhao et al., Do LLMs Recognize Your Preferences?, 2025",
        page=PAGE,
        licence="CC-BY-NC-4.0, so weights trained on it are for non-commercial use.",
        forbids="commercial use",
    ),
    options=("on_bad_row", "split_by", "validation_fraction", "test_fraction", "num_pairs"),
    files=list_files,
    load=load,
    splits=("topic", "user"),
)
