"""The arrays that pass between the parts, as NamedTuples. Imports nothing of ours.

Shape words, the same everywhere: `users` (examples of a batch), `pairs` (K preference pairs of a
user), `group` (G summaries of a user), `batch` (any leading rows), `turns` (prompts that continue
one context), `answers` (replies to one turn), `seq` (tokens, padded).

Padding is always on the right; `lengths` says how many tokens of a row count.
"""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

Params = dict  # a nested dict of arrays


class Tokens(NamedTuple):
    """Right-padded token ids; positions at or after `lengths` are padding, whatever id they
    hold."""

    ids: Int[Array, "*rows seq"]
    lengths: Int[Array, "*rows"]


class UserBatch(NamedTuple):
    """What one `popi_update` reads: each user's signals and K of the user's preference pairs.

    `context` is the inference model's conversation up to the end of the signals; `turns` what
    follows a summary in the generator's conversation: the prompt x and the header of the reply.
    `chosen` and `rejected` end with the end token."""

    index: Int[Array, " users"]  # global number of the example: sampling keys are folded from it
    context: Tokens  # [users seq]
    turns: Tokens  # [users pairs seq]
    chosen: Tokens  # [users pairs seq]
    rejected: Tokens  # [users pairs seq]
    pair_mask: Bool[Array, "users pairs"]  # False: the user has fewer than K pairs
    pair_number: Int[
        Array, "users pairs"
    ]  # in the split: user's number x data.num_pairs + pair of the user


class Demonstrations(NamedTuple):
    """Likelihood targets: answers to turns that continue one context. Used by the warm-up of both
    roles."""

    context: Tokens  # [batch seq]
    turns: Tokens  # [batch turns seq]
    answers: Tokens  # [batch turns seq], each ends with the end token
    mask: Bool[Array, "batch turns"]


class WarmupBatch(NamedTuple):
    """Demonstrations for the generator (replies) and the inference model (summaries of signals,
    readings of pairs)."""

    generator: Demonstrations
    summary: Demonstrations
    reading: Demonstrations


class Rollouts(NamedTuple):
    """G sampled summaries per user."""

    summaries: Tokens  # [users group seq]; lengths count the end token when one was sampled
    finished: Bool[
        Array, "users group"
    ]  # True: ended with the end token, False: cut at the length limit
    logps: Float[
        Array, "users group seq"
    ]  # nats, of the sampled tokens at the sampling temperature


class Mean(NamedTuple):
    """A metric as a sum and the weight it is to be divided by; weight 0 means "does not apply to
    this step"."""

    total: Float[Array, ""]
    weight: Float[Array, ""]


Metrics = dict  # name -> Mean
