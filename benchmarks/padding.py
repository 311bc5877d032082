"""How much of what the models compute holds no token, and what it saves to leave that out.

Looks at batches of a configuration, as a run makes them and as users who are only shuffled, for
devices that hold one user of a batch or more (--config and --config.FIELD=VALUE as for training;
the default is that of make train on its sample), then times the gradient steps on texts of uneven
lengths, with padding and without, in turns."""

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import options, tables
from benchmarks.workloads import TINY, WIDE, WORKLOADS, Geometry, Workload
from popi_jax.arrays import Tokens, UserBatch
from popi_jax.data.measure import Fill, Spread, Totals

BATCHES = 128  # of another order than those that places are planned from
FIRST = 8  # from which former versions planned places
USERS_OF_A_DEVICE = (1, 2, 4)  # and all
MEAN, STD = 0.55, 0.2  # of the lengths of uneven texts, as parts of the longest
PARTS = {
    "signals": ("context",),
    "prompts and replies": ("turns", "chosen", "rejected"),
    "replies": ("chosen", "rejected"),
}


class Padding(NamedTuple):
    """Shares without a token: of all slots, and of what is computed token by token. Missing pairs
    are padding too."""

    slots: float
    computed: float  # places of the batches that fit them, slots of the others
    fitting: float  # share of the batches


def list_budgets(fill: Fill) -> dict[str, Totals]:
    return dict(zip(PARTS, (fill.contexts, fill.pairs, fill.answers), strict=True))


