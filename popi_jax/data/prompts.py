"""The words and conversations that both roles read: pure functions from records to text and token
ids.

Each conversation is cut where its context ends (docs/design.md): the generator's after the summary
z, that of the inference model after the signals u. Nothing is shortened here: encode.py does that.
"""

import functools
import os
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, Protocol, SupportsIndex, runtime_checkable

from popi_jax.data.records import Messages, User
from popi_jax.errors import UserError

_CUT = "\ufdd0"  # a Unicode noncharacter: reserved for such a use, and replaced where data hold it


_KNOWN_TEXTS = 1024  # about users, that are kept encoded: each is asked for several times
_LETTER = "x"  # stands for a summary: texts are encoded as they go on after a letter
# what signals may end with
_ENDS = ("x", "x.", "x)", "1", "é", "x\n", "")


@runtime_checkable
class Tokenizer(Hashable, Protocol):
    """What is needed of data/tokenizer.py: Tokenizer."""

    source: str
    eos_id: int
    pad_id: int

    def encode(self, text: str, after: str = "") -> list[int]: ...

    def decode(self, ids: Iterable[SupportsIndex]) -> str: ...

    def encode_reply(self, text: str) -> list[int]: ...

    def render(self, messages: Messages, *, cut: str) -> tuple[list[int], ...]: ...

    def write(self, messages: Messages) -> str: ...


def render_signals(user: User, layout: str = "paired") -> str:
    """Returns the raw signals u as plain text: profile, survey, comments, then past pairs; what is
    empty is left out.

    layout: "paired" keeps the two replies of a pair together, "grouped" puts all rejected replies
    last."""
    parts = [f"profile: {user.profile}"] if user.profile else []
    parts += [f"survey: {user.survey}"] if user.survey else []
    for c in user.comments:
        parts.append(
            f"about: {c.prompt}\nwrote: {c.comment}" if c.prompt else f"wrote: {c.comment}"
        )
    asked = [f"asked: {s.prompt}\nliked: {s.chosen}" for s in user.shots]
    disliked = [f"disliked: {s.rejected}" for s in user.shots]
    if layout == "grouped":
        parts += asked + disliked
    else:
        parts += [text for pair in zip(asked, disliked, strict=True) for text in pair]
    return "\n".join(parts)


def render_asked(prompt: Messages) -> str:
    """Returns the prompt that a summary is for, as it stands behind the signals."""
    if len(prompt) == 1:
        return f"\nasks now: {prompt[0]['content']}"
    return "\nasks now:" + "".join(f"\n{m['role']}: {m['content']}" for m in prompt)


def list_training_texts(users: Iterable[User], cfg: Any) -> Iterator[str]:
    """Yields all that a tokenizer made for these users must be able to say."""
    for user in users:
        yield from (cfg.model.summary_instruction, cfg.model.answer_instruction)
        yield render_signals(user, cfg.data.pair_layout)
        yield from (user.oracle, user.stated)
        yield from (text for r in user.readings for text in (r.question, r.answer))
        for pair in user.pairs:
            yield from (m["content"] for m in pair.prompt)
            yield from (pair.chosen, pair.rejected)


def render_inference_context(
    tokenizer: Tokenizer, signals: str, instruction: str = ""
) -> list[int]:
    """Returns the start of the inference model's conversation: one user message with the signals,
    still open.

    instruction: model.summary_instruction. Followed by `render_summary_turn` these are the ids of
    the whole message. Where the tokenizer joins the signals with it in an unusual way, they are
    encoded apart."""
    return [*_render_signals(tokenizer, _clean(signals), instruction)]


@functools.lru_cache(_KNOWN_TEXTS)
def _render_signals(tokenizer: Tokenizer, signals: str, instruction: str) -> tuple[int, ...]:
    turn = _render_request(tokenizer, instruction)
    (whole,) = tokenizer.render([{"role": "user", "content": signals + instruction}], cut=_CUT)
    if whole[-len(turn) :] == turn:
        return tuple(whole[: -len(turn)])
    apart = [{"role": "user", "content": signals + _CUT + instruction}]
    return tuple(tokenizer.render(apart, cut=_CUT)[0])


def render_summary_turn(tokenizer: Tokenizer, cfg: Any) -> list[int]:
    """Returns what follows the signals: the instruction that asks for a summary, up to the header
    of the summary. It is what is the same after all signals: a tokenizer may join the line break at
    the head of the instruction with the end of the signals."""
    return _render_request(tokenizer, cfg.model.summary_instruction)


def render_reading_turn(tokenizer: Tokenizer, question: str) -> list[int]:
    """Returns the same with a question about the signals, up to the header of the answer."""
    asked = [{"role": "user", "content": f"{_LETTER}{_CUT} {_clean(question)}"}]
    return tokenizer.render(asked, cut=_CUT)[1]


@functools.lru_cache(16)
def _render_request(tokenizer: Tokenizer, text: str) -> list[int]:
    asked = [[{"role": "user", "content": end + text}] for end in _ENDS]
    found = [tokenizer.render(messages, cut=_CUT)[0][::-1] for messages in asked]
    return list(os.path.commonprefix(found)[::-1])


def render_generator_prefix(tokenizer: Tokenizer, cfg: Any) -> list[int]:
    """Returns all that stands before the summary z: the header of the system message and the
    instruction."""
    return tokenizer.render(_hold_summary(cfg.model.answer_instruction, _CUT), cut=_CUT)[0]


def render_generator_turn(tokenizer: Tokenizer, prompt: Messages) -> list[int]:
    """Returns what follows the summary z, up to the header of the reply; a system message of the
    prompt continues that of z.

    Raises: UserError where the template writes the system message, and so z, behind a part of the
    prompt: z stands before all of it."""
    first, *rest = [{"role": m["role"], "content": _clean(m["content"])} for m in prompt]
    own = "\n" + first["content"] if first["role"] == "system" else ""
    rest = rest if own else [first, *rest]

    def render(messages: Messages) -> tuple[list[int], ...]:
        system = {"role": "system", "content": _CUT + _LETTER + _CUT + own}
        return tokenizer.render([system, *messages], cut=_CUT)

    before, _, turn = render(rest)
    if len(rest) > 1 and before != render(rest[-1:])[0]:
        raise UserError(
            f"{tokenizer.source}: the chat template writes the system message, which holds the "
            f"summary, behind the first of {len(rest)} messages; set "
            "--config.model.summary_place=user, so that it stands at the head of the first one"
        )
    return turn


def encode_summary(tokenizer: Tokenizer, text: str, cfg: Any) -> list[int]:
    """Returns a text about the user as it stands in the place of the summary z."""
    return [*_encode_summary(tokenizer, text, cfg.model.answer_instruction)]


@functools.lru_cache(_KNOWN_TEXTS)
def _encode_summary(tokenizer: Tokenizer, text: str, told: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, _write_prefix(tokenizer, told)))


@functools.lru_cache(16)
def _write_prefix(tokenizer: Tokenizer, told: str) -> str:
    return tokenizer.write(_hold_summary(told, _CUT)).split(_CUT)[0]


def encode_answer(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns a reply, or a summary, as the template writes it behind the header, with its end
    token."""
    return tokenizer.encode_reply(_clean(text))


def _hold_summary(told: str, summary: str) -> Messages:
    system = {"role": "system", "content": (f"{told}\n" if told else "") + summary}
    return [system, {"role": "user", "content": _LETTER}]


def _clean(text: str) -> str:
    return text.replace(_CUT, "\ufffd")
