"""The two tables below that of the conditions, from records as cells leave them."""

import numpy as np
import pytest

from popi_jax.data.sources import made_people, prefeval
from popi_jax.data.sources.made_odds import find_odds
from popi_jax.diagnostics.decomposition import count_mentions, split_loss
from popi_jax.evals import statistics
from popi_jax.evals.diagnosis import diagnose
from popi_jax.evals.records import CellRecord
from tests.diagnostics.made import draw_users

COUNT, PAIRS = 40, 3
USERS = draw_users(COUNT, PAIRS, seed=3).users
RNG = np.random.default_rng(0)
TEXTS = {"before_rl": ["no strong preference"] * COUNT, "trained": [u.oracle for u in USERS]}
MARGINS = {
    "no_signals": RNG.normal(0, 0.1, (COUNT, PAIRS)),
    "summary_before_rl": RNG.normal(0.1, 0.5, (COUNT, PAIRS)),
    "summary": RNG.normal(0.8, 0.5, (COUNT, PAIRS)),
    "other_user_summary": RNG.normal(0, 0.5, (COUNT, PAIRS)),
}


def make_cell(condition: str, margins: np.ndarray, **labels: str) -> CellRecord:
    own = {"condition": condition, "generator": "trained", "decoding": "greedy"} | labels
    items = [
        {"user": user.user_id, "person": user.user_id, "pair": pair.record_id, "margin": margin}
        | dict.fromkeys(("chosen", "rejected"), -9.0)
        | dict.fromkeys(("context_tokens", "signal_tokens"), 8)
        for user, row in zip(USERS, margins.tolist(), strict=True)
        for pair, margin in zip(user.pairs, row, strict=True)
    ]
    return CellRecord({"labels": own}, items)


def make_cells() -> list[CellRecord]:
    found = [make_cell("no_signals", MARGINS["no_signals"], decoding="none")]
    found += [make_cell(name, x) for name, x in MARGINS.items() if name != "no_signals"]
    # what is not read: other decodings, and the generator before the main stage
    found.append(make_cell("summary", MARGINS["summary"] + 5, decoding="sampled"))
    return [*found, make_cell("summary", MARGINS["summary"] + 9, generator="before_rl")]


def test_each_column_is_of_its_own_cell_and_text():
    found = diagnose(make_cells(), TEXTS, USERS, made_people.SOURCE)
    assert list(found["loss"]) == ["summary_before_rl", "summary", "other_user_summary"]
    odds = [pair for user in USERS for pair in find_odds(user)]
    oracles = TEXTS["trained"]
    texts = {
        "summary_before_rl": TEXTS["before_rl"],
        "summary": oracles,
        "other_user_summary": oracles[1:] + oracles[:1],
    }
    for name, column in found["loss"].items():
        margins = MARGINS[name].reshape(-1)
        nats = np.log1p(np.exp(-margins))
        assert column["nats"]["value"] == pytest.approx(nats.mean())
        by_user = nats.reshape(COUNT, PAIRS).mean(axis=1)
        error = by_user.std(ddof=1) / np.sqrt(COUNT)
        assert column["nats"]["stderr"] == pytest.approx(error)
        nothing = np.log1p(np.exp(-MARGINS["no_signals"].reshape(-1)))
        bits = (nothing - nats).mean() / np.log(2)
        assert column["bits"]["value"] == pytest.approx(bits)
        pairs = [text for text in texts[name] for _ in range(PAIRS)]
        mentions = [count_mentions(text, pair) for text, pair in zip(pairs, odds, strict=True)]
        parts = split_loss(margins, odds, np.array(mentions))
        for part, values in parts._asdict().items():
            assert column[part]["value"] == pytest.approx(values.mean()), (name, part)
    assert found["names"]["summary"]["precision"]["value"] == 1.0
    # nothing is named: no rate, and no number that JSON does not know
    assert found["names"]["summary_before_rl"]["precision"] == {"value": None, "stderr": None}
    assert found["names"]["summary_before_rl"]["repeats"]["value"] == 0.0
    # the best that signals allow is neither the truth nor nothing
    assert list(found["names"]) == ["summary_before_rl", "summary", "best_list"]
    best = {name: x["value"] or 0.0 for name, x in found["names"]["best_list"].items()}
    assert 0.8 < best["precision"] < 1 and best["repeats"] == 0
    assert list(best) == list(found["names"]["summary"])


def test_the_way_from_no_signals_to_the_oracle():
    found = diagnose(make_cells(), TEXTS, USERS, prefeval.SOURCE)["loss"]
    assert "gap_recovered" not in found["summary"]
    oracle = np.abs(RNG.normal(1.5, 0.5, (COUNT, PAIRS)))
    oracle[:4] *= -1
    cells = [*make_cells(), make_cell("oracle", oracle, decoding="none")]
    found = diagnose(cells, TEXTS, USERS, prefeval.SOURCE)["loss"]
    by_name = {cell.header["labels"]["condition"]: cell for cell in cells[::-1]}
    ends = by_name["no_signals"], by_name["oracle"]
    right = {name: (x > 0).mean() for name, x in (MARGINS | {"oracle": oracle}).items()}
    for name, column in found.items():
        way = (right[name] - right["no_signals"]) / (right["oracle"] - right["no_signals"])
        assert column["gap_recovered"]["value"] == pytest.approx(way), name
        items = [statistics.make_items(cell.items) for cell in (by_name[name], *ends)]
        expected = statistics.compute_gap_recovered(*items).estimate
        assert column["gap_recovered"]["value"] == pytest.approx(expected.value)
        # that counts persons without a gap too
        assert column["gap_recovered"]["stderr"] == pytest.approx(expected.stderr, rel=0.01)
    # no share of a way that may be none
    same = MARGINS["no_signals"].copy()
    same[0] = 1.0  # one person more is right, and nobody else
    assert (same > 0).sum() > (MARGINS["no_signals"] > 0).sum()
    way = make_cell("oracle", same, decoding="none")
    found = diagnose([*make_cells(), way], TEXTS, USERS, prefeval.SOURCE)["loss"]
    assert found["summary"]["gap_recovered"] == {"value": None, "stderr": None}
    # nothing is told where the oracle is of other pairs
    for item in cells[-1].items:
        item["pair"] += "-other"
    found = diagnose(cells, TEXTS, USERS, prefeval.SOURCE)["loss"]
    assert "gap_recovered" not in found["summary"]


def test_of_other_data_the_parts_that_exist_are_told():
    found = diagnose(make_cells(), TEXTS, USERS, prefeval.SOURCE)
    assert set(found["loss"]["summary"]) == {"nats", "saved_by_scale", "bits", "bits_calibrated"}
    assert set(found["names"]["summary"]) == {"repeats"}
    assert list(found["names"]) == ["summary_before_rl", "summary"]


def test_a_condition_that_applies_to_nobody_has_no_column():
    cells = [c for c in make_cells() if c.header["labels"]["condition"] != "other_user_summary"]
    found = diagnose(cells, TEXTS, USERS, made_people.SOURCE)
    assert list(found["loss"]) == ["summary_before_rl", "summary"]
