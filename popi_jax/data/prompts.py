"""The words and conversations that both roles read: pure functions from records to text and token
ids.

Each conversation is cut where its context ends (docs/design.md): the generator's after the summary
z, that of the inference model after the signals u. Nothing is shortened here: encode.py does that.
"""

import functools
import os
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, SupportsIndex, runtime_checkable

from popi_jax import templates
from popi_jax.data.records import Messages, User
from popi_jax.errors import UserError

_CUT = "\ufdd0"  # a Unicode noncharacter: reserved for such a use, and replaced where data hold it


_KNOWN_TEXTS = 1024  # about users, that are kept encoded: each is asked for several times
_LETTER = "x"  # stands for a summary: texts are encoded as they go on after a letter
_SAID = [{"role": "user", "content": _LETTER}]  # stands for a prompt
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


# settings of the model that change what its prompts say, beside those of the tokenizer
WORDING = (
    *("summary_instruction", "summary_system", "signals_template"),
    *("answer_instruction", "answer_template", "summary_place"),
)


class Wording(NamedTuple):
    """Of the message that holds the summary."""

    template: str = ""  # model.answer_template
    instruction: str = ""  # model.answer_instruction


PLAIN = Wording()


def get_wording(cfg: Any) -> Wording:
    return Wording(cfg.model.answer_template, cfg.model.answer_instruction)


def render_signals(user: User, layout: str = "paired", template: str = "") -> str:
    """Returns the raw signals u as plain text: profile, survey, comments, then past pairs; what is
    empty is left out.

    layout: "paired" keeps the two replies of a pair together, "grouped" puts all rejected replies
    last. template: model.signals_template, which decides about all that."""
    shots = [{"prompt": s.prompt, "chosen": s.chosen, "rejected": s.rejected} for s in user.shots]
    comments = [{"prompt": c.prompt, "comment": c.comment} for c in user.comments]
    values = {"profile": user.profile, "survey": user.survey, "layout": layout}
    return templates.render("signals", template, values | {"comments": comments, "shots": shots})


def render_asked(prompt: Messages) -> str:
    """Returns the prompt that a summary is for, as it stands behind the signals."""
    if len(prompt) == 1:
        return f"\nasks now: {prompt[0]['content']}"
    return "\nasks now:" + "".join(f"\n{m['role']}: {m['content']}" for m in prompt)


def list_training_texts(users: Iterable[User], cfg: Any) -> Iterator[str]:
    """Yields all that a tokenizer made for these users must be able to say."""
    m = cfg.model
    fixed = [m.summary_instruction, m.answer_instruction]
    fixed += [m.summary_system] if m.summary_system else []
    if m.answer_template:
        fixed += [held["content"] for held in _hold_summary(get_wording(cfg), "")[:1]]
    for user in users:
        yield from fixed
        yield render_signals(user, cfg.data.pair_layout, cfg.model.signals_template)
        yield from (user.oracle, user.stated)
        yield from (text for r in user.readings for text in (r.question, r.answer))
        for pair in user.pairs:
            yield from (m["content"] for m in pair.prompt)
            yield from (pair.chosen, pair.rejected)


def render_inference_context(
    tokenizer: Tokenizer, signals: str, instruction: str = "", system: str = ""
) -> list[int]:
    """Returns the start of the inference model's conversation: one user message with the signals,
    still open; before it the system message `system`, model.summary_system, where there is one.

    instruction: model.summary_instruction. Followed by `render_summary_turn` these are the ids of
    the whole message. Where the tokenizer joins the signals with it in an unusual way, they are
    encoded apart."""
    return [*_render_signals(tokenizer, _clean(signals), instruction, system)]


@functools.lru_cache(_KNOWN_TEXTS)
def _render_signals(
    tokenizer: Tokenizer, signals: str, instruction: str, system: str
) -> tuple[int, ...]:
    def render(content: str) -> tuple[list[int], ...]:
        before = [{"role": "system", "content": system}] if system else []
        return tokenizer.render([*before, {"role": "user", "content": content}], cut=_CUT)

    turn = _render_request(tokenizer, instruction)
    (whole,) = render(signals + instruction)
    if whole[-len(turn) :] == turn:
        return tuple(whole[: -len(turn)])
    return tuple(render(signals + _CUT + instruction)[0])


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
    """Returns all that stands before the summary z: the header of the message that holds it and
    what its template writes before it."""
    return tokenizer.render(_hold_summary(get_wording(cfg), _CUT), cut=_CUT)[0]


def render_generator_turn(
    tokenizer: Tokenizer, prompt: Messages, wording: Wording = PLAIN
) -> list[int]:
    """Returns what follows the summary z, up to the header of the reply. A system message of the
    prompt continues that of z; where the template of z holds the prompt, it begins that.

    Raises: UserError where the chat template writes the system message, and so z, behind a part of
    the prompt: z stands before all of it."""
    rest = [{"role": m["role"], "content": _clean(m["content"])} for m in prompt]
    own = rest.pop(0)["content"] if rest[0]["role"] == "system" else None

    def render(messages: Messages) -> tuple[list[int], ...]:
        held = _hold_summary(wording, _CUT + _LETTER + _CUT, own, messages)
        return tokenizer.render(held, cut=_CUT)

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
    return [*_encode_summary(tokenizer, text, get_wording(cfg))]


@functools.lru_cache(_KNOWN_TEXTS)
def _encode_summary(tokenizer: Tokenizer, text: str, wording: Wording) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, _write_prefix(tokenizer, wording)))


@functools.lru_cache(16)
def _write_prefix(tokenizer: Tokenizer, wording: Wording) -> str:
    return tokenizer.write(_hold_summary(wording, _CUT)).split(_CUT)[0]


def encode_answer(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns a reply, or a summary, as the template writes it behind the header, with its end
    token."""
    return tokenizer.encode_reply(_clean(text))


def _hold_summary(
    wording: Wording, summary: str, own: str | None = None, messages: Messages = _SAID
) -> Messages:
    """A conversation that holds a summary; own: the system message of its prompt. The summary
    stands in a system message, or in the first of the user where its template holds the prompt."""
    values = {"summary": summary, "instruction": wording.instruction, "prompt": ""}
    if not templates.reads("answer", wording.template, "prompt"):
        content = templates.render("answer", wording.template, values)
        content += "" if own is None else f"\n{own}"
        return [{"role": "system", "content": content}, *messages]
    first, *rest = messages
    values["prompt"] = "\n\n".join(text for text in (own, first["content"]) if text)
    content = templates.render("answer", wording.template, values)
    return [{"role": "user", "content": content}, *rest]


def _clean(text: str) -> str:
    return text.replace(_CUT, "\ufffd")
