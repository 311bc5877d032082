"""The words and conversations that both roles read: pure functions from records to text and token
ids.

Each conversation is cut where its context ends (docs/design.md): the generator's after the summary
z, that of the inference model after the signals u. Refuses to shorten anything: encoding.py does
that."""

from collections.abc import Iterable, Iterator
from typing import Any

from popi_jax.data.records import Messages, User
from popi_jax.data.tokenizer import Tokenizer

_CUT = "\ufdd0"  # a Unicode noncharacter: reserved for uses like this one, and replaced where data holds it


def signals_text(user: User, layout: str = "paired") -> str:
    """The raw signals u as plain text: profile, survey, comments, then past pairs; what is empty is
    left out.

    layout: "paired" keeps the two replies of a pair together, "grouped" puts all rejected replies
    last."""
    parts = [f"profile: {user.profile}"] if user.profile else []
    parts += [f"survey: {user.survey}"] if user.survey else []
    parts += [
        f"about: {c.prompt}\nwrote: {c.comment}" if c.prompt else f"wrote: {c.comment}"
        for c in user.comments
    ]
    asked = [f"asked: {s.prompt}\nliked: {s.chosen}" for s in user.shots]
    disliked = [f"disliked: {s.rejected}" for s in user.shots]
    if layout == "grouped":
        parts += asked + disliked
    else:
        parts += [text for pair in zip(asked, disliked, strict=True) for text in pair]
    return "\n".join(parts)


def training_texts(users: Iterable[User], cfg: Any) -> Iterator[str]:
    """All that a tokenizer made for these users must be able to say."""
    for user in users:
        yield from (cfg.model.summary_instruction, cfg.model.answer_instruction)
        yield signals_text(user, cfg.data.pair_layout)
        yield from (user.oracle, user.stated)
        yield from (text for r in user.readings for text in (r.question, r.answer))
        for pair in user.pairs:
            yield from (m["content"] for m in pair.prompt)
            yield from (pair.chosen, pair.rejected)


def inference_context(tokenizer: Tokenizer, signals: str) -> list[int]:
    """Start of the inference model's conversation: one user message with the signals, still
    open."""
    return tokenizer.render([{"role": "user", "content": _clean(signals) + _CUT}], cut=_CUT)[0]


def summary_turn(tokenizer: Tokenizer, cfg: Any) -> list[int]:
    """From the end of the signals, through the instruction that asks for a summary, to the header
    of the summary."""
    return _asked(tokenizer, cfg.model.summary_instruction)


def reading_turn(tokenizer: Tokenizer, question: str) -> list[int]:
    """The same with a question about the signals, up to the header of the answer."""
    return _asked(tokenizer, _clean(question))


def _asked(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.render([{"role": "user", "content": _CUT + text}], cut=_CUT)[1]


def generator_prefix(tokenizer: Tokenizer, cfg: Any) -> list[int]:
    """All that stands before the summary z: the header of the system message and the
    instruction."""
    messages = [
        {"role": "system", "content": _lines(cfg.model.answer_instruction, "") + _CUT},
        {"role": "user", "content": ""},
    ]
    return tokenizer.render(messages, cut=_CUT)[0]


def generator_turn(tokenizer: Tokenizer, prompt: Messages) -> list[int]:
    """From just after the summary z to the header of the reply; a system message of the prompt
    continues that of z."""
    messages = [{"role": m["role"], "content": _clean(m["content"])} for m in prompt]
    system = "\n" + messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    return tokenizer.render([{"role": "system", "content": _CUT + system}, *messages], cut=_CUT)[1]


def answer(tokenizer: Tokenizer, text: str) -> list[int]:
    """A reply, or a summary, with its end token."""
    return [*tokenizer.encode(text.strip()), tokenizer.eos_id]


def _lines(instruction: str, rest: str) -> str:
    return f"{instruction}\n{rest}" if instruction else rest


def _clean(text: str) -> str:
    return text.replace(_CUT, "\ufffd")
