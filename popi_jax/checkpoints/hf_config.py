"""config.json of a Hugging Face model -> TransformerConfig, in the spellings of transformers 4 and
5. Refuses whatever transformer.py does not compute."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from popi_jax.errors import UserError
from popi_jax.models.attention import RopeScaling
from popi_jax.models.transformer import TransformerConfig

LOCAL, GLOBAL = "sliding_attention", "full_attention"
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class Family(NamedTuple):
    architecture: str
    switches: dict[str, Any]  # fields of TransformerConfig that all models of the family share
    defaults: dict[str, Any]  # what transformers takes for fields that a config.json leaves out
    scalings: tuple[str, ...] = ("linear", "llama3")  # of rotary positions


GEMMA = {"norm_plus_one": True, "post_norms": True, "embed_scale": True}
_GEMMA_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "rms_norm_eps": 1e-6,
}
_GEMMA2_DEFAULTS = {
    **_GEMMA_DEFAULTS,
    "vocab_size": 256000,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3_DEFAULTS = {**_GEMMA_DEFAULTS, "vocab_size": 262208}
_QWEN_DEFAULTS = {"sliding_window": 4096, "num_key_value_heads": 32}
FAMILIES = {  # an export without a named family becomes the first that computes it
    "llama": Family("LlamaForCausalLM", {}, {}),
    "mistral": Family("MistralForCausalLM", {}, {"sliding_window": 4096, "num_key_value_heads": 8}),
    "qwen2": Family("Qwen2ForCausalLM", {"qkv_bias": True}, _QWEN_DEFAULTS),
    "qwen3": Family("Qwen3ForCausalLM", {"qk_norm": True}, {**_QWEN_DEFAULTS, "head_dim": 128}),
    "gemma2": Family("Gemma2ForCausalLM", GEMMA, _GEMMA2_DEFAULTS),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", {**GEMMA, "qk_norm": True}, _GEMMA3_DEFAULTS, ("linear",)
    ),
}
# model_type of a whole -> that of the text model under its text_config
MULTIMODAL = {"gemma3": "gemma3_text"}


class Base(NamedTuple):
    """What an export keeps of the folder that a model came from, besides its shape."""

    model_type: str  # a key of FAMILIES
    max_len: int | None  # max_position_embeddings


def read_base(folder: str | Path) -> Base:
    """Raises: UserError as `read_config`."""
    _, c = _read_text_config(Path(folder) / "config.json")
    return Base(c["model_type"], c.get("max_position_embeddings"))


def read_config(
    folder: str | Path, *, dtype: str = "float32", remat: str = "none"
) -> TransformerConfig:
    """Returns the model that the config.json of a folder describes; the other arguments are of our
    compute.

    Of a folder with a vision tower the text model alone is described. Raises: UserError if the file
    is absent or broken, or describes a model that transformer.py does not compute."""
    path, c = _read_text_config(Path(folder) / "config.json")
    family = FAMILIES[c["model_type"]]
    c = {**family.defaults, **c}
    _refuse(path, c)
    try:
        heads, embed, layers = (
            int(c[n]) for n in ("num_attention_heads", "hidden_size", "num_hidden_layers")
        )
        theta, scaling, local_theta = _read_rope(path, c, family)
        local = _read_local_layers(path, c, layers)
        return TransformerConfig(
            vocab_size=int(c["vocab_size"]),
            num_layers=layers,
            embed_dim=embed,
            num_heads=heads,
            num_kv_heads=int(c.get("num_key_value_heads") or heads),
            head_dim=int(c.get("head_dim") or embed // heads),
            mlp_dim=int(c["intermediate_size"]),
            rope_theta=theta,
            norm_eps=float(c.get("rms_norm_eps", 1e-6)),
            tied_embeddings=bool(c.get("tie_word_embeddings", False)),
            dtype=dtype,
            remat=remat,
            activation=ACTIVATIONS[_find_activation(c)],
            score_dim=c.get("query_pre_attn_scalar"),
            attn_logit_softcap=c.get("attn_logit_softcapping"),
            final_logit_softcap=c.get("final_logit_softcapping"),
            rope_scaling=scaling,
            sliding_window=int(c["sliding_window"]) if local else None,
            local_layers=local,
            local_rope_theta=local_theta,
            **family.switches,
        )
    except KeyError as e:
        raise UserError(
            f"{path}: field {e} is missing; it is needed for a model_type {c['model_type']}"
        ) from e
    except (TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{path}: a field has the wrong type: {e}") from e


def _read_text_config(path: Path) -> tuple[Path, dict[str, Any]]:
    c = read_json(path)
    if c.get("model_type") in MULTIMODAL and isinstance(c.get("text_config"), dict):
        quantization = {"quantization_config": c.get("quantization_config")}
        c = {**quantization, **c["text_config"], "model_type": MULTIMODAL[c["model_type"]]}
    if c.get("model_type") not in FAMILIES:
        raise _make_refusal(path, "model_type", c.get("model_type"), [*FAMILIES, *MULTIMODAL])
    return path, c


def _refuse(path: Path, c: dict[str, Any]) -> None:
    for name, supported in (
        ("attention_bias", [False]),
        ("mlp_bias", [False]),
        ("quantization_config", [None]),
        ("use_bidirectional_attention", [False]),
        ("partial_rotary_factor", [1.0]),
    ):
        if (c.get(name) or supported[0]) not in supported:
            raise _make_refusal(path, name, c[name], supported)
    if c["model_type"] == "qwen2" and c.get("qkv_bias") is False:
        raise _make_refusal(path, "qkv_bias", False, [True])
    if _find_activation(c) not in ACTIVATIONS:
        raise _make_refusal(path, "hidden_act", _find_activation(c), ACTIVATIONS)


def _find_activation(c: dict[str, Any]) -> str:
    return c.get("hidden_activation") or c.get("hidden_act") or "silu"


def _read_rope(
    path: Path, c: dict[str, Any], family: Family
) -> tuple[float, RopeScaling | None, float | None]:
    """Theta and scaling of global layers, theta of local layers (None: as the others)."""
    parameters, old = c.get("rope_parameters") or {}, c.get("rope_scaling") or {}
    by_kind = parameters if GLOBAL in parameters or LOCAL in parameters else {GLOBAL: parameters}
    rope = {**old, **(by_kind.get(GLOBAL) or {})}
    two = c["model_type"] == "gemma3_text"
    theta = float(rope.get("rope_theta") or c.get("rope_theta") or (1e6 if two else 1e4))
    local_theta = None
    if two:
        local = by_kind.get(LOCAL) or {}
        if local.get("rope_type", "default") != "default":
            raise _make_refusal(path, f"rope type of {LOCAL}", local["rope_type"], ["default"])
        local_theta = float(local.get("rope_theta") or c.get("rope_local_base_freq") or 1e4)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None, local_theta
    if kind not in family.scalings:
        raise _make_refusal(path, "rope type", kind, ["default", *family.scalings])
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"])), local_theta
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = int(rope["original_max_position_embeddings"])
    return theta, RopeScaling("llama3", float(rope["factor"]), low, high, original), local_theta


def _read_local_layers(path: Path, c: dict[str, Any], layers: int) -> tuple[bool, ...]:
    model_type, window = c["model_type"], c.get("sliding_window")
    if (
        window is None
        or model_type == "llama"
        or (model_type.startswith("qwen") and not c.get("use_sliding_window"))
    ):
        return ()
    if model_type == "mistral":
        return (True,) * layers
    if c.get("layer_types") is not None:
        unknown = [kind for kind in c["layer_types"] if kind not in (LOCAL, GLOBAL)]
        if unknown or len(c["layer_types"]) != layers:
            raise _make_refusal(
                path, "layer_types", c["layer_types"], [f"{layers} times {LOCAL} or {GLOBAL}"]
            )
        local = tuple(kind == LOCAL for kind in c["layer_types"])
    elif model_type.startswith("qwen"):
        local = tuple(i >= int(c.get("max_window_layers", 28)) for i in range(layers))
    else:
        pattern = (
            2
            if model_type == "gemma2"
            else c.get("sliding_window_pattern", c.get("_sliding_window_pattern", 6))
        )
        local = tuple((i + 1) % int(pattern) != 0 for i in range(layers))
    return local if any(local) else ()


def _make_refusal(path: Path, field: str, found: Any, supported: Iterable[Any]) -> UserError:
    allowed = ", ".join(json.dumps(value) for value in supported)
    return UserError(
        f"{path}: {field} is {json.dumps(found)}, supported is {allowed}; use an unquantised dense "
        "decoder"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Raises: UserError if the file is absent, or holds no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; give the folder of a Hugging Face model") from e
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON: {e}") from e
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value
