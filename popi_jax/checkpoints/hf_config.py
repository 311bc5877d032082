"""config.json of Hugging Face models <-> TransformerConfig, in the spellings of transformers 4 and
5.

The only place that knows families by name. Refuses whatever transformer.py does not compute.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from popi_jax.errors import UserError
from popi_jax.models.attention import RopeScaling
from popi_jax.models.transformer import TransformerConfig

LOCAL, GLOBAL = "sliding_attention", "full_attention"
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class Family(NamedTuple):
    architecture: str
    switches: dict[str, Any]  # fields of TransformerConfig that all models of the family share
    defaults: dict[str, Any]  # what transformers takes for fields that a config.json leaves out
    scalings: tuple[str, ...] = ("linear", "llama3")  # of rotary positions


_GEMMA = {"norm_plus_one": True, "post_norms": True, "embed_scale": True}
_GEMMA_DEFAULTS = {
    **{
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
    },
    **{
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "sliding_window": 4096,
    },
    **{
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "rms_norm_eps": 1e-6,
    },
}
FAMILIES = {  # an export without a named family becomes the first that computes it
    "llama": Family("LlamaForCausalLM", {}, {}),
    "mistral": Family("MistralForCausalLM", {}, {"sliding_window": 4096, "num_key_value_heads": 8}),
    "qwen2": Family(
        "Qwen2ForCausalLM", {"qkv_bias": True}, {"sliding_window": 4096, "num_key_value_heads": 32}
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"qk_norm": True},
        {"sliding_window": 4096, "num_key_value_heads": 32, "head_dim": 128},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA,
        {
            **_GEMMA_DEFAULTS,
            "vocab_size": 256000,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {**_GEMMA, "qk_norm": True},
        {**_GEMMA_DEFAULTS, "vocab_size": 262208},
        ("linear",),
    ),
}
MULTIMODAL = {
    "gemma3": "gemma3_text"
}  # model_type of a whole -> that of the text model under its text_config


class Base(NamedTuple):
    """What an export keeps of the folder that a model came from, besides its shape."""

    model_type: str  # a key of FAMILIES
    max_len: int | None  # max_position_embeddings


def read_base(folder: str | Path) -> Base:
    """Raises: UserError as `read_config`."""
    _, c = _text_config(Path(folder) / "config.json")
    return Base(c["model_type"], c.get("max_position_embeddings"))


def read_config(
    folder: str | Path, *, dtype: str = "float32", remat: str = "none", attention: str = "auto"
) -> TransformerConfig:
    """Returns the model that the config.json of a folder describes; the other arguments are of our
    compute.

    Of a folder with a vision tower the text model alone is described. Raises: UserError if the file
    is absent or broken, or describes a model that transformer.py does not compute."""
    path, c = _text_config(Path(folder) / "config.json")
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
            attention=attention,
            activation=_ACTIVATIONS[_activation(c)],
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


def hf_config(
    cfg: TransformerConfig,
    *,
    dtype: str,
    max_len: int,
    special_ids: dict[str, int],
    model_type: str = "",
) -> dict[str, Any]:
    """Returns the config.json of a model, in the spellings of transformers 4 and 5.

    `max_len` is in tokens, `special_ids` maps `bos_token_id`, `eos_token_id`, `pad_token_id` to
    ids; absent means none. `model_type` names the family; "" is the first that computes `cfg`.
    Raises: ValueError if the family does not compute `cfg`."""
    model_type = family_of(cfg, model_type)
    ids = {name: special_ids.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.embed_dim,
        "intermediate_size": cfg.mlp_dim,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": next(name for name, ours in _ACTIVATIONS.items() if ours == cfg.activation),
        "max_position_embeddings": max_len,
        "rms_norm_eps": cfg.norm_eps,
        **_rope_fields(cfg, model_type),
        "tie_word_embeddings": cfg.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
        **ids,
    }
    if model_type == "mistral":
        config["sliding_window"] = cfg.sliding_window
    if model_type in ("qwen2", "qwen3"):
        first = cfg.local_layers.index(True) if cfg.local_layers else cfg.num_layers
        config |= {
            "use_sliding_window": bool(cfg.local_layers),
            "sliding_window": cfg.sliding_window,
        }
        config |= {"max_window_layers": first, "layer_types": _layer_types(cfg)}
    if model_type in ("gemma2", "gemma3_text"):
        config |= {
            "hidden_activation": config["hidden_act"],
            "query_pre_attn_scalar": cfg.score_dim or cfg.head_dim,
            "attn_logit_softcapping": cfg.attn_logit_softcap,
            "final_logit_softcapping": cfg.final_logit_softcap,
            "sliding_window": cfg.sliding_window,
            "layer_types": _layer_types(cfg),
        }
    return config


def family_of(cfg: TransformerConfig, model_type: str = "") -> str:
    """`model_type`, or the first family that computes `cfg`. Raises: ValueError if it does not
    compute it."""
    model_type = model_type or next((name for name in FAMILIES if _computes(name, cfg)), "")
    if not _computes(model_type, cfg):
        raise ValueError(f'no such family, or it does not compute this model: "{model_type}"')
    return model_type


def _computes(model_type: str, cfg: TransformerConfig) -> bool:
    """Whether the family has the behaviours of `cfg`, and no others."""
    if model_type not in FAMILIES:
        return False
    family, gemma = FAMILIES[model_type], model_type in ("gemma2", "gemma3_text")
    names = ("qkv_bias", "qk_norm", *_GEMMA)
    layers = set(cfg.local_layers)
    alternating = gemma or (
        model_type.startswith("qwen") and list(cfg.local_layers) == sorted(cfg.local_layers)
    )
    return (
        all(getattr(cfg, name) == family.switches.get(name, False) for name in names)
        and (gemma or cfg.activation == "silu")
        and (gemma or cfg.score_dim in (None, cfg.head_dim))
        and (gemma or cfg.attn_logit_softcap is None and cfg.final_logit_softcap is None)
        and (cfg.local_rope_theta is not None) == (model_type == "gemma3_text")
        and (alternating or layers <= {False} or (model_type == "mistral" and layers == {True}))
        and (cfg.rope_scaling is None or cfg.rope_scaling.kind in family.scalings)
    )


def _layer_types(cfg: TransformerConfig) -> list[str]:
    return [LOCAL if local else GLOBAL for local in cfg.local_layers or (False,) * cfg.num_layers]


def _rope_fields(cfg: TransformerConfig, model_type: str) -> dict[str, Any]:
    scaling: dict[str, Any] | None = None
    if cfg.rope_scaling is not None:
        scaling = {"rope_type": cfg.rope_scaling.kind, "factor": cfg.rope_scaling.factor}
        if cfg.rope_scaling.kind == "llama3":
            scaling |= {
                "low_freq_factor": cfg.rope_scaling.low_freq_factor,
                "high_freq_factor": cfg.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": cfg.rope_scaling.original_len,
            }
    parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": cfg.rope_theta}
    # transformers 5 takes rope_scaling, where there is one, for the whole of rope_parameters, so it
    # holds theta too
    flat = {
        "rope_theta": cfg.rope_theta,
        "rope_scaling": scaling and parameters,
        "rope_parameters": parameters,
    }
    if model_type != "gemma3_text":
        return flat
    local = {"rope_type": "default", "rope_theta": cfg.local_rope_theta}
    by_kind = {"rope_parameters": {GLOBAL: parameters, LOCAL: local}}
    return flat | by_kind | {"rope_scaling": scaling, "rope_local_base_freq": cfg.local_rope_theta}


def _text_config(path: Path) -> tuple[Path, dict[str, Any]]:
    c = read_json(path)
    if c.get("model_type") in MULTIMODAL and isinstance(c.get("text_config"), dict):
        quantization = {"quantization_config": c.get("quantization_config")}
        c = {**quantization, **c["text_config"], "model_type": MULTIMODAL[c["model_type"]]}
    if c.get("model_type") not in FAMILIES:
        raise _unsupported(path, "model_type", c.get("model_type"), [*FAMILIES, *MULTIMODAL])
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
            raise _unsupported(path, name, c[name], supported)
    if c["model_type"] == "qwen2" and c.get("qkv_bias") is False:
        raise _unsupported(path, "qkv_bias", False, [True])
    if _activation(c) not in _ACTIVATIONS:
        raise _unsupported(path, "hidden_act", _activation(c), _ACTIVATIONS)


def _activation(c: dict[str, Any]) -> str:
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
            raise _unsupported(path, f"rope type of {LOCAL}", local["rope_type"], ["default"])
        local_theta = float(local.get("rope_theta") or c.get("rope_local_base_freq") or 1e4)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None, local_theta
    if kind not in family.scalings:
        raise _unsupported(path, "rope type", kind, ["default", *family.scalings])
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
            raise _unsupported(
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


def _unsupported(path: Path, field: str, found: Any, supported: Iterable[Any]) -> UserError:
    allowed = ", ".join(json.dumps(value) for value in supported)
    return UserError(
        f"{path}: {field} is {json.dumps(found)}, supported is {allowed}; use an unquantised dense decoder"
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
