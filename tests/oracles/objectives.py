"""The objectives of docs/objectives.md a second time, in float64 numpy, from the equations. Shares
no code with ours.

Gradients are central differences of these values: in float64 they are exact to about 1e-8.
"""

from collections.abc import Callable

import numpy as np


def slope(f: Callable[[np.ndarray], np.ndarray], x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """d sum f / dx, by central differences."""
    x, found = np.asarray(x, np.float64), np.zeros(np.shape(x))
    for at in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[at] += step
        down[at] -= step
        found[at] = (np.sum(f(up)) - np.sum(f(down))) / (2 * step)
    return found


def nll(m: float) -> float:
    return float(np.logaddexp(0.0, -m))  # -log sigmoid


def preference(o, policy, lengths, reference, chosen_len: float, baseline) -> np.ndarray:
    """Loss of each pair; policy, lengths and reference are rows of (chosen, rejected); o: the
    settings."""
    found = []
    for (c, r), (n_c, n_r), (ref_c, ref_r) in zip(policy, lengths, reference, strict=True):
        if o.name in ("slic", "cpo", "simpo", "orpo", "rrhf"):
            ref_c = ref_r = 0.0
        if not (o.length_normalised or o.name in ("ipo", "simpo", "orpo", "rrhf")):
            n_c = n_r = 1
        s_w, s_l, e = (c - ref_c) / n_c, (r - ref_r) / n_r, o.label_smoothing
        m = o.beta * (s_w - s_l)
        if o.name == "simpo":
            m -= o.gamma
        if o.name in ("dpo", "cpo", "simpo"):
            loss = (1 - e) * nll(m) + e * nll(-m)
        elif o.name == "robust":
            loss = ((1 - e) * nll(m) - e * nll(-m)) / (1 - 2 * e)
        elif o.name in ("hinge", "slic"):
            loss = max(0.0, 1 - m)
        elif o.name == "ipo":
            loss = (s_w - s_l - 1 / (2 * o.beta)) ** 2
        elif o.name == "kto":
            value = [
                1 / (1 + np.exp(-o.beta * (s_w - baseline[0]))),
                1 / (1 + np.exp(-o.beta * (baseline[1] - s_l))),
            ]
            loss = (o.desirable_weight * (1 - value[0]) + o.undesirable_weight * (1 - value[1])) / 2
        elif o.name == "orpo":
            odds = [np.exp(s) / (1 - np.exp(s)) for s in (s_w, s_l)]
            loss = o.beta * nll(np.log(odds[0]) - np.log(odds[1]))
        else:
            loss = max(0.0, s_l - s_w)
        loss = loss / o.beta if o.over_beta else loss
        found.append(loss - o.sft_coef * c / chosen_len)
    return np.array(found)


def advantages(rewards, baseline: str, scale: str) -> np.ndarray:
    r = np.asarray(rewards, np.float64)
    found = np.zeros(r.shape)
    for u, g in np.ndindex(r.shape):
        others = np.delete(r[u], g)
        found[u, g] = (
            r[u, g]
            - {"group": r[u].mean(), "leave_one_out": others.mean(), "batch": r.mean()}[baseline]
        )
    if scale == "whiten":
        found = found - found.mean()
    deviation = {
        "none": 1.0 - 1e-4,
        "group": r.std(-1, ddof=1, keepdims=True),
        "batch": (r - r.mean(-1, keepdims=True)).std() if baseline != "batch" else r.std(),
        "batch_rewards": r.std(ddof=1),
        "whiten": found.std(ddof=1),
    }
    if scale == "batch" and baseline == "leave_one_out":
        deviation["batch"] = found.std()
    return found / (deviation[scale] + 1e-4)


def policy(o, logps, old, reference, advantages, mask, entropies, fixed_ratio=None) -> float:
    """The loss of whole samples; lists of unequal length would do, so nothing here can look at the
    padding.

    fixed_ratio: the ratio of each sample for "sequence_token", whose gradient is that of the tokens
    alone."""
    samples, tokens, counted, entropy = [], 0, 0, 0.0
    for at in np.ndindex(mask.shape[:2]):
        on = np.flatnonzero(mask[at])
        lp, before, ref, a = logps[at][on], old[at][on], reference[at][on], advantages[at]
        ratio = np.exp(lp - before)
        if o.ratio == "sequence" and len(on):
            ratio = np.full(len(on), np.prod(ratio) ** (1 / len(on)))
        if o.ratio == "sequence_token" and len(on):
            ratio = fixed_ratio[0][at] * np.exp(lp - fixed_ratio[1][at][on])
        bounded = np.minimum(ratio, np.inf if o.clip_max is None else o.clip_max)
        loss = -np.minimum(bounded * a, np.clip(ratio, 1 - o.clip_low, 1 + o.clip_high) * a)
        d = ref - lp
        kl = d**2 / 2 if o.kl == "k2" else np.exp(d) - d - 1
        loss = loss + o.kl_coef * kl * (ratio if o.kl_corrected else 1)
        per_sample = len(on) if o.normalise == "sequences" else 1
        samples.append(loss.sum() / max(per_sample, 1))
        tokens, counted, entropy = (
            tokens + len(on),
            counted + len(on),
            entropy + entropies[at][on].sum(),
        )
    n = len(samples)
    weight = {
        "samples": n,
        "sequences": n,
        "tokens": max(tokens, 1),
        "max_len": n * (o.max_len or 1),
    }[o.normalise]
    return sum(samples) / weight - o.entropy_coef * entropy / max(counted, 1)
