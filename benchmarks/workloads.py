"""What is timed: the shapes of a model and of the work, the same for popi_jax and its peers.
Imports nothing.

Every text has its full length and no sample ends early, so that all implementations are given the
same tokens."""

from typing import NamedTuple


class Geometry(NamedTuple):
    """A Llama-like decoder with tied embeddings and random weights."""

    vocab_size: int = 4096
    num_layers: int = 4
    embed_dim: int = 256
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    mlp_dim: int = 1024


class Workload(NamedTuple):
    """Lengths in tokens. What does not belong to a kind of work is 0."""

    name: str
    # dpo: a preference step; grpo: samples and a policy-gradient step; popi: both in one update
    kind: str
    users: int
    pairs: int = 0  # preference pairs per user (K)
    group: int = 0  # samples per user (G)
    # what the inference model reads of a user; dpo: what all prompts of the user share
    signals_len: int = 0
    prompt_len: int = 0
    answer_len: int = 0  # of each of the two replies
    summary_len: int = 0  # of each sample

    @property
    def tokens(self) -> int:
        """Distinct tokens of the work: each signal, prompt, reply and sample once."""
        texts = self.signals_len + self.pairs * (self.prompt_len + 2 * self.answer_len)
        return self.users * (texts + self.group * self.summary_len)


# ends the name of a workload whose reference log-probs are computed beforehand
STORED_REFERENCE = "+stored_reference"
TINY = Geometry()
WIDE = Geometry(
    num_layers=2, embed_dim=1024, num_heads=16, num_kv_heads=8, head_dim=64, mlp_dim=4096
)

SMOLLM2 = Geometry(  # that of SmolLM2-135M
    vocab_size=49152,
    num_layers=30,
    embed_dim=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_dim=1536,
)
GEOMETRIES = {"tiny": TINY, "wide": WIDE, "smollm2": SMOLLM2}

WORKLOADS = {
    w.name: w
    for w in (
        # eight pairs, each with a prompt of its own
        Workload("dpo", "dpo", users=8, pairs=1, prompt_len=128, answer_len=64),
        # four prompts, eight samples each
        Workload("grpo", "grpo", users=4, group=8, signals_len=128, summary_len=64),
        # pairs of a user behind the user's raw signals
        Workload(
            "popi_dpo", "dpo", users=4, pairs=4, signals_len=512, prompt_len=128, answer_len=64
        ),
        # summaries of signals
        Workload("popi_grpo", "grpo", users=4, group=8, signals_len=512, summary_len=32),
        # summaries, their rewards on the pairs, and a step of either role
        Workload(
            "popi",
            "popi",
            users=4,
            pairs=4,
            group=8,
            signals_len=512,
            prompt_len=128,
            answer_len=64,
            summary_len=32,
        ),
        # the lengths of a run with a small pretrained model
        Workload("long_grpo", "grpo", users=4, group=8, signals_len=256, summary_len=48),
        Workload(
            "long_popi",
            "popi",
            users=4,
            pairs=3,
            group=4,
            signals_len=512,
            prompt_len=128,
            answer_len=64,
            summary_len=48,
        ),
    )
}
