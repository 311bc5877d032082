"""Users -> token ids within the limits of the configuration, and what had to be shortened for
that."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from popi_jax.data import prompts
from popi_jax.data.records import Messages, User
from popi_jax.data.tokenizer import Tokenizer
from popi_jax.errors import UserError

_MEASURED_USERS = 4096
_LENGTH_MULTIPLE = 4  # padded lengths are multiples of it

Ids = list[int]


class Truncations(NamedTuple):
    """How many texts were shortened to fit, and of how many."""

    contexts: int
    turns: int
    answers: int
    oracles: int
    users: int
    pairs: int


class EncodedUser(NamedTuple):
    """Token ids of one user, each within its limit of the configuration."""

    user_id: str
    context: Ids
    turns: list[Ids]  # one per pair
    chosen: list[Ids]  # one per pair; ends with the end token unless shortened
    rejected: list[Ids]  # one per pair, as `chosen`
    oracle: Ids  # without end token; [] = unknown
    oracle_text: str
    stated_text: str  # items separated by " ; "
    contrasts: list[tuple[str, str]]  # what the replies of each past pair show
    profile: Ids  # its first summary_len - 1 tokens
    readings: list[tuple[Ids, Ids]]  # turn, answer; [] when the context was shortened
    truncations: Truncations


def encode_user(user: User, tokenizer: Tokenizer, cfg: Any) -> EncodedUser:
    """Encodes one user within the limits of `cfg.data`.

    Too long a context loses its oldest comments, then its oldest shots, then the tail of the
    survey, then that of the profile. Too long a turn loses its oldest messages, then the start of
    its last one. Too long an answer loses its tail, and with it the end token. At most `num_pairs`
    pairs are kept.

    Raises: UserError when the fixed parts of a conversation alone exceed a limit.
    """
    d = cfg.data
    pairs = user.pairs[: d.num_pairs]
    context, context_cut = fit_context(user, tokenizer, cfg)
    turns = [_fit_turn(p.prompt, tokenizer, d.turn_len) for p in pairs]
    chosen = [prompts.answer(tokenizer, p.chosen) for p in pairs]
    rejected = [prompts.answer(tokenizer, p.rejected) for p in pairs]
    oracle = tokenizer.encode(user.oracle.strip())
    return EncodedUser(
        user_id=user.user_id,
        context=context,
        turns=[turn for turn, _ in turns],
        chosen=[ids[: d.answer_len] for ids in chosen],
        rejected=[ids[: d.answer_len] for ids in rejected],
        oracle=oracle[: d.summary_len],
        oracle_text=user.oracle,
        stated_text=user.stated,
        profile=tokenizer.encode(user.profile)[: d.summary_len - 1],
        readings=[]
        if context_cut
        else [_reading(r.question, r.answer, tokenizer, cfg) for r in user.readings],
        contrasts=[(r.answer, r.contrast) for r in user.readings],
        truncations=Truncations(
            contexts=int(context_cut),
            turns=sum(cut for _, cut in turns),
            answers=sum(len(ids) > d.answer_len for ids in chosen + rejected),
            oracles=int(len(oracle) > d.summary_len),
            users=1,
            pairs=len(pairs),
        ),
    )


def fit_context(user: User, tokenizer: Tokenizer, cfg: Any) -> tuple[Ids, bool]:
    """The inference model's context of a user within `data.context_len`, and whether something was
    left out.

    Raises: UserError.
    """
    limit = cfg.data.context_len

    def encode(some: User) -> Ids:
        return prompts.inference_context(
            tokenizer, prompts.signals_text(some, cfg.data.pair_layout)
        )

    def with_survey(text: str) -> Ids:
        return encode(dataclasses.replace(user, survey=text))

    def with_profile(text: str) -> Ids:
        return encode(dataclasses.replace(user, survey="", profile=text))

    ids, cut = encode(user), False
    while len(ids) > limit and (user.comments or user.shots):
        dropped = {"comments": user.comments[1:]} if user.comments else {"shots": user.shots[1:]}
        user = dataclasses.replace(user, **dropped)
        ids, cut = encode(user), True
    if len(ids) <= limit:
        return ids, cut
    text, part = (
        (user.survey, with_survey)
        if len(with_survey("")) <= limit
        else (user.profile, with_profile)
    )
    return _fit_text(text, part, tokenizer, limit, "data.context_len", keep="start")[0], True


def truncations(users: Iterable[EncodedUser]) -> Truncations:
    """Sums of what was shortened over some users, for a report."""
    return Truncations(*np.sum([(0,) * 6, *(u.truncations for u in users)], axis=0).tolist())


def padded(length: int) -> int:
    """The next multiple of `_LENGTH_MULTIPLE`."""
    return -(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


def fitted_lengths(
    users: Sequence[User], tokenizer: Tokenizer, cfg: Any
) -> tuple[Any, Truncations]:
    """`cfg.data` with the padded lengths lowered to what the longest texts need, and what had to be
    shortened.

    At most `_MEASURED_USERS` users, evenly spaced, are measured; others that are longer are
    shortened like any other."""
    stride = -(-len(users) // _MEASURED_USERS)
    encoded = [encode_user(users[i], tokenizer, cfg) for i in range(0, len(users), stride)]
    turns = [ids for u in encoded for ids in (*u.turns, *(turn for turn, _ in u.readings))]
    answers = [
        ids
        for u in encoded
        for ids in (*u.chosen, *u.rejected, *(answer for _, answer in u.readings))
    ]

    def fitted(limit: int, rows: list[Ids], least: int) -> int:
        longest = max(map(len, rows), default=least)
        return min(limit, max(padded(longest), least))

    data = dataclasses.replace(
        cfg.data,
        context_len=fitted(cfg.data.context_len, [u.context for u in encoded], 1),
        turn_len=fitted(cfg.data.turn_len, [*turns, prompts.summary_turn(tokenizer, cfg)], 1),
        answer_len=fitted(cfg.data.answer_len, answers, 2),
    )
    return data, truncations(encoded)


def _reading(question: str, text: str, tokenizer: Tokenizer, cfg: Any) -> tuple[Ids, Ids]:
    def turn(part: str) -> Ids:
        return prompts.reading_turn(tokenizer, part)

    ids, _ = _fit_text(question, turn, tokenizer, cfg.data.turn_len, "data.turn_len", keep="end")
    return ids, prompts.answer(tokenizer, text)[: cfg.data.answer_len]


def _fit_turn(prompt: Messages, tokenizer: Tokenizer, limit: int) -> tuple[Ids, bool]:
    ids = prompts.generator_turn(tokenizer, prompt)
    if len(ids) <= limit:
        return ids, False
    kept = list(prompt)
    while len(ids) > limit and len(kept) > 1:
        kept = kept[1:]
        if kept[0]["role"] == "assistant":  # its question has just gone
            kept = kept[1:]
        ids = prompts.generator_turn(tokenizer, kept)
    if len(ids) <= limit:
        return ids, True

    def turn(text: str) -> Ids:
        return prompts.generator_turn(tokenizer, [{"role": "user", "content": text}])

    return _fit_text(kept[-1]["content"], turn, tokenizer, limit, "data.turn_len", keep="end")[
        0
    ], True


def _fit_text(
    text: str,
    encode: Callable[[str], Ids],
    tokenizer: Tokenizer,
    limit: int,
    field: str,
    *,
    keep: str,
) -> tuple[Ids, bool]:
    """Longest encode(part) of at most `limit` tokens, where the part is the "start" or the "end" of
    the text."""
    ids = encode(text)
    if len(ids) <= limit:
        return ids, False
    tokens = tokenizer.encode(text)
    while (
        len(ids) > limit and tokens
    ):  # decoding and encoding again may change the count by a token or two
        excess = min(len(ids) - limit, len(tokens))
        tokens = tokens[:-excess] if keep == "start" else tokens[excess:]
        ids = encode(tokenizer.decode(tokens))
    if len(ids) > limit:
        raise UserError(
            f"{field}: {limit} is less than the {len(ids)} tokens of the headers and instructions alone"
        )
    return ids, True
