"""What the generator makes of each kind of context, on the same users and pairs, before and after
training.

Three programs do everything: greedy summaries, sampled summaries, and log-probs of pairs behind a
given text. The parameters are arguments, so each is compiled once per shape. Touches no file."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Bool, Int

from popi_jax.arrays import Params, Tokens, UserBatch
from popi_jax.data.batches import make_eval_batches
from popi_jax.data.encode import fit_signals
from popi_jax.data.records import User
from popi_jax.data.tokenizer import Tokenizer
from popi_jax.evals.metrics import score_pairs
from popi_jax.losses.preference import PairLengths, PairLogps, pair_margins
from popi_jax.models.sampling import Sampling
from popi_jax.models.transformer import TransformerConfig
from popi_jax.objectives import preference_objective
from popi_jax.popi.roles import Glue, pair_logps, rollout, splice
from popi_jax.sharding import Rules, replicated, spec

CONDITIONS = (
    "no_signals",
    "raw_signals",
    "summary_before_rl",
    "summary",
    "other_user_summary",
    "oracle",
)
_KEY = 3  # folded into the key of the seed; training uses 0 to 2


class Models(NamedTuple):
    """The parameters of both roles at one time."""

    inference: Params
    generator: Params


class Row(NamedTuple):
    """One condition: the generator sees `context_tokens` tokens about the user; fields as in
    metrics.Score."""

    condition: str
    decoding: str  # of the summary: greedy | sampled (temperature 1) | none: it is no summary of the inference model
    accuracy: float
    stderr: float
    n: int
    nats: float
    context_tokens: float  # mean over the users that count


class Evaluation(NamedTuple):
    rows: list[Row]
    before_rl: dict[str, Row]  # the generator as it was before the main stage; {} without oracles
    summaries: Tokens  # [users seq], greedy, of the trained inference model, without end token


def num_passes(users: Sequence[User], config: Any) -> int:
    """How many times `evaluate` goes through the users, for a progress bar."""
    rows = 10 if any(user.oracle for user in users) else 8
    if not preference_objective(config).needs_reference:
        references = 0
    else:
        references = rows if config.generator.reference == "summary" else 1
    return 4 + rows + references


def evaluate(
    trained: Models,
    before: Models,
    users: Sequence[User],
    *,
    tokenizer: Tokenizer,
    glue: Glue,
    model: TransformerConfig,
    sampling: Sampling,
    config: Any,
    mesh: Mesh,
    advance: Callable[[], None],
) -> Evaluation:
    """Scores the users' pairs under all conditions; `advance` is called after each batch of each
    pass.

    The text about the user, in the place of the summary, is: nothing (no_signals), the raw signals
    as the inference model sees them (raw_signals), a summary by the inference model as it was
    `before` (summary_before_rl) or `trained` (summary), that summary of another person
    (other_user_summary), the true persona (oracle; only users who have one). Summaries are drawn as
    `sampling` says, at temperature 0 and 1. The generator is the trained one in all rows. Margins
    are those of the objective of training; their reference, if they have one, is the generator
    `before`, without any text unless `generator.reference` says otherwise. Where both are equal,
    no_signals has margins of 0."""
    batches = list(make_eval_batches(users, tokenizer, config))
    placed = [place(batch.batch, mesh, model.rules) for batch in batches]
    size = config.evaluation.batch_users
    num_users = len(users)
    mask = np.concatenate([batch.batch.pair_mask for batch in batches])[:num_users]
    score = jax.jit(
        partial(_text_logps, model=model, prefix=glue.generator_prefix),
        out_shardings=replicated(mesh),
    )

    def logps(params: Params, text: Tokens) -> PairLogps:
        results = []
        for start, batch in zip(range(0, len(placed) * size, size), placed, strict=True):
            rows = (start + np.arange(size)) % num_users
            here = place(Tokens(text.ids[rows, None], text.lengths[rows, None]), mesh, model.rules)
            results.append(jax.device_get(score(params, here, batch)))
            advance()
        return jax.tree.map(lambda *parts: jnp.asarray(np.concatenate(parts)[:num_users]), *results)

    nothing = Tokens(
        np.zeros((num_users, config.data.summary_len), np.int32), np.zeros(num_users, np.int32)
    )
    objective = preference_objective(config)
    sides = (
        [getattr(batch.batch, side).lengths for batch in batches] for side in PairLengths._fields
    )
    lengths = PairLengths(*(jnp.asarray(np.concatenate(side)[:num_users]) for side in sides))
    sees_text = config.generator.reference == "summary"
    unseen = (
        logps(before.generator, nothing) if objective.needs_reference and not sees_text else None
    )

    def row(
        condition: str, decoding: str, text: Tokens, counted: np.ndarray, params: Params
    ) -> Row:
        reference = (
            logps(before.generator, text) if objective.needs_reference and sees_text else unseen
        )
        margins = pair_margins(logps(params, text), lengths, reference, objective=objective)
        seen = counted.any(axis=1)
        return Row(
            condition,
            decoding,
            *score_pairs(np.asarray(margins), counted),
            float(text.lengths[seen].mean()),
        )

    texts = [
        ("no_signals", "none", nothing, mask),
        ("raw_signals", "none", _raw_signals(users, tokenizer, config), mask),
    ]
    other, differs = other_persons([user.user_id for user in users])
    of_trained = {}
    for decoding, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        drawn = sampling._replace(temperature=temperature)
        program = summarizer(model=model, glue=glue, sampling=drawn, seed=config.seed, mesh=mesh)
        early = summarize(program, before.inference, placed, num_users, advance)
        late = of_trained[decoding] = summarize(
            program, trained.inference, placed, num_users, advance
        )
        texts += [
            ("summary_before_rl", decoding, early, mask),
            ("summary", decoding, late, mask),
            ("other_user_summary", decoding, _take(late, other), mask & differs[:, None]),
        ]
    oracle = Tokens(
        *(
            np.concatenate(parts)[:num_users]
            for parts in zip(*(b.oracle for b in batches), strict=True)
        )
    )
    known = mask & (oracle.lengths > 0)[:, None]
    texts.append(("oracle", "none", oracle, known))
    texts.sort(key=lambda text: CONDITIONS.index(text[0]))  # keeps greedy before sampled
    rows = [row(*text, trained.generator) for text in texts if text[3].any()]
    drifted = (
        {"oracle": row("oracle", "none", oracle, known, before.generator)} if known.any() else {}
    )
    return Evaluation(rows, drifted, of_trained["greedy"])


def summarizer(
    *, model: TransformerConfig, glue: Glue, sampling: Sampling, seed: int, mesh: Mesh
) -> Callable[[Params, UserBatch], Tokens]:
    """Compiles (params, users) -> one summary per user [users seq], without end tokens; every
    process gets all."""
    parts = partial(_summaries, model=model, glue=glue, sampling=sampling, seed=seed)
    return jax.jit(parts, out_shardings=replicated(mesh))


def summarize(
    program: Callable[[Params, UserBatch], Tokens],
    params: Params,
    placed: Sequence[UserBatch],
    num_users: int,
    advance: Callable[[], None],
) -> Tokens:
    """Summaries of the first `num_users` users of the batches, as numpy arrays."""
    results = []
    for batch in placed:
        results.append(jax.device_get(program(params, batch)))
        advance()
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:num_users], *results)


def other_persons(
    user_ids: Sequence[str],
) -> tuple[Int[np.ndarray, " users"], Bool[np.ndarray, " users"]]:
    """For each user the number of another one, and whether that is another person.

    The users are rotated by the least number of places that gives the fewest of them a summary of
    themselves. A person whose signals were drawn several times is "ann", "ann#2", ...: one person
    still."""
    _, persons = np.unique([user_id.split("#")[0] for user_id in user_ids], return_inverse=True)
    places = np.arange(len(persons))
    same = [int((persons == np.roll(persons, -shift)).sum()) for shift in range(1, len(persons))]
    other = np.roll(places, -(1 + int(np.argmin(same)))) if same else places
    return other, persons != persons[other]


def place(batch: Any, mesh: Mesh, rules: Rules) -> Any:
    """Puts arrays that every process holds whole on the mesh, split along the leading axis."""
    sharding = NamedSharding(mesh, spec(("batch",), rules))
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch
    )


def _summaries(
    params: Params,
    users: UserBatch,
    *,
    model: TransformerConfig,
    glue: Glue,
    sampling: Sampling,
    seed: int,
) -> Tokens:
    key = jax.random.fold_in(jax.random.key(seed), _KEY)
    drawn = rollout(params, users, key, model=model, glue=glue, sampling=sampling, group_size=1)
    lengths = drawn.summaries.lengths - drawn.finished.astype(jnp.int32)
    return Tokens(drawn.summaries.ids[:, 0], lengths[:, 0])


def _text_logps(
    params: Params,
    text: Tokens,
    users: UserBatch,
    *,
    model: TransformerConfig,
    prefix: tuple[int, ...],
) -> PairLogps:
    """Log-probs of the replies [users pairs] behind a text [users 1 seq] without end token."""
    contexts = splice(prefix, text, jnp.zeros(text.lengths.shape, bool))
    return jax.tree.map(lambda x: x[:, 0], pair_logps(params, contexts, users, model=model))


def _take(text: Tokens, rows: np.ndarray) -> Tokens:
    return Tokens(text.ids[rows], text.lengths[rows])


def _raw_signals(users: Sequence[User], tokenizer: Tokenizer, config: Any) -> Tokens:
    limit = config.data.context_len
    rows = [tokenizer.encode(fit_signals(user, tokenizer, config).text) for user in users]
    ids = np.zeros((len(rows), limit), np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    return Tokens(ids, np.array([len(tokens) for tokens in rows], np.int32))
