import json

from popi_jax.evals import quality_report, records
from popi_jax.evals.records import CellRecord

TOLD = {"weights": ["x"], "temperature": 0.0}
ITEM = {"user": "a", "summary": "Short answers.", "tokens": 3, "finished": True}
LABELS = {"model": "work/a", "step": 7, "data": "own", "split": "test"}


def test_each_file_of_summaries_is_measured_once(tmp_path):
    key = records.make_key(TOLD)
    labels = {"writer": "trained", "signals": "all", "decoding": "greedy"}
    header = {"kind": "summaries", "key": key, "status": "done", "labels": labels}
    items = [ITEM | {"signals": "i like short answers"}, ITEM | {"user": "b", "signals": ""}]
    records.write(records.find_file(str(tmp_path), records.SUMMARIES, key), header, items)
    reads = CellRecord({"labels": LABELS, "identity": {"text": {"summaries": TOLD}}}, [])
    gone = CellRecord({"labels": LABELS, "identity": {"text": {"summaries": {"a": 1}}}}, [])
    none = CellRecord({"labels": LABELS, "identity": {"text": {"condition": "oracle"}}}, [])
    failed = CellRecord({"labels": LABELS, "status": "failed"}, [])
    quality_report.write_quality([reads, reads, gone, none, failed], str(tmp_path))
    (line,) = (tmp_path / "summaries.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["key"], row["writer"], row["users"]) == (key, "trained", 2)
    assert (row["distinct"], row["copied"], row["finished"]) == (0.5, 0.5, 1.0)
    assert "| trained" in (tmp_path / "summaries.md").read_text()
    assert (tmp_path / "summaries.csv").read_text().startswith("key,model,step")


def test_a_sweep_without_summaries(tmp_path):
    quality_report.write_quality([], str(tmp_path))
    assert "No cell reads summaries." in (tmp_path / "summaries.md").read_text()
