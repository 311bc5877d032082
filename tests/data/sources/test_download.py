"""Fetching from a hub on this machine: what lies in the folder afterwards, and what is refused."""

import concurrent.futures
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from popi_jax.data.sources import download
from popi_jax.errors import UserError
from tests.checkpoints import fake_hub
from tests.checkpoints.fake_hub import FakeHub

FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    "data/train.jsonl": b'{"a": 1}\n',
    "data/test.jsonl": b'{"a": 2}\n',
    "data/train.parquet": b"PAR1",
}
NAME = "org/people"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub.serve(tmp_path / "home") as hub:
        hub.large["data/train.jsonl"] = ""
        yield hub


def fetch(folder: Path, revision: str = "", **more: dict[str, str]) -> dict[str, bytes]:
    download.download_hub(folder, NAME, revision, ["data/*.jsonl"], **more)
    return read(folder)


def read(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refusal(folder: Path, kind: type[UserError], revision: str = "", **more: dict[str, str]) -> str:
    with pytest.raises(UserError) as caught:
        fetch(folder, revision, **more)
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    return str(caught.value)


def test_files_lie_under_their_paths_with_a_record(served: FakeHub, tmp_path: Path) -> None:
    commit = served.push(NAME, FILES)
    folder = tmp_path / "deep" / "people"
    found = fetch(folder)
    record = json.loads(found.pop("SOURCE.json"))
    assert found == {name: FILES[name] for name in ("data/train.jsonl", "data/test.jsonl")}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}
    assert record == {"repository": NAME, "commit": commit, "sha256": sums}
    download.check_download(folder, sums)
    download.check_download(folder, sums, commit)
    download.check_download(folder, sums, "main")
    with pytest.raises(UserError, match=f"data.revision.*holds commit {commit}. Give another"):
        download.check_download(folder, sums, "0" * 40)
    with pytest.raises(UserError, match=r"train.jsonl: sha256 is 00, allowed: .*SOURCE.json"):
        download.check_download(folder, {"data/train.jsonl": "00"})
    assert sorted(served.list_fetched()) == ["test.jsonl", "train.jsonl"]
    assert [p.name for p in folder.parent.iterdir()] == ["people"]
    assert folder.stat().st_mode & 0o777 == tmp_path.stat().st_mode & 0o777 | 0o755


def test_a_commit_stays_and_the_branch_moves(served: FakeHub, tmp_path: Path) -> None:
    first = served.push(NAME, FILES)
    served.push(NAME, {**FILES, "data/train.jsonl": b"{}\n"})
    assert fetch(tmp_path / "old", first)["data/train.jsonl"] == b'{"a": 1}\n'
    assert fetch(tmp_path / "new")["data/train.jsonl"] == b"{}\n"
    # an own file beside the others stays
    (tmp_path / "old" / "notes.txt").write_text("mine")
    again = fetch(tmp_path / "old")
    assert again["data/train.jsonl"] == b"{}\n" and again["notes.txt"] == b"mine"


def test_the_cache_serves_without_a_network(
    served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.push(NAME, FILES)
    first = fetch(tmp_path / "first")
    served.stop()
    assert fetch(tmp_path / "second") == first
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(tmp_path / "third") == first


def test_what_cannot_be_had_is_told_with_the_way_out(
    served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "people"
    told = refusal(folder, download.DownloadFailed)
    assert f"org/people: cannot be downloaded: there is no {served.address}/datasets/org/p" in told
    served.push(NAME, FILES)
    assert '"v2" (field data.revision)' in refusal(folder, download.DownloadFailed, "v2")
    with pytest.raises(UserError, match=r"org/people: no file matches \*\.csv at commit"):
        download.download_hub(folder, NAME, "", ["*.csv"])
    served.gated.add(NAME)
    told = refusal(folder, download.DownloadFailed)
    assert f"ask at {served.address}/datasets/org/people, then set HF_TOKEN" in told
    served.stop()
    monkeypatch.setattr(sys.modules[__name__], "NAME", "org/other")  # of which nothing is known
    told = refusal(folder, download.DownloadFailed)
    assert f"{served.address} cannot be reached (" in told and "--repo-type dataset" in told
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(folder, download.DownloadFailed)
    assert not folder.exists()


def test_the_token_of_the_environment_is_sent(
    served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.push(NAME, FILES)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(tmp_path / "people")
    assert served.tokens == {"Bearer hf_secret"}


def test_what_is_not_the_published_file_is_refused(served: FakeHub, tmp_path: Path) -> None:
    served.push(NAME, FILES)
    folder = tmp_path / "people"
    folder.mkdir()
    (folder / "SOURCE.json").write_text("{}")
    known = {"data/test.jsonl": "0" * 64}
    assert f"allowed: {'0' * 64}" in refusal(folder, UserError, known=known)
    served.large["data/train.jsonl"] = "1" * 64
    told = refusal(folder, UserError)
    assert "train.jsonl: the download is not the published file" in told
    assert f"allowed: {'1' * 64}" in told and "Delete " in told
    served.large.clear()
    cached = next((tmp_path / "home").rglob("test.jsonl")).resolve()
    cached.write_bytes(b"damaged")
    assert f"Delete {cached} and download it again." in refusal(folder, UserError)
    assert read(folder) == {"SOURCE.json": b"{}"}
    cached.unlink()
    fetch(folder)


def test_a_folder_that_cannot_be_written_is_told(served: FakeHub, tmp_path: Path) -> None:
    served.push(NAME, FILES)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "people"):
        told = refusal(folder, UserError)
        assert told.startswith(f"{folder}: cannot be written (") and "data.path" in told
    assert not list(tmp_path.glob(".download-*"))


def test_two_at_the_same_time(served: FakeHub, tmp_path: Path) -> None:
    served.push(NAME, FILES)
    folder = tmp_path / "people"
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(fetch, [folder] * 4))
    assert all(content == found[0] for content in found)
    assert not list(tmp_path.glob(".download-*"))
