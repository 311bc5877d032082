"""What is drawn under each cut of the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.models.decode import Sampling, cut_logits, draw_tokens
from tests.oracles import losses as oracle

P = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
LOGITS = jnp.log(jnp.asarray(P, jnp.float32))[None, None, :]


def kept(**cuts: object) -> list[int]:
    sampling = Sampling(**({"temperature": 1.0, "max_len": 1, "end_id": 0} | cuts))
    return np.flatnonzero(np.isfinite(np.asarray(cut_logits(LOGITS, sampling))[0, 0])).tolist()


@pytest.mark.parametrize(
    ("cuts", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.69}, [0, 1]),  # .4 + .3
        ({"top_p": 0.71}, [0, 1, 2]),
        ({"top_p": 0.001}, [0]),
        ({"min_p": 0.3}, [0, 1, 2]),  # .12 and more
        ({"min_p": 1.0}, [0]),
        ({"banned": (0, 3)}, [1, 2, 4]),
        ({"banned": (0,), "top_k": 2}, [1, 2]),
        ({"top_k": 3, "top_p": 0.8}, [0, 1]),  # of the three the first two hold .824
        ({"temperature": 0.5, "min_p": 0.3}, [0, 1]),  # .16, .09, .0225
        ({"temperature": 0.0, "banned": (0,)}, [1, 2, 3, 4]),
    ],
)
def test_cuts(cuts: dict, expected: list[int]) -> None:
    assert kept(**cuts) == expected


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_cuts_change_the_draw_and_not_the_log_probs(temperature: float) -> None:
    sampling = Sampling(temperature, 1, 0, banned=(0,), top_k=2)
    keys = jax.random.split(jax.random.key(0), (1, 500))
    tokens, logps = draw_tokens(jnp.broadcast_to(LOGITS, (1, 500, 5)), keys, sampling)
    assert set(np.asarray(tokens).ravel().tolist()) == ({1} if temperature == 0.0 else {1, 2})
    whole = oracle.log_softmax(np.log(P) / (temperature or 1.0))
    np.testing.assert_allclose(logps, whole[np.asarray(tokens)], atol=1e-5)


def test_the_draws_within_a_cut_keep_their_proportions() -> None:
    keys = jax.random.split(jax.random.key(1), (1, 4000))
    tokens, _ = draw_tokens(
        jnp.broadcast_to(LOGITS, (1, 4000, 5)), keys, Sampling(1.0, 1, 0, top_p=0.71)
    )
    found = np.bincount(np.asarray(tokens).ravel(), minlength=5) / 4000
    np.testing.assert_allclose(found, np.array([0.4, 0.3, 0.15, 0, 0]) / 0.85, atol=0.03)
