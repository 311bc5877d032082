"""Every setting, declared once: type, default, meaning, what is allowed and what hangs on it.

The defaults are those of a run with a released model. The files of configs/ lay over them the tiny
random model, the hardware, the schedule and the data set."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from popi_jax import config_rules
from popi_jax.config_data import DataConfig
from popi_jax.config_rules import (
    ABOVE_ZERO,
    AXIS,
    BELOW_HALF,
    BELOW_ONE,
    EVEN,
    FRACTION,
    JSON_OBJECT,
    LOGICAL_AXES,
    MESH_AXES,
    NAME,
    ROLLOUT_RULES,
    RULES,
    at_least,
    one_of,
    setting,
    some_of,
)
from popi_jax.errors import UserError
from popi_jax.phases import parse_phases
from popi_jax.signals import parse_signals

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Both roles. With a checkpoint the shape is that of its files, whatever is said here."""

    checkpoint: str = setting(
        "checkpoints/base",
        "base model: a folder, here or in a bucket, or org/name[@revision] of the hub; '' = none",
        path=True,
    )
    vocab_size: int = setting(
        2048,
        "most tokens of the tokenizer that is trained where there is no checkpoint",
        at_least(300, "256 bytes and control tokens"),
    )
    num_layers: int = setting(3, "of the shape that random weights get", at_least(1))
    embed_dim: int = setting(64, "width between the layers", at_least(1))
    num_heads: int = setting(4, "of queries", at_least(1))
    num_kv_heads: int = setting(4, "of keys and values", at_least(1))
    head_dim: int = setting(16, "width of a head", at_least(2), EVEN)
    mlp_dim: int = setting(176, "hidden units of a layer", at_least(1))
    rope_theta: float = setting(10000.0, "base of the rotary positions", ABOVE_ZERO)
    norm_eps: float = setting(1e-6, "added to a mean square", ABOVE_ZERO)
    tied_embeddings: bool = setting(True, "the embedding is the output matrix too")
    dtype: str = setting(
        "bfloat16", "of compute; parameters and losses are float32", one_of("float32", "bfloat16")
    )
    remat: str = setting(
        "auto",
        "what is computed again to save memory; auto: the least that fits; dots: no products",
        one_of("auto", "none", "dots", "full"),
        free=True,
    )
    attention: str = setting(
        "auto",
        "what computes it: splash on a TPU, cudnn on a GPU; auto: by the devices",
        one_of("auto", "chunked", "splash", "cudnn"),
        free=True,
    )
    summary_instruction: str = setting(
        "\n\nIn one short sentence, what does this user prefer in replies?",
        "text after the signals that asks the inference model for a summary",
    )
    summary_system: str = setting(
        "", "system message before the signals, for the inference model; '' = none"
    )
    signals_template: str = setting(
        "", "of the signals, as Jinja; @FILE reads a file; '' = ours, see docs/data.md"
    )
    answer_instruction: str = setting(
        "What is known of the user:", "text before the summary in the generator's context"
    )
    answer_template: str = setting(
        "", "of the message that holds the summary, as Jinja; @FILE reads a file; '' = ours"
    )
    summary_place: str = setting(
        "system", "the message that holds it; user: the first of them", one_of("system", "user")
    )
    template_args: str = setting(
        "", """of the chat template, like '{"enable_thinking": false}'""", JSON_OBJECT
    )


OPTIMIZER = one_of("adamw", "lion", "muon", "adafactor")


