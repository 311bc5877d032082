"""PRISM (arXiv 2404.16019): survey, conversations and utterances as published on the Hugging Face
hub -> users.

Scores are personal, so that pairs come from score differences inside one turn only. `if_chosen`
reconstructs the history and never labels a pair: it is random on a tie. Order in time is
`generated_datetime`, then the id."""

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

from popi_jax.data.json_rows import Loaded, Row, read_lines
from popi_jax.data.records import Comment, Messages, Pair, Reading, Shot, User
from popi_jax.data.splits import split_of
from popi_jax.errors import UserError

FILES = ("survey.jsonl", "conversations.jsonl", "utterances.jsonl")
LATENTS = "latents.jsonl"  # only beside made data: the truth behind each user

SILENT = ("", "prefer not to say", "unsure")  # answers that say nothing
ANSWERS = (
    "age",
    "gender",
    "employment_status",
    "education",
    "marital_status",
    "english_proficiency",
)
GROUPS = (
    ("religion", "simplified"),
    ("ethnicity", "simplified"),
    ("location", "birth_country"),
    ("location", "reside_country"),
)
MODEL_USE = ("lm_familiarity", "lm_direct_use", "lm_indirect_use", "lm_frequency_use")
PREFERENCES = (
    "values",
    "creativity",
    "fluency",
    "factuality",
    "diversity",
    "safety",
    "personalisation",
    "helpfulness",
)


@dataclasses.dataclass(frozen=True)
class Person:
    user_id: str
    self_description: str
    system_string: str
    survey: str


@dataclasses.dataclass(frozen=True)
class Conversation:
    conversation_id: str
    user_id: str
    time: str
    opening_prompt: str
    feedback: str


@dataclasses.dataclass(frozen=True)
class Utterance:
    utterance_id: str
    conversation_id: str
    turn: int
    position: int  # within the turn
    prompt: str
    response: str
    score: int
    in_history: bool


@dataclasses.dataclass(frozen=True)
class ScoredPair:
    pair: Pair
    turn: int
    margin: int  # points of 100


@dataclasses.dataclass(frozen=True)
class Latent:
    oracle: str
    stated: str
    readings: dict[str, Reading]  # by conversation


def files(folder: Path) -> list[Path]:
    """Returns the files that `load` reads."""
    latents = folder / LATENTS
    return [folder / name for name in FILES] + ([latents] if latents.exists() else [])


def load(folder: Path, cfg: Any) -> Loaded:
    """Reads the three files, and latents.jsonl where it exists. People with fewer than 2
    conversations that hold a pair are left out, and so are those none of whose held-out pairs has a
    prompt of its own.

    Args: cfg: the `data` part of the configuration.
    Raises: UserError.
    """
    people, bad_people = _people(folder / FILES[0], cfg.on_bad_row)
    conversations, bad_conversations = _conversations(folder / FILES[1], people, cfg.on_bad_row)
    utterances, bad_utterances = _utterances(folder / FILES[2], conversations, cfg.on_bad_row)
    latents: dict[str, Latent] = {}
    bad_latents: list[str] = []
    if (folder / LATENTS).exists():
        latents, bad_latents = _latents(folder / LATENTS, people, cfg.on_bad_row)

    turns: dict[str, dict[int, list[Utterance]]] = defaultdict(lambda: defaultdict(list))
    for utterance in utterances:
        turns[utterance.conversation_id][utterance.turn].append(utterance)
    by_person: dict[str, list[tuple[Conversation, list[ScoredPair]]]] = defaultdict(list)
    for conversation in sorted(
        conversations.values(), key=lambda c: (c.time, _number(c.conversation_id))
    ):
        pairs = conversation_pairs(turns[conversation.conversation_id], cfg)
        if pairs:
            by_person[conversation.user_id].append((conversation, pairs))
    users = [
        _user(person, by_person[person.user_id], latents.get(person.user_id), cfg)
        for person in people.values()
    ]
    bad_rows = bad_people + bad_conversations + bad_utterances + bad_latents
    return Loaded([user for user in users if user], bad_rows)


