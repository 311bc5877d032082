"""The scored pairs of a cell as the lines of its file."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from popi_jax.arrays import PairLogps, UserBatch
from popi_jax.data.records import User
from popi_jax.errors import UserError


def list_items(
    users: Sequence[User],
    whole: UserBatch,
    texts: Sequence[int | None],
    raw: Sequence[int],
    scores: tuple[PairLogps, PairLogps | None, Float[np.ndarray, "users pairs"]],
) -> list[dict[str, Any]]:
    """One item for each pair of `whole` that counts, all users in one batch.

    texts: tokens that the generator saw of each user; None: the user does not count. raw: tokens of
    their raw signals. scores: log-probs, those of the reference, margins. Raises: UserError when a
    margin is not finite."""
    logps, known, margins = scores
    arrays = {"chosen": logps.chosen, "rejected": logps.rejected}
    if known is not None:
        arrays |= {"reference_chosen": known.chosen, "reference_rejected": known.rejected}
    arrays |= {"chosen_len": whole.chosen.lengths, "rejected_len": whole.rejected.lengths}
    columns = {name: np.asarray(x).tolist() for name, x in (arrays | {"margin": margins}).items()}
    items = []
    for row, (user, seen) in enumerate(zip(users, texts, strict=True)):
        counted = np.flatnonzero(whole.pair_mask[row]).tolist() if seen is not None else ()
        for column in counted:
            pair = user.pairs[column]
            item: dict[str, Any] = {"user": user.user_id, "person": user.user_id.split("#")[0]}
            item |= {"pair": pair.record_id}
            item |= {name: rows[row][column] for name, rows in columns.items()}
            item |= {"context_tokens": seen, "signal_tokens": raw[row]}
            items.append(item | {"groups": {**user.groups, **pair.groups}})
    bad = [item for item in items if not np.isfinite(item["margin"])]
    if bad:
        raise UserError(
            f"{len(bad)} margins are not finite, the first of user {bad[0]['user']}, pair "
            f"{bad[0]['pair']}; the weights are broken, or the compute type is too narrow"
        )
    return items