def measure_padding(
    batches: Iterable[UserBatch], budgets: Mapping[str, Totals | Spread], shards: int = 1
) -> dict[str, Padding]:
    """Of the signals and of the pairs, summaries left out, and of the replies, to which the LM head
    is applied; a batch fits where all of its shards do."""
    seen = list(batches)
    found = {}
    for name, fields in PARTS.items():
        texts: list[list[Tokens]] = [[getattr(batch, field) for field in fields] for batch in seen]
        rows = np.stack([count_tokens(batch) for batch in texts])
        tokens = rows.reshape(len(seen), shards, -1).sum(axis=2)
        slots = np.array([sum(part.ids.size for part in batch) for batch in texts])
        places = budgets[name].budget(rows.shape[1] // shards, shards)
        fitting = (tokens <= places).all(axis=1)
        computed = np.where(fitting, np.minimum(places * shards, slots), slots)
        of_slots, of_computed = (float(1 - tokens.sum() / size.sum()) for size in (slots, computed))
        found[name] = Padding(of_slots, of_computed, float(fitting.mean()))
    return found


def count_tokens(texts: Sequence[Tokens]) -> np.ndarray:
    """[users]"""
    return np.sum([x.lengths.reshape(len(x.lengths), -1).sum(axis=1) for x in texts], axis=0)


def guess_budgets(batches: Sequence[UserBatch]) -> dict[str, Spread]:
    """As if users shared a batch by chance, from the first batches: how places were planned before
    batches were dealt."""
    found = {}
    for name, fields in PARTS.items():
        counts = np.stack([count_tokens([getattr(b, f) for f in fields]) for b in batches])
        found[name] = Spread(float(counts.mean()), float(counts.std()))
    return found


def measure_configuration(name: str, settings: Sequence[str]) -> list[dict[str, Any]]:
    """Of the batches that a run makes, beside those of users who are shuffled alone. In a process
    of its own: a run starts devices and sets a mesh.

    Raises: UserError.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_configuration, (name, settings))


class Alike(Sequence[Any]):
    """Encoded users who all seem to have the same lengths, so that dealing them is shuffling."""

    def __init__(self, ids: Any) -> None:
        self.ids, self.lengths = ids, np.zeros_like(ids.lengths)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: Any) -> Any:
        return self.ids[number]


def _measure_configuration(name: str, settings: Sequence[str]) -> list[dict[str, Any]]:
    from popi_jax import cli
    from popi_jax.data.batches import make_user_batches
    from popi_jax.run import open_run

    with tempfile.TemporaryDirectory() as workdir:
        config = cli.load_config(name, [f"--config.workdir={workdir}", *settings])
        run = open_run(config)
        words, cfg, rows = run.inference.tokenizer, run.config, []
        shuffled = run.users._replace(ids=Alike(run.users.ids))  # type: ignore[arg-type]
        for order, users in (("shuffled", shuffled), ("dealt", run.users)):
            made = make_user_batches(users, words, cfg, seed=cfg.seed + 1)
            batches = [made[step] for step in range(BATCHES)]
            budgets = guess_budgets(batches[:FIRST])
            if order == "dealt":
                budgets = list_budgets(run.measured.fill)  # type: ignore[assignment]
            size = cfg.batch.users
            for each in [n for n in USERS_OF_A_DEVICE if n < size and size % n == 0] + [size]:
                for part, found in measure_padding(batches, budgets, size // each).items():
                    row = {"part": part, "order": order, "users_of_a_device": each}
                    rows.append(row | found._asdict())
        return rows


def cut_texts(users: UserBatch, seed: int = 0) -> UserBatch:
    """The batch with texts of normally distributed lengths."""
    rng = np.random.default_rng(seed)

    def cut(text: Tokens) -> Tokens:
        longest = text.ids.shape[-1]
        lengths = np.round(rng.normal(MEAN, STD, text.lengths.shape) * longest)
        return text._replace(lengths=np.clip(lengths, min(4, longest), longest).astype(np.int32))

    texts = {name: cut(getattr(users, name)) for name in ("context", "turns", "chosen", "rejected")}
    return users._replace(**texts)


def time_steps(work: Workload, geometry: Geometry, rounds: int) -> list[dict[str, Any]]:
    """CPU seconds of both gradient steps of a workload of kind popi, with padding and without."""
    from benchmarks import measure
    from benchmarks.programs import make_padded_and_dense

    cases = {
        (name, kind): measure.prepare_case(program, work)
        for name, pair in make_padded_and_dense(work, geometry, cut_texts).items()
        for kind, program in pair.items()
    }
    measure.run_rounds([*cases.values()], rounds)
    rows = []
    for name in dict.fromkeys(name for name, _ in cases):
        padded, dense = (cases[name, kind] for kind in ("padded", "dense"))
        ratios = [a.cpu / b.cpu for a, b in zip(padded.steps, dense.steps, strict=True)]
        rows.append(
            {
                "step": name,
                "width": geometry.embed_dim,
                "padded_cpu_s": tables.compute_spread([s.cpu for s in padded.steps]),
                "dense_cpu_s": tables.compute_spread([s.cpu for s in dense.steps]),
                "ratio": tables.compute_spread(ratios),
            }
        )
    return rows


def render(found: Sequence[dict[str, Any]]) -> str:
    rows = []
    for row in sorted(
        found, key=lambda row: ([*PARTS].index(row["part"]), row["users_of_a_device"])
    ):
        shares = (f"{100 * row[name]:.1f} %" for name in ("slots", "computed", "fitting"))
        rows.append((row["part"], row["order"], row["users_of_a_device"], *shares))
    head = ("padding", "order", "users of a device", "of slots", "of what is computed", "that fit")
    return tables.render_table(head, rows)


def render_steps(rows: Sequence[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        medians = row["padded_cpu_s"]["median"], row["dense_cpu_s"]["median"]
        ratio = row["ratio"]["median"], row["ratio"]["min"], row["ratio"]["max"]
        cells.append((row["step"], row["width"], *medians, *ratio))
    head = ("step", "width", "padded, CPU s", "dense, CPU s", "ratio", "min", "max")
    return tables.render_table(head, cells)


def main(argv: Sequence[str] | None = None) -> int:
    from popi_jax.errors import UserError

    flags = options.make_parser(__doc__, rounds=5, workloads=False)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument(
        "--config", default="prism", help="configuration whose batches are looked at (prism)"
    )
    flags.add_argument("--no-steps", action="store_true", help="time nothing")
    options.add_out(flags, "work/bench/padding.json")
    args, settings = flags.parse_known_args(argv)
    if unknown := [flag for flag in settings if not flag.startswith("--config.")]:
        flags.error(f"{unknown[0]}: unknown; settings are --config.FIELD=VALUE")
    try:
        shares = measure_configuration(args.config, settings)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(render(shares))
    result: dict[str, Any] = {"padding": shares}
    if not args.no_steps:
        result["steps"] = [
            *time_steps(WORKLOADS["popi"], TINY, args.rounds),
            *time_steps(WORKLOADS["popi"]._replace(users=1), WIDE, args.rounds),
        ]
        print(f"\n{render_steps(result['steps'])}")
    tables.write_json(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