def conversation_pairs(turns: dict[int, list[Utterance]], cfg: Any) -> list[ScoredPair]:
    """Returns the preference pairs of a conversation in the order of turns, then of score
    differences (widest first).

    Equal replies inside a turn count once; the stand-in "EMPTY STRING" is never a reply, a prompt
    or a history."""
    found: list[ScoredPair] = []
    history: Messages = []
    for turn in range(len(turns) if cfg.turns == "all" else 1):
        replies = sorted(turns.get(turn, []), key=lambda u: u.position)
        if not replies or _missing(replies[0].prompt):
            break  # what follows has no history
        prompt = history + [{"role": "user", "content": replies[0].prompt}]
        distinct = list(
            {u.response: u for u in reversed(replies) if not _missing(u.response)}.values()
        )
        pairs = [
            ScoredPair(
                Pair(f"{a.utterance_id}>{b.utterance_id}", prompt, a.response, b.response),
                turn,
                a.score - b.score,
            )
            for a, b in _compared(distinct, cfg.pair_mode)
            if a.score - b.score >= max(1, cfg.score_margin)
        ]
        found += sorted(pairs, key=lambda p: (-p.margin, p.pair.record_id))
        continued = [u.response for u in replies if u.in_history and not _missing(u.response)]
        if not continued:
            break
        history = prompt + [{"role": "assistant", "content": continued[0]}]
    return found


def _compared(replies: list[Utterance], mode: str) -> list[tuple[Utterance, Utterance]]:
    ranked = sorted(replies, key=lambda u: (-u.score, u.position))
    if mode == "best_vs_worst":
        return [(ranked[0], ranked[-1])] if ranked else []
    if mode == "best_vs_rest":
        return [(ranked[0], other) for other in ranked[1:]]
    if mode == "all_pairs":
        return [(a, b) for i, a in enumerate(ranked) for b in ranked[i + 1 :]]
    raise UserError(
        f'field "data.pair_mode": found "{mode}", allowed: best_vs_worst, best_vs_rest, all_pairs.'
    )


