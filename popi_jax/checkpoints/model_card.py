"""The README.md of an exported model: what it is, what it was trained on, under which licence, how
to use it. Measures nothing itself."""

import fnmatch
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import metadata_load

from popi_jax import templates
from popi_jax.config import Config

_ROLES = {
    "inference": (
        "The inference model: it reads a person's raw signals and writes a short summary of "
        "preferences."
    ),
    "generator": (
        "The generator: it answers a prompt given the summary that the inference model wrote."
    ),
}
_KINDS = {
    "sample": """\
> **SAMPLE DATA. This model was trained on MADE people in the format of PRISM, not on PRISM.**
> It shows that the pipeline runs; it says nothing about real people, and no published number
> compares with its scores.""",
    "published": "Trained on the published files of {source}.",
    "own": "Trained on data of the person who ran the training ({source}).",
    "": "Which data were used was not recorded with this run (configured source: {source}).",
}
_SNIPPET = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder that holds inference/ and generator/


def reply(role: str, messages: list[dict[str, str]], max_new_tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/{role}")
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{role}")
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    output = model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


signals = @SIGNALS@
summary = reply(
    "inference",
    @REQUEST@,
    @SUMMARY_LEN@,
)
answer = reply(
    "generator",
    @MESSAGES@,
    @ANSWER_LEN@,
)
print(f"summary: {summary}\\nanswer: {answer}")
"""


_SIGNALS = {  # of the code above
    "profile": "I teach physics at a school and have little time.",
    "survey": "",
    "comments": (),
    "shots": (
        {
            "prompt": "what is a black hole",
            "chosen": "A star's remains, so dense that light cannot leave.",
            "rejected": "Black holes are a fascinating topic! There is so much to say about "
            "them...",
        },
    ),
}
_MARK = "\ue000"  # stands for a summary
_BETWEEN = "\n\n"  # of a system message and the prompt, as data/tokenizer.py joins the two

# what those must know who pass on weights that derive from a model under such a licence, by the
# beginning of its name
_TERMS = {
    "gemma": "Whoever passes them on must pass on the Gemma Terms of Use and the uses that these "
    "forbid too, and say that the weights were changed.",
    "llama": "Whoever passes them on must pass on the Llama Community License too, show the words "
    '"Built with Llama" and begin the name of the model with "Llama".',
}
_NON_COMMERCIAL = "CC-BY-NC-4.0"  # as the licences of data name it
_LICENCE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")


class Licence(NamedTuple):
    """Of a base model, in the words of its README.md: license, license_name, license_link."""

    kind: str = "unknown"  # as the hub lists them
    name: str = ""
    link: str = ""
    files: tuple[str, ...] = ()  # of its folder, which go with all that derives from the model


class BaseModel(NamedTuple):
    """What the weights derive from."""

    place: str  # as model.checkpoint says it; "": nothing
    repository: str = ""  # org/name on the hub
    commit: str = ""
    licence: Licence = Licence()

    def __str__(self) -> str:
        return f"{self.repository} at commit {self.commit}" if self.repository else self.place


class Facts(NamedTuple):
    """What the card says of one export."""

    role: str
    step: int
    num_params: int
    architecture: str  # name of the class in transformers
    data: str  # published, sample, own, or "" when unknown
    licence: str  # of the data
    base: BaseModel
    takes_system: bool = True  # whether the chat template has a place for system messages


def read_licence(folder: str | Path) -> Licence:
    """The licence of a model's folder, as far as it says."""
    root = Path(folder)
    files = sorted(
        path.name
        for path in root.iterdir()
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in _LICENCE_FILES)
    )
    found: dict[str, Any] = {}
    if (root / "README.md").is_file():
        try:
            found = metadata_load(root / "README.md") or {}
        except (ValueError, yaml.YAMLError):  # what it says cannot be known
            found = {}
    kind, name, link = (
        value if isinstance(value := found.get(key), str) else ""
        for key in ("license", "license_name", "license_link")
    )
    return Licence(kind or "unknown", name, link, tuple(files))


def render(config: Config, facts: Facts, results: list[dict[str, Any]], adapter: str = "") -> str:
    """Returns the card of a run's export; `results` are the rows of a table, [] for none.

    adapter: of adapters alone, the name of their folder."""
    source, d = config.data.source, config.data
    base = str(facts.base) or "none: trained from random weights on these data alone"
    tags = ["popi_jax", f"{facts.role}-model", *["sample-data"] * (facts.data == "sample")]
    library = "peft" if adapter else "transformers"
    header = [f"library_name: {library}", "pipeline_tag: text-generation"]
    if facts.base.repository:
        header.append(f"base_model: {facts.base.repository}")
    header += [f"{key}: {json.dumps(value)}" for key, value in _find_licence(facts).items()]
    header.append(f"tags: [{', '.join(tags)}]")
    summary = {
        "base weights": base,
        "data": f"{facts.data or 'not recorded'} (source {source})",
        "checkpoint": f"update {facts.step} of all stages",
        "parameters": f"{facts.num_params:,}, stored as {config.model.dtype}",
        "architecture": facts.architecture,
    }
    lines = [f"| {name} | {value} |" for name, value in summary.items()]
    parts = [
        "\n".join(["---", *header, "---"]),
        f"# {config.name or 'run'}: {facts.role} model",
        _KINDS[facts.data].format(source=source),
        f"{_ROLES[facts.role]} Both were trained on one preference objective with popi_jax.",
        "\n".join(["| | |", "|---|---|", *lines]),
        "## Use",
        *([_render_adapter_use(adapter, facts.base)] if adapter else []),
        "The two models work together; this runs both, from the folder above this one:",
        f"```python\n{_render_snippet(config, facts.takes_system)}```",
        _describe_signals(config),
        f"Training showed at most {d.context_len} tokens of signals, {d.summary_len} of summary,\n"
        f"{d.turn_len} of prompt and {d.answer_len} of answer.",
        "## Results",
        _render_table(results) if results else "This run was not evaluated.",
        "## Training",
        "The settings of the run that differ between experiments:",
        _render_table(_list_settings(config)),
        "## Licence",
        facts.licence,
        _state_base_licence(facts.base),
    ]
    return "\n\n".join(parts) + "\n"


