"""Times TRL's DPOTrainer and GRPOTrainer. Runs with the Python of .venv-peers/trl.

    python -m benchmarks.peers.trl_worker

Only the public interface is used: configurations, data, reward functions, callbacks, and the
generator's own forward in the reward of "popi". The trainers' loops run as they are; they pause in
a callback at the end of each step. A step is all that `trainer.train()` does from one such pause to
the next: batch, rollout, rewards, reference, gradient, clipping, AdamW.

What is set for speed, or against waste:
- float32, torch on all cores, `attn_implementation="sdpa"`, fused AdamW (the default);
- gradient checkpointing off (TRL turns it on), no logging, saving or evaluation, data in the same
  process;
- generation with the KV cache, no filter of the sampled distribution (top_k 0, top_p 1), no vLLM; a
  static cache costs the same here (15.9 against 15.5 CPU seconds for a step of "popi_grpo");
- log-probs by TRL's fused head, which never holds the logits of a batch; it scores all positions on
  a processor;
- one optimizer step per rollout, so no forward for the old policy; all sequences in one batch, or
  where their activations need more than ACTIVATIONS bytes, in as few parts of a step as do not
  (gradient accumulation): at once, "long_grpo" needs more than 22 GB at the geometry "smollm2";
- "+stored_reference": `precompute_ref_log_probs=True`, computed before the first step and not
  timed;
- the reward of "popi": all pairs of a user at once, without gradient, `logits_to_keep` for the
  replies alone.
Not set: Liger kernels (they need Triton); `torch_compile` (off by default; compiling "dpo" takes 84
s and gains nothing).

Texts are words of a tokenizer that knows one word per id, so lengths are exact. Replies end in EOS,
because DPOTrainer adds one where it is missing; samples cannot end early (`min_new_tokens`)."""

import os
import tempfile
from collections import Counter
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_DATASETS_DISABLE_PROGRESS_BARS="1"
)

import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl

from benchmarks.peers import protocol
from benchmarks.peers.protocol import Cost, Parts, Pause, Paused, Running
from benchmarks.workloads import Geometry, Workload

PAD, EOS, FIRST_WORD = 0, 1, 2
ACTIVATIONS = 8e9  # bytes of one part of a step
BATCHES = 8  # different batches in a data set, which is gone through again and again


