"""Fetches published files, all or none, and sees to it that they stay what they were.

SOURCE.json beside the files records where they came from and the sha256 of each; `check_download`
compares the files with it on every later use. HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE
mean what they mean to every user of the hub."""

import hashlib
import http.client
import json
import os
import shutil
import tempfile
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from popi_jax.data.sources.source import FilesMissing
from popi_jax.errors import UserError, disk_is_full

RECORD = "SOURCE.json"
TIMEOUT_S = 10  # without an answer of the hub, or without any byte of another address


class DownloadFailed(UserError):
    """The files cannot be had from where they are published."""


def fill_folder(
    folder: Path, may_download: bool, fetch: Callable[[], None], *, missing: str, fix: str
) -> Path:
    """Returns the folder when fetch() has put the files there.

    missing: what is not there, like "data files"; fix: what to do without a download. Raises:
    FilesMissing with the reason where nothing may be or can be downloaded."""
    reason = "field data.download is False."
    if may_download:
        try:
            fetch()
            return folder
        except DownloadFailed as e:
            reason = str(e)
    told = f"{folder}: no {missing} (field data.path), and no download: {reason}"
    raise FilesMissing(f"{told} {fix}")


def download_hub(
    folder: Path,
    repository: str,
    revision: str,
    patterns: Sequence[str],
    known: Mapping[str, str] | None = None,
) -> None:
    """Fetches the files of a dataset repository of the Hugging Face hub whose paths match a
    pattern, puts them under these paths into the folder, and writes SOURCE.json. Files that were
    there are not touched unless all were fetched. What was fetched stays in the cache of
    huggingface_hub, so that a stopped download goes on; the folder shares its disk space where it
    can.

    Args:
        repository: org/name. revision: a commit, branch or tag; "" = the present main branch.
        known: path -> sha256 (hex) of files that the source knows.
    Raises: DownloadFailed, one line with the reason and the way out, when the files cannot be had;
    UserError when they are not the published ones."""
    import huggingface_hub as hf

    try:
        commit, cached, published = _fetch(repository, revision, list(patterns))
    except Exception as e:  # of several libraries, which promise no common type
        raise _explain(repository, revision, e) from e
    found = (path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file())
    names = sorted(hf.utils.filter_repo_objects(found, allow_patterns=list(patterns)))
    if not names:
        told = f"no file matches {', '.join(patterns)} at commit {commit}"
        raise UserError(f"{repository}: {told}. Name another commit in data.revision.")
    sums = {name: hash_file(cached / name) for name in names}
    for name, found_sum in sums.items():
        _check_sum(cached / name, found_sum, published.get(name), (known or {}).get(name, ""))
    _place(folder, cached, {"repository": repository, "commit": commit, "sha256": sums})


