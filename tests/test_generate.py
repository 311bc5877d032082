import json
import subprocess
import sys

import pytest

from popi_jax.data.prompts import encode_summary
from popi_jax.errors import UserError
from popi_jax.generators import Generator, summarize_users
from tests.tiny_run import TinyRun, command, config_of, flags_set, on_devices, shared_run

generate = command("generate")
ASK = "--prompt=tell me about tea"


@pytest.fixture(autouse=True)
def restored():
    with on_devices(1):
        yield


@pytest.fixture(scope="module")
def tiny() -> TinyRun:
    return shared_run(1)


def test_an_answer_for_a_user_of_the_run(tiny, capsys):
    user = tiny.run.dataset.splits["test"][0]
    with flags_set(ASK, f"--user={user.user_id}"):
        generate.main(config_of(tiny.workdir))
    printed = capsys.readouterr().out
    run, config = tiny.run, config_of(tiny.workdir)
    params = tiny.now.inference.params
    (row,) = summarize_users(run, params, [user], config=config, temperature=0.0)
    generator = Generator(run.generator, tiny.now.generator.params, run.mesh)
    sampling = run.generator.sampling._replace(max_len=config.data.answer_len)
    options = {"sampling": sampling, "num": 1, "seed": config.seed}
    text = encode_summary(run.generator.tokenizer, row["summary"], run.config)
    (answer,) = generator.reply(text, "tell me about tea", **options)
    assert printed == f"summary: {row['summary']}\nanswer: {answer}\n"
    (other,) = generator.reply([], "tell me about tea", **options)
    assert answer != other


def test_samples_of_a_user_of_a_file(tiny, tmp_path, capsys):
    path = tmp_path / "people.jsonl"
    path.write_text(
        json.dumps({"user_id": "ann", "signals": {"profile": "i like bullet points ."}}) + "\n"
    )
    with flags_set(
        ASK, f"--users={path}", "--user=ann", "--num=3", "--temperature=1", "--max_tokens=4"
    ):
        generate.main(config_of(tiny.workdir))
    lines = [line for line in capsys.readouterr().out.split("\n") if line.startswith("answer: ")]
    assert len(lines) == len(set(lines)) == 3


def test_cuts_and_stops_of_an_answer(tiny, capsys):
    """Of one token only the likeliest is left, which is what temperature 0 takes; then a text in
    the middle of the answer stops it, wherever its tokens begin."""

    def answer(*args: str) -> str:
        with flags_set(ASK, "--max_tokens=6", *args):
            generate.main(config_of(tiny.workdir))
        return capsys.readouterr().out.split("answer: ")[1].strip()

    greedy = answer()
    assert (
        answer("--temperature=1", "--top_k=1") == answer("--temperature=1", "--min_p=1") == greedy
    )
    middle = greedy[len(greedy) // 2]
    assert answer(f"--stop={middle}") == greedy[: greedy.index(middle) + 1].strip()


@pytest.mark.parametrize(
    ("answer", "stops", "cut"),
    [
        ("bees make honey here", ["honey"], "bees make honey"),
        ("short answers , please", [", please"], "short answers , please"),
        ("bees sing", ["s"], "bees"),
        ("bees sing", ["sing", "ees s"], "bees s"),
        ("bees sing", ["honey", ""], "bees sing"),
    ],
)
def test_a_stop_is_a_text(answer: str, stops: list[str], cut: str) -> None:
    assert generate.cut_at_stop(answer, stops) == cut


def test_your_own_summary(tiny, capsys):
    with flags_set(ASK, "--summary=brief answers"):
        generate.main(config_of(tiny.workdir))
    assert capsys.readouterr().out.startswith("summary: brief answers\nanswer: ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--prompt is missing; say what to answer, e.g. python -m"),
        ([ASK, "--summary=x", "--user=y"], "--summary stands in place of a user's"),
        ([ASK, "--users=x"], "--users=x needs the person who asks: --user=ID"),
        (
            [ASK, "--top_p=0.5"],
            "--top_k, --top_p and --min_p are about sampling; add e.g. --temperature=1",
        ),
        ([ASK, "--num=2"], "all answers at temperature 0 are equal"),
        ([ASK, "--user=prism/user_"], 'not among the 60 users. Did you mean "prism/user'),
    ],
)
def test_what_cannot_be_answered_is_told(tiny, args, message):
    with flags_set(*args), pytest.raises(UserError) as e:
        generate.main(config_of(tiny.workdir))
    assert message in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.slow
def test_on_several_devices(capsys):
    """A single row would not divide over them."""
    with on_devices(8):
        many = shared_run(8)
        for arg in (
            f"--user={many.run.dataset.splits['test'][0].user_id}",
            "--summary=brief answers",
        ):
            with flags_set(ASK, arg):
                generate.main(config_of(many.workdir))
    assert capsys.readouterr().out.count("answer: ") == 2


def test_the_command_without_a_prompt_ends_with_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "popi_jax.generate"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --prompt is missing")
    assert done.stderr.count("\n") == 1
