"""From a configuration to all that a command works with: devices, data, tokenizers, models. One way
for all commands."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from popi_jax import config_rules, distributed, files
from popi_jax.checkpoints import hf_config, hub, manager
from popi_jax.config import Config, to_json
from popi_jax.data import (
    batches,
    examples,
    measure,
    prompts,
    selection,
    tokenizer,
    tokens,
    warmup_batches,
)
from popi_jax.data.measure import Measured
from popi_jax.data.prepared import Dataset, prepare
from popi_jax.data.tokenizer import Tokenizer
from popi_jax.data.tokens import Encoded
from popi_jax.errors import UserError
from popi_jax.models.decode import Sampling
from popi_jax.models.fused_attention import choose_kernel
from popi_jax.models.layout import Rules
from popi_jax.models.transformer import TransformerConfig
from popi_jax.popi.rollout import PromptTokens
from popi_jax.sharding import find_platform, make_mesh

PREPARE_S = 24 * 3600  # that the processes wait for the one that prepares the data
LAYOUT = 2  # of a workdir; raise it when runs of before cannot be continued
VOCAB_MULTIPLE = 64  # so that the vocabulary divides over the devices of an axis


class RoleParts(NamedTuple):
    """All of a role but its weights."""

    model: TransformerConfig
    tokenizer: Tokenizer
    # token ids that are the same for all users: of the inference model those from the end of the
    # signals to the header of the summary, of the generator all those before the summary
    prompt: tuple[int, ...]
    sampling: Sampling  # of summaries, and of answers


class Roles(NamedTuple):
    """Both roles of a run, without its data. A `Run` has these fields too."""

    config: Config
    mesh: Mesh
    inference: RoleParts
    generator: RoleParts


class Run(NamedTuple):
    # with the padded lengths fitted to the data, and model.checkpoint as a folder of this host
    config: Config
    config_json: str  # as given, and what data and base are: stored with each checkpoint
    mesh: Mesh  # set as the current mesh
    dataset: Dataset
    open_users: Callable[[], Encoded]
    measured: Measured  # of the training users
    inference: RoleParts
    generator: RoleParts

    @property
    def users(self) -> Encoded:
        """The training users as token ids; they are encoded where that was not done before."""
        return self.open_users()

    @property
    def prompt_tokens(self) -> PromptTokens:
        return PromptTokens(self.generator.prompt, self.inference.prompt)

    @property
    def summary_items(self) -> tuple[str, ...]:
        """What the warm-up lists in summaries."""
        return warmup_batches.find_items(self.dataset, self.config)


def open_run(config: Config, *, must_exist: bool = False) -> Run:
    """Opens the run in the workdir of a configuration, or begins one there.

    must_exist: as all but training ask; then nothing in the workdir is changed. Raises: UserError
    for whatever is wrong with the data, the devices or the workdir, such as a run with other
    settings."""
    stored = manager.read_config(config.workdir)
    if must_exist and stored is None:
        raise UserError(
            f'config.workdir: no run in "{config.workdir}"; train first, or give the WORKDIR of a '
            "run"
        )
    config_json = to_json(config)
    origin, base = ((stored or {}).get(name, {}) for name in ("dataset", "base"))
    if stored:  # before any work on the data; what the data are is compared when they are known
        manager.check_same_run(config.workdir, _add_origin(config_json, origin, base))
    mesh = start_devices(config)
    on_laptop = distributed.is_alone_on_cpu(os.environ) and jax.default_backend() == "cpu"
    allowed = {"allow_sample": on_laptop, "trained_on": origin.get("data", "")}
    make = partial(prepare, config.data, **allowed)
    dataset = distributed.make_once(make, Path(config.data.prepared), "the data", PREPARE_S)
    if dataset.data == "sample":
        logging.warning("The data are the made PRISM-format sample, not real data.")
    found = hub.open_base(config.model.checkpoint, base.get("commit", ""))
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, checkpoint=found.folder)
    )
    splits = selection.select_splits(dataset.splits, config.data.signals)
    dataset = dataset._replace(splits=splits)
    words = load_tokenizer(config, dataset, begun=stored is not None)
    dataset, config = examples.split_pairs(dataset, config)
    open_users = functools.cache(partial(encode_users, config, dataset, words))
    measured = load_measured(config, dataset, words, open_users, begun=stored is not None)
    _warn_about_cuts(config, measured.truncations)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **measured.lengths))
    batches.check_personas(dataset.splits["train"], config)
    origin = {"data": dataset.data, "prepared": dataset.prepared.name}
    config_json = _add_origin(config_json, origin, found.to_json())
    manager.check_same_run(config.workdir, config_json)
    if config.model.checkpoint and (told := find_too_long_rows(config)):
        raise UserError(told)
    inference, generator = make_roles(config, words)
    return Run(config, config_json, mesh, dataset, open_users, measured, inference, generator)


def make_roles(config: Config, words: Tokenizer) -> tuple[RoleParts, RoleParts]:
    """All of (the inference model, the generator) but their weights.

    Raises: UserError as `make_model`."""
    model = make_model(config, words.vocab_size)
    summaries = Sampling(
        config.inference.temperature,
        config.data.summary_len,
        words.eos_id,
        list_banned(words, model),
    )
    answers = summaries._replace(temperature=0.0, max_len=config.data.answer_len)
    asking = tuple(prompts.render_summary_turn(words, config))
    prefix = tuple(prompts.render_generator_prefix(words, config))
    inference = RoleParts(model, words, asking, summaries)
    return inference, RoleParts(model, words, prefix, answers)


def start_devices(config: Config) -> Mesh:
    """Starts JAX as the configuration asks, before any array exists, and sets the mesh.

    Raises: UserError when the mesh does not fit the devices."""
    simulated = config.mesh.num_devices
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        simulated = max(simulated, 8)
    if simulated > 1:
        # collectives of simulated devices block threads of XLA's pool, of which NPROC says how many
        # there are
        os.environ.setdefault("NPROC", str(4 * simulated))
    if config.mesh.num_devices and os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
        jax.config.update("jax_num_cpu_devices", config.mesh.num_devices)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        # beside the prepared data, so that runs share what is compiled
        compiled = Path(config.data.prepared).parent / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    distributed.start()
    config_rules.check_mesh(config, jax.device_count())
    mesh = make_mesh(*config_rules.resolve_mesh(config.mesh, jax.device_count()))
    jax.set_mesh(mesh)
    return mesh


def make_model(config: Config, vocab_size: int, platform: str = "") -> TransformerConfig:
    """The shape of both models: that of the base checkpoint, else the configuration's.

    vocab_size: of the tokenizer. platform: tpu, gpu or cpu; "": that of the mesh that is set.
    Too long rows are told. Raises: UserError when the checkpoint has fewer embeddings than the
    tokenizer has tokens that can be read or drawn."""
    m = config.model
    if m.checkpoint:
        model = hf_config.read_config(m.checkpoint, dtype=m.dtype, remat=m.remat)
        if model.vocab_size < vocab_size:
            raise UserError(
                f"{m.checkpoint}: the tokenizer writes {vocab_size} tokens, but "
                f"model.embed_tokens.weight has shape [{model.vocab_size}, {model.embed_dim}], "
                f"needs at least [{vocab_size}, {model.embed_dim}]; give a folder whose tokenizer "
                "and weights belong together"
            )
        if told := find_too_long_rows(config):
            logging.warning(told)
    else:
        names = {field.name for field in dataclasses.fields(TransformerConfig)}
        shape = {name: value for name, value in vars(m).items() if name in names}
        shape["vocab_size"] = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        model = TransformerConfig(**shape)
    rules, rollout_rules = parse_mesh_rules(config)
    kernel = choose_kernel(m.attention, platform or find_platform())
    return dataclasses.replace(model, rules=rules, rollout_rules=rollout_rules, kernel=kernel)


def find_too_long_rows(config: Config) -> str:
    """What is wrong where rows may be longer than the positions that the checkpoint was trained
    for; "" where none may."""
    d, folder = config.data, config.model.checkpoint
    usable = hf_config.read_base(folder).usable_len
    told = "context_len" if config.generator.reads == "signals" else "summary_len"
    for role, names in (
        ("inference model", ("context_len", "turn_len", "summary_len")),
        ("generator", (told, "turn_len", "answer_len")),
    ):
        length = sum(getattr(d, name) for name in names)
        if usable is not None and length > usable:
            parts = " + ".join(f"{name} {getattr(d, name)}" for name in names)
            return (
                f"config.data: rows of the {role} may have {length} tokens ({parts}), but {folder} "
                f"has positions for {usable} (max_position_embeddings of its config.json); lower "
                f"data.{max(names, key=lambda name: getattr(d, name))}"
            )
    return ""


def parse_mesh_rules(config: Config) -> tuple[Rules, Rules]:
    """The layouts while training and while sampling."""
    mesh = config.mesh
    rules = config_rules.parse_rules(mesh.rules, "mesh.rules")
    rollout_rules = config_rules.parse_rules(mesh.rollout_rules, "mesh.rollout_rules")
    return Rules(**rules), Rules(**rollout_rules)


def load_tokenizer(config: Config, dataset: Dataset, *, begun: bool) -> Tokenizer:
    """The tokenizer of a run that has begun, else the checkpoint's, else one trained on the
    training split; it is kept with the run.

    Raises: UserError when it cannot be read, or this process does not see the WORKDIR of process 0.
    """
    folder = epath.Path(config.workdir) / "tokenizer"
    system_role = config.model.summary_place == "system"
    if begun:  # else the folder may be of an attempt with other settings
        return tokenizer.load(folder, system_role=system_role)
    if config.model.checkpoint:
        args = json.loads(config.model.template_args or "{}")
        made = tokenizer.load(config.model.checkpoint, args, system_role=system_role)
        _warn_about_thoughts(made)
    else:
        texts = prompts.list_training_texts(dataset.splits["train"], config)
        made = tokenizer.train(texts, config.model.vocab_size)
    if distributed.is_main_process():
        made.save(folder)
    distributed.wait_for_all("the tokenizer that process 0 writes")
    if not folder.is_dir():
        raise UserError(
            f'config.workdir: process {jax.process_index()} does not see "{folder}", which process '
            "0 wrote; give a WORKDIR that all hosts share"
        )
    return made


def _warn_about_thoughts(words: Tokenizer) -> None:
    thoughts = sorted(words.reply_ids - {words.eos_id})
    if thoughts:
        logging.warning(
            "The chat template lets replies think (%s): summaries may hold thoughts, and fill "
            "data.summary_len with them. If it has a switch, turn it off, such as by "
            """--config.model.template_args='{"enable_thinking": false}'.""",
            " ".join(words.list_names(thoughts)),
        )


def encode_users(config: Config, dataset: Dataset, words: Tokenizer) -> Encoded:
    """The training users, encoded by process 0 and read by all from the prepared copy; called by
    all processes."""
    users = dataset.splits["train"]

    def wait(count: int) -> None:
        limit_s = distributed.BARRIER_S + count // 50
        distributed.wait_for_all("the users that process 0 encodes", limit_s)

    host = tokens.Host(distributed.is_main_process(), wait)
    return tokens.open_encoded(users, words, config, dataset.prepared / "tokens", host=host)


def load_measured(
    config: Config,
    dataset: Dataset,
    words: Tokenizer,
    open_users: Callable[[], Encoded],
    *,
    begun: bool,
) -> Measured:
    """What was measured of the training users, kept beside the tokenizer, so that a run that
    continues need not measure them again."""
    path = epath.Path(config.workdir) / "tokenizer" / "measured.json"
    if begun and path.exists() and not measure.is_outdated(text := path.read_text()):
        return measure.from_json(text, path)
    users, make = open_users(), warmup_batches.make_warmup_batches
    lengths = measure.fit_lengths(users.lengths, words, config)
    fitted = dataclasses.replace(config, data=dataclasses.replace(config.data, **lengths))
    # of one seed, so that runs that differ in theirs share their programs
    main, warmup = batches.make_user_batches(users, words, fitted, seed=0), None
    if config.warmup.steps:
        items = warmup_batches.find_items(dataset, config)
        warmup = make(users, words, fitted, seed=0, items=items)
    cut = measure.count_truncations(users.lengths)
    measured = Measured(lengths, cut, measure.measure_fill(main, warmup, users=len(users.ids)))
    if distributed.is_main_process():
        files.write_whole(path, measure.to_json(measured))
    return measured


def list_banned(words: Tokenizer, model: TransformerConfig) -> tuple[int, ...]:
    """The tokens that are never drawn: control tokens that the template does not write into a
    reply, and the numbers beyond the tokenizer's vocabulary."""
    banned = words.control_ids - words.reply_ids
    banned |= set(range(words.vocab_size, model.vocab_size))
    return tuple(sorted(i for i in banned if i < model.vocab_size))


