"""AlignX (arXiv 2503.15463): posts, and which of two comments a person preferred; the person is
told by a demographic text, comments and past pairs, all of them synthetic.

A user is a row: the format has no user id. `data.form` is what a user shows: "demo", "ugc"
(comments), "pair", "arbitrary" (0 to 4 comments and 0 to 4 pairs, the demographic text in half of
the cases that have any of these), or "mixed": each row one of these four, as official code f88878c6
prepares its training rows. Draws depend on the row alone, never on its place; but "mixed" gives a
row that could have any form the one that fewest rows before it have, so there the order of rows
matters, as it does in that code. A draw that shows nothing shows all that the row has.

data.profile_text "directions" writes the profile from the preference directions of what is shown,
those of the target for the demographic text, as that code does (its form "pba"; there the profile
is the only signal: data.signals=profile)."""

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from popi_jax.data.json_rows import stream_rows
from popi_jax.data.records import Pair, User
from popi_jax.data.sources import alignx_axes, download
from popi_jax.data.sources import alignx_rows as rows
from popi_jax.data.sources.alignx_rows import Layout, Record
from popi_jax.data.sources.source import Card, Loaded, Source
from popi_jax.errors import UserError

REPOSITORY, TESTS = "JinaLeejnl/AlignX", "JinaLeejnl/AlignX-test"
PATTERNS, TEST_PATTERNS = ("*.parquet",), ("Reddit_*",)
MOST = 4  # comments, and past pairs, that a user shows
# of data.form and its test file; the order decides between forms that as many rows have
FORMS = {"ugc": "UGC", "pair": "PAIR", "demo": "DEMO", "arbitrary": "arbitrary"}
PREFIX = "Reddit_"  # of the published test files
SIGNALS = (rows.DEMOGRAPHICS, rows.COMMENTS, rows.PAIRS)


class Shown(NamedTuple):
    """Which of the signals of a row its user shows."""

    form: str  # of FORMS
    demographics: bool
    comments: list[int]
    shots: list[int]


def list_files(folder: Path) -> list[Path]:
    return rows.list_files(folder)


def find_folder(cfg: Any, may_download: bool) -> Path:
    """Returns `data.path`, into which the files are downloaded when there are none: those of
    AlignX-test only for data.split_by=published.

    Raises: FilesMissing when there are none and none can be had."""
    path = Path(cfg.path)
    if path.is_file() or (path.is_dir() and rows.list_data(path)):
        return path
    pages = f"huggingface.co/datasets/{REPOSITORY} (and {TESTS})"
    fix = f"Put the files of {pages} there, or set data.path to their folder."

    def fetch() -> None:
        download.download_hub(path / "train", REPOSITORY, cfg.revision, PATTERNS)
        if cfg.split_by == "published":
            download.download_hub(path / "test", TESTS, "", TEST_PATTERNS)

    return download.fill_folder(path, may_download, fetch, missing="data files", fix=fix)


def load(folder: Path, cfg: Any) -> Loaded:
    """Streams the rows of all files; memory does not grow with them.

    split_by "target": by the post, so that equal targets share a split; test files are not read
    beside others. "published": the test files are the test split (with form "demo" only
    Reddit_DEMO, and so on; "mixed" and "arbitrary" are tested on all four), a row of the others
    that has the target of one is left out, and validation users are chosen by their post.
    Raises: UserError."""
    training, tests = _tell_apart(rows.list_files(folder))
    bad_rows: list[str] = []
    left_out: dict[str, int] = {}
    counts: dict[str, int] = {}
    if cfg.split_by == "published":
        tests = _choose_tests(folder, tests, cfg.form)
    else:
        training, tests = training or [*tests.values()], {}
    users = _stream(training, tests, cfg, Loaded((), bad_rows, left_out, counts))
    total = rows.count_parquet([*training, *tests.values()])
    return Loaded(users, bad_rows, left_out, counts, total=total)


