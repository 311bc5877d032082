"""What `make data` prints of a prepared data set: its card, counts, lengths and first users."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from popi_jax.data import leaks
from popi_jax.data.prepared import Dataset
from popi_jax.data.prompts import Tokenizer, render_signals
from popi_jax.data.records import SPLITS, User

MEASURED = 1000  # users, evenly spaced, whose texts are counted in tokens
_PERCENTILES = (50, 90, 99, 100)


def describe(dataset: Dataset, cfg: Any, tokenizer: Tokenizer) -> str:
    """The whole text but the users. cfg: the configuration."""
    parts = [
        _show_card(dataset),
        _show_splits(dataset.stats),
        _show_checks(dataset, cfg.data),
        _show_lengths(dataset.splits["train"], cfg, tokenizer),
    ]
    return "\n\n".join(parts)


def show_user(user: User, cfg: Any) -> str:
    """Signals, first held-out pair and persona of a user, as plain text."""
    pair = user.pairs[0]
    asked = "\n".join(f"{m['role']}: {m['content']}" for m in pair.prompt)
    groups = ", ".join(f"{k}: {v}" for k, v in {**user.groups, **pair.groups}.items())
    parts = [
        f"--- user {user.user_id} of the {user.split} split",
        f"--- signals\n{_render(user, cfg)}",
        f"--- first of {len(user.pairs)} held-out pairs ({pair.record_id})",
        f"{asked}\nchosen: {pair.chosen}\nrejected: {pair.rejected}",
        f"--- true persona, never shown to the inference model\n{user.oracle or '(unknown)'}",
        f"--- groups, never shown to a model\n{groups}" if groups else "",
    ]
    return "\n".join(filter(None, parts))


def _show_card(dataset: Dataset) -> str:
    card, counts = dataset.source.card, dataset.stats["counts"]
    rows = {
        "source": f"{dataset.name} ({dataset.data} data) from {dataset.folder}",
        "title": card.title,
        "citation": card.citation,
        "published at": card.page,
        "licence": card.licence,
        "forbids": card.forbids,
        "not published": card.not_published,
        "counts": _join_counts(card.counts, counts),
        "prepared copy": str(dataset.prepared),
    }
    return _align({name: text for name, text in rows.items() if text})


def _join_counts(published: Mapping[str, int], found: Mapping[str, int]) -> str:
    told = []
    for name, count in found.items():
        more = f" of {published[name]:,}" if name in published and published[name] != count else ""
        told.append(f"{count:,}{more} {name}")
    rest = [f"{count:,} {name}" for name, count in published.items() if name not in found]
    return ", ".join(told) + (f" (also published: {', '.join(rest)})" if rest else "")


def _show_splits(stats: Mapping[str, Any]) -> str:
    heads = ("split", "users", "pairs", "pairs a user", "chosen longer", "duplicates")
    lines = [f"{heads[0]:<12}" + "".join(f"{head:>15}" for head in heads[1:])]
    for split in SPLITS:
        s = stats[split]
        sizes = [int(n) for n, users in s["pairs_per_user"].items() for _ in range(min(users, 1))]
        spread = f"{min(sizes)} to {max(sizes)}" if sizes else "-"
        longer = f"{s['chosen_longer'] / s['pairs']:.1%}" if s["pairs"] else "-"
        cells = (f"{s['users']:,}", f"{s['pairs']:,}", spread, longer, f"{s['duplicates']:,}")
        lines.append(f"{split:<12}" + "".join(f"{cell:>15}" for cell in cells))
    lines.append(
        "chosen longer: share of pairs (letters); duplicates: pairs that equal an earlier one of "
        "their split"
    )
    return "\n".join(lines)


def _show_checks(dataset: Dataset, cfg: Any) -> str:
    stats, home = dataset.stats, dataset.prepared
    found = ", ".join(f"{n} x {leaks.KINDS[kind]}" for kind, n in stats["leaks"].items())
    told = f"left out: {found} (leaks.jsonl)" if found else "none found"
    rows = {
        "leaks": f"{told}; looked for: {', '.join(stats['looked_for'])} (docs/data.md)",
        "bad rows": f"{stats['rows']['skipped']} skipped ({home / 'bad_rows.jsonl'})",
        "left out": ", ".join(f"{n:,} x {why}" for why, n in stats["left_out"].items()) or "none",
        "split by": cfg.split_by or dataset.source.splits[0],
    }
    return _align(rows)


def _show_lengths(users: Sequence[User], cfg: Any, tokenizer: Tokenizer) -> str:
    """Percentiles of the tokens of each part, over users of the training split."""
    stride = max(-(-len(users) // MEASURED), 1)
    counts: dict[str, list[int]] = {}
    measured = [users[i] for i in range(0, len(users), stride)]
    for user in measured:
        for name, text in _list_parts(user, cfg):
            counts.setdefault(name, []).append(len(tokenizer.encode(text)))
    d = cfg.data
    limits = {"signals": d.context_len, "prompt": d.turn_len}
    limits |= dict.fromkeys(("chosen", "rejected"), d.answer_len)
    heads = [*(f"{p} %" if p < 100 else "longest" for p in _PERCENTILES), "limit"]
    lines = [f"{'tokens':<20}{'texts':>8}" + "".join(f"{head:>10}" for head in heads)]
    for name, found in counts.items():
        values = np.percentile(found, _PERCENTILES, method="higher")
        cells = [*(f"{int(v):,}" for v in values), str(limits.get(name, ""))]
        lines.append(f"{name:<20}{len(found):>8,}" + "".join(f"{cell:>10}" for cell in cells))
    lines.append(
        f"of {len(measured):,} users of the training split, without headers; tokenizer: "
        f"{tokenizer.source}"
    )
    return "\n".join(lines)


def _list_parts(user: User, cfg: Any) -> Iterator[tuple[str, str]]:
    yield "signals", _render(user, cfg)
    for name in ("profile", "survey"):
        if text := getattr(user, name):
            yield f"  {name}", text
    for comment in user.comments:
        yield "  comment", f"{comment.prompt}\n{comment.comment}".strip()
    for shot in user.shots:
        yield "  past pair", f"{shot.prompt}\n{shot.chosen}\n{shot.rejected}"
    for pair in user.pairs:
        yield "prompt", "\n".join(m["content"] for m in pair.prompt)
        yield "chosen", pair.chosen
        yield "rejected", pair.rejected
    if user.oracle:
        yield "true persona", user.oracle


def _render(user: User, cfg: Any) -> str:
    return render_signals(user, cfg.data.pair_layout, cfg.model.signals_template)


def _align(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows)) + 2
    return "\n".join(f"{f'{name}:':<{width}}{text}" for name, text in rows.items())