def download_files(folder: Path, url: str, sha256: dict[str, str]) -> None:
    """Fetches url/<name> of each name into the folder and writes SOURCE.json; files that were there
    are not touched unless all were fetched. sha256: name -> hex, "" where it is not known.

    Raises: DownloadFailed after TIMEOUT_S seconds of silence; UserError when a file is not the
    published one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".download-", dir=folder.parent))
    try:
        for name in sha256:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
        found = {name: _read_url(f"{url}/{name}", part / name) for name in sha256}
        for name, expected in sha256.items():
            if expected and found[name] != expected:
                told = f"sha256 of the download is {found[name]}, allowed: {expected}"
                raise UserError(f"{name}: {told}. Download it again.")
        origin = {"url": url, "sha256": found}
        (part / RECORD).write_text(json.dumps(origin, indent=2) + "\n")
        folder.mkdir(exist_ok=True)
        for name in (RECORD, *sha256):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).replace(folder / name)
    finally:
        shutil.rmtree(part)


def check_download(folder: Path, sha256: Mapping[str, str], revision: str = "") -> None:
    """Compares the sha256 of files (name -> hex) with SOURCE.json, where that exists, and the
    commit, where `revision` is one.

    Raises: UserError when a file has changed since it was downloaded, or is of another commit."""
    path = folder / RECORD
    if not path.exists():
        return
    try:
        record = json.loads(path.read_text())
        recorded, commit = dict(record["sha256"]), str(record.get("commit", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        fix = "Delete the file if the data are your own copy."
        raise UserError(f'{path}: found no JSON object with "sha256". {fix}') from None
    if commit and len(revision) == len(commit) and revision != commit:
        told = f'field "data.revision": found "{revision}", but {folder} holds commit {commit}'
        raise UserError(f"{told}. Give another data.path, or delete the folder.")
    for name, found in sha256.items():
        if name in recorded and recorded[name] != found:
            told = f"sha256 is {found}, allowed: {recorded[name]} ({RECORD})"
            fix = f"Delete the data files to download them again, or {RECORD} to use the new ones."
            raise UserError(f"{folder / name}: {told}. {fix}")


def hash_file(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _fetch(repository: str, revision: str, patterns: list[str]) -> tuple[str, Path, dict[str, Any]]:
    """Returns the commit, its folder in the cache, and path -> what the hub says of the file ({}
    without a network, where the cache serves)."""
    import huggingface_hub as hf

    api, published = hf.HfApi(), dict[str, Any]()
    away: Exception | None = None
    try:  # first, as it neither waits for ever nor tries for half a minute
        info = api.dataset_info(
            repository, revision=revision or None, files_metadata=True, timeout=TIMEOUT_S
        )
        published = {file.rfilename: file for file in info.siblings or ()}
    except hf.errors.HfHubHTTPError as e:
        if e.response.status_code < 500:
            raise
        away = e
    except Exception as e:  # of the network
        away = e
    try:
        commit = api.resolve_revision(
            repository,
            repo_type="dataset",
            revision=revision or None,
            local_files_only=away is not None,
        ).resolved
        folder = hf.snapshot_download(
            repository,
            repo_type="dataset",
            revision=commit,
            allow_patterns=patterns,
            library_name="popi_jax",
            local_files_only=away is not None,
        )
    except Exception:
        if away is None:
            raise
        raise away from None
    return commit, Path(folder), published


def _check_sum(path: Path, found: str, published: Any, known: str) -> None:
    """Raises UserError unless a file in the cache is the one that the hub holds (its sha256,
    or of small files the id of its git blob) and that the source knows."""
    expected = known or (published.lfs.sha256 if published and published.lfs else "")
    if not expected and published and published.blob_id:
        content = path.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        expected = published.blob_id
    if expected and found != expected:
        told = f"its hash is {found}, allowed: {expected}"
        fix = f"Delete {path.resolve()} and download it again."
        raise UserError(f"{path.name}: the download is not the published file: {told}. {fix}")


def _place(folder: Path, cached: Path, record: dict[str, Any]) -> None:
    """Puts the files of the record and the record itself into the folder, all or none as far as a
    file system allows: a new or empty folder appears whole, in another files are replaced one by
    one."""
    part = folder.parent / f".download-{uuid.uuid4().hex}"
    try:
        part.mkdir(parents=True)
        for name in record["sha256"]:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link((cached / name).resolve(), part / name)
            except OSError:  # another disk
                shutil.copyfile(cached / name, part / name)
        (part / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        try:
            part.rename(folder)
        except OSError:  # holds something
            for name in (*record["sha256"], RECORD):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (part / name).replace(folder / name)
    except OSError as e:
        if disk_is_full(e):
            raise
        told = f"cannot be written ({e.strerror or e}; field data.path); give another folder."
        raise UserError(f"{folder}: {told}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _explain(repository: str, revision: str, e: Exception) -> Exception:
    """One line for what the hub, the network or the cache said."""
    from huggingface_hub import constants, errors

    if disk_is_full(e):
        return e
    page, log_in = (
        f"{constants.ENDPOINT}/datasets/{repository}",
        "set HF_TOKEN or run `hf auth login`",
    )
    status = e.response.status_code if isinstance(e, errors.HfHubHTTPError) else 0
    cause = e.__cause__ or e
    shown = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
    if isinstance(e, errors.GatedRepoError):
        told = f"its owner must grant access: ask at {page}, then {log_in}"
    elif isinstance(e, errors.RepositoryNotFoundError):
        told = f"there is no {page}, or it is private: then {log_in}"
    elif isinstance(e, errors.RevisionNotFoundError):
        told = f'there is no revision "{revision}" (field data.revision): see {page}/commits/main'
    elif status in (401, 403):
        told = f"the token is refused ({status}): {log_in} with one that may read it"
    elif status and status < 500:
        told = f"{constants.ENDPOINT} answers {status} ({shown})"
    else:
        off = constants.is_offline_mode()
        why = (
            "HF_HUB_OFFLINE is set" if off else f"{constants.ENDPOINT} cannot be reached ({shown})"
        )
        fetch = (
            f"`hf download --repo-type dataset {repository}` fetches it where there is a network"
        )
        told = f"it is not whole in {constants.HF_HUB_CACHE}, and {why}; {fetch}"
    return DownloadFailed(f"{repository}: cannot be downloaded: {told}.")


def _read_url(url: str, path: Path) -> str:
    """Writes the bytes of `url` to `path`; returns their sha256."""
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
