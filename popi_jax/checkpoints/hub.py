"""Finds the base model that `model.checkpoint` names: a folder, a folder in a bucket, or a
repository of the Hugging Face hub, at one commit for all processes and for all of a run.

What is not on this disk is fetched first. HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean
what they mean to every user of the hub. Reads no file of a model but knows which ones it needs."""

import concurrent.futures
import fnmatch
import json
import os
import re
import shutil
import uuid
from functools import partial
from pathlib import Path
from typing import NamedTuple

import huggingface_hub as hf
import jax
from absl import logging
from etils import epath
from huggingface_hub import constants, errors
from huggingface_hub.utils import disable_progress_bars

from popi_jax import distributed
from popi_jax.errors import UserError, did_you_mean, disk_is_full

# of the top folder; a model has other weights too, of which `_LEFT` are second copies
FILES = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template*", "*.safetensors", "model.safetensors.index.json"),
    *("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
_LEFT = ("*/*", "consolidated*", "adapter_model.safetensors")
FETCH_S = 24 * 3600  # that the processes wait for the slowest of them

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[^@\s]+)?")
# where `make train` looks for the models of configs/models.py: never a name on the hub
_OURS = "checkpoints"
_COPIED = ".copied.json"  # what a copy of a bucket's folder holds: name -> [bytes, time of change]


class Origin(NamedTuple):
    """Where the files of a base model lie on this host, and what they are elsewhere."""

    folder: str  # "": random weights
    repository: str = ""  # org/name on the hub
    commit: str = ""  # of the repository

    def to_json(self) -> dict[str, str]:
        """What is stored with a run, so that it keeps to this commit; {} where there is none."""
        return {"commit": self.commit} if self.commit else {}


def open_base(checkpoint: str, commit: str = "") -> Origin:
    """Returns the base model on this disk, fetched if it was not there. All processes call it at
    the same point of the program.

    commit: of the hub's repository, where a run has chosen one already; "": the present one of its
    revision, else of its main branch. Raises: UserError when there is no such model, no access to
    it, no network, or no weights in it."""
    if not checkpoint:
        return Origin("")
    if "://" in checkpoint:
        cache = _bucket_cache()
        fetch = partial(_copy_bucket, checkpoint)
        return Origin(distributed.make_once(fetch, cache, "the base weights", FETCH_S))
    commit = distributed.tell_all(
        _find_commit(checkpoint, commit) if distributed.is_main_process() else ""
    )
    if not commit:
        folder = Path(checkpoint)
        if not folder.is_dir():
            raise _refuse(checkpoint, f"process {jax.process_index()} sees no such folder")
        return Origin(str(folder))
    repository, _ = split(checkpoint)
    fetch = partial(_download, checkpoint, repository, commit)
    cache = Path(constants.HF_HUB_CACHE)
    fetched = distributed.make_once(fetch, cache, "the base weights", FETCH_S)
    return Origin(fetched, repository, commit)


def find_cached(checkpoint: str) -> str:
    """The folder on this disk that holds the config.json of a base model, "" if none does; fetches
    nothing."""
    if "://" in checkpoint:
        folder = _place_copy(checkpoint)
    else:
        folder = Path(checkpoint)
        if not folder.is_dir() and _is_repository(checkpoint):
            repository, revision = split(checkpoint)
            found = hf.try_to_load_from_cache(repository, "config.json", revision=revision or None)
            folder = Path(found).parent if isinstance(found, str) else folder
    return str(folder) if (folder / "config.json").is_file() else ""


def split(checkpoint: str) -> tuple[str, str]:
    """ "org/name@revision" -> ("org/name", "revision"); "" is the main branch."""
    repository, _, revision = checkpoint.partition("@")
    return repository, revision


def _is_repository(checkpoint: str) -> bool:
    ours = checkpoint.partition("/")[0] == _OURS
    return _REPOSITORY.fullmatch(checkpoint) is not None and not ours


def _find_commit(checkpoint: str, commit: str) -> str:
    """Returns "" for a folder of this disk. A commit that a run has chosen goes before all else."""
    if commit:
        return commit
    path = Path(checkpoint)
    if path.is_dir():
        return ""
    if path.exists():
        raise _refuse(checkpoint, "is a file, the folder that holds it is needed")
    if not _is_repository(checkpoint):
        fill = f" (`hf download org/name --local-dir {checkpoint}` makes it)"
        fill = fill if checkpoint.startswith(f"{_OURS}/") else ""
        raise _refuse(checkpoint, f"there is no such folder{fill}.{_suggest(path)}")
    repository, revision = split(checkpoint)
    try:
        return hf.HfApi().resolve_revision(repository, revision=revision or None).resolved
    except Exception as e:  # of several libraries, which promise no common type
        raise _explain(checkpoint, e) from e


