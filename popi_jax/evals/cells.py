"""Scores the cells of a sweep on the users of one split: each is a text about the users, and a
generator that ranks their pairs behind it.

What cells have in common is computed once: summaries are kept in files, weights, batches and the
log-probs of the reference in memory."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from popi_jax import distributed
from popi_jax.arrays import PairLengths, PairLogps, UserBatch
from popi_jax.checkpoints.content import Hashes
from popi_jax.config import Config, DataConfig
from popi_jax.data import encode, prompts
from popi_jax.data.encode import Ids
from popi_jax.data.records import User
from popi_jax.data.selection import select_signals
from popi_jax.errors import UserError
from popi_jax.evals import conditions, records
from popi_jax.evals.conditions import Condition, People, find_condition
from popi_jax.evals.generators import Generator, Summarizer, encode_users
from popi_jax.evals.subjects import (
    Reader,
    Subject,
    Weights,
    check_room,
    identify_shape,
    identify_words,
)
from popi_jax.evals.sweep_plan import DECODINGS, Cell
from popi_jax.losses.preference import pair_margins
from popi_jax.run import Roles
from popi_jax.sharding import place_whole
from popi_jax.training.setup import make_objective

SCORING = 1  # raise it when the same models and texts are scored otherwise
DRAWING = 1  # raise it when the same models write other summaries
# what the length of a text depends on
_LIMITS = ("context_len", "turn_len", "answer_len", "summary_len", "num_pairs", "pair_layout")


class Split(NamedTuple):
    """The users of a data set that cells are about."""

    users: Sequence[User]
    data: DataConfig  # with the limits of texts
    identity: Mapping[str, Any]  # what the users are
    kind: str  # published, own or sample


class Batches(NamedTuple):
    whole: UserBatch  # all users in one, as numpy arrays
    placed: list[UserBatch]  # on the mesh
    shortened: encode.Truncations


class Scored(NamedTuple):
    """What a file of a cell holds, but for its key and labels."""

    header: dict[str, Any]
    items: list[dict[str, Any]]


class Unit:
    """A subject on a split. `out`: the folder of the sweep. `readers`: the generators that cells
    name."""

    def __init__(
        self,
        subject: Subject,
        split: Split,
        readers: Mapping[str, Reader],
        out: str,
        hashes: Hashes,
    ) -> None:
        self.subject, self.split, self.readers = subject, split, readers
        self._out, self._hashes = out, hashes
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
            text["signals"] = cell.signals
        if condition.summaries_by:
            text["summaries"] = self._identify_summaries(condition, cell)
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
            "instruction": [model.answer_instruction, model.summary_place],
            "reference": reference,
            "objective": dataclasses.asdict(objective),
            "data": {**self.split.identity},
            "limits": {name: getattr(self.split.data, name) for name in _LIMITS},
            "text": text,
        }

    def _identify_summaries(self, condition: Condition, cell: Cell) -> dict[str, Any]:
        role, config = self.subject.roles.inference, self.subject.roles.config
        return {
            "drawing": DRAWING,
            "weights": self._once("identity", self._find_writer(condition)),
            "shape": identify_shape(role),
            "words": identify_words(role.tokenizer),
            "instruction": config.model.summary_instruction,
            "temperature": DECODINGS[cell.decoding],
            "seed": config.seed,
            "data": {**self.split.identity},
            "signals": cell.signals,
            "limits": {
                name: getattr(self.split.data, name)
                for name in ("context_len", "summary_len", "pair_layout")
            },
        }

    # what is computed

    def score(self, cell: Cell, advance: Callable[[float], None]) -> Scored:
        """advance: called with the finished part of the cell. Raises: UserError."""
        start = time.time()
        condition, reader = find_condition(cell.condition), self._find_reader(cell)
        users = self._select(cell.signals)
        batches = self._once("batches", cell.generator, cell.signals)
        texts = self._write_texts(condition, cell, reader, users, advance)
        objective = make_objective(reader.config)
        known = None
        if objective.needs_reference:
            if reader.config.generator.reference == "summary":
                known = self._score_texts(reader, reader.reference, texts, batches)
            else:
                known = self._once("reference", cell.generator)
        logps = self._score_texts(reader, reader.weights, texts, batches, advance)
        whole = batches.whole
        lengths = PairLengths(
            jnp.asarray(whole.chosen.lengths), jnp.asarray(whole.rejected.lengths)
        )
        margins = np.asarray(pair_margins(logps, lengths, known, objective=objective), np.float64)
        counts = condition.count_users
        counted = [True] * len(users) if counts is None else list(counts(users))
        items = self._list_items(users, counted, batches, texts, (logps, known, margins), cell)
        attempted = int(whole.pair_mask.sum())
        left = {"the condition does not apply": attempted - len(items)}
        header = {
            "objective": dataclasses.asdict(objective),
            "coverage": {
                "users": len(users),
                "attempted": attempted,
                "scored": len(items),
                "left_out": {reason: n for reason, n in left.items() if n},
            },
            "shortened": batches.shortened._asdict(),
            "data_kind": self.split.kind,
            "step": self.subject.step,
            "seconds": round(time.time() - start, 3),
        }
        if not items:
            raise UserError(f'no pair counts under the condition "{condition.name}" in these data')
        return Scored(header, items)

    def read_summaries(
        self, condition: Condition, cell: Cell, advance: Callable[[float], None]
    ) -> list[dict[str, Any]]:
        """One item per user, from the file that keeps them, which is written if it is not there."""
        key = ""
        if distributed.is_main_process():
            key = records.make_key(self._identify_summaries(condition, cell))
        key = distributed.tell_all(key)
        return self._once("summaries", condition.summaries_by, cell.decoding, cell.signals, key)

    def _make_summaries(
        self, name: str, decoding: str, signals: str, key: str
    ) -> list[dict[str, Any]]:
        path, found = records.find_file(self._out, records.SUMMARIES, key), ""
        if distributed.is_main_process() and (record := records.read_done(path)):
            found = json.dumps(record.items)
        if found := distributed.tell_all(found):
            return json.loads(found)
        users, role = self._select(signals), self.subject.roles.inference
        params = self._once("params", self.subject.writers[name])
        batches = self._once("batches", "trained", signals)
        summarizer = Summarizer(role, params, self.subject.roles.config.seed)
        drawn = summarizer.write(batches.placed, DECODINGS[decoding], lambda: None)
        config = self._limit(self.subject.roles.config)
        items = [
            {
                "user": user.user_id,
                "summary": role.tokenizer.decode(ids).strip(),
                "tokens": len(ids),
                "finished": len(ids) < config.data.summary_len,
                "ids": ids,
                "signals": encode.fit_signals(user, role.tokenizer, config).text,
            }
            for user, ids in zip(users, drawn, strict=False)
        ]
        if distributed.is_main_process():
            labels = {"writer": name, "decoding": decoding, "signals": signals}
            header = {"kind": "summaries", "key": key, "status": "done", "labels": labels}
            records.write(path, header, items)
        return items

    def _write_texts(
        self,
        condition: Condition,
        cell: Cell,
        reader: Reader,
        users: Sequence[User],
        advance: Callable[[float], None],
    ) -> list[Ids]:
        """The text about each user in tokens of the generator. Between two tokenizers goes text."""
        words, config = reader.parts.tokenizer, self._limit(reader.config)
        given: list[Ids] = []
        if condition.summaries_by:
            summaries = self.read_summaries(condition, cell, advance)
            given = [item["ids"] for item in summaries]
            if words is not self.subject.roles.inference.tokenizer:
                given = [
                    prompts.encode_summary(words, item["summary"], config) for item in summaries
                ]
        texts = condition.make_texts(People(users, words, config, given))
        limit = max(config.data.context_len, config.data.summary_len)
        return [list(ids[:limit]) for ids in texts]

    def _score_texts(
        self,
        reader: Reader,
        weights: Weights,
        texts: Sequence[Ids],
        batches: Batches,
        advance: Callable[[float], None] = lambda part: None,
    ) -> PairLogps:
        whole, count, done = batches.whole, len(batches.placed), iter(range(1, 10**9))
        longest = max(map(len, texts), default=0)
        replies = max(whole.chosen.lengths.max(), whole.rejected.lengths.max())
        check_room(
            reader, len(reader.parts.prompt) + longest + int(whole.turns.lengths.max() + replies)
        )
        params = self._once("params", weights)
        generator = Generator(reader.parts, params, self.subject.roles.mesh)
        length = self.split.data.summary_len
        length = length if longest <= length else -(-longest // 64) * 64
        return generator.score(texts, batches.placed, length, lambda: advance(next(done) / count))

    def _list_items(
        self,
        users: Sequence[User],
        counted: Sequence[bool],
        batches: Batches,
        texts: Sequence[Ids],
        scores: tuple[PairLogps, PairLogps | None, Float[np.ndarray, "users pairs"]],
        cell: Cell,
    ) -> list[dict[str, Any]]:
        logps, known, margins = scores
        arrays = {"chosen": logps.chosen, "rejected": logps.rejected}
        if known is not None:
            arrays |= {"reference_chosen": known.chosen, "reference_rejected": known.rejected}
        arrays |= {
            "chosen_len": batches.whole.chosen.lengths,
            "rejected_len": batches.whole.rejected.lengths,
            "margin": margins,
        }
        columns = {name: np.asarray(values).tolist() for name, values in arrays.items()}
        raw = self._once("raw", cell.generator, cell.signals)
        items = []
        for row, user in enumerate(users):
            if not counted[row]:
                continue
            for column, pair in enumerate(user.pairs[: self.split.data.num_pairs]):
                values = {name: rows[row][column] for name, rows in columns.items()}
                items.append(
                    {"user": user.user_id, "person": user.user_id.split("#")[0]}
                    | {"pair": pair.record_id}
                    | values
                    | {"context_tokens": len(texts[row]), "signal_tokens": raw[row]}
                    | {"groups": {**getattr(user, "groups", {}), **getattr(pair, "groups", {})}}
                )
        bad = [item for item in items if not np.isfinite(item["margin"])]
        if bad:
            raise UserError(
                f"{len(bad)} margins are not finite, the first of user {bad[0]['user']}, pair "
                f"{bad[0]['pair']}; the weights are broken, or the compute type is too narrow"
            )
        return items

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
                "batches": self._make_batches,
                "reference": self._make_reference,
                "summaries": self._make_summaries,
                "raw": self._count_raw,
            }
            self._kept[key] = make[kind](*names)
        return self._kept[key]

    def _make_batches(self, generator: str, signals: str) -> Batches:
        parts = self.readers[generator].parts
        if generator != "trained" and parts is self.readers["trained"].parts:
            return self._once("batches", "trained", signals)
        users, roles = self._select(signals), self.subject.roles
        config = self._limit(self.readers[generator].config)
        lengths, cut = encode.fit_lengths(users, parts.tokenizer, config)
        if parts.tokenizer is not roles.inference.tokenizer:
            read = encode.fit_lengths(users, roles.inference.tokenizer, self._limit(roles.config))
            lengths["context_len"] = read[0]["context_len"]
        data = dataclasses.replace(config.data, **lengths)
        both = Roles(config, roles.mesh, roles.inference, parts)
        encoded = encode_users(both, users, dataclasses.replace(config, data=data))
        whole = jax.tree.map(lambda *x: np.concatenate(x)[: len(users)], *encoded)
        placed = [place_whole(batch, roles.mesh, parts.model.rules) for batch in encoded]
        return Batches(whole, placed, cut)

    def _make_reference(self, generator: str) -> PairLogps:
        """Of the pairs behind no text: once for all conditions."""
        reader = self.readers[generator]
        first = next(n for n, r in self.readers.items() if r.reference is reader.reference)
        if first != generator:
            return self._once("reference", first)
        batches = self._once("batches", generator, "all")
        nothing: list[Ids] = [[] for _ in self.split.users]
        return self._score_texts(reader, reader.reference, nothing, batches)

    def _count_raw(self, generator: str, signals: str) -> list[int]:
        """Tokens of each user's raw signals."""
        reader = self.readers[generator]
        people = People(
            self._select(signals), reader.parts.tokenizer, self._limit(reader.config), ()
        )
        return [len(ids) for ids in conditions.tell_signals(people)]

    def _limit(self, config: Config) -> Config:
        """A configuration with the limits of the split, as they are given."""
        return dataclasses.replace(config, data=self.split.data)

    def _select(self, signals: str) -> list[User]:
        return select_signals(self.split.users, signals)

    def _find_reader(self, cell: Cell) -> Reader:
        if cell.generator not in self.readers:
            raise UserError(
                f'"{cell.model}" has no generator "{cell.generator}": base models have no state '
                "before training"
            )
        return self.readers[cell.generator]

    def _find_writer(self, condition: Condition) -> Weights:
        if condition.summaries_by not in self.subject.writers:
            raise UserError(
                f'the condition "{condition.name}" needs a run: base models have no state before '
                "training"
            )
        return self.subject.writers[condition.summaries_by]
