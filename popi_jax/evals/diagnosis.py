"""Where the loss goes and what summaries name, of the test users of a run: from the margins and the
greedy summaries that its evaluation has computed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from popi_jax.data.persons import find_others, name_persons
from popi_jax.data.records import User
from popi_jax.data.sources.source import PairOdds, Source
from popi_jax.diagnostics.decomposition import LN2
from popi_jax.diagnostics.estimates import (
    Estimate,
    average,
    calibrate,
    divide,
    find_nats,
    number_persons,
)
from popi_jax.diagnostics.values import OF_THE_LOSS, describe_texts, split_nats
from popi_jax.evals.conditions import BEFORE_RL, TRAINED
from popi_jax.evals.records import CellRecord

Columns = dict[str, dict[str, dict[str, float | None]]]  # condition -> name -> value, stderr
# condition -> whose summaries it tells
WRITERS = {"summary_before_rl": BEFORE_RL, "summary": TRAINED, "other_user_summary": TRAINED}


def diagnose(
    found: Sequence[CellRecord],
    summaries: Mapping[str, Sequence[str]],
    users: Sequence[User],
    source: Source,
) -> dict[str, Columns]:
    """`loss` and `names` of results.json. found: the cells of an evaluation, of which those of the
    generator at the end are read; summaries: by writer, one of each user, greedy."""
    cells = {
        record.header["labels"]["condition"]: record.items
        for record in found
        if record.header["labels"]["generator"] == TRAINED
        and record.header["labels"]["decoding"] in ("greedy", "none")
    }
    others, loss = find_others(users), Columns()
    nothing, whole = (
        {_key(item): item["margin"] for item in cells.get(name, ())}
        for name in ("no_signals", "oracle")
    )
    odds = _list_odds(source, users)
    for condition, writer in WRITERS.items():
        if condition in cells and nothing:
            texts = summaries[writer]
            if condition == "other_user_summary":
                texts = [texts[other] for other in others]
            by_user = dict(zip((user.user_id for user in users), texts, strict=True))
            parts = explain_loss(cells[condition], nothing, odds, by_user)
            loss[condition] = _to_json(parts | _find_gap(cells[condition], nothing, whole))
    persons, names = number_persons(name_persons(users)), Columns()
    for condition, writer in (("summary_before_rl", BEFORE_RL), ("summary", TRAINED)):
        names[condition] = _to_json(describe_texts(summaries[writer], users, persons, source))
    if source.write_best_list:
        best = [source.write_best_list(user) for user in users]
        names["best_list"] = _to_json(describe_texts(best, users, persons, source))
    return {"loss": loss, "names": names}


def explain_loss(
    items: Sequence[Mapping[str, Any]],
    nothing: Mapping[tuple[str, str], float],
    odds: Mapping[tuple[str, str], PairOdds],
    texts: Mapping[str, str],
) -> dict[str, Estimate]:
    """nats; where odds are known its parts; what one scale of the margins would save; bits that are
    gained over no text, without and with such a scale. nothing: margins behind no text, of the same
    pairs."""
    persons = number_persons([item["person"] for item in items])
    own = np.array([item["margin"] for item in items], np.float64)
    before = np.array([nothing[_key(item)] for item in items], np.float64)
    nats, scaled = find_nats(own), find_nats(calibrate(own, persons))
    without = find_nats(calibrate(before, persons))
    found = {"nats": average(nats, persons)}
    if odds:
        pairs = [[odds[_key(item)]] for item in items]
        parts = split_nats(own, pairs, [texts[item["user"]] for item in items])._asdict()
        found |= {name: average(parts[name], persons) for name in (*OF_THE_LOSS, "information")}
    return found | {
        "saved_by_scale": average(nats - scaled, persons),
        "bits": average((find_nats(before) - nats) / LN2, persons),
        "bits_calibrated": average((without - scaled) / LN2, persons),
    }


def _find_gap(
    items: Sequence[Mapping[str, Any]],
    nothing: Mapping[tuple[str, str], float],
    whole: Mapping[tuple[str, str], float],
) -> dict[str, Estimate]:
    """What statistics.compute_gap_recovered tells with an interval, with a standard error as all
    of `loss` has it, where personas are known. nothing, whole: margins behind no text and behind
    the true persona."""
    known = [item for item in items if _key(item) in nothing and _key(item) in whole]
    if not known:
        return {}
    persons = number_persons([item["person"] for item in known])
    ends = ([margins[_key(item)] for item in known] for margins in (nothing, whole))
    signs = np.sign([[item["margin"] for item in known], *ends])
    own, least, most = (signs + 1) / 2  # a tie counts one half
    way = average(most - least, persons)
    if not way.value > 2 * way.stderr:  # no way, as far as these persons tell
        return {"gap_recovered": Estimate(math.nan, math.nan)}
    return {"gap_recovered": divide(own - least, most - least, persons)}


def _list_odds(source: Source, users: Sequence[User]) -> dict[tuple[str, str], PairOdds]:
    if source.find_odds is None:
        return {}
    return {
        (user.user_id, pair.record_id): odds
        for user in users
        for pair, odds in zip(user.pairs, source.find_odds(user), strict=True)
    }


def _key(item: Mapping[str, Any]) -> tuple[str, str]:
    return item["user"], item["pair"]


def _to_json(found: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    """An unknown number is null."""

    def tell(number: float) -> float | None:
        return number if math.isfinite(number) else None

    return {name: {"value": tell(x.value), "stderr": tell(x.stderr)} for name, x in found.items()}
