"""Writes a large parquet file in the format of AlignX, for timing how fast data are prepared.

All words are made of random syllables, so it says nothing about people or language. A row has
about 5 kB of text: 70 % of the rows have 4 comments, 70 % have 4 past pairs, the others fewer or
none; 8 % have no demographic text; 15 % of the texts have letters or marks beyond ASCII. Every text
begins with a word of its own, so that no target occurs among the signals. The same seed makes the
same rows, however many are asked for."""

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.options import parse_positive

if TYPE_CHECKING:
    import numpy as np

CHUNK = 4000  # rows that are made, and written as a row group, at once
AXES = 90
ACTIVE = 12  # axes that a person cares about, of which an item shows about a third
SENTENCES = 20_000  # of which all texts are put together
BEYOND_ASCII = ("’", "é", "—", "ü", "😀", "日")


def make_vocabulary(rng: "np.random.Generator") -> "np.ndarray[Any, Any]":
    """The sentences, as an array of texts of about 60 characters."""
    import numpy as np

    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprstvz", "aeiou")]
    words = np.array(["".join(rng.choice(syllables, n)) for n in rng.integers(1, 4, 6000)])
    lengths = rng.integers(6, 16, SENTENCES)
    return np.array([" ".join(rng.choice(words, n)) + "." for n in lengths], dtype=object)


class Maker:
    """Makes texts and directions of one chunk of rows."""

    def __init__(self, rng: "np.random.Generator", sentences: "np.ndarray[Any, Any]") -> None:
        self.rng, self.sentences = rng, sentences

    def make_texts(self, count: int, low: int, high: int) -> list[str]:
        """Texts of low to high sentences each; the first word is a number in letters that no other
        text has."""
        numbers = self.rng.integers(low, high + 1, count)
        drawn = iter(self.rng.choice(self.sentences, int(numbers.sum())).tolist())
        starts = self.rng.integers(0, 2**62, count).tolist()
        marks = self.rng.integers(0, 7 * len(BEYOND_ASCII), count).tolist()
        return [
            f"{start:x}{BEYOND_ASCII[mark] if mark < len(BEYOND_ASCII) else ''} "
            + " ".join(itertools.islice(drawn, number))
            for start, number, mark in zip(starts, numbers.tolist(), marks, strict=True)
        ]

    def make_counts(self, rows: int) -> "np.ndarray[Any, Any]":
        """Of comments or pairs: 4 in 70 % of the rows, else 0 to 3."""
        import numpy as np

        return np.where(self.rng.random(rows) < 0.7, 4, self.rng.integers(0, 4, rows))

    def make_personas(self, rows: int) -> "np.ndarray[Any, Any]":
        """The full directions of each person, ACTIVE axes of which are not neutral."""
        import numpy as np

        order = self.rng.random((rows, AXES)).argpartition(ACTIVE, axis=1)[:, :ACTIVE]
        found = np.full((rows, AXES), 0.5)
        np.put_along_axis(found, order, self.rng.integers(0, 2, (rows, ACTIVE)) * 1.0, axis=1)
        return found

    def show_part(self, personas: "np.ndarray[Any, Any]") -> Any:
        """A column of directions, each a part of the persona, at least one axis."""
        import numpy as np
        import pyarrow as pa

        kept = (self.rng.random(personas.shape) < 0.3) & (personas != 0.5)
        first = (personas != 0.5).argmax(axis=1)
        kept[np.arange(len(personas)), first] |= ~kept.any(axis=1)
        values = np.where(kept, personas, 0.5).ravel()
        offsets = np.arange(0, values.size + 1, AXES, dtype=np.int32)
        return pa.ListArray.from_arrays(offsets, values)


def make_rows(rows: int, seed: int, chunk: int, sentences: "np.ndarray[Any, Any]") -> Any:
    """One chunk as a pyarrow table in the published layout."""
    import numpy as np
    import pyarrow as pa

    maker = Maker(np.random.default_rng([seed, chunk]), sentences)
    personas = maker.make_personas(rows)
    demographics = maker.make_texts(rows, 5, 12)
    for row in np.flatnonzero(maker.rng.random(rows) < 0.08).tolist():
        demographics[row] = ""

    def make_items(names: tuple[str, ...]) -> Any:
        counts = maker.make_counts(rows)
        owners = np.repeat(np.arange(rows), counts)
        fields = {name: pa.array(maker.make_texts(len(owners), 2, 6)) for name in names}
        fields["Preference Direction"] = maker.show_part(personas[owners])
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        items = pa.StructArray.from_arrays([*fields.values()], [*fields])
        return pa.ListArray.from_arrays(offsets, items)

    return pa.table(
        {
            "prompt": maker.make_texts(rows, 6, 14),
            "chosen": maker.make_texts(rows, 2, 9),
            "rejected": maker.make_texts(rows, 2, 9),
            "Preference Direction": maker.show_part(personas),
            "Demographic Information": demographics,
            "User-Generated Content": make_items(("prompt", "comment")),
            "Pair-wise Comparative Feedback": make_items(("prompt", "chosen", "rejected")),
        }
    )


def write(path: Path, rows: int, seed: int) -> None:
    """Streams the rows into a file; memory does not grow with them."""
    import numpy as np
    from pyarrow import parquet

    sentences = make_vocabulary(np.random.default_rng(seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = None
    for chunk, start in enumerate(range(0, rows, CHUNK)):
        table = make_rows(CHUNK, seed, chunk, sentences).slice(0, min(CHUNK, rows - start))
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--rows", type=parse_positive, default=200_000, metavar="N", help="how many (200000)"
    )
    made.add_argument("--out", type=Path, required=True, metavar="FILE", help="FILE.parquet")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws (0)")
    args = made.parse_args(argv)
    write(args.out, args.rows, args.seed)
    print(f"{args.rows} rows, {args.out.stat().st_size / 1e6:.0f} MB: {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
