"""Users -> token ids within the limits of the configuration, and what had to be shortened for
that."""

import functools
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from popi_jax.data import prompts
from popi_jax.data.prompts import Tokenizer, Wording
from popi_jax.data.records import Messages, User
from popi_jax.data.selection import drop_items, list_item_sizes
from popi_jax.errors import UserError

_KNOWN_TEXTS = 1024  # prompts, and replies, that are kept encoded: many users share theirs
# characters of a token: texts of more for each token of their limit are not encoded as a whole
_LONG = 6
_LENGTH_MULTIPLE = 4  # padded lengths are multiples of it

Ids = list[int]


class Truncations(NamedTuple):
    """How many texts were shortened to fit, and of how many."""

    contexts: int  # users whose signals were
    turns: int
    answers: int
    users: int
    pairs: int
    equal: int = 0  # pairs that do not count: both replies have the same tokens within the limit
    emptied: int = 0  # users whose signals are all gone; counted in `contexts` too


class Signals(NamedTuple):
    """The signals of a user within a limit."""

    text: str
    # the same as the inference model reads it, with the headers before and, where summaries are
    # prompt-aware, the prompt of the first pair behind
    context: Ids
    shortened: bool
    emptied: bool  # of a user who has some


class EncodedUser(NamedTuple):
    """Token ids of one user, each within its limit of the configuration."""

    user_id: str
    context: Ids
    turns: list[Ids]  # one per pair
    chosen: list[Ids]  # one per pair; ends with the end token unless shortened
    rejected: list[Ids]  # one per pair, as `chosen`
    usable: tuple[int, ...]  # the pairs that count: those whose replies differ in these tokens
    oracle: Ids  # without end token; [] = unknown
    told: Ids  # what the generator is told, where generator.reads is no summary
    oracle_text: str
    stated_text: str  # items separated by " ; "
    contrasts: list[tuple[str, str]]  # what the replies of each past pair show
    profile: Ids  # its first summary_len - 1 tokens
    readings: list[tuple[Ids, Ids]]  # turn, answer; [] when the context was shortened
    truncations: Truncations


def encode_user(user: User, tokenizer: Tokenizer, cfg: Any) -> EncodedUser:
    """Encodes one user within the limits of `cfg.data`.

    Too long signals are shortened as `fit_signals` says. Too long a turn loses its oldest messages,
    then the start of its last one. Too long an answer loses its tail, and with it the end token;
    where chosen and rejected are equal then, the pair does not count. At most `num_pairs` pairs are
    kept.

    Raises: UserError when the fixed parts of a conversation alone exceed a limit."""
    d = cfg.data
    pairs = user.pairs[: d.num_pairs]
    signals = fit_signals(user, tokenizer, cfg)
    asked = (tuple((m["role"], m["content"]) for m in p.prompt) for p in pairs)
    wording = prompts.get_wording(cfg)
    turns = [_fit_known_turn(prompt, tokenizer, d.turn_len, wording) for prompt in asked]
    replies = [
        [_encode_known_answer(tokenizer, text) for text in (p.chosen, p.rejected)] for p in pairs
    ]
    chosen, rejected = ([[*both[i][: d.answer_len]] for both in replies] for i in range(2))
    usable = tuple(k for k in range(len(pairs)) if chosen[k] != rejected[k])
    readings = () if signals.shortened else user.readings
    return EncodedUser(
        user_id=user.user_id,
        context=signals.context,
        turns=[[*turn] for turn, _ in turns],
        chosen=chosen,
        rejected=rejected,
        usable=usable,
        oracle=tell_persona(user, tokenizer, cfg),
        told=tell(user, tokenizer, cfg),
        oracle_text=user.oracle,
        stated_text=user.stated,
        contrasts=[(r.answer, r.contrast) for r in user.readings],
        profile=prompts.encode_answer(tokenizer, user.profile)[:-1][: d.summary_len - 1],
        readings=[_encode_reading(r.question, r.answer, tokenizer, cfg) for r in readings],
        truncations=Truncations(
            contexts=int(signals.shortened),
            turns=sum(cut for _, cut in turns),
            answers=sum(len(ids) > d.answer_len for both in replies for ids in both),
            users=1,
            pairs=len(pairs),
            equal=len(pairs) - len(usable),
            emptied=int(signals.emptied),
        ),
    )


