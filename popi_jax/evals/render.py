"""What an evaluation leaves behind: results.json, results.md, summaries.jsonl and a table."""

import json
from typing import Any

from etils import epath

from popi_jax import files
from popi_jax.checkpoints import manager

MADE_DATA = (
    "MADE SAMPLE DATA: these people were made by a program, in PRISM's format. The numbers show "
    "whether the training works; they say nothing about real people or about PRISM."
)
_BAYES = {
    "no_signals": "seeing nothing of the user",
    "signals": "seeing all signals",
    "best_list": "reading the best list as long as the truth",
    "latent": "knowing the true preferences",
}


# what results.json calls them -> rows and columns of the tables below that of the conditions
LOSS = {
    "nats": "measured",
    "noise": "of it: random even for who knows the truth",
    "lost_by_signals": "lost by the signals",
    "lost_by_summary": "lost by the summary",
    "lost_by_generator": "lost by the generator",
    "chance": "chance of the labels",
    "saved_by_scale": "one scale of the margins would save",
    "bits": "bits gained over no_signals",
    "bits_calibrated": "the same with that scale",
    "information": "bits that the summary tells an ideal reader",
    "gap_recovered": "gap recovered (accuracy, to the oracle)",
}
NAMES = {
    "precision": "right, of the items named",
    "wrong_sign": "the opposite is right, of the items named",
    "recall_stated": "named, of what the profile states",
    "recall_implied": "named, of what past pairs alone imply",
    "repeats": "repeats per summary",
}
HEADS = {
    "summary_before_rl": "before RL",
    "summary": "after",
    "other_user_summary": "another user's",
    "best_list": "best list",
}


def find_results(workdir: str, split: str, step: int) -> epath.Path:
    """The folder that keeps the results of a split at a step."""
    return epath.Path(workdir) / "results" / f"{split}-{step}"


def write_results(workdir: str, results: dict[str, Any], summaries: list[dict[str, Any]]) -> None:
    """Writes results.json, results.md and summaries.jsonl of one evaluation.

    They are kept in <workdir>/results/<split>-<step>/, and shown in the workdir itself, those of
    another split than test as results_<split>.json and so on. What the workdir shows is not
    replaced by an older step while it is of a later one that is among the checkpoints."""
    split, step, folder = results["split"], results["step"], epath.Path(workdir)
    suffix = "" if split == "test" else f"_{split}"
    named = {
        "results.md": render(results),
        "summaries.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in summaries),
        "results.json": json.dumps(results, indent=2, ensure_ascii=False) + "\n",
    }
    shows = step >= _find_shown_step(folder / f"results{suffix}.json", workdir)
    for name, text in named.items():
        files.write_whole(find_results(workdir, split, step) / name, text)
        if shows:
            stem, kind = name.split(".")
            files.write_whole(folder / f"{stem}{suffix}.{kind}", text)


def _find_shown_step(path: epath.Path, workdir: str) -> int:
    """The step that a results.json is of; -1 if there is none, or no checkpoint is as late: then it
    is of an earlier run in the same workdir."""
    try:
        step = int(json.loads(path.read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1
    return step if step <= max(manager.list_steps(workdir), default=-1) else -1


def render(results: dict[str, Any]) -> str:
    """The content of results.json as Markdown whose table is aligned, so that it reads well on a
    terminal too."""
    rows = [(row["condition"], row) for row in results["rows"]]
    rows += [(f"{name}, generator before RL", row) for name, row in results["before_rl"].items()]
    table = [["condition", "decoding", "accuracy", "pairs", "nats per pair", "context tokens"]]
    for name, r in rows:
        numbers = [_show_accuracy(r), str(r["n"]), f"{r['nats']:.3f}", f"{r['context_tokens']:.1f}"]
        table.append([name, r["decoding"], *numbers])
    parts = [f"# {results['config']['name']}: {results['split']} users at step {results['step']}"]
    parts += [f"**{MADE_DATA}**"] if results["data"] == "sample" else []
    parts += [align_table(table)]
    bayes = [
        f"{value:.3f} {told}"
        for name, told in _BAYES.items()
        if (value := results["bayes"].get(name)) is not None
    ]
    parts += [f"Best accuracy that any model could reach: {', '.join(bayes)}."] if bayes else []
    parts += ["Accuracy ± standard error, clustered by user."]
    parts += _render_diagnosis(
        "Where the loss goes", "nats per pair, greedy", LOSS, results["loss"]
    )
    parts += _render_diagnosis("What summaries name", "greedy", NAMES, results["names"])
    examples = []
    for e in results["examples"]:
        summary = " ".join(e["summary"].split()) or "(empty)"
        examples.append(f"- {e['user_id']}: {summary}\n  (truth: {e['truth'] or 'unknown'})")
    parts += ["\n".join(examples)]
    return "\n\n".join(parts) + "\n"


def _render_diagnosis(
    title: str, corner: str, rows: dict[str, str], found: dict[str, Any]
) -> list[str]:
    """A heading and a table with a column for each condition; rows that no condition has are left
    out."""
    shown = [name for name in rows if any(name in column for column in found.values())]
    if not shown:
        return []
    table = [[corner, *(HEADS[condition] for condition in found)]]
    for name in shown:
        cells = (column.get(name) or {"value": None} for column in found.values())
        table.append([rows[name], *map(_show_estimate, cells)])
    return [f"## {title}", align_table(table)]


def _show_estimate(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return "–"
    error = "" if found["stderr"] is None else f" ± {found['stderr']:.3f}"
    return f"{found['value']:z.3f}{error}"  # z: no minus before a zero


def align_table(rows: list[list[str]]) -> str:
    """A Markdown table, header first, with columns of even width; all but the first two are aligned
    to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    formats = [f"{{:{'<' if i < 2 else '>'}{width}}}" for i, width in enumerate(widths)]
    line = f"| {' | '.join(formats)} |"
    return "\n".join(line.format(*cells) for cells in (rows[0], rule, *rows[1:]))


def _show_accuracy(row: dict[str, Any]) -> str:
    error = "" if row["stderr"] is None else f" ± {row['stderr']:.3f}"
    return f"{row['accuracy']:.3f}{error}"
