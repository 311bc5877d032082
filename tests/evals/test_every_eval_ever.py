"""Records of Every Eval Ever, against the required fields of its schema 0.3.0, by hand: its package
needs Python 3.12."""

import json
import re
import uuid
from pathlib import Path
from typing import Any

import pytest

from popi_jax.evals import every_eval_ever, report
from tests.evals.test_report import make_items, make_record, make_records

TOP = {
    *("schema_version", "evaluation_id", "retrieved_timestamp", "source_metadata"),
    *("model_info", "eval_library", "evaluation_results"),
}


def check_texts(details: dict[str, Any]) -> None:
    assert all(isinstance(value, str) for value in details.values()), details


def check_schema(record: dict[str, Any]) -> None:
    """What the schema and the validator of the package ask for."""
    assert set(record) == TOP  # further ones are not allowed
    assert record["schema_version"] == "0.3.0"
    assert isinstance(record["retrieved_timestamp"], str) and isinstance(
        record["evaluation_id"], str
    )
    source = record["source_metadata"]
    assert source["source_type"] == "evaluation_run" and source["source_organization_name"]
    assert source["evaluator_relationship"] == "first_party"
    check_texts(record["eval_library"])
    assert set(record["eval_library"]) == {"name", "version"}
    model = record["model_info"]
    assert model["name"] and re.fullmatch(r"[^/]+/[^/]+", model["id"])
    check_texts(model["additional_details"])
    assert model["additional_details"]["deployment_type"] == "self_deployed"
    assert model["additional_details"]["model_availability"] == "unknown"
    ids = [result["evaluation_result_id"] for result in record["evaluation_results"]]
    assert len(set(ids)) == len(ids) > 0
    names = [
        (r["evaluation_name"], r["metric_config"]["metric_id"])
        for r in record["evaluation_results"]
    ]
    assert len(set(names)) == len(names)
    for result in record["evaluation_results"]:
        check_result(result)


def check_result(result: dict[str, Any]) -> None:
    assert isinstance(result["evaluation_name"], str)
    source = result["source_data"]
    assert source["source_type"] == "other" and isinstance(source["dataset_name"], str)
    check_texts(source["additional_details"])
    config, details = result["metric_config"], result["score_details"]
    assert isinstance(config["lower_is_better"], bool) and config["score_type"] == "continuous"
    most = config["max_score"]
    assert most == "Infinity" or details["score"] <= most
    assert isinstance(details["score"], float) and details["score"] >= config["min_score"] == 0.0
    check_texts(details["details"])
    uncertainty = details["uncertainty"]
    assert isinstance(uncertainty["num_samples"], int)
    if "confidence_interval" in uncertainty:
        ends = uncertainty["confidence_interval"]
        assert ends["lower"] <= details["score"] <= ends["upper"]
        assert ends["confidence_level"] == 0.95 and isinstance(ends["method"], str)
    if "standard_error" in uncertainty:
        assert isinstance(uncertainty["standard_error"]["value"], float)


def write(records: list[Any], out: Path) -> list[Path]:
    lines = report.make_lines(records)
    paths = every_eval_ever.write_exchange(
        lines, str(out), organization="A lab", retrieved=1.8e9, version="0123abc"
    )
    assert sorted(paths) == sorted(str(p.relative_to(out)) for p in out.rglob("*.json"))
    return [out / path for path in paths]


def test_one_record_of_a_model_on_a_data_set(tmp_path: Path):
    records = make_records()
    records += [make_record("summary", make_items(1.0), data="own", model="work/b@70")]
    records += [make_record("summary", make_items(1.0), split="validation")]
    paths = write(records, tmp_path)
    folders = [str(path.parent.relative_to(tmp_path)) for path in paths]
    assert sorted(folders) == [
        "data/own/local/b-800",
        "data/prism/local/tiny-800",
        "data/prism/local/tiny-800",
    ]
    for path in paths:
        assert uuid.UUID(path.stem).version == 4 and str(uuid.UUID(path.stem)) == path.stem
        # NaN is no JSON
        content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
        check_schema(content)
        data, developer, model, _ = content["evaluation_id"].split("/")
        assert path.parent == tmp_path / "data" / data / developer / model
        assert content["model_info"]["id"] == f"{developer}/{model}"


def test_scores_are_those_of_the_table(tmp_path: Path):
    (path,) = write(make_records(), tmp_path)
    results = json.loads(path.read_text())["evaluation_results"]
    lines = [line for line in report.make_lines(make_records()) if line.row]
    assert len(results) == len(lines) * len(every_eval_ever.METRICS)
    for line in lines:
        fields = report.list_line(line)
        for name in every_eval_ever.METRICS:
            (found,) = (r for r in results if r["evaluation_result_id"] == f"{line.key}/{name}")
            details = found["score_details"]
            assert details["score"] == fields[name]
            ends = details["uncertainty"]["confidence_interval"]
            assert (ends["lower"], ends["upper"]) == (fields[f"{name}_low"], fields[f"{name}_high"])
            assert details["uncertainty"]["standard_error"]["value"] == fields[f"{name}_stderr"]
            assert details["details"]["condition"] == line.labels["condition"]
            assert details["uncertainty"]["num_samples"] == fields["n"]


def test_what_is_not_known_is_left_out(tmp_path: Path):
    (path,) = write([make_record("summary", make_items(1.0, persons=1))], tmp_path)
    record = json.loads(path.read_text())
    check_schema(record)
    uncertainty = record["evaluation_results"][0]["score_details"]["uncertainty"]
    assert set(uncertainty) == {"num_samples"}


def test_made_data_are_called_made(tmp_path: Path):
    for kind, told in (("sample", "true"), ("published", "false")):
        (path,) = write([make_record("summary", make_items(1.0), data_kind=kind)], tmp_path / kind)
        (details, *_) = (
            r["source_data"]["additional_details"]
            for r in json.loads(path.read_text())["evaluation_results"]
        )
        assert details["made_sample_data"] == told


@pytest.mark.parametrize(
    ("model", "step", "name"),
    [
        ("work/prism@750", 750, "local/prism-750"),
        ("hf:google/gemma-3-270m@main", "", "google/gemma-3-270m"),
        ("hf:/models/my base", "", "local/my-base"),
        ("gs://bucket/runs/data", 8, "local/data-popi_jax-8"),
    ],
)
def test_names_of_models(model: str, step: Any, name: str) -> None:
    assert every_eval_ever._name_model({"model": model, "step": step}) == name