def encode_context(user: User, tokenizer: Tokenizer, cfg: Any) -> Ids:
    """What `encode_user` gives as context, alone."""
    return fit_signals(user, tokenizer, cfg).context


def fit_signals(user: User, tokenizer: Tokenizer, cfg: Any) -> Signals:
    """Fits the signals of a user into `data.context_len` tokens, headers of the inference model
    counted. The prompt that a summary is for, at most `data.turn_len` tokens of it, is never
    shortened for them.

    Whole items go, as few as possible, in the order of `selection.list_item_sizes`: the oldest
    comments, then the oldest past pairs, each with both replies, then the survey from its end, line
    by line, and last the profile as a whole.

    Raises: UserError when the headers alone are longer."""
    m, limit, asked = cfg.model, cfg.data.context_len, ""
    if cfg.data.prompt_aware and user.pairs:
        asked = _cut_start(prompts.render_asked(user.pairs[0].prompt), tokenizer, cfg.data.turn_len)

    def read(dropped: int) -> tuple[str, Ids]:
        some = drop_items(user, dropped) if dropped else user
        text = prompts.render_signals(some, cfg.data.pair_layout, m.signals_template)
        return text, prompts.render_inference_context(
            tokenizer, text + asked, m.summary_instruction, m.summary_system
        )

    sizes, known = list_item_sizes(user), dict[int, int]()
    if sum(sizes) <= _LONG * limit:
        text, ids = read(0)
        known[0] = len(ids)
        if len(ids) <= limit:
            return Signals(text, ids, shortened=False, emptied=False)
    known[len(sizes)] = len(_check_room(read(len(sizes))[1], limit, "data.context_len"))
    dropped = _find_fewest(sizes, lambda count: len(read(count)[1]), limit, known)
    emptied = 0 < dropped == len(sizes)
    return Signals(*read(dropped), shortened=dropped > 0, emptied=emptied)


def _find_fewest(
    sizes: list[int], count_tokens: Callable[[int], int], limit: int, known: dict[int, int]
) -> int:
    """The fewest first items without which there are at most `limit` tokens.

    sizes: in characters. count_tokens: of what is left without so many of them. known: what it
    returns without all of them, where there are at most `limit`, and without none if that is known
    to be more. Tokens are taken to grow with characters, so that few numbers are tried."""
    left = [*itertools.accumulate(sizes[::-1], initial=0)][::-1]  # characters behind so many
    tokens, low, high = dict(known), 0 if 0 in known else -1, len(sizes)  # too few, and enough
    while high - low > 1:
        rate = (tokens[high] - known[len(sizes)]) / left[high] if left[high] else 1 / _LONG
        most = tokens[low] if low in tokens else max(rate * left[0], limit + 1)
        share = (limit - tokens[high]) / (most - tokens[high])
        fitting = left[high] + share * (left[max(low, 0)] - left[high])
        guess = next((n for n in range(low + 1, high) if left[n] <= fitting), high - 1)
        guess = (low + high) // 2 if len(tokens) % 4 == 0 else guess  # were they not to grow so
        tokens[guess] = count_tokens(guess)
        low, high = (low, guess) if tokens[guess] <= limit else (guess, high)
    return high


def tell(user: User, tokenizer: Tokenizer, cfg: Any) -> Ids:
    """What the generator is trained behind where `generator.reads` is no summary; else []."""
    makers = {"signals": tell_signals, "persona": tell_persona}
    make = makers.get(cfg.generator.reads)
    return make(user, tokenizer, cfg) if make else []