def _user(
    person: Person,
    conversations: list[tuple[Conversation, list[ScoredPair]]],
    latent: Latent | None,
    cfg: Any,
) -> User | None:
    """Splits a person's conversations, oldest first, into context (signals) and targets (held-out
    pairs)."""
    n = len(conversations)
    if n < 2:
        return None
    num_context = cfg.num_shots if n > cfg.num_shots + cfg.num_pairs else min(cfg.num_shots, n // 2)
    context, targets = conversations[:num_context], conversations[num_context:]
    shots: dict[str, Shot] = {}
    for conversation, pairs in context:
        first = [p.pair for p in pairs if p.turn == 0]  # a shot has no room for a history
        if first:
            shots[conversation.conversation_id] = Shot(
                first[0].prompt[-1]["content"], first[0].chosen, first[0].rejected
            )
    comments = tuple(Comment(c.opening_prompt, c.feedback) for c, _ in context if c.feedback)
    shown = {_plain(s.prompt) for s in shots.values()} | {
        _plain(t) for c in comments for t in (c.prompt, c.comment)
    }
    ranked = sorted(
        (rank, order, p.pair)
        for order, (_, pairs) in enumerate(targets)
        for rank, p in enumerate(pairs)
        if not shown & {_plain(m["content"]) for m in p.pair.prompt if m["role"] == "user"}
    )
    held_out = tuple(pair for _, _, pair in ranked[: cfg.num_pairs])
    if not held_out:
        return None
    user_id = f"prism/{person.user_id}"
    system = person.system_string if cfg.use_system_string else ""
    return User(
        user_id=user_id,
        profile="\n".join(t for t in (person.self_description, system) if t),
        survey=person.survey,
        shots=tuple(shots.values()),
        comments=comments,
        pairs=held_out,
        oracle=latent.oracle if latent else "",
        stated=latent.stated if latent else "",
        readings=tuple(latent.readings[c] for c in shots if c in latent.readings) if latent else (),
        split=split_of(user_id, cfg.validation_fraction, cfg.test_fraction),
    )


def _people(path: Path, on_bad_row: str) -> tuple[dict[str, Person], list[str]]:
    seen: dict[str, str] = {}

    def parse(row: Row) -> Person:
        person = Person(
            row.text("user_id"),
            _clean(row, "self_description"),
            _clean(row, "system_string"),
            survey_text(row),
        )
        row.unique("user_id", seen)
        return person

    people, bad = read_lines(path, parse, on_bad_row)
    return {p.user_id: p for p in people}, bad


def survey_text(row: Row) -> str:
    """Renders the informative answers of a survey row: "age: 25-34 years old; gender: female;
    ..."."""
    parts = [(name.replace("_", " "), _clean(row, name).lower()) for name in ANSWERS]
    parts += [
        (name if part == "simplified" else part.replace("_", " "), _clean(row.object(name), part))
        for name, part in GROUPS
    ]
    parts += [
        (name.replace("lm_", "language model ").replace("_", " "), _clean(row, name).lower())
        for name in MODEL_USE
    ]
    uses = row.object("lm_usecases", null=True).fields
    used = [
        name.replace("_", " ") for name, value in uses.items() if value == 1 and name != "other"
    ]
    parts.append(("uses", ", ".join(used)))
    preferences = row.object("stated_prefs")
    stated = [f"{name} {preferences.integer(name, 0, 100)}" for name in PREFERENCES]
    parts.append(("what matters (0-100)", ", ".join(stated)))
    parts.append(("also matters", _clean(preferences, "other_text")))
    return "; ".join(
        f"{label}: {answer}" for label, answer in parts if answer.lower() not in SILENT
    )


def _conversations(
    path: Path, people: dict[str, Person], on_bad_row: str
) -> tuple[dict[str, Conversation], list[str]]:
    seen: dict[str, str] = {}

    def parse(row: Row) -> Conversation:
        conversation = Conversation(
            row.text("conversation_id"),
            row.text("user_id"),
            row.text("generated_datetime"),
            _clean(row, "opening_prompt"),
            _clean(row, "open_feedback"),
        )
        if conversation.user_id not in people:
            raise row.error(
                "user_id",
                conversation.user_id,
                f"a user of {FILES[0]}",
                "Add the survey row or remove this one.",
            )
        row.unique("conversation_id", seen)
        return conversation

    conversations, bad = read_lines(path, parse, on_bad_row)
    return {c.conversation_id: c for c in conversations}, bad


def _utterances(
    path: Path, conversations: dict[str, Conversation], on_bad_row: str
) -> tuple[list[Utterance], list[str]]:
    seen: dict[str, str] = {}
    prompts: dict[tuple[str, int], str] = {}

    def parse(row: Row) -> Utterance:
        utterance = Utterance(
            row.text("utterance_id"),
            row.text("conversation_id"),
            row.integer("turn", 0),
            row.integer("within_turn_id", 0),
            row.text("user_prompt", empty=True),
            row.text("model_response", empty=True),
            row.integer("score", 1, 100),
            row.flag("if_chosen"),
        )
        conversation = conversations.get(utterance.conversation_id)
        if conversation is None:
            allowed = f"a conversation of {FILES[1]}"
            raise row.error(
                "conversation_id",
                utterance.conversation_id,
                allowed,
                "Add the conversation or remove this row.",
            )
        if row.text("user_id") != conversation.user_id:
            allowed = (
                f'"{conversation.user_id}", the user of {utterance.conversation_id} in {FILES[1]}'
            )
            raise row.error("user_id", row.fields["user_id"], allowed, "Correct the row.")
        prompt = prompts.setdefault((utterance.conversation_id, utterance.turn), utterance.prompt)
        if prompt != utterance.prompt:
            raise row.error(
                "user_prompt",
                utterance.prompt,
                f"the prompt of the turn's other rows, {prompt[:40]!r}",
                "Correct it.",
            )
        row.unique("utterance_id", seen)
        return utterance

    return read_lines(path, parse, on_bad_row)


def _latents(
    path: Path, people: dict[str, Person], on_bad_row: str
) -> tuple[dict[str, Latent], list[str]]:
    seen: dict[str, str] = {}

    def parse(row: Row) -> tuple[str, Latent]:
        user_id = row.text("user_id")
        if user_id not in people:
            raise row.error(
                "user_id", user_id, f"a user of {FILES[0]}", "Write the made data again."
            )
        items = row.object("readings")
        rows = {name: items.object(name) for name in items.fields}
        fields = ("question", "answer", "contrast")
        readings = {
            name: Reading(*(item.text(field) for field in fields)) for name, item in rows.items()
        }
        row.unique("user_id", seen)
        return user_id, Latent(
            row.text("oracle", empty=True), row.text("stated", empty=True), readings
        )

    latents, bad = read_lines(path, parse, on_bad_row)
    return dict(latents), bad


def _clean(row: Row, name: str) -> str:
    text = row.text(name, empty=True, null=True)
    return "" if _missing(text) else text


def _missing(text: str) -> bool:
    return text in ("", "EMPTY STRING")


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _number(conversation_id: str) -> tuple[int, str]:
    digits = "".join(c for c in conversation_id if c.isdigit())
    return int(digits or 0), conversation_id
