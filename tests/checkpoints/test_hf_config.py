"""config.json as transformers means it: what is left out, what is stored and never used, and that
whatever is read can be written again as the same family."""

import json
from pathlib import Path
from typing import Any

import pytest

from popi_jax.checkpoints import hf_config, hf_write
from popi_jax.errors import UserError
from popi_jax.models.transformer import TransformerConfig

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
MIXED = [LOCAL, GLOBAL, GLOBAL, LOCAL]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def read(folder: Path, model_type: str, **fields: Any) -> TransformerConfig:
    config = SMALL | {"model_type": model_type} | fields
    (folder / "config.json").write_text(json.dumps(config))
    return hf_config.read_config(folder)


BETAS = {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 0.7, "truncate": False}
SCALINGS = [
    YARN,
    YARN | BETAS,
    LLAMA3,
    {"type": "linear", "factor": 2.0},
    {"type": "dynamic", "factor": 2.0},
]
READABLE: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
    {"hidden_act": "gelu_pytorch_tanh"},
    {"hidden_act": "gelu_new", "hidden_activation": "swish"},
    {"attention_bias": True},
    {"sliding_window": 3},
    {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 0},
    {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 3},
    {"sliding_window": 3, "use_sliding_window": True, "layer_types": MIXED},
    {"sliding_window": 3, "layer_types": [GLOBAL] * 4},
    {"sliding_window": 3, "sliding_window_pattern": 2},
    {"query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    {"rope_theta": 77.0, "rope_local_base_freq": 33.0},
    {"rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}},
    *({"rope_scaling": scaling, "rope_theta": 77.0} for scaling in SCALINGS),
]


@pytest.mark.parametrize("model_type", hf_config.FAMILIES)
def test_whatever_is_read_is_written_as_the_same_family(model_type: str, tmp_path: Path) -> None:
    for fields in READABLE:
        cfg = read(tmp_path, model_type, **fields)
        config = hf_write.make_config(
            cfg, dtype="float32", max_len=64, special_ids={}, model_type=model_type
        )
        assert config["model_type"] == model_type
        for left_out in (set(), {"rope_theta", "rope_scaling"}, {"rope_parameters"}):
            kept = {name: value for name, value in config.items() if name not in left_out}
            (tmp_path / "config.json").write_text(json.dumps(kept))
            assert hf_config.read_config(tmp_path) == cfg, (fields, left_out)


UNUSED: dict[str, dict[str, Any]] = {  # transformers 4.57 and 5.24 store them, and compute the same
    "llama": {
        **{"query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0, "sliding_window": 3},
        **{"final_logit_softcapping": 2.0, "layer_types": MIXED, "use_sliding_window": True},
        **{"hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 3.0},
        **{"qkv_bias": True, "original_max_position_embeddings": 7, "max_window_layers": 0},
    },
    "mistral": {"attention_bias": True, "mlp_bias": True, "layer_types": MIXED}
    | {"use_sliding_window": False, "max_window_layers": 0, "final_logit_softcapping": 2.0},
    "qwen2": {"attention_bias": True, "mlp_bias": True, "qkv_bias": False}
    | {"sliding_window": 3, "max_window_layers": 0, "query_pre_attn_scalar": 5},
    "qwen3": {"mlp_bias": True, "sliding_window": 3, "max_window_layers": 1}
    | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 5},
    "gemma2": {"hidden_act": "silu", "mlp_bias": True, "sliding_window_pattern": 3}
    | {"use_sliding_window": False, "max_window_layers": 0, "rope_local_base_freq": 3.0},
    "gemma3_text": {"hidden_act": "silu", "mlp_bias": True, "attn_logit_softcapping": 2.0}
    | {"_sliding_window_pattern": 2, "use_sliding_window": False, "max_window_layers": 0}
    | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3.0}},
}


@pytest.mark.parametrize("model_type", UNUSED)
def test_fields_that_are_stored_and_never_used(model_type: str, tmp_path: Path) -> None:
    plain = read(tmp_path, model_type)
    for name, value in UNUSED[model_type].items():
        assert read(tmp_path, model_type, **{name: value}) == plain, name


# what AutoConfig of transformers 4.57.6 and of 5.24.0 makes of a file with a model_type alone:
# vocab_size, num_layers, embed_dim, num_heads, num_kv_heads, head_dim, mlp_dim; tied, theta, length
ALONE = {
    "llama": ((32000, 32, 4096, 32, 32, 128, 11008), False, 1e4, 2048),
    "mistral": ((32000, 32, 4096, 32, 8, 128, 14336), False, 1e4, 131072),
    "qwen2": ((151936, 32, 4096, 32, 32, 128, 22016), False, 1e4, 32768),
    "qwen3": ((151936, 32, 4096, 32, 32, 128, 22016), False, 1e4, 32768),
    "gemma2": ((256000, 26, 2304, 8, 4, 256, 9216), True, 1e4, 8192),
    "gemma3_text": ((262208, 26, 2304, 8, 4, 256, 9216), True, 1e6, 131072),
}


