"""PRISM (arXiv 2404.16019): survey, conversations and utterances as published on the Hugging Face
hub -> users.

Scores are personal, so that pairs come from score differences inside one turn only. `if_chosen`
reconstructs the history and never labels a pair: it is random on a tie. Order in time is
`generated_datetime`, then the id."""

import dataclasses
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from popi_jax.data.leaks import KINDS, LeakFinder, leave_out
from popi_jax.data.records import Comment, Messages, Pair, Shot, User
from popi_jax.data.sources import download
from popi_jax.data.sources.prism_rows import (
    FILES,
    LATENTS,
    Conversation,
    Latent,
    Person,
    Utterance,
    read_tables,
)
from popi_jax.data.sources.source import Card, Loaded, Source
from popi_jax.data.splits import choose_split
from popi_jax.errors import UserError

REPOSITORY = "HannahRoseKirk/prism-alignment"
PAGE = f"huggingface.co/datasets/{REPOSITORY}"
REVISION = "18ab5cfb37456f4ec8cbc00212ce54cf7b1239f6"
# Those that the hub shows for the commit that last changed the files (Git LFS files); survey.jsonl
# is none. No download has been run yet.
SHA256 = {
    "conversations.jsonl": "55ec67a194ca59d567b57acaeab813cb30abe801e73f9e495597a77ab674d638",
    "utterances.jsonl": "7829679350031d6678fa42b8106b2d05051bf9feea348a294400347af4a6deb4",
}
# Equal pairs stay in the first of these splits that has one, so that none is in two.
_KEEPING = ("train", "test", "validation")


class ScoredPair(NamedTuple):
    pair: Pair
    turn: int
    margin: int  # points of 100


Talks = list[tuple[Conversation, list[ScoredPair]]]  # of one person, oldest first


def find_folder(cfg: Any, may_download: bool) -> Path:
    """Returns `data.path`, into which the files are downloaded when there are none.

    Raises: FilesMissing when there are none and none can be had; UserError when some are missing.
    """
    folder = Path(cfg.path)
    if not folder.is_dir() and os.path.lexists(folder):
        told = "a file" if folder.exists() else "a link to nothing"
        raise UserError(f"{folder}: found {told} (field data.path), allowed: a folder.")
    missing = [name for name in FILES if not (folder / name).exists()]
    if not missing:
        return folder
    present = ", ".join(name for name in FILES if name not in missing)
    if present:
        told = f"{folder}: no {', '.join(missing)} beside {present} (field data.path)"
        raise UserError(f"{told}. Add it, or remove the others.")
    fix = f"Put {', '.join(FILES)} from {PAGE} there, or set data.path to their folder."

    def fetch() -> None:
        known = {} if cfg.revision else SHA256
        download.download_hub(folder, REPOSITORY, cfg.revision or REVISION, FILES, known)

    return download.fill_folder(folder, may_download, fetch, missing="PRISM files", fix=fix)


def list_files(folder: Path) -> list[Path]:
    """Returns the files that `load` reads."""
    latents = folder / LATENTS
    return [folder / name for name in FILES] + ([latents] if latents.exists() else [])


def load(folder: Path, cfg: Any) -> Loaded:
    """Reads the three files, and latents.jsonl where it exists. Left out are people with fewer than
    2 conversations that hold a pair, pairs that the signals give away and, of pairs that are equal
    in two splits, those outside of training.

    Args: cfg: the `data` part of the configuration.
    Raises: UserError."""
    tables = read_tables(folder, cfg.on_bad_row)
    turns: dict[str, dict[int, list[Utterance]]] = defaultdict(lambda: defaultdict(list))
    for utterance in tables.utterances.values():
        turns[utterance.conversation_id][utterance.turn].append(utterance)
    talks: dict[str, Talks] = defaultdict(list)
    for conversation in sorted(tables.conversations.values(), key=_order_in_time):
        pairs = list_pairs(turns[conversation.conversation_id], cfg)
        if pairs:
            talks[conversation.user_id].append((conversation, pairs))
    users: list[User] = []
    for user_id, person in tables.people.items():
        if len(talks[user_id]) > 1:
            users += _make_users(person, talks[user_id], tables.latents.get(user_id), cfg)
    made = bool(tables.latents)  # then replies come from a small pool, and equal ones tell nothing
    left_out: dict[str, int] = {}
    if not made:
        users, left_out = _remove_leaks(users, shared_people=cfg.split_by == "conversation")
    users = [dataclasses.replace(user, pairs=user.pairs[: cfg.num_pairs]) for user in users]
    few = sum(len(talks[user_id]) < 2 for user_id in tables.people)
    left_out |= {"person with fewer than 2 conversations that hold a pair": few} if few else {}
    counts = {
        "people": len(tables.people),
        "conversations": len(tables.conversations),
        "utterances": len(tables.utterances),
    }
    return Loaded(users, tables.bad_rows, left_out, counts, shared_replies=made, total=len(users))


