"""PrefEval (arXiv 2502.09597), as in benchmark_dataset/ of its repository: preferences, and
questions whose answers respect or violate them.

A user is a row of a form, joined with the row of `mcq_options/<topic>.json` that has the same
preference and question. The prompt is the question; option 0 is chosen over options 1 to 3.

- persona (implicit_preference/persona-driven/): the signals are the persona, and a long chat in
  which the preference is dropped once.
- choice (implicit_preference/choice-based/): a short chat in which one of four options is picked.
- explicit (mcq_options/ alone): the preference itself, as the publisher's classification task
  states it. The folder explicit_preference/ only says what is a topic: 30 of its 1,000 rows are
  worded otherwise.

The preference is the oracle, where the signals do not hold it word for word (all of "explicit", 92
rows of "persona"). `explanation` and `aligned_op` give the answer away: they are never read."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from popi_jax.data.json_rows import Row, read_lines
from popi_jax.data.records import Comment, Pair, User
from popi_jax.data.sources import chats, download
from popi_jax.data.sources.source import Card, Loaded, Source
from popi_jax.data.splits import choose_split, split_topics
from popi_jax.errors import UserError, did_you_mean

REPOSITORY = "amazon-science/PrefEval"
PAGE = f"github.com/{REPOSITORY}"
REVISION = "50795054b5ff5f418d2b768a331d71e480f93331"  # of 2025; all counts below are of it
HOME = "benchmark_dataset"
OPTIONS = "mcq_options"
CHATS = {
    "persona": "implicit_preference/persona-driven",
    "choice": "implicit_preference/choice-based",
    "explicit": "explicit_preference",
}
TOPICS = (
    *("education_learning_styles", "education_resources", "entertain_games"),
    *("entertain_music_book", "entertain_shows", "entertain_sports", "lifestyle_beauty"),
    *("lifestyle_dietary", "lifestyle_fit", "lifestyle_health", "pet_ownership"),
    *("professional_work_location_style", "shop_fashion", "shop_home", "shop_motors"),
    *("shop_technology", "travel_activities", "travel_hotel", "travel_restaurant"),
    "travel_transportation",
)
NO_PARTNER = "row of a topic that has no file of the other kind"
TOLD = "row whose signals hold an option of its question"

Key = tuple[str, str]  # preference, question


class Signals(NamedTuple):
    profile: str
    comments: tuple[Comment, ...] = ()


def find_folder(cfg: Any, may_download: bool) -> Path:
    """Returns `data.path`, into which the files are downloaded when there is nothing in it.

    Raises: FilesMissing when there are none and none can be had; UserError when there are
    others."""
    folder = Path(cfg.path)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        _find_home(folder)
        return folder

    def fetch() -> None:
        kinds = (OPTIONS, CHATS["persona"], CHATS["choice"])
        names = [f"{kind}/{topic}.json" for kind in kinds for topic in TOPICS]
        revision = cfg.revision or REVISION
        url = f"https://raw.githubusercontent.com/{REPOSITORY}/{revision}/{HOME}"
        download.download_files(folder, url, dict.fromkeys(names, ""))

    fix = f"Copy {HOME}/ of {PAGE} there (CC-BY-NC-4.0)."
    return download.fill_folder(folder, may_download, fetch, missing="PrefEval files", fix=fix)


def list_files(folder: Path) -> list[Path]:
    """Returns the files that `load` reads in one of its forms. Raises: UserError when there are
    none."""
    home = _find_home(folder)
    return [
        home / kind / name for kind in (OPTIONS, *CHATS.values()) for name in _names(home / kind)
    ]


def load(folder: Path, cfg: Any) -> Loaded:
    """Reads all topics of `cfg.form`. Users are split by whole topics (split_by "topic") or by
    their preference (split_by "user").

    Args: cfg: the `data` part of the configuration.
    Raises: UserError."""
    home = _find_home(folder)
    left_out: Counter[str] = Counter()
    topics = _match_topics(home, cfg.form, left_out)
    topic_splits = split_topics(topics, cfg.validation_fraction, cfg.test_fraction)
    users: list[User] = []
    bad_rows: list[str] = []
    rows = 0
    for topic in topics:
        options, bad = _read_options(home / OPTIONS / f"{topic}.json", cfg.on_bad_row)
        bad_rows += bad
        signals = [(key, Signals(key[0])) for key, texts in options.items() if texts]
        if cfg.form != "explicit":
            path = home / CHATS[cfg.form] / f"{topic}.json"
            parse = partial(_parse_signals, form=cfg.form, options=options, seen={})
            signals, bad = read_lines(path, parse, cfg.on_bad_row)
            bad_rows += bad
        rows += len(signals) + len(bad)
        for key, own in signals:
            split = topic_splits[topic]
            if cfg.split_by != "topic":  # two rows may share a preference: they share the split
                split = choose_split(key[0], cfg.validation_fraction, cfg.test_fraction)
            if options[key] and chats.hold(own.comments, options[key]):
                left_out[TOLD] += 1
            elif options[key]:
                users.append(_make_user(key, own, options[key], topic, split, cfg))
    return Loaded(users, bad_rows, dict(left_out), {"topics": len(topics), "rows": rows})


def _find_home(folder: Path) -> Path:
    """Returns the folder that holds mcq_options/: `folder`, or benchmark_dataset/ in it. Raises:
    UserError."""
    for home in (folder, folder / HOME):
        if _names(home / OPTIONS):
            return home
    others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    near = did_you_mean(OPTIONS, others)
    told = f"{folder / OPTIONS}: found no file *.json (field data.path).{near}"
    raise UserError(f"{told} Copy {HOME}/ of {PAGE} there (CC-BY-NC-4.0).")


def _names(folder: Path) -> list[str]:
    names = (path.name for path in folder.glob("*.json"))
    return sorted(name for name in names if not name.startswith("."))


def _match_topics(home: Path, form: str, left_out: Counter[str]) -> list[str]:
    """Returns the topics that have both files; tells the others, such as the publisher's
    "travel_hotel copy.json", and counts their rows.

    Raises: UserError when there is no topic."""
    names_by_kind = {kind: _names(home / kind) for kind in CHATS.values()}
    there = names_by_kind[CHATS[form]]
    if form == "explicit":  # needs options alone; the other folders say what is a topic
        there = sorted({name for names in names_by_kind.values() for name in names})
        there = there or _names(home / OPTIONS)
    elif not there:
        fix = f"Copy it from {HOME}/ of {PAGE}, or choose another data.form."
        raise UserError(f"{home / CHATS[form]}: found no file *.json (field data.path). {fix}")
    both = sorted({*_names(home / OPTIONS)} & {*there})
    alone = [home / OPTIONS / name for name in _names(home / OPTIONS) if name not in both]
    if form != "explicit":
        alone += [home / CHATS[form] / name for name in there if name not in both]
    if not both:
        near = did_you_mean(alone[0].name, there)
        told = f"{alone[0]}: no such file in {home / CHATS[form]}, and no other topic has both"
        raise UserError(f"{told}.{near} Take both folders from the same release.")
    if alone:
        shown = ", ".join(str(path.relative_to(home)) for path in alone)
        logging.warning("%s: left out, as the other kind has no such file: %s", home, shown)
    for path in alone:
        rows, bad = read_lines(path, lambda row: None, "skip")
        left_out[NO_PARTNER] += len(rows) + len(bad)
    return [name.removesuffix(".json") for name in both]


def _read_options(path: Path, on_bad_row: str) -> tuple[dict[Key, list[str]], list[str]]:
    """Returns (preference, question) -> the four options, the first of which respects the
    preference.

    A skipped row has no options: its chat is passed over, so that one bad row counts once."""
    seen: dict[Key, str] = {}

    def parse(row: Row) -> tuple[Key, list[str]]:
        key = _read_key(row, seen)
        name, allowed = "classification_task_options", "4 texts, the first unlike the others"
        options = row.get_texts(name)
        if len(options) != 4:
            raise row.make_error(name, f"{len(options)} texts", allowed, "Correct the row.")
        if options[0] in options[1:]:
            raise row.make_error(name, options[0], allowed, "Correct the row.")
        return key, options

    rows, bad = read_lines(path, parse, on_bad_row)
    return {key: [] for key in seen} | dict(rows), bad


def _parse_signals(
    row: Row, form: str, options: Mapping[Key, list[str]], seen: dict[Key, str]
) -> tuple[Key, Signals]:
    key = _read_key(row, seen)
    if key not in options:
        allowed = f"a preference and question of {OPTIONS}/{Path(row.where.split(': row')[0]).name}"
        fix = "Take both files from the same release."
        raise row.make_error("question", key[1], allowed, fix)
    if form == "persona":
        comments = _read_chat(row, key[1])
        return key, Signals(row.get_text("persona"), comments)
    return key, Signals("", _read_choice(row, key[1]))


def _read_chat(row: Row, question: str) -> tuple[Comment, ...]:
    chat = row.get_object("conversation")
    messages: list[chats.Message] = []
    for name in sorted(chat.fields, key=lambda n: (len(n), n)):  # "0", "1", ..., "10"
        turn = chat.get_object(name)
        messages += [(role, turn.get_text(role)) for role in ("user", "assistant")]
        _check_unasked(turn, "user", question, tuple(text for _, text in messages[-2:]))
    if not messages:
        raise row.make_error("conversation", {}, "at least one turn", "Correct the row.")
    return chats.make_comments(messages)


def _read_choice(row: Row, question: str) -> tuple[Comment, ...]:
    """What the person asked, and what they said of the assistant's four options."""
    chat = row.get_object("conversation")
    names = ("query", "assistant_options", "user_selection")
    asked, offered, selected = (chat.get_text(name) for name in names)
    _check_unasked(chat, "query", question, (asked, offered, selected))
    return chats.make_comments((("user", asked), ("assistant", offered), ("user", selected)))


