"""What can be said of summaries without a model: length, ends, copies, personal data, readability.

Words are runs of letters, digits and apostrophes, compared without case. What counts:

- **Copied**: the share of the word 5-grams of a summary that also occur in the signals of the same
  user, in one run of words; of a summary of fewer than 5 words, the share of its words that do.
- **Contact data**: e-mail addresses (`name@domain.tld`), web addresses (`http://`, `https://` or
  `www.`) and phone numbers. Numbers are found and checked by the library phonenumbers (Google's
  libphonenumber, offline): with a country code anywhere, without one as a number of REGION. Not
  found: postal addresses, account names, addresses that are spelt out ("ann at home dot org").
- **Names**: words of the summary that the signals show to be proper nouns: written with a capital
  in the summary, and in the signals with a capital somewhere inside a sentence and never without.
  So places, languages, days and brands that the user wrote count too. Not found: names that only
  start sentences of the signals or are nowhere in them, names all in capitals or in lower case, or
  in scripts without case, and names that the signals also hold as common words ("Rose", "rose").
  "I" and its forms never count.
- **Readability**: Flesch reading ease, 206.835 - 1.015 * words / sentences - 84.6 * syllables /
  words (Flesch 1948): English prose has 60 to 70, hard text less. Sentences end with . ! ? ; or a
  line; syllables are those of pyphen's hyphenation of US English, an estimate that is somewhat
  low."""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

NGRAM = 5  # words
REGION = "US"  # of phone numbers without a country code
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_SENTENCE = re.compile(r"[.!?;\n]+")
_MAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_WEB = re.compile(r"(?:https?://|www\.)[^\s<>\"]+", re.IGNORECASE)
_FIRST_PERSON = re.compile(r"i(?:['’]\w+)?", re.IGNORECASE)


class Found(NamedTuple):
    """Personal data in a summary."""

    mails: list[str]
    addresses: list[str]  # of the web
    phones: list[str]
    names: list[str]


class Quality(NamedTuple):
    """Of the summaries of a file; NaN where there is nothing to measure."""

    users: int
    empty: int
    tokens_mean: float
    tokens_p90: float
    finished: float  # share that ended before the limit of tokens
    distinct: float  # distinct texts / users
    copied: float  # mean share of copied 5-grams, of summaries with a word
    with_names: float  # share of the summaries that hold a name ...
    with_contacts: float  # ... contact data
    flesch: float  # mean reading ease, of summaries with a word


def compute_quality(items: Sequence[dict[str, Any]]) -> Quality:
    """items: {"summary", "signals", "tokens", "finished"} of each user. Raises: ValueError when
    there is none."""
    if not items:
        raise ValueError("no summary to measure")
    texts = [" ".join(item["summary"].split()) for item in items]
    tokens = np.array([item["tokens"] for item in items], np.float64)
    said = [item for item in items if _WORD.search(item["summary"])]
    found = [find_personal_data(item["summary"], item["signals"]) for item in items]
    copied = [measure_copied(item["summary"], item["signals"]) for item in said]
    return Quality(
        users=len(items),
        empty=sum(not text for text in texts),
        tokens_mean=float(tokens.mean()),
        tokens_p90=float(np.quantile(tokens, 0.9)),
        finished=float(np.mean([bool(item["finished"]) for item in items])),
        distinct=len(set(texts)) / len(items),
        copied=_average(copied),
        with_names=_average([bool(each.names) for each in found]),
        with_contacts=_average([bool(e.mails or e.addresses or e.phones) for e in found]),
        flesch=_average([compute_reading_ease(item["summary"]) for item in said]),
    )


def measure_copied(summary: str, signals: str) -> float:
    """The share of the word 5-grams of a summary that occur in the signals; NaN without a word."""
    words, source = _list_words(summary), _list_words(signals)
    size = NGRAM if len(words) >= NGRAM else 1
    known = {tuple(source[i : i + size]) for i in range(len(source) - size + 1)}
    grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return _average([gram in known for gram in grams])


def find_personal_data(summary: str, signals: str) -> Found:
    import phonenumbers

    mails = [match.group() for match in _MAIL.finditer(summary)]
    addresses = [match.group().rstrip(".,;:!?)") for match in _WEB.finditer(summary)]
    matches = phonenumbers.PhoneNumberMatcher(summary, REGION)
    names = _list_proper_nouns(signals)
    capitals = (word for word in _WORD.findall(summary) if word[0].isupper())
    found = list(dict.fromkeys(word for word in capitals if _strip(word) in names))
    return Found(mails, addresses, [match.raw_string for match in matches], found)


def compute_reading_ease(text: str) -> float:
    """Flesch reading ease; NaN without a word."""
    sentences = sum(bool(_WORD.search(part)) for part in _SENTENCE.split(text))
    words = _WORD.findall(text)
    if not words:
        return float("nan")
    syllables = sum(_count_syllables(word.casefold()) for word in words)
    return 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)


def _list_words(text: str) -> list[str]:
    return [word.casefold().replace("’", "'") for word in _WORD.findall(text)]


def _list_proper_nouns(text: str) -> set[str]:
    """Words, without case, with a capital somewhere inside a sentence and nowhere without one."""
    inside, lower = set[str](), set[str]()
    for sentence in _SENTENCE.split(text):
        for number, word in enumerate(_WORD.findall(sentence)):
            if not word[0].isupper():
                lower.add(_strip(word))
            elif number > 0 and not word.isupper() and not _FIRST_PERSON.fullmatch(word):
                inside.add(_strip(word))
    return inside - lower


def _strip(word: str) -> str:
    """Without case and the 's of a possessive."""
    return re.sub(r"['’]s$", "", word.casefold())


def _count_syllables(word: str) -> int:
    return len(_open_dictionary().positions(word)) + 1


@functools.cache
def _open_dictionary() -> Any:
    import pyphen

    return pyphen.Pyphen(lang="en_US")


def _average(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
