"""Signals that are chats: what a person wrote, each with the message that it answers."""

import functools
from collections.abc import Iterable

from popi_jax.data.leaks import SPOKEN, fold, hear
from popi_jax.data.records import Comment

Message = tuple[str, str]  # role (user | assistant | system), content


def make_comments(messages: Iterable[Message]) -> tuple[Comment, ...]:
    """Returns each message of the person together with the assistant's message before it, ""
    where there is none. A system message starts another conversation."""
    comments: list[Comment] = []
    answered = ""
    for role, content in messages:
        if role == "user" and content:
            comments.append(Comment(answered, content))
        answered = content if role == "assistant" else ""
    return tuple(comments)


def hold(comments: Iterable[Comment], texts: Iterable[str]) -> bool:
    """Says whether one of the texts, such as a reply to choose from, is one of a chat or a part of
    one, as data/leaks.py takes it."""
    return hear(list_texts(comments)).holds(*texts)


def say(comments: Iterable[Comment], persona: str) -> bool:
    """Says whether the true persona is said word for word."""
    text = fold(persona)
    return len(text) >= SPOKEN and text in "\n".join(list_texts(comments))


def list_texts(comments: Iterable[Comment]) -> list[str]:
    """The folded texts."""
    return [_fold(text) for c in comments for text in (c.prompt, c.comment) if text]


@functools.lru_cache(maxsize=4096)  # the chats of a person before each of many questions
def _fold(text: str) -> str:
    return fold(text)