def list_pairs(turns: dict[int, list[Utterance]], cfg: Any) -> list[ScoredPair]:
    """Returns the preference pairs of a conversation in the order of turns, then of score
    differences (widest first).

    Equal replies inside a turn count once; an empty text is never a reply, a prompt or a
    history."""
    found: list[ScoredPair] = []
    history: Messages = []
    for turn in range(len(turns) if cfg.turns == "all" else 1):
        replies = sorted(turns.get(turn, []), key=lambda u: u.position)
        if not replies or not replies[0].prompt:
            break  # what follows has no history
        prompt = history + [{"role": "user", "content": replies[0].prompt}]
        replies = [u for u in replies if u.response]
        distinct = {u.response: u for u in reversed(replies)}
        pairs = []
        for a, b in _compare([*distinct.values()], cfg.pair_mode):
            margin = a.score - b.score
            if margin >= max(1, cfg.score_margin):
                record_id = f"{a.utterance_id}>{b.utterance_id}"
                pair = Pair(
                    record_id, prompt, a.response, b.response, conversation=a.conversation_id
                )
                pairs.append(ScoredPair(pair, turn, margin))
        found += sorted(pairs, key=lambda p: (-p.margin, p.pair.record_id))
        continued = [u.response for u in replies if u.in_history]
        if not continued:
            break
        history = prompt + [{"role": "assistant", "content": continued[0]}]
    return found


def _compare(replies: list[Utterance], mode: str) -> list[tuple[Utterance, Utterance]]:
    ranked = sorted(replies, key=lambda u: (-u.score, u.position))
    if mode == "best_vs_worst":
        return [(ranked[0], ranked[-1])] if ranked else []
    if mode == "best_vs_rest":
        return [(ranked[0], other) for other in ranked[1:]]
    if mode == "all_pairs":
        return [(a, b) for i, a in enumerate(ranked) for b in ranked[i + 1 :]]
    raise UserError(
        f'field "data.pair_mode": found "{mode}", allowed: best_vs_worst, best_vs_rest, all_pairs.'
    )


def _make_users(person: Person, talks: Talks, latent: Latent | None, cfg: Any) -> list[User]:
    """Splits a person's conversations, oldest first, into context (signals) and targets (held-out
    pairs, those to be kept first). With data.split_by = conversation the targets are dealt to the
    splits, in each of which the person is a user with the same signals."""
    n = len(talks)
    num_context = cfg.num_shots if n > cfg.num_shots + cfg.num_pairs else min(cfg.num_shots, n // 2)
    context, targets = talks[:num_context], talks[num_context:]
    shots: dict[str, Shot] = {}
    for conversation, pairs in context:
        first = [p.pair for p in pairs if p.turn == 0][:1]  # a shot has no room for a history
        for pair in first:
            place = conversation.conversation_id
            shots[place] = Shot(pair.prompt[-1]["content"], pair.chosen, pair.rejected, place)
    system = person.system_string if cfg.use_system_string else ""
    user_id = f"prism/{person.user_id}"
    user = User(
        user_id=user_id,
        profile="\n".join(t for t in (person.self_description, system) if t),
        survey=person.survey,
        shots=tuple(shots.values()),
        comments=tuple(
            Comment(c.opening_prompt, c.feedback, c.conversation_id)
            for c, _ in context
            if c.feedback
        ),
        pairs=(),
        oracle=latent.oracle if latent else "",
        stated=latent.stated if latent else "",
        readings=tuple(latent.readings[c] for c in shots if c in latent.readings) if latent else (),
        groups=person.groups,
    )
    ranked = sorted(
        (rank, order, dataclasses.replace(p.pair, groups=conversation.groups))
        for order, (conversation, pairs) in enumerate(targets)
        for rank, p in enumerate(pairs)
    )
    dealt: dict[str, list[Pair]] = defaultdict(list)
    for _, _, pair in ranked:
        kept_together = f"prism/{pair.conversation}" if cfg.split_by == "conversation" else user_id
        split = choose_split(kept_together, cfg.validation_fraction, cfg.test_fraction)
        dealt[split].append(pair)
    return [
        dataclasses.replace(user, split=split, pairs=tuple(pairs)) for split, pairs in dealt.items()
    ]


def _remove_leaks(users: list[User], shared_people: bool) -> tuple[list[User], dict[str, int]]:
    """Returns the users, in order, with the pairs that do not leak, where there are any, and how
    many pairs leak by kind."""
    finder = LeakFinder(shared_replies=False, shared_people=shared_people)
    left_out: Counter[str] = Counter()
    kept: dict[int, User] = {}
    for place in sorted(range(len(users)), key=lambda i: _KEEPING.index(users[i].split)):
        leaking = finder.check(users[place])
        left_out.update(f"pair where {KINDS[leak.kind]}" for leak in leaking)
        kept[place] = leave_out(users[place], leaking)
    return [kept[i] for i in range(len(users)) if kept[i].pairs], dict(left_out)


def _order_in_time(conversation: Conversation) -> tuple[str, int, str]:
    digits = "".join(c for c in conversation.conversation_id if c.isdigit())
    return conversation.time, int(digits or 0), conversation.conversation_id


SOURCE = Source(
    name="prism",
    kind="published",
    card=Card(
        title="PRISM (arXiv 2404.16019)",
        citation="Kirk et al., The PRISM Alignment Dataset, 2024, doi 10.57967/hf/2113",
        page=PAGE,
        licence="human texts CC-BY-4.0; model responses CC-BY-NC-4.0 and under the terms of their "
        "providers, so weights trained on them are for non-commercial use.",
        forbids="commercial use; identifying participants",
        counts={"people": 1500, "conversations": 8011, "utterances": 68371},
        not_published="splits; which conversations are signals and which are held out",
    ),
    options="on_bad_row split_by validation_fraction test_fraction num_shots num_pairs pair_mode "
    "score_margin turns use_system_string".split(),
    files=list_files,
    load=load,
    find=find_folder,
    splits=("user", "conversation"),
)
