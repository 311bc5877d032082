"""Rotary positions in the half-split form ("rotate half") of Hugging Face's decoders, with
stretched frequencies."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the frequencies are lowered for texts longer than those of the first training.

    "linear" divides all of them by `factor`. "llama3" divides those of waves longer than
    original_len / low_freq_factor tokens, keeps those shorter than original_len / high_freq_factor,
    and blends in between (Llama 3.1; the same as `_compute_llama3_parameters` of transformers)."""

    kind: str  # linear | llama3
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_len: int = 8192  # tokens

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f'rope scaling "{self.kind}": must be linear or llama3')


def frequencies(half: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per token of each of the `half` planes of a head: float32 [half], computed in
    float64."""
    f = theta ** (-np.arange(half) / half)
    if scaling is None:
        return f.astype(np.float32)
    if scaling.kind == "linear":
        return (f / scaling.factor).astype(np.float32)
    waves = scaling.original_len * f / (2 * math.pi)  # periods within the original length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((waves - low) / (high - low), 0.0, 1.0)
    return (kept * f + (1 - kept) * f / scaling.factor).astype(np.float32)


def rope(
    x: Float[Array, "B T heads H"], positions: Int[Array, "B T"], freqs: Float[Array, " half"]
) -> Float[Array, "B T heads H"]:
    """Turns plane i, made of coordinates i and i + half, by positions x freqs[i]."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None].astype(jnp.float32) * freqs[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x1, x2 = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
