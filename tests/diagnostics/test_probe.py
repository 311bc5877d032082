"""A look at users of a run with random weights, against likelihoods that are computed with padding,
one user at a time."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.arrays import PairLengths, Params, Tokens, TrainState
from popi_jax.data import batches, encode
from popi_jax.data.records import User
from popi_jax.diagnostics import probe as probes
from popi_jax.diagnostics import values
from popi_jax.diagnostics.probe import Probe, open_probe
from popi_jax.losses.preference import pair_margins
from popi_jax.models import decode
from popi_jax.models.transformer import lay_out_for_rollout
from popi_jax.popi.plan import Reference, UpdatePlan
from popi_jax.popi.rollout import splice
from popi_jax.popi.scorer import Scorer, repeat_ids
from popi_jax.run import Run
from popi_jax.training import choices
from tests.tiny_run import TinyRun, on_devices, shared_run
from tests.training import small

USERS = 5


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    with on_devices(1):
        yield


def make_run(tiny: TinyRun, **schedule: Any) -> Run:
    """With the test users in the place of validation users."""
    splits = tiny.run.dataset.splits
    dataset = tiny.run.dataset._replace(splits=splits | {"validation": splits["test"]})
    settings = {"probe_users": USERS, "probe_every": 3} | schedule
    config = small.replace(tiny.run.config, "schedule", **settings)
    return tiny.run._replace(dataset=dataset, config=config)


def open_plain(
    tiny: TinyRun, run: Run, change: Callable[[UpdatePlan], UpdatePlan] = lambda plan: plan
) -> tuple[Probe, list[int]]:
    """The probe of a run without adapters, and a list that gets an entry when the start is
    read."""
    read: list[int] = []

    def read_start() -> Params:
        read.append(1)
        return tiny.frozen.generator

    def join(state: TrainState) -> tuple[Params, Params]:
        return state.inference.params, state.generator.params

    plan = change(choices.plan_run(run).plan)
    jax.set_mesh(run.mesh)
    found = open_probe(run, plan, join, read_start)
    assert found is not None
    return found, read


def trained(state: TrainState) -> TrainState:
    """As if its generator had been trained for two updates."""
    return state._replace(generator=state.generator._replace(step=jnp.int32(2)))


class Plain:
    """Margins of each user's pairs behind texts, from padded rows."""

    def __init__(self, tiny: TinyRun, run: Run) -> None:
        self.tiny, self.run = tiny, run
        self.users = probes.choose_users(run.dataset.splits["validation"], USERS)
        self.words = run.generator.tokenizer
        self.encoded, _ = batches.encode_all(self.users, self.words, probes.give_limits(run))

        scorer = Scorer(run.generator.model)
        self.program = jax.jit(
            lambda params, contexts, one: jax.tree.map(
                lambda x: x[0, 0], scorer.score_pairs(params, contexts, one)
            )
        )

    def score(self, params: Params, text: list[int], number: int) -> Any:
        one = jax.tree.map(lambda x: jnp.asarray(x[number : number + 1]), self.encoded)
        width = 32 if len(text) <= 32 else self.run.config.data.context_len
        told = Tokens(jnp.asarray([text + [0] * (width - len(text))]), jnp.array([len(text)]))
        contexts = splice(self.run.generator.prompt, told, jnp.zeros(1, bool))
        contexts = jax.tree.map(lambda x: x[:, None], contexts)
        return self.program(params, contexts, one), one

    def margins(self, params: Params, text: list[int], number: int) -> np.ndarray:
        """Of a user's pairs that count, against the start behind nothing."""
        own, one = self.score(params, text, number)
        start, _ = self.score(self.tiny.frozen.generator, [], number)
        lengths = PairLengths(one.chosen.lengths[0], one.rejected.lengths[0])
        objective = choices.plan_run(self.run).plan.generator.objective
        found = np.asarray(pair_margins(own, lengths, start, objective=objective), np.float64)
        return found[np.asarray(one.pair_mask[0])]

    def nats(self, params: Params, texts: list[list[int]]) -> tuple[float, float]:
        """(nats, accuracy)."""
        found = [self.margins(params, text, number) for number, text in enumerate(texts)]
        margin = np.concatenate(found)
        return float(np.log1p(np.exp(-margin)).mean()), float(np.mean(margin > 0))

    def write(self, params: Params) -> list[list[int]]:
        """Greedy summaries."""
        role = self.run.inference
        draw = partial(
            decode.sample, model=role.model, sampling=role.sampling._replace(temperature=0.0)
        )
        count = (len(self.users),)
        keys = decode.sample_keys(jax.random.key(0), jnp.arange(*count), 1)
        weights = lay_out_for_rollout(params, role.model)
        context = jax.tree.map(jnp.asarray, self.encoded.context)
        drawn = jax.jit(draw)(weights, context, repeat_ids(role.prompt, count), keys)
        lengths = np.asarray(drawn.summaries.lengths - drawn.finished)[:, 0]
        ids = np.asarray(drawn.summaries.ids)[:, 0]
        return [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]


