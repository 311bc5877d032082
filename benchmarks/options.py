"""Flags that several of these commands share."""

import argparse

from benchmarks.workloads import WORKLOADS


def parse_positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: must be at least 1")
    return number


def parse_workloads(text: str) -> list[str]:
    """Raises: argparse.ArgumentTypeError for a name that is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in WORKLOADS:
            raise argparse.ArgumentTypeError(f'"{name}": must be one of {", ".join(WORKLOADS)}')
    return names or [*WORKLOADS]


def make_parser(
    description: str | None, *, rounds: int, workloads: bool = True
) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    if workloads:
        text = f"of benchmarks/workloads.py, with commas between: {', '.join(WORKLOADS)}"
        made.add_argument(
            "--workloads",
            type=parse_workloads,
            default=",".join(WORKLOADS),
            metavar="A,B",
            help=text,
        )
    made.add_argument(
        "--rounds",
        type=parse_positive,
        default=rounds,
        metavar="N",
        help="steps of each program that are timed",
    )
    return made


def add_out(flags: argparse.ArgumentParser, default: str) -> None:
    flags.add_argument("--out", default=default, metavar="FILE", help="where the figures go")
