import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from popi_jax.checkpoints import hf_config, hf_io, hf_names, hf_write
from popi_jax.errors import UserError
from popi_jax.models.packing import Level
from popi_jax.models.transformer import Transformer, TransformerConfig, get_head, init_boxed, unbox
from tests.oracles_llama import llama_logits

# every size different, so that a swapped axis is seen; two query heads per key head; heads x
# head_dim is not embed_dim
CFG = TransformerConfig(
    vocab_size=37,
    num_layers=2,
    embed_dim=12,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=20,
    rope_theta=500.0,
    norm_eps=1e-4,
    tied_embeddings=False,
)
TIED = dataclasses.replace(CFG, tied_embeddings=True)
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def make_params(cfg: TransformerConfig) -> dict:
    """Random weights, scales away from 1, large enough that small errors show in the logits."""
    params = unbox(jax.jit(lambda key: init_boxed(key, cfg))(jax.random.key(0)))
    noise = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.asarray(x * 1.5 + 0.1 * noise.standard_normal(x.shape), np.float32), params
    )


PARAMS = {cfg: make_params(cfg) for cfg in (CFG, TIED)}


def write(folder: Path, cfg: TransformerConfig = CFG, dtype: str = "float32", **sizes: int) -> Path:
    folder.mkdir(exist_ok=True)
    config = hf_write.make_config(cfg, dtype=dtype, max_len=64, special_ids=IDS)
    config |= {hf_write.MARK: {"role": "generator"}}
    hf_write.write_model(folder, PARAMS[cfg], cfg, config, **sizes)
    return folder


def edit(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v != "drop"})
    )


@functools.partial(jax.jit, static_argnames="cfg")
def padded_logits(params: dict, ids: jax.Array, cfg: TransformerConfig) -> jax.Array:
    one = ids[None], jnp.arange(len(ids))[None], jnp.ones((1, len(ids)), bool)
    hidden, _ = Transformer(cfg).apply({"params": params}, *one, levels=(Level(1, len(ids)),))
    return hidden[0] @ get_head(params, cfg)


def logits(params: dict, cfg: TransformerConfig, ids: np.ndarray) -> np.ndarray:
    return np.asarray(padded_logits(params, jnp.pad(jnp.asarray(ids), (0, 16 - len(ids))), cfg))[
        : len(ids)
    ]


def assert_same(a: dict, b: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("cfg", [CFG, TIED])
def test_the_table_names_each_parameter_once(cfg):
    abstract = unbox(jax.eval_shape(lambda key: init_boxed(key, cfg), jax.random.key(0)))
    leaves = {
        tuple(k.key for k in path): x.shape
        for path, x in jax.tree_util.tree_leaves_with_path(abstract)
    }
    weights = hf_names.list_weights(cfg)
    layers = {w.path: (cfg.num_layers,) if w.stacked else () for w in weights}
    assert {w.path: layers[w.path] + w.shape for w in weights} == leaves
    assert len({w.path for w in weights}) == len({w.name for w in weights}) == len(weights)
    # 9 tensors per layer, embedding, final norm, and the head when it is not the embedding
    assert len(hf_names.list_stored_shapes(cfg)) == 9 * cfg.num_layers + 2 + (
        not cfg.tied_embeddings
    )


@pytest.mark.parametrize("cfg", [CFG, TIED])
def test_names_there_and_back_is_identity(cfg):
    tensors = dict(hf_write.list_tensors(PARAMS[cfg], cfg))
    assert {name: x.shape for name, x in tensors.items()} == hf_names.list_stored_shapes(cfg)
    assert all(x.flags.c_contiguous for x in tensors.values())

    def make_leaf(weight):
        whole = (slice(None),) * (weight.stacked + len(weight.shape))
        read = lambda name, index: iter([(0, tensors[name][index])])  # noqa: E731
        return hf_names.read_part(weight, whole, read, cfg, np.float32)

    assert_same(hf_names.build_tree(make_leaf, cfg), PARAMS[cfg])


def test_a_tree_of_another_model_is_an_error():
    with pytest.raises(ValueError, match="lm_head"):
        list(hf_write.list_tensors(PARAMS[CFG], TIED))
    with pytest.raises(ValueError, match="shape"):
        list(hf_write.list_tensors(PARAMS[CFG], dataclasses.replace(CFG, num_layers=3)))


@pytest.mark.parametrize("cfg", [CFG, TIED])
def test_the_transformer_equals_the_oracle(tmp_path, cfg):
    write(tmp_path, cfg)
    ids = np.random.default_rng(1).integers(0, cfg.vocab_size, 11)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = llama_logits(load_file(tmp_path / "model.safetensors"), config, ids)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits(PARAMS[cfg], cfg, ids), expected, atol=1e-4)


