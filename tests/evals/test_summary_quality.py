"""What is measured of summaries, on texts whose answers one can count."""

import math
from typing import Any

import pytest

from popi_jax.evals import summary_quality
from popi_jax.evals.summary_quality import (
    compute_quality,
    compute_reading_ease,
    find_personal_data,
    measure_copied,
)

SIGNALS = (
    "I moved from Lyon to Berlin. My sister Rose grows a rose. Whatever I ask, be BRIEF please; "
    "Tom told me so. I use Python."
)


def make_item(summary: str, **changes: Any) -> dict[str, Any]:
    item = {"user": "u", "summary": summary, "tokens": len(summary.split()), "finished": True}
    return {**item, "signals": SIGNALS, **changes}


def test_copied_five_grams():
    source = "one two three four five six seven"
    assert measure_copied("One, two three: four FIVE six", source) == 1.0
    assert measure_copied("one two three four five zero", source) == 0.5  # of two 5-grams
    assert measure_copied("seven six five four three two", source) == 0.0
    assert measure_copied("six one zero two", source) == 0.75  # too short: words
    assert measure_copied("don’t", "I don't") == 1.0
    assert math.isnan(measure_copied(" ... ", source))
    assert measure_copied("one two three four five", "one two") == 0.0


def test_names_are_proper_nouns_of_the_signals():
    found = find_personal_data(
        "Lives in Berlin's north, from Lyon, knows Python. I'm told", SIGNALS
    )
    assert found.names == ["Berlin's", "Lyon", "Python"]
    # Rose is a common word there too, Tom only starts a sentence, BRIEF is no name, Paris unknown
    assert find_personal_data("Rose Tom BRIEF Brief Paris berlin I Whatever", SIGNALS).names == []
    assert find_personal_data("", "").names == []


@pytest.mark.parametrize(
    ("summary", "field", "expected"),
    [
        ("write to ann.lee+x@mail.example.org.", "mails", ["ann.lee+x@mail.example.org"]),
        ("ann at home dot org, a@b", "mails", []),
        (
            "see https://x.org/a?b=1, or www.y.net!",
            "addresses",
            ["https://x.org/a?b=1", "www.y.net"],
        ),
        (
            "call (650) 253-0000 or +44 20 7031 3000",
            "phones",
            ["(650) 253-0000", "+44 20 7031 3000"],
        ),
        ("aged 34, since 2019, 100 000 times, 12-13-2023", "phones", []),
    ],
)
def test_contact_data(summary: str, field: str, expected: list[str]) -> None:
    found = find_personal_data(summary, "")
    assert getattr(found, field) == expected
    assert not any(v for n, v in found._asdict().items() if n != field)


def test_reading_ease_by_hand():
    # 6 words, 1 sentence, 6 syllables
    assert compute_reading_ease("The cat sat on the mat.") == pytest.approx(
        206.835 - 1.015 * 6 - 84.6
    )
    # 4 words, 2 sentences (items of a list), hy-phen-ation counts 3 and the others 1
    assert compute_reading_ease("short hyphenation ; warm tone") == pytest.approx(
        206.835 - 1.015 * 2 - 84.6 * 6 / 4
    )
    hard = "Institutional considerations necessitate comprehensive documentation."
    assert compute_reading_ease(hard) < 0 < compute_reading_ease("We like dogs. They run.")
    assert math.isnan(compute_reading_ease("..."))


def test_of_a_file():
    items = [
        make_item("likes Berlin and short answers", tokens=5),
        make_item("likes  Berlin and\nshort answers", tokens=7),
        make_item("call +44 20 7031 3000", tokens=12, finished=False),
        make_item("", tokens=0),
    ]
    found = compute_quality(items)
    assert (found.users, found.empty, found.tokens_mean) == (4, 1, 6.0)
    assert found.tokens_p90 == pytest.approx(7 + 0.7 * (12 - 7))
    assert (found.finished, found.distinct) == (0.75, 0.75)
    assert (found.with_names, found.with_contacts) == (0.5, 0.25)
    assert found.copied == 0.0 and math.isfinite(found.flesch)
    only = compute_quality([make_item("")])
    assert math.isnan(only.copied) and math.isnan(only.flesch) and only.distinct == 1.0
    with pytest.raises(ValueError, match="no summary"):
        compute_quality([])


def test_a_copy_of_the_signals_is_found():
    assert compute_quality([make_item(SIGNALS)]).copied == 1.0
    assert summary_quality.NGRAM == 5