def _describe_signals(config: Config) -> str:
    if template := config.model.signals_template:
        return (
            f"The signals are plain text, as this Jinja template writes it:\n\n{_fence(template)}"
        )
    return (
        "The signals are plain text: `profile:`, `survey:`, `about:` and `wrote:`, `asked:`,\n"
        "`liked:` and `disliked:` lines in this order, several past pairs "
        f"{config.data.pair_layout}\n"
        "(grouped: `disliked:` lines last); what is missing is left out."
    )


def _fence(text: str) -> str:
    """The text as it stands, in a fence that it cannot close."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}jinja\n{text}\n{fence}"


def _render_snippet(config: Config, takes_system: bool) -> str:
    m, data = config.model, config.data
    values = _SIGNALS | {"layout": data.pair_layout}
    signals = templates.render("signals", m.signals_template, values)
    literal = _quote(signals) if m.signals_template else f'"""{signals}"""'
    request = f"signals + {_quote(m.summary_instruction)}"
    if m.summary_system and not takes_system:
        request = f"{_quote(m.summary_system + _BETWEEN)} + {request}"
    messages = f'[{{"role": "user", "content": {request}}}]'
    if m.summary_system and takes_system:
        messages = f"""[
        {{"role": "system", "content": {_quote(m.summary_system)}}},
        {{"role": "user", "content": {request}}},
    ]"""
    return (
        _SNIPPET.replace("@SIGNALS@", literal)
        .replace("@REQUEST@", messages)
        .replace("@MESSAGES@", _render_messages(config, takes_system))
        .replace("@SUMMARY_LEN@", str(data.summary_len))
        .replace("@ANSWER_LEN@", str(data.answer_len))
    )


def _render_messages(config: Config, takes_system: bool) -> str:
    """What the generator is asked, as code."""
    m, asked = config.model, "how do magnets work"
    values = {"instruction": m.answer_instruction, "summary": _MARK, "prompt": asked}
    told = templates.render("answer", m.answer_template, values)
    before, after = told.split(_MARK)
    whole = templates.reads("answer", m.answer_template, "prompt")
    if not takes_system and not whole:
        after += _BETWEEN + asked
    content = f"{_quote(before)} + summary" + (f" + {_quote(after)}" if after else "")
    if whole or not takes_system:
        return f'[{{"role": "user", "content": {content}}}]'
    return f"""[
        {{"role": "system", "content": {content}}},
        {{"role": "user", "content": {_quote(asked)}}},
    ]"""


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _list_settings(config: Config) -> list[dict[str, Any]]:
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


def _find_licence(facts: Facts) -> dict[str, str]:
    """The fields of the header that name the licence: of the base, narrowed by that of the data."""
    base, own = facts.base.licence, ""
    if _NON_COMMERCIAL in facts.licence:
        own = _NON_COMMERCIAL.lower()
    if not facts.base.place:
        return {"license": own} if own else {}
    named = base.name or base.kind
    fields = {"license": base.kind, "license_name": base.name, "license_link": base.link}
    if own and not named.endswith(own):
        fields |= {"license": "other", "license_name": f"{named}-and-{own}"}
    return {key: value for key, value in fields.items() if value}


def _render_adapter_use(adapter: str, base: BaseModel) -> str:
    return (
        f"This folder holds adapters alone. With their base, {base}:\n\n"
        "```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{adapter}")\n```\n\n'
        "The folder beside it holds the same model with the adapters merged into its weights."
    )


def _state_base_licence(base: BaseModel) -> str:
    if not base.place:
        return "The weights derive from no other model."
    kind, name, link, files = base.licence
    if kind == "unknown":
        told = "stay under the licence of that model, which its folder does not name."
    else:
        told = f"stay under its licence: {name or kind}{f' ({link})' if link else ''}."
    terms = [text for known, text in _TERMS.items() if (name or kind).lower().startswith(known)]
    beside = [f"Beside this file: {', '.join(files)}."] if files else []
    return " ".join([f"The weights derive from {base} and {told}", *terms, *beside])


def _render_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table; its columns are the keys of the rows in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [
        columns,
        ["---"] * len(columns),
        *([_render_cell(row.get(c, "")) for c in columns] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _render_cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
