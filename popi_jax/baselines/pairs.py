"""What the baselines share: a user's pairs and past pairs as batches, and items of scored pairs.

A baseline learns from the training users' pairs and past pairs (shots). Of a new user it sees the
shots alone, the only part of the signals that it can read."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from popi_jax.arrays import PairLogps, Tokens, UserBatch
from popi_jax.data import batches
from popi_jax.data.encode import encode_user
from popi_jax.data.prompts import render_signals
from popi_jax.data.records import Messages, Pair, User
from popi_jax.errors import UserError
from popi_jax.run import Run

Which = Literal["pairs", "shots", "both"]
GENERIC, FITTED = "generic", "fitted_to_pairs"  # conditions: a new user unknown, or by the shots


class Fit(NamedTuple):
    """What a baseline gives: items of all pairs of the test users, under each condition, and the
    settings that it had, those chosen on the validation users among them."""

    items: dict[str, list[dict[str, Any]]]  # GENERIC, FITTED -> as docs/evaluation.md describes
    settings: dict[str, Any]


def encode_pairs(
    run: Run, users: Sequence[User], which: Which, *, batch_users: int = 0
) -> list[UserBatch]:
    """The users' pairs, their shots, or shots and then pairs, in batches of numpy arrays.

    Pairs are cut to `data.num_pairs` a user, texts to the run's padded lengths. The signals are
    left out: `context` is empty. batch_users: 0 for `evaluation.batch_users`. The
    last batch is filled with users none of whose pairs count."""
    config, most = run.config, run.config.data.num_pairs
    bare = [_take(user, which, most) for user in users]
    count = max((len(user.pairs) for user in bare), default=0) or 1
    size = batch_users or config.evaluation.batch_users
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, num_pairs=count),
        evaluation=dataclasses.replace(config.evaluation, batch_users=size),
    )
    words = run.generator.tokenizer
    encoded = [encode_user(user, words, config) for user in bare]
    made = (b.batch for b in batches.make_eval_batches(encoded, words.pad_id, config))
    nothing = Tokens(np.zeros((size, 1), np.int32), np.zeros(size, np.int32))
    return [b._replace(context=nothing) for b in made]


def check_users(train: Sequence[User], validation: Sequence[User], test: Sequence[User]) -> None:
    """Raises: UserError when one of the splits is empty."""
    for split, users in (("train", train), ("validation", validation), ("test", test)):
        if not users:
            field = "data.path" if split == "train" else f"data.{split}_fraction"
            why = "; baselines choose their settings on it" if split == "validation" else ""
            raise UserError(f"{field}: the {split} split holds no user{why}; raise it or add users")


def _take(user: User, which: Which, most: int) -> User:
    """The user without signals, and with the wanted pairs."""
    shots = tuple(
        Pair(f"{user.user_id} shot {n}", _ask(s.prompt), s.chosen, s.rejected)
        for n, s in enumerate(user.shots)
    )
    wanted = {"pairs": (), "shots": shots, "both": shots}[which]
    wanted += () if which == "shots" else user.pairs[:most]
    bare: dict[str, Any] = dict.fromkeys(("profile", "survey", "oracle", "stated"), "")
    bare |= dict.fromkeys(("shots", "comments", "readings"), ())
    return dataclasses.replace(user, pairs=wanted, **bare)


def _ask(prompt: str) -> Messages:
    return [{"role": "user", "content": prompt}]


def join_users(parts: Sequence[Any], num_users: int) -> Any:
    """Trees of arrays [users ...] of all batches as one, without the users that fill the last."""
    return jax.tree.map(lambda *x: np.concatenate(x)[:num_users], *parts)


def make_items(
    run: Run,
    users: Sequence[User],
    scores: PairLogps,
    margins: Float[np.ndarray, "users pairs"],
    reference: PairLogps | None = None,
) -> list[dict[str, Any]]:
    """One item for each pair of the users that counts, in their order.

    scores, reference: [users pairs], log-probs in nats, or rewards of a reward model, which has no
    reference. The generator sees no text about the user: context_tokens is 0."""
    config, words, most = run.config, run.generator.tokenizer, run.config.data.num_pairs
    made = join_users(encode_pairs(run, users, "pairs"), len(users))
    items: list[dict[str, Any]] = []
    for row, user in enumerate(users):
        text = render_signals(user, config.data.pair_layout, config.model.signals_template)
        signals = words.encode(text)
        for k, pair in enumerate(user.pairs[:most]):
            if not made.pair_mask[row, k]:
                continue
            known = reference and PairLogps(*(float(x[row, k]) for x in reference))
            items.append(
                {
                    "user": user.user_id,
                    "person": user.user_id.split("#")[0],
                    "pair": pair.record_id,
                    "chosen": float(scores.chosen[row, k]),
                    "rejected": float(scores.rejected[row, k]),
                    "reference_chosen": known.chosen if known else None,
                    "reference_rejected": known.rejected if known else None,
                    "chosen_len": int(made.chosen.lengths[row, k]),
                    "rejected_len": int(made.rejected.lengths[row, k]),
                    "margin": float(margins[row, k]),
                    "context_tokens": 0,
                    "signal_tokens": len(signals),
                    "groups": {},
                }
            )
    return items


def measure_nats(margins: Any, mask: Any) -> float:
    """Mean of -log sigmoid(margin) over the pairs that count: by it settings are chosen."""
    values = np.logaddexp(0.0, -np.asarray(margins, np.float64))
    return float(np.where(mask, values, 0.0).sum() / max(np.sum(mask), 1))
