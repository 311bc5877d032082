"""The decoder with every behaviour, in float64 numpy, one sequence at a time, from tensors with
Hugging Face's names.

After the modeling files of transformers 5 (Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3). Shares no
code with popi_jax but the fields that switch behaviours."""

import math

import numpy as np


def norm(x: np.ndarray, weight: np.ndarray, cfg) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * (weight + cfg.norm_plus_one)


def capped(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else cap * np.tanh(x / cap)


def inverse_frequencies(cfg, local: bool) -> np.ndarray:
    own_theta = local and cfg.local_rope_theta is not None
    theta = cfg.local_rope_theta if own_theta else cfg.rope_theta
    plain = [theta ** (-2 * i / cfg.head_dim) for i in range(cfg.head_dim // 2)]
    s = cfg.rope_scaling
    if s is None or own_theta:
        return np.array(plain)
    if s.kind == "dynamic":
        return np.array(plain)
    if s.kind == "linear":
        return np.array(plain) / s.factor
    if s.kind == "yarn":
        return yarn_frequencies(plain, theta, s)
    out = []
    for f in plain:
        wave = 2 * math.pi / f
        if wave < s.original_len / s.high_freq_factor:
            out.append(f)
        elif wave > s.original_len / s.low_freq_factor:
            out.append(f / s.factor)
        else:
            smooth = (s.original_len / wave - s.low_freq_factor) / (
                s.high_freq_factor - s.low_freq_factor
            )
            out.append((1 - smooth) * f / s.factor + smooth * f)
    return np.array(out)


def yarn_frequencies(plain: list[float], theta: float, s) -> np.ndarray:
    """Plane i turns original_len theta^(-i/half) / (2 pi) times within the original length; the
    bounds are where that is beta_fast and beta_slow."""
    half = len(plain)
    fast, slow = (
        half * math.log(s.original_len / (2 * math.pi * beta), theta)
        for beta in (s.beta_fast, s.beta_slow)
    )
    if s.truncate:
        fast, slow = math.floor(fast), math.ceil(slow)
    fast, slow = max(fast, 0), min(slow, 2 * half - 1)
    out = []
    for i, f in enumerate(plain):
        divided = min(max((i - fast) / (slow - fast if slow != fast else 0.001), 0.0), 1.0)
        out.append(f / s.factor * divided + f * (1 - divided))
    return np.array(out)


def rotated(x: np.ndarray, freqs: np.ndarray) -> np.ndarray:
    """x [heads seq head_dim] at positions 0, 1, ..."""
    z = x[..., : len(freqs)] + 1j * x[..., len(freqs) :]
    z = z * np.exp(1j * np.arange(x.shape[1])[:, None] * freqs)
    return np.concatenate([z.real, z.imag], axis=-1)


def logits(tensors: dict[str, np.ndarray], cfg, ids: list[int]) -> np.ndarray:
    """Logits [seq vocab] of one sequence of ids."""
    t = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
    seq = len(ids)
    back = np.arange(seq)[:, None] - np.arange(seq)[None, :]
    x = t["model.embed_tokens.weight"][ids] * (math.sqrt(cfg.embed_dim) if cfg.embed_scale else 1.0)
    for i in range(cfg.num_layers):
        w = {
            name.removeprefix(f"model.layers.{i}."): v
            for name, v in t.items()
            if f"model.layers.{i}." in name
        }
        local = bool(cfg.local_layers) and cfg.local_layers[i]
        y = norm(x, w["input_layernorm.weight"], cfg)
        heads = {}
        for n in "qkv":
            z = y @ w[f"self_attn.{n}_proj.weight"].T + (
                w[f"self_attn.{n}_proj.bias"] if cfg.qkv_bias else 0.0
            )
            z = z.reshape(seq, -1, cfg.head_dim).swapaxes(0, 1)
            heads[n] = (
                norm(z, w[f"self_attn.{n}_norm.weight"], cfg) if cfg.qk_norm and n != "v" else z
            )
        freqs = inverse_frequencies(cfg, local)
        own_turn = cfg.rope_scaling is None or (local and cfg.local_rope_theta is not None)
        grown = 1.0 if own_turn else cfg.rope_scaling.attention_factor**2  # of q and of k
        q = rotated(heads["q"], freqs)
        k, v = (
            np.repeat(z, len(q) // len(z), axis=0) for z in (rotated(heads["k"], freqs), heads["v"])
        )
        scores = capped(
            grown * (q @ k.swapaxes(1, 2)) / math.sqrt(cfg.score_dim or cfg.head_dim),
            cfg.attn_logit_softcap,
        )
        seen = (back >= 0) & (back < cfg.sliding_window) if local else back >= 0
        weights = np.exp(np.where(seen, scores, -np.inf))
        y = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(seq, -1)
        y = y @ w["self_attn.o_proj.weight"].T
        y = y + (w["self_attn.o_proj.bias"] if cfg.out_bias else 0.0)
        x = x + (norm(y, w["post_attention_layernorm.weight"], cfg) if cfg.post_norms else y)
        y = norm(
            x,
            w[f"{'pre_feedforward' if cfg.post_norms else 'post_attention'}_layernorm.weight"],
            cfg,
        )
        g = y @ w["mlp.gate_proj.weight"].T
        if cfg.activation == "silu":
            g = g / (1 + np.exp(-g))
        else:
            g = 0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
        y = (g * (y @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
        x = x + (norm(y, w["post_feedforward_layernorm.weight"], cfg) if cfg.post_norms else y)
    x = norm(x, t["model.norm.weight"], cfg)
    table = t["model.embed_tokens.weight" if cfg.tied_embeddings else "lm_head.weight"]
    return capped(x @ table.T, cfg.final_logit_softcap)
