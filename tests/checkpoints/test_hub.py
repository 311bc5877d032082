import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from etils import epath
from huggingface_hub import constants

from popi_jax.checkpoints import hub
from popi_jax.errors import UserError
from tests.checkpoints import fake_hub
from tests.checkpoints.fake_hub import FakeHub

ROOT = Path(__file__).parents[2]
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"weights",
    "README.md": b"---\nlicense: mit\n---\n",
    "LICENSE": b"do what you like",
}
UNUSED = {
    "pytorch_model.bin": b"pickled",
    "consolidated.safetensors": b"weights again",
    "onnx/model.safetensors": b"and again",
    "training_args.json": b"{}",
}


@pytest.fixture
def served(tmp_path, monkeypatch) -> Iterator[FakeHub]:
    monkeypatch.chdir(tmp_path)
    with fake_hub.serve(tmp_path / "home") as hub:
        yield hub


def refusal(checkpoint: str, commit: str = "") -> str:
    with pytest.raises(UserError) as failure:
        hub.open_base(checkpoint, commit)
    text = str(failure.value)
    assert text.startswith(f'config.model.checkpoint = "{checkpoint}": ')
    assert "\n" not in text
    return text


def test_a_repository_is_fetched_once_and_only_what_a_model_needs(served):
    commit = served.push("org/name", {**MODEL, **UNUSED})
    found = hub.open_base("org/name")
    assert (found.repository, found.commit) == ("org/name", commit)
    assert {p.name: p.read_bytes() for p in Path(found.folder).iterdir()} == MODEL
    assert sorted(served.list_fetched()) == sorted(MODEL)
    assert hub.open_base("org/name") == hub.open_base("org/name", commit) == found
    assert len(served.list_fetched()) == len(MODEL)


def test_a_run_keeps_to_its_commit_though_its_branch_moves(served):
    first = hub.open_base("org/name@dev", served.push("org/name", MODEL, "dev"))
    moved = served.push("org/name", {**MODEL, "model.safetensors": b"better"}, "dev")
    assert hub.open_base("org/name@dev").commit == moved
    assert hub.open_base("org/name@dev", first.commit) == first
    assert hub.open_base(f"org/name@{first.commit}") == first
    shutil.rmtree(constants.HF_HUB_CACHE)  # on another machine, too
    again = hub.open_base("org/name@dev", first.commit)
    assert (Path(again.folder) / "model.safetensors").read_bytes() == b"weights"
    # and whatever lies in the present folder
    Path("org/name@dev").mkdir(parents=True)
    assert hub.open_base("org/name@dev", first.commit) == again
    assert hub.open_base("org/name@dev") == hub.Origin("org/name@dev")