@dataclasses.dataclass(frozen=True)
class WarmupConfig:
    """Likelihood training of both roles from random weights."""

    steps: int = setting(0, "0 = off; must be 0 with a checkpoint", at_least(0))
    generator_users: int = setting(8, "users per step", at_least(1))
    generator_pairs: int = setting(
        0, "pairs of each of them, at most data.num_pairs; 0 = batch.pairs", at_least(0)
    )
    summary_users: int = setting(16, "users per step whose signals are summarised", at_least(1))
    readings: int = setting(5, "reading exercises on the signals of each of them", at_least(0))
    reading_users: int = setting(
        24, "users per step of whom a few past pairs or the survey are read", at_least(1)
    )
    reading_survey: float = setting(0.5, "part of these readings that are of the survey", FRACTION)
    reading_shots: int = setting(3, "most past pairs in such an exercise", at_least(1))
    guess: float = setting(0.3, "probability that a summary guesses an open contrast", FRACTION)
    shuffle: float = setting(
        0.0, "probability that the items of a summary that is taught are in random order", FRACTION
    )
    no_summary: float = setting(0.1, "probability that the generator sees no summary", FRACTION)
    drop: float = setting(0.25, "probability that the generator's summary lacks an item", FRACTION)
    repeat: float = setting(0.25, "probability that it says an item twice", FRACTION)
    wrong: float = setting(0.05, "it gets Binomial(8, wrong) random items", FRACTION)
    optimizer: str = setting(
        "adamw",
        "as optimizer.name, for this stage; its other settings are those of both",
        OPTIMIZER,
    )
    learning_rate: float = setting(3e-3, "at its peak", ABOVE_ZERO)
    lr_warmup_steps: int = setting(20, "steps to the peak", at_least(0))


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters instead of training all parameters; they need model.checkpoint."""

    rank: int = setting(0, "0 = no adapters, all parameters are trained", at_least(0))
    alpha: float = setting(16.0, "the adapters' product is multiplied by alpha / rank", ABOVE_ZERO)
    targets: tuple[str, ...] = setting(
        LORA_TARGETS, "kernels that have an adapter", some_of(*LORA_TARGETS)
    )


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    objective: str = setting(
        "dpo",
        "see docs/objectives.md",
        one_of("dpo", "robust", "ipo", "hinge", "kto", "slic", "cpo", "simpo", "orpo", "rrhf"),
    )
    beta: float = setting(0.1, "of the preference objective, per nat", ABOVE_ZERO)
    over_beta: bool = setting(
        False,
        "its loss and the reward of summaries are divided by beta (dpo, robust, hinge, slic, cpo)",
    )
    label_smoothing: float = setting(
        0.0, "probability of swapped labels (dpo: cDPO; robust, cpo, simpo)", BELOW_HALF
    )
    length_normalised: bool = setting(
        False, "log-probs per token (dpo, robust, hinge, kto, slic, cpo; always of the others)"
    )
    gamma: float = setting(0.0, "margin that simpo asks for, nats", at_least(0))
    sft_coef: float = setting(
        0.0, "of the chosen reply's likelihood per token; 1 in orpo, cpo and rrhf", at_least(0)
    )
    desirable_weight: float = setting(1.0, "of chosen replies (kto)", at_least(0))
    undesirable_weight: float = setting(1.0, "of rejected replies (kto)", at_least(0))
    reads: str = setting(
        "summary",
        "what it is told of the user while it is trained; all but summary are baselines of the "
        "generator alone: no summary is sampled",
        one_of("summary", "signals", "persona", "nothing"),
    )
    reference: str = setting(
        "prompt", "what it sees: x alone, or x and the summary z", one_of("prompt", "summary")
    )
    ema_decay: float = setting(0.0, "of averaged parameters, per update; 0 = none", BELOW_ONE)
    lora: LoraConfig = LoraConfig()
    learning_rate: float = setting(1e-6, "at its peak", ABOVE_ZERO)
    lr_warmup_steps: int = setting(50, "updates to the peak", at_least(0))


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    group_size: int = setting(
        8, "summaries sampled per user (G)", at_least(2, "their rewards are compared")
    )
    temperature: float = setting(0.6, "of sampling and of the trained log-probs", ABOVE_ZERO)
    reward: str = setting("log_sigmoid", "of a margin", one_of("log_sigmoid", "accuracy", "margin"))
    reward_generator: str = setting(
        "current",
        "whose margins: ema is that of generator.ema_decay, frozen is the reference",
        one_of("current", "ema", "frozen"),
    )
    reward_baseline: bool = setting(
        False, "less the reward without summary (for advantages that compare users)"
    )
    length_penalty: float = setting(0.0005, "reward lost per token of the summary", at_least(0))
    repeat_penalty: float = setting(
        0.0, "reward lost per token that ends two words which the summary had before", at_least(0)
    )
    unfinished_penalty: float = setting(
        0.05, "reward lost by a summary that is cut at data.summary_len", at_least(0)
    )
    advantage_baseline: str = setting(
        "group",
        "what a reward is compared with; leave_one_out is RLOO, batch is REINFORCE",
        one_of("group", "leave_one_out", "batch"),
    )
    advantage_scale: str = setting(
        "batch",
        "what divides the centred rewards",
        one_of("group", "batch", "batch_rewards", "whiten", "none"),
    )
    ratio: str = setting(
        "token", "of probabilities; sequence: GSPO", one_of("token", "sequence", "sequence_token")
    )
    clip_low: float = setting(0.2, "the ratio is clipped to 1 - clip_low ...", at_least(0))
    clip_high: float = setting(0.2, "... and to 1 + clip_high", at_least(0))
    clip_max: float = setting(0.0, "bound where the advantage is negative; 0 = none", at_least(0))
    normalise: str = setting(
        "samples", "divisor of token losses", one_of("samples", "sequences", "tokens", "max_len")
    )
    kl: str = setting(
        "k3",
        "estimator of the KL to the reference; k1 is in the reward, k2 and k3 in the loss",
        one_of("k1", "k2", "k3"),
    )
    kl_corrected: bool = setting(False, "whether k3 is weighted by the ratio")
    kl_coef: float = setting(0.02, "per nat of KL to the reference inference model", at_least(0))
    entropy_coef: float = setting(0.0, "reward of the entropy, per nat and token", at_least(0))
    high_entropy_share: float = setting(
        1.0, "of tokens, of highest entropy, with a policy gradient", ABOVE_ZERO, FRACTION
    )
    skip_unfinished: bool = setting(False, "summaries cut at data.summary_len have no loss")
    updates_per_rollout: int = setting(1, "gradient steps on the same summaries", at_least(1))
    ema_decay: float = setting(0.0, "of averaged parameters, per update; 0 = none", BELOW_ONE)
    lora: LoraConfig = LoraConfig()
    learning_rate: float = setting(1e-6, "at its peak", ABOVE_ZERO)
    lr_warmup_steps: int = setting(50, "updates to the peak", at_least(0))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: str = setting(
        "adamw",
        "of the main stage; muon is for the matrices of the layers, with adamw for the rest",
        OPTIMIZER,
    )
    schedule: str = setting(
        "cosine", "of learning rates after the peak", one_of("cosine", "linear", "constant")
    )
    b1: float = setting(0.9, "adafactor has none", BELOW_ONE)
    b2: float = setting(0.98, "of squared gradients", BELOW_ONE)
    weight_decay: float = setting(0.0, "times the learning rate, per update", at_least(0))
    clip_norm: float = setting(1.0, "of the gradient, over all its parameters", ABOVE_ZERO)
    final_lr: float = setting(0.2, "at the end of the schedule, as a part of the peak", FRACTION)


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    users: int = setting(16, "users per update, over all devices", at_least(1))
    pairs: int = setting(4, "preference pairs per user and update (K)", at_least(1))
    summary_fill: float = setting(
        0.0, "of summary_len that summaries fill, for speed; 0 = measured", FRACTION, free=True
    )
    microbatches: int = setting(1, "parts of an update in turn, to save memory", at_least(1))


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    phases: tuple[str, ...] = setting(
        ("inference 420", "alternate 3:1 80"),
        'in order, of N updates each: "inference N", "generator N", "joint N" (both in each '
        'update), "alternate n:m N" (n updates of the inference model, then m of the generator), '
        '"stored N" (the generator behind summaries that are written once, at the start of the '
        'phase) or "supervised N" (the inference model by likelihood on personas, a baseline)',
    )
    log_every: int = setting(10, "updates", at_least(1), free=True)
    save_every: int = setting(50, "updates", at_least(1), free=True)
    keep: int = setting(2, "newest checkpoints kept", at_least(1), free=True)
    probe_every: int = setting(
        50, "updates between looks at validation users; 0 = off", at_least(0), free=True
    )
    probe_users: int = setting(64, "of them that are looked at", at_least(1), free=True)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis, and which axes split what."""

    data: int = setting(1, "devices across slices", AXIS, free=True)
    fsdp: int = setting(-1, "devices that split users and weights; -1 = all left", AXIS, free=True)
    tensor: int = setting(1, "devices that split heads and hidden units", AXIS, free=True)
    sequence: int = setting(1, "devices that split the tokens of a row", AXIS, free=True)
    rules: tuple[str, ...] = setting(
        RULES, f"axes ({', '.join(MESH_AXES)}) that split {', '.join(LOGICAL_AXES)}", free=True
    )
    rollout_rules: tuple[str, ...] = setting(
        ROLLOUT_RULES, "while summaries are sampled", free=True
    )
    topology: str = setting(
        "", "TPU slice that `make fit` compiles for, like v5p:4x4x4; '' = this machine", free=True
    )
    num_devices: int = setting(0, "simulated on a CPU; 0 = leave them", at_least(0), free=True)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    batch_users: int = setting(32, "users per batch", at_least(1), free=True)
    max_users: int = setting(0, "of the test split; 0 = all", at_least(0), free=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """`from_config_dict` and `from_json` make it, check it and resolve `workdir`."""

    name: str = setting("", "of the run; '' = that of the config file", NAME, free=True)
    seed: int = setting(0, "of initial weights, data order and sampling", at_least(0))
    workdir: str = setting("", "where the run lives; '' = work/<name>", free=True, path=True)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    warmup: WarmupConfig = WarmupConfig()
    generator: GeneratorConfig = GeneratorConfig()
    inference: InferenceConfig = InferenceConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


def from_config_dict(c: ConfigDict) -> Config:
    """Returns the checked configuration.

    Raises:
        UserError: one line that names the field, what it is and what is allowed."""
    return _read_config(c.to_dict())


def from_json(text: str | bytes) -> Config:
    """Inverse of `to_json`. Raises UserError as `from_config_dict`, or when it is not JSON."""
    try:
        values = json.loads(text)
    except ValueError as e:
        raise UserError(f"the saved configuration is not JSON: {e}") from None
    if not isinstance(values, dict):
        raise UserError("the saved configuration is not a JSON object")
    return _read_config(values)


def flatten_stored(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a saved configuration by their paths, home folders in place of "~" as
    in one that is read; it may be of another version, and is not checked."""
    flat = config_rules.flatten(values)
    for field in config_rules.list_settings(Config):
        if field.path and isinstance(flat.get(field.name), str):
            flat[field.name] = os.path.expanduser(flat[field.name])
    return flat


def to_json(config: Config) -> str:
    """Returns JSON from which `from_json` makes an equal Config."""
    return json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False) + "\n"


def _read_config(values: Mapping[str, Any]) -> Config:
    config = _read_templates(config_rules.read_section(Config, values, ""))
    if not config.workdir:
        config = dataclasses.replace(config, workdir=os.path.join("work", config.name))
    parse_phases(config.schedule.phases)
    parse_signals(config.data.signals, f'config.data.signals = "{config.data.signals}"')
    config_rules.check_together(config)
    return config


def _read_templates(config: Config) -> Config:
    """With the texts of templates that are named by their files."""
    m = config.model
    if not (m.signals_template or m.answer_template):
        return config
    from popi_jax import templates  # it loads Jinja

    signals = templates.read_setting("signals", m.signals_template)
    answer = templates.read_setting(
        "answer", m.answer_template, in_user_message=m.summary_place == "user"
    )
    model = dataclasses.replace(m, signals_template=signals, answer_template=answer)
    return dataclasses.replace(config, model=model)
