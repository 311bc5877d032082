"""From a large file of rows to batches: how fast, and in how much memory.

Makes rows in the format of AlignX (benchmarks/made_alignx.py), prepares them, encodes the users,
then reads batches with 0, 1 and 2 worker processes beside updates of the tiny model, which consume
them. Every stage runs in a process of its own, so that peak memory is that of the stage; the last
one is the start of a run on data that are prepared and encoded, imports left out. What a former
call has made in --folder is used again, and then not timed."""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import options, tables

LEARNT_FROM = 1000  # users, of whom the tokenizer is trained
BATCHES = 100  # that are read with each number of workers
UPDATES = 3
WORKERS = (0, 1, 2)


def load_config(folder: Path, settings: Sequence[str], workdir: str = "") -> Any:
    from popi_jax import cli

    own = {
        "workdir": workdir or folder / "run",
        "data.path": folder / "rows",
        "data.prepared": folder / "prepared",
        "data.split_by": "",
    }
    flags = [f"--config.{name}={value}" for name, value in own.items()]
    return cli.load_config("alignx:scale=laptop", [*flags, *settings])


def measure(stage: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """Runs a stage in a process of its own; adds its seconds and peak memory, in MB, of the process
    and of the largest of those that it started."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure_here, stage, *given).result()


def _measure_here(stage: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    from absl import flags

    flags.FLAGS.mark_as_parsed()
    start = time.monotonic()
    found = {"seconds": 0.0} | stage(*given)
    found["seconds"] = found["seconds"] or time.monotonic() - start
    who = {"peak_mb": resource.RUSAGE_SELF, "workers_peak_mb": resource.RUSAGE_CHILDREN}
    return found | {name: resource.getrusage(one).ru_maxrss / 1024 for name, one in who.items()}


def make_rows(path: Path, rows: int) -> dict[str, Any]:
    from benchmarks import made_alignx

    made_alignx.write(path, rows, 0)
    return {}


def prepare_rows(folder: Path, settings: Sequence[str]) -> dict[str, Any]:
    from popi_jax.data import prepared

    start = time.monotonic()
    dataset = prepared.prepare(load_config(folder, settings).data, allow_sample=False)
    return {
        "seconds": time.monotonic() - start,
        "users": sum(len(users) for users in dataset.splits.values()),
    }


def train_tokenizer(folder: Path, settings: Sequence[str]) -> dict[str, Any]:
    from popi_jax.data import prepared, prompts, tokenizer

    config = load_config(folder, settings)
    users = prepared.prepare(config.data, allow_sample=False).splits["train"]
    some = [users[n] for n in range(0, len(users), max(len(users) // LEARNT_FROM, 1))]
    texts = prompts.list_training_texts(some, config)
    tokenizer.train(texts, config.model.vocab_size).save(folder / "tokenizer")
    return {"users": len(some)}


def _open(folder: Path, settings: Sequence[str]) -> Any:
    """(configuration, tokenizer, encoded training users)"""
    from popi_jax.data import prepared, tokenizer, tokens

    config = load_config(folder, settings)
    dataset = prepared.prepare(config.data, allow_sample=False)
    words = tokenizer.load(folder / "tokenizer")
    users = tokens.open_encoded(dataset.splits["train"], words, config, dataset.prepared / "tokens")
    return config, words, users


def encode_rows(folder: Path, settings: Sequence[str]) -> dict[str, Any]:
    return {"users": len(_open(folder, settings)[2].ids)}


def _make_batches(folder: Path, settings: Sequence[str]) -> Any:
    """(configuration with fitted lengths, batches)"""
    import dataclasses

    from popi_jax.data import batches, measure

    config, words, users = _open(folder, settings)
    lengths = measure.fit_lengths(users.lengths, words, config)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **lengths))
    return config, batches.make_user_batches(users, words, config, seed=1)


def start_again(folder: Path, settings: Sequence[str]) -> dict[str, Any]:
    """To the first batch, as a run begins."""
    import grain  # noqa: F401  imports are no part of it
    import tensorflow_datasets  # noqa: F401

    from popi_jax import cli, run  # noqa: F401

    start = time.monotonic()
    _, made = _make_batches(folder, settings)
    made[0]
    return {"seconds": time.monotonic() - start}


def read_batches(folder: Path, settings: Sequence[str], workers: int) -> dict[str, Any]:
    """Users a second, the first batches left out: processes begin with them."""
    from popi_jax.data import batches

    config, made = _make_batches(folder, settings)
    with batches.iterate(made, 0, workers) as iterator:
        begun = time.monotonic()
        for _ in range(8 + 4 * workers):
            next(iterator)
        start = time.monotonic()
        for _ in range(BATCHES):
            next(iterator)
        seconds = time.monotonic() - start
    users = BATCHES * config.batch.users
    return {"seconds": seconds, "users_per_s": users / seconds, "begun_s": start - begun}


def update_models(folder: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Users a second that updates of the main stage consume, after two that compile."""
    import jax

    from popi_jax import run as runs
    from popi_jax.data import tokenizer
    from popi_jax.sharding import place_batch
    from popi_jax.training import choices, loop, reference, setup

    words = tokenizer.load(folder / "tokenizer")  # else the run would train one of its own
    runs.load_tokenizer = lambda *_, **__: words
    with tempfile.TemporaryDirectory() as workdir:
        config = load_config(folder, settings, workdir)
        run = runs.open_run(config)
        plan = choices.plan_run(run).plan
        roles = setup.Roles(plan.inference.role, plan.generator.role)
        abstract = setup.abstract_state(run.inference.model, roles, run.mesh, run.config)
        state = loop.make_first_state(run, roles)
        frozen = reference.keep_reference(run, plan, state, {})
        update = choices.make_main_update(run, choices.Start(state, frozen), abstract, 0, {})
        batches = loop.open_batches(run)
        batches.skip_warmup()
        times = []
        for _ in range(2 + UPDATES):
            batch = place_batch(next(batches), run.mesh, run.inference.model.rules)
            start = time.monotonic()
            state, metrics = update(state, frozen, batch)
            jax.block_until_ready(metrics)
            times.append(time.monotonic() - start)
        batches.close()
    seconds = sum(times[2:])
    return {"seconds": seconds, "users_per_s": UPDATES * run.config.batch.users / seconds}


def main(argv: Sequence[str] | None = None) -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "--rows", type=options.parse_positive, default=20_000, metavar="N", help="made rows (20000)"
    )
    flags.add_argument(
        "--folder", type=Path, metavar="DIR", help="where rows and copies lie (work/bench/data/N)"
    )
    flags.add_argument("--no-updates", action="store_true", help="time no updates")
    options.add_out(flags, "work/bench/data.json")
    args, settings = flags.parse_known_args(argv)
    if unknown := [flag for flag in settings if not flag.startswith("--config.")]:
        flags.error(f"{unknown[0]}: unknown; settings are --config.FIELD=VALUE")
    from popi_jax.errors import UserError

    folder = args.folder or Path("work/bench/data") / str(args.rows)
    try:
        found = run_stages(folder, args.rows, settings, updates=not args.no_updates)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(render(found))
    tables.write_json(args.out, found)
    return 0


