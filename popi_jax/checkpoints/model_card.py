"""The README.md of an exported model: what it is, what it was trained on, how to use it. Measures
nothing itself."""

import json
from typing import Any

_ROLES = {
    "inference": "The inference model: it reads a person's raw signals and writes a short summary of preferences.",
    "generator": "The generator: it answers a prompt given the summary that the inference model wrote.",
}
_KINDS = {
    "sample": (
        "> **SAMPLE DATA. This model was trained on MADE people in the format of PRISM, not on PRISM.**\n"
        "> It shows that the pipeline runs; it says nothing about real people, and no published number compares with\n"
        "> its scores."
    ),
    "published": "Trained on the published files of {source}.",
    "own": "Trained on data of the person who ran the training ({source}).",
    "": "Which data were used was not recorded with this run (configured source: {source}).",
}
_LICENCES = {
    "prism": (
        "PRISM (arXiv 2404.16019): human-written texts CC-BY-4.0; model responses CC-BY-NC-4.0 under the terms of "
        "their providers, so weights trained on them are for non-commercial use. Do not try to identify participants."
    ),
    "prefeval": "PrefEval (arXiv 2502.09597): CC-BY-NC-4.0, so weights trained on it are for non-commercial use.",
    "jsonl": "Own data: the licence is that of the person who provided them.",
    "sample": "The made data are part of popi_jax and add no conditions.",
}
_SNIPPET = '''from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder that holds inference/ and generator/


def reply(role: str, messages: list[dict[str, str]], max_new_tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/{role}")
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{role}")
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    output = model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


signals = """profile: I teach physics at a school and have little time.
asked: what is a black hole
liked: A star's remains, so dense that light cannot leave.
disliked: Black holes are a fascinating topic! There is so much to say about them..."""
summary = reply("inference", [{"role": "user", "content": signals + @SUMMARY_INSTRUCTION@}], @SUMMARY_LEN@)
answer = reply(
    "generator",
    [
        {"role": "system", "content": @ANSWER_INSTRUCTION@ + summary},
        {"role": "user", "content": "how do magnets work"},
    ],
    @ANSWER_LEN@,
)
print(f"summary: {summary}\\nanswer: {answer}")
'''


def render(
    config: Any,
    *,
    role: str,
    step: int,
    num_params: int,
    architecture: str,
    dtype: str,
    data: str,
    results: list[dict[str, Any]],
) -> str:
    """Returns the card of a run with this `popi_jax.config.Config`.

    `data` is published, sample, own, or "" when unknown; `results` are the rows of a table, [] for
    none."""
    source = config.data.source
    base = config.model.checkpoint or "none: trained from random weights on these data alone"
    licence = _LICENCES["sample" if data == "sample" else source]
    tags = ["popi_jax", f"{role}-model", *(["sample-data"] if data == "sample" else [])]
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [{', '.join(tags)}]\n---",
        f"# {config.name or 'run'}: {role} model",
        _KINDS[data].format(source=source),
        f"{_ROLES[role]} Both were trained on one preference objective with popi_jax.",
        f"""| | |
|---|---|
| base weights | {base} |
| data | {data or "not recorded"} (source {source}) |
| checkpoint | update {step} of all stages |
| parameters | {num_params:,}, stored as {dtype} |
| architecture | {architecture} |""",
        "## Use",
        "The two models work together; this runs both, from the folder above this one:",
        f"```python\n{_snippet(config)}```",
        "The signals are plain text: `profile:`, `survey:`, `about:` and `wrote:`, `asked:`, `liked:` and `disliked:`\n"
        f"lines in this order, several past pairs {config.data.pair_layout} (grouped: `disliked:` lines last); what\n"
        f"is missing is left out. Training showed at most {config.data.context_len} tokens of signals,\n"
        f"{config.data.summary_len} of summary, "
        f"{config.data.turn_len} of prompt and {config.data.answer_len} of answer.",
        "## Results",
        _table(results) if results else "This run was not evaluated.",
        "## Training",
        "The settings of the run that differ between experiments:",
        _table(_settings(config)),
        "## Licence",
        f"{licence}\n\n{_base_licence(config)}",
    ]
    return "\n\n".join(parts) + "\n"


def _snippet(config: Any) -> str:
    model, data = config.model, config.data
    before_summary = f"{model.answer_instruction}\n" if model.answer_instruction else ""
    return (
        _SNIPPET.replace(
            "@SUMMARY_INSTRUCTION@", json.dumps(model.summary_instruction, ensure_ascii=False)
        )
        .replace("@ANSWER_INSTRUCTION@", json.dumps(before_summary, ensure_ascii=False))
        .replace("@SUMMARY_LEN@", str(data.summary_len))
        .replace("@ANSWER_LEN@", str(data.answer_len))
    )


def _settings(config: Any) -> list[dict[str, Any]]:
    values = {
        "seed": config.seed,
        "schedule.phases": ", ".join(config.schedule.phases),
        "warmup.steps": config.warmup.steps,
        "batch": f"{config.batch.users} users x {config.batch.pairs} pairs",
        "generator.objective": config.generator.objective,
        "generator.beta": config.generator.beta,
        "generator.learning_rate": config.generator.learning_rate,
        "inference.group_size": config.inference.group_size,
        "inference.kl_coef": config.inference.kl_coef,
        "inference.learning_rate": config.inference.learning_rate,
    }
    return [{"field": name, "value": value} for name, value in values.items()]


def _base_licence(config: Any) -> str:
    if config.model.checkpoint:
        return f"The weights derive from {config.model.checkpoint} and stay under the licence of that model."
    return "The weights derive from no other model."


def _table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table; its columns are the keys of the rows in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [
        columns,
        ["---"] * len(columns),
        *([_cell(row.get(c, "")) for c in columns] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
