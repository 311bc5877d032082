"""Released models without their weights: names, shapes, counts and the config.json files that lie
beside them.

released_shapes.json holds name -> shape of every tensor of three models, as `named_parameters` of
transformers 5.23 lists them on the meta device; their bytes add up to those that the published
indexes state."""

import json
import math
from pathlib import Path

import jax
import pytest

from popi_jax.checkpoints import hf_config, hf_names, hf_write
from popi_jax.models.presets import PRESETS
from popi_jax.models.transformer import TransformerConfig, init_boxed, unbox

RELEASED = json.loads((Path(__file__).parent / "released_shapes.json").read_text())
# metadata.total_size of the published index, bfloat16; Gemma's holds a vision tower (SigLIP) and a
# projector too
INDEX_BYTES = {"llama-3.1-8b": 16060522496, "qwen3-8b": 16381470720, "gemma-3-12b": 24374650080}
VISION = {"gemma-3-12b": 416866032 + 1152 * 3840 + 1152}
# sum(p.numel() for p in model.parameters()) of transformers 5.23 on the meta device, tied heads
# counted once
COUNTS = {
    "meta-llama-3-8b": 8030261248,
    "meta-llama-3-70b": 70553706496,
    "llama-3.1-8b": 8030261248,
    "llama-3.1-70b": 70553706496,
    "llama-3.1-405b": 405853388800,
    "llama-3.2-1b": 1235814400,
    "llama-3.2-3b": 3212749824,
    "llama-3.3-70b-instruct": 70553706496,
    "mistral-7b-v0.1": 7241732096,
    "mistral-7b-v0.3": 7248023552,
    "qwen2-0.5b": 494032768,
    "qwen2-1.5b": 1543714304,
    "qwen2-7b": 7615616512,
    "qwen2-72b": 72706203648,
    "qwen2.5-0.5b": 494032768,
    "qwen2.5-1.5b": 1543714304,
    "qwen2.5-3b": 3085938688,
    "qwen2.5-7b": 7615616512,
    "qwen2.5-14b": 14770033664,
    "qwen2.5-32b": 32763876352,
    "qwen2.5-72b": 72706203648,
    "qwen3-0.6b": 596049920,
    "qwen3-1.7b": 1720574976,
    "qwen3-4b": 4022468096,
    "qwen3-8b": 8190735360,
    "qwen3-14b": 14768307200,
    "qwen3-32b": 32762123264,
    "gemma-2-2b": 2614341888,
    "gemma-2-9b": 9241705984,
    "gemma-2-27b": 27227128320,
    "gemma-3-1b": 999885952,
    "gemma-3-4b": 3880263168,
    "gemma-3-12b": 11766034176,
    "gemma-3-27b": 27009346304,
}


