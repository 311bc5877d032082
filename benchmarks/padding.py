"""How much of what the models compute holds no token, and what it saves to leave that out.

Looks at batches of a configuration (--config and --config.FIELD=VALUE as for training; the default
is that of make train on its sample), then times the gradient steps on texts of uneven lengths, with
padding and without, in turns."""

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from benchmarks import options, tables
from benchmarks.workloads import TINY, WIDE, WORKLOADS, Geometry, Workload
from popi_jax.arrays import Tokens, UserBatch
from popi_jax.data.measure import Fill

BATCHES = 20
MEAN, STD = 0.55, 0.2  # of the lengths of uneven texts, as parts of the longest


class Padding(NamedTuple):
    """Shares without a token: of all slots, and of what is computed token by token. Missing pairs
    are padding too."""

    slots: float
    computed: float  # places of the batches that fit them, slots of the others
    fitting: float  # share of the batches


def measure_padding(batches: Iterable[UserBatch], fill: Fill) -> dict[str, Padding]:
    """Of the signals and of the pairs, summaries left out, and of the replies, to which the LM head
    is applied."""
    seen = list(batches)
    parts = {
        "signals": (("context",), fill.contexts),
        "prompts and replies": (("turns", "chosen", "rejected"), fill.pairs),
        "replies": (("chosen", "rejected"), fill.answers),
    }
    found = {}
    for name, (fields, spread) in parts.items():
        texts: list[list[Tokens]] = [[getattr(batch, field) for field in fields] for batch in seen]
        tokens = np.array([sum(int(np.sum(part.lengths)) for part in batch) for batch in texts])
        slots = np.array([sum(part.ids.size for part in batch) for batch in texts])
        places = spread.budget(seen[0].index.size, 1)
        computed = np.where(tokens <= places, np.minimum(places, slots), slots)
        of_slots, of_computed = (float(1 - tokens.sum() / size.sum()) for size in (slots, computed))
        found[name] = Padding(of_slots, of_computed, float(np.mean(tokens <= places)))
    return found


def measure_configuration(name: str, settings: Sequence[str]) -> dict[str, Padding]:
    """Of the first batches that a run makes. In a process of its own: a run starts devices and sets
    a mesh.

    Raises: UserError.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_configuration, (name, settings))


def _measure_configuration(name: str, settings: Sequence[str]) -> dict[str, Padding]:
    from popi_jax import cli
    from popi_jax.data import batches
    from popi_jax.run import open_run

    with tempfile.TemporaryDirectory() as workdir:
        config = cli.load_config(name, [f"--config.workdir={workdir}", *settings])
        run = open_run(config)
        users, words = run.dataset.splits["train"], run.inference.tokenizer
        made = batches.make_user_batches(users, words, run.config, seed=config.seed)
        return measure_padding(islice(iter(made), BATCHES), run.measured.fill)


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


def render(shares: dict[str, Padding]) -> str:
    rows = [(name, *(f"{100 * share:.1f} %" for share in one)) for name, one in shares.items()]
    return tables.render_table(
        ("padding", "of slots", "of what is computed", "batches that fit"), rows
    )


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
    result: dict[str, Any] = {"padding": {name: one._asdict() for name, one in shares.items()}}
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
