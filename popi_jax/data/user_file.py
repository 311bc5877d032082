"""A file of users to summarise: signals without preference pairs, one JSON object a line."""

from pathlib import Path

from popi_jax.data import jsonl
from popi_jax.data.records import User
from popi_jax.data.rows import Row, read_lines
from popi_jax.errors import UserError


def read_users(path: Path, num_shots: int) -> list[User]:
    """Users of a file in its order, without pairs, each with the first `num_shots` past pairs, as training shows.

    Raises: UserError naming file and line.
    """

    def parse(row: Row) -> User:
        row.only(jsonl.FIELDS)
        signals = row.object("signals")
        signals.only(jsonl.SIGNALS)
        shots = tuple(jsonl._shot(item) for item in (signals.objects("fewshot") if "fewshot" in signals.fields else []))
        comments = signals.objects("comments") if "comments" in signals.fields else []
        user = User(
            user_id=row.text("user_id"),
            profile=jsonl._optional(signals, "profile"),
            survey=jsonl._optional(signals, "survey"),
            shots=shots[:num_shots],
            comments=tuple(jsonl._comment(item) for item in comments),
            pairs=(),
        )
        if not (user.profile or user.survey or user.shots or user.comments):
            raise row.error("signals", row.fields["signals"], f"at least one of {', '.join(jsonl.SIGNALS)}", "Add one.")
        return user

    if not path.is_file():
        raise UserError(f"{path}: no such file; give one with one JSON object a line")
    users, _ = read_lines(path, parse, "error")
    return list(dict.fromkeys(users))
