"""PRISM (arXiv 2404.16019): survey, conversations and utterances as published on the Hugging Face
hub -> users.

Scores are personal, so that pairs come from score differences inside one turn only. `if_chosen`
reconstructs the history and never labels a pair: it is random on a tie. Order in time is
`generated_datetime`, then the id."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from popi_jax.data.json_rows import Row, read_lines
from popi_jax.data.records import Comment, Groups, Messages, Pair, Reading, Shot, User
from popi_jax.data.sources import download
from popi_jax.data.sources.source import Card, FilesMissing, Loaded, Source
from popi_jax.data.splits import choose_split
from popi_jax.errors import UserError

T = TypeVar("T")

PAGE = "huggingface.co/datasets/HannahRoseKirk/prism-alignment"
REVISION = "18ab5cfb37456f4ec8cbc00212ce54cf7b1239f6"
# Those that the hub shows for the commit that last changed the files (Git LFS files); survey.jsonl
# is none, so that its sum is recorded at the first download. No download has been run yet.
SHA256 = {
    "survey.jsonl": "",
    "conversations.jsonl": "55ec67a194ca59d567b57acaeab813cb30abe801e73f9e495597a77ab674d638",
    "utterances.jsonl": "7829679350031d6678fa42b8106b2d05051bf9feea348a294400347af4a6deb4",
}
FILES = tuple(SHA256)
LATENTS = "latents.jsonl"  # only beside made data: the truth behind each user

MISSING = ("", "EMPTY STRING")
SILENT = ("", "prefer not to say", "unsure")  # answers that say nothing
ANSWERS = "age gender employment_status education marital_status english_proficiency".split()
GROUPS = (
    ("religion", "simplified"),
    ("ethnicity", "simplified"),
    ("location", "birth_country"),
    ("location", "reside_country"),
)
REGION = "special_region"  # of location: 11 regions, in the codebook; may be missing
MODEL_USE = "lm_familiarity lm_direct_use lm_indirect_use lm_frequency_use".split()
PREFERENCES = (
    *("values", "creativity", "fluency", "factuality"),
    *("diversity", "safety", "personalisation", "helpfulness"),
)


class Person(NamedTuple):
    user_id: str
    self_description: str
    system_string: str
    survey: str
    groups: Groups


class Conversation(NamedTuple):
    conversation_id: str
    user_id: str
    time: str
    opening_prompt: str
    feedback: str
    groups: Groups


class Utterance(NamedTuple):
    utterance_id: str
    conversation_id: str
    turn: int
    position: int  # within the turn
    prompt: str
    response: str
    score: int
    in_history: bool


class ScoredPair(NamedTuple):
    pair: Pair
    turn: int
    margin: int  # points of 100


class Latent(NamedTuple):
    oracle: str
    stated: str
    readings: dict[str, Reading]  # by conversation


def find_folder(cfg: Any, may_download: bool) -> Path:
    """Returns `data.path`, into which the files are downloaded when there are none.

    Raises: FilesMissing when there are none and none can be had; UserError when some are missing.
    """
    folder = Path(cfg.path)
    missing = [name for name in FILES if not (folder / name).exists()]
    if not missing:
        return folder
    present = ", ".join(name for name in FILES if name not in missing)
    if present:
        told = f"{folder}: no {', '.join(missing)} beside {present} (field data.path)"
        raise UserError(f"{told}. Add it, or remove the others.")
    reason = "field data.download is False."
    if may_download:
        try:
            download.download_files(folder, f"https://{PAGE}/resolve/{REVISION}", SHA256)
            return folder
        except download.DownloadFailed as e:
            reason = str(e)
    fix = f"Put {', '.join(FILES)} from {PAGE} there, or set data.path to their folder."
    told = f"{folder}: no PRISM files (field data.path), and no download: {reason}"
    raise FilesMissing(f"{told} {fix}")


def list_files(folder: Path) -> list[Path]:
    """Returns the files that `load` reads."""
    latents = folder / LATENTS
    return [folder / name for name in FILES] + ([latents] if latents.exists() else [])


def load(folder: Path, cfg: Any) -> Loaded:
    """Reads the three files, and latents.jsonl where it exists. People with fewer than 2
    conversations that hold a pair are left out, and so are those none of whose held-out pairs has a
    prompt of its own.

    Args: cfg: the `data` part of the configuration.
    Raises: UserError."""
    skip = cfg.on_bad_row
    people, bad = _read_table(folder / FILES[0], "user_id", _parse_person, skip)
    parse = partial(_parse_conversation, people=people)
    conversations, more = _read_table(folder / FILES[1], "conversation_id", parse, skip)
    bad += more
    parse_utterance = partial(_parse_utterance, conversations=conversations, prompts={})
    utterances, more = _read_table(folder / FILES[2], "utterance_id", parse_utterance, skip)
    bad += more
    latents = dict[str, Latent]()
    if (folder / LATENTS).exists():
        parse_latent = partial(_parse_latent, people=people)
        latents, more = _read_table(folder / LATENTS, "user_id", parse_latent, skip)
        bad += more

    turns: dict[str, dict[int, list[Utterance]]] = defaultdict(lambda: defaultdict(list))
    for utterance in utterances.values():
        turns[utterance.conversation_id][utterance.turn].append(utterance)
    by_person: dict[str, list[tuple[Conversation, list[ScoredPair]]]] = defaultdict(list)
    for conversation in sorted(conversations.values(), key=_order_in_time):
        pairs = list_pairs(turns[conversation.conversation_id], cfg)
        if pairs:
            by_person[conversation.user_id].append((conversation, pairs))
    users = [
        _make_user(person, by_person[user_id], latents.get(user_id), cfg)
        for user_id, person in people.items()
    ]
    kept = [user for user in users if user]
    return Loaded(kept, bad, shared_replies=bool(latents))  # those of made people do


def list_pairs(turns: dict[int, list[Utterance]], cfg: Any) -> list[ScoredPair]:
    """Returns the preference pairs of a conversation in the order of turns, then of score
    differences (widest first).

    Equal replies inside a turn count once; the stand-in "EMPTY STRING" is never a reply, a prompt
    or a history."""
    found: list[ScoredPair] = []
    history: Messages = []
    for turn in range(len(turns) if cfg.turns == "all" else 1):
        replies = sorted(turns.get(turn, []), key=lambda u: u.position)
        if not replies or MISSING.__contains__(replies[0].prompt):
            break  # what follows has no history
        prompt = history + [{"role": "user", "content": replies[0].prompt}]
        distinct = {
            u.response: u for u in reversed(replies) if not MISSING.__contains__(u.response)
        }
        pairs = []
        for a, b in _compare([*distinct.values()], cfg.pair_mode):
            margin = a.score - b.score
            if margin >= max(1, cfg.score_margin):
                record_id = f"{a.utterance_id}>{b.utterance_id}"
                pair = Pair(record_id, prompt, a.response, b.response)
                pairs.append(ScoredPair(pair, turn, margin))
        found += sorted(pairs, key=lambda p: (-p.margin, p.pair.record_id))
        continued = [
            u.response for u in replies if u.in_history and not MISSING.__contains__(u.response)
        ]
        if not continued:
            break
        history = prompt + [{"role": "assistant", "content": continued[0]}]
    return found


def _compare(replies: list[Utterance], mode: str) -> list[tuple[Utterance, Utterance]]:
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


def _make_user(
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
        first = [p.pair for p in pairs if p.turn == 0][:1]  # a shot has no room for a history
        for pair in first:
            shot = Shot(pair.prompt[-1]["content"], pair.chosen, pair.rejected)
            shots[conversation.conversation_id] = shot
    comments = tuple(Comment(c.opening_prompt, c.feedback) for c, _ in context if c.feedback)
    shown = {_normalise(s.prompt) for s in shots.values()} | {
        _normalise(t) for c in comments for t in (c.prompt, c.comment)
    }
    ranked = sorted(
        (rank, order, dataclasses.replace(p.pair, groups=conversation.groups))
        for order, (conversation, pairs) in enumerate(targets)
        for rank, p in enumerate(pairs)
        if not shown & {_normalise(m["content"]) for m in p.pair.prompt if m["role"] == "user"}
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
        split=choose_split(user_id, cfg.validation_fraction, cfg.test_fraction),
        groups=person.groups,
    )


def _read_table(
    path: Path, id_field: str, parse: Callable[[Row], T], on_bad_row: str
) -> tuple[dict[str, T], list[str]]:
    """Returns the rows by their ids, which must occur once, and the bad rows."""
    seen: dict[str, str] = {}

    def parse_row(row: Row) -> tuple[str, T]:
        parsed = parse(row)
        row.check_unique(id_field, seen)
        return row.get_text(id_field), parsed

    rows, bad = read_lines(path, parse_row, on_bad_row)
    return dict(rows), bad


def _parse_person(row: Row) -> Person:
    user_id = row.get_text("user_id")
    texts = (_clean(row, "self_description"), _clean(row, "system_string"))
    return Person(user_id, *texts, render_survey(row), _read_groups(row))


def render_survey(row: Row) -> str:
    """Renders the informative answers of a survey row: "age: 25-34 years old; gender: female;
    ..."."""
    parts = [(name.replace("_", " "), _clean(row, name).lower()) for name in ANSWERS]
    for name, part in GROUPS:
        label = name if part == "simplified" else part.replace("_", " ")
        parts.append((label, _clean(row.get_object(name), part)))
    for name in MODEL_USE:
        label = name.replace("lm_", "language model ").replace("_", " ")
        parts.append((label, _clean(row, name).lower()))
    uses = row.get_object("lm_usecases", null=True).fields
    used = [n.replace("_", " ") for n, value in uses.items() if value == 1 and n != "other"]
    parts.append(("uses", ", ".join(used)))
    preferences = row.get_object("stated_prefs")
    stated = [f"{name} {preferences.get_integer(name, 0, 100)}" for name in PREFERENCES]
    parts.append(("what matters (0-100)", ", ".join(stated)))
    parts.append(("also matters", _clean(preferences, "other_text")))
    said = [(label, answer) for label, answer in parts if answer.lower() not in SILENT]
    return "; ".join(f"{label}: {answer}" for label, answer in said)


