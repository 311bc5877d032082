"""Compiles the update of many models and TPU slices, and writes what each needs into docs/tpu.md.

Each line is a `python -m popi_jax.fit` of its own. No TPU is needed; about two minutes a line on
two cores."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import tables
from popi_jax.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "tpu.md"
BEGIN, END = "<!-- table: make fit-table -->", "<!-- end of the table -->"
GIB = 2**30
HEAD = (
    *("model", "scale", "chips", "data x fsdp x tensor", "GiB per chip", "users"),
    *("compute / HBM / links / slices, s", "share", "bound by", "million users a day"),
    "compiling: CPU s / GiB",
)


class Entry(NamedTuple):
    model: str
    scale: str
    lora: bool = False
    fields: tuple[str, ...] = ()  # that are set otherwise than in the rows of configs/

    def list_arguments(self) -> list[str]:
        adapters = ("generator.lora.rank=16", "inference.lora.rank=16") if self.lora else ()
        fields = [f"--config.{field}" for field in (*adapters, *self.fields)]
        return [f"--config=prism:model={self.model},scale={self.scale},schedule=joint", *fields]


ENTRIES = (
    Entry("llama3-8b", "v5e:4x4", lora=True),
    Entry("llama3-8b", "v5e:8x8"),
    Entry("llama3-8b", "v5e:16x16"),
    Entry("llama3-8b", "2xv5e:8x8"),
    Entry("llama3-8b", "v6e:4x8"),
    Entry("llama3-8b", "v6e:8x8"),
    Entry("llama3-8b", "v6e:16x16"),
    Entry("llama3-8b", "v5p:2x2x4"),
    Entry("llama3-8b", "v5p:4x4x4"),
    Entry("llama3-8b", "2xv5p:4x4x4"),
    Entry("llama3-70b", "v6e:16x16", fields=("mesh.fsdp=32", "mesh.tensor=8")),
    Entry("llama3-70b", "v5p:4x8x8"),
    Entry("llama3-70b", "v5p:8x8x8"),
    Entry("llama3-70b", "2xv5p:4x8x8"),
)


def measure(entry: Entry) -> dict[str, Any] | None:
    """What `make fit` reports; None: it does not fit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fit.json"
        command = [sys.executable, "-m", "popi_jax.fit", *entry.list_arguments()]
        command.append(f"--report={path}")
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if path.exists():
            return json.loads(path.read_text())
        if "does not fit" in done.stdout:
            return None
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")


def list_cells(entry: Entry, found: dict[str, Any] | None) -> list[str]:
    model = " ".join([entry.model + (", adapters" if entry.lora else ""), *entry.fields])
    if found is None:
        return [model, entry.scale, "", "", "does not fit", *[""] * (len(HEAD) - 5)]
    turn = found["turns"]["joint"]
    seconds, mesh, memory = turn["seconds"], found["mesh"], found["memory"]
    serial, overlapped = sum(seconds.values()), max(seconds.values())
    per_day = [86400 / x * found["users"] / 1e6 for x in (serial, overlapped)]
    return [
        model,
        entry.scale,
        str(found["devices"]),
        " x ".join(str(mesh[axis]) for axis in ("data", "fsdp", "tensor")),
        f"{memory['total'] / GIB:.1f} of {found['available'] / GIB:.1f}",
        str(found["users"]),
        " / ".join(f"{seconds[x]:.2f}" for x in ("compute", "hbm", "interconnect", "cross_slice")),
        f"{turn['serial_fraction']:.2f}",
        max(seconds, key=lambda name: seconds[name]).replace("_", "-"),
        " to ".join(f"{users:.2f}" for users in per_day),
        f"{found['cpu_seconds']:.0f} / {found['peak_rss'] / GIB:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="make fit-table", description=__doc__)
    text = "entries whose model or scale holds this text; the table is then printed"
    parser.add_argument("--only", default="", help=text)
    args = parser.parse_args()
    entries = [entry for entry in ENTRIES if args.only in f"{entry.model} {entry.scale}"]
    if not entries:
        allowed = ", ".join(f"{entry.model} {entry.scale}" for entry in ENTRIES)
        parser.error(f"--only={args.only}: no entry is like that; they are {allowed}")
    rows = []
    with Progress(len(entries), label="slices", enabled=True) as progress:
        for number, entry in enumerate(entries):
            rows.append(list_cells(entry, measure(entry)))
            progress.update(number + 1)
    table = tables.render_table(HEAD, rows)
    print(table)
    if not args.only:
        text = DOCUMENT.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
