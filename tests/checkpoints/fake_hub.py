"""A small hub of models and data sets on this machine; tests see what it was asked for."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants


class FakeHub:
    """Repositories by name: commits, and branches that point to them."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> commit -> files
        self.branches: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.large: dict[str, str] = {}  # files kept as LFS -> the sha256 told of them, "" = theirs
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.address = ""
        self.stop: Callable[[], None] = lambda: None  # then nobody listens at the address

    def push(self, repository: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Returns the commit that the branch then points to."""
        text = repr((repository, sorted(files.items()), branch))
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits.setdefault(repository, {})[commit] = files
        self.branches.setdefault(repository, {})[branch] = commit
        return commit

    def push_folder(self, repository: str, folder: Path) -> str:
        return self.push(repository, {path.name: path.read_bytes() for path in folder.iterdir()})

    def list_fetched(self) -> list[str]:
        """Names of the files whose content was asked for."""
        return [
            path.rpartition("/")[2]
            for path in self.requests
            if re.match("GET /(datasets/)?org/", path)
        ]

    def describe(self, name: str, content: bytes) -> dict[str, object]:
        """A file as the hub lists it, a large one with its sha256."""
        blob = b"blob %d\0" % len(content) + content
        told = {"type": "file", "path": name, "size": len(content)}
        told["oid"] = hashlib.sha1(blob).hexdigest()
        if name not in self.large:
            return told
        oid = self.large[name] or hashlib.sha256(content).hexdigest()
        return told | {"lfs": {"oid": oid, "sha256": oid, "size": len(content), "pointerSize": 100}}

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content."""
        match = re.match(
            r"/(?:api/(?:models|datasets)/|datasets/)?([\w-]+/[\w.-]+)(?:/(\w+)/([^/?]+)/?([^?]*))?",
            path,
        )
        assert match, path
        repository, verb, revision, file = match.groups()
        if repository not in self.commits:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if repository in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        commit = self.branches[repository].get(revision or "main", revision)
        files = self.commits[repository].get(commit)
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if verb == "resolve" and file not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        if verb == "resolve":
            tag = hashlib.sha1(files[file]).hexdigest()
            return 200, {"X-Repo-Commit": commit, "ETag": f'"{tag}"'}, files[file]
        tree = [self.describe(name, content) for name, content in files.items()]
        siblings = [{"rfilename": file["path"], "blobId": file["oid"], **file} for file in tree]
        info = {"id": repository, "sha": commit, "siblings": siblings}
        content = json.dumps(tree if verb == "tree" else info).encode()
        return 200, {"Content-Type": "application/json"}, content


@contextlib.contextmanager
def serve(home: Path) -> Iterator[FakeHub]:
    """A hub for this process, with an empty cache in `home`."""
    hub = FakeHub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            hub.tokens.add(self.headers.get("authorization"))
            status, headers, content = hub.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    hub.stop = stop
    hub.address = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            patch.delenv(name, raising=False)
        patch.setattr(constants, "ENDPOINT", hub.address)
        patch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            hub.address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        patch.setattr(constants, "HF_HOME", str(home))
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        yield hub
    hub.stop()
