"""Weights read straight onto 8 devices: each part once, none larger than what a device holds; and
back to files."""

import contextlib
import json
import os
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from popi_jax.checkpoints import hf_config, hf_io, hf_names, hf_write
from popi_jax.errors import UserError
from popi_jax.models.attention import RopeScaling
from popi_jax.models.transformer import TransformerConfig, init_boxed, unbox
from popi_jax.sharding import make_mesh
from tests.oracles import plain
from tests.oracles.plain import RULES

SIZES = {
    "num_layers": 2,
    "embed_dim": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "mlp_dim": 20,
}
GEMMA = {
    "norm_plus_one": True,
    "post_norms": True,
    "embed_scale": True,
    "activation": "gelu_tanh",
    "score_dim": 5,
}
LOCAL = {"sliding_window": 3, "local_layers": (True, False)}
CAPS = {"attn_logit_softcap": 5.0, "final_logit_softcap": 3.0}
MODELS = {
    "llama": {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 32), "tied_embeddings": False},
    "mistral": {"sliding_window": 5, "local_layers": (True, True), "tied_embeddings": False},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "tied_embeddings": False},
    "gemma2": {**GEMMA, **LOCAL, **CAPS},
    "gemma3_text": {**GEMMA, **LOCAL, "qk_norm": True, "local_rope_theta": 77.0},
}


def model(name: str) -> TransformerConfig:
    return TransformerConfig(vocab_size=40, **SIZES, **MODELS[name])


def random_params(cfg: TransformerConfig, dtype: np.dtype) -> dict:
    abstract = unbox(jax.eval_shape(partial(init_boxed, cfg=cfg), jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(dtype), abstract)


def write(
    folder: Path,
    params: dict,
    cfg: TransformerConfig,
    model_type: str,
    dtype: str = "bfloat16",
    **rest,
) -> None:
    folder.mkdir(exist_ok=True)
    config = hf_write.make_config(
        cfg, dtype=dtype, max_len=64, special_ids={}, model_type=model_type
    )
    hf_write.write_model(folder, params, cfg, config, **rest)


def abstract_of(cfg: TransformerConfig, dtype: str) -> dict:
    boxed = jax.eval_shape(partial(init_boxed, cfg=cfg), jax.random.key(0))
    layout = plain.shardings(boxed, make_mesh(1, 4, 2), RULES)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), unbox(boxed), layout
    )


@pytest.mark.parametrize("name", MODELS)
def test_import_and_export_are_the_identity_of_every_family(name: str, tmp_path: Path) -> None:
    """File -> sharded arrays -> file, bit for bit in bfloat16, and config.json with it."""
    cfg = model(name)
    write(tmp_path / "a", random_params(cfg, np.float32), cfg, name, max_shard_bytes=2000)
    assert hf_config.read_config(tmp_path / "a") == cfg
    params = hf_io.read_params(tmp_path / "a", cfg, abstract_of(cfg, "float32"))
    write(tmp_path / "b", params, cfg, name, max_shard_bytes=2000)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir()) and len(files) > 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_each_part_is_read_once_and_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = model("qwen2")
    params = random_params(cfg, ml_dtypes.bfloat16)
    write(tmp_path, params, cfg, "qwen2")
    sizes: dict[tuple, list[int]] = {}
    from_file: list[int] = []
    whole, read_lines = hf_names.read_part, hf_io._read_lines

    def spy(weight, *args):
        part = whole(weight, *args)
        sizes.setdefault(weight.path, []).append(part.size)
        return part

    def count(path, file, lines, at):
        read_lines(path, file, lines, at)
        from_file.extend(map(len, lines))

    monkeypatch.setattr(hf_io, "_read_lines", count)
    monkeypatch.setattr(hf_names, "read_part", spy)
    abstract = abstract_of(cfg, "bfloat16")
    found = hf_io.read_params(tmp_path, cfg, abstract)
    monkeypatch.undo()

    def check(path, x, expected, spec):
        assert x.sharding == spec.sharding and x.dtype == spec.dtype
        np.testing.assert_array_equal(np.asarray(x), expected)
        read = sizes[tuple(k.key for k in path)]
        assert sum(read) == x.size, "a part was read twice, or not at all"
        assert max(read) == max(shard.data.size for shard in x.addressable_shards)

    jax.tree_util.tree_map_with_path(check, found, params, abstract)
    assert len(sizes["layers", "mlp", "up", "kernel"]) == 8
    # bytes of bfloat16: nothing was read that nobody holds
    assert sum(from_file) == 2 * sum(x.size for x in jax.tree.leaves(params))


