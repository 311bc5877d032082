"""Fetches published files, all or none, and sees to it that they stay what they were.

SOURCE.json beside the files records where they came from and the sha256 of each; `check_download`
compares the files with it on every later use."""

import hashlib
import http.client
import json
import shutil
import tempfile
import urllib.request
from pathlib import Path

from popi_jax.errors import UserError

RECORD = "SOURCE.json"
TIMEOUT_S = 10  # without any byte received


class DownloadFailed(UserError):
    """The address cannot be reached."""


def download_files(folder: Path, url: str, sha256: dict[str, str]) -> None:
    """Fetches url/<name> of each name into the folder and writes SOURCE.json; files that were there
    are not touched unless all were fetched. sha256: name -> hex, "" where it is not known.

    Raises: DownloadFailed after TIMEOUT_S seconds of silence; UserError when a file is not the
    published one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".download-", dir=folder.parent))
    try:
        found = {name: _fetch(f"{url}/{name}", part / name) for name in sha256}
        for name, expected in sha256.items():
            if expected and found[name] != expected:
                told = f"sha256 of the download is {found[name]}, allowed: {expected}"
                raise UserError(f"{name}: {told}. Download it again.")
        origin = {"url": url, "sha256": found}
        (part / RECORD).write_text(json.dumps(origin, indent=2) + "\n")
        folder.mkdir(exist_ok=True)
        for name in (RECORD, *sha256):
            (part / name).replace(folder / name)
    finally:
        shutil.rmtree(part)


def check_download(folder: Path, sha256: dict[str, str]) -> None:
    """Compares the sha256 of files (name -> hex) with SOURCE.json, where that exists.

    Raises: UserError when a file has changed since it was downloaded."""
    path = folder / RECORD
    if not path.exists():
        return
    try:
        recorded = json.loads(path.read_text())["sha256"]
    except (ValueError, KeyError, TypeError):
        fix = "Delete the file if the data are your own copy."
        raise UserError(f'{path}: found no JSON object with "sha256". {fix}') from None
    for name, found in sha256.items():
        if name in recorded and recorded[name] != found:
            told = f"sha256 is {found}, allowed: {recorded[name]} ({RECORD})"
            fix = f"Delete the data files to download them again, or {RECORD} to use the new ones."
            raise UserError(f"{folder / name}: {told}. {fix}")


def hash_file(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _fetch(url: str, path: Path) -> str:
    """Writes the bytes of `url` to `path`; returns their sha256."""
    from tqdm import tqdm

    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, path.open("wb") as f:
            size = int(response.headers.get("Content-Length", 0))
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := response.read(1 << 20):
                    f.write(block)
                    bar.update(len(block))
    except (OSError, http.client.HTTPException) as e:
        raise DownloadFailed(f"{url}: cannot be downloaded ({' '.join(str(e).split())}).") from None
    written = path.stat().st_size
    if size and written != size:
        raise DownloadFailed(f"{url}: the download stopped at {written} of {size} bytes.")
    return hash_file(path)
