"""Scores the cells of a sweep on the users of one split: each is a text about the users, and a
generator that ranks their pairs behind it.

What cells have in common is computed once: summaries are kept in files, weights, batches and the
log-probs of the reference in memory."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from popi_jax import distributed
from popi_jax.arrays import PairLengths, PairLogps, UserBatch
from popi_jax.checkpoints.content import Hashes
from popi_jax.config import Config, DataConfig
from popi_jax.data import encode, prompts
from popi_jax.data.batches import encode_all
from popi_jax.data.dealing import find_longest
from popi_jax.data.encode import Ids
from popi_jax.data.records import User
from popi_jax.data.selection import select_signals
from popi_jax.data.tokens import identify_words
from popi_jax.dealt import Dealt, deal_pairs, deal_signals
from popi_jax.errors import UserError
from popi_jax.evals import conditions, records
from popi_jax.evals.conditions import Condition, People, find_condition
from popi_jax.evals.items import list_items
from popi_jax.evals.subjects import Reader, Subject, Weights, check_room, identify_shape
from popi_jax.evals.sweep_plan import Cell
from popi_jax.generators import Generator, Summarizer, bare_signals
from popi_jax.losses.preference import PreferenceObjective, pair_margins
from popi_jax.training.setup import make_objective

SCORING = 2  # raise it when the same models and texts are scored otherwise
DRAWING = 2  # raise it when the same models write other summaries
# what the length of a text depends on
_LIMITS = ("context_len", "turn_len", "answer_len", "summary_len", "num_pairs", "pair_layout")


class Split(NamedTuple):
    """The users of a data set that cells are about."""

    users: Sequence[User]
    data: DataConfig  # with the limits of texts
    identity: Mapping[str, Any]  # what the users are
    kind: str  # published, own or sample


class Pairs(NamedTuple):
    """The pairs of all users in tokens of a generator."""

    whole: UserBatch  # all users in one batch of numpy arrays
    dealt: Dealt
    shortened: encode.Truncations


class Scored(NamedTuple):
    """What a file of a cell holds, but for its key and labels."""

    header: dict[str, Any]
    items: list[dict[str, Any]]


def identify_objective(objective: PreferenceObjective) -> dict[str, Any]:
    """What of it margins depend on."""
    return {k: v for k, v in dataclasses.asdict(objective).items() if k != "over_beta"}


class Unit:
    """A subject on a split. `readers`: the generators that cells name; `decodings`: of summaries,
    all that the sweep asks for, since they are drawn together; `out`: the folder of the sweep."""

    def __init__(
        self,
        subject: Subject,
        split: Split,
        readers: Mapping[str, Reader],
        decodings: Sequence[str],
        out: str,
        hashes: Hashes,
    ) -> None:
        self.subject, self.split, self.readers = subject, split, readers
        self._decodings, self._out, self._hashes = decodings, out, hashes
        self._kept: dict[tuple[Any, ...], Any] = {}

    # what cells are, by content; asked of process 0 alone

    def identify(self, cell: Cell) -> dict[str, Any]:
        """All that decides about the figures of a cell. Raises: UserError where something that it
        names does not exist."""
        condition, reader = find_condition(cell.condition), self._find_reader(cell)
        self._select(cell.signals)
        objective = make_objective(reader.config)
        text: dict[str, Any] = {"condition": condition.name, "version": condition.version}
        if condition.reads_signals or condition.summaries_by:
            text["signals"] = self._name_signals(cell.signals)
        if condition.reads_signals and reader.config.model.signals_template:
            text["template"] = reader.config.model.signals_template
        if condition.summaries_by:
            text["summaries"] = self._identify_summaries(
                condition.summaries_by, cell.signals, cell.decoding
            )
        reference = None
        if objective.needs_reference:
            reference = {
                "weights": self._once("identity", reader.reference),
                "sees": reader.config.generator.reference,
            }
        model = reader.config.model
        return {
            "scoring": SCORING,
            "weights": self._once("identity", reader.weights),
            "shape": identify_shape(reader.parts),
            "words": identify_words(reader.parts.tokenizer),
            "instruction": [model.answer_instruction, model.summary_place, model.answer_template],
            "reference": reference,
            "objective": identify_objective(objective),
            "data": {**self.split.identity},
            "limits": {name: getattr(self.split.data, name) for name in _LIMITS},
            "text": text,
        }

    def _identify_summaries(self, writer: str, signals: str, decoding: str) -> dict[str, Any]:
        role, config = self.subject.roles.inference, self.subject.roles.config
        model = config.model
        return {
            "drawing": DRAWING,
            "weights": self._once("identity", self._find_writer(writer)),
            "shape": identify_shape(role),
            "words": identify_words(role.tokenizer),
            "instruction": [
                *(model.summary_system, model.signals_template, model.summary_instruction)
            ],
            "temperature": self._find_temperature(decoding),
            "seed": config.seed,
            "data": {**self.split.identity},
            "signals": self._name_signals(signals),
            "limits": {
                name: getattr(self.split.data, name)
                for name in ("context_len", "summary_len", "pair_layout", "prompt_aware")
            },
        }

    # what is computed

    def score(self, cell: Cell, advance: Callable[[float], None]) -> Scored:
        """advance: called with the finished part of the cell. Raises: UserError."""
        start = time.time()
        condition, reader = find_condition(cell.condition), self._find_reader(cell)
        users, pairs = self._select(cell.signals), self._once("pairs", cell.generator)
        first = 0.5 if condition.summaries_by else 0.0
        texts = self._write_texts(condition, cell, reader, lambda part: advance(first * part))
        objective = make_objective(reader.config)
        known = None
        if objective.needs_reference:
            if reader.config.generator.reference == "summary":
                known = self._score_texts(reader, reader.reference, texts, pairs)
            else:
                known = self._once("reference", cell.generator)
        follow = lambda part: advance(first + (1 - first) * part)  # noqa: E731
        logps = self._score_texts(reader, reader.weights, texts, pairs, follow)
        whole = pairs.whole
        lengths = PairLengths(
            jnp.asarray(whole.chosen.lengths), jnp.asarray(whole.rejected.lengths)
        )
        margins = np.asarray(pair_margins(logps, lengths, known, objective=objective), np.float64)
        counts = condition.count_users
        counted = [True] * len(users) if counts is None else list(counts(users))
        raw = self._once("raw", cell.generator, cell.signals)
        told = [len(ids) if counts else None for ids, counts in zip(texts, counted, strict=True)]
        items = list_items(users, whole, told, raw, (logps, known, margins))
        equal = pairs.shortened.equal
        usable = int(whole.pair_mask.sum())
        left = {
            "chosen and rejected are equal within data.answer_len": equal,
            "the condition does not apply": usable - len(items),
        }
        header = {
            "objective": dataclasses.asdict(objective),
            "coverage": {
                "users": len(users),
                "attempted": usable + equal,
                "scored": len(items),
                "left_out": {reason: n for reason, n in left.items() if n},
            },
            "shortened": pairs.shortened._asdict(),
            "data_kind": self.split.kind,
            "step": self.subject.step,
            "seconds": round(time.time() - start, 3),
        }
        if not items:
            raise UserError(f'no pair counts under the condition "{condition.name}" in these data')
        return Scored(header, items)

    def read_summaries(
        self, writer: str, signals: str, decoding: str, advance: Callable[[float], None]
    ) -> list[dict[str, Any]]:
        """One item per user, from the file that keeps them; all decodings of which there is none
        are drawn and written."""
        key = ("summaries", writer, signals)
        if key not in self._kept:
            self._kept[key] = self._make_summaries(writer, signals, advance)
        return self._kept[key][decoding]

    def _make_summaries(
        self, writer: str, signals: str, advance: Callable[[float], None]
    ) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, Any] = {}
        keys: dict[str, str] = {}
        if distributed.is_main_process():
            for decoding in self._decodings:
                identity = self._identify_summaries(writer, signals, decoding)
                keys[decoding] = records.make_key(identity)
                path = records.find_file(self._out, records.SUMMARIES, keys[decoding])
                if record := records.read_done(path):
                    found[decoding] = record.items
        found = json.loads(distributed.tell_all(json.dumps(found)))
        missing = [decoding for decoding in self._decodings if decoding not in found]
        if not missing:
            return found
        drawn = self._draw(writer, signals, missing, advance)
        for decoding, items in zip(missing, drawn, strict=True):
            found[decoding] = items
            if distributed.is_main_process():
                labels = {"writer": writer, "decoding": decoding, "signals": signals}
                header = {"kind": "summaries", "key": keys[decoding], "status": "done"}
                path = records.find_file(self._out, records.SUMMARIES, keys[decoding])
                records.write(path, header | {"labels": labels}, items)
        return found

    def _draw(
        self, writer: str, signals: str, decodings: Sequence[str], advance: Callable[[float], None]
    ) -> list[list[dict[str, Any]]]:
        """The signals are read once for all decodings."""
        users, roles = self._select(signals), self.subject.roles
        role, config = roles.inference, self._limit(roles.config)
        params = self._once("params", self._find_writer(writer))
        heats = [self._find_temperature(decoding) for decoding in decodings]
        summarizer = Summarizer(role, params, roles.config.seed)
        drawn = summarizer.write(self._once("signals", signals), heats, advance)
        texts = [encode.fit_signals(user, role.tokenizer, config).text for user in users]
        return [
            [
                {
                    "user": user.user_id,
                    "summary": role.tokenizer.decode(ids).strip(),
                    "tokens": len(ids),
                    "finished": len(ids) < config.data.summary_len,
                    "ids": ids,
                    "signals": text,
                }
                for user, ids, text in zip(users, found, texts, strict=True)
            ]
            for found in drawn
        ]

    def _write_texts(
        self, condition: Condition, cell: Cell, reader: Reader, advance: Callable[[float], None]
    ) -> list[Ids]:
        """The text about each user in tokens of the generator. Between two tokenizers goes text."""
        words, config = reader.parts.tokenizer, self._limit(reader.config)
        given: list[Ids] = []
        if condition.summaries_by:
            summaries = self.read_summaries(
                condition.summaries_by, cell.signals, cell.decoding, advance
            )
            given = [item["ids"] for item in summaries]
            if words is not self.subject.roles.inference.tokenizer:
                given = [
                    prompts.encode_summary(words, item["summary"], config) for item in summaries
                ]
        texts = condition.make_texts(People(self._select(cell.signals), words, config, given))
        limit = max(config.data.context_len, config.data.summary_len)
        return [list(ids[:limit]) for ids in texts]

    def _score_texts(
        self,
        reader: Reader,
        weights: Weights,
        texts: Sequence[Ids],
        pairs: Pairs,
        advance: Callable[[float], None] = lambda part: None,
    ) -> PairLogps:
        whole, longest = pairs.whole, max(map(len, texts), default=0)
        reply = max(whole.chosen.lengths.max(), whole.rejected.lengths.max())
        row = len(reader.parts.prompt) + longest + int(whole.turns.lengths.max() + reply)
        check_room(reader, row)
        params = self._once("params", weights)
        generator = Generator(reader.parts, params, self.subject.roles.mesh)
        length = self.split.data.summary_len
        length = length if longest <= length else find_longest([longest])
        return generator.score(texts, pairs.dealt, length, advance)

    def forget(self) -> None:
        """Frees weights and batches."""
        self._kept.clear()

    # what is made once

    def _once(self, kind: str, *names: Any) -> Any:
        """What `_make_<kind>(*names)` returns, made at the first call."""
        key = (kind, *(id(x) if isinstance(x, Weights) else x for x in names))
        if key not in self._kept:
            make: dict[str, Callable[..., Any]] = {
                "identity": lambda weights: weights.identify(self._hashes),
                "params": lambda weights: weights.load(),
                "signals": self._deal_signals,
                "pairs": self._deal_pairs,
                "reference": self._make_reference,
                "raw": self._count_raw,
            }
            self._kept[key] = make[kind](*names)
        return self._kept[key]

    def _deal_signals(self, signals: str) -> Dealt:
        roles = self.subject.roles
        config, role = self._limit(roles.config), roles.inference
        users = [bare_signals(user, config) for user in self._select(signals)]
        encoded, _ = encode_all(users, role.tokenizer, config)
        rows = config.evaluation.batch_users
        return deal_signals(encoded, role.model, role.prompt, roles.mesh, rows)

    def _deal_pairs(self, generator: str) -> Pairs:
        parts, config = self.readers[generator].parts, self._limit(self.readers[generator].config)
        first = next(name for name, reader in self.readers.items() if reader.parts is parts)
        if first != generator:
            return self._once("pairs", first)
        bare: dict[str, Any] = {"profile": "", "survey": "", "shots": (), "comments": ()}
        users = [dataclasses.replace(user, readings=(), **bare) for user in self.split.users]
        whole, cut = encode_all(users, parts.tokenizer, config)
        rows, mesh = config.evaluation.batch_users, self.subject.roles.mesh
        return Pairs(whole, deal_pairs(whole, parts.model, mesh, rows), cut)

    def _make_reference(self, generator: str) -> PairLogps:
        """Of the pairs behind no text: once for all conditions."""
        reader = self.readers[generator]
        first = next(n for n, r in self.readers.items() if r.reference is reader.reference)
        if first != generator:
            return self._once("reference", first)
        nothing: list[Ids] = [[] for _ in self.split.users]
        pairs = self._once("pairs", generator)
        return self._score_texts(reader, reader.reference, nothing, pairs)

    def _count_raw(self, generator: str, signals: str) -> list[int]:
        """Tokens of each user's raw signals."""
        reader = self.readers[generator]
        first = next(name for name, other in self.readers.items() if other.parts is reader.parts)
        if first != generator:
            return self._once("raw", first, signals)
        people = People(
            self._select(signals), reader.parts.tokenizer, self._limit(reader.config), ()
        )
        return [len(ids) for ids in conditions.tell_signals(people)]

    def _limit(self, config: Config) -> Config:
        """A configuration with the limits of the split, as they are given."""
        return dataclasses.replace(config, data=self.split.data)

    def _select(self, signals: str) -> list[User]:
        """The users with some of their signals; "all": those under `data.signals`."""
        return select_signals(self.split.users, self._name_signals(signals))

    def _name_signals(self, signals: str) -> str:
        return self.split.data.signals if signals == "all" else signals

    def _find_temperature(self, decoding: str) -> float:
        """Of summaries: that of the subject's run, of a base model that of the configuration."""
        return 0.0 if decoding == "greedy" else self.subject.roles.config.inference.temperature

    def _find_reader(self, cell: Cell) -> Reader:
        if cell.generator not in self.readers:
            raise UserError(
                f'"{cell.model}" has no generator "{cell.generator}": base models have no state '
                "before training"
            )
        return self.readers[cell.generator]

    def _find_writer(self, name: str) -> Weights:
        if name not in self.subject.writers:
            raise UserError(
                f"summaries by the inference model {name}: base models have no state before "
                "training"
            )
        return self.subject.writers[name]
