"""Chat templates: conversation -> text, rendered as transformers renders it.

Compiles the Jinja template of a Hugging Face folder with what transformers gives to one: its
filters, its globals, `{% generation %}` and the names of the special tokens. One departure:
`strftime_now` is a fixed date, since the prompts of a run must be the same on all its days."""

import datetime
import json
from collections.abc import Mapping
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from popi_jax.data.records import Messages
from popi_jax.errors import UserError, did_you_mean

_PINNED_DATE = datetime.datetime(2024, 7, 26)
# what running a template may raise
_FAULTS = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError),
    *(TypeError, ValueError),
)
# what transformers passes by itself; the rest of a template's variables are arguments
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what a model says: the text up to `{% endgeneration %}` stands."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def compile_template(chat_template: str, source: str) -> jinja2.Template:
    """Raises: UserError that names `source` and the line where the template is broken."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = _PINNED_DATE.strftime
    env.filters["tojson"] = to_json
    try:
        return env.from_string(chat_template)
    except jinja2.TemplateSyntaxError as e:
        raise UserError(f"{source}: chat template, line {e.lineno}: {e.message}") from None


def render(
    template: jinja2.Template,
    messages: Messages,
    names: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
    source: str,
) -> str:
    """The text of a conversation. names: those of the special tokens that the folder has.

    Raises: UserError where the template refuses the conversation."""
    try:
        return template.render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **names,
        )
    except _FAULTS as e:
        roles = ", ".join(m["role"] for m in messages)
        told = f"the chat template refuses the roles {roles}: {e}"
        raise UserError(f"{source}: {told}") from None


def set_arguments(chat_template: str, arguments: Mapping[str, Any], source: str) -> str:
    """The template with defaults for its arguments, as `enable_thinking`: what renders it without
    them, as a server of an exported model does, renders it as the run did.

    Raises: UserError for an argument that the template does not read."""
    if not arguments:
        return chat_template
    tree = compile_template(chat_template, source).environment.parse(chat_template)
    read = jinja2.meta.find_undeclared_variables(tree)
    known = sorted(name for name in read if name not in _GIVEN)
    lines = []
    for name, value in arguments.items():
        if name not in known:
            raise UserError(
                f'model.template_args: the chat template of {source} reads no "{name}"; it reads '
                f"{', '.join(known) or 'no arguments'}.{did_you_mean(name, known)}"
            )
        lines.append(
            f"{{%- if {name} is not defined %}}{{%- set {name} = {_write(value)} %}}{{%- endif %}}"
        )
    return "".join(lines) + chat_template


def _write(value: Any) -> str:
    """A JSON value as a literal of Jinja."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_write(k)}: {_write(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_write, value)) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "none" if value is None else repr(value)
