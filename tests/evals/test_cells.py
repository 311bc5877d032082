import dataclasses
import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.arrays import Tokens
from popi_jax.data import batches, encode, prompts, tokenizer
from popi_jax.data.records import User
from popi_jax.evals import cells, conditions, generators
from popi_jax.evals.cells import Evaluation, Models
from popi_jax.evals.conditions import CONDITIONS, Condition
from popi_jax.models.transformer import init_boxed, unbox
from popi_jax.popi.scorer import Scorer
from popi_jax.run import RoleParts, Run, list_banned
from tests.tiny_run import TinyRun, shared_run


class Bar:
    """Stands in for the progress bar."""

    def __init__(self, total: int, *, label: str, enabled: bool) -> None:
        self.total, self.steps = total, [0]
        BARS.append(self)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, step: int) -> None:
        self.steps.append(step)


BARS: list[Bar] = []


@pytest.fixture(scope="module", autouse=True)
def bar():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "Progress", Bar)
        yield


def evaluate(
    tiny: TinyRun, trained: Models, users: list, told: tuple = CONDITIONS, run: Run | None = None
) -> Evaluation:
    before = Models(tiny.frozen.inference, tiny.frozen.generator)
    with jax.set_mesh(tiny.run.mesh):
        models = {"trained": trained, "before_rl": before}
        return cells.evaluate(run or tiny.run, users, models, told)


def use_trained(tiny: TinyRun) -> Models:
    return Models(tiny.now.inference.params, tiny.now.generator.params)


def use_frozen(tiny: TinyRun) -> Models:
    return Models(tiny.frozen.inference, tiny.frozen.generator)


def count_programs() -> tuple[int, int]:
    """How many programs were compiled that write summaries, and that score texts."""
    return generators.draw_summaries._cache_size(), generators.score_tree._cache_size()


def check_bar(num_passes: int) -> None:
    """The newest bar ends full."""
    assert BARS[-1].total == 100 * num_passes == BARS[-1].steps[-1]
    assert BARS[-1].steps == sorted(BARS[-1].steps)


@pytest.fixture(scope="module")
def tiny() -> TinyRun:
    return shared_run(8)


@pytest.fixture(scope="module")
def users(tiny) -> list:
    found = list(tiny.run.dataset.splits["test"])
    assert len(found) % tiny.run.config.evaluation.batch_users  # the last batch is padded
    return found


@pytest.fixture(scope="module")
def evaluated(tiny, users) -> Evaluation:
    before = count_programs()
    found = evaluate(tiny, use_trained(tiny), users)
    # summaries; texts as long as summaries and as long as signals
    assert count_programs() == (before[0] + 1, before[1] + 2)
    # summaries of two models, ten cells, and the reference without a text
    check_bar(2 + 10 + 1)
    return found


def test_conditions_and_decodings(evaluated, users):
    found = [(row.condition, row.decoding) for row in evaluated.rows]
    both = ["summary_before_rl", "summary", "other_user_summary"]
    assert found == [
        ("no_signals", "none"),
        ("raw_signals", "none"),
        *itertools.product(both, ["greedy", "sampled"]),
        ("oracle", "none"),
    ]
    assert {row.n for row in evaluated.rows} == {sum(len(user.pairs) for user in users)}


