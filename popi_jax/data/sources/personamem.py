"""PersonaMem: what an assistant should answer to one with this past, of three releases.

v1 (arXiv 2504.14225; v1-128k and v1-1M are its longer contexts): `questions_32k.csv` and
`shared_contexts_32k.jsonl`, a line {id: [{"role", "content"}, ...]} each. A user is a persona with
the messages of a context before `end_index_in_shared_context`. The correct option of a question is
chosen over each other one; letters such as "(a)" are no part of a reply. The system messages, the
persona's facts, are the oracle, never a signal.

v2 (arXiv 2512.06688): `benchmark/text/benchmark.csv` and the chats that it names in
`data/chat_history_32k/`, JSON objects with "chat_history". A user is a persona with all of its
chat. The system message describes the person whole and gives answers away: it is not read.

v3 (arXiv 2608.21381): `backend/<persona>/test.json` and `chatbot.json`. A user is a persona with
its chats before the time of a query; `example_response` is chosen over `inferior_response`, where
a query is asked in a chat and has both. Of the other apps, of the calendar and of `profile.json`,
which the publisher never shows to a model, nothing is read.

Signals are the person's last MOST messages, each with the message that it answers. Splits keep
personas whole. A question whose text or options stand among its signals is left out.

None of these files has been read by us: the names of v1 are those of the publisher's own reader
(inference_standalone_openai.py of the repository) and of several others', those of v2 of others'
readers, those of v3 of the publisher's exporter (scripts/export_hf_release.py) and of the files
backend/105/chatbot.json and benchmark/105/queries.csv in its repository."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from popi_jax.data.json_rows import Row, show, stream_rows
from popi_jax.data.records import Pair, User
from popi_jax.data.row_files import read_object
from popi_jax.data.sources import chats, download
from popi_jax.data.sources.personamem_rows import (
    CHATS_V2,
    SPEAKER,
    Context,
    Question,
    parse_event,
    parse_message,
    parse_v1,
    parse_v2,
    parse_v3,
)
from popi_jax.data.sources.source import Card, Loaded, Source
from popi_jax.data.splits import split_topics
from popi_jax.errors import UserError

MOST = 128  # messages of a person among the signals
FORMS = ("v1", "v1-128k", "v1-1M", "v2", "v3")
SIZES = {"v1": "32k", "v1-128k": "128k", "v1-1M": "1M"}
V2 = "benchmark/text/benchmark.csv"
# hub repository and commit; "" = the present one, as none is known to us
PLACES = {
    "v1": ("bowen-upenn/PersonaMem-v1", "fd7c30f071d5c2ee2a211506783be222d7b6002e"),
    "v2": ("bowen-upenn/PersonaMem-v2", ""),
    "v3": ("bowen-upenn/PersonaMem-v3", ""),
}
TOLD = "question whose text or options are among the signals"
SILENT = "question before which the person said nothing"
BORDER = ("system", "")  # between two chats


def name_files(form: str) -> tuple[str, ...]:
    """The files of a form, as patterns."""
    if form in SIZES:
        return f"questions_{SIZES[form]}.csv", f"shared_contexts_{SIZES[form]}.jsonl"
    if form == "v2":
        return V2, f"{CHATS_V2}/*.json"
    return "backend/*/test.json", "backend/*/chatbot.json"


def find_folder(cfg: Any, may_download: bool) -> Path:
    """Returns `data.path`, into which the files of the form are downloaded when they are not there.

    Raises: FilesMissing when there are none and none can be had."""
    folder, form = Path(cfg.path), cfg.form or FORMS[0]
    names = name_files(form if form in FORMS else FORMS[0])
    if all(any(folder.glob(name)) for name in names):
        return folder
    repository, commit = PLACES[form.split("-")[0] if form in FORMS else "v1"]
    fix = f"Put the files of huggingface.co/datasets/{repository} there."

    def fetch() -> None:
        download.download_hub(folder, repository, cfg.revision or commit, names)

    missing = " and ".join(names)
    return download.fill_folder(folder, may_download, fetch, missing=missing, fix=fix)


def list_files(folder: Path) -> list[Path]:
    """Returns the files that `load` reads in one of its forms."""
    names = dict.fromkeys(name for form in FORMS for name in name_files(form))
    return [path for name in names for path in sorted(folder.glob(name))]


def load(folder: Path, cfg: Any) -> Loaded:
    """Reads the files of `cfg.form`, one context after the other.

    Args: cfg: the `data` part of the configuration.
    Raises: UserError, also while the users are read."""
    loaded = Loaded((), [], Counter[str](), Counter[str]())
    if cfg.form == "v3":
        return dataclasses.replace(loaded, users=_load_v3(folder, cfg, loaded))
    v2 = cfg.form == "v2"
    seen: dict[str, str] = {}
    parse = partial(parse_v2, folder=folder) if v2 else partial(parse_v1, seen=seen)
    path = folder / name_files(cfg.form)[0]
    by_context: dict[str, list[Question]] = defaultdict(list)
    for question in stream_rows(path, parse, cfg.on_bad_row, loaded.bad_rows):
        by_context[question.context].append(question)
    questions = [question for asked in by_context.values() for question in asked]
    personas = {question.persona for question in questions}
    splits = split_topics(personas, cfg.validation_fraction, cfg.test_fraction)
    counts = {"questions": questions, "personas": personas, "contexts": by_context}
    loaded.counts.update({name: len(found) for name, found in counts.items()})
    contexts = (_read_v2 if v2 else _read_v1)(folder, by_context, cfg, loaded)
    users = (
        user
        for context, messages in contexts
        for user in _make_users(messages, by_context[context], splits, cfg, loaded)
    )
    return dataclasses.replace(loaded, users=users)


def _read_v1(
    folder: Path, by_context: Mapping[str, list[Question]], cfg: Any, loaded: Loaded
) -> Iterator[Context]:
    """Yields the contexts that questions ask for. Raises: UserError for one that is missing."""
    path = folder / name_files(cfg.form)[1]
    seen: dict[str, str] = {}

    def parse(row: Row) -> Context | None:
        if len(row.fields) != 1:
            allowed = "one field, the id of a context"
            raise UserError(f"{row.where}: found {len(row.fields)} fields, allowed: {allowed}.")
        (name,) = row.fields
        Row(row.where, {"id": name}).check_unique("id", seen)
        if name not in by_context:
            return None
        messages = [parse_message(item) for item in row.get_objects(name)]
        return name, [(role, SPEAKER.sub("", text, count=1)) for role, text in messages]

    for context in stream_rows(path, parse, cfg.on_bad_row, loaded.bad_rows):
        if context:
            yield context
    for name, questions in by_context.items():
        if name not in seen:
            told = f'field "shared_context_id": found {show(name)}, allowed: an id in {path}'
            _refuse(f"{questions[0].where}: {told}.", cfg, loaded)


def _read_v2(
    folder: Path, by_context: Mapping[str, list[Question]], cfg: Any, loaded: Loaded
) -> Iterator[Context]:
    """Yields the chats that questions name."""
    for link in by_context:
        try:
            history = read_object(folder / link)
            row = Row(str(folder / link), history)
            messages = [parse_message(item) for item in row.get_objects("chat_history")]
        except UserError as e:
            _refuse(str(e), cfg, loaded)
            continue
        yield link, messages


def _refuse(told: str, cfg: Any, loaded: Loaded) -> None:
    if cfg.on_bad_row == "error":
        raise UserError(told)
    loaded.bad_rows.append(told)


def _load_v3(folder: Path, cfg: Any, loaded: Loaded) -> Iterator[User]:
    files = {path.parent.name: path for path in sorted(folder.glob(name_files("v3")[0]))}
    if not files:
        raise UserError(f"{folder}: found no {name_files('v3')[0]} (field data.path).")
    splits = split_topics(files, cfg.validation_fraction, cfg.test_fraction)
    loaded.counts.update({"personas": len(files), "questions": 0})
    for persona, path in files.items():
        parse = partial(parse_v3, persona=persona, left_out=loaded.left_out)
        by_time: dict[int, list[Question]] = defaultdict(list)
        for question in stream_rows(path, parse, cfg.on_bad_row, loaded.bad_rows):
            loaded.counts["questions"] += 1
            if question:
                by_time[question.end].append(question)
        chat = path.parent / "chatbot.json"
        events = list(stream_rows(chat, parse_event, cfg.on_bad_row, loaded.bad_rows))
        events.sort(key=lambda event: event[0])
        for time, asked in sorted(by_time.items()):
            # a chat begins behind each border
            messages = [m for t, said in events if t < time for m in (BORDER, *said)]
            user_id = f"personamem/v3/{persona}#{time}"
            yield from _make_user(user_id, splits[persona], "", messages, asked, cfg, loaded)


def _make_users(
    messages: list[chats.Message],
    questions: list[Question],
    splits: Mapping[str, str],
    cfg: Any,
    loaded: Loaded,
) -> Iterator[User]:
    """Yields a user for each persona and end of a context."""
    by_end: dict[tuple[str, int], list[Question]] = defaultdict(list)
    for question in questions:
        end = question.end if question.end >= 0 else len(messages) + question.end
        by_end[question.persona, min(max(end, 0), len(messages))].append(question)
    facts = next((text for role, text in messages if role == "system"), "")
    oracle = facts.removeprefix("Current user persona:").strip() if cfg.form in SIZES else ""
    for (persona, end), asked in sorted(by_end.items()):
        user_id = f"personamem/{cfg.form}/{persona}#{Path(asked[0].context).stem}.{end}"
        yield from _make_user(user_id, splits[persona], oracle, messages[:end], asked, cfg, loaded)


def _make_user(
    user_id: str,
    split: str,
    oracle: str,
    messages: list[chats.Message],
    asked: list[Question],
    cfg: Any,
    loaded: Loaded,
) -> Iterator[User]:
    """Yields the user, unless no question is left."""
    comments = chats.make_comments(messages)[-MOST:]
    kept: list[Question] = []
    for question in asked:
        texts = (question.prompt[-1]["content"], question.chosen, *question.rejected)
        if not comments or chats.hold(comments, texts):
            loaded.left_out[TOLD if comments else SILENT] += 1
        else:
            kept.append(question)
    most = max((len(question.rejected) for question in kept), default=0)
    pairs = [  # first one of each question
        Pair(f"{q.question_id}/{n + 1}", q.prompt, q.chosen, q.rejected[n], q.groups)
        for n in range(most)
        for q in kept
        if n < len(q.rejected)
    ]
    if pairs:
        yield User(
            user_id=user_id,
            profile="",
            survey="",
            shots=(),
            comments=comments,
            pairs=tuple(pairs[: cfg.num_pairs]),
            oracle="" if chats.say(comments, oracle) else oracle,
            split=split,
        )


SOURCE = Source(
    name="personamem",
    kind="published",
    card=Card(
        title="PersonaMem (arXiv 2504.14225, 2512.06688, 2608.21381)",
        citation="Jiang et al., Know Me, Respond to Me, 2025, and its two successors",
        page="huggingface.co/datasets/bowen-upenn/PersonaMem-v1 (-v2, -v3)",
        licence="v1 MIT, v2 CC-BY-4.0, v3 CC-BY-NC-4.0, so weights trained on v3 are for "
        "non-commercial use.",
        forbids="commercial use (v3)",
        counts={"questions": 589, "personas": 20, "contexts": 37},  # of v1
        not_published="splits and pairs: they are ours, made of a benchmark of questions; no file "
        "of the three releases was at hand when this was written.",
    ),
    options=(*("on_bad_row", "form", "validation_fraction", "test_fraction", "num_pairs"),),
    files=list_files,
    load=load,
    find=find_folder,
    forms=FORMS,
)
