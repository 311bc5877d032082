import json
import subprocess
import sys

import pytest

from popi_jax import finished_run
from popi_jax.errors import UserError
from tests.tiny_run import Run, command, config_of, flags_set, on_devices, shared_run

generate = command("generate")
ASK = "--prompt=tell me about tea"


@pytest.fixture(autouse=True)
def restored():
    with on_devices(1):
        yield


@pytest.fixture(scope="module")
def run() -> Run:
    return shared_run(1)


def test_an_answer_for_a_user_of_the_run(run, capsys):
    user = run.built.dataset.splits["test"][0]
    with flags_set(ASK, f"--user={user.user_id}"):
        generate.main(config_of(run.workdir))
    printed = capsys.readouterr().out
    roles, config = (run.now.inference.params, run.now.generator.params), config_of(run.workdir)
    summary = finished_run.summaries_of(
        [user], run.built, roles[0], lengths=config, temperature=0.0
    )[0]["summary"]
    sampling = run.built.sampling._replace(temperature=0.0, max_len=config.data.answer_len)
    options = {"prompt": "tell me about tea", "sampling": sampling, "num": 1}
    (answer,) = finished_run.answers(run.built, roles[1], summary=summary, **options)
    assert printed == f"summary: {summary}\nanswer: {answer}\n"
    (other,) = finished_run.answers(run.built, roles[1], summary="", **options)
    assert answer != other


def test_samples_of_a_user_of_a_file(run, tmp_path, capsys):
    path = tmp_path / "people.jsonl"
    path.write_text(
        json.dumps({"user_id": "ann", "signals": {"profile": "i like bullet points ."}}) + "\n"
    )
    with flags_set(
        ASK, f"--users={path}", "--user=ann", "--num=3", "--temperature=1", "--max_tokens=4"
    ):
        generate.main(config_of(run.workdir))
    lines = [line for line in capsys.readouterr().out.split("\n") if line.startswith("answer: ")]
    assert len(lines) == len(set(lines)) == 3


def test_cuts_and_stops_of_an_answer(run, capsys):
    """Of one token only the likeliest is left, which is what temperature 0 takes; then the first
    word stops it."""

    def answer(*args: str) -> str:
        with flags_set(ASK, "--max_tokens=6", *args):
            generate.main(config_of(run.workdir))
        return capsys.readouterr().out.split("answer: ")[1].strip()

    greedy = answer()
    assert (
        answer("--temperature=1", "--top_k=1") == answer("--temperature=1", "--min_p=1") == greedy
    )
    tokens = run.built.tokenizer.encode(greedy)
    first = run.built.tokenizer.decode(tokens[:1])
    if (
        run.built.tokenizer.encode(first) == tokens[:1]
    ):  # a byte of a longer character is no text of its own
        assert answer(f"--stop={first}") == first.strip()


def test_your_own_summary(run, capsys):
    with flags_set(ASK, "--summary=brief answers"):
        generate.main(config_of(run.workdir))
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
def test_what_cannot_be_answered_is_told(run, args, message):
    with flags_set(*args), pytest.raises(UserError) as e:
        generate.main(config_of(run.workdir))
    assert message in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.slow
def test_on_several_devices(capsys):
    """A single row would not divide over them."""
    with on_devices(8):
        many = shared_run(8)
        for arg in (
            f"--user={many.built.dataset.splits['test'][0].user_id}",
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