def test_values_are_those_of_padded_rows() -> None:
    tiny = shared_run(1)
    run = make_run(tiny)
    probe, read = open_plain(tiny, run)
    before = small.copied(tiny.now)
    found = probe.measure(trained(tiny.now))
    jax.tree.map(np.testing.assert_array_equal, small.copied(tiny.now), before)
    assert read == [1]
    plain, now = Plain(tiny, run), tiny.now.generator.params
    greedy = plain.write(tiny.now.inference.params)
    config = probes.give_limits(run)
    texts = {
        "none": [[] for _ in greedy],
        "summary": greedy,
        "other": greedy[1:] + greedy[:1],
        "oracle": [encode.tell_persona(user, plain.words, config) for user in plain.users],
    }
    for name, told in texts.items():
        nats, accuracy = plain.nats(now, told)
        assert found[f"probe/nats_{name}"] == pytest.approx(nats, abs=1e-4), name
        assert found[f"probe/acc_{name}"] == pytest.approx(accuracy, abs=1e-6)
    judged, _ = plain.nats(tiny.frozen.generator, greedy)
    assert found["probe/nats_start_judge"] == pytest.approx(judged, abs=1e-4)
    assert judged != pytest.approx(found["probe/nats_summary"], abs=1e-3)
    bits = (np.log(2) - judged) / np.log(2)
    assert found["probe/bits_start_judge"] == pytest.approx(bits, abs=1e-3)
    odds = values.list_odds(run.dataset.source, plain.users, np.asarray(plain.encoded.pair_mask))
    words = [plain.words.decode(ids).strip() for ids in greedy]
    margins = np.concatenate([plain.margins(now, text, n) for n, text in enumerate(greedy)])
    for name, value in values.describe_loss(margins, odds, words).items():
        assert found[f"probe/{name}"] == pytest.approx(value, abs=1e-4), name
    assert {"probe/reliability_1", "probe/nats_sampled", "probe/repeats"} <= found.keys()
    assert probe.measure(trained(tiny.now)) == found  # again, with what it has kept


def test_samples_of_a_user_have_keys_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = shared_run(1)
    probe, _ = open_plain(tiny, make_run(tiny))
    drawn: list[Any] = []
    write = probes.Summarizer.write

    def keep(self: Any, *given: Any) -> Any:
        drawn.append(write(self, *given))
        return drawn[-1]

    monkeypatch.setattr(probes.Summarizer, "write", keep)
    probe.measure(tiny.now)
    probe.measure(tiny.now)
    greedy, *samples = drawn[0]
    assert len(samples) == probes.SAMPLES
    for number in range(USERS):
        assert len({tuple(texts[number]) for texts in (greedy, *samples)}) == 5
    assert drawn[0] == drawn[1]


def test_the_start_is_not_read_while_the_generator_is_as_it_was() -> None:
    tiny = shared_run(1)
    probe, read = open_plain(tiny, make_run(tiny))
    generator = tiny.now.generator._replace(params=tiny.frozen.generator)
    found = probe.measure(tiny.now._replace(generator=generator))
    assert read == []
    assert found["probe/nats_none"] == pytest.approx(np.log(2))
    assert found["probe/nats_start_judge"] == found["probe/nats_summary"]
    # what was kept of the start is not taken for the generator that comes of it
    later = probe.measure(trained(tiny.now))
    fresh = open_plain(tiny, make_run(tiny))[0].measure(trained(tiny.now))
    assert later == fresh


