"""Times the programs of this tree and of another revision side by side, and fails when one of them
became slower.

The steps of both trees take turns, so that whatever else the machine does hits both alike. A ratio
is CPU seconds of a step of this tree over those of the other revision's."""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import options, tables
from popi_jax.progress import Progress

ROOT = Path(__file__).parents[1]


class CompareError(Exception):
    """Told in one line."""


class Verdict(NamedTuple):
    # program, least, median and greatest ratio, verdict
    rows: list[tuple[str, float, float, float, str]]
    slower: list[str]


def judge(ratios: Mapping[str, Sequence[float]], threshold: float) -> Verdict:
    """A program is slower when the median of its ratios is over the threshold."""
    rows = []
    for name, values in ratios.items():
        median = statistics.median(values)
        word = "slower" if median > threshold else "faster" if median < 1 / threshold else "same"
        rows.append((name, min(values), median, max(values), word))
    return Verdict(rows, [row[0] for row in rows if row[4] == "slower"])


@contextlib.contextmanager
def check_out(revision: str) -> Iterator[Path]:
    """A temporary work tree of a revision, removed at the end. Raises: CompareError."""
    folder = Path(tempfile.mkdtemp(prefix="popi-base-"))
    tree = folder / "tree"
    try:
        done = _run_git("worktree", "add", "--detach", str(tree), revision)
        if done.returncode:
            reason = done.stderr.strip().splitlines()
            raise CompareError(
                f'BASE = "{revision}": {reason[-1] if reason else "git failed"}; '
                "give a commit, tag or branch"
            )
        yield tree
    finally:
        _run_git("worktree", "remove", "--force", str(tree))
        shutil.rmtree(folder, ignore_errors=True)
        _run_git("worktree", "prune")


class Worker:
    """A process that runs the programs of one tree."""

    def __init__(self, label: str, tree: Path, workloads: Sequence[str]) -> None:
        self._label = label
        paths = os.pathsep.join(dict.fromkeys((str(tree), str(ROOT))))
        command = [sys.executable, "-P", str(ROOT / "benchmarks" / "worker.py"), *workloads]
        env = os.environ | {"PYTHONPATH": paths}
        self._process = subprocess.Popen(
            command, cwd=tree, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.programs: dict[str, Any] = {}

    def start(self) -> None:
        """Waits until all programs are compiled. Raises: CompareError."""
        self.programs = self._read_answer()["programs"]

    def step(self, name: str) -> float:
        """CPU seconds of one step."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        return self._read_answer()["cpu"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _read_answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found = (
            json.loads(line)
            if line
            else {"error": f"the process ended with status {self._process.wait()}"}
        )
        if "error" in found:
            raise CompareError(f"{self._label} cannot run these benchmarks: {found['error']}")
        return found


def measure_ratios(
    now: Worker, base: Worker, names: Sequence[str], rounds: int
) -> dict[str, list[float]]:
    """Pairs of steps, the two trees first in turns; the first pair of each program is not
    counted."""
    found: dict[str, list[float]] = {name: [] for name in names}
    with Progress((rounds + 1) * len(names), label="pairs of steps", interval=10.0) as progress:
        for number in range(rounds + 1):
            for i, name in enumerate(names):
                first, second = (now, base) if number % 2 else (base, now)
                seconds = {first: first.step(name)}
                seconds[second] = second.step(name)
                if number:
                    found[name].append(seconds[now] / max(seconds[base], 1e-9))
                progress.update(number * len(names) + i + 1)
    return found


def compare(revision: str, workloads: Sequence[str], rounds: int, threshold: float) -> int:
    """Raises: CompareError."""
    with check_out(revision) as tree, contextlib.ExitStack() as stack:
        workers = [
            Worker("this tree", ROOT, workloads),
            Worker(f'BASE = "{revision}"', tree, workloads),
        ]
        for worker in workers:
            stack.callback(worker.close)
        print("compiling the programs of both trees", file=sys.stderr)
        for worker in workers:
            worker.start()
        now, base = workers
        both = [name for name in now.programs if now.programs[name] == base.programs.get(name)]
        judged = judge(measure_ratios(now, base, both, rounds), threshold)
    head = ("program", "least ratio", "median", "greatest", "verdict")
    print(tables.render_table(head, judged.rows))
    for name in sorted({*now.programs, *base.programs} - {*both}):
        where = "in this tree alone" if name not in base.programs else f"in {revision}"
        where = "the work differs" if name in now.programs and name in base.programs else where
        print(f"not compared: {name} ({where})")
    if judged.slower:
        names = ", ".join(judged.slower)
        print(f"error: slower than {revision} by more than {threshold:g}: {names}", file=sys.stderr)
    return 1 if judged.slower else 0


def _run_git(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)


def main(argv: Sequence[str] | None = None) -> int:
    flags = options.make_parser(__doc__, rounds=7)
    flags.add_argument(
        "--base", required=True, metavar="REVISION", help="commit, tag or branch to compare with"
    )
    flags.add_argument(
        "--threshold", type=float, default=1.05, help="the greatest median ratio that passes"
    )
    args = flags.parse_args(argv)
    try:
        return compare(args.base, args.workloads, args.rounds, args.threshold)
    except CompareError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
