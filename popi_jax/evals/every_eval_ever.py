"""Cells of a sweep as records of Every Eval Ever (github.com/evaleval/every_eval_ever), schema
0.3.0: one aggregate file of each model and data set, with the metrics of all conditions. The
format's package needs a newer Python than ours, so that the JSON is written here.

Files lie where that project's datastore keeps them: data/<data>/<developer>/<model>/<uuid>.json,
under a folder of ours. Instances are left out: a record of an instance holds prompts and replies,
which cells do not, and data of real people must not be spread by accident."""

import hashlib
import json
import re
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from popi_jax import files
from popi_jax.evals.bootstrap import LEVEL, RESAMPLES, Estimate
from popi_jax.evals.report import Line
from popi_jax.evals.statistics import Row

SCHEMA_VERSION = "0.3.0"
LIBRARY = "popi_jax"
UNKNOWN = "unknown"
DEVELOPER = "local"  # of a model that is in a folder of ours


class Metric(NamedTuple):
    unit: str
    most: float | str  # the highest score
    lower_is_better: bool
    description: str


_MARGIN = "Share of preference pairs whose margin against the reference is above 0; "
_LIKELIHOOD = "Share of preference pairs whose chosen reply has the higher log-prob; "
_BINS = "Expected calibration error of sigmoid(|margin|), ten bins of equal count."
METRICS = {
    "acc": Metric("proportion", 1.0, False, f"{_MARGIN}ties are wrong."),
    "acc_half": Metric("proportion", 1.0, False, f"{_MARGIN}ties count one half."),
    "acc_likelihood": Metric("proportion", 1.0, False, f"{_LIKELIHOOD}ties are wrong."),
    "acc_likelihood_half": Metric("proportion", 1.0, False, f"{_LIKELIHOOD}ties count one half."),
    "nats": Metric("nats", "Infinity", True, "Mean of -log sigmoid(margin) over pairs."),
    "brier": Metric(
        "squared probability", 1.0, True, "Mean of (1 - sigmoid(margin))^2 over pairs."
    ),
    "ece": Metric("proportion", 1.0, True, _BINS),
}


def write_exchange(
    lines: Sequence[Line], out: str, *, organization: str, retrieved: float, version: str = UNKNOWN
) -> list[str]:
    """Writes a file of each model and data set; returns their paths below `out`. Cells that failed
    or are missing are not written.

    Args:
        lines: report.make_lines of the cells.
        organization: who ran the evaluation.
        retrieved: seconds since 1970, the time of the record.
        version: of this code, such as its commit."""
    groups: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        if line.row is not None:
            labels = (str(line.labels[name]) for name in ("model", "step", "data", "split"))
            groups.setdefault(tuple(labels), []).append(line)
    paths = []
    for group in groups.values():
        record = make_record(group, organization, retrieved, version)
        developer, model = record["model_info"]["id"].split("/")
        # the same content has the same name
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).digest()
        name = f"{uuid.UUID(bytes=digest[:16], version=4)}.json"
        data = _name_part(str(group[0].labels["data"]))
        path = "/".join(("data", data, developer, model, name))
        files.write_whole(epath.Path(out) / path, json.dumps(record, indent=2) + "\n")
        paths.append(path)
    return paths


def make_record(
    lines: Sequence[Line], organization: str, retrieved: float, version: str = UNKNOWN
) -> dict[str, Any]:
    """The aggregate record of cells of one model on one data set, all of them scored."""
    labels = lines[0].labels
    model, data = _name_model(labels), _name_part(str(labels["data"]))
    made = any(line.made for line in lines)
    details = {"split": str(labels["split"]), "made_sample_data": str(made).lower()}
    source = {"source_type": "evaluation_run", "source_organization_name": organization}
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": f"{data}/{model}/{retrieved:.0f}",
        "retrieved_timestamp": f"{retrieved:.0f}",
        "source_metadata": source | {"evaluator_relationship": "first_party"},
        "eval_library": {"name": LIBRARY, "version": version},
        "model_info": {
            "name": str(labels["model"]),
            "id": model,
            "additional_details": {
                "deployment_type": "self_deployed",
                "model_availability": UNKNOWN,
                "step": str(labels["step"]),
            },
        },
        "evaluation_results": [
            result
            for line in lines
            if line.row is not None
            for result in _list_results(line, line.row, data, details)
        ],
    }


def _list_results(line: Line, row: Row, data: str, details: dict[str, str]) -> list[dict[str, Any]]:
    condition = {n: str(line.labels[n]) for n in ("condition", "signals", "decoding", "generator")}
    left_out = json.dumps(row.left_out, sort_keys=True)
    told = condition | {"users": str(row.users), "persons": str(row.persons)}
    told |= {"attempted": str(row.attempted), "left_out": left_out, "cell": line.key}
    told |= {"context_tokens": f"{row.context_tokens:.2f}"}
    told |= {"signal_tokens": f"{row.signal_tokens:.2f}"}
    results = []
    for name, metric in METRICS.items():
        estimate: Estimate = getattr(row, name)
        results.append(
            {
                "evaluation_result_id": f"{line.key}/{name}",
                "evaluation_name": "/".join([data, *condition.values()]),
                "source_data": {
                    "dataset_name": str(line.labels["data"]),
                    "source_type": "other",
                    "additional_details": details,
                },
                "metric_config": {
                    "evaluation_description": metric.description,
                    "metric_id": f"{LIBRARY}.{name}",
                    "metric_name": name,
                    "metric_unit": metric.unit,
                    "lower_is_better": metric.lower_is_better,
                    "score_type": "continuous",
                    "min_score": 0.0,
                    "max_score": metric.most,
                },
                "score_details": {
                    "score": estimate.value,
                    "details": told,
                    "uncertainty": _list_uncertainty(estimate, row.n),
                },
            }
        )
    return results


def _list_uncertainty(estimate: Estimate, n: int) -> dict[str, Any]:
    """What is not known is left out."""
    found: dict[str, Any] = {"num_samples": n}
    if estimate.stderr == estimate.stderr:
        method = "linearised ratio estimator, clustered by person"
        found["standard_error"] = {"value": estimate.stderr, "method": method}
    if estimate.low == estimate.low:
        ends = {"lower": estimate.low, "upper": estimate.high, "confidence_level": LEVEL}
        found["confidence_interval"] = ends | {"method": "cluster bootstrap over persons"}
        found["num_bootstrap_samples"] = RESAMPLES
    return found


def _name_model(labels: dict[str, Any]) -> str:
    """ "developer/model": a repository of the hub as it is, else that of a folder of ours."""
    base, step = str(labels["model"]), labels["step"]
    name = base.removeprefix("hf:").partition("@")[0].strip("/")
    if base.startswith("hf:") and name.count("/") == 1 and not base.startswith("hf:/"):
        developer, _, model = name.partition("/")
        return f"{_name_part(developer)}/{_name_part(model)}"
    model = _name_part(name.rpartition("/")[2])
    return f"{DEVELOPER}/{model}-{step}" if step != "" else f"{DEVELOPER}/{model}"


def _name_part(text: str) -> str:
    """A name of a folder on every system; "data" is reserved."""
    part = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII).strip("-.")
    return part if part not in ("", "data") else f"{part}-{LIBRARY}".strip("-")
