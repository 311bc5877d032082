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

_USERS = flags.DEFINE_string(
    "users", "", "file of users, one JSON object a line; empty: the test users of the run"
)
_OUT = flags.DEFINE_string(
    "out", "", "file to write; empty: <workdir>/summaries_<name of the users file>.jsonl"
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "of sampling; 0 takes the likeliest tokens", lower_bound=0.0
)


def main(config: Config) -> None:
    from etils import epath

    from popi_jax.data.sources.jsonl import read_users

    users = read_users(Path(_USERS.value), config.data.num_shots) if _USERS.value else []
    stem = Path(_USERS.value).stem if _USERS.value else "test"
    out = epath.Path(_OUT.value or epath.Path(config.workdir) / f"summaries_{stem}.jsonl")
    if _USERS.value and out.exists() and out.resolve() == epath.Path(_USERS.value).resolve():
        raise UserError(f"--out={out} is the file of --users; give another name")

    import jax

    from popi_jax.evals.render import write_jsonl
    from popi_jax.finished_run import open_run, restore_role, summaries_of

    built = open_run(config)
    users = users or list(built.dataset.splits["test"])
    if not users:
        raise UserError("the test split of the run holds no user; name some with --users=FILE")
    step, params = restore_role(built, "inference")
    rows = summaries_of(users, built, params, lengths=config, temperature=_TEMPERATURE.value)
    if jax.process_index() == 0:
        write_jsonl(out, rows)
        print(f"{out}: summaries of {len(rows)} users by the inference model of step {step}")


if __name__ == "__main__":
    cli.run(
        main,
        description=__doc__,
        example="python -m popi_jax.summarize --config=prism --users=people.jsonl --out=summaries.jsonl",
    )