def _tell_apart(files: list[Path]) -> tuple[list[Path], dict[str, Path]]:
    """Returns the training files, and DEMO, PAIR, UGC, arbitrary -> its test file."""
    names = {PREFIX + test: test for test in FORMS.values()}
    tests = {names[name]: path for path in files if (name := rows.name_file(path)) in names}
    return [path for path in files if path not in tests.values()], tests


def _choose_tests(folder: Path, tests: dict[str, Path], form: str) -> dict[str, Path]:
    """The test files of a form. Raises: UserError when one is missing."""
    wanted = [FORMS[form]] if form in ("demo", "ugc", "pair") else sorted(FORMS.values())
    missing = ", ".join(PREFIX + test for test in wanted if test not in tests)
    if missing:
        told = f'field "data.split_by": found "published", but {folder} has no {missing}'
        raise UserError(f"{told}. Add the files of {TESTS}, or set data.split_by=target.")
    return {test: tests[test] for test in wanted}


def _stream(
    training: list[Path], tests: dict[str, Path], cfg: Any, found: Loaded
) -> Iterator[User]:
    """Yields users, and fills the lists of `found` meanwhile."""
    held_out: set[int] = set()  # a number for each target of the test files
    known = cfg.profile_text == "directions"
    required = frozenset({rows.PROMPT, rows.CHOSEN, rows.REJECTED})
    layout = Layout(required | ({rows.DIRECTIONS} if known else set()), item_directions=known)
    for test, path in tests.items():
        for record in _read(path, layout, cfg, found, "test rows"):
            held_out.add(rows.number_target(record))
            shown = Shown(
                form=test,
                demographics=bool(record.demographics),
                comments=[*range(len(record.comments))],
                shots=[*range(len(record.shots))],
            )
            # one person is in all four files: "#" parts a person from a view of it
            user_id = f"alignx/test/{record.number}#{test}"
            yield from _make_user(record, shown, cfg, (user_id, "test"), found)
    layout = layout._replace(required=required | {rows.DIRECTIONS, *SIGNALS})
    test_fraction = 0.0 if cfg.split_by == "published" else cfg.test_fraction
    form_of = _make_chooser(cfg.form)
    before = 0  # rows of the files before
    for path in training:
        number = 0
        for record in _read(path, layout, cfg, found, "rows"):
            number = record.number
            if held_out and rows.number_target(record) in held_out:
                rows.count(found.left_out, "the target is one of the published test files")
                continue
            shown = _draw(record, form_of(record), strict=cfg.form != "mixed")
            split = rows.split_by_prompt(record, cfg.validation_fraction, test_fraction)
            who = (f"alignx/{before + number}", split)
            yield from _make_user(record, shown, cfg, who, found)
        before += number


def _read(path: Path, layout: Layout, cfg: Any, found: Loaded, name: str) -> Iterator[Record]:
    """Yields the rows of a file but those that give their answer away. Counts them as `name`."""
    parse = rows.make_parser(layout)
    for record in stream_rows(path, parse, cfg.on_bad_row, found.bad_rows):
        rows.count(found.counts, name)
        if reason := rows.find_answer(record):
            rows.count(found.left_out, reason)
        else:
            yield record


def _make_chooser(form: str) -> Callable[[Record], str]:
    """Record -> the form, of FORMS, that its user shows."""
    counts = dict.fromkeys(FORMS, 0)

    def choose(record: Record) -> str:
        """What a row lacks decides, else which form fewest have."""
        comments, shots = len(record.comments) >= MOST, len(record.shots) >= MOST
        if comments and shots:
            chosen = min(counts, key=counts.__getitem__)
        else:
            chosen = "ugc" if comments else "pair" if shots else "demo"
        counts[chosen] += 1
        return chosen

    return choose if form == "mixed" else lambda record: form


