"""The configuration as frozen dataclasses; meaning, unit and default of each field are in
configs/base.py.

config_check.py makes them from a ConfigDict or JSON and refuses what does not fit.
"""

import dataclasses
from typing import Literal, NamedTuple

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
LOGICAL_AXES = (
    "batch",
    "seq",
    "vocab",
    "vocab_embed",
    "embed",
    "heads",
    "kv_heads",
    "mlp",
    "attention_heads",
)  # that rules may split


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str
    path: str
    prepared: str
    download: bool
    on_bad_row: str
    split_by: str
    validation_fraction: float
    test_fraction: float
    num_shots: int
    num_pairs: int
    pair_mode: str
    score_margin: int
    pair_layout: str
    turns: str
    use_system_string: bool
    sample_people: int
    context_len: int
    turn_len: int
    answer_len: int
    summary_len: int
    workers: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    checkpoint: str
    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool
    dtype: str
    remat: str
    attention: str
    summary_instruction: str
    answer_instruction: str


@dataclasses.dataclass(frozen=True)
class WarmupConfig:
    steps: int
    generator_users: int
    summary_users: int
    readings: int
    reading_users: int
    reading_survey: float
    reading_shots: int
    guess: float
    no_summary: float
    drop: float
    repeat: float
    wrong: float
    learning_rate: float
    lr_warmup_steps: int


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    objective: str
    beta: float
    label_smoothing: float
    length_normalised: bool
    gamma: float
    sft_coef: float
    desirable_weight: float
    undesirable_weight: float
    reference: str
    ema_decay: float
    lora: LoraConfig
    learning_rate: float
    lr_warmup_steps: int


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    group_size: int
    temperature: float
    reward: str
    reward_generator: str
    reward_baseline: bool
    length_penalty: float
    advantage_baseline: str
    advantage_scale: str
    ratio: str
    clip_low: float
    clip_high: float
    clip_max: float
    normalise: str
    kl: str
    kl_corrected: bool
    kl_coef: float
    entropy_coef: float
    high_entropy_share: float
    skip_unfinished: bool
    updates_per_rollout: int
    ema_decay: float
    lora: LoraConfig
    learning_rate: float
    lr_warmup_steps: int


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: str
    schedule: str
    b1: float
    b2: float
    weight_decay: float
    clip_norm: float
    final_lr: float


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    users: int
    pairs: int
    summary_fill: float
    microbatches: int


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    phases: tuple[str, ...]
    log_every: int
    save_every: int
    keep: int


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int
    fsdp: int
    tensor: int
    sequence: int
    rules: tuple[str, ...]
    rollout_rules: tuple[str, ...]
    topology: str
    num_devices: int


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    batch_users: int
    max_users: int


@dataclasses.dataclass(frozen=True)
class Config:
    """`workdir` is resolved: never ""."""

    name: str
    seed: int
    workdir: str
    data: DataConfig
    model: ModelConfig
    warmup: WarmupConfig
    generator: GeneratorConfig
    inference: InferenceConfig
    optimizer: OptimizerConfig
    batch: BatchConfig
    schedule: ScheduleConfig
    mesh: MeshConfig
    evaluation: EvaluationConfig


Mode = Literal["inference", "generator", "joint", "alternate"]


class Phase(NamedTuple):
    """A stretch of updates. In "alternate", n updates of the inference model are followed by m of
    the generator.

    (num_inference, num_generator) is (1, 0) for "inference", (0, 1) for "generator", (1, 1) for
    "joint" and (n, m) for "alternate n:m"."""

    mode: Mode
    num_inference: int
    num_generator: int
    steps: int
