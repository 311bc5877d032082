"""A few made people, a configuration of small limits, and a look into padded tokens."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from configs.base import compose
from popi_jax.config import Config, from_config_dict
from popi_jax.data import batches, prompts, tokenizer, tokens, warmup_batches
from popi_jax.data.records import Comment, Pair, Reading, Shot, User

ITEMS = (
    "short answers",
    "long answers",
    "warm tone",
    "formal tone",
    "plain words",
    "technical terms",
)


def make_user(n: int, num_pairs: int) -> User:
    """Even numbers like the first item of each contrast, odd ones the second. The survey states one
    on the last."""
    likes, dislikes = ITEMS[n % 2 :: 2], ITEMS[1 - n % 2 :: 2]
    return User(
        user_id=f"u{n}",
        profile=f"i am number {n} .",
        survey="i keep bees .",
        shots=tuple(Shot(f"shot {n} {k} ?", f"they sing {k}", "no idea") for k in range(3)),
        comments=(Comment("tea ?", "too long"),),
        pairs=tuple(
            Pair(
                f"{n}/{k}",
                [{"role": "user", "content": f"pair {n} {k} ?"}],
                f"yes {n} {k}",
                f"no {n} {k}",
            )
            for k in range(num_pairs)
        ),
        oracle=" ; ".join(likes[:2]),
        stated=likes[2],
        readings=tuple(Reading(f"read {n} {k} ?", likes[k], dislikes[k]) for k in range(3)),
    )


USERS = [make_user(n, 1 + n % 6) for n in range(11)]


def make_tokenizer() -> tokenizer.Tokenizer:
    texts = [
        f"{prompts.render_signals(u)} {' ; '.join(ITEMS)} pair yes no read summary ?" for u in USERS
    ]
    return tokenizer.train(texts, 420)


def make_config(**changes: Any) -> Config:
    """`changes` are written section__field."""
    c = compose("scale=laptop")
    fields = {
        "name": "test",
        "data.context_len": 120,
        "data.turn_len": 16,
        "data.answer_len": 8,
        "data.summary_len": 24,
        "data.num_pairs": 6,
        "batch.users": 4,
        "batch.pairs": 3,
        "warmup.generator_users": 4,
        "warmup.summary_users": 2,
        "warmup.readings": 2,
        "warmup.reading_users": 4,
        "evaluation.batch_users": 4,
    }
    c.update_from_flattened_dict(
        fields | {name.replace("__", "."): value for name, value in changes.items()}
    )
    return from_config_dict(c)


def ids_at(tokens: Any, *at: int) -> list[int]:
    """The ids of a row that count."""
    return tokens.ids[at][: tokens.lengths[at]].tolist()


def decode_at(tokenizer: tokenizer.Tokenizer, tokens: Any, *at: int) -> str:
    """The text of a row."""
    return tokenizer.decode(ids_at(tokens, *at))


def take(dataset: Any, count: int) -> list[Any]:
    """The first batches."""
    return [dataset[step] for step in range(count)]


def user_batches(users: Sequence[User], words: tokenizer.Tokenizer, cfg: Config, **how: Any) -> Any:
    """Of the main stage."""
    return batches.make_user_batches(tokens.encode_users(users, words, cfg), words, cfg, **how)


def warm_batches(users: Sequence[User], words: tokenizer.Tokenizer, cfg: Config, **how: Any) -> Any:
    """Of the warm-up."""
    encoded = tokens.encode_users(users, words, cfg)
    return warmup_batches.make_warmup_batches(encoded, words, cfg, **how)


def write_users(users: Iterable[User], path: Path) -> None:
    """Writes own data, one line per held-out pair: the inverse of `jsonl.load`, but for stated,
    readings, split, groups and conversation of a pair, and "#2" of a draw."""
    lines = []
    for user in users:
        fields = dataclasses.asdict(user)
        for item in (*fields["shots"], *fields["comments"], *fields["pairs"]):
            del item["conversation"]
        signals = {name: fields[name] for name in ("profile", "survey", "comments")}
        record = {"user_id": user.user_id, "oracle": user.oracle}
        record["signals"] = {**signals, "fewshot": fields["shots"]}
        groups = {"groups": user.groups}
        rows = [{**record, **pair, **groups} for pair in fields["pairs"]]
        lines += [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
