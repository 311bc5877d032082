"""SCHEDULES: name -> phases, steps and cadence. A model with a checkpoint has no warm-up, whatever
is said here."""

SCHEDULES: dict[str, dict[str, object]] = {
    # the defaults of popi_jax/config.py
    "default": {},
    # a trial: the curves move, the result means nothing
    "short": {
        "warmup.steps": 60,
        "schedule.phases": ("inference 10", "alternate 2:1 6"),
        "schedule.log_every": 2,
        "schedule.save_every": 10,
        "evaluation.max_users": 32,
    },
    # longer, and the generator follows more
    "thorough": {"schedule.phases": ("inference 500", "alternate 2:1 100")},
    # ablations: one role stays as the warm-up left it
    "inference_only": {"schedule.phases": ("inference 500",)},
    "generator_only": {"schedule.phases": ("generator 500",)},
    # baselines: the generator alone is trained, behind the raw signals, nothing of the user or the
    # true persona; no summary is sampled
    "raw_context": {"generator.reads": "signals", "schedule.phases": ("generator 500",)},
    "population": {"generator.reads": "nothing", "schedule.phases": ("generator 500",)},
    "persona": {"generator.reads": "persona", "schedule.phases": ("generator 500",)},
    # a summary for each pair, written behind its prompt too
    "prompt_aware": {"data.prompt_aware": True, "batch.pairs": 1},
    # a baseline: the inference model alone is trained, by likelihood on the true personas
    "supervised": {"schedule.phases": ("supervised 500",)},
    # the recipe of POPI's authors (docs/paper_map.md); configs/official.py has its figures
    "official": {
        # rounds are more of both; a phase "stored" writes anew
        "schedule.phases": ("inference 600", "stored 600"),
        "batch.pairs": 1,
        "generator.objective": "dpo",
        "generator.beta": 0.01,
        "generator.over_beta": True,
        "generator.reference": "prompt",
        "inference.group_size": 8,
        "inference.temperature": 0.6,
        "inference.reward": "log_sigmoid",
        # the base in the first round, as nothing has trained it; then that of the round before
        "inference.reward_generator": "current",
        "inference.reward_baseline": False,
        "inference.advantage_baseline": "group",
        "inference.advantage_scale": "none",
        "inference.kl_coef": 2e-3,
        "inference.length_penalty": 0.0,
        "inference.repeat_penalty": 0.0,
        "inference.unfinished_penalty": 0.0,
        "optimizer.clip_norm": 10.0,
        # of random weights; as in the default, though an update has one pair
        "warmup.generator_pairs": 8,
    },
    # both roles in each update, after the inference model has learned to be worth conditioning on
    "joint": {"schedule.phases": ("inference 420", "joint 80")},
}

# over rows where both models begin at random
FROM_RANDOM: dict[str, dict[str, object]] = {
    "thorough": {
        "schedule.phases": ("inference 1500", "alternate 2:1 300"),
        "inference.kl_coef": 0.02,
        "inference.repeat_penalty": 0.02,
        "inference.length_penalty": 0.004,  # longer runs would name a fourth item
    },
    # the generator is all that learns: at the rate that the inference model has
    **{
        name: {"generator.learning_rate": 5e-4} for name in ("raw_context", "population", "persona")
    },
}
