"""The words and conversations that both roles read: pure functions from records to text and token
ids.

Each conversation is cut where its context ends (docs/design.md): the generator's after the summary
z, that of the inference model after the signals u. Nothing is shortened here: encode.py does that.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from popi_jax.data.records import Messages, User

_CUT = "\ufdd0"  # a Unicode noncharacter: reserved for such a use, and replaced where data hold it


@runtime_checkable
class Tokenizer(Protocol):
    """What prompts need of data/tokenizer.py: Tokenizer."""

    eos_id: int

    def encode(self, text: str) -> list[int]: ...

    def render(self, messages: Messages, *, cut: str) -> tuple[list[int], ...]: ...


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


def render_inference_context(tokenizer: Tokenizer, signals: str) -> list[int]:
    """Returns the start of the inference model's conversation: one user message with the signals,
    still open."""
    return tokenizer.render([{"role": "user", "content": _clean(signals) + _CUT}], cut=_CUT)[0]


def render_summary_turn(tokenizer: Tokenizer, cfg: Any) -> list[int]:
    """Returns what follows the signals: the instruction that asks for a summary, up to the header
    of the summary."""
    return _render_request(tokenizer, cfg.model.summary_instruction)


def render_reading_turn(tokenizer: Tokenizer, question: str) -> list[int]:
    """Returns the same with a question about the signals, up to the header of the answer."""
    return _render_request(tokenizer, _clean(question))


def _render_request(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.render([{"role": "user", "content": _CUT + text}], cut=_CUT)[1]


def render_generator_prefix(tokenizer: Tokenizer, cfg: Any) -> list[int]:
    """Returns all that stands before the summary z: the header of the system message and the
    instruction."""
    told = cfg.model.answer_instruction
    system = {"role": "system", "content": (f"{told}\n" if told else "") + _CUT}
    return tokenizer.render([system, {"role": "user", "content": ""}], cut=_CUT)[0]


def render_generator_turn(tokenizer: Tokenizer, prompt: Messages) -> list[int]:
    """Returns what follows the summary z, up to the header of the reply; a system message of the
    prompt continues that of z."""
    messages = [{"role": m["role"], "content": _clean(m["content"])} for m in prompt]
    system = "\n" + messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    return tokenizer.render([{"role": "system", "content": _CUT + system}, *messages], cut=_CUT)[1]


def encode_answer(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns a reply, or a summary, with its end token."""
    return [*tokenizer.encode(text.strip()), tokenizer.eos_id]


def _clean(text: str) -> str:
    return text.replace(_CUT, "\ufffd")
