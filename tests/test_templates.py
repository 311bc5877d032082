"""Templates: what ours say (golden), that they say what the text always was, and what is told of
those of the user that cannot be used."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popi_jax import config, templates
from popi_jax.config import Config
from popi_jax.data import encode, prompts
from popi_jax.data.records import Comment, Shot, User
from popi_jax.errors import UserError
from tests.data.people import USERS, make_config, make_tokenizer
from tests.data.record_templates import GOLDEN, render_all


def test_what_our_templates_say_equals_the_golden_files() -> None:
    found = render_all()
    assert {f"{name}.txt" for name in found} == {path.name for path in GOLDEN.glob("*.txt")}
    for name, text in found.items():
        assert text == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8"), (
            "a template changed: when that is intended, run python -m tests.data.record_templates"
        )


def write_signals(user: User, layout: str) -> str:
    """As it was written before there were templates."""
    parts = [f"profile: {user.profile}"] if user.profile else []
    parts += [f"survey: {user.survey}"] if user.survey else []
    for c in user.comments:
        parts += ([f"about: {c.prompt}"] if c.prompt else []) + [f"wrote: {c.comment}"]
    asked = [f"asked: {s.prompt}\nliked: {s.chosen}" for s in user.shots]
    disliked = [f"disliked: {s.rejected}" for s in user.shots]
    if layout == "grouped":
        parts += asked + disliked
    else:
        parts += [text for pair in zip(asked, disliked, strict=True) for text in pair]
    return "\n".join(parts)


TEXTS = st.sampled_from(
    ["", "bees", "{{ profile }}", "{% if %}", "a\n", "\r\n b", " ", "{#", "<b>&"]
)


@given(
    TEXTS,
    TEXTS,
    st.lists(st.tuples(TEXTS, TEXTS, TEXTS), max_size=3),
    st.lists(st.tuples(TEXTS, TEXTS), max_size=3),
    st.sampled_from(["paired", "grouped"]),
)
def test_text_of_users_is_put_in_as_it_is(
    profile: str,
    survey: str,
    shots: list[tuple[str, str, str]],
    comments: list[tuple[str, str]],
    layout: str,
) -> None:
    lists = tuple(Shot(*texts) for texts in shots), tuple(Comment(*texts) for texts in comments)
    user = User("u", profile, survey, *lists, ())
    assert prompts.render_signals(user, layout) == write_signals(user, layout)


def test_ids_are_those_of_runs_before_there_were_templates() -> None:
    """Recorded from commit 4868eab."""
    words = make_tokenizer()
    few = (Comment("", "one"), Comment("tea ?", "two"))
    users = [
        *USERS[:3],
        dataclasses.replace(USERS[3], profile=""),
        dataclasses.replace(USERS[4], survey="", comments=()),
        dataclasses.replace(USERS[5], shots=(), comments=few),
    ]
    for known in json.loads((GOLDEN / "ids.json").read_text()):
        cfg = make_config(
            data__pair_layout=known["layout"],
            generator__reads="signals",
            schedule__phases=("generator 3",),
            model__answer_instruction="warm tone :",
        )
        assert prompts.render_generator_prefix(words, cfg) == known["prefix"]
        for user, ids in zip(users, known["users"], strict=True):
            found = encode.encode_user(user, words, cfg)
            assert {"context": found.context, "turn": found.turns[0], "told": found.told} == ids


SIGNALS = "{{ profile }}{% for s in shots %}|{{ s.prompt }}>{{ s.chosen }}{% endfor %}"
ANSWER = "Of the user: {{ summary }}\nNow answer.\n{{ prompt }}"


def load(tmp_path: Path, **texts: str) -> Config:
    """A configuration whose templates are in files."""
    changes: dict[str, Any] = {"model__summary_place": "user"}
    for kind, text in texts.items():
        (tmp_path / f"{kind}.jinja").write_text(text, encoding="utf-8")
        changes[f"model__{kind}_template"] = f"@{tmp_path}/{kind}.jinja"
    return make_config(**changes)


def test_the_run_keeps_the_text_of_a_file(tmp_path: Path) -> None:
    cfg = load(tmp_path, signals=SIGNALS + "\n", answer="@" + ANSWER)
    for path in tmp_path.iterdir():
        path.unlink()
    assert config.from_json(config.to_json(cfg)) == cfg
    user, words = USERS[1], make_tokenizer()
    shots = "".join(f"|{s.prompt}>{s.chosen}" for s in user.shots)
    assert encode.fit_signals(user, words, cfg).text == user.profile + shots
    held = prompts._hold_summary(prompts.get_wording(cfg), "z")
    assert held == [{"role": "user", "content": "@Of the user: z\nNow answer.\nx"}]


def test_whole_items_give_way_under_any_template(tmp_path: Path) -> None:
    words, user = make_tokenizer(), USERS[1]
    whole = load(tmp_path, signals=SIGNALS)
    length = len(encode.encode_context(user, words, whole))
    cut = dataclasses.replace(whole, data=dataclasses.replace(whole.data, context_len=length - 1))
    found = encode.fit_signals(user, words, cut)
    expected = "".join(f"|{s.prompt}>{s.chosen}" for s in user.shots[1:])
    assert found.text == user.profile + expected and found.shortened


def test_the_whole_turn_is_within_its_limit(tmp_path: Path) -> None:
    """The prompt is cut, never what the template writes around it."""
    words, cfg = make_tokenizer(), load(tmp_path, answer="{{ summary }} yes\n{{ prompt }} no")
    long = [{"role": "user", "content": "bees " * 40 + "end ?"}]
    pair = dataclasses.replace(USERS[0].pairs[0], prompt=long)
    (turn,) = encode.encode_user(dataclasses.replace(USERS[0], pairs=(pair,)), words, cfg).turns
    assert len(turn) == cfg.data.turn_len
    text = words.decode(turn)
    assert text.startswith("yes\n") and text.endswith("end ? no") and text.count("bees") < 40


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        ("signals", "a\n{{ profil }}", r'line 2: unknown variable "profil".*mean "profile"\?'),
        ("signals", "a\n\n{% for %}", r"line 3: .*Expected"),
        ("signals", "{% for s in shots %}\n{{ s.chosn }}{% endfor %}", "line 2: .*'chosn'"),
        ("signals", "{{ profile.__class__ }}", "line 1: .*unsafe"),
        ("signals", "{{ lipsum() }}", 'line 1: unknown variable "lipsum"'),
        ("signals", "{{ shots | random }}", "line 1: .*random"),
        ("signals", " ", 'the file is empty; "" stands for'),
        ("answer", "hello", "writes the summary 0 times"),
        ("answer", "{{ summary }} {{ summary }}", "writes the summary 2 times"),
        ("answer", "{{ summary | upper }}", "writes the summary 0 times, or changed"),
        (
            "answer",
            "{{ summary | trim }}{{ prompt | trim }}x{{ prompt }}",
            "prompt }} must stand once",
        ),
        ("answer", "{{ prompt }} {{ summary }}", "before the summary depends on the prompt"),
        ("answer", "{% if summary %}so: {{ summary }}{% endif %}", "the empty one too"),
        ("answer", "{{ summary }} {{ layout }}", 'unknown variable "layout"'),
    ],
)
def test_what_cannot_be_used_is_told(tmp_path: Path, kind: str, text: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as e:
        load(tmp_path, **{kind: text})
    message = str(e.value)
    assert message.startswith(f"config.model.{kind}_template") and "\n" not in message
    assert f"({tmp_path}/{kind}.jinja)" in message


def test_files_that_are_not_there_and_prompts_in_system_messages_are_told(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(SIGNALS)
    with pytest.raises(UserError, match=r'signals_template = "@.*no such file.*mean ".*/mine.jinj'):
        make_config(model__signals_template=f"@{tmp_path}/mien.jinja")
    (tmp_path / "broken.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not readable"):
        make_config(model__signals_template=f"@{tmp_path}/broken.jinja")
    with pytest.raises(UserError, match="set --config.model.summary_place=user"):
        make_config(model__answer_template=ANSWER)
    kept = make_config(model__answer_template="{{ instruction }}: {{ summary }}!")
    assert kept.model.answer_template == "{{ instruction }}: {{ summary }}!"


@pytest.mark.parametrize("name", ["official_signals", "alignx_signals", "official_answer"])
def test_our_other_templates_can_be_named(name: str) -> None:
    place = templates.OURS.relative_to(Path(__file__).parents[1])
    kind = name.split("_")[1]
    changes = {f"model__{kind}_template": f"@{place}/{name}.jinja"}
    found = make_config(model__summary_place="user", **changes)
    path = templates.OURS / f"{name}.jinja"
    assert getattr(found.model, f"{kind}_template") == path.read_text()