@pytest.mark.parametrize("name", RELEASED)
def test_tree_and_published_tensors_map_one_to_one(name: str) -> None:
    cfg, released = PRESETS[name], RELEASED[name]
    published = {tensor: tuple(shape) for tensor, shape in released["once"].items()}
    for i in range(released["layers"]):
        published |= {
            f"model.layers.{i}.{tensor}": tuple(shape)
            for tensor, shape in released["each_layer"].items()
        }
    assert hf_names.list_stored_shapes(cfg) == published
    size = sum(math.prod(shape) for shape in published.values())
    assert 2 * (size + VISION.get(name, 0)) == INDEX_BYTES[name]
    tree = unbox(jax.eval_shape(lambda key: init_boxed(key, cfg), jax.random.key(0)))
    leaves = {
        tuple(k.key for k in path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    assert leaves == {
        w.path: (cfg.num_layers,) * w.stacked + w.shape for w in hf_names.list_weights(cfg)
    }


def count_params(cfg: TransformerConfig) -> int:
    return sum(math.prod(shape) for shape in hf_names.list_stored_shapes(cfg).values())


def test_parameter_counts_are_the_published_ones() -> None:
    assert {name: count_params(cfg) for name, cfg in PRESETS.items()} == COUNTS


LLAMA_31 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_8B = {
    **{
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
    },
    **{
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
    },
    **{
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
}
MISTRAL = {
    **{
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
    },
    **{
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    },
}
GEMMA_12B = {
    **{
        "model_type": "gemma3_text",
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
    },
    **{"num_attention_heads": 16, "num_key_value_heads": 8, "sliding_window": 1024},
}
# the fields that the published files have and that say something of the shape, as they spell them
FILES = {
    "meta-llama-3-8b": {**LLAMA_8B, "rope_theta": 500000.0, "rope_scaling": None},
    "llama-3.1-8b": {
        **LLAMA_8B,
        "rope_theta": 500000.0,
        "rope_scaling": {**LLAMA_31, "rope_type": "llama3"},
    },
    "mistral-7b-v0.1": {
        **MISTRAL,
        "vocab_size": 32000,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    "mistral-7b-v0.3": {
        **MISTRAL,
        "vocab_size": 32768,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "qwen2.5-7b": {
        **{
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
        },
        **{
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rope_theta": 1000000.0,
        },
        **{
            "sliding_window": 131072,
            "use_sliding_window": False,
            "max_window_layers": 28,
            "rms_norm_eps": 1e-6,
        },
        **{"tie_word_embeddings": False, "use_mrope": False},
    },
    "qwen3-8b": {
        **{
            "model_type": "qwen3",
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
        },
        **{
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
        },
        **{
            "rope_theta": 1000000,
            "rope_scaling": None,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        **{
            "max_window_layers": 36,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "attention_bias": False,
        },
    },
    "gemma-2-9b": {
        **{
            "model_type": "gemma2",
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
        },
        **{
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "vocab_size": 256000,
        },
        **{
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_theta": 10000.0,
        },
        **{
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 256,
        },
        **{"sliding_window": 4096, "sliding_window_size": 4096, "rms_norm_eps": 1e-6},
    },
    "gemma-3-1b": {
        **{
            "model_type": "gemma3_text",
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
        },
        **{
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 262144,
        },
        **{
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "query_pre_attn_scalar": 256,
        },
        **{
            "rope_theta": 1000000,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "sliding_window": 512,
        },
        **{
            "sliding_window_pattern": 6,
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-6,
        },
    },
    "gemma-3-12b": {  # the sizes that are missing are those of transformers
        "model_type": "gemma3",
        "text_config": {**GEMMA_12B, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
    },
}


@pytest.mark.parametrize("name", FILES)
def test_config_files_in_both_spellings(name: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(FILES[name]))
    cfg = hf_config.read_config(tmp_path)
    assert cfg == PRESETS[name]
    base = hf_config.read_base(tmp_path)
    config = hf_write.make_config(
        cfg, dtype="bfloat16", max_len=99, special_ids={}, model_type=base.model_type
    )
    assert config["architectures"] == [hf_config.FAMILIES[base.model_type].architecture]
    four = {
        "rope_theta",
        "rope_scaling",
        "rope_local_base_freq",
        "torch_dtype",
        "max_window_layers",
    }
    for left_out in (set(), four, {"rope_parameters", "dtype", "layer_types"}):
        file.write_text(
            json.dumps({key: value for key, value in config.items() if key not in left_out})
        )
        assert hf_config.read_config(tmp_path) == cfg, left_out
    assert hf_config.read_base(tmp_path)[:2] == (base.model_type, 99)


def test_windows_of_some_layers(tmp_path: Path) -> None:
    qwen = {
        **FILES["qwen3-8b"],
        "num_hidden_layers": 4,
        "sliding_window": 7,
        "use_sliding_window": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(qwen | {"max_window_layers": 3}))
    cfg = hf_config.read_config(tmp_path)
    assert (cfg.sliding_window, cfg.local_layers) == (7, (False, False, False, True))
    written = hf_write.make_config(cfg, dtype="float32", max_len=9, special_ids={})
    assert (written["max_window_layers"], written["use_sliding_window"]) == (3, True)
    (tmp_path / "config.json").write_text(
        json.dumps(qwen | {"layer_types": ["chunked_attention"] * 4})
    )
    with pytest.raises(
        hf_config.UserError, match="layer_types is .*chunked_attention.*supported is"
    ):
        hf_config.read_config(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2"])
def test_a_family_that_computes_something_else_is_refused(model_type: str) -> None:
    with pytest.raises(ValueError, match="does not compute"):
        hf_write.make_config(
            PRESETS["qwen3-8b"], dtype="float32", max_len=9, special_ids={}, model_type=model_type
        )
