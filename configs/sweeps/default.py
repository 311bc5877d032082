"""A run under every condition: does it personalise, for whom, and at what cost?

Command: python -m popi_jax.sweep --sweep=configs/sweeps/default.py
"""


def get_sweep(arg: str = "") -> dict[str, object]:
    return {"data": ["own"], "decodings": ["greedy", "sampled"], "baseline": "no_signals"}