@pytest.mark.parametrize("cfg", [CFG, TIED])
def test_written_and_read_back_is_identity(tmp_path, cfg):
    write(tmp_path, cfg)
    assert hf_config.read_config(tmp_path) == cfg
    assert_same(hf_io.read_params(tmp_path, cfg), PARAMS[cfg])


def test_bfloat16_is_rounded_once(tmp_path):
    write(tmp_path, dtype="bfloat16")
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == ml_dtypes.bfloat16
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), PARAMS[CFG])
    assert_same(hf_io.read_params(tmp_path, CFG), rounded)


def test_shards_hold_at_most_the_given_bytes(tmp_path):
    write(tmp_path, max_shard_bytes=2500)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in tmp_path.glob("model-*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    assert not (tmp_path / "model.safetensors").exists()
    sizes = {
        name: 4 * int(np.prod(shape)) for name, shape in hf_names.list_stored_shapes(CFG).items()
    }
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert index["weight_map"].keys() == sizes.keys()
    for file in files:
        held = load_file(tmp_path / file)
        assert held.keys() == {name for name, where in index["weight_map"].items() if where == file}
        assert len(held) == 1 or sum(x.nbytes for x in held.values()) <= 2500
    assert_same(hf_io.read_params(tmp_path, CFG), PARAMS[CFG])


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": "drop", "dtype": "drop", "rope_scaling": "drop"}
        | {"torch_dtype": "drop"},  # as transformers 5
        {"rope_parameters": "drop", "dtype": "drop"},  # as transformers 4
    ],
)
def test_reads_the_spellings_of_both_versions(tmp_path, fields):
    edit(write(tmp_path), **fields)
    assert hf_config.read_config(tmp_path) == CFG


def test_fields_that_old_files_leave_out(tmp_path):
    edit(
        write(tmp_path),
        head_dim="drop",
        num_key_value_heads="drop",
        tie_word_embeddings="drop",
        rms_norm_eps="drop",
    )
    cfg = hf_config.read_config(tmp_path, dtype="bfloat16", remat="full")
    assert (cfg.head_dim, cfg.num_kv_heads, cfg.tied_embeddings, cfg.norm_eps) == (
        3,
        4,
        False,
        1e-6,
    )
    assert (cfg.dtype, cfg.remat) == ("bfloat16", "full")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "mixtral"},
            'model_type is "mixtral", supported is "llama", "mistral", "qwen2"',
        ),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"mlp_bias": True}, "mlp_bias is true"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}},
            "'low_freq_factor' is missing in rope_scaling; rope_type \"llama3\" needs it",
        ),
        (
            {"rope_parameters": "drop", "rope_scaling": {"type": "longrope", "factor": 2.0}},
            'rope_type is "longrope", supported is "default", "linear", "llama3", "yarn", "dyn',
        ),
        (
            {"quantization_config": {"bits": 4}},
            "quantization_config is .*use the folder of the unquantised model",
        ),
        ({"hidden_size": "many"}, 'hidden_size is "many", must be a whole number above 0'),
        ({"rms_norm_eps": None}, "rms_norm_eps is null, must be a number above 0"),
        ({"tie_word_embeddings": "no"}, 'tie_word_embeddings is "no", must be true or false'),
    ],
)
def test_a_model_that_is_not_supported_is_told(tmp_path, fields, message):
    edit(write(tmp_path), **fields)
    with pytest.raises(UserError, match=message) as error:
        hf_config.read_config(tmp_path)
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.norm.weight"),
            r"1 tensors that no file holds, first model.norm.weight of shape \[12\]",
        ),
        (
            lambda t: t.pop("lm_head.weight"),
            "first lm_head.weight .*; set tie_word_embeddings to true in it if the head is the emb",
        ),
        (
            lambda t: t.update({"model.x": np.ones(1, np.float32)}),
            r"1 tensors are not of .* first model.x of shape \[1\]",
        ),
        (
            lambda t: t.update({"lm_head.weight": np.ones((5, 12), np.float32)}),
            r"lm_head.weight has shape \[5, 12\], config.json says \[37, 12\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(12, np.int64)}),
            "model.norm.weight is I64, allowed",
        ),
    ],
)
def test_weights_that_do_not_fit_are_told(tmp_path, change, message):
    rewrite(write(tmp_path), change)
    with pytest.raises(UserError, match=message):
        hf_io.read_params(tmp_path, CFG)


