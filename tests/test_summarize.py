import dataclasses
import json
from pathlib import Path

import jax
import pytest

from popi_jax import generators
from popi_jax.data.records import Comment, Shot
from popi_jax.data.sources.jsonl import read_users
from popi_jax.errors import UserError
from tests.data.people import write_users
from tests.tiny_run import (
    STEP,
    TinyRun,
    command,
    config_of,
    flags_set,
    on_devices,
    read_jsonl,
    shared_run,
)

summarize = command("summarize")


@pytest.fixture(autouse=True)
def restored():
    with on_devices(1):
        yield


@pytest.fixture(scope="module")
def tiny() -> TinyRun:
    return shared_run(1)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_file_of_users_gives_what_the_run_gives(tiny, tmp_path, capsys):
    """The same people, from the data of the run and from a file in another order: same summaries,
    order of the file."""
    with flags_set():
        summarize.main(config_of(tiny.workdir))
    of_run = read_jsonl(tiny.workdir / "summaries_test.jsonl")
    users = list(tiny.run.dataset.splits["test"])
    assert [row["user_id"] for row in of_run] == [user.user_id for user in users]
    assert len({row["summary"] for row in of_run}) > 1
    words = tiny.run.inference.tokenizer
    assert all(0 <= row["tokens"] <= 24 for row in of_run)
    assert (
        f"summaries of {len(users)} users by the inference model of step {STEP}"
        in capsys.readouterr().out
    )

    path = tmp_path / "people.jsonl"
    write_users(
        [dataclasses.replace(user, oracle="") for user in reversed(users)], path
    )  # a line for each pair
    out = tmp_path / "deep" / "out.jsonl"
    with flags_set(f"--users={path}", f"--out={out}"):
        summarize.main(config_of(tiny.workdir))
    assert read_jsonl(out) == of_run[::-1]
    assert words.decode([]) == ""
    assert not list(out.parent.glob("*.part"))


def test_sampling_differs_from_greedy_and_repeats(tiny):
    users = list(tiny.run.dataset.splits["test"])[:3]
    params, config = tiny.now.inference.params, config_of(tiny.workdir)

    def texts(temperature: float) -> list[str]:
        with jax.set_mesh(tiny.run.mesh):
            rows = generators.summarize_users(
                tiny.run, params, users, config=config, temperature=temperature
            )
        return [row["summary"] for row in rows]

    assert texts(1.0) == texts(1.0) != texts(0.0)


def test_signals_longer_than_any_of_training_are_read(tiny, monkeypatch):
    """The padded length of the run fits its training users; a longer user is cut at the limit that
    was configured."""
    seen = []

    def spy(self, users, temperature, advance):
        seen.append(int(users.groups[0].placed[0][0].lengths[0]))
        return [[[]]]

    monkeypatch.setattr(generators.Summarizer, "write", spy)
    user = dataclasses.replace(tiny.run.dataset.splits["test"][0], survey="tea ; " * 330, shots=())
    for limit in (320, 400):
        config = config_of(tiny.workdir, f"--config.data.context_len={limit}")
        generators.summarize_users(tiny.run, {}, [user], config=config, temperature=0.0)
    assert tiny.run.config.data.context_len < seen[0] <= 320 < seen[1] <= 400


def test_reading_a_file_of_users(tmp_path):
    shot = {"prompt": "tea?", "chosen": "yes", "rejected": "no"}
    path = write(
        tmp_path / "people.jsonl",
        {"user_id": "bo", "signals": {"fewshot": [shot, shot | {"prompt": "milk?"}]}},
        {
            "user_id": "ann",
            "signals": {"profile": " a nurse ", "comments": [{"prompt": "", "comment": "no"}]},
        },
        {
            "user_id": "bo",
            "signals": {"fewshot": [shot, shot | {"prompt": "milk?"}]},
            "chosen": 5,
            "meta": "x",
        },
    )
    bo, ann = read_users(path, num_shots=1)
    assert (bo.user_id, bo.shots, bo.pairs, bo.oracle) == (
        "bo",
        (Shot("tea?", "yes", "no"),),
        (),
        "",
    )
    assert (ann.profile, ann.comments) == ("a nurse", (Comment("", "no"),))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"user_id": "bo"}, r'people.jsonl:2: no field "signals"'),
        (
            {"user_id": "bo", "signals": {}},
            r'people.jsonl:2: field "signals": found \{\}.*profile, survey',
        ),
        ({"user_id": "", "signals": {"profile": "x"}}, r'people.jsonl:2: field "user_id"'),
        (
            {"user_id": "bo", "signal": {"profile": "x"}},
            r'people.jsonl:2: unknown field "signal".*"signals"',
        ),
        (
            {"user_id": "bo", "signals": {"profil": "x"}},
            r'unknown field "signals.profil".*"profile"',
        ),
        (
            {"user_id": "bo", "signals": {"fewshot": [{"prompt": "x"}]}},
            r'no field "signals.fewshot\[0\].chosen"',
        ),
        ({"user_id": "bo", "signals": {"comments": {}}}, r'field "signals.comments"'),
    ],
)
def test_a_bad_line_is_told(tmp_path, row, message):
    path = write(tmp_path / "people.jsonl", {"user_id": "ann", "signals": {"profile": "x"}}, row)
    with pytest.raises(UserError, match=message) as e:
        read_users(path, num_shots=6)
    assert "\n" not in str(e.value)


def test_a_missing_file_and_a_target_that_is_the_source(tiny, tmp_path):
    with (
        flags_set(f"--users={tmp_path}/none.jsonl"),
        pytest.raises(UserError, match=r"none.jsonl: no such file"),
    ):
        summarize.main(config_of(tiny.workdir))
    path = write(tmp_path / "people.jsonl", {"user_id": "ann", "signals": {"profile": "x"}})
    with (
        flags_set(f"--users={path}", f"--out={path}"),
        pytest.raises(UserError, match="is the file of --users"),
    ):
        summarize.main(config_of(tiny.workdir))
    assert len(read_jsonl(path)) == 1


def test_users_of_a_file_are_read_as_the_run_reads_its_own(tiny, monkeypatch):
    seen = []

    def spy(users, tokenizer, config):
        seen.extend(users)
        raise UserError("seen")

    monkeypatch.setattr(generators.batches, "encode_all", spy)
    user = tiny.run.dataset.splits["test"][0]
    config = config_of(tiny.workdir, "--config.data.signals=profile")
    with pytest.raises(UserError, match="seen"):
        generators.summarize_users(tiny.run, {}, [user], config=config, temperature=0.0)
    assert user.shots and (seen[0].profile, seen[0].shots) == (user.profile, ())
