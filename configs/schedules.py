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
    # both roles in each update, after the inference model has learned to be worth conditioning on
    "joint": {"schedule.phases": ("inference 420", "joint 80")},
}

# over rows that train a generator alone from random weights: the rate that the inference model has,
# as the generator is all that learns
FROM_RANDOM: dict[str, dict[str, object]] = {
    name: {"generator.learning_rate": 5e-4} for name in ("raw_context", "population", "persona")
}
