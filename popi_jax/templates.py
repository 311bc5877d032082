"""Templates for what the two roles read of a user: Jinja, in a sandbox and without chance.

A setting holds the text of a template; "" stands for ours in popi_jax/data/templates. Text of the
data is put in as it is, and never read as a template."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

from popi_jax.config_rules import expand_home
from popi_jax.errors import UserError, did_you_mean

OURS = Path(__file__).parent / "data" / "templates"
VARIABLES = {
    "signals": ("profile", "survey", "comments", "shots", "layout"),
    "answer": ("summary", "prompt", "instruction"),
}
# what running a template may raise
_FAULTS = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError),
    *(TypeError, ValueError),
)
_SUMMARY = '\ue000 "Tea" <b>&\n\n  x \ue001'  # what a template that changes texts changes
# users of whom a template of signals must be able to tell
_SHOT = {"prompt": "p", "chosen": "c", "rejected": "r"}
_TRIED: tuple[dict[str, Any], ...] = (
    {"profile": "", "survey": "", "comments": (), "shots": ()},
    {
        **{"profile": "a", "survey": "b", "shots": (_SHOT, _SHOT)},
        "comments": ({"prompt": "", "comment": "c"}, {"prompt": "p", "comment": "c"}),
    },
)


def read_setting(kind: str, value: str, *, in_user_message: bool = False) -> str:
    """The text of `model.<kind>_template`, checked; kind: signals or answer. A value "@FILE" is the
    text of a file.

    in_user_message: whether `model.summary_place` is user. Raises: UserError of one line that names
    the field, the file and the line."""
    where, text = f"config.model.{kind}_template", value
    if value.startswith("@"):
        path = Path(expand_home(value[1:], where))
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            near = [str(other) for other in sorted(path.parent.glob("*.jinja"))]
            fault = "no such file" if isinstance(e, FileNotFoundError) else f"not readable ({e})"
            raise UserError(
                f'{where} = "{value}": {fault}.{did_you_mean(str(path), near)}'
            ) from None
        where += f" ({path})"
        if not text.strip():
            raise UserError(f'{where}: the file is empty; "" stands for the template of ours')
        if text.startswith("@"):
            text = "{##}" + text  # so that it is never taken for the name of a file
    if text:
        _check_variables(kind, text, where)
        if kind == "answer":
            _check_answer(text, where, in_user_message)
        else:
            for values in _TRIED:
                for layout in ("paired", "grouped"):
                    render(kind, text, {**values, "layout": layout}, where)
    return text


def render(kind: str, text: str, values: Mapping[str, Any], where: str = "") -> str:
    """What a template says; text: of `model.<kind>_template`. Raises: UserError."""
    where = where or f"config.model.{kind}_template"
    try:
        return _compile(kind, text, where).render(values)
    except _FAULTS as e:
        raise UserError(f"{where}, line {_find_line(e)}: {e}") from None


@functools.lru_cache(64)
def reads(kind: str, text: str, name: str) -> bool:
    """Whether a template names a variable."""
    return bool(_find_names(text or _read_ours(kind), name))


@functools.lru_cache(64)
def _compile(kind: str, text: str, where: str) -> jinja2.Template:
    try:
        return _make_environment().from_string(text or _read_ours(kind))
    except jinja2.TemplateSyntaxError as e:
        raise UserError(f"{where}, line {e.lineno}: {e.message}") from None


@functools.cache
def _read_ours(kind: str) -> str:
    return (OURS / f"{kind}.jinja").read_text(encoding="utf-8")


@functools.cache
def _make_environment() -> jinja2.Environment:
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    del env.globals["lipsum"], env.filters["random"]  # the same user, the same text
    return env


def _check_variables(kind: str, text: str, where: str) -> None:
    _compile(kind, text, where)
    env, known = _make_environment(), VARIABLES[kind]
    for name in sorted(jinja2.meta.find_undeclared_variables(env.parse(text)) - {*env.globals}):
        if name not in known:
            line = min(node.lineno for node in _find_names(text, name))
            raise UserError(
                f'{where}, line {line}: unknown variable "{name}", allowed are '
                f"{', '.join(known)}.{did_you_mean(name, known)}"
            )


def _check_answer(text: str, where: str, in_user_message: bool) -> None:
    """Raises: UserError unless the summary stands once, unchanged, and behind nothing that depends
    on the prompt."""
    if reads("answer", text, "prompt") and not in_user_message:
        raise UserError(
            f"{where}: prompt stands in the message of the summary only where that is the user's; "
            "set --config.model.summary_place=user, or leave {{ prompt }} out"
        )

    def fill(summary: str, prompt: str) -> str:
        values = {"summary": summary, "prompt": prompt, "instruction": "i"}
        return render("answer", text, values, where)

    asked = [fill(_SUMMARY, prompt) for prompt in ("tea ?", "Why do\nbees sing ?")]
    count = asked[0].count(_SUMMARY)
    if count != 1:
        raise UserError(
            f"{where}: writes the summary {count} times, or changed; {{{{ summary }}}} must stand "
            "once, without a filter"
        )
    if reads("answer", text, "prompt") and asked[1].count("Why do\nbees sing ?") != 1:
        raise UserError(f"{where}: {{{{ prompt }}}} must stand once, without a filter")
    before = {told.split(_SUMMARY)[0] for told in asked}
    if len(before) > 1 or asked[0].count(_SUMMARY) != asked[1].count(_SUMMARY):
        raise UserError(
            f"{where}: the text before the summary depends on the prompt; write {{{{ prompt }}}} "
            "behind {{ summary }}"
        )
    if fill("", "tea ?") != asked[0].replace(_SUMMARY, ""):
        raise UserError(
            f"{where}: what is written around the summary depends on it; it must be the same for "
            "all summaries, the empty one too"
        )


def _find_names(text: str, name: str) -> list[jinja2.nodes.Name]:
    found = _make_environment().parse(text).find_all(jinja2.nodes.Name)
    return [node for node in found if node.name == name]


def _find_line(error: BaseException) -> int:
    """The line of the template where it stopped."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