def _add_origin(config_json: str, origin: dict[str, Any], base: dict[str, str]) -> str:
    """What is stored with each checkpoint; a workdir of another layout is refused by it."""
    dataset = {"dataset": origin | {"layout": LAYOUT}} if origin else {}
    return json.dumps(json.loads(config_json) | dataset | ({"base": base} if base else {}))


def _warn_about_cuts(config: Config, cut: measure.Truncations) -> None:
    """Raises: UserError when no pair is left."""
    d = config.data
    if cut.contexts or cut.turns or cut.answers:
        logging.warning(
            "Too long and shortened, of all %d training users: %d signals "
            "(data.context_len = %d), %d prompts of %d (data.turn_len = %d), %d replies of %d "
            "(data.answer_len = %d).",
            *(cut.users, cut.contexts, d.context_len),
            *(cut.turns, cut.pairs, d.turn_len, cut.answers, 2 * cut.pairs, d.answer_len),
        )
    if cut.emptied:
        logging.warning(
            "Of %d of the %d training users nothing at all is shown: no whole item of their "
            "signals fits into data.context_len = %d; raise it.",
            *(cut.emptied, cut.users, d.context_len),
        )
    if cut.equal:
        told = (
            f"{cut.equal} of {cut.pairs} pairs of the training users do not count: chosen and "
            f"rejected are equal within data.answer_len = {d.answer_len}; raise it where they "
            "differ later."
        )
        if cut.equal == cut.pairs:
            raise UserError(told)
        logging.warning("%s", told)
