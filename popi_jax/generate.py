"""Answers a prompt for a user: prints the summary that the generator sees, and the answer.

The summary is that of a user of the run's data (--user), of a file (--users and --user), your own
words (--summary), or empty."""

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from popi_jax import cli
from popi_jax.config import Config
from popi_jax.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable

    from popi_jax.data.records import User

_EXAMPLE = (
    'python -m popi_jax.generate --config=prism --prompt="tell me about tea" --user=prism/user7'
)

_PROMPT = flags.DEFINE_string("prompt", "", "the question, in quotes")
_USER = flags.DEFINE_string("user", "", "user_id of the person who asks")
_USERS = cli.define_path(
    "users", "", "file that --user is in, as for summarize; empty: the data of the run"
)
_SUMMARY = flags.DEFINE_string("summary", "", "summary to use instead of that of a user")
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "of the answer; 0 takes the likeliest tokens", lower_bound=0.0
)
_TOP_K = flags.DEFINE_integer(
    "top_k", 0, "sample among the k likeliest tokens; 0: among all", lower_bound=0
)
_TOP_P = flags.DEFINE_float(
    "top_p",
    1.0,
    "sample among the likeliest tokens of this total probability",
    lower_bound=1e-6,
    upper_bound=1.0,
)
_MIN_P = flags.DEFINE_float(
    "min_p",
    0.0,
    "sample among tokens of this part of the likeliest's probability",
    lower_bound=0.0,
    upper_bound=1.0,
)
_STOP = flags.DEFINE_multi_string(
    "stop", [], "text with which an answer ends where it first says it; may be repeated"
)
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 0, "most tokens of the answer; 0: data.answer_len", lower_bound=0
)
_NUM = flags.DEFINE_integer("num", 1, "how many answers to sample", lower_bound=1)
_STEP = flags.DEFINE_integer("step", None, "checkpoint to use; default: the newest")


def main(config: Config) -> None:
    _check_flags()
    from popi_jax import distributed
    from popi_jax.data.examples import ask
    from popi_jax.data.prompts import encode_summary, get_wording
    from popi_jax.data.sources.jsonl import read_users
    from popi_jax.generators import Generator, summarize_users
    from popi_jax.run import open_run
    from popi_jax.training.restore import restore_role

    people = read_users(Path(_USERS.value), config.data.num_shots) if _USERS.value else []
    run, step = open_run(config, must_exist=True), _STEP.value
    summary = _SUMMARY.value.strip()
    if _USER.value:
        splits = [run.dataset.splits[name] for name in ("test", "validation", "train")]
        user = find_user(_USER.value, people or (user for split in splits for user in split))
        if config.data.prompt_aware:
            user = ask(user, _PROMPT.value)
        step, params = restore_role(run, "inference", step)
        rows = summarize_users(run, params, [user], config=config, temperature=0.0)
        summary = rows[0]["summary"]
    _, params = restore_role(run, "generator", step)
    words = run.generator.tokenizer
    sampling = run.generator.sampling._replace(
        temperature=_TEMPERATURE.value,
        max_len=_MAX_TOKENS.value or config.data.answer_len,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        min_p=_MIN_P.value,
    )
    generator = Generator(run.generator, params, run.mesh)
    answers = generator.reply(
        encode_summary(words, summary, config),
        _PROMPT.value,
        sampling=sampling,
        num=_NUM.value,
        seed=config.seed,
        wording=get_wording(config),
    )
    if distributed.is_main_process():
        print(f"summary: {summary or '(none)'}")
        for text in answers:
            print(f"answer: {cut_at_stop(text, _STOP.value)}")


def _check_flags() -> None:
    if not _PROMPT.value.strip():
        raise UserError(f"--prompt is missing; say what to answer, e.g. {_EXAMPLE}")
    if _SUMMARY.value and (_USER.value or _USERS.value):
        raise UserError(
            "--summary stands in place of a user's; leave out --user and --users, or --summary"
        )
    if _USERS.value and not _USER.value:
        raise UserError(f"--users={_USERS.value} needs the person who asks: --user=ID")
    if _TEMPERATURE.value == 0 and (_TOP_K.value or _TOP_P.value < 1 or _MIN_P.value):
        raise UserError(
            "--top_k, --top_p and --min_p are about sampling; add e.g. --temperature=1, or leave "
            "them out"
        )
    if _NUM.value > 1 and _TEMPERATURE.value == 0:
        raise UserError(
            f"--num={_NUM.value}: all answers at temperature 0 are equal; add e.g. --temperature=1"
        )


def cut_at_stop(answer: str, stops: "Iterable[str]") -> str:
    """The answer up to the first of the texts in it, that text included."""
    ends = [answer.find(stop) + len(stop) for stop in stops if stop and stop in answer]
    return answer[: min(ends)] if ends else answer


def find_user(user_id: str, users: "Iterable[User]") -> "User":
    """The first user of that name. Raises: UserError."""
    seen = []
    for user in users:
        if user.user_id == user_id:
            return user
        seen.append(user.user_id)
    raise UserError(
        f"--user={user_id}: not among the {len(seen)} users.{did_you_mean(user_id, seen)}"
    )


if __name__ == "__main__":
    cli.run(main, description=__doc__, example=_EXAMPLE)
