"""Evaluates a run and says what came out: results.json, results.md, summaries.jsonl and a table on
the terminal."""

import dataclasses
import json
import math
import os
from typing import Any

import jax
from etils import epath

from popi_jax.arrays import Params
from popi_jax.errors import UserError
from popi_jax.evals.cells import Evaluation, Models, Row, evaluate, num_passes
from popi_jax.progress import Progress
from popi_jax.run import Built

NUM_EXAMPLES = 3
MADE_DATA = (
    "MADE SAMPLE DATA: these people were made by a program, in PRISM's format. The numbers show whether the training "
    "works; they say nothing about real people or about PRISM."
)
_BAYES = {
    "no_signals": "seeing nothing of the user",
    "signals": "seeing all signals",
    "latent": "knowing the true preferences",
}


def evaluate_run(
    built: Built,
    *,
    step: int,
    inference: Params,
    generator: Params,
    frozen: Any,
    split: str = "test",
) -> dict[str, Any]:
    """Scores the models of a run on a split, writes the result files into its workdir and prints
    the table.

    `frozen` holds the parameters of both roles at the start of the main stage (a
    training.state.Frozen). Results of the test split are in results.json, results.md and
    summaries.jsonl; those of another in results_<split>.json and so on. At most
    `evaluation.max_users` users are scored, the first ones. Raises: UserError when the split holds
    no user."""
    config = built.config
    split_users = built.dataset.splits[split]
    users = list(split_users[: config.evaluation.max_users or len(split_users)])
    if not users:
        raise UserError(
            f"data.{split}_fraction: the {split} split holds no user; take another --split"
        )
    is_main = jax.process_index() == 0
    num_batches = -(-len(users) // config.evaluation.batch_users)
    with Progress(
        num_passes(users, config) * num_batches, label="evaluation", enabled=is_main
    ) as progress:
        done = iter(range(1, num_passes(users, config) * num_batches + 1))
        evaluation = evaluate(
            Models(inference, generator),
            Models(frozen.inference, frozen.generator),
            users,
            tokenizer=built.tokenizer,
            glue=built.glue,
            model=built.model,
            sampling=built.sampling,
            config=config,
            mesh=built.mesh,
            advance=lambda: progress.update(next(done)),
        )
    summaries = [
        {
            "user_id": user.user_id,
            "summary": built.tokenizer.decode(ids[:length]).strip(),
            "tokens": int(length),
        }
        for user, ids, length in zip(users, *evaluation.summaries, strict=True)
    ]
    optimum = built.dataset.source.compute_optimum
    results = {
        "config": dataclasses.asdict(config),
        "data": built.dataset.data,
        "split": split,
        "step": step,
        "bayes": optimum(users) if optimum else dict.fromkeys(_BAYES),
        **_as_json(evaluation),
        "examples": [
            {"user_id": user.user_id, "summary": row["summary"], "truth": user.oracle}
            for user, row in zip(users[:NUM_EXAMPLES], summaries, strict=False)
        ],
    }
    if is_main:
        suffix = "" if split == "test" else f"_{split}"
        folder = epath.Path(config.workdir)
        text = render(results)
        write_jsonl(folder / f"summaries{suffix}.jsonl", summaries)
        write_text(folder / f"results{suffix}.md", text)
        write_text(
            folder / f"results{suffix}.json",
            json.dumps(results, indent=2, ensure_ascii=False) + "\n",
        )
        print(text, end="")
    return results


def render(results: dict[str, Any]) -> str:
    """The content of results.json as Markdown whose table is aligned, so that it reads well on a
    terminal too."""
    rows = [(row["condition"], row) for row in results["rows"]]
    rows += [(f"{name}, generator before RL", row) for name, row in results["before_rl"].items()]
    header = ["condition", "decoding", "accuracy", "pairs", "nats per pair", "context tokens"]
    body = [
        [
            name,
            r["decoding"],
            _accuracy(r),
            str(r["n"]),
            f"{r['nats']:.3f}",
            f"{r['context_tokens']:.1f}",
        ]
        for name, r in rows
    ]
    parts = [f"# {results['config']['name']}: {results['split']} users at step {results['step']}"]
    parts += [f"**{MADE_DATA}**"] if results["data"] == "sample" else []
    parts += [aligned([header, *body])]
    bayes = [
        f"{value:.3f} {_BAYES[name]}"
        for name, value in results["bayes"].items()
        if value is not None
    ]
    parts += [f"Best accuracy that any model could reach: {', '.join(bayes)}."] if bayes else []
    parts += ["Accuracy ± standard error, clustered by user."]
    parts += [
        "\n".join(
            f"- {e['user_id']}: {' '.join(e['summary'].split()) or '(empty)'}\n  (truth: {e['truth'] or 'unknown'})"
            for e in results["examples"]
        )
    ]
    return "\n\n".join(parts) + "\n"


def aligned(rows: list[list[str]]) -> str:
    """A Markdown table, header first, with columns of even width; all but the first two are aligned
    to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    cells = (
        "| "
        + " | ".join(f"{{:{'<' if i < 2 else '>'}{width}}}" for i, width in enumerate(widths))
        + " |"
    )
    return "\n".join(cells.format(*line) for line in (rows[0], rule, *rows[1:]))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file that is either the old one or the whole new one, whenever the program is
    killed."""
    file = epath.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def write_jsonl(path: str | os.PathLike[str], rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _accuracy(row: dict[str, Any]) -> str:
    return f"{row['accuracy']:.3f}" + (
        f" ± {row['stderr']:.3f}" if row["stderr"] is not None else ""
    )


def _as_json(evaluation: Evaluation) -> dict[str, Any]:
    def fields(row: Row) -> dict[str, Any]:
        return row._asdict() | {"stderr": None if math.isnan(row.stderr) else row.stderr}

    return {
        "rows": [fields(row) for row in evaluation.rows],
        "before_rl": {
            name: {k: v for k, v in fields(row).items() if k != "condition"}
            for name, row in evaluation.before_rl.items()
        },
    }
