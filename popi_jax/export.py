"""Writes a checkpoint of a run as Hugging Face folders, which transformers loads: one per role.

One host does, on its CPUs, whatever devices the run was trained on."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from popi_jax import cli
from popi_jax.config import Config, from_json
from popi_jax.errors import UserError

_OUT = cli.define_path("out", "", "folder of the exports; empty: <workdir>/export")
_ROLE = flags.DEFINE_enum(
    "role", "both", ["inference", "generator", "both"], "which model to export"
)
_STEP = flags.DEFINE_integer("step", None, "checkpoint to export; default: the newest")
_SHARD = flags.DEFINE_float(
    "max_shard_size", 5.0, "most GB (10^9 bytes) of a file of weights", lower_bound=1e-6
)


def main(config: Config) -> None:
    os.environ["JAX_PLATFORMS"] = (
        "cpu"  # copying files needs no accelerator, and one may be busy with training
    )
    from popi_jax.checkpoints.manager import ROLES, tell_full_disk

    if "://" in config.workdir and not _OUT.value:
        raise UserError(
            f'--out: the run is in "{config.workdir}"; name a folder on the disk for the exports'
        )
    out = Path(_OUT.value or Path(config.workdir) / "export")
    roles = ROLES if _ROLE.value == "both" else (_ROLE.value,)
    with tell_full_disk(out):
        for role in roles:
            export_role(config.workdir, role, out / role, _STEP.value, max_shard_gb=_SHARD.value)


def export_role(
    workdir: str | os.PathLike[str],
    role: str,
    target: Path,
    step: int | None = None,
    *,
    max_shard_gb: float = 5.0,
) -> None:
    """Writes config.json, weights, tokenizer and model card of one role; an earlier export in
    `target` is replaced.

    Of a run that trains adapters the weights are merged, and <target>-adapter holds the adapters
    alone, for `peft`. Everything but the place comes from the run itself, so the flags of the
    training need not be repeated. Raises: UserError if the folder holds no run or no such step, or
    a file of it is missing or broken."""
    trained = read_role(str(workdir), role, step)
    config, results = trained.config, read_results(str(workdir), trained.step)
    write_model(trained, render_card(trained, results), target, max_shard_gb)
    if trained.adapters is not None:
        beside = target.with_name(f"{target.name}-adapter")
        write_adapter(trained, render_card(trained, results, beside.name), beside)
        rank = getattr(config, role).lora.rank
        print(f"{beside}: its adapters alone, of rank {rank}, for {trained.describe_base()}")
    count, dtype = trained.count_params(), config.model.dtype
    print(f"{target}: {role} model of step {trained.step}, {count:,} parameters as {dtype}")


class TrainedRole(NamedTuple):
    """All that an export needs of a run."""

    role: str
    step: int
    config: Config
    data: str  # published, sample, own; "": unknown
    model: Any  # TransformerConfig
    params: Any  # of the whole model
    adapters: Any  # None where all parameters are trained
    tokenizer: Any
    base: Any  # hf_config.Base of the folder that the model came from
    origin: Any  # hub.Origin: where that folder is

    def describe_base(self) -> Any:  # model_card.BaseModel
        from popi_jax.checkpoints import model_card

        if not self.origin.folder:
            return model_card.BaseModel("")
        return model_card.BaseModel(
            self.config.model.checkpoint,
            self.origin.repository,
            self.origin.commit,
            model_card.read_licence(self.origin.folder),
        )

    def count_params(self) -> int:
        from jax import tree

        return sum(math.prod(x.shape) for x in tree.leaves(self.params))


def read_role(workdir: str, role: str, step: int | None) -> TrainedRole:
    """Raises: UserError as `export_role`."""
    from etils import epath

    from popi_jax.checkpoints import hf_config, hf_io, hub, manager
    from popi_jax.data import tokenizer
    from popi_jax.models.lora import merge
    from popi_jax.run import make_model

    step, params = manager.restore_params(workdir, role, step=step)
    config, data, commit = read_stored_run(workdir, step)
    folder = epath.Path(workdir) / "tokenizer"
    if not folder.is_dir():
        raise UserError(
            f"{folder}: not found; give the --config.workdir of a run, which stores it there"
        )
    origin = hub.open_base(config.model.checkpoint, commit)
    found = dataclasses.replace(config.model, checkpoint=origin.folder)
    lora, adapters = getattr(config, role).lora, None
    rows = 0 if lora.rank else params["embed"]["embedding"].shape[0]
    model = make_model(dataclasses.replace(config, model=found), rows)
    if lora.rank:
        whole, adapters = hf_io.read_params(origin.folder, model), params
        params = merge(whole, adapters, scale=lora.alpha / lora.rank)
    base = hf_config.read_base(origin.folder) if origin.folder else hf_config.Base("", None)
    words = tokenizer.load(folder, system_role=config.model.summary_place == "system")
    return TrainedRole(role, step, config, data, model, params, adapters, words, base, origin)


def render_card(trained: TrainedRole, results: list[dict[str, Any]], adapter: str = "") -> str:
    from popi_jax.checkpoints import hf_config, hf_write, model_card
    from popi_jax.data.prepared import find_source

    config, data = trained.config, trained.data
    family = hf_config.FAMILIES[hf_write.find_family(trained.model, trained.base.model_type)]
    facts = model_card.Facts(
        trained.role,
        trained.step,
        trained.count_params(),
        family.architecture,
        data,
        find_source(config.data.source, data).licence,
        trained.describe_base(),
        takes_system(trained.tokenizer),
    )
    return model_card.render(config, facts, results, adapter)


def takes_system(words: Any) -> bool:
    """Whether a system message, which holds the summary, is written as one, not at the head of the
    message of the user."""
    system, user = {"role": "system", "content": "a"}, {"role": "user", "content": "b"}
    return words.write([system, user]) != words.write([user | {"content": "a\n\nb"}])


def write_model(trained: TrainedRole, card: str, target: Path, max_shard_gb: float) -> None:
    from popi_jax.checkpoints import hf_write
    from popi_jax.data.prompts import WORDING

    config, words, d = trained.config, trained.tokenizer, trained.config.data
    trained_len = d.context_len + d.summary_len + d.turn_len + d.answer_len
    ids = {"bos_token_id": words.bos_id, "eos_token_id": words.eos_id, "pad_token_id": words.pad_id}
    described = hf_write.make_config(
        trained.model,
        dtype=config.model.dtype,
        max_len=trained.base.max_len or trained_len,
        special_ids={name: value for name, value in ids.items() if value is not None},
        model_type=trained.base.model_type,
    )
    mark = {"role": trained.role, "step": trained.step, "run": config.name, "data": trained.data}
    wording = {name: getattr(config.model, name) for name in WORDING}
    with hf_write.open_export(target) as folder:
        described |= {hf_write.MARK: mark | {"wording": wording}}
        size = int(max_shard_gb * 1e9)
        hf_write.write_model(folder, trained.params, trained.model, described, max_shard_bytes=size)
        generation = ids | {"eos_token_id": find_ends(trained)}
        generation = {name: value for name, value in generation.items() if value is not None}
        hf_write.write_json(folder / "generation_config.json", generation)
        finish_folder(trained, card, folder)


def write_adapter(trained: TrainedRole, card: str, target: Path) -> None:
    """Names the base as peft finds it from anywhere: by its commit on the hub, else by its absolute
    path."""
    from popi_jax.checkpoints import adapter, hf_write

    config, origin = trained.config, trained.origin
    elsewhere = config.model.checkpoint if "://" in config.model.checkpoint else ""
    mark = {"role": trained.role, "step": trained.step, "run": config.name}
    with hf_write.open_export(target) as folder:
        adapter.write_adapter(
            folder,
            trained.adapters,
            trained.model,
            alpha=getattr(config, trained.role).lora.alpha,
            base=origin.repository or elsewhere or str(Path(origin.folder).resolve()),
            revision=origin.commit or None,
            decoder=trained.base.decoder,
        )
        hf_write.write_json(folder / hf_write.MARK_FILE, mark)
        finish_folder(trained, card, folder)


def finish_folder(trained: TrainedRole, card: str, folder: Path) -> None:
    """Writes what weights and adapters share: the tokenizer, the card, the licence of the base."""
    trained.tokenizer.save(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    for name in trained.describe_base().licence.files:
        shutil.copyfile(Path(trained.origin.folder) / name, folder / name)


def find_ends(trained: TrainedRole) -> int | list[int]:
    """The tokens at which a server of the model stops: the end of a reply, as the run was trained,
    then those of its base, if it has others."""
    from popi_jax.checkpoints.hf_config import read_json

    ends = [trained.tokenizer.eos_id]
    for name in ("generation_config.json", "config.json") if trained.origin.folder else ():
        path = Path(trained.origin.folder) / name
        found = read_json(path).get("eos_token_id") if path.is_file() else None
        ends += found if isinstance(found, list) else [found]
    known = [end for end in ends if isinstance(end, int) and 0 <= end < trained.model.vocab_size]
    known = list(dict.fromkeys(known))
    return known if len(known) > 1 else known[0]


class StoredRun(NamedTuple):
    """What a checkpoint says of its run beside its arrays."""

    config: Config
    data: str  # the kind of its data; "": unknown
    commit: str  # of the base model on the hub; "": it is not from there


def read_stored_run(workdir: str, step: int) -> StoredRun:
    """Of the checkpoint of a step; settings that may change in a run are those of then.

    Raises: UserError if it cannot be read."""
    from popi_jax.checkpoints import manager

    stored = manager.read_config(workdir, step)
    if stored is None:
        raise UserError(f'config.workdir: no checkpoint in "{workdir}" can be read; train first')
    dataset, base = stored.pop("dataset", {}), stored.pop("base", {})
    config = from_json(json.dumps(stored))
    return StoredRun(config, dataset.get("data", ""), base.get("commit", ""))


def read_results(workdir: str, step: int) -> list[dict[str, Any]]:
    """Returns the rows of the evaluation of the test users at a step, [] if there was none.

    Raises: UserError if the file is broken."""
    from etils import epath

    from popi_jax.evals.render import find_results

    path = find_results(workdir, "test", step) / "results.json"
    if not path.exists():
        path = epath.Path(workdir) / "results.json"
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON: {e}; evaluate again, or remove the file") from e
    if isinstance(found, dict):
        found = found.get("rows", []) if found.get("step") == step else []
    if not all(isinstance(row, dict) for row in found):
        raise UserError(f"{path}: expected a list of objects; evaluate again, or remove the file")
    return found


if __name__ == "__main__":
    cli.run(
        main,
        description=__doc__,
        example="python -m popi_jax.export --config=prism --config.workdir=work/prism",
    )
