"""Looks at the metrics of a run while they are written, and says what goes wrong: once when it
begins, and again only where it came back after CALM updates.

All follows from the lines of metrics.jsonl, so a run that goes on has the warnings of one that
never stopped."""

import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from absl import logging

from popi_jax.diagnostics.health import (
    KEPT,
    RULES,
    WATCHED,
    Facts,
    History,
    Rule,
    Warned,
    check,
    tell,
)

CALM = 100  # updates without a warning, after which it is said again
FILE = "warnings.jsonl"


class Watch(NamedTuple):
    """The state between two updates."""

    history: History
    holding: Mapping[str, int] = {}  # warning that holds -> the update at which it began
    ended: Mapping[str, int] = {}  # warning -> the last update at which it ended
    said: Mapping[str, tuple[int, ...]] = {}  # warning -> updates at which it was said


def start_watch(facts: Facts) -> Watch:
    return Watch(History(facts))


def see(
    watch: Watch, step: int, values: Mapping[str, float | None], rules: Iterable[Rule] = RULES
) -> tuple[Watch, list[Warned]]:
    """The state after the values of an update, and what is to be said. Values of one update may
    come in several parts."""
    known = {
        name: float(value)
        for name, value in values.items()
        if name in WATCHED and value is not None and math.isfinite(value)
    }
    if not known:
        return watch, []
    history = extend(watch.history, known)
    holding, ended, said = dict(watch.holding), dict(watch.ended), dict(watch.said)
    found = []
    for rule in rules:
        if rule.watched not in known:
            continue
        value = check(rule, history)
        if value is None:
            if rule.name in holding:
                del holding[rule.name]
                ended[rule.name] = step
        elif rule.name not in holding:
            holding[rule.name] = step
            if step - ended.get(rule.name, -CALM) >= CALM:
                said[rule.name] = (*said.get(rule.name, ()), step)
                found.append(tell(rule, step, value, history.facts))
    return Watch(history, holding, ended, said), found


def extend(history: History, values: Mapping[str, float]) -> History:
    recent = {
        name: (*history.recent.get(name, ()), value)[-KEPT:] for name, value in values.items()
    }
    return history._replace(recent={**history.recent, **recent}, first={**values, **history.first})


def summarize(watch: Watch) -> str:
    """One line on a whole run."""
    if not watch.said:
        return "Health: no warning"
    each = [f"{name} ({', '.join(map(str, steps))})" for name, steps in sorted(watch.said.items())]
    count = sum(map(len, watch.said.values()))
    return f"Health: {count} warning{'s' * (count > 1)}, at updates: {', '.join(each)}"


class Monitor:
    """The watch of a run, its log and `<folder>/warnings.jsonl`. Only process 0 speaks."""

    def __init__(self, folder: str | os.PathLike[str], facts: Facts, *, enabled: bool) -> None:
        self._path = pathlib.Path(folder) / FILE
        self._enabled = enabled
        self._watch = start_watch(facts)

    def resume(self) -> None:
        """Reads again what the run has measured: metrics.jsonl, whose lines after the checkpoint
        are gone. Says nothing."""
        if not self._enabled:
            return
        metrics = self._path.with_name("metrics.jsonl")
        found: list[Warned] = []
        for line in metrics.read_bytes().splitlines() if metrics.exists() else ():
            row: dict[str, Any] = json.loads(line)
            self._watch, new = see(self._watch, row.pop("step"), row)
            found += new
        if found or self._path.exists():
            self._path.write_text("".join(map(_to_line, found)), encoding="utf-8")

    def see(self, step: int, values: Mapping[str, float]) -> None:
        if not self._enabled:
            return
        self._watch, found = see(self._watch, step, values)
        for warned in found:
            logging.warning("Update %d, %s: %s", step, warned.name, warned.text)
        if found:
            with self._path.open("a", encoding="utf-8") as f:
                f.writelines(map(_to_line, found))

    def close(self) -> None:
        """Says in one line what was warned of."""
        if self._enabled and self._watch.history.recent:
            level = logging.WARNING if self._watch.said else logging.INFO
            logging.log(level, "%s", summarize(self._watch))


def _to_line(warned: Warned) -> str:
    return json.dumps(warned._asdict()) + "\n"