def test_folder_with_a_vision_tower_is_read_as_its_text_model(tmp_path: Path) -> None:
    cfg = model("gemma3_text")
    params = random_params(cfg, np.float32)
    write(tmp_path, params, cfg, "gemma3_text", "float32")
    tensors = load_file(tmp_path / "model.safetensors")
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    for prefix, tower in (("language_model.model.", ""), ("model.language_model.", "model.")):
        renamed = {prefix + name.removeprefix("model."): x for name, x in tensors.items()}
        renamed[f"{tower}vision_tower.vision_model.head.weight"] = np.ones(3, np.float32)
        renamed[f"{tower}multi_modal_projector.mm_soft_emb_norm.weight"] = np.ones(3, np.float32)
        save_file(renamed, tmp_path / "model.safetensors")
        assert hf_config.read_config(tmp_path) == cfg
        jax.tree.map(np.testing.assert_array_equal, hf_io.read_params(tmp_path, cfg), params)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_type_and_cut_is_read_as_numpy_would(
    stored: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks and jobs that end inside of axes, and with heads cut in the middle."""
    monkeypatch.setattr(hf_io, "BLOCK_ROWS", 7)
    monkeypatch.setattr(hf_names, "JOB_BYTES", 99)
    cfg = model("gemma3_text")
    tensors = dict(hf_write.list_tensors(random_params(cfg, np.float32), cfg))
    kind = hf_io.DTYPES.get(stored, np.dtype(np.float16))
    tensors = {name: (x / 8).astype(kind) for name, x in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    found = hf_io.read_params(tmp_path, cfg, abstract_of(cfg, dtype))
    for weight in hf_names.list_weights(cfg):
        x = hf_names.find_leaf(found, weight)
        order = [axis for group in weight.groups for axis in group]
        layers = []
        for name in weight.names(cfg):
            wide = tensors[name].reshape([weight.shape[axis] for axis in order])
            layers.append(wide.transpose(np.argsort(order)).astype(hf_io.DTYPES[dtype]))
        expected = np.stack(layers) if weight.stacked else layers[0]
        np.testing.assert_array_equal(np.asarray(x), expected)

        def read(name, index):
            where = hf_io._open_folder(tmp_path, stack)[name]
            return hf_io._read_blocks(name, where, index, np.dtype(np.float32))

        with contextlib.ExitStack() as stack:  # a cut of every axis, that of head_dim too
            cut = tuple(slice(n // 3, n - n // 4) for n in expected.shape)
            part = hf_names.read_part(weight, cut, read, cfg, np.float32)
        np.testing.assert_array_equal(part.astype(expected.dtype), expected[cut])


def test_what_a_cpu_device_holds_is_the_memory_that_was_filled(tmp_path: Path) -> None:
    """A copy would double the memory of the largest leaf."""
    cfg = model("llama")
    part = hf_names.list_weights(cfg)[0]
    whole = (slice(None),) * len(part.shape)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        zeros = lambda name, index: iter([(0, np.zeros(part.shape, dtype))])  # noqa: B023, E731
        x = hf_names.read_part(part, whole, zeros, cfg, np.dtype(dtype))
        placed = jax.device_put(x, jax.devices()[0])
        assert placed.unsafe_buffer_pointer() == x.ctypes.data


def test_a_file_that_is_cut_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may give less than it was asked for, and at the end nothing."""
    cfg = model("qwen3")
    params = random_params(cfg, np.float32)
    write(tmp_path, params, cfg, "qwen3", "float32")
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, lines, at: preadv(file, [lines[0][:5]], at))
    jax.tree.map(np.testing.assert_array_equal, hf_io.read_params(tmp_path, cfg), params)
    monkeypatch.setattr(os, "preadv", lambda file, lines, at: 0)
    with pytest.raises(UserError, match=r"model.safetensors: ends at byte \d+; fetch it again"):
        hf_io.read_params(tmp_path, cfg)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, dtype: str, bad: float) -> None:
    cfg = model("qwen3")
    params = random_params(cfg, np.float32)
    params["layers"]["attention"]["q_norm"]["scale"][1, 4] = bad
    tensors = dict(hf_write.list_tensors(params, cfg))
    kind = hf_io.DTYPES.get(dtype, np.dtype(np.float16))
    save_file({n: x.astype(kind) for n, x in tensors.items()}, tmp_path / "model.safetensors")
    message = (
        r"model.layers.1.self_attn.q_norm.weight of shape \[6\] holds numbers that are not finite"
    )
    for abstract in (None, abstract_of(cfg, "float32")):
        with pytest.raises(UserError, match=message):
            hf_io.read_params(tmp_path, cfg, abstract)


def test_shards_that_differ_from_the_index_are_refused(tmp_path: Path) -> None:
    cfg = model("llama")
    write(tmp_path, random_params(cfg, np.float32), cfg, "llama", max_shard_bytes=2000)
    file = sorted(tmp_path.glob("model-*"))[1]
    tensors = load_file(file)
    gone = next(iter(tensors))
    save_file(
        {name: x for name, x in tensors.items() if name != gone} | {"x": np.ones(2, np.float32)},
        file,
    )
    with pytest.raises(UserError, match=f"{gone} is missing, model.safetensors.index.json says"):
        hf_io.read_params(tmp_path, cfg)
    save_file(tensors | {"x": np.ones(2, np.float32)}, file)
    with pytest.raises(
        UserError, match=r"x of shape \[2\] is not listed in model.safetensors.index.json"
    ):
        hf_io.read_params(tmp_path, cfg)
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"is cut short: .*weight of shape \[.*\] ends at byte .*, the file at"
    ):
        hf_io.read_params(tmp_path, cfg)