def test_without_a_network_the_cache_serves(served, monkeypatch):
    served.push("org/name", MODEL)
    found = hub.open_base("org/name")
    asked = len(served.requests)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert hub.open_base("org/name") == hub.open_base("org/name", found.commit) == found
        text = refusal("org/other")
        assert "HF_HUB_OFFLINE is set" in text and "`hf download org/other`" in text
    assert len(served.requests) == asked
    served.stop()
    assert hub.open_base("org/name") == found
    assert "cannot be reached: ConnectError" in refusal("org/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    # what a broken download left is no model
    os.unlink(Path(found.folder) / "model.safetensors")
    assert "nor is it whole in" in refusal("org/name")


def test_what_the_hub_refuses_is_told_with_the_way_out(served):
    served.push("org/name", MODEL)
    text = refusal("org/nmae")
    assert "neither such a folder nor" in text and "set HF_TOKEN or run `hf auth login`" in text
    assert 'no revision "v2"; give a branch, a tag' in refusal("org/name@v2")
    assert f'no revision "{"0" * 40}"' in refusal("org/name", "0" * 40)
    served.push("org/old", {"config.json": b"{}", "pytorch_model.bin": b"pickled"})
    assert "org/old holds no weights as *.safetensors at commit" in refusal("org/old")
    served.gated.add("org/name")
    text = refusal("org/name")
    assert f"its owner must grant access: ask at {served.address}/org/name, then set HF" in text


def test_the_token_of_the_environment_is_sent(served, monkeypatch):
    served.push("org/name", MODEL)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.open_base("org/name")
    assert served.tokens == {"Bearer hf_secret"}


def test_folders_go_before_repositories_and_typos_are_told(served):
    Path("models/base").mkdir(parents=True)
    served.push("models/base", MODEL)
    assert hub.open_base("models/base") == hub.Origin("models/base")
    assert hub.open_base("") == hub.Origin("")
    assert not hub.open_base("models/base").to_json()
    assert not served.requests
    assert 'Did you mean "models/base"?' in refusal("models/bse")
    asked = len(served.requests)
    text = refusal("checkpoints/base")  # the default: never looked for on the hub
    assert "`hf download org/name --local-dir checkpoints/base`" in text
    assert "org/name@revision" in text
    for path in ("models/other/base", "./base", "/base", "base", "a b/c"):
        assert "there is no such folder" in refusal(path)
    Path("models/file").write_text("")
    assert "is a file" in refusal("models/file")
    assert len(served.requests) == asked


def test_planning_fetches_nothing(served):
    served.push("org/name", MODEL)
    assert hub.find_cached("org/name") == hub.find_cached("gs://bucket/x") == ""
    assert not served.requests
    folder = hub.open_base("org/name").folder
    asked = len(served.requests)
    assert hub.find_cached("org/name") == hub.find_cached("org/name@main") == folder
    assert hub.find_cached(folder) == folder
    assert hub.find_cached("org/name@dev") == hub.find_cached(folder + "x") == ""
    assert len(served.requests) == asked


def test_a_folder_in_a_bucket_is_copied_and_followed(served, bucket):
    source = epath.Path(bucket) / "models" / "base"
    source.mkdir(parents=True)
    for name, content in {**MODEL, "pytorch_model.bin": b"pickled"}.items():
        (source / name).write_bytes(content)
    folder = Path(hub.open_base(str(source)).folder)
    shown = {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}
    assert shown == MODEL
    assert hub.find_cached(f"{source}/") == str(folder)
    times = {name: (folder / name).stat().st_mtime_ns for name in MODEL}
    (source / "model.safetensors").write_bytes(b"better weights")
    (source / "LICENSE").unlink()
    assert hub.open_base(str(source)).folder == str(folder)
    assert (folder / "model.safetensors").read_bytes() == b"better weights"
    assert not (folder / "LICENSE").exists()
    assert (folder / "config.json").stat().st_mtime_ns == times["config.json"]
    assert "cannot be read" in refusal(f"{bucket}/models/nothing")
    assert "cannot be read" in refusal("nowhere://bucket/base")


_PROCESS = """
import sys
from popi_jax import distributed
distributed.start()
from popi_jax.checkpoints import hub
open(sys.argv[1], "w").write("\\n".join(hub.open_base(sys.argv[2])))
"""


@pytest.mark.parametrize("homes", [("one", "one"), ("one", "other")], ids=["one disk", "two disks"])
def test_processes_agree_on_a_commit_and_share_a_disk(served, tmp_path, homes):
    commit = served.push("org/name", MODEL)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    own = {"HF_ENDPOINT": served.address, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    own |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = []
    for number, home in enumerate(homes):
        env = os.environ | own | {"HF_HOME": str(tmp_path / home), "JAX_PROCESS_ID": str(number)}
        command = [sys.executable, "-c", _PROCESS, str(tmp_path / str(number)), "org/name"]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE))
    for process in processes:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told.decode()[-2000:]
    for number, home in enumerate(homes):
        folder, repository, found = (tmp_path / str(number)).read_text().split("\n")
        assert (repository, found) == ("org/name", commit)
        assert folder.startswith(str(tmp_path / home))
        assert (Path(folder) / "model.safetensors").read_bytes() == b"weights"
    assert served.requests.count("GET /api/models/org/name") == 1
    assert len(served.list_fetched()) == len(MODEL) * len(set(homes))
    assert not [
        p
        for home in homes
        for p in (tmp_path / home / "hub").iterdir()
        if p.is_file() and p.name != "CACHEDIR.TAG"
    ]
