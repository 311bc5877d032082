"""A user's token ids as bytes, and their lengths as a row of numbers."""

import json
from typing import Any

import numpy as np

from popi_jax.data.encode import EncodedUser, Ids, Truncations

LENGTHS = np.dtype(
    [
        (name, np.int32)
        for name in (
            *("context", "told", "turn", "answer"),  # tokens; of the longest turn and answer
            *("pairs", "turns", "answers"),  # that count, and the tokens of all of them
            *(f"cut_{name}" for name in Truncations._fields),
        )
    ]
)
_HEADER = 4  # numbers before the lengths: bytes of an id, pairs, readings, bytes of the JSON
_SINGLE = ("context", "oracle", "told", "profile")
_OF_PAIRS = ("turns", "chosen", "rejected")
_REST = tuple(n for n in EncodedUser._fields if n not in (*_SINGLE, *_OF_PAIRS, "readings"))


def pack(user: EncodedUser) -> bytes:
    """A user as bytes: numbers, ids of two bytes each where that is enough, and JSON."""
    texts = [getattr(user, name) for name in _SINGLE]
    for name in _OF_PAIRS:
        texts += getattr(user, name)
    texts += [ids for reading in user.readings for ids in reading]
    ids = np.array([i for text in texts for i in text], np.int32)
    kind = np.uint16 if ids.max(initial=0) < 1 << 16 else np.int32
    rest = [value for name, value in zip(user._fields, user, strict=True) if name in _REST]
    told = json.dumps(rest, ensure_ascii=False).encode()
    numbers = [np.dtype(kind).itemsize, len(user.turns), len(user.readings), len(told)]
    lengths = np.array([*numbers, *map(len, texts)], np.int32)
    return lengths.tobytes() + told + ids.astype(kind).tobytes()


def unpack(record: bytes) -> EncodedUser:
    """Inverse of `pack`."""
    size, pairs, readings, told = np.frombuffer(record, np.int32, _HEADER).tolist()
    count = len(_SINGLE) + len(_OF_PAIRS) * pairs + 2 * readings
    lengths = np.frombuffer(record, np.int32, count, 4 * _HEADER).tolist()
    start = 4 * (_HEADER + count)
    rest = dict(zip(_REST, json.loads(record[start : start + told]), strict=True))
    kind = np.uint16 if size == 2 else np.int32
    ids = np.frombuffer(record[start + told :], kind).tolist()
    texts, end = list[Ids](), 0
    for length in lengths:
        texts.append(ids[end : end + length])
        end += length
    found: dict[str, Any] = dict(zip(_SINGLE, texts, strict=False))
    for number, name in enumerate(_OF_PAIRS):
        begin = len(_SINGLE) + number * pairs
        found[name] = texts[begin : begin + pairs]
    asked = texts[len(_SINGLE) + len(_OF_PAIRS) * pairs :]
    found["readings"] = list(zip(asked[::2], asked[1::2], strict=True))
    found |= rest
    found["contrasts"] = [(first, second) for first, second in rest["contrasts"]]
    found["usable"] = tuple(rest["usable"])
    found["truncations"] = Truncations(*rest["truncations"])
    return EncodedUser(**found)


def measure_user(user: EncodedUser) -> tuple[int, ...]:
    """A row of LENGTHS."""
    turns = [*user.turns, *(turn for turn, _ in user.readings)]
    answers = [*user.chosen, *user.rejected, *(answer for _, answer in user.readings)]
    return (
        len(user.context),
        len(user.told),
        max(map(len, turns), default=0),
        max(map(len, answers), default=0),
        len(user.usable),
        sum(len(user.turns[k]) for k in user.usable),
        sum(len(user.chosen[k]) + len(user.rejected[k]) for k in user.usable),
        *user.truncations,
    )
