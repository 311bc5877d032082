"""Writes the newest checkpoint of a run as Hugging Face folders, which transformers loads: one per
role."""

import json
import math
import os
from pathlib import Path
from typing import Any

from absl import flags

from popi_jax import cli
from popi_jax.config import Config, from_json
from popi_jax.errors import UserError

_OUT = flags.DEFINE_string("out", "", "folder of the exports; empty: <workdir>/export")
_ROLE = flags.DEFINE_enum(
    "role", "both", ["inference", "generator", "both"], "which model to export"
)


def main(config: Config) -> None:
    os.environ["JAX_PLATFORMS"] = (
        "cpu"  # copying files needs no accelerator, and one may be busy with training
    )
    from popi_jax.checkpoints.manager import ROLES, full_disk_told

    if "://" in config.workdir and not _OUT.value:
        raise UserError(
            f'--out: the run is in "{config.workdir}"; name a folder on the disk for the exports'
        )
    out = Path(_OUT.value or Path(config.workdir) / "export")
    roles = ROLES if _ROLE.value == "both" else (_ROLE.value,)
    with full_disk_told(out):
        for role in roles:
            export_role(config.workdir, role, out / role)


def export_role(workdir: str | os.PathLike[str], role: str, target: Path) -> None:
    """Writes config.json, weights, tokenizer and model card of one role; an earlier export in
    `target` is replaced.

    Of a run that trains adapters the weights are merged, and <target>-adapter holds the adapters
    alone, for `peft`. Everything but the place comes from the run itself, so the flags of the
    training need not be repeated. Raises: UserError if the folder holds no run, or a file of it is
    missing or broken."""
    from etils import epath
    from jax import tree

    from popi_jax.checkpoints import adapter, hf_config, hf_io, manager, model_card
    from popi_jax.data import tokenizer as tokenizers
    from popi_jax.models.lora import merge

    run_folder = epath.Path(workdir)
    step, params = manager.restore_params(str(run_folder), role)
    run, data = stored_run(run_folder)
    if not (run_folder / "tokenizer").is_dir():
        raise UserError(
            f"{run_folder / 'tokenizer'}: not found; give the --config.workdir of a run, which stores it there"
        )
    tokenizer = tokenizers.load(run_folder / "tokenizer")
    lora, adapters = getattr(run, role).lora, None
    if lora.rank:
        cfg, adapters = model_config(run, vocab_size=0), params
        params = merge(
            hf_io.read_params(run.model.checkpoint, cfg), adapters, scale=lora.alpha / lora.rank
        )
    else:
        cfg = model_config(run, vocab_size=params["embed"]["embedding"].shape[0])
    lengths = run.data
    trained_len = lengths.context_len + lengths.summary_len + lengths.turn_len + lengths.answer_len
    base = hf_config.Base("", None)
    if run.model.checkpoint:
        base = hf_config.read_base(run.model.checkpoint)
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    num_params = sum(math.prod(x.shape) for x in tree.leaves(params))
    card = model_card.render(
        run,
        role=role,
        step=step,
        num_params=num_params,
        architecture=hf_config.FAMILIES[hf_config.family_of(cfg, base.model_type)].architecture,
        dtype=run.model.dtype,
        data=data,
        results=read_results(run_folder / "results.json"),
    )
    with hf_io.new_export(target) as folder:
        hf_io.write_model(
            folder,
            params,
            cfg,
            dtype=run.model.dtype,
            max_len=base.max_len or trained_len,
            special_ids={name: value for name, value in ids.items() if value is not None},
            mark={"role": role, "step": step, "run": run.name, "data": data},
            model_type=base.model_type,
        )
        tokenizer.save(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    if adapters is not None:
        beside = target.with_name(f"{target.name}-adapter")
        with hf_io.new_export(beside) as folder:
            adapter.write_adapter(
                folder,
                adapters,
                cfg,
                alpha=lora.alpha,
                base=run.model.checkpoint,
                decoder="model.language_model" if base.model_type == "gemma3" else "model",
            )
            (folder / hf_io.MARK_FILE).write_text(
                json.dumps({"role": role, "step": step, "run": run.name}) + "\n"
            )
            tokenizer.save(folder)
            (folder / "README.md").write_text(card, encoding="utf-8")
        print(f"{beside}: its adapters alone, of rank {lora.rank}, for {run.model.checkpoint}")
    print(f"{target}: {role} model of step {step}, {num_params:,} parameters as {run.model.dtype}")


def stored_run(workdir: str | os.PathLike[str]) -> tuple[Config, str]:
    """Returns the configuration that the newest checkpoint was trained with, and the kind of its
    data ("" unknown)."""
    from popi_jax.checkpoints import manager

    stored = manager.stored_config(str(workdir))
    if stored is None:
        raise UserError(f'config.workdir: no checkpoint in "{workdir}" can be read; train first')
    dataset = stored.pop("dataset", {})
    return from_json(json.dumps(stored)), dataset.get("data", "")


def model_config(run: Config, vocab_size: int) -> Any:
    """Returns the TransformerConfig of a run; its shape is that of the base weights when it started
    from some."""
    import dataclasses

    from popi_jax.checkpoints import hf_config
    from popi_jax.models.transformer import TransformerConfig

    model = run.model
    if model.checkpoint:
        return hf_config.read_config(model.checkpoint, dtype=model.dtype, remat=model.remat)
    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    shape = {name: value for name, value in dataclasses.asdict(model).items() if name in names}
    return TransformerConfig(**shape | {"vocab_size": vocab_size})


def read_results(path: Any) -> list[dict[str, Any]]:
    """Returns the rows of an evaluation, [] if there was none. Raises: UserError if the file is
    broken."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON: {e}; evaluate again, or remove the file") from e
    rows = rows.get("rows", []) if isinstance(rows, dict) else rows
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a list of objects; evaluate again, or remove the file")
    return rows


if __name__ == "__main__":
    cli.run(
        main,
        description=__doc__,
        example="python -m popi_jax.export --config=prism --config.workdir=work/prism",
    )
