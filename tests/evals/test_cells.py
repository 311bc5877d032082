import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax import files, generators
from popi_jax.arrays import Tokens
from popi_jax.checkpoints.content import Hashes
from popi_jax.data import batches, encode, persons, prompts, tokenizer
from popi_jax.data.examples import list_examples
from popi_jax.data.records import User
from popi_jax.errors import UserError
from popi_jax.evals import cells, records
from popi_jax.evals.cells import Split, Unit
from popi_jax.evals.subjects import Reader, Subject, Weights, open_subject
from popi_jax.evals.sweep_plan import DECODINGS, Cell
from popi_jax.losses.preference import PreferenceObjective
from popi_jax.models.transformer import init_boxed, unbox
from popi_jax.popi.scorer import Scorer
from popi_jax.run import RoleParts, list_banned
from tests.tiny_run import TinyRun, shared_run

ITEM = (
    *("user", "person", "pair", "chosen", "rejected", "reference_chosen", "reference_rejected"),
    *("chosen_len", "rejected_len", "margin", "context_tokens", "signal_tokens", "groups"),
)


def open_unit(tiny: TinyRun, users: list, out, subject: Subject | None = None) -> Unit:
    config = tiny.run.config
    subject = subject or open_subject(str(tiny.workdir), config, tiny.run.mesh)
    split = Split(users, subject.roles.config.data, {"users": len(users)}, "sample")
    hashes = Hashes(out / "hashes.json", files.write_whole)
    return Unit(subject, split, subject.readers, list(DECODINGS), str(out), hashes)


def name(condition: str, decoding: str = "none", **other: str) -> Cell:
    reads = condition == "raw_signals" or decoding != "none"
    fields = {"model": "m", "data": "own", "signals": "all" if reads else "none"}
    fields |= {"condition": condition, "decoding": decoding, "generator": "trained"}
    return Cell(**(fields | other))


ALL = [
    name("no_signals"),
    name("raw_signals"),
    *(
        name(condition, decoding)
        for condition in ("summary_before_rl", "summary", "other_user_summary")
        for decoding in DECODINGS
    ),
    name("oracle"),
    name("oracle", generator="before_rl"),
]


def score(tiny: TinyRun, unit: Unit, cell: Cell) -> list[dict]:
    parts: list[float] = []
    with jax.set_mesh(tiny.run.mesh):
        scored = unit.score(cell, parts.append)
    assert parts == sorted(parts) and parts[-1] == 1.0
    return scored.items


def count_programs() -> tuple[int, int]:
    """How many programs were compiled that write summaries, and that score texts."""
    return generators.draw_summaries._cache_size(), generators.score_tree._cache_size()


def nats_of(items: list[dict]) -> float:
    return float(np.logaddexp(0, [-item["margin"] for item in items]).mean())


def seen_of(items: list[dict]) -> float:
    """Context tokens, mean over users."""
    return float(np.mean(list({item["user"]: item["context_tokens"] for item in items}.values())))


@pytest.fixture(scope="module")
def tiny() -> TinyRun:
    return shared_run(8)


@pytest.fixture(scope="module")
def users(tiny) -> list:
    found = list(tiny.run.dataset.splits["test"])
    assert len(found) % tiny.run.config.evaluation.batch_users  # the last batch is padded
    return found