@pytest.mark.parametrize("model_type", ALONE)
def test_fields_that_are_left_out(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    cfg, base = hf_config.read_config(tmp_path), hf_config.read_base(tmp_path)
    sizes = (cfg.vocab_size, cfg.num_layers, cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads)
    found = ((*sizes, cfg.head_dim, cfg.mlp_dim), cfg.tied_embeddings, cfg.rope_theta, base.max_len)
    assert found == ALONE[model_type]
    caps = {"gemma2": (50.0, 30.0)}.get(model_type, (None, None))
    assert (cfg.attn_logit_softcap, cfg.final_logit_softcap) == caps
    window = None if model_type in ("llama", "qwen2", "qwen3") else 4096
    assert (cfg.sliding_window, cfg.norm_eps) == (window, 1e-6)


def test_of_two_spellings_of_the_rotary_positions_the_older_is_taken(tmp_path: Path) -> None:
    new = {"rope_type": "linear", "factor": 3.0, "rope_theta": 5.0}
    old = {"type": "dynamic", "factor": 2.0}
    cfg = read(tmp_path, "llama", rope_parameters=new, rope_scaling=old, rope_theta=7.0)
    assert (cfg.rope_theta, cfg.rope_scaling) == (7.0, hf_config.RopeScaling("dynamic", 2.0))
    cfg = read(tmp_path, "llama", rope_parameters=new, rope_theta=7.0)
    assert (cfg.rope_theta, cfg.rope_scaling) == (5.0, hf_config.RopeScaling("linear", 3.0))
    by_kind = {GLOBAL: {"rope_theta": 5.0}, LOCAL: {"rope_theta": 9.0}}
    cfg = read(tmp_path, "gemma3_text", rope_parameters=by_kind, rope_scaling=old, rope_theta=7.0)
    assert (cfg.rope_theta, cfg.local_rope_theta) == (5.0, 9.0)
    assert cfg.rope_scaling == hf_config.RopeScaling("dynamic", 2.0)


@pytest.mark.parametrize(
    ("scaling", "usable"),
    [
        (None, 64),
        ({"type": "linear", "factor": 4.0}, 64),
        ({"type": "dynamic", "factor": 4.0}, 64),  # beyond, the frequencies follow the length
        (LLAMA3, 64),
        (YARN, 64),
        (YARN | {"factor": 8.0}, 128),
        ({"type": "yarn", "factor": 4.0}, 256),  # then 64 is the original length
    ],
)
def test_how_long_a_row_may_be(scaling: Any, usable: int, tmp_path: Path) -> None:
    read(tmp_path, "qwen2", rope_scaling=scaling)
    base = hf_config.read_base(tmp_path)
    assert (base.model_type, base.max_len, base.usable_len) == ("qwen2", 64, usable)


def test_a_folder_with_a_vision_tower(tmp_path: Path) -> None:
    text = SMALL | {"model_type": "gemma3_text"}
    plain = read(tmp_path, "gemma3_text")
    assert hf_config.read_base(tmp_path).decoder == "model"
    for whole, inner, tied in (
        ({}, {}, True),
        ({}, {"final_logit_softcapping": 2.0}, True),  # which the whole does not use
        ({"tie_word_embeddings": False}, {}, False),
        ({}, {"tie_word_embeddings": False}, False),
    ):
        config = {"model_type": "gemma3", "text_config": text | inner, **whole}
        (tmp_path / "config.json").write_text(json.dumps(config))
        cfg = hf_config.read_config(tmp_path)
        assert (cfg.tied_embeddings, cfg.final_logit_softcap) == (tied, None)
        assert not tied or cfg == plain
    base = hf_config.read_base(tmp_path)
    assert (base.model_type, base.decoder) == ("gemma3_text", "model.language_model")


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("llama", {"mlp_bias": True}, "mlp_bias is true, supported is false; use a model without"),
        ("mixtral", {}, 'model_type is "mixtral", supported is .*; use a dense decoder of these'),
        (["llama"], {}, r'model_type is \["llama"\]'),
        ("gemma3", {"text_config": 3}, "text_config is 3, must be an object"),
        (
            "gemma3",
            {"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": False},
            "tie_word_embeddings is false, but true in text_config, .*; make them equal",
        ),
        (
            "gemma3",
            {"text_config": {"quantization_config": {"bits": 4}}},
            "quantization_config is .*; use the folder of the unquantised model",
        ),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is"),
        ("gemma2", {"hidden_activation": "relu"}, 'hidden_activation is "relu", supported is "si'),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, supported is 1"),
        ("llama", {"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "'factor' is missing in rope_scaling"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0, must be a numb"),
        ("llama", {"rope_scaling": "linear"}, 'rope_scaling is "linear", must be an object'),
        ("llama", {"rope_theta": None}, "rope_theta is null, must be a number above 0"),
        (
            "qwen3",
            {"rope_parameters": {GLOBAL: {"rope_type": "default"}}},
            "rope_parameters is .*; give one for all layers",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {LOCAL: {"rope_type": "linear", "factor": 2.0}}},
            "rope_type of sliding_attention is .*; use a model whose local layers are not scaled",
        ),
        (
            "qwen2",
            {"layer_types": MIXED, "sliding_window": 3},
            "layer_types has sliding_attention, but use_sliding_window is false; say the window",
        ),
        (
            "gemma2",
            {"sliding_window": None},
            "layer_types has sliding_attention, but sliding_window is null; say the window",
        ),
        ("qwen2", {"layer_types": [GLOBAL]}, "layer_types is .*, supported is .*4 times"),
        ("qwen2", {"layer_types": 4}, "layer_types is 4, supported is .*4 times"),
        ("qwen2", {"max_window_layers": "x"}, 'max_window_layers is "x", must be a whole number'),
    ],
)
def test_what_is_refused_when_it_is_read(
    model_type: Any, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, model_type, **fields)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert "\n" not in str(error.value)