def _download(checkpoint: str, repository: str, commit: str) -> str:
    if not distributed.is_main_process():
        disable_progress_bars()
    try:
        folder = hf.snapshot_download(
            repository,
            revision=commit,
            allow_patterns=list(FILES),
            ignore_patterns=list(_LEFT),
            library_name="popi_jax",
        )
    except Exception as e:
        raise _explain(checkpoint, e, commit) from e
    if not any(Path(folder).glob("*.safetensors")):
        told = f"{repository} holds no weights as *.safetensors at commit {commit}"
        raise _refuse(checkpoint, f"{told}; name a repository or a revision that does")
    logging.info("Origin weights: %s at commit %s, in %s", repository, commit, folder)
    return folder


def _explain(checkpoint: str, e: Exception, commit: str = "") -> UserError:
    """One line for what the hub, the network or the cache said."""
    if disk_is_full(e):
        raise e
    repository, revision = split(checkpoint)
    endpoint, log_in = constants.ENDPOINT, "set HF_TOKEN or run `hf auth login`"
    status = e.response.status_code if isinstance(e, errors.HfHubHTTPError) else 0
    if isinstance(e, errors.GatedRepoError):
        told = f"its owner must grant access: ask at {endpoint}/{repository}, then {log_in}"
    elif isinstance(e, errors.RepositoryNotFoundError):
        hint = _suggest(Path(checkpoint))
        told = (
            f"there is neither such a folder nor, at {endpoint}, such a repository; check the name,"
            f" or where it is private, {log_in}.{hint}"
        )
    elif isinstance(e, errors.RevisionNotFoundError):
        told = (
            f'{repository} has no revision "{revision or commit}"; give a branch, a tag or a whole '
            f"commit as they stand at {endpoint}/{repository}/commits/main"
        )
    elif status in (401, 403):
        told = f"{endpoint} refuses the token ({status}); {log_in} with one that may read it"
    elif status and status < 500:
        told = f"{endpoint} answers {status}: {_shorten(e)}"
    else:
        off = constants.is_offline_mode()
        why = "HF_HUB_OFFLINE is set" if off else f"{endpoint} cannot be reached: {_shorten(e)}"
        told = (
            f"there is no such folder, nor is it whole in {constants.HF_HUB_CACHE}, and {why}; "
            f"fetch it where there is a network (`hf download {repository}`), or give a folder"
        )
    return _refuse(checkpoint, told)


def _refuse(checkpoint: str, told: str) -> UserError:
    if not _is_repository(checkpoint):
        told = (
            f"{told.rstrip('.')}; give a folder of config.json, tokenizer and safetensors, its "
            "gs:// address, or a repository of the Hugging Face hub as org/name or "
            "org/name@revision"
        )
    return UserError(f'config.model.checkpoint = "{checkpoint}": {told.rstrip()}')


def _suggest(path: Path) -> str:
    """A folder of nearly that name beside the path."""
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    return did_you_mean(str(path), [str(other) for other in beside if other.is_dir()])


def _shorten(e: BaseException) -> str:
    cause = e.__cause__ or e
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"


def _bucket_cache() -> Path:
    return Path(constants.HF_HOME) / "buckets"


def _place_copy(address: str) -> Path:
    return _bucket_cache() / re.sub(r"[^\w.-]+", "--", address.rstrip("/"))


def _copy_bucket(address: str) -> str:
    """Copies the files that are not there yet or have changed; returns the folder."""
    target = _place_copy(address)
    try:
        found = {
            path: [path.stat().length, path.stat().mtime]
            for path in epath.Path(address).iterdir()
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in FILES)
            and not any(fnmatch.fnmatch(path.name, pattern) for pattern in _LEFT)
        }
        if not found:
            raise FileNotFoundError(f"{address} is empty")
        target.mkdir(parents=True, exist_ok=True)
        record = target / _COPIED
        before = json.loads(record.read_text()) if record.is_file() else {}
        wanted = [
            (path, target / path.name)
            for path, what in found.items()
            if before.get(path.name) != what or not (target / path.name).is_file()
        ]
        if wanted:
            size = sum(found[path][0] for path, _ in wanted) / 1e9
            logging.info(
                "Copying %d files of %s to %s: %.1f GB", len(wanted), address, target, size
            )
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            list(threads.map(_copy_file, *zip(*wanted, strict=True)) if wanted else ())
        for gone in before.keys() - {path.name for path in found}:
            (target / gone).unlink(missing_ok=True)
        part = target / f"{_COPIED}.{uuid.uuid4().hex}"
        part.write_text(json.dumps({path.name: what for path, what in found.items()}))
        os.replace(part, record)
    except ImportError as e:
        told = f"{e}; for gs:// it is: .venv/bin/python -m pip install gcsfs"
        raise UserError(f'config.model.checkpoint = "{address}": {told}') from e
    except Exception as e:  # of the file system behind the address, whatever it raises
        if disk_is_full(e):
            raise
        told = "is there such a folder, and may you read it (gcloud auth application-default login)"
        raise UserError(
            f'config.model.checkpoint = "{address}": cannot be read: {told}? {_shorten(e)}'
        ) from e
    return str(target)


def _copy_file(source: epath.Path, target: Path) -> None:
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with source.open("rb") as read, part.open("wb") as write:
            shutil.copyfileobj(read, write, 2**24)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
