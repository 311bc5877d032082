"""From a configuration to all that a command runs with: devices, data, tokenizer, model. One way
for all commands."""

import dataclasses
import json
import os
from pathlib import Path
from typing import NamedTuple

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from popi_jax import distributed
from popi_jax.checkpoints.hf_config import read_config
from popi_jax.checkpoints.manager import check_same_run, stored_config
from popi_jax.config import Config, DataConfig
from popi_jax.config_rules import check_mesh, parse_rules, resolve_mesh
from popi_jax.data import prompts, tokenizer
from popi_jax.data.encode import Truncations
from popi_jax.data.measure import fit_lengths
from popi_jax.data.prepared import Dataset, prepare
from popi_jax.data.tokenizer import Tokenizer
from popi_jax.errors import UserError
from popi_jax.models.sampling import Sampling
from popi_jax.models.transformer import TransformerConfig
from popi_jax.popi.roles import Glue
from popi_jax.sharding import Rules, make_mesh

VOCAB_MULTIPLE = 64  # so that the vocabulary divides over the devices of an axis


class Built(NamedTuple):
    config: Config  # with the padded lengths fitted to the data
    config_json: str  # as given, for checkpoints
    mesh: Mesh  # set as the current mesh
    dataset: Dataset
    tokenizer: Tokenizer
    model: TransformerConfig
    glue: Glue
    sampling: Sampling


def compiled_folder(config: Config) -> Path:
    """Where compiled programs are kept: beside the prepared data, so that runs share them."""
    return Path(config.data.prepared).parent / "compiled"