def test_margins_are_those_of_each_user_behind_the_user_s_text(evaluated, tiny, users):
    """Nats of each condition, from contexts made here by hand, all users in one batch, on one
    device."""
    cfg, words = tiny.run.config, tiny.run.generator.tokenizer
    whole = dataclasses.replace(
        cfg, evaluation=dataclasses.replace(cfg.evaluation, batch_users=len(users))
    )
    (batch,) = batches.make_eval_batches(users, words, whole)
    program = jax.jit(Scorer(tiny.run.generator.model).score_pairs)
    now, before = jax.device_get((tiny.now.generator.params, tiny.frozen.generator))

    def margins(params, texts: list[list[int]]) -> np.ndarray:
        rows = [[*prompts.render_generator_prefix(words, cfg), *text] for text in texts]
        ids = np.zeros((len(rows), 1, cfg.data.context_len + 20), np.int32)
        for row, tokens in zip(ids, rows, strict=True):
            row[0, : len(tokens)] = tokens
        lengths = np.array([[len(tokens)] for tokens in rows], np.int32)
        logps = program(params, jax.tree.map(jnp.asarray, Tokens(ids, lengths)), batch.batch)
        return np.asarray(logps.chosen - logps.rejected, np.float64)[:, 0]

    nothing = [[] for _ in users]
    summaries = evaluated.summaries
    header = len(prompts.render_inference_context(words, ""))  # the inference model reads them so
    raw = [encode.fit_signals(user, words, cfg).context[header:] for user in users]
    oracle = [words.encode(user.oracle)[: cfg.data.summary_len] for user in users]
    reference = margins(before, nothing)

    def nats(params, texts: list[list[int]]) -> float:
        values = cfg.generator.beta * (margins(params, texts) - reference)
        return float(np.logaddexp(0, -values)[batch.batch.pair_mask].mean())

    rows = {(row.condition, row.decoding): row for row in evaluated.rows}
    close = partial(pytest.approx, rel=1e-4)
    assert rows["no_signals", "none"].nats == close(nats(now, nothing))
    assert rows["raw_signals", "none"].nats == close(nats(now, raw))
    assert rows["summary", "greedy"].nats == close(nats(now, summaries))
    assert rows["other_user_summary", "greedy"].nats == close(
        nats(now, [*summaries[1:], summaries[0]])
    )
    assert rows["oracle", "none"].nats == close(nats(now, oracle))
    assert evaluated.before_rl["oracle"].nats == close(nats(before, oracle))
    assert len({round(row.nats, 3) for row in evaluated.rows}) == len(
        rows
    )  # or the comparison would say little
    assert rows["no_signals", "none"].context_tokens == 0
    assert rows["raw_signals", "none"].context_tokens == pytest.approx(
        np.mean([len(text) for text in raw])
    )
    assert rows["summary", "greedy"].context_tokens == pytest.approx(
        np.mean([len(text) for text in summaries])
    )
    assert rows["oracle", "none"].context_tokens == pytest.approx(
        np.mean([len(text) for text in oracle])
    )


def test_a_generator_that_did_not_change_cannot_tell_without_a_summary(tiny, users):
    """Exactly: the reference is scored by the same program. And what was trained is read in the
    right place."""
    evaluation = evaluate(tiny, use_frozen(tiny), users[:8])
    rows = {(row.condition, row.decoding): row for row in evaluation.rows}
    assert rows["no_signals", "none"][2:4] == (0.5, 0.0)
    assert rows["no_signals", "none"].nats == pytest.approx(math.log(2), rel=1e-12)
    for decoding in ("greedy", "sampled"):
        assert rows["summary", decoding][2:] == rows["summary_before_rl", decoding][2:]
    assert rows["summary", "sampled"].nats != rows["summary", "greedy"].nats
    assert evaluation.before_rl["oracle"] == rows["oracle", "none"]
    assert rows["oracle", "none"].nats != rows["no_signals", "none"].nats


def test_what_cannot_be_asked_is_left_out(tiny, users):
    """A single user has no other one; a user without a persona has no oracle."""
    alone = [dataclasses.replace(users[0], oracle="")]
    evaluation = evaluate(tiny, use_frozen(tiny), alone)
    assert {row.condition for row in evaluation.rows} == {
        "no_signals",
        "raw_signals",
        "summary_before_rl",
        "summary",
    }
    assert evaluation.before_rl == {}
    assert all(math.isnan(row.stderr) for row in evaluation.rows)
    check_bar(2 + 6 + 1)


def test_oracle_counts_only_users_who_have_one(tiny, users):
    some = [
        dataclasses.replace(user, oracle="" if i % 2 else user.oracle)
        for i, user in enumerate(users[:8])
    ]
    evaluation = evaluate(tiny, use_frozen(tiny), some)
    (oracle,) = [row for row in evaluation.rows if row.condition == "oracle"]
    assert oracle.n == sum(len(user.pairs) for user in some[::2])
    limit = tiny.run.config.data.summary_len
    lengths = [len(tiny.run.generator.tokenizer.encode(user.oracle)) for user in some[::2]]
    assert oracle.context_tokens == pytest.approx(np.mean([min(n, limit) for n in lengths]))


