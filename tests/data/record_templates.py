"""Writes tests/golden/templates: what the templates of popi_jax/data/templates say of a made user,
and of one of whom nothing is known. Run it after an intended change:

python -m tests.data.record_templates"""

import pathlib

from popi_jax import templates
from popi_jax.data import prompts
from popi_jax.data.records import Comment, Shot, User

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "templates"
USER = User(
    user_id="u",
    profile="I keep bees.\nI {{ read }} a lot.",
    survey="age: 40; region: Europe",
    shots=(
        Shot("Why do bees sing?", "They do not: it is their wings.", "No idea."),
        Shot("Honey?", "Yes,\nplease.", "{% if x %}"),
    ),
    comments=(Comment("Tea or coffee?", "Tea, always."), Comment("", "Too long for me.")),
    pairs=(),
)
NOBODY = User("n", "", "", (), (), ())


def render_all() -> dict[str, str]:
    """Name of a golden file -> its text."""
    found = {}
    for path in sorted(templates.OURS.glob("*signals.jinja")):
        text = path.read_text(encoding="utf-8")
        for layout in ("paired", "grouped"):
            found[f"{path.stem}_{layout}"] = prompts.render_signals(USER, layout, text)
        found[f"{path.stem}_of_nobody"] = prompts.render_signals(NOBODY, "paired", text)
    values = {"summary": "[the summary]", "prompt": "[the prompt]"}
    for path in sorted(templates.OURS.glob("*answer.jinja")):
        for instruction in ("", "What is known of the user:"):
            name = f"{path.stem}_{'told' if instruction else 'bare'}"
            text = path.read_text(encoding="utf-8")
            found[name] = templates.render("answer", text, {**values, "instruction": instruction})
    return found


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, text in render_all().items():
        (GOLDEN / f"{name}.txt").write_text(text, encoding="utf-8")
