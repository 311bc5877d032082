"""Seconds and memory of reading the weights of a Hugging Face folder onto one device, beside what
reading its files costs.

Of each round the works take turns, each in a process of its own: `read` reads the files once into
a small buffer, as `cat` does; `keep` into new memory, which the system must clear first; `load`
makes arrays of bfloat16 or float32 of them. Peak memory is what the process took more than before,
over the bytes of the arrays."""

import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import options, tables

if TYPE_CHECKING:
    from popi_jax.models.transformer import TransformerConfig

ROOT = Path(__file__).parents[1]
WORKS = ("read", "keep", "load bfloat16", "load float32")
BLOCK = 2**20  # bytes, of `read`


def choose_model(gib: float) -> "TransformerConfig":
    """A Llama of about `gib` GiB in bfloat16."""
    from popi_jax.models.transformer import TransformerConfig

    sizes: dict[str, Any] = {"embed_dim": 2048, "num_heads": 32, "num_kv_heads": 4, "head_dim": 64}
    sizes |= {"vocab_size": 32000, "mlp_dim": 5632}
    outside, layer = 4 * 32000 * 2048, 88088576  # bytes
    layers = max(1, round((gib * 2**30 - outside) / layer))
    return TransformerConfig(num_layers=layers, tied_embeddings=False, **sizes)


def make_folder(folder: Path, cfg: "TransformerConfig", shards: int) -> None:
    """Writes random bfloat16 weights in so many files of about one size."""
    import ml_dtypes
    import numpy as np

    from popi_jax.checkpoints import hf_io, hf_names, hf_write

    config = hf_write.make_config(cfg, dtype="bfloat16", max_len=2048, special_ids={})
    folder.mkdir(parents=True)
    shapes = hf_names.list_stored_shapes(cfg)
    most = sum(2 * int(np.prod(shape)) for shape in shapes.values()) / shards
    groups: list[list[str]] = [[] for _ in range(shards)]
    filled = 0
    for name, shape in shapes.items():
        groups[min(shards - 1, int(filled // most))].append(name)
        filled += 2 * int(np.prod(shape))
    some = np.random.default_rng(0).normal(0, 0.02, 2**20).astype(ml_dtypes.bfloat16)
    places: dict[str, str] = {}
    for number, names in enumerate(groups):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        hf_write.save_tensors(
            {name: np.resize(some, shapes[name]) for name in names}, folder / file
        )
        places |= dict.fromkeys(names, file)
    hf_write.write_json(folder / hf_io.INDEX, {"weight_map": places})
    hf_write.write_json(folder / "config.json", config)


def list_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Makes the system drop what it keeps of the files in memory."""
    for path in list_files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def do(work: str, folder: Path, cold: bool) -> dict[str, float]:
    """One work, in this process: its seconds, those of its threads, bytes at most, and needed.

    It is done twice, and the second time is told: a virtual machine must first be given the memory,
    which is no work of ours."""
    run: Callable[[], Any]
    if work == "read":
        needed, run = BLOCK, lambda: read_files(folder)
    elif work == "keep":
        needed, run = sum(path.stat().st_size for path in list_files(folder)), lambda: keep(folder)
    else:
        needed, run = prepare_load(folder, work.split()[1])
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * resource.getpagesize()
    for _ in range(2):
        kept = None  # what the first time made
        gc.collect()
        if cold:
            forget(folder)
        else:
            read_files(folder)
        began, busy = time.perf_counter(), time.process_time()
        kept = run()  # noqa: F841, its memory counts
        seconds, busy = time.perf_counter() - began, time.process_time() - busy
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": seconds, "cpu_seconds": busy, "peak_bytes": peak, "needed_bytes": needed}


def read_files(folder: Path) -> None:
    buffer = bytearray(BLOCK)
    for path in list_files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def keep(folder: Path) -> list[Any]:
    import numpy as np

    return [np.fromfile(path, np.uint8) for path in list_files(folder)]


def prepare_load(folder: Path, dtype: str) -> tuple[int, Any]:
    """Returns the bytes that the arrays need, and what reads them."""
    import jax

    from popi_jax.checkpoints import hf_config, hf_io
    from popi_jax.models.transformer import init_boxed, unbox

    cfg = hf_config.read_config(folder)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = unbox(jax.eval_shape(partial(init_boxed, cfg=cfg), jax.random.key(0)))
    place = partial(jax.ShapeDtypeStruct, dtype=dtype, sharding=device)
    abstract = jax.tree.map(lambda x: place(x.shape), shapes)
    needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    return needed, lambda: jax.block_until_ready(hf_io.read_params(folder, cfg, abstract))


def measure(folder: Path, rounds: int, cold: bool) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {work: [] for work in WORKS}
    for number in range(rounds):
        for work in WORKS:
            command = [sys.executable, "-m", "benchmarks.loading", f"--folder={folder}"]
            command += [f"--only={work}", *(["--cold"] if cold else [])]
            told = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
            found[work].append(json.loads(told.stdout))
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return found


def render(found: dict[str, list[dict[str, float]]]) -> str:
    """The fastest of the rounds, the most memory."""
    least = {work: min(x["seconds"] for x in rounds) for work, rounds in found.items()}
    rows = []
    for work, rounds in found.items():
        busy = min(x["cpu_seconds"] for x in rounds)
        peak = max(x["peak_bytes"] / x["needed_bytes"] for x in rounds)
        memory = "" if work == "read" else f"{peak:.2f}"
        ratios = (f"{least[work] / least[base]:.2f}" for base in ("read", "keep") if base in least)
        rows.append((work, least[work], busy, *ratios, memory))
    bases = (f"/ {base}" for base in ("read", "keep") if base in least)
    head = ("", "seconds", "CPU seconds", *bases, "peak / needed")
    return tables.render_table(head, rows)


def main(argv: Sequence[str] | None = None) -> int:
    flags = options.make_parser(__doc__, rounds=5, workloads=False)
    place: Any = {"type": Path, "default": Path("work/loading")}
    flags.add_argument("--folder", **place, help="of the model; is made where there is none")
    flags.add_argument("--gib", type=float, default=2.0, help="of the model that is made")
    flags.add_argument("--shards", type=options.parse_positive, default=8, help="files of it")
    flags.add_argument("--cold", action="store_true", help="from the disk, not from memory")
    flags.add_argument("--only", choices=WORKS, help="one work in this process, told as JSON")
    options.add_out(flags, "work/bench/loading.json")
    args = flags.parse_args(argv)
    folder = args.folder.resolve()
    if args.only:
        print(json.dumps(do(args.only, folder, args.cold)))
        return 0
    if not folder.exists():
        make_folder(folder, choose_model(args.gib), args.shards)
    found = measure(folder, args.rounds, args.cold)
    tables.write_json(args.out, found)
    print(render(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