def _check_unasked(row: Row, field: str, question: str, texts: tuple[str, ...]) -> None:
    if question in texts:
        allowed = "a chat without the question that is held out"
        raise row.make_error(field, question, allowed, "Remove the row.")


def _read_key(row: Row, seen: dict[Key, str]) -> Key:
    key = row.get_text("preference"), row.get_text("question")
    first = seen.setdefault(key, row.where)
    if first != row.where:
        allowed = f"a preference and question that occur once (first at {first})"
        raise row.make_error("question", key[1], allowed, "Remove one.")
    return key


def _make_user(
    key: Key, signals: Signals, options: list[str], topic: str, split: str, cfg: Any
) -> User:
    preference, question = key
    said = cfg.form == "explicit" or chats.say(signals.comments, preference)
    # not the row number: rows may move
    digest = hashlib.sha256(f"{preference}\n{question}".encode()).hexdigest()[:10]
    user_id = f"prefeval/{topic}/{digest}"
    prompt = [{"role": "user", "content": question}]
    chosen, *others = options
    pairs = [
        Pair(f"{user_id}/{i}", prompt, chosen, other)
        for i, other in enumerate(dict.fromkeys(others), 1)
    ]
    return User(
        user_id=user_id,
        profile=signals.profile,
        survey="",
        shots=(),
        comments=signals.comments,
        pairs=tuple(pairs[: cfg.num_pairs]),
        oracle="" if said else preference,
        split=split,
        groups={"topic": topic},
    )


SOURCE = Source(
    name="prefeval",
    kind="published",
    card=Card(
        title="PrefEval (arXiv 2502.09597)",
        citation="Zhao et al., Do LLMs Recognize Your Preferences?, 2025",
        page=PAGE,
        licence="CC-BY-NC-4.0, so weights trained on it are for non-commercial use.",
        forbids="commercial use",
        counts={"topics": 20, "rows": 1000},
        not_published="splits: it is a benchmark, all of whose rows test.",
    ),
    options=(
        *("on_bad_row", "form", "split_by", "validation_fraction", "test_fraction", "num_pairs"),
    ),
    files=list_files,
    load=load,
    find=find_folder,
    forms=("persona", "choice", "explicit"),
    splits=("topic", "user"),
)
