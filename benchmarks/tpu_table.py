"""Compiles the update of many models and TPU slices, and writes what each needs into docs/tpu.md.

Each row is a `python -m popi_jax.fit` of its own. No TPU is needed; about two minutes a row on two
cores."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from popi_jax.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "tpu.md"
BEGIN, END = "<!-- table: make fit-table -->", "<!-- end of the table -->"
GIB = 2**30


class Row(NamedTuple):
    model: str
    scale: str
    lora: bool = False
    fields: tuple[str, ...] = ()  # that are set otherwise than in the rows of configs/

    def arguments(self) -> list[str]:
        adapters = ("generator.lora.rank=16", "inference.lora.rank=16") if self.lora else ()
        fields = [f"--config.{field}" for field in (*adapters, *self.fields)]
        return [f"--config=prism:model={self.model},scale={self.scale},schedule=joint", *fields]


ROWS = (
    Row("llama3-8b", "v5e:4x4", lora=True),
    Row("llama3-8b", "v5e:8x8"),
    Row("llama3-8b", "v5e:16x16"),
    Row("llama3-8b", "2xv5e:8x8"),
    Row("llama3-8b", "v6e:4x8"),
    Row("llama3-8b", "v6e:8x8"),
    Row("llama3-8b", "v6e:16x16"),
    Row("llama3-8b", "v5p:2x2x4"),
    Row("llama3-8b", "v5p:4x4x4"),
    Row("llama3-8b", "2xv5p:4x4x4"),
    Row("llama3-70b", "v6e:16x16", fields=("mesh.fsdp=32", "mesh.tensor=8")),
    Row("llama3-70b", "v5p:4x8x8"),
    Row("llama3-70b", "v5p:8x8x8"),
    Row("llama3-70b", "2xv5p:4x8x8"),
)


def measured(row: Row) -> dict[str, Any] | None:
    """What `make fit` reports of a row; None: it does not fit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fit.json"
        command = [sys.executable, "-m", "popi_jax.fit", *row.arguments(), f"--report={path}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if path.exists():
            return json.loads(path.read_text())
        if "does not fit" in done.stdout:
            return None
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")


def line(row: Row, found: dict[str, Any] | None) -> str:
    model = " ".join([row.model + (", adapters" if row.lora else ""), *row.fields])
    if found is None:
        return f"| {model} | {row.scale} | | | does not fit | | | | | | |"
    turn = found["turns"]["joint"]
    seconds, mesh, memory = turn["seconds"], found["mesh"], found["memory"]
    serial, best = sum(seconds.values()), max(seconds.values())
    bound = max(seconds, key=lambda name: seconds[name]).replace("_", "-")
    per_day = " to ".join(f"{86400 / x * found['users'] / 1e6:.2f}" for x in (serial, best))
    times = " / ".join(
        f"{seconds[name]:.2f}" for name in ("compute", "hbm", "interconnect", "cross_slice")
    )
    shape = f"{mesh['data']} x {mesh['fsdp']} x {mesh['tensor']}"
    return (
        f"| {model} | {row.scale} | {found['devices']} | {shape} | {memory['total'] / GIB:.1f} of "
        f"{found['available'] / GIB:.1f} | {found['users']} | {times} | {turn['serial_fraction']:.2f} | {bound} | "
        f"{per_day} | {found['cpu_seconds']:.0f} / {found['peak_rss'] / GIB:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="make fit-table", description=__doc__)
    parser.add_argument(
        "--only",
        default="",
        help="rows whose model or scale holds this text; the table is then printed",
    )
    args = parser.parse_args()
    rows = [row for row in ROWS if args.only in f"{row.model} {row.scale}"]
    if not rows:
        parser.error(
            f"--only={args.only}: no row is like that; they are {', '.join(f'{r.model} {r.scale}' for r in ROWS)}"
        )
    lines = [
        "| model | scale | chips | data x fsdp x tensor | GiB per chip | users | compute / HBM / links / slices, s | "
        "share | bound by | million users a day | compiling: CPU s / GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    with Progress(len(rows), label="slices", enabled=True) as progress:
        for number, row in enumerate(rows):
            lines.append(line(row, measured(row)))
            progress.update(number + 1)
    table = "\n".join(lines)
    print(table)
    if not args.only:
        text = DOCUMENT.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
