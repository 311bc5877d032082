import json
import os

import pytest
from etils import epath

from popi_jax import files
from popi_jax.checkpoints.content import Hashes
from popi_jax.errors import UserError


def fill(folder, **contents: str):
    for name, text in contents.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return epath.Path(folder)


def test_content_decides_and_place_does_not(tmp_path):
    hashes = Hashes(tmp_path / "hashes.json", files.write_whole)
    first = hashes.hash_saved(fill(tmp_path / "a", x="1", d__y="2"))
    assert hashes.hash_saved(fill(tmp_path / "b", d__y="2", x="1")) == first
    for changed in ({"x": "1", "d__y": "3"}, {"x": "1", "d__z": "2"}, {"x": "12", "d__y": ""}):
        folder = fill(tmp_path / f"c{len(changed)}{changed}".replace("/", ""), **changed)
        assert hashes.hash_saved(folder) != first


def test_a_folder_is_read_again_only_where_it_changed(tmp_path):
    folder, kept = fill(tmp_path / "a", x="1"), tmp_path / "hashes.json"
    first = Hashes(kept, files.write_whole).hash_saved(folder)
    stored = json.loads(kept.read_text())
    (entry,) = stored.values()
    kept.write_text(json.dumps({name: entry | {"sha256": "kept"} for name in stored}))
    assert Hashes(kept, files.write_whole).hash_saved(folder) == "kept"
    (folder / "x").write_text("22")
    assert Hashes(kept, files.write_whole).hash_saved(folder) not in ("kept", first)
    (folder / "x").write_text("1")
    os.utime(folder / "x", (1, 1))
    assert Hashes(kept, files.write_whole).hash_saved(folder) == first
    kept.write_text("[broken")
    assert Hashes(kept, files.write_whole).hash_saved(folder) == first


def test_a_model_is_its_weights_and_its_shape(tmp_path):
    names = {"model.safetensors": "w", "config.json": "{}"}
    for name, text in names.items():
        (tmp_path / name).write_text(text)
    hashes = Hashes(tmp_path / "kept" / "hashes.json", files.write_whole)
    first = hashes.hash_model(str(tmp_path))
    (tmp_path / "README.md").write_text("about it")
    assert hashes.hash_model(str(tmp_path)) == first
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert hashes.hash_model(str(tmp_path)) != first
    with pytest.raises(UserError, match="no weights there"):
        hashes.hash_model(str(tmp_path / "kept" / "nothing"))