def test_any_mesh_gives_the_same_values() -> None:
    found = []
    for devices in (1, 4):
        with on_devices(devices):
            tiny = shared_run(devices)
            probe, _ = open_plain(tiny, make_run(tiny))
            found.append(probe.measure(trained(tiny.now)))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, abs=2e-4), name


@pytest.mark.parametrize("reference", [Reference.SUMMARY, Reference.NONE])
def test_references_of_other_kinds(reference: Reference) -> None:
    """One that sees the summary gives margins of 0 at the start, so that no judge is told; a
    likelihood without any is measured as it is."""
    tiny = shared_run(1)

    def change(plan: UpdatePlan) -> UpdatePlan:
        generator = dataclasses.replace(plan.generator, reference=reference)
        if reference is Reference.NONE:
            objective = dataclasses.replace(generator.objective, name="simpo")
            generator = dataclasses.replace(generator, objective=objective)
        return dataclasses.replace(plan, generator=generator)

    run = make_run(tiny)
    probe, _ = open_plain(tiny, run, change)
    start = tiny.now._replace(generator=tiny.now.generator._replace(params=tiny.frozen.generator))
    found = probe.measure(start)
    judged = "probe/nats_start_judge" in found
    assert judged == (reference is Reference.NONE)
    if judged:
        assert found["probe/nats_none"] != pytest.approx(np.log(2), abs=1e-4)
        assert found["probe/bits_start_judge"] == pytest.approx(found["probe/bits_summary"])
    else:
        assert found["probe/nats_summary"] == pytest.approx(np.log(2))


@pytest.mark.parametrize(("reads", "names"), [("nothing", {"none"}), ("signals", {"none", "told"})])
def test_baselines_without_summaries_are_told_what_they_read(reads: str, names: set[str]) -> None:
    tiny = shared_run(1)
    run = make_run(tiny)
    run = run._replace(config=small.replace(run.config, "generator", reads=reads))

    def change(plan: UpdatePlan) -> UpdatePlan:
        generator = dataclasses.replace(plan.generator, reads_summaries=False)
        return dataclasses.replace(plan, generator=generator)

    probe, _ = open_plain(tiny, run, change)
    found = probe.measure(trained(tiny.now))
    told = {name.removeprefix("probe/nats_") for name in found if name.startswith("probe/nats_")}
    assert told == names | {"oracle"}
    if reads == "signals":
        plain = Plain(tiny, run)
        config = probes.give_limits(run)
        texts = [encode.tell_signals(user, plain.words, config) for user in plain.users]
        assert max(map(len, texts)) > 32
        nats, accuracy = plain.nats(tiny.now.generator.params, texts)
        assert found["probe/nats_told"] == pytest.approx(nats, abs=1e-4)
        assert found["probe/acc_told"] == pytest.approx(accuracy)


def test_when_there_is_nothing_to_look_at(caplog: pytest.LogCaptureFixture) -> None:
    tiny = shared_run(1)
    off = make_run(tiny, probe_every=0)
    plan = choices.plan_run(off).plan
    given: Any = (lambda state: ({}, {}), lambda: {})
    assert open_probe(off, plan, *given) is None
    run = make_run(tiny)
    nobody = run._replace(
        dataset=run.dataset._replace(splits=run.dataset.splits | {"validation": ()})
    )
    with caplog.at_level(logging.INFO, logger="absl"):
        assert open_probe(nobody, plan, *given) is None
    assert "the validation split holds no user" in caplog.text


def test_steps_that_are_looked_at() -> None:
    tiny = shared_run(1)
    probe, _ = open_plain(tiny, make_run(tiny, probe_every=4))
    first = probe.first_step
    last = first + 10
    due = [step - first for step in range(first, last + 1) if probe.is_due(step, last)]
    assert due == [0, 4, 8, 10]


def test_users_are_evenly_spaced() -> None:
    users = [User(str(number), "", "", (), (), ()) for number in range(10)]
    assert [int(user.user_id) for user in probes.choose_users(users, 4)] == [0, 2, 5, 7]
    assert probes.choose_users(users, 99) == users
