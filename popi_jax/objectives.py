"""The objectives of losses/ that a configuration asks for. docs/objectives.md has the table."""

from popi_jax.config import Config
from popi_jax.losses.grpo import PolicyObjective
from popi_jax.losses.preference import PreferenceObjective


def preference_objective(cfg: Config) -> PreferenceObjective:
    g = cfg.generator
    return PreferenceObjective(
        name=g.objective,
        beta=g.beta,
        label_smoothing=g.label_smoothing,
        length_normalised=g.length_normalised,
        gamma=g.gamma,
        sft_coef=g.sft_coef,
        desirable_weight=g.desirable_weight,
        undesirable_weight=g.undesirable_weight,
    )


def policy_objective(cfg: Config) -> PolicyObjective:
    """With inference.kl = "k1" the KL is in the reward, and the loss has none."""
    i = cfg.inference
    in_loss = i.kl != "k1"
    return PolicyObjective(
        ratio=i.ratio,
        clip_low=i.clip_low,
        clip_high=i.clip_high,
        clip_max=i.clip_max or None,
        normalise=i.normalise,
        max_len=cfg.data.summary_len if i.normalise == "max_len" else None,
        kl=i.kl if in_loss else "k3",
        kl_coef=i.kl_coef if in_loss else 0.0,
        kl_corrected=i.kl_corrected,
        entropy_coef=i.entropy_coef,
    )
