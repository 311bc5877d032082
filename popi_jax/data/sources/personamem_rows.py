"""The rows of PersonaMem as questions; sources/personamem.py says what they are."""

import ast
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from popi_jax.data.json_rows import Row
from popi_jax.data.records import Groups, Messages
from popi_jax.data.sources import chats

CHATS_V2 = "data/chat_history_32k"
V2_LINK = "chat_history_32k_link"
CHAT_TASKS = (  # of v3, as its publisher lists those of the chatbot
    *("chatbot_personalized_response", "over_personalization_chatbot_text"),
    *("over_personalization_context_shift", "over_personalization_sensitive_event"),
    *("over_personalization_sycophancy", "new_suggestions_chatbot", "personal_qa_hallucination"),
    *("preference_shift_followthrough", "hidden_persona_implicit_qa"),
)
NO_CHAT = "query of a task that is no chat"
NO_PAIR = "query without a pair of replies"
SPEAKER = re.compile(r"\A(?:User|Assistant|Therapist|Patient):\s*")
LETTER = re.compile(r"\s*\(([a-z])\)\s*", re.IGNORECASE)


Context = tuple[str, list[chats.Message]]  # its name, its messages


class Question(NamedTuple):
    """A question with its replies; `end` = how many messages, or what time, come before it."""

    where: str
    persona: str
    question_id: str
    context: str
    end: int
    prompt: Messages
    chosen: str
    rejected: tuple[str, ...]
    groups: Groups


def parse_v1(row: Row, seen: dict[str, str]) -> Question:
    row.check_unique("question_id", seen)
    end = row.get_text("end_index_in_shared_context")
    if not re.fullmatch(r"-?\d+", end):
        raise row.make_error("end_index_in_shared_context", end, "a whole number", "Correct it.")
    chosen, rejected = _parse_options(row)
    return Question(
        where=row.where,
        persona=row.get_text("persona_id"),
        question_id=row.get_text("question_id"),
        context=row.get_text("shared_context_id"),
        end=int(end),
        prompt=_ask(row.get_text("user_question_or_message")),
        chosen=chosen,
        rejected=rejected,
        groups={name: row.get_text(name) for name in ("topic", "question_type")},
    )


def _parse_options(row: Row) -> tuple[str, tuple[str, ...]]:
    """Returns the correct option and the others, without their letters."""
    name, allowed = "all_options", "a list of at least 2 texts that begin with (a), (b), ..."
    texts = _parse_literal(row, name)
    by_letter: dict[str, str] = {}
    for text in texts if isinstance(texts, list) else []:
        letter = LETTER.match(text) if isinstance(text, str) else None
        if not letter or not text[letter.end() :].strip() or letter[1].lower() in by_letter:
            raise row.make_error(name, text, allowed, "Correct the row.")
        by_letter[letter[1].lower()] = text[letter.end() :].strip()
    if len(by_letter) < 2:
        raise row.make_error(name, texts, allowed, "Correct the row.")
    correct = row.get_text("correct_answer").strip("()").lower()
    if correct not in by_letter:
        allowed = f"one of {', '.join(f'({letter})' for letter in by_letter)}"
        raise row.make_error("correct_answer", correct, allowed, "Correct the row.")
    return _check_replies(row, name, by_letter.pop(correct), list(by_letter.values()))


def _check_replies(
    row: Row, name: str, chosen: str, others: list[str]
) -> tuple[str, tuple[str, ...]]:
    """Checks that they are Unicode, and differ."""
    chosen, *others = Row(row.where, {name: [chosen, *others]}).get_texts(name)
    if chosen in others:
        allowed = "a correct option unlike the others"
        raise row.make_error(name, chosen, allowed, "Correct the row.")
    return chosen, tuple(dict.fromkeys(others))


def _parse_literal(row: Row, name: str) -> Any:
    """Returns the value of a cell that holds JSON, or Python as the publisher's program prints
    it."""
    text = row.get_text(name)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        allowed = "a list or object as JSON or Python writes it"
        raise row.make_error(name, text, allowed, "Correct the row.") from None


def parse_v2(row: Row, folder: Path) -> Question:
    link = row.get_text(V2_LINK)
    if (folder / link).parent != folder / CHATS_V2:
        raise row.make_error(V2_LINK, link, f"a file of {CHATS_V2}/", "Correct the row.")
    query = _parse_literal(row, "user_query")
    query = Row(row.where, query if isinstance(query, dict) else {}, "user_query.")
    others = _parse_literal(row, "incorrect_answers")
    name = "incorrect_answers"
    cells = Row(row.where, {name: others}).get_texts(name)
    chosen, rejected = _check_replies(row, name, row.get_text("correct_answer"), cells)
    persona, asked = row.get_text("persona_id"), query.get_text("content")
    digest = hashlib.sha256(f"{asked}\n{chosen}".encode()).hexdigest()[:10]
    names = {"topic": "topic_query", "question_type": "pref_type"}
    groups = {group: row.get_text(name) for group, name in names.items()}
    question_id = f"{persona}/{digest}"
    every = sys.maxsize  # all messages come before it
    return Question(
        row.where, persona, question_id, link, every, _ask(asked), chosen, rejected, groups
    )


def parse_v3(row: Row, persona: str, left_out: dict[str, int]) -> Question | None:
    task = row.get_text("task_type")
    instance = row.fields.get("instance_full")
    instance = instance if isinstance(instance, dict) else {}
    inside = Row(row.where, instance, "instance_full.")
    asked = [(row, "user_query"), (row, "query_text"), (inside, "user_query")]
    query = next((at.get_text(name) for at, name in asked if at.fields.get(name)), "")
    if task not in CHAT_TASKS or not query:
        left_out[NO_CHAT] += 1
        return None
    inferior = row.fields.get("inferior_response")
    inferior = inferior.get("text") if isinstance(inferior, dict) else inferior
    if not (row.fields.get("example_response") and inferior):
        left_out[NO_PAIR] += 1
        return None
    replies = Row(row.where, row.fields | {"inferior_response": inferior})
    chosen, rejected = (
        replies.get_text(name) for name in ("example_response", "inferior_response")
    )
    if chosen == rejected:
        allowed = 'a text other than "example_response"'
        raise row.make_error("inferior_response", rejected, allowed, "Correct the row.")
    past: list[chats.Message] = []
    if inside.fields.get("prior_conversation"):
        past = [parse_message(item) for item in inside.get_objects("prior_conversation")]
    whole = [role for role, _ in past] == ["user", "assistant"] * (len(past) // 2)
    before = [{"role": role, "content": text} for role, text in past if whole]
    return Question(
        where=row.where,
        persona=persona,
        question_id=row.get_text("query_id"),
        context="",
        end=row.get_integer("ts", 0),
        prompt=before + _ask(query),
        chosen=chosen,
        rejected=(rejected,),
        groups={"question_type": task},
    )


def parse_event(row: Row) -> tuple[int, list[chats.Message]]:
    """Returns the time of a chat, and its messages."""
    there = row.fields.get("conversation")
    messages = [parse_message(item) for item in row.get_objects("conversation")] if there else []
    return row.get_integer("source_timestamp", 0), messages


def parse_message(row: Row) -> chats.Message:
    role = row.get_text("role")
    if role not in ("system", "user", "assistant"):
        raise row.make_error("role", role, "system, user or assistant", "Correct the row.")
    return role, row.get_text("content", empty=True)


def _ask(text: str) -> Messages:
    return [{"role": "user", "content": text}]
