"""Llama a second time, in float64 numpy, from the tensors of a Hugging Face folder: the oracle of
the transformer.

After modeling_llama.py of transformers: pre-norm, rotate-half positions, grouped keys and values,
SiLU gate. Shares no code with popi_jax, and reads Hugging Face names, so it also checks the table
of names."""

import numpy as np


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def rotate(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """x [heads, seq, head_dim] turned by its positions [seq]."""
    half = x.shape[-1] // 2
    angles = positions[:, None] / theta ** (np.arange(half) / half)
    cos, sin = np.cos(np.tile(angles, 2)), np.sin(np.tile(angles, 2))
    rotated_half = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * cos + rotated_half * sin


def llama_logits(tensors: dict[str, np.ndarray], config: dict, ids: np.ndarray) -> np.ndarray:
    """Logits [seq, vocab] of one sequence of token ids [seq], positions from 0."""
    t = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
    heads, kv_heads, eps = (
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["rms_norm_eps"],
    )
    seq, positions = len(ids), np.arange(len(ids))
    x = t["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        y = rms_norm(x, t[layer + "input_layernorm.weight"], eps)
        q, k, v = (y @ t[f"{layer}self_attn.{n}_proj.weight"].T for n in "qkv")
        q, k, v = (
            z.reshape(seq, n, -1).swapaxes(0, 1)
            for z, n in ((q, heads), (k, kv_heads), (v, kv_heads))
        )
        q, k = (
            rotate(q, positions, config["rope_theta"]),
            rotate(k, positions, config["rope_theta"]),
        )
        k, v = (np.repeat(z, heads // kv_heads, axis=0) for z in (k, v))
        scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        scores = np.where(np.tri(seq, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = (weights @ v).swapaxes(0, 1).reshape(seq, -1)
        x = x + y @ t[layer + "self_attn.o_proj.weight"].T
        y = rms_norm(x, t[layer + "post_attention_layernorm.weight"], eps)
        gate, up = (y @ t[f"{layer}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ t[layer + "mlp.down_proj.weight"].T
    x = rms_norm(x, t["model.norm.weight"], eps)
    return (
        x @ t["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"].T
    )
