"""The losses a second time, in float64 numpy, from the equations. Shares no code with popi_jax."""

import numpy as np


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def token_logps(
    hidden: np.ndarray, head: np.ndarray, ids: np.ndarray, temperature: float
) -> np.ndarray:
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64) / temperature
    return np.take_along_axis(log_softmax(logits), ids[..., None], -1)[..., 0]


def dpo(chosen, rejected, ref_chosen, ref_rejected, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Loss of each pair and its derivative by the chosen log-prob (that by the rejected one is its
    negative)."""
    c, r, rc, rr = (np.asarray(x, np.float64) for x in (chosen, rejected, ref_chosen, ref_rejected))
    margin = beta * (c - rc - r + rr)
    return np.logaddexp(0.0, -margin), -beta / (1.0 + np.exp(margin))


def rewards(margins, pair_mask, lengths, length_penalty: float) -> np.ndarray:
    """[users group]: mean over the user's real pairs of log sigmoid(margin), less the price of the
    tokens."""
    margins = np.asarray(margins, np.float64)
    found = np.zeros(margins.shape[:2])
    for u, g in np.ndindex(found.shape):
        real = [
            -np.logaddexp(0.0, -m) for m, on in zip(margins[u, g], pair_mask[u], strict=True) if on
        ]
        found[u, g] = (sum(real) / len(real) if real else 0.0) - length_penalty * lengths[u, g]
    return found


def advantages(rewards, scale: str) -> np.ndarray:
    r = np.asarray(rewards, np.float64)
    centred = r - r.mean(-1, keepdims=True)
    if scale == "none":
        return centred
    if scale == "batch":
        return centred / (np.sqrt((centred**2).mean()) + 1e-4)
    variance = (centred**2).sum(-1, keepdims=True) / (r.shape[-1] - 1)
    return centred / (np.sqrt(variance) + 1e-4)


def grpo(
    logps, old, reference, advantages, mask, clip_eps: float, kl_coef: float
) -> tuple[float, np.ndarray]:
    """Loss (summed over the tokens of a sample, averaged over samples) and its derivative by each
    log-prob."""
    lp, old, ref, adv = (np.asarray(x, np.float64) for x in (logps, old, reference, advantages))
    total, gradient = 0.0, np.zeros(lp.shape)
    samples = adv.size
    for at in np.argwhere(mask):
        at = tuple(at)
        ratio, a = np.exp(lp[at] - old[at]), adv[at[:-1]]
        low, high = 1 - clip_eps, 1 + clip_eps
        clipped = (ratio > high and a > 0) or (ratio < low and a < 0)
        surrogate = min(max(ratio, low), high) * a if clipped else ratio * a
        kl = np.exp(ref[at] - lp[at]) - (ref[at] - lp[at]) - 1
        total += (-surrogate + kl_coef * kl) / samples
        slope = 0.0 if clipped else -ratio * a
        gradient[at] = (slope + kl_coef * (1 - np.exp(ref[at] - lp[at]))) / samples
    return total, gradient
