"""TransformerConfig rows of released models, by the names of their folders on Hugging Face in small
letters.

Text models alone: the counts of Gemma 3 from 4B on leave the vision tower out. A run reads its
shape from its local folder; these rows are for planning and for tests without weights."""

from typing import Any

from popi_jax.models.attention import RopeScaling
from popi_jax.models.transformer import TransformerConfig

_LLAMA_31 = RopeScaling("llama3", 8.0)
_LLAMA_32 = RopeScaling("llama3", 32.0)


def _row(sizes: tuple[int, ...], **rest: Any) -> TransformerConfig:
    embed, mlp, layers, heads, kv_heads, head_dim = sizes
    return TransformerConfig(
        num_layers=layers,
        embed_dim=embed,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=mlp,
        **rest,
    )


def _llama(
    *sizes: int, scaling: RopeScaling | None = None, tied: bool = False
) -> TransformerConfig:
    fixed: dict[str, Any] = {"vocab_size": 128256, "rope_theta": 500000.0, "norm_eps": 1e-5}
    return _row(sizes, **fixed, rope_scaling=scaling, tied_embeddings=tied)


def _mistral(vocab: int, theta: float, window: int | None) -> TransformerConfig:
    local = (True,) * 32 if window else ()
    fixed: dict[str, Any] = {"norm_eps": 1e-5, "tied_embeddings": False}
    rest: dict[str, Any] = {
        "vocab_size": vocab,
        "rope_theta": theta,
        "sliding_window": window,
        "local_layers": local,
    }
    return _row((4096, 14336, 32, 32, 8, 128), **fixed, **rest)


def _qwen2(
    *sizes: int, vocab: int = 152064, tied: bool = False, eps: float = 1e-6
) -> TransformerConfig:
    return _row(
        sizes, vocab_size=vocab, rope_theta=1e6, norm_eps=eps, tied_embeddings=tied, qkv_bias=True
    )


def _qwen3(*sizes: int, tied: bool = False) -> TransformerConfig:
    return _row(
        (*sizes, 128),
        vocab_size=151936,
        rope_theta=1e6,
        norm_eps=1e-6,
        tied_embeddings=tied,
        qk_norm=True,
    )


_GEMMA: dict[str, Any] = {
    **{"norm_plus_one": True, "post_norms": True, "embed_scale": True, "activation": "gelu_tanh"},
    **{"tied_embeddings": True, "norm_eps": 1e-6},
}


def _gemma2(*sizes: int, score_dim: int = 256) -> TransformerConfig:
    local = tuple(i % 2 == 0 for i in range(sizes[2]))
    caps = {"attn_logit_softcap": 50.0, "final_logit_softcap": 30.0}
    return _row(
        sizes,
        vocab_size=256000,
        score_dim=score_dim,
        sliding_window=4096,
        local_layers=local,
        **caps,
        **_GEMMA,
    )


def _gemma3(
    *sizes: int,
    window: int = 1024,
    scaling: RopeScaling | None = RopeScaling("linear", 8.0),  # noqa: B008 -- frozen
    vocab: int = 262208,
    score_dim: int = 256,
) -> TransformerConfig:
    local = tuple((i + 1) % 6 != 0 for i in range(sizes[2]))
    ropes: dict[str, Any] = {
        "rope_theta": 1e6,
        "rope_scaling": scaling,
        "local_rope_theta": 10000.0,
    }
    windows: dict[str, Any] = {
        "sliding_window": window,
        "local_layers": local,
        "score_dim": score_dim,
    }
    return _row(sizes, vocab_size=vocab, qk_norm=True, **ropes, **windows, **_GEMMA)


# sizes: embed, mlp, layers, heads, kv_heads, head_dim (always 128 for Qwen 3)
PRESETS: dict[str, TransformerConfig] = {
    "meta-llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128),
    "meta-llama-3-70b": _llama(8192, 28672, 80, 64, 8, 128),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128, scaling=_LLAMA_31),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8, 128, scaling=_LLAMA_31),
    "llama-3.1-405b": _llama(16384, 53248, 126, 128, 8, 128, scaling=_LLAMA_31),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 64, scaling=_LLAMA_32, tied=True),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, 128, scaling=_LLAMA_32, tied=True),
    "llama-3.3-70b-instruct": _llama(8192, 28672, 80, 64, 8, 128, scaling=_LLAMA_31),
    "mistral-7b-v0.1": _mistral(32000, 10000.0, 4096),
    "mistral-7b-v0.3": _mistral(32768, 1e6, None),
    "qwen2-0.5b": _qwen2(896, 4864, 24, 14, 2, 64, vocab=151936, tied=True),
    "qwen2-1.5b": _qwen2(1536, 8960, 28, 12, 2, 128, vocab=151936, tied=True),
    "qwen2-7b": _qwen2(3584, 18944, 28, 28, 4, 128),
    "qwen2-72b": _qwen2(8192, 29568, 80, 64, 8, 128, eps=1e-5),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, 64, vocab=151936, tied=True),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, 128, vocab=151936, tied=True),
    "qwen2.5-3b": _qwen2(2048, 11008, 36, 16, 2, 128, vocab=151936, tied=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, 128),
    "qwen2.5-14b": _qwen2(5120, 13824, 48, 40, 8, 128, eps=1e-5),
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8, 128, eps=1e-5),
    "qwen2.5-72b": _qwen2(8192, 29568, 80, 64, 8, 128, eps=1e-5),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8),
    "gemma-2-2b": _gemma2(2304, 9216, 26, 8, 4, 256),
    "gemma-2-9b": _gemma2(3584, 14336, 42, 16, 8, 256),
    "gemma-2-27b": _gemma2(4608, 36864, 46, 32, 16, 128, score_dim=144),
    "gemma-3-1b": _gemma3(1152, 6912, 26, 4, 1, 256, window=512, scaling=None, vocab=262144),
    "gemma-3-4b": _gemma3(2560, 10240, 34, 8, 4, 256),
    "gemma-3-12b": _gemma3(3840, 15360, 48, 16, 8, 256),
    "gemma-3-27b": _gemma3(5376, 21504, 62, 32, 16, 128, score_dim=168),
}
