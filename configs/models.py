"""MODELS: name -> fields that describe both models, the inference model and the generator.

The defaults of popi_jax/config.py are those of a released model."""

# 0.28 million random parameters, which learn from a warm-up to read and write
_TINY: dict[str, object] = {
    "model.checkpoint": "",
    "model.dtype": "float32",
    "model.remat": "none",
    "model.summary_instruction": " summary ?",
    "model.answer_instruction": "",
    "data.pair_layout": "grouped",
    "data.context_len": 1024,
    "data.turn_len": 128,
    "data.answer_len": 128,
    "data.summary_len": 18,
    "batch.pairs": 8,
    "warmup.steps": 900,
    "warmup.guess": 0.4,
    "warmup.optimizer": "muon",
    "warmup.learning_rate": 1e-2,
    "warmup.shuffle": 1.0,
    "inference.temperature": 1.0,
    "inference.length_penalty": 0.002,
    "inference.repeat_penalty": 0.04,
    "inference.kl_coef": 0.05,
    "schedule.phases": ("inference 140", "alternate 3:1 40"),
    "generator.learning_rate": 1e-4,
    "generator.lr_warmup_steps": 5,
    "inference.learning_rate": 5e-4,
    "inference.lr_warmup_steps": 10,
}

_FOLDERS = {
    "llama3-1b": "llama-3.2-1b",
    "llama3-3b": "llama-3.2-3b",
    "llama3-8b": "llama-3.1-8b",
    "llama3-70b": "llama-3.1-70b",
    "qwen3-8b": "qwen3-8b",
    "gemma3-12b": "gemma-3-12b",
}

MODELS: dict[str, dict[str, object]] = {
    "tiny": _TINY,
    # 1.1 million parameters, four times tiny
    "small": {
        **_TINY,
        "model.num_layers": 4,
        "model.embed_dim": 128,
        "model.num_heads": 8,
        "model.num_kv_heads": 8,
        "model.mlp_dim": 352,
        "warmup.steps": 1600,
        "warmup.optimizer": "adamw",
        "warmup.learning_rate": 2e-3,
    },
    # weights and tokenizer of a Hugging Face folder, fully fine-tuned: the defaults
    "pretrained": {},
    # released models by name: the folder is where `make train` expects it, `make fit` needs none
    **{name: {"model.checkpoint": f"checkpoints/{folder}"} for name, folder in _FOLDERS.items()},
    # low-rank adapters on one base that both roles share: a small part of the memory
    "lora": {
        "generator.lora.rank": 16,
        "generator.lora.alpha": 32.0,
        "generator.learning_rate": 2e-5,
        "inference.lora.rank": 16,
        "inference.lora.alpha": 32.0,
        "inference.learning_rate": 2e-5,
    },
}