def test_a_new_condition_is_one_value_and_compiles_nothing(tiny, users, evaluated):
    def tell_profile(people: conditions.People) -> list[list[int]]:
        return [people.tokenizer.encode(user.profile)[:20] for user in people.users]

    before = count_programs()
    told = (*CONDITIONS, Condition("profile", tell_profile))
    evaluation = evaluate(tiny, use_trained(tiny), users, told)
    assert count_programs() == before
    assert evaluation.rows[:-1] == evaluated.rows
    row = evaluation.rows[-1]
    assert (row.condition, row.decoding, row.n) == ("profile", "none", evaluated.rows[0].n)
    words = tiny.run.generator.tokenizer
    lengths = [min(len(words.encode(user.profile)), 20) for user in users]
    assert row.context_tokens == pytest.approx(np.mean(lengths)) and np.mean(lengths) > 1
    assert row.nats not in [other.nats for other in evaluated.rows]
    check_bar(2 + 11 + 1)


def test_two_roles_with_different_models_and_tokenizers(tiny, users, evaluated, monkeypatch):
    """A summary goes to the generator as text."""
    config, written = tiny.run.config, tiny.run.inference.tokenizer
    texts = prompts.list_training_texts(users[:5], config)
    words = tokenizer.train(texts, 300)  # other words, and another size
    model = dataclasses.replace(
        tiny.run.generator.model, vocab_size=320, num_layers=1, mlp_dim=64, rope_theta=55.0
    )
    prefix = tuple(prompts.render_generator_prefix(words, config))
    sampling = tiny.run.generator.sampling._replace(
        end_id=words.eos_id, banned=list_banned(words, model), max_len=6
    )
    run = tiny.run._replace(generator=RoleParts(model, words, prefix, sampling))
    params = jax.jit(lambda key: unbox(init_boxed(key, model)))(jax.random.key(3))
    contexts = []
    draw = generators.draw_replies

    class SeenGenerator(generators.Generator):
        def score(self, texts, *rest):
            contexts.extend(texts)
            return super().score(texts, *rest)

    def see_context(params, context, *rest, **static):
        ids, lengths = jax.device_get(context)
        contexts.append(ids[0, : lengths[0]].tolist())
        return draw(params, context, *rest, **static)

    monkeypatch.setattr(cells, "Generator", SeenGenerator)
    monkeypatch.setattr(generators, "draw_replies", see_context)
    (summary,) = [c for c in CONDITIONS if c.name == "summary"]
    models = Models(tiny.now.inference.params, params)
    with jax.set_mesh(run.mesh):
        both = {"trained": models, "before_rl": models}
        evaluation = cells.evaluate(run, users[:8], both, (summary,))
        rows = generators.list_summaries(run, users[:8], evaluation.summaries)
        generator = generators.Generator(run.generator, params, run.mesh)
        del contexts[8 * 2 :]  # greedy and sampled; then those of the reference, which are empty
        text = prompts.encode_summary(words, rows[0]["summary"], run.config)
        (answer,) = generator.reply(text, "tea?", sampling=sampling, num=1, seed=0)
    assert evaluation.summaries == evaluated.summaries[:8]  # signals are in words of the writer
    expected = [prompts.encode_summary(words, row["summary"], run.config) for row in rows]
    assert contexts[:8] == expected != evaluation.summaries
    assert [row["summary"] for row in rows] == [
        written.decode(ids).strip() for ids in evaluation.summaries
    ]
    row = evaluation.rows[0]
    assert row.context_tokens == pytest.approx(np.mean([len(ids) for ids in expected]))
    assert contexts[-1] == [*prefix, *expected[0]]
    assert isinstance(answer, str)


def name_users(ids: list[str]) -> list[User]:
    return [User(user_id, "", "", (), (), ()) for user_id in ids]


@pytest.mark.parametrize(
    ("ids", "other", "differs"),
    [
        (["a", "b", "c"], [1, 2, 0], [True, True, True]),
        (["a"], [0], [False]),
        (["a", "a#2", "b", "b#2"], [2, 3, 0, 1], [True] * 4),
        (["a", "a#2", "a#3", "b"], [1, 2, 3, 0], [False, False, True, True]),
    ],
)
def test_another_person_is_never_oneself(ids, other, differs):
    people = name_users(ids)
    assert conditions.find_others(people) == other
    assert conditions.have_others(people) == differs


def test_two_personas_in_a_sorted_file():
    ids = [f"friendly#{i}" for i in range(30)] + [f"unfriendly#{i}" for i in range(30)]
    people = name_users(ids)
    assert sorted(conditions.find_others(people)) == list(range(60))
    assert all(conditions.have_others(people))
