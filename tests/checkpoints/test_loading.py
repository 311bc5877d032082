"""The benchmark of loading runs through on a small model."""

import json
from pathlib import Path

import pytest

from benchmarks import loading
from popi_jax.checkpoints import hf_config
from popi_jax.models.transformer import TransformerConfig

SMALL = TransformerConfig(
    vocab_size=512,
    num_layers=2,
    embed_dim=64,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=96,
    tied_embeddings=False,
)


def test_loading_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "model", tmp_path / "loading.json"
    monkeypatch.setattr(loading, "choose_model", lambda gib: SMALL)
    monkeypatch.setattr(loading, "WORKS", ("read", "load bfloat16"))
    flags = [f"--folder={folder}", "--rounds=1", "--shards=3"]
    assert loading.main([*flags, "--cold", f"--out={out}"]) == 0
    assert len(loading.list_files(folder)) == 3
    assert hf_config.read_config(folder) == SMALL
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| read", "| load bfloat16"]
    (found,) = json.loads(out.read_text())["load bfloat16"]
    assert found["needed_bytes"] == 2 * (2 * 512 * 64 + 2 * (4 * 64 * 32 + 3 * 64 * 96 + 128) + 64)
    assert found["seconds"] > 0 and found["peak_bytes"] > 0