def _parse_conversation(row: Row, people: dict[str, Person]) -> Conversation:
    conversation = Conversation(
        row.get_text("conversation_id"),
        row.get_text("user_id"),
        row.get_text("generated_datetime"),
        _clean(row, "opening_prompt"),
        _clean(row, "open_feedback"),
        _keep_told({"conversation_type": _clean(row, "conversation_type", absent=True)}),
    )
    if conversation.user_id not in people:
        allowed, fix = f"a user of {FILES[0]}", "Add the survey row or remove this one."
        raise row.make_error("user_id", conversation.user_id, allowed, fix)
    return conversation


def _parse_utterance(
    row: Row, conversations: dict[str, Conversation], prompts: dict[tuple[str, int], str]
) -> Utterance:
    """`prompts` collects the prompt of each turn of each conversation."""
    utterance = Utterance(
        row.get_text("utterance_id"),
        row.get_text("conversation_id"),
        row.get_integer("turn", 0),
        row.get_integer("within_turn_id", 0),
        row.get_text("user_prompt", empty=True),
        row.get_text("model_response", empty=True),
        row.get_integer("score", 1, 100),
        row.get_flag("if_chosen"),
    )
    conversation_id = utterance.conversation_id
    if conversation_id not in conversations:
        allowed = f"a conversation of {FILES[1]}"
        fix = "Add the conversation or remove this row."
        raise row.make_error("conversation_id", conversation_id, allowed, fix)
    user_id = conversations[conversation_id].user_id
    if row.get_text("user_id") != user_id:
        allowed = f'"{user_id}", the user of {conversation_id} in {FILES[1]}'
        raise row.make_error("user_id", row.fields["user_id"], allowed, "Correct the row.")
    prompt = prompts.setdefault((conversation_id, utterance.turn), utterance.prompt)
    if prompt != utterance.prompt:
        allowed = f"the prompt of the turn's other rows, {prompt[:40]!r}"
        raise row.make_error("user_prompt", utterance.prompt, allowed, "Correct it.")
    return utterance


