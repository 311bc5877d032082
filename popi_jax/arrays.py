"""The arrays that pass between the parts, as NamedTuples. Imports nothing of ours.

Words, in one meaning everywhere:
  signals    what a user left behind, as text: profile, survey, comments, past pairs (u)
  summary    what the inference model writes of the signals (z)
  role       inference (model) or generator; both are trained
  prompt     what a user asks (x); reply: what a generator says to it (y)
  pair       two replies to one prompt: chosen and rejected
  user       one person of a batch, with K pairs; group: the G summaries of a user
  context    tokens that stand first: signals of the inference model, a summary of the generator
  turn       what continues a context, up to the header of an answer
  answer     what continues a turn: a reply or a summary, with its end token
  tree       a context, its turns, their answers; row: a tree laid out as one row of tokens
  slot       a position of a padded row; place: a position of a row without padding
  budget     how many places there are
  logps      log-probs of tokens or replies, in nats
  margin     reward of the chosen reply less that of the rejected, as the objective implies it
  policy     the weights in training; reference: those at the start of the main stage
  judge      the generator whose margins are the reward of a summary
  rollout    sampled summaries with their log-probs
  stored     summaries that were written once, at the start of a phase, for all training users
  kind       which roles an update trains
  stage      warm-up or main; phase: a stretch of the main stage
  shard      the part of the users that one device computes; microbatch: a part of an update

Axes: `users`, `pairs`, `group` as above, `batch` any leading rows, `seq` tokens, padded on the
right; `lengths` says how many tokens of a row count."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, Key, PyTree

Params = dict  # a nested dict of arrays


class Tokens(NamedTuple):
    """Right-padded token ids; from `lengths` on they are padding, whatever id they hold."""

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
    # False: the user has fewer than K pairs, or both replies are equal as they are cut
    pair_mask: Bool[Array, "users pairs"]
    pair_number: Int[
        Array, "users pairs"
    ]  # in the split: user's number x data.num_pairs + pair of the user
    # [users seq]: in the place of a summary; None where the generator reads summaries, or nothing
    told: Tokens | None = None
    # [users seq]: the summary that the inference model is taught, of length 0 where none is known;
    # None where it is not taught
    taught: Tokens | None = None


class Demonstrations(NamedTuple):
    """Likelihood targets of the warm-up: answers to turns that continue one context."""

    context: Tokens  # [batch seq]
    turns: Tokens  # [batch turns seq]
    answers: Tokens  # [batch turns seq], each ends with the end token
    mask: Bool[Array, "batch turns"]


class WarmupBatch(NamedTuple):
    """Replies for the generator; summaries and readings for the inference model."""

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


class PairLogps(NamedTuple):
    """Summed log-probs (nats) of whole replies, end token included."""

    chosen: Float[Array, "*rows"]
    rejected: Float[Array, "*rows"]


class PairLengths(NamedTuple):
    """Tokens of whole replies, end token included."""

    chosen: Int[Array, "*rows"]
    rejected: Int[Array, "*rows"]


class Mean(NamedTuple):
    """A metric as a sum and the weight that divides it; weight 0: it does not apply here."""

    total: Float[Array, ""]
    weight: Float[Array, ""]


Metrics = dict  # name -> Mean


class RoleState(NamedTuple):
    """The trained side of one model."""

    step: Int[Array, ""]  # gradient steps of this role in the present stage
    params: Params  # under LoRA the adapters alone
    opt_state: PyTree
    ema: Params | None = None  # average of `params` over the steps; None: not asked for


class TrainState(NamedTuple):
    """Everything that changes; donated to each update."""

    inference: RoleState
    generator: RoleState
    step: Int[Array, ""]  # updates over all stages
    key: Key[Array, ""]  # constant; folded with the step, never split


class StoredSummaries(NamedTuple):
    """A summary of each training user, by number, as the inference model was when they were
    written."""

    summaries: Tokens  # [train_users seq]; lengths as in `Rollouts`
    finished: Bool[Array, " train_users"]


class Frozen(NamedTuple):
    """Reference policies: the models at the start of the main stage. Never donated, never updated.

    Under LoRA they are the base weights that the adapters stand on, one copy for both roles. {}:
    updates do not read them."""

    inference: Params
    generator: Params
    # [train pairs]: the generator's log-probs of every pair of the training users without a
    # summary, computed once at the start of the main stage; None where plan.Reference is another
    stored: PairLogps | None = None
    # those of the present phase of stored summaries, before the first of them empty ones; None
    # without such a phase
    summaries: StoredSummaries | None = None