def test_what_other_writers_add_is_passed_over(tmp_path):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # as some tied models

    rewrite(write(tmp_path, TIED), add)
    assert_same(hf_io.read_params(tmp_path, TIED), PARAMS[TIED])


@pytest.mark.parametrize("row", [0, 36])
def test_a_head_that_is_not_the_embedding_of_a_tied_model_is_refused(tmp_path, row, monkeypatch):
    """Versions of transformers differ in what they do with it."""
    monkeypatch.setattr(hf_io, "BLOCK_ROWS", 4)

    def add(tensors):
        head = tensors["model.embed_tokens.weight"].copy()
        head[row, 11] += 1e-3
        tensors["lm_head.weight"] = head

    rewrite(write(tmp_path, TIED), add)
    message = r"model.safetensors: lm_head.weight is not .*; set tie_word_embeddings to false in .*"
    with pytest.raises(UserError, match=message) as error:
        hf_io.read_params(tmp_path, TIED)
    assert "\n" not in str(error.value)
    # the way out that it names
    edit(tmp_path, tie_word_embeddings=False)
    cfg = hf_config.read_config(tmp_path)
    head = hf_io.read_params(tmp_path, cfg)["lm_head"]["kernel"].T
    assert np.argwhere(head != PARAMS[TIED]["embed"]["embedding"]).tolist() == [[row, 11]]


def test_the_head_of_a_tied_model_may_be_of_another_type(tmp_path):
    def add(tensors):
        table = tensors["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
        tensors["lm_head.weight"] = table
        tensors["model.embed_tokens.weight"] = table.astype(np.float32)

    rewrite(write(tmp_path, TIED), add)
    hf_io.read_params(tmp_path, TIED)


def test_a_whole_file_goes_before_an_index(tmp_path):
    write(tmp_path, max_shard_bytes=2500)
    (tmp_path / hf_io.INDEX).write_text("{}")
    with pytest.raises(UserError, match='the object "weight_map" is missing; fetch'):
        hf_io.read_params(tmp_path, CFG)
    write(tmp_path)
    assert_same(hf_io.read_params(tmp_path, CFG), PARAMS[CFG])


def test_files_that_are_broken_or_absent_are_told(tmp_path):
    with pytest.raises(UserError, match="No such file.*give the folder of a Hugging Face model"):
        hf_config.read_config(tmp_path)
    with pytest.raises(UserError, match="needs model.safetensors"):
        hf_io.read_params(tmp_path, CFG)
    write(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"is cut short: .* ends at byte"):
        hf_io.read_params(tmp_path, CFG)
    weights.unlink()
    write(tmp_path, max_shard_bytes=2500)
    next(tmp_path.glob("model-*")).unlink()
    with pytest.raises(UserError, match=r"model-.*cannot be read"):
        hf_io.read_params(tmp_path, CFG)
    (tmp_path / "config.json").write_text('{"model_type":\n "llama"')
    with pytest.raises(UserError, match="not valid JSON.*line 2"):
        hf_config.read_config(tmp_path)


@pytest.mark.parametrize("cfg", [CFG, TIED])
def test_transformers_computes_the_same_logits_and_tokens(tmp_path, cfg):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    write(tmp_path, cfg, max_shard_bytes=2500)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(model).__name__ == "LlamaForCausalLM"
    ids = np.random.default_rng(1).integers(3, cfg.vocab_size, 9)
    with torch.no_grad():
        expected = model(torch.tensor(ids)[None]).logits[0].numpy()
        continued = model.generate(
            torch.tensor(ids)[None], max_new_tokens=6, do_sample=False, eos_token_id=None
        )[0]
    np.testing.assert_allclose(logits(PARAMS[cfg], cfg, ids), expected, atol=1e-4)
    greedy = list(ids)
    for _ in range(6):
        greedy.append(int(logits(PARAMS[cfg], cfg, np.array(greedy))[-1].argmax()))
    assert greedy == continued.tolist()