def _parse_latent(row: Row, people: dict[str, Person]) -> Latent:
    user_id = row.get_text("user_id")
    if user_id not in people:
        allowed = f"a user of {FILES[0]}"
        raise row.make_error("user_id", user_id, allowed, "Write the made data again.")
    readings = {}
    items = row.get_object("readings")
    for name in items.fields:
        item = items.get_object(name)
        texts = (item.get_text(field) for field in ("question", "answer", "contrast"))
        readings[name] = Reading(*texts)
    oracle, stated = (row.get_text(name, empty=True) for name in ("oracle", "stated"))
    return Latent(oracle, stated, readings)


def _clean(row: Row, name: str, *, absent: bool = False) -> str:
    """absent: the field may be missing."""
    if absent and name not in row.fields:
        return ""
    text = row.get_text(name, empty=True, null=True)
    return "" if MISSING.__contains__(text) else text


def _read_groups(row: Row) -> Groups:
    """The groups of a person, in the words of the survey; `region` is the published
    special_region. An answer that says nothing gives no group."""
    told = {name: _clean(row, name) for name in ANSWERS}
    told |= {name: _clean(row.get_object(name), "simplified") for name in ("religion", "ethnicity")}
    return _keep_told(told | {"region": _clean(row.get_object("location"), REGION, absent=True)})


def _keep_told(groups: Groups) -> Groups:
    return {name: value for name, value in groups.items() if value.lower() not in SILENT}


def _normalise(text: str) -> str:
    return " ".join(text.casefold().split())


def _order_in_time(conversation: Conversation) -> tuple[str, int, str]:
    digits = "".join(c for c in conversation.conversation_id if c.isdigit())
    return conversation.time, int(digits or 0), conversation.conversation_id


SOURCE = Source(
    name="prism",
    kind="published",
    card=Card(
        title="PRISM (arXiv 2404.16019)",
        citation="Kirk et al., The PRISM Alignment Dataset, 2024, doi 10.57967/hf/2113",
        page=PAGE,
        licence="human texts CC-BY-4.0; model responses CC-BY-NC-4.0 and under the terms of their "
        "providers, so weights trained on them are for non-commercial use.",
        forbids="commercial use; identifying participants",
    ),
    options="on_bad_row validation_fraction test_fraction num_shots num_pairs pair_mode "
    "score_margin turns use_system_string".split(),
    files=list_files,
    load=load,
    find=find_folder,
)
