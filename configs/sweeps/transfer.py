"""A second reader: do summaries of a run help a generator that was never trained with them?

Command: python -m popi_jax.sweep --sweep=configs/sweeps/transfer.py:checkpoints/another-model
"""

from popi_jax.errors import UserError


def get_sweep(arg: str = "") -> dict[str, object]:
    """arg: base models, folders or org/name, with commas between."""
    if not arg:
        raise UserError("name another generator: a folder or org/name (make: GENERATOR=...)")
    return {
        "data": ["own"],
        "conditions": [
            *("no_signals", "raw_signals", "summary_before_rl", "summary", "other_user_summary"),
            "oracle",
        ],
        "generators": ["trained", "before_rl", *arg.split(",")],
        "baseline": "no_signals",
    }
