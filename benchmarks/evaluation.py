"""Times the scoring of preference pairs by a Hugging Face folder: popi_jax beside the `hf` model of
lm-evaluation-harness, each in a process of its own, on the same token ids and cores.

    python -m benchmarks.evaluation --folder=checkpoints/smollm2 --peer=PYTHON

PYTHON is of an environment with torch, transformers and lm-eval 0.4.13. Each user has a text, a
question and one reply that is preferred to three others, in the shape of PrefEval; the words are
drawn from README.md. Both workers read float32 weights and return the log-likelihoods of both
replies of each pair. Figures are CPU and wall seconds of the whole process, and of the scoring
alone: the first time, when popi_jax compiles or reads what it compiled, and again. The peer does
not compile; its figures are those of the best of the batch sizes given."""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import options, tables

ROOT = Path(__file__).parents[1]
PAIRS = 3  # of a user, with the same chosen reply
TOLERANCE = 1e-2  # nats of a reply of some hundred nats, between two float32 programs


def make_texts(pairs: int, context: int) -> list[dict[str, Any]]:
    """One {"text", "question", "replies"} per user; `context`: words about the user."""
    words, draw = (ROOT / "README.md").read_text(encoding="utf-8").split(), random.Random(0)
    words = [word for word in words if word.isalpha()]

    def say(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    return [
        {
            "text": say(context // 2, context * 3 // 2),
            "question": say(15, 35),
            "replies": [say(30, 70) for _ in range(PAIRS + 1)],
        }
        for _ in range(-(-pairs // PAIRS))
    ]


def measure(work: Any) -> tuple[dict[str, float], Any]:
    cpu, wall = time.process_time(), time.perf_counter()
    found = work()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}, found


def score_popi(folder: str, texts: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    """Also returns the token ids, which the peer gets."""
    from popi_jax import cli
    from popi_jax.data import prompts
    from popi_jax.data.batches import encode_all
    from popi_jax.data.dealing import find_longest
    from popi_jax.data.records import Pair, User
    from popi_jax.dealt import deal_pairs
    from popi_jax.evals.subjects import open_reader
    from popi_jax.generators import Generator
    from popi_jax.run import start_devices

    flags = [f"model.checkpoint={folder}", "model.dtype=float32"]
    config = cli.load_config(
        "prefeval:model=pretrained,scale=laptop", [f"--config.{flag}" for flag in flags]
    )
    mesh = start_devices(config)
    users = []
    for number, told in enumerate(texts):
        prompt = [{"role": "user", "content": told["question"]}]
        best, *others = told["replies"]
        pairs = tuple(Pair(f"{number}/{k}", prompt, best, x) for k, x in enumerate(others))
        users.append(User(str(number), told["text"], "", (), (), pairs))

    def load() -> Any:
        reader = open_reader(folder, config, mesh)
        return reader, reader.weights.load()

    loading, (reader, params) = measure(load)

    def score() -> Any:
        words, prefix = reader.parts.tokenizer, reader.parts.prompt
        whole, _ = encode_all(users, words, reader.config)
        told = [prompts.encode_summary(words, x["text"], reader.config) for x in texts]
        dealt = deal_pairs(whole, reader.parts.model, mesh, rows)
        longest = find_longest([len(ids) for ids in told])
        generator = Generator(reader.parts, params, mesh)
        found = generator.score(told, dealt, longest, lambda part: None)
        return whole, [[*prefix, *ids] for ids in told], found

    first, _ = measure(score)
    again, (whole, contexts, found) = measure(score)
    requests, logps = [], []
    for user, k in zip(*whole.pair_mask.nonzero(), strict=True):
        turn = whole.turns.ids[user, k, : whole.turns.lengths[user, k]].tolist()
        for side in ("chosen", "rejected"):
            reply = getattr(whole, side)
            ids = reply.ids[user, k, : reply.lengths[user, k]].tolist()
            requests.append([contexts[user] + turn, ids])
            logps.append(float(getattr(found, side)[user, k]))
    return {
        "loading": loading,
        "first": first,
        "again": again,
        "logps": logps,
        "requests": requests,
    }


def score_lm_eval(folder: str, requests: list[list[list[int]]], rows: int) -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM

    def load() -> Any:
        return HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=rows)

    loading, model = measure(load)
    asked = [(("", str(n)), context, reply) for n, (context, reply) in enumerate(requests)]

    def score() -> list[float]:
        return [logp for logp, _ in model._loglikelihood_tokens(asked, disable_tqdm=True)]

    first, logps = measure(score)
    return {"loading": loading, "first": first, "again": first, "logps": logps}


def run_worker(python: str, name: str, given: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Runs a worker to its end; also returns the seconds of its process."""
    asked, answer = scratch / "asked.json", scratch / "answer.json"
    asked.write_text(json.dumps(given))
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [python, "-m", "benchmarks.evaluation", f"--worker={name}", str(asked), str(answer)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = json.loads(answer.read_text())
    return found | {"process": {"cpu": cpu, "wall": time.perf_counter() - wall}}


def compare(args: argparse.Namespace) -> str:
    """A Markdown page. Raises: ValueError when the log-likelihoods differ."""
    texts, folder = make_texts(args.pairs, args.context), str(Path(args.folder).resolve())
    with tempfile.TemporaryDirectory() as scratch:
        given = {"folder": folder, "texts": texts, "rows": args.rows}
        own = run_worker(sys.executable, "popi_jax", given, Path(scratch))
        peers = {}
        for rows in args.peer_rows:
            given = {"folder": folder, "requests": own["requests"], "rows": rows}
            peers[rows] = run_worker(args.peer, "lm_eval", given, Path(scratch))
    most = max(
        abs(a - b)
        for peer in peers.values()
        for a, b in zip(own["logps"], peer["logps"], strict=True)
    )
    if most > TOLERANCE:
        raise ValueError(f"the log-likelihoods differ by up to {most:.3g} nats")
    best = min(peers, key=lambda rows: peers[rows]["first"]["cpu"])
    parts = ("process", "loading", "first", "again")
    lines = []
    for part in parts:
        for unit in ("cpu", "wall"):
            mine, theirs = own[part][unit], peers[best][part][unit]
            lines.append((f"{part}, {unit}", mine, theirs, theirs / mine))
    tokens = [sum(map(len, request)) for request in own["requests"]]
    return "\n".join(
        (
            f"# Scoring {len(tokens) // 2} pairs\n",
            f"- folder: {Path(args.folder).name}; {os.cpu_count()} cores; float32",
            f"- replies behind contexts: {sum(tokens)} tokens, {max(tokens)} at most",
            f"- rows: popi_jax {args.rows}; lm-eval {best}, the best of {[*peers]}",
            f"- log-likelihoods differ by at most {most:.2g} nats\n",
            tables.render_table(("seconds", "popi_jax", "lm-eval", "lm-eval / popi_jax"), lines),
            "",
        )
    )


def work(name: str, asked: Path, answer: Path) -> None:
    given = json.loads(asked.read_text())
    found = score_popi(**given) if name == "popi_jax" else score_lm_eval(**given)
    answer.write_text(json.dumps(found))


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--folder", default="checkpoints/smollm2", help="Hugging Face folder")
    flags.add_argument("--peer", default=".venv-peers/lm_eval/bin/python", metavar="PYTHON")
    flags.add_argument("--pairs", type=options.parse_positive, default=48)
    flags.add_argument(
        "--context", type=options.parse_positive, default=120, help="words about a user, on average"
    )
    flags.add_argument("--rows", type=options.parse_positive, default=4, help="users in a batch")
    flags.add_argument(
        "--peer-rows", type=options.parse_positive, nargs="+", default=[1, 8], metavar="N"
    )
    flags.add_argument("--worker", choices=("popi_jax", "lm_eval"), help=argparse.SUPPRESS)
    flags.add_argument("files", nargs="*", type=Path, help=argparse.SUPPRESS)
    options.add_out(flags, "work/evaluation.md")
    args = flags.parse_args()
    if args.worker:
        work(args.worker, *args.files)
        return 0
    text = compare(args)
    tables.write_text(Path(args.out), text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