def make_tokenizer(vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """Word "t7" is id 7."""
    words = {"<pad>": PAD, "<eos>": EOS} | {f"t{i}": i for i in range(FIRST_WORD, vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def save_model(geometry: Geometry, folder: str) -> None:
    """Random weights in a folder: the trainers load their reference from where the model came
    from."""
    config = transformers.LlamaConfig(
        vocab_size=geometry.vocab_size,
        hidden_size=geometry.embed_dim,
        intermediate_size=geometry.mlp_dim,
        num_hidden_layers=geometry.num_layers,
        num_attention_heads=geometry.num_heads,
        num_key_value_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


class Texts:
    """Random texts of exact lengths."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size, self._random = vocab_size, np.random.default_rng(0)

    def ids(self, *shape: int) -> np.ndarray:
        return self._random.integers(FIRST_WORD, self._vocab_size, shape)

    def words(self, length: int) -> str:
        return " ".join(f"t{i}" for i in self.ids(length))

    def reply(self, length: int) -> str:
        return " " + self.words(length - 1) + " <eos>"


def preference_rows(work: Workload, texts: Texts) -> datasets.Dataset:
    rows = []
    for _ in range(BATCHES * work.users):
        if work.kind == "popi":
            shared = texts.words(work.summary_len)
        else:
            shared = texts.words(work.signals_len)
        for _ in range(work.pairs):
            prompt = f"{shared} {texts.words(work.prompt_len)}".strip()
            rows.append(
                {
                    "prompt": prompt,
                    "chosen": texts.reply(work.answer_len),
                    "rejected": texts.reply(work.answer_len),
                }
            )
    return datasets.Dataset.from_list(rows)


class Pauses(transformers.TrainerCallback):
    """Pauses before the first step and after each."""

    def __init__(self, pause: Pause) -> None:
        self._pause = pause

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._pause()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._pause()


class Forwards:
    """Counts what decoders are given while it is attached."""

    def __init__(self, **models: transformers.PreTrainedModel) -> None:
        self.tokens: Counter[str] = Counter()
        self.shapes: Counter[str] = Counter()
        self.padding = 0
        self._hooks = [
            model.base_model.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: self._seen(name, kwargs), with_kwargs=True
            )
            for name, model in models.items()
        ]

    def _seen(self, name: str, kwargs: dict[str, Any]) -> None:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        what = name + ("" if torch.is_grad_enabled() else " without gradient")
        self.tokens[what] += ids.numel()
        self.shapes[f"{what} {ids.shape[0]}x{ids.shape[1]}"] += 1
        if mask is not None and mask.dim() == 2 and ids.shape[1] > 1:
            self.padding += int((mask == 0).sum())

    def take(self) -> dict[str, Any]:
        for hook in self._hooks:
            hook.remove()
        return {"tokens": dict(self.tokens), "padding": self.padding, "forwards": dict(self.shapes)}


def count_parts(batch_size: int, row_tokens: int, geometry: Geometry) -> int:
    """The fewest parts of a batch, which divide it, whose activations fit. About what the numbers
    below say was seen: 2 MB for each token at the geometry "smollm2"."""
    numbers = 14 * geometry.embed_dim + 5 * geometry.mlp_dim
    row = row_tokens * geometry.num_layers * numbers * 4
    fitting = (n for n in range(1, batch_size) if batch_size % n == 0)
    return next((n for n in fitting if batch_size // n * row <= ACTIVATIONS), batch_size)


class Trainers:
    """Makes the trainers of one workload."""

    def __init__(self, work: Workload, geometry: Geometry, stored_reference: bool) -> None:
        self.work, self.geometry, self.stored_reference = work, geometry, stored_reference
        self.folder = tempfile.mkdtemp(prefix="peers-trl-")
        self.tokenizer = make_tokenizer(geometry.vocab_size)
        self.texts = Texts(geometry.vocab_size)
        save_model(geometry, self.folder)

    def load(self) -> transformers.PreTrainedModel:
        return transformers.AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="sdpa"
        )

    def common(self, batch_size: int, row_tokens: int) -> dict[str, Any]:
        """row_tokens: of one element of the batch."""
        parts = count_parts(batch_size, row_tokens, self.geometry)
        return {
            "output_dir": self.folder,
            "per_device_train_batch_size": batch_size // parts,
            "gradient_accumulation_steps": parts,
            "max_steps": 1_000_000,
            "learning_rate": protocol.LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": protocol.MAX_GRAD_NORM,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_num_workers": 0,
            "dataloader_pin_memory": False,
        }

    def dpo(self) -> trl.DPOTrainer:
        work = self.work
        shared = work.summary_len if work.kind == "popi" else work.signals_len
        reply_end = shared + work.prompt_len + work.answer_len
        return trl.DPOTrainer(
            model=self.load(),
            args=trl.DPOConfig(
                beta=protocol.DPO_BETA,
                loss_type="sigmoid",
                max_length=None,
                precompute_ref_log_probs=self.stored_reference,
                **self.common(work.users * work.pairs, 2 * reply_end),
            ),
            train_dataset=preference_rows(work, self.texts),
            processing_class=self.tokenizer,
        )

    def grpo(self, reward: Any) -> trl.GRPOTrainer:
        work = self.work
        rows = [
            {"prompt": self.texts.words(work.signals_len), "user": i % work.users}
            for i in range(BATCHES * work.users)
        ]
        return trl.GRPOTrainer(
            model=self.load(),
            reward_funcs=reward,
            args=trl.GRPOConfig(
                beta=protocol.KL_BETA,
                num_generations=work.group,
                max_completion_length=work.summary_len,
                generation_kwargs={"min_new_tokens": work.summary_len},
                temperature=1.0,
                num_iterations=1,
                shuffle_dataset=False,
                **self.common(work.users * work.group, work.signals_len + work.summary_len),
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=self.tokenizer,
        )


def check_lengths(completion_ids: list[list[int]], work: Workload) -> None:
    lengths = {len(ids) for ids in completion_ids}
    if lengths != {work.summary_len} or len(completion_ids) != work.users * work.group:
        raise ValueError(f"{len(completion_ids)} samples of {lengths} tokens")


def average_ids(completion_ids: list[list[int]]) -> list[float]:
    return [float(np.mean(ids)) for ids in completion_ids]


def make_margin_reward(
    work: Workload, generator: transformers.PreTrainedModel, texts: Texts
) -> Any:
    """Mean over the user's pairs of log sigmoid(beta * (log-prob of chosen - of rejected)) behind
    the summary."""
    turns = texts.ids(work.users, 2, work.pairs, work.prompt_len + work.answer_len)
    pairs = torch.from_numpy(turns).flatten(1, 2)  # users, chosen then rejected, tokens

    def reward(completion_ids: list[list[int]], user: list[int]) -> list[float]:
        summaries = torch.tensor(completion_ids)
        turns = pairs[torch.tensor(user)]  # samples, 2 * pairs, tokens
        rows = torch.cat([summaries[:, None].expand(-1, turns.shape[1], -1), turns], dim=-1)
        margins = []
        for part in rows.split(
            work.group
        ):  # the samples of one user at a time: activations stay in the cache
            ids = part.flatten(0, 1)
            with torch.no_grad():
                logits = generator(
                    input_ids=ids, use_cache=False, logits_to_keep=work.answer_len + 1
                ).logits[:, :-1]
            logps = -torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, -work.answer_len :].flatten(), reduction="none"
            )
            chosen, rejected = (
                logps.view(len(part), 2, work.pairs, work.answer_len).sum(-1).unbind(1)
            )
            margins.append(
                torch.nn.functional.logsigmoid(protocol.DPO_BETA * (chosen - rejected)).mean(-1)
            )
        return torch.cat(margins).tolist()

    return reward


def pause_trainer(trainer: transformers.Trainer, parts: Parts | None = None) -> Paused:
    def loop(pause: Pause) -> None:
        trainer.add_callback(Pauses(pause))
        trainer.train()

    return Paused(loop, parts)


def compute_checksum(model: transformers.PreTrainedModel) -> float:
    return float(sum(p.detach().double().abs().sum() for p in model.parameters()))


def open_workload(name: str, geometry: Geometry) -> Running:
    work, stored_reference = protocol.find_workload(name)
    torch.set_num_threads(os.cpu_count() or 1)
    trainers = Trainers(work, geometry, stored_reference)
    parts = Parts()
    loops: dict[str, Paused] = {}
    watched: dict[str, transformers.PreTrainedModel] = {}
    trained: dict[str, transformers.PreTrainedModel] = {}

    if work.kind in ("dpo", "popi"):
        dpo = trainers.dpo()
        loops["dpo"] = pause_trainer(dpo)
        trained["dpo"] = watched["dpo policy"] = dpo.model
        if dpo.ref_model is not None:
            watched["dpo reference"] = dpo.ref_model
    if work.kind in ("grpo", "popi"):
        scored = (
            make_margin_reward(work, dpo.model, trainers.texts) if work.kind == "popi" else None
        )

        def reward(completion_ids: list[list[int]], user: list[int], **kwargs: Any) -> list[float]:
            check_lengths(completion_ids, work)
            return scored(completion_ids, user) if scored else average_ids(completion_ids)

        grpo = trainers.grpo(parts.wrap("reward", reward))
        grpo.model.generate = parts.wrap("rollout", grpo.model.generate)
        loops["grpo"] = pause_trainer(grpo, parts)
        trained["grpo"] = watched["grpo policy"] = grpo.model
        watched["grpo reference"] = grpo.ref_model

    def step() -> Cost:
        return protocol.step_loops(loops)

    forwards = Forwards(**watched)
    first = protocol.make_first_step(step, trained, compute_checksum)
    counts = forwards.take()
    return Running(step, counts, [], first)


if __name__ == "__main__":
    packages = {"trl": trl, "torch": torch, "transformers": transformers}
    protocol.serve(
        "trl", open_workload, {name: module.__version__ for name, module in packages.items()}
    )
