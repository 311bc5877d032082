"""Fetches the published PRISM files from the Hugging Face hub, all or none.

The revision is pinned. The sha256 of conversations.jsonl and utterances.jsonl are those that the
hub shows for the commit that last changed them (both are Git LFS files). survey.jsonl is no LFS
file, so that the hub shows none: its sha256 is recorded at the first download. SOURCE.json records
the revision and all three, and `check_source` compares the files with it on every later use. All of
this was read on the hub's pages; no download has been run yet."""

import hashlib
import http.client
import json
import shutil
import tempfile
import urllib.request
from pathlib import Path

from popi_jax.errors import UserError

REPOSITORY = "HannahRoseKirk/prism-alignment"
REVISION = "18ab5cfb37456f4ec8cbc00212ce54cf7b1239f6"
URL = "https://huggingface.co/datasets/{repository}/resolve/{revision}/{name}"
SHA256 = {
    "survey.jsonl": "",  # not shown by the hub
    "conversations.jsonl": "55ec67a194ca59d567b57acaeab813cb30abe801e73f9e495597a77ab674d638",
    "utterances.jsonl": "7829679350031d6678fa42b8106b2d05051bf9feea348a294400347af4a6deb4",
}
SOURCE = "SOURCE.json"
TIMEOUT_S = 10  # without any byte received


class DownloadFailed(UserError):
    """The hub cannot be reached."""


def download_prism(folder: Path, url: str = URL, sha256: dict[str, str] = SHA256) -> None:
    """Fetches the three files and writes SOURCE.json; files that were there are not touched unless
    all were fetched.

    Raises: DownloadFailed after TIMEOUT_S seconds of silence; UserError when a file is not the
    published one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".download-", dir=folder.parent))
    try:
        found = {
            name: _fetch(
                url.format(repository=REPOSITORY, revision=REVISION, name=name), part / name
            )
            for name in sha256
        }
        for name, expected in sha256.items():
            if expected and found[name] != expected:
                raise UserError(
                    f"{name}: sha256 of the download is {found[name]}, allowed: {expected}. Download it again."
                )
        source = {"repository": REPOSITORY, "revision": REVISION, "sha256": found}
        (part / SOURCE).write_text(json.dumps(source, indent=2) + "\n")
        folder.mkdir(exist_ok=True)
        for name in (SOURCE, *sha256):
            (part / name).replace(folder / name)
    finally:
        shutil.rmtree(part)


def check_source(folder: Path, sha256: dict[str, str]) -> None:
    """Compares the sha256 of files (name -> hex) with SOURCE.json, where that exists.

    Raises: UserError when a file has changed since it was downloaded.
    """
    path = folder / SOURCE
    if not path.exists():
        return
    try:
        recorded = json.loads(path.read_text())["sha256"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f'{path}: found no JSON object with "sha256". Delete the file if the data are your own copy.'
        ) from None
    for name, found in sha256.items():
        if name in recorded and recorded[name] != found:
            fix = f"Delete the data files to download them again, or {SOURCE} to use the changed ones."
            raise UserError(
                f"{folder / name}: sha256 is {found}, allowed: {recorded[name]} ({SOURCE}). {fix}"
            )


def sha256_of(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _fetch(url: str, path: Path) -> str:
    """Writes the bytes of `url` to `path`; returns their sha256."""
    from tqdm import tqdm

    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, path.open("wb") as f:
            size = int(response.headers.get("Content-Length", 0))
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := response.read(1 << 20):
                    f.write(block)
                    digest.update(block)
                    bar.update(len(block))
    except (OSError, http.client.HTTPException) as e:
        raise DownloadFailed(f"{url}: cannot be downloaded ({' '.join(str(e).split())}).") from None
    if size and path.stat().st_size != size:
        raise DownloadFailed(
            f"{url}: the download stopped at {path.stat().st_size} of {size} bytes."
        )
    return digest.hexdigest()
