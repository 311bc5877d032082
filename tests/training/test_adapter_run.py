"""A run that trains adapters on a Hugging Face folder: continues to the bit, is used as it was
trained, is exported."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from popi_jax.checkpoints import hf_io
from popi_jax.errors import UserError
from popi_jax.models.lora import merge
from popi_jax.run import open_run
from popi_jax.training import loop, reference, restore
from tests.tiny_run import command, config_of, on_devices, read_jsonl, shared_run

export = command("export")

STEPS = 3


def leaves(tree: object) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_adapters_from_start_to_export(tmp_path: Path) -> None:
    base = tmp_path / "base"
    export.export_role(shared_run(8).workdir, "generator", base)
    own = {
        "model.checkpoint": base,
        "warmup.steps": 0,
        "generator.lora.rank": 2,
        "generator.ema_decay": 0.5,
        "inference.lora.rank": 4,
        "inference.lora.targets": "('q', 'v')",
        "schedule.phases": "('joint 3',)",
        "schedule.save_every": 1,
        "schedule.keep": 3,
        "data.validation_fraction": 0.1,  # so that there is somebody to look at
    }
    config = config_of(
        tmp_path / "run", *(f"--config.{name}={value}" for name, value in own.items())
    )
    workdir = Path(config.workdir)
    with on_devices(1):
        run = open_run(config)
        first = loop.train(run)
        rows = read_jsonl(workdir / "metrics.jsonl")
        assert [row["step"] for row in rows if "probe/nats_start_judge" in row] == [0, STEPS]
        end = jax.device_get(
            (first.state.inference.params, first.state.generator.params, first.state.generator.ema)
        )
        shutil.rmtree(workdir / "checkpoints" / str(STEPS))
        again = loop.train(run)  # from the step before
        state = again.state
        for x, y in zip(
            leaves(end),
            leaves((state.inference.params, state.generator.params, state.generator.ema)),
            strict=True,
        ):
            np.testing.assert_array_equal(x, y)
        assert any(
            np.abs(x).max() > 0
            for x in leaves(state.inference.params["layers"]["attention"]["q"]["b"])
        )

        # what is used later is the average of the adapters, on the base that both roles share
        restored = restore.restore_run(run)
        used, used_by_generator = loop.use_models(again, config)
        for x, y in zip(
            leaves((used, used_by_generator)),
            leaves((restored.inference, restored.generator)),
            strict=True,
        ):
            np.testing.assert_array_equal(x, y)
        assert again.frozen.inference is again.frozen.generator
        whole = hf_io.read_params(base, run.inference.model)
        for x, y in zip(leaves(again.frozen.generator), leaves(whole), strict=True):
            np.testing.assert_array_equal(x, y)
    assert not (workdir / "reference" / "generator").exists()  # the base is not copied into the run

    for _ in range(2):  # an earlier export is replaced
        export.export_role(workdir, "generator", tmp_path / "out" / "generator")
    merged = hf_io.read_params(tmp_path / "out" / "generator", run.inference.model)
    expected = merge(whole, end[2], scale=config.generator.lora.alpha / config.generator.lora.rank)
    for x, y in zip(leaves(merged), leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    assert (tmp_path / "out" / "generator-adapter" / "adapter_model.safetensors").exists()

    shutil.rmtree(base)
    with on_devices(1), pytest.raises(UserError, match="base"):
        reference.read_base(config, run.inference.model, run.mesh)