def start_devices(config: Config) -> Mesh:
    """Starts JAX as the configuration asks, before any array exists, and sets the mesh.

    Raises: UserError when the mesh does not fit the devices.
    """
    simulated = max(
        config.mesh.num_devices,
        8 if "host_platform_device_count" in os.environ.get("XLA_FLAGS", "") else 1,
    )
    if simulated > 1:
        # collectives of simulated devices block threads of XLA's pool, of which NPROC says how many
        # there are
        os.environ.setdefault("NPROC", str(4 * simulated))
    if config.mesh.num_devices and os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
        jax.config.update("jax_num_cpu_devices", config.mesh.num_devices)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(compiled_folder(config)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    distributed.start()
    check_mesh(config, jax.device_count())
    mesh = make_mesh(*resolve_mesh(config.mesh, jax.device_count()))
    jax.set_mesh(mesh)
    return mesh


def model_config(config: Config, vocab_size: int) -> TransformerConfig:
    """The shape of both models: that of the base checkpoint, else the configuration's.

    Raises: UserError when the checkpoint has fewer embeddings than its tokenizer has tokens.
    """
    m = config.model
    rules, rollout_rules = mesh_rules(config)
    if m.checkpoint:
        read = read_config(m.checkpoint, dtype=m.dtype, remat=m.remat, attention=m.attention)
        model = dataclasses.replace(read, rules=rules, rollout_rules=rollout_rules)
        if model.vocab_size < vocab_size:
            raise UserError(
                f"{m.checkpoint}: the tokenizer has {vocab_size} tokens, but model.embed_tokens.weight has shape "
                f"[{model.vocab_size}, {model.embed_dim}], needs at least [{vocab_size}, {model.embed_dim}]; "
                "give a folder whose tokenizer and weights belong together"
            )
        return model
    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    shape = {name: value for name, value in vars(m).items() if name in names}
    shape |= {"vocab_size": -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE}
    return TransformerConfig(**shape, rules=rules, rollout_rules=rollout_rules)


def mesh_rules(config: Config) -> tuple[Rules, Rules]:
    """The layouts while training and while sampling."""
    tables = {name: getattr(config.mesh, name) for name in ("rules", "rollout_rules")}
    rules, rollout_rules = (
        Rules(**parse_rules(table, f"mesh.{name}")) for name, table in tables.items()
    )
    return rules, rollout_rules


def load_tokenizer(config: Config, dataset: Dataset) -> Tokenizer:
    """The run's own tokenizer, else the checkpoint's, else one trained on the training split and
    kept with the run."""
    folder = epath.Path(config.workdir) / "tokenizer"
    if stored_config(
        config.workdir
    ):  # without a checkpoint it may be of an attempt with other settings
        return tokenizer.load(folder)
    if config.model.checkpoint:
        made = tokenizer.load(config.model.checkpoint)
    else:
        made = tokenizer.train(
            prompts.list_training_texts(dataset.splits["train"], config), config.model.vocab_size
        )
    if distributed.is_main_process():
        made.save(folder)
    distributed.wait_for_all("the tokenizer that process 0 writes")
    if not folder.is_dir():
        raise UserError(
            f'config.workdir: process {jax.process_index()} does not see "{folder}", which process 0 wrote; '
            "give a WORKDIR that all hosts share"
        )
    return made


def _lengths(
    config: Config, dataset: Dataset, words: Tokenizer, *, begun: bool
) -> tuple[DataConfig, Truncations]:
    """`fit_lengths`, kept beside the tokenizer, so that a run that continues need not encode its
    users again."""
    path = epath.Path(config.workdir) / "tokenizer" / "lengths.json"
    if begun and path.exists():
        known = json.loads(path.read_text())
        return dataclasses.replace(config.data, **known["lengths"]), Truncations(
            *known["truncations"]
        )
    lengths, cut = fit_lengths(dataset.splits["train"], words, config)
    if distributed.is_main_process():
        path.write_text(json.dumps({"lengths": lengths, "truncations": list(cut)}))
    return dataclasses.replace(config.data, **lengths), cut


def never_drawn(words: Tokenizer, model: TransformerConfig) -> tuple[int, ...]:
    """The control tokens other than the end of a reply, and the numbers beyond the tokenizer's
    vocabulary."""
    return (*sorted(words.control_ids - {words.eos_id}), *range(words.vocab_size, model.vocab_size))


def build(config: Config, config_json: str) -> Built:
    """Raises: UserError for whatever is wrong with the data, the devices or the work directory."""
    stored = stored_config(config.workdir)
    stored_data = (stored or {}).get("dataset", {})
    if (
        stored
    ):  # before any work on the data; what the data are is checked again when they are known
        same_data = {"dataset": stored_data} if stored_data else {}
        check_same_run(config.workdir, json.dumps(json.loads(config_json) | same_data))
    mesh = start_devices(config)
    on_laptop = distributed.is_alone_on_cpu(os.environ)
    dataset = prepare(config.data, allow_sample=on_laptop, trained_on=stored_data.get("data", ""))
    if dataset.data == "sample":
        logging.warning("The data are the made PRISM-format sample, not real data.")
    words = load_tokenizer(config, dataset)
    data, cut = _lengths(config, dataset, words, begun=bool(stored))
    if cut.contexts or cut.turns or cut.answers:
        logging.warning(
            "Too long and shortened, in the %d training users measured: %d signals (data.context_len = %d), "
            "%d prompts of %d (data.turn_len = %d), %d replies of %d (data.answer_len = %d).",
            *(
                cut.users,
                cut.contexts,
                config.data.context_len,
                cut.turns,
                cut.pairs,
                config.data.turn_len,
            ),
            *(cut.answers, 2 * cut.pairs, config.data.answer_len),
        )
    config = dataclasses.replace(config, data=data)
    glue = Glue(
        tuple(prompts.render_generator_prefix(words, config)),
        tuple(prompts.render_summary_turn(words, config)),
    )
    model = model_config(config, words.vocab_size)
    sampling = Sampling(
        config.inference.temperature, data.summary_len, words.eos_id, never_drawn(words, model)
    )
    origin = {"data": dataset.data, "prepared": dataset.prepared.name}
    config_json = json.dumps(
        json.loads(config_json) | {"dataset": origin}
    )  # stored with each checkpoint
    check_same_run(config.workdir, config_json)
    return Built(config, config_json, mesh, dataset, words, model, glue, sampling)