def run_stages(
    folder: Path, rows: int, settings: Sequence[str], *, updates: bool
) -> dict[str, dict[str, Any]]:

    path = folder / "rows" / "data" / "train-00000-of-00001.parquet"
    if not path.exists():  # elsewhere: a process begins with the peak memory of its parent
        measure(make_rows, path, rows)
    known = folder / "prepared" / "alignx"
    found: dict[str, dict[str, Any]] = {}
    before = known.exists()
    found["prepare"] = measure(prepare_rows, folder, settings) | {"again": before}
    if not (folder / "tokenizer").exists():
        measure(train_tokenizer, folder, settings)
    before = any(known.glob("*/tokens/*/files.json"))
    found["encode"] = measure(encode_rows, folder, settings) | {"again": before}
    for workers in WORKERS:
        found[f"batches, {workers} workers"] = measure(read_batches, folder, settings, workers)
    if updates:
        found["updates"] = measure(update_models, folder, settings)
    found["start again"] = measure(start_again, folder, settings)
    return found


def render(found: dict[str, dict[str, Any]]) -> str:
    consumed = found.get("updates", {}).get("users_per_s", 0.0)
    rows = []
    for name, one in found.items():
        users = one.get("users_per_s", one.get("users", 0) / one["seconds"])
        ratio = f"{users / consumed:.0f}" if consumed and name.startswith("batches") else ""
        label = f"{name} (was there)" if one.get("again") else name
        memory = one["peak_mb"], one["workers_peak_mb"]
        rows.append((label, one["seconds"], users, *memory, ratio))
    head = ("stage", "s", "users/s", "peak MB", "of a worker", "x updates")
    return tables.render_table(head, rows)


if __name__ == "__main__":
    raise SystemExit(main())
