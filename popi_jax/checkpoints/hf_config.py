"""config.json of a Hugging Face model -> TransformerConfig, in the spellings of transformers 4 and
5. Refuses whatever transformer.py does not compute, or hf_write.py could not write again."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from popi_jax.errors import UserError
from popi_jax.models.attention import ROPE_KINDS, RopeScaling
from popi_jax.models.transformer import TransformerConfig

LOCAL, GLOBAL = "sliding_attention", "full_attention"
# what transformers calls an activation -> what we call it; the first name of each is written
ACTIVATIONS = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
}


class Family(NamedTuple):
    architecture: str
    switches: dict[str, Any]  # fields of TransformerConfig that all models of the family share
    # The fields that transformers uses, and what it takes for those that a config.json leaves out.
    # Others may be stored and mean nothing, such as Gemma 3's attn_logit_softcapping.
    defaults: dict[str, Any]


GEMMA = {"norm_plus_one": True, "post_norms": True, "embed_scale": True}
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 1e4,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": None,
    "quantization_config": None,
}
_MISTRAL = {
    **_LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_QWEN = {
    **_LLAMA,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA2 = {
    **{name: value for name, value in _LLAMA.items() if name != "hidden_act"},
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "use_bidirectional_attention": None,
}
_GEMMA3 = {
    **{name: value for name, value in _GEMMA2.items() if name != "attn_logit_softcapping"},
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window_pattern": 6,
    "final_logit_softcapping": None,
}
FAMILIES = {  # an export without a named family becomes the first that computes it
    "llama": Family("LlamaForCausalLM", {}, {**_LLAMA, "attention_bias": False, "mlp_bias": False}),
    "mistral": Family("MistralForCausalLM", {}, _MISTRAL),
    "qwen2": Family("Qwen2ForCausalLM", {"qkv_bias": True}, _QWEN),
    "qwen3": Family(
        "Qwen3ForCausalLM", {"qk_norm": True}, {**_QWEN, "head_dim": 128, "attention_bias": False}
    ),
    "gemma2": Family("Gemma2ForCausalLM", GEMMA, _GEMMA2),
    "gemma3_text": Family("Gemma3ForCausalLM", {**GEMMA, "qk_norm": True}, _GEMMA3),
}
# model_type of a whole -> that of the text model under its text_config
MULTIMODAL = {"gemma3": "gemma3_text"}


class Base(NamedTuple):
    """What an export keeps of the folder that a model came from, besides its shape."""

    model_type: str  # a key of FAMILIES
    max_len: int | None  # max_position_embeddings, in tokens
    # tokens that a row may have: max_len, with YaRN factor x original length where that is more
    usable_len: int | None = None
    decoder: str = "model"  # where the class of the folder keeps the decoder


def read_base(folder: str | Path) -> Base:
    """Raises: UserError as `read_config`."""
    path, model_type, c = _read_fields(Path(folder) / "config.json")
    max_len, scaling = _take(path, c, "max_position_embeddings", int), _read_rope(path, c)[1]
    usable = max_len
    if scaling is not None and scaling.kind == "yarn":
        usable = max(max_len, int(scaling.factor * scaling.original_len))
    multimodal = read_json(path)["model_type"] in MULTIMODAL
    return Base(model_type, max_len, usable, "model.language_model" if multimodal else "model")


def read_config(
    folder: str | Path, *, dtype: str = "float32", remat: str = "none"
) -> TransformerConfig:
    """Returns the model that the config.json of a folder describes; the other arguments are of our
    compute.

    Of a folder with a vision tower the text model alone is described. Raises: UserError if the file
    is absent or broken, or describes a model that transformer.py does not compute."""
    path, model_type, c = _read_fields(Path(folder) / "config.json")
    _refuse(path, c)
    heads, embed, layers = (
        _take(path, c, name, int)
        for name in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    biased = "attention_bias" in c and _take(path, c, "attention_bias", bool)
    score_dim = "query_pre_attn_scalar"
    theta, scaling, local_theta = _read_rope(path, c)
    local = _read_local_layers(path, c, layers)
    cfg = TransformerConfig(
        vocab_size=_take(path, c, "vocab_size", int),
        num_layers=layers,
        embed_dim=embed,
        num_heads=heads,
        num_kv_heads=_take(path, c, "num_key_value_heads", int, null=heads),
        head_dim=_take(path, c, "head_dim", int, null=embed // heads),
        mlp_dim=_take(path, c, "intermediate_size", int),
        rope_theta=theta,
        norm_eps=_take(path, c, "rms_norm_eps", float),
        tied_embeddings=_take(path, c, "tie_word_embeddings", bool),
        dtype=dtype,
        remat=remat,
        activation=ACTIVATIONS[c[_name_activation(c)]],
        score_dim=_take(path, c, score_dim, int) if score_dim in c else None,
        attn_logit_softcap=_take_cap(path, c, "attn_logit_softcapping"),
        final_logit_softcap=_take_cap(path, c, "final_logit_softcapping"),
        rope_scaling=scaling,
        sliding_window=_take(path, c, "sliding_window", int) if local else None,
        local_layers=local,
        local_rope_theta=local_theta,
        **{"qkv_bias": biased, "out_bias": biased, **FAMILIES[model_type].switches},
    )
    if not computes(model_type, cfg):
        raise UserError(
            f"{path}: transformers has no {model_type} of this shape, so that it could not be "
            "exported; use a folder that transformers wrote"
        )
    return cfg


def computes(model_type: str, cfg: TransformerConfig) -> bool:
    """Whether the family has the behaviours of `cfg`, and no others, so that its config.json can
    say all of them."""
    if model_type not in FAMILIES:
        return False
    _, switches, fields = FAMILIES[model_type]
    biases = (cfg.qkv_bias, cfg.out_bias)
    one_window = len(set(cfg.local_layers)) < 2 and "sliding_window" in fields
    return (
        all(getattr(cfg, n) == switches.get(n, False) for n in ("qk_norm", *GEMMA))
        and (
            biases == (switches.get("qkv_bias", False), False)
            or ("attention_bias" in fields and biases == (True, True))
        )
        and ("query_pre_attn_scalar" in fields or cfg.score_dim in (None, cfg.head_dim))
        and ("attn_logit_softcapping" in fields or cfg.attn_logit_softcap is None)
        and ("final_logit_softcapping" in fields or cfg.final_logit_softcap is None)
        and ("rope_local_base_freq" in fields) == (cfg.local_rope_theta is not None)
        and ("layer_types" in fields or one_window or not any(cfg.local_layers))
    )


def _read_fields(path: Path) -> tuple[Path, str, dict[str, Any]]:
    """The file, the family, and all fields that it uses."""
    c = read_json(path)
    model_type = c.get("model_type")
    if model_type in list(MULTIMODAL):
        c, model_type = _read_text_fields(path, c), MULTIMODAL[model_type]
    if model_type not in list(FAMILIES):
        known = [*FAMILIES, *MULTIMODAL]
        raise _make_refusal(path, "model_type", model_type, known, "use a dense decoder of these")
    defaults = FAMILIES[model_type].defaults
    return path, model_type, {name: c.get(name, default) for name, default in defaults.items()}


def _read_text_fields(path: Path, c: dict[str, Any]) -> dict[str, Any]:
    text = _take_object(path, c, "text_config")
    whole: dict[str, Any] = {"final_logit_softcapping": None}  # its class caps no logits
    for name in ("quantization_config", "tie_word_embeddings"):
        given = [fields[name] for fields in (c, text) if fields.get(name) is not None]
        if given and given[0] != given[-1]:
            raise UserError(
                f"{path}: {name} is {json.dumps(given[0])}, but {json.dumps(given[-1])} in "
                "text_config, and versions of transformers follow one or the other; make them equal"
            )
        whole |= {name: given[0]} if given else {}
    return text | whole


def _refuse(path: Path, c: dict[str, Any]) -> None:
    if c["quantization_config"] is not None:
        found = c["quantization_config"]
        way_out = "use the folder of the unquantised model"
        raise _make_refusal(path, "quantization_config", found, [None], way_out)
    for name in ("mlp_bias", "use_bidirectional_attention"):
        if c.get(name):
            raise _make_refusal(path, name, c[name], [False], "use a model without it")
    name = _name_activation(c)
    if c[name] not in list(ACTIVATIONS):
        raise _make_refusal(path, name, c[name], ACTIVATIONS, "use a model with one of these")


def _name_activation(c: dict[str, Any]) -> str:
    return "hidden_act" if "hidden_act" in c else "hidden_activation"


def _read_rope(path: Path, c: dict[str, Any]) -> tuple[float, RopeScaling | None, float | None]:
    """Theta and scaling of global layers, theta of local layers (None: as the others)."""
    scaling, parameters = (
        _take_object(path, c, name) for name in ("rope_scaling", "rope_parameters")
    )
    if "rope_local_base_freq" not in c:
        rope, local_theta = scaling or parameters, None  # where there is the first, it is all
        if GLOBAL in rope or LOCAL in rope:
            way_out = "give one for all layers"
            raise _make_refusal(path, "rope_parameters", rope, [{"rope_type": "default"}], way_out)
    else:
        rope, local = _take_object(path, parameters, GLOBAL), _take_object(path, parameters, LOCAL)
        rope = {**rope, **scaling}
        kind = _name_rope(local)
        if kind != "default":
            way_out = "use a model whose local layers are not scaled"
            raise _make_refusal(path, f"rope_type of {LOCAL}", kind, ["default"], way_out)
        local = {"rope_theta": c["rope_local_base_freq"], **local}
        local_theta = _take(path, local, "rope_theta", float)
    theta = _take(path, {"rope_theta": c["rope_theta"], **rope}, "rope_theta", float)
    return theta, _read_scaling(path, rope, c), local_theta


def _name_rope(rope: dict[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _read_scaling(path: Path, rope: dict[str, Any], c: dict[str, Any]) -> RopeScaling | None:
    partial = rope.get("partial_rotary_factor") or c["partial_rotary_factor"] or 1.0
    if partial != 1.0:
        way_out = "use a model that turns whole heads"
        raise _make_refusal(path, "partial_rotary_factor", partial, [1.0], way_out)
    kind, max_len = _name_rope(rope), _take(path, c, "max_position_embeddings", int)
    if kind == "default":
        return None
    if kind not in ROPE_KINDS:
        way_out = "use a model with one of these"
        raise _make_refusal(path, "rope_type", kind, ["default", *ROPE_KINDS], way_out)

    def take(name: str, read: type = float, **null: Any) -> Any:
        if name not in rope and not null:
            raise UserError(
                f"{path}: field '{name}' is missing in rope_scaling; rope_type \"{kind}\" needs it"
            )
        return _take(path, {name: None, **rope}, name, read, **null)

    if kind in ("linear", "dynamic"):
        return RopeScaling(kind, take("factor"))
    original = take("original_max_position_embeddings", int, null=max_len)
    if kind == "llama3":
        low, high = take("low_freq_factor"), take("high_freq_factor")
        return RopeScaling("llama3", take("factor"), low, high, original)
    factor = take("factor", null=max_len / original)
    over, under = take("mscale", null=None), take("mscale_all_dim", null=None)
    growth = 0.1 * math.log(max(factor, 1.0))
    grown = (growth * over + 1.0) / (growth * under + 1.0) if over and under else growth + 1.0
    return RopeScaling(
        "yarn",
        factor,
        original_len=original,
        beta_fast=take("beta_fast", null=32.0),
        beta_slow=take("beta_slow", null=1.0),
        attention_factor=take("attention_factor", null=grown),
        truncate=take("truncate", bool, null=True),
    )


def _read_local_layers(path: Path, c: dict[str, Any], layers: int) -> tuple[bool, ...]:
    if "sliding_window" not in c:
        return ()
    window = c["sliding_window"] if c.get("use_sliding_window", True) else None
    if "layer_types" not in c:
        return (True,) * layers if window is not None else ()
    kinds = c["layer_types"]
    if kinds is None:
        local = tuple(_is_local(path, c, i, window) for i in range(layers))
    elif isinstance(kinds, list) and [k in (LOCAL, GLOBAL) for k in kinds] == [True] * layers:
        local = tuple(kind == LOCAL for kind in kinds)
    else:
        allowed, way_out = [f"{layers} times {LOCAL} or {GLOBAL}"], "use a model with these alone"
        raise _make_refusal(path, "layer_types", kinds, allowed, way_out)
    if any(local) and window is None:
        name = "use_sliding_window" if c["sliding_window"] is not None else "sliding_window"
        raise UserError(
            f"{path}: layer_types has {LOCAL}, but {name} is {json.dumps(c[name])}; say the "
            f"window, or make all layer_types {GLOBAL}"
        )
    return local if any(local) else ()


def _is_local(path: Path, c: dict[str, Any], i: int, window: Any) -> bool:
    """Of layer i, where no layer_types are given."""
    if "max_window_layers" in c:
        first = c["max_window_layers"] and _take(path, c, "max_window_layers", int)
        return window is not None and i >= first
    if "sliding_window_pattern" in c:
        return (i + 1) % _take(path, c, "sliding_window_pattern", int) != 0
    return (i + 1) % 2 != 0


_KINDS = {int: "a whole number above 0", float: "a number above 0", bool: "true or false"}


def _take(path: Path, c: dict[str, Any], name: str, kind: type, **null: Any) -> Any:
    """The value of a field as `kind`; `null`, where given, is what null means."""
    value = c[name]
    if value is None and null:
        return null["null"]
    numbers = (int, float) if kind is float else (int,)
    if kind is bool:
        good = isinstance(value, bool)
    else:
        good = isinstance(value, numbers) and not isinstance(value, bool) and value > 0
    if not good:
        raise UserError(
            f"{path}: {name} is {json.dumps(value)}, must be {_KINDS[kind]}; correct it, or fetch "
            "the file again"
        )
    return kind(value)


def _take_object(path: Path, c: dict[str, Any], name: str) -> dict[str, Any]:
    value = c.get(name) or {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: {name} is {json.dumps(value)}, must be an object or null")
    return value


def _take_cap(path: Path, c: dict[str, Any], name: str) -> float | None:
    return _take(path, c, name, float, null=None) if name in c else None


def _make_refusal(
    path: Path, field: str, found: Any, supported: Iterable[Any], way_out: str
) -> UserError:
    allowed = ", ".join(json.dumps(value) for value in supported)
    return UserError(f"{path}: {field} is {json.dumps(found)}, supported is {allowed}; {way_out}")


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
