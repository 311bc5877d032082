"""Writes the preference summary of each user: of the run's test users, or of a file of users.

A file has one JSON object a line, {"user_id": "ann", "signals": {"profile": "…", "survey": "…",
"comments": [{"prompt": "…", "comment": "…"}], "fewshot": [{"prompt": "…", "chosen": "…",
"rejected": "…"}]}}; each part of the signals may be left out. Lines of training data are accepted
too; equal users are summarised once."""

from pathlib import Path

from absl import flags

from popi_jax import cli
from popi_jax.config import Config
from popi_jax.errors import UserError

_USERS = cli.define_path(
    "users", "", "file of users, one JSON object a line; empty: the test users of the run"
)
_OUT = cli.define_path(
    "out", "", "file to write; empty: <workdir>/summaries_<name of the users file>.jsonl"
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "of sampling; 0 takes the likeliest tokens", lower_bound=0.0
)
_STEP = flags.DEFINE_integer("step", None, "checkpoint to use; default: the newest")


def main(config: Config) -> None:
    from etils import epath

    from popi_jax.data.sources.jsonl import read_users

    users = read_users(Path(_USERS.value), config.data.num_shots) if _USERS.value else []
    stem = Path(_USERS.value).stem if _USERS.value else "test"
    out = epath.Path(_OUT.value or epath.Path(config.workdir) / f"summaries_{stem}.jsonl")
    if _USERS.value and out.exists() and out.resolve() == epath.Path(_USERS.value).resolve():
        raise UserError(f"--out={out} is the file of --users; give another name")

    if _USERS.value and config.data.prompt_aware:
        raise UserError(
            "--users: with data.prompt_aware a summary is for a prompt; ask it by make generate "
            "with --users, --user and --prompt"
        )
    from popi_jax import distributed, files
    from popi_jax.generators import summarize_users
    from popi_jax.run import open_run
    from popi_jax.training.restore import restore_role

    run = open_run(config, must_exist=True)
    users = users or list(run.dataset.splits["test"])
    if not users:
        raise UserError("the test split of the run holds no user; name some with --users=FILE")
    step, params = restore_role(run, "inference", _STEP.value)
    rows = summarize_users(run, params, users, config=config, temperature=_TEMPERATURE.value)
    if distributed.is_main_process():
        files.write_jsonl(out, rows)
        print(f"{out}: summaries of {len(rows)} users by the inference model of step {step}")


if __name__ == "__main__":
    cli.run(
        main,
        description=__doc__,
        example="python -m popi_jax.summarize --config=prism --users=people.jsonl "
        "--out=summaries.jsonl",
    )
