"""The rows of the PRISM files, checked against each other.

The stand-in "EMPTY STRING" of the publishers is read as "". Names are those of the codebook."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from popi_jax.data.json_rows import Row, stream_rows
from popi_jax.data.records import Groups, Reading

T = TypeVar("T")

FILES = ("survey.jsonl", "conversations.jsonl", "utterances.jsonl")
LATENTS = "latents.jsonl"  # only beside made data: the truth behind each user

EMPTY = "EMPTY STRING"
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


class Latent(NamedTuple):
    oracle: str
    stated: str
    readings: dict[str, Reading]  # by conversation


class Tables(NamedTuple):
    """The rows by their ids, in the order of the files."""

    people: dict[str, Person]
    conversations: dict[str, Conversation]
    utterances: dict[str, Utterance]
    latents: dict[str, Latent]  # by user
    bad_rows: list[str]


def read_tables(folder: Path, on_bad_row: str) -> Tables:
    """Reads the three files, and latents.jsonl where it exists. Raises: UserError."""
    bad: list[str] = []

    def read(name: str, id_field: str, parse: Callable[[Row], T]) -> dict[str, T]:
        seen: dict[str, str] = {}

        def parse_row(row: Row) -> tuple[str, T]:
            parsed = parse(row)
            row.check_unique(id_field, seen)
            return row.get_text(id_field), parsed

        return dict(stream_rows(folder / name, parse_row, on_bad_row, bad))

    survey, conversations_file, utterances_file = FILES
    people = read(survey, "user_id", _parse_person)
    parse_conversation = partial(_parse_conversation, people=people)
    conversations = read(conversations_file, "conversation_id", parse_conversation)
    parse_utterance = partial(_parse_utterance, conversations=conversations, prompts={})
    utterances = read(utterances_file, "utterance_id", parse_utterance)
    latents: dict[str, Latent] = {}
    if (folder / LATENTS).exists():
        latents = read(LATENTS, "user_id", partial(_parse_latent, people=people))
    return Tables(people, conversations, utterances, latents, bad)


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
        _clean(row, "user_prompt", null=False),
        _clean(row, "model_response", null=False),
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


def _clean(row: Row, name: str, *, absent: bool = False, null: bool = True) -> str:
    """absent, null: the field may be missing, may be null."""
    if absent and name not in row.fields:
        return ""
    text = row.get_text(name, empty=True, null=null)
    return "" if text == EMPTY else text


def _read_groups(row: Row) -> Groups:
    """The groups of a person, in the words of the survey; `region` is the published
    special_region. An answer that says nothing gives no group."""
    told = {name: _clean(row, name) for name in ANSWERS}
    told |= {name: _clean(row.get_object(name), "simplified") for name in ("religion", "ethnicity")}
    return _keep_told(told | {"region": _clean(row.get_object("location"), REGION, absent=True)})


def _keep_told(groups: Groups) -> Groups:
    return {name: value for name, value in groups.items() if value.lower() not in SILENT}