def _draw(record: Record, form: str, *, strict: bool) -> Shown:
    """strict: a row without the signals of a form shows nothing, rather than all that it has."""
    comments, shots = [*range(len(record.comments))], [*range(len(record.shots))]
    told = bool(record.demographics)
    everything = Shown(FORMS[form], told, comments[:MOST], shots[:MOST])
    if form == "arbitrary":
        text = "\n".join((record.prompt, record.chosen, record.rejected, record.demographics))
        draw = random.Random(hashlib.sha256(text.encode()).digest())
        some = [
            draw.sample(items, min(draw.randint(0, MOST), len(items)))
            for items in (comments, shots)
        ]
        told = told and (not any(some) or draw.random() < 0.5)
        shown = Shown(FORMS[form], told, *some)
    else:
        shown = everything._replace(
            demographics=told and form == "demo",
            comments=everything.comments if form == "ugc" else [],
            shots=everything.shots if form == "pair" else [],
        )
    nothing = not (shown.demographics or shown.comments or shown.shots)
    return everything if nothing and (form == "arbitrary" or not strict) else shown


def _make_user(
    record: Record, shown: Shown, cfg: Any, who: tuple[str, str], found: Loaded
) -> Iterator[User]:
    """Yields the user of a row, unless nothing is shown of it. who: id and split."""
    user_id, split = who
    comments = tuple([record.comments[i] for i in shown.comments])
    shots = tuple([record.shots[i] for i in shown.shots[: cfg.num_shots]])
    profile = record.demographics if shown.demographics else ""
    if cfg.profile_text == "directions":
        directions = [record.comment_directions[i] for i in shown.comments]
        directions += [record.shot_directions[i] for i in shown.shots[: cfg.num_shots]]
        directions += [record.directions] if shown.demographics else []
        mean = alignx_axes.mean_directions(directions) if directions else ""
        profile = alignx_axes.write_phrases(mean)
    if not (profile or comments or shots):
        rows.count(found.left_out, "the row has no signals of this form")
        return
    rows.count(found.counts, shown.form)
    phrases = alignx_axes.write_phrases(record.directions)
    pair = Pair(
        record_id=user_id,
        prompt=[{"role": "user", "content": record.prompt}],
        chosen=record.chosen,
        rejected=record.rejected,
        groups=alignx_axes.group_axes(record.directions),
        meta=f'{{"directions": "{record.directions}"}}' if record.directions else "",
    )
    yield User(
        user_id=user_id,
        profile=profile,
        survey="",
        shots=shots,
        comments=comments,
        pairs=(pair,),
        oracle=f"This person: {phrases}." if phrases else "",
        split=split,
        groups={"form": shown.form},
    )


SOURCE = Source(
    name="alignx",
    kind="published",
    card=Card(
        title="AlignX (arXiv 2503.15463)",
        citation="Li et al., From 1,000,000 Users to Every User: Scaling Up Personalized "
        "Preference for User-level Alignment, 2025",
        page=f"huggingface.co/datasets/{REPOSITORY}",
        licence="none stated: the code repository has no licence file and the dataset card was not "
        "seen; the posts come from Reddit: check both before you share the data, or weights that "
        "were trained on them.",
        counts={
            "rows": 1_311_622,
            "rows from Reddit": 1_225_988,
            "rows from PKU-SafeRLHF (safety)": 10_714,
            "rows from UltraFeedback (helpfulness)": 11_629,
            "rows from UltraFeedback (honesty)": 16_809,
            "rows from UltraFeedback (instruction following)": 36_169,
            "rows from UltraFeedback (truthfulness)": 7_219,
            "rows from HelpSteer2 (helpfulness)": 2_255,
            "rows from HelpSteer2 (correctness)": 144,
            "rows from HelpSteer2 (coherence)": 26,
            "rows from HelpSteer2 (complexity)": 33,
            "rows from HelpSteer2 (verbosity)": 636,
        },
        not_published="user ids; which 92,000 rows the official code of POPI drew; the numbers of "
        "test rows. The field `profile` of the published test files is not read: it always counts "
        "the direction of the demographic text, even where that text is not shown, so it tells of "
        "the target what the signals do not (noted in official code f88878c6); ours counts it only "
        "where it is shown",
    ),
    options=(
        *("form", "on_bad_row", "split_by", "validation_fraction", "test_fraction"),
        *("num_shots", "profile_text"),
    ),
    files=list_files,
    load=load,
    find=find_folder,
    forms=("mixed", "demo", "ugc", "pair", "arbitrary"),
    splits=("target", "published"),
)