@pytest.fixture(scope="module")
def unit(tiny, users, tmp_path_factory) -> Unit:
    return open_unit(tiny, users, tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def evaluated(tiny, unit) -> dict[Cell, list[dict]]:
    return {cell: score(tiny, unit, cell) for cell in ALL}


@pytest.fixture(scope="module")
def summaries(tiny, unit, evaluated) -> list[list[int]]:
    found = unit.read_summaries("trained", "all", "greedy", lambda part: None)
    return [item["ids"] for item in found]


def test_items_are_the_pairs_of_the_users(evaluated, users):
    expected = [(user.user_id, pair.record_id) for user in users for pair in user.pairs[:3]]
    for items in evaluated.values():
        assert [(item["user"], item["pair"]) for item in items] == expected
        assert tuple(items[0]) == ITEM


def test_margins_are_those_of_each_user_behind_the_user_s_text(
    evaluated, summaries, tiny, users, unit
):
    """Nats of each condition, from contexts made here by hand, all users in one batch, on one
    device. Texts have the limits of the run, not the longest of its training users."""
    cfg, words = unit.subject.roles.config, tiny.run.generator.tokenizer
    whole = dataclasses.replace(
        cfg, evaluation=dataclasses.replace(cfg.evaluation, batch_users=len(users))
    )
    (batch,) = batches.make_eval_batches(
        [encode.encode_user(user, words, whole) for user in users], words.pad_id, whole
    )
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
    header = len(prompts.render_inference_context(words, ""))  # the inference model reads them so
    raw = [encode.fit_signals(user, words, cfg).context[header:] for user in users]
    oracle = [words.encode(user.oracle)[: cfg.data.summary_len] for user in users]
    reference = margins(before, nothing)

    def nats(params, texts: list[list[int]]) -> float:
        values = cfg.generator.beta * (margins(params, texts) - reference)
        return float(np.logaddexp(0, -values)[batch.batch.pair_mask].mean())

    close = partial(pytest.approx, rel=1e-4)
    told = {
        name("no_signals"): nothing,
        name("raw_signals"): raw,
        name("summary", "greedy"): summaries,
        name("other_user_summary", "greedy"): [*summaries[1:], summaries[0]],
        name("oracle"): oracle,
    }
    for cell, texts in told.items():
        assert nats_of(evaluated[cell]) == close(nats(now, texts)), cell
        assert seen_of(evaluated[cell]) == pytest.approx(np.mean([len(text) for text in texts]))
        assert [i["signal_tokens"] for i in evaluated[cell][::3]] == [len(text) for text in raw]
    assert nats_of(evaluated[ALL[-1]]) == close(nats(before, oracle))
    # or the comparison would say little
    assert len({round(nats_of(items), 5) for items in evaluated.values()}) == len(ALL)
    chosen = [item["chosen"] - item["rejected"] for item in evaluated[name("oracle")]]
    mask = batch.batch.pair_mask
    np.testing.assert_allclose(chosen, margins(now, oracle)[mask], rtol=1e-3, atol=1e-4)


def test_a_generator_that_did_not_change_cannot_tell_without_a_summary(tiny, users, tmp_path):
    """Exactly: the reference is scored by the same program. And what was trained is read in the
    right place."""
    unit = open_unit(tiny, users[:8], tmp_path)
    items = score(tiny, unit, name("no_signals", generator="before_rl"))
    assert {item["margin"] for item in items} == {0.0}
    assert {item["margin"] for item in score(tiny, unit, name("no_signals"))} != {0.0}
    told = {
        decoding: score(tiny, unit, name("summary", decoding, generator="before_rl"))
        for decoding in DECODINGS
    }
    assert nats_of(told["sampled"]) != nats_of(told["greedy"])


def read_summaries(out, decoding: str) -> list[dict]:
    found = [records.read(path) for path in (out / records.SUMMARIES).iterdir()]
    (kept,) = [r.items for r in found if r.header["labels"]["decoding"] == decoding]
    return kept


def test_sampled_is_at_the_temperature_of_the_run(tiny, users, tmp_path):
    """By which a cell is named; greedy ones stay what they are."""
    units = []
    for temperature in (0.6, 1.0):
        unit = open_unit(tiny, users[:8], tmp_path)
        config = unit.subject.roles.config
        inference = dataclasses.replace(config.inference, temperature=temperature)
        config = dataclasses.replace(config, inference=inference)
        roles = unit.subject.roles._replace(config=config)
        units.append(open_unit(tiny, users[:8], tmp_path, unit.subject._replace(roles=roles)))
    greedy, sampled = (
        [unit.identify(name("summary", decoding)) for unit in units]
        for decoding in ("greedy", "sampled")
    )
    assert greedy[0] == greedy[1] and greedy[0]["text"]["summaries"]["temperature"] == 0.0
    assert [told["text"]["summaries"]["temperature"] for told in sampled] == [0.6, 1.0]
    # what leaves margins as they are leaves the cells where they are
    told = [cells.identify_objective(PreferenceObjective(over_beta=on)) for on in (True, False)]
    assert told[0] == told[1] != cells.identify_objective(PreferenceObjective(beta=0.2))
    heats = []

    class Spy(generators.Summarizer):
        def write(self, signals, temperatures, advance):
            heats.append(list(temperatures))
            return super().write(signals, temperatures, advance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "Summarizer", Spy)
        with jax.set_mesh(tiny.run.mesh):
            units[0].read_summaries("trained", "all", "sampled", lambda part: None)
    assert heats == [[0.0, 0.6]]


def test_summaries_are_kept_and_read(tiny, users, tmp_path, monkeypatch):
    """All decodings are drawn at once."""
    greedy, sampled = (name("summary", decoding) for decoding in ("greedy", "sampled"))
    first = score(tiny, open_unit(tiny, users[:8], tmp_path), greedy)
    kept = read_summaries(tmp_path, "greedy")
    assert [item["user"] for item in kept] == [user.user_id for user in users[:8]]
    assert kept[0]["signals"].startswith("profile")
    assert read_summaries(tmp_path, "sampled") != kept
    monkeypatch.setattr(cells, "Summarizer", None)  # not asked again
    again = open_unit(tiny, users[:8], tmp_path)
    assert score(tiny, again, greedy) == first
    assert score(tiny, again, sampled) != first
    score(tiny, again, name("other_user_summary", "greedy"))
    with pytest.raises(TypeError):
        score(tiny, again, name("summary_before_rl", "greedy"))


def test_what_cannot_be_asked_is_told(tiny, users, tmp_path):
    """A single user has no other one; a user without a persona has no oracle."""
    unit = open_unit(tiny, [dataclasses.replace(users[0], oracle="")], tmp_path)
    for cell in (name("oracle"), name("other_user_summary", "greedy")):
        with pytest.raises(UserError, match=f'no pair counts under the condition "{cell[3]}"'):
            score(tiny, unit, cell)
    for cell, told in (
        (name("orakle"), 'unknown condition "orakle".*Did you mean "oracle"'),
        (name("raw_signals", signals="comments"), "no user of these data has comments"),
        (name("no_signals", generator="first"), 'no generator "first"'),
    ):
        with pytest.raises(UserError, match=told):
            unit.identify(cell)


def test_oracle_counts_only_users_who_have_one(tiny, users, tmp_path):
    some = [
        dataclasses.replace(user, oracle="" if i % 2 else user.oracle)
        for i, user in enumerate(users[:8])
    ]
    unit = open_unit(tiny, some, tmp_path)
    with jax.set_mesh(tiny.run.mesh):
        scored = unit.score(name("oracle"), lambda part: None)
    assert [item["user"] for item in scored.items[::3]] == [user.user_id for user in some[::2]]
    coverage = scored.header["coverage"]
    left = {"the condition does not apply": 12}
    assert coverage == {"users": 8, "attempted": 24, "scored": 12, "left_out": left}


def test_pairs_with_equal_replies_are_left_out(tiny, users, tmp_path):
    first, *rest = users[:8]
    pairs = (first.pairs[0], dataclasses.replace(first.pairs[1], rejected=first.pairs[1].chosen))
    first = dataclasses.replace(first, pairs=(*pairs, first.pairs[2]))
    with jax.set_mesh(tiny.run.mesh):
        unit = open_unit(tiny, [first, *rest], tmp_path)
        scored = unit.score(name("no_signals"), lambda part: None)
    whole = score(tiny, open_unit(tiny, users[:8], tmp_path), name("no_signals"))
    assert [item["pair"] for item in scored.items] == [
        item["pair"] for item in whole if item["pair"] != first.pairs[1].record_id
    ]
    assert scored.items[1]["margin"] == pytest.approx(whole[2]["margin"], rel=1e-4)
    left = {"chosen and rejected are equal within data.answer_len": 1}
    expected = {"users": 8, "attempted": 24, "scored": 23, "left_out": left}
    assert scored.header["coverage"] == expected


def test_all_signals_are_those_that_the_run_reads(tiny, users, unit, tmp_path):
    subject = open_subject(str(tiny.workdir), tiny.run.config, tiny.run.mesh)
    data = dataclasses.replace(subject.roles.config.data, signals="profile")
    split = Split(users, data, {"users": len(users)}, "sample")
    hashes = Hashes(tmp_path / "hashes.json", files.write_whole)
    limited = Unit(subject, split, subject.readers, list(DECODINGS), str(tmp_path), hashes)
    for condition, decoding in (("raw_signals", "none"), ("summary", "greedy")):
        asked = {kind: name(condition, decoding, signals=kind) for kind in ("all", "profile")}
        assert limited.identify(asked["all"]) == limited.identify(asked["profile"])
        assert limited.identify(asked["all"]) == unit.identify(asked["profile"])
        assert limited.identify(asked["all"]) != unit.identify(asked["all"])
        # another selection is of the full record
        shots = name(condition, decoding, signals="shots")
        assert limited.identify(shots) == unit.identify(shots)
    seen = limited._select("all")
    assert all(user.profile and not user.shots for user in seen)
    assert any(user.shots for user in limited._select("shots"))


def test_prompt_aware_summaries_are_written_behind_the_prompt(tiny, users, tmp_path):
    subject = open_subject(str(tiny.workdir), tiny.run.config, tiny.run.mesh)
    data = dataclasses.replace(subject.roles.config.data, prompt_aware=True, num_pairs=1)
    examples = list(list_examples(users[:3], 2))
    split = Split(examples, data, {"users": 6}, "sample")
    hashes = Hashes(tmp_path / "hashes.json", files.write_whole)
    unit = Unit(subject, split, subject.readers, list(DECODINGS), str(tmp_path), hashes)
    with jax.set_mesh(tiny.run.mesh):
        groups = unit._once("signals", "all").groups
    words, told = tiny.run.inference.tokenizer, {}
    for tokens, index in (jax.device_get(placed) for group in groups for placed in group.placed):
        for ids, length, number in zip(tokens.ids, tokens.lengths, index, strict=True):
            told[int(number)] = words.decode(ids[:length])
    for number, user in enumerate(examples):
        assert told[number].endswith(f"asks now: {user.pairs[0].prompt[-1]['content']}")


def test_cells_of_one_shape_compile_nothing(tiny, unit, users, evaluated, tmp_path):
    before = count_programs()
    again = open_unit(tiny, users, tmp_path)
    for cell in (name("no_signals"), name("summary", "greedy"), name("oracle")):
        assert score(tiny, again, cell) == evaluated[cell]
    assert count_programs() == before


def test_keys_name_what_changes_an_answer(tiny, users, unit, tmp_path):
    """And neither the place of the run, nor the devices, nor the size of a batch."""
    key = lambda unit, cell: records.make_key(unit.identify(cell))  # noqa: E731
    assert len({key(unit, cell) for cell in ALL}) == len(ALL)
    config, mesh = tiny.run.config, tiny.run.mesh
    other = dataclasses.replace(
        config,
        evaluation=dataclasses.replace(config.evaluation, batch_users=3),
        model=dataclasses.replace(config.model, remat="full"),
    )
    here = open_subject(str(tiny.workdir), other, mesh)
    copy = tmp_path / "copy"
    import shutil

    shutil.copytree(tiny.workdir, copy)
    there = open_subject(str(copy), config, mesh)
    for subject in (here, there):
        same = open_unit(tiny, users, tmp_path, subject)
        assert [key(same, cell) for cell in ALL] == [key(unit, cell) for cell in ALL]
    fewer = open_unit(tiny, users[:5], tmp_path)
    beta = subject.readers["trained"].config
    beta = dataclasses.replace(beta, generator=dataclasses.replace(beta.generator, beta=0.2))
    readers = {"trained": subject.readers["trained"]._replace(config=beta)}
    for changed in (fewer, open_unit(tiny, users, tmp_path, subject._replace(readers=readers))):
        assert key(changed, name("no_signals")) != key(unit, name("no_signals"))
    weights = next(copy.glob("checkpoints/7/generator/ocdbt.process_0/d/*"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    changed = open_unit(tiny, users, tmp_path, open_subject(str(copy), config, mesh))
    assert key(changed, name("no_signals")) != key(unit, name("no_signals"))
    assert key(changed, ALL[-1]) == key(unit, ALL[-1])  # it reads the reference alone


def test_two_roles_with_different_models_and_tokenizers(
    tiny, users, summaries, tmp_path, monkeypatch
):
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
    params = jax.jit(lambda key: unbox(init_boxed(key, model)))(jax.random.key(3))
    subject = open_subject(str(tiny.workdir), config, tiny.run.mesh)
    weights = Weights(lambda hashes: ["other"], lambda: params)
    parts = RoleParts(model, words, prefix, sampling)
    reader = Reader(subject.roles.config, parts, weights, weights)
    subject = subject._replace(readers=subject.readers | {"other": reader})
    contexts = []
    scored = generators.score_tree

    def see_contexts(params, tree, **static):
        ids, lengths = jax.device_get(tree.context)
        contexts.extend(row[:n].tolist() for row, n in zip(ids, lengths, strict=True))
        return scored(params, tree, **static)

    monkeypatch.setattr(generators, "score_tree", see_contexts)
    unit = open_unit(tiny, users[:8], tmp_path, subject)
    items = score(tiny, unit, name("summary", "greedy", generator="other"))
    kept = read_summaries(tmp_path, "greedy")
    assert [item["ids"] for item in kept] == summaries[:8]  # signals are in words of the writer
    assert [item["summary"] for item in kept] == [
        written.decode(ids).strip() for ids in summaries[:8]
    ]
    expected = [prompts.encode_summary(words, item["summary"], config) for item in kept]
    assert expected != summaries[:8]
    assert contexts[:8] == [[*prefix]] * 8  # of the reference
    assert sorted(contexts[8:]) == sorted([*prefix, *ids] for ids in expected)
    assert seen_of(items) == pytest.approx(np.mean([len(ids) for ids in expected]))
    margin = items[0]["chosen"] - items[0]["rejected"]
    reference = items[0]["reference_chosen"] - items[0]["reference_rejected"]
    assert items[0]["margin"] == pytest.approx(config.generator.beta * (margin - reference))


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
    assert persons.find_others(people) == other
    assert persons.have_others(people) == differs


def test_two_personas_in_a_sorted_file():
    ids = [f"friendly#{i}" for i in range(30)] + [f"unfriendly#{i}" for i in range(30)]
    people = name_users(ids)
    assert sorted(persons.find_others(people)) == list(range(60))
    assert all(persons.have_others(people))
