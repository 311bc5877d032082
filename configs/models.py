"""MODELS: name -> fields of configs/base.py that describe both models, the inference model and the
generator."""

_PRETRAINED: dict[str, object] = {
    "model.checkpoint": "checkpoints/base",
    "model.dtype": "bfloat16",
    "model.remat": "full",
    "model.summary_instruction": "\n\nSummarise in a few short phrases what this user prefers in replies.",
    "model.answer_instruction": "What is known of the user:",
    "data.pair_layout": "paired",
    "data.context_len": 2048,
    "data.turn_len": 256,
    "data.answer_len": 512,
    "data.summary_len": 128,
    "batch.pairs": 4,
    "warmup.steps": 0,
    "generator.beta": 0.1,
    "generator.learning_rate": 1e-6,
    "generator.lr_warmup_steps": 50,
    "inference.learning_rate": 1e-6,
    "inference.lr_warmup_steps": 50,
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
    # 0.28 million parameters, the defaults of base.py
    "tiny": {},
    # 1.1 million parameters, four times tiny
    "small": {
        "model.num_layers": 4,
        "model.embed_dim": 128,
        "model.num_heads": 8,
        "model.num_kv_heads": 8,
        "model.mlp_dim": 352,
        "warmup.learning_rate": 2e-3,
    },
    # weights and tokenizer of a Hugging Face folder, fully fine-tuned; the shape of the model is
    # read from the folder
    "pretrained": _PRETRAINED,
    # released models by name: the folder is where `make train` expects it, `make fit` needs none
    **{
        name: {**_PRETRAINED, "model.checkpoint": f"checkpoints/{folder}"}
        for name, folder in _FOLDERS.items()
    },
    # the same with low-rank adapters on one base that both roles share: a small part of the memory
    "lora": {
        **_PRETRAINED,
        "generator.lora.rank": 16,
        "generator.lora.alpha": 32.0,
        "generator.learning_rate": 2e-5,
        "inference.lora.rank": 16,
        "inference.lora.alpha": 32.0,
        "inference.learning_rate": 2e-5,
    },
}