def get_told_len(cfg: Any) -> int:
    """Most tokens of it."""
    return {"signals": cfg.data.context_len, "persona": cfg.data.summary_len}.get(
        cfg.generator.reads, 0
    )


def tell_signals(user: User, tokenizer: Tokenizer, cfg: Any) -> Ids:
    """The raw signals, shortened as for the inference model, in the place of a summary: at most
    `data.context_len` tokens."""
    text = fit_signals(user, tokenizer, cfg).text
    return prompts.encode_summary(tokenizer, text, cfg)[: cfg.data.context_len]


def tell_persona(user: User, tokenizer: Tokenizer, cfg: Any) -> Ids:
    """The true persona in the place of a summary: at most `data.summary_len` tokens; [] where it is
    unknown."""
    text = user.oracle.strip()
    return prompts.encode_summary(tokenizer, text, cfg)[: cfg.data.summary_len]


def round_up(length: int) -> int:
    """Returns the next padded length."""
    return -(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


def _encode_reading(question: str, text: str, tokenizer: Tokenizer, cfg: Any) -> tuple[Ids, Ids]:
    encode = partial(prompts.render_reading_turn, tokenizer)
    turn = _fit_end(question, encode, tokenizer, cfg.data.turn_len)
    return turn, prompts.encode_answer(tokenizer, text)[: cfg.data.answer_len]


@functools.lru_cache(_KNOWN_TEXTS)
def _fit_known_turn(
    prompt: tuple[tuple[str, str], ...], tokenizer: Tokenizer, limit: int, wording: Wording
) -> tuple[tuple[int, ...], bool]:
    messages = [{"role": role, "content": content} for role, content in prompt]
    ids, shortened = _fit_turn(messages, tokenizer, limit, wording)
    return tuple(ids), shortened


@functools.lru_cache(_KNOWN_TEXTS)
def _encode_known_answer(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(prompts.encode_answer(tokenizer, text))


def _fit_turn(
    prompt: Messages, tokenizer: Tokenizer, limit: int, wording: Wording
) -> tuple[Ids, bool]:
    """Returns a turn of at most `limit` tokens, and whether it was shortened."""
    ids = prompts.render_generator_turn(tokenizer, prompt, wording)
    shortened = len(ids) > limit
    while len(ids) > limit and len(prompt) > 1:
        # an answer goes with its question
        prompt = prompt[2:] if prompt[1]["role"] == "assistant" else prompt[1:]
        ids = prompts.render_generator_turn(tokenizer, prompt, wording)
    if len(ids) <= limit:
        return ids, shortened

    def encode(text: str) -> Ids:
        return prompts.render_generator_turn(
            tokenizer, [{"role": "user", "content": text}], wording
        )

    return _fit_end(prompt[-1]["content"], encode, tokenizer, limit), True


def _cut_start(text: str, tokenizer: Tokenizer, limit: int) -> str:
    tokens = tokenizer.encode(text)
    return text if len(tokens) <= limit else tokenizer.decode(tokens[-limit:])


def _fit_end(text: str, encode: Callable[[str], Ids], tokenizer: Tokenizer, limit: int) -> Ids:
    """Returns the longest encode(end of the text) of at most `limit` tokens."""
    ids, tokens = encode(text), tokenizer.encode(text)
    while len(ids) > limit and tokens:
        tokens = tokens[_count_excess(ids, tokens, limit) :]
        ids = encode(tokenizer.decode(tokens))
    return _check_room(ids, limit, "data.turn_len")


def _count_excess(ids: Ids, tokens: Ids, limit: int) -> int:
    """How many of the tokens of a part must go; decoding and encoding again may change the count by
    a token or two, so that callers repeat it."""
    return min(len(ids) - limit, len(tokens))


def _check_room(ids: Ids, limit: int, field: str) -> Ids:
    if len(ids) > limit:
        raise UserError(
            f"{field}: {limit} is less than the {len(ids)} tokens of the headers and instructions "
            "alone"
        )
    return ids
