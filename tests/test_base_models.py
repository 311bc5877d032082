"""From a base model to a run, from the run to its exports, from an export to the next run."""

import dataclasses
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax import cli
from popi_jax import run as runs
from popi_jax.arrays import RoleState, Tokens, TrainState
from popi_jax.checkpoints import hf_io, hub, manager, model_card
from popi_jax.config import Config, to_json
from popi_jax.data import tokenizer
from popi_jax.errors import UserError
from popi_jax.models.layout import UNSPLIT
from popi_jax.models.lora import init_lora_boxed
from popi_jax.models.packing import Tree
from popi_jax.models.transformer import TransformerConfig, init_boxed, join_adapters, unbox
from popi_jax.popi.scorer import score_answers
from tests import tiny_run
from tests.checkpoints import fake_hub
from tests.checkpoints.fake_hub import FakeHub

export = tiny_run.command("export")
WORDS = tokenizer.train(["short answers please", "how do magnets work"], 300)
LORA = (
    "--config.generator.lora.rank=2",
    "--config.generator.lora.alpha=6.0",
    "--config.inference.lora.rank=2",
)
BASE = model_card.BaseModel(
    "org/x", "org/x", "abc", model_card.Licence("other", "mit-and-cc-by-nc-4.0")
)
CARD = "---\nlicense: llama3.1\nlicense_link: LICENSE\n---\n# A base\n"


def load_config(workdir: Path, checkpoint: object, *overrides: str) -> Config:
    own = (f"--config.workdir={workdir}", f"--config.model.checkpoint={checkpoint}")
    off = ("--config.warmup.steps=0",) if checkpoint else ()
    return cli.load_config("smoke", [*own, *off, *overrides])


def model_of(config: Config) -> TransformerConfig:
    """Not laid out on a mesh, so that it computes anywhere."""
    found = hub.find_cached(config.model.checkpoint) if config.model.checkpoint else ""
    at = dataclasses.replace(config.model, checkpoint=found)
    made = runs.make_model(dataclasses.replace(config, model=at), 0 if found else WORDS.vocab_size)
    return dataclasses.replace(made, rules=UNSPLIT, rollout_rules=UNSPLIT)


def write_run(
    config: Config, params: Any, *, commit: str = "", step: int = 7, data: str = "sample"
) -> None:
    """A workdir as training leaves it."""
    role, zero = RoleState(np.int32(0), params, ()), np.int32(0)
    state = TrainState(role, role, step=zero, key=jax.random.key(0))
    base = {"base": {"commit": commit}} if commit else {}
    text = json.dumps(json.loads(to_json(config)) | base | {"dataset": {"data": data}})
    checkpoints = manager.open_manager(config.workdir, 2, text)
    manager.save(checkpoints, step, state, None, text)
    manager.close(checkpoints)
    WORDS.save(Path(config.workdir) / "tokenizer")


def draw(tree: Any, seed: int) -> Any:
    """Of the same shapes, so large that a wrong place would show."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), tree)


def score(params: Any, model: TransformerConfig) -> np.ndarray:
    rng = np.random.default_rng(0)

    def take(*shape: int) -> Tokens:
        full = np.full(shape[:-1], shape[-1], np.int32)
        return Tokens(jnp.asarray(rng.integers(0, 256, shape)), jnp.asarray(full))

    tree = Tree(take(2, 6), take(2, 1, 4), take(2, 1, 2, 5))
    return np.asarray(jax.jit(lambda p: score_answers(p, tree, model=model).logps)(params))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder, itself the export of a run."""
    workdir = tmp_path_factory.mktemp("first")
    config = load_config(workdir, "")
    shapes = jax.eval_shape(lambda key: unbox(init_boxed(key, model_of(config))), jax.random.key(0))
    write_run(config, draw(shapes, 0))
    export.export_role(workdir, "generator", workdir / "base")
    (workdir / "base" / "README.md").write_text(CARD)
    (workdir / "base" / "LICENSE").write_text("the terms")
    path = workdir / "base" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [5, WORDS.eos_id, 10**6], "temperature": 0.6}))
    return workdir / "base"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub.serve(tmp_path / "home") as hub:
        yield hub


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_of_all_parameters_scores_as_the_run(base, tmp_path, dtype):
    config = load_config(tmp_path, base, f"--config.model.dtype={dtype}")
    model = model_of(config)
    params = draw(hf_io.read_params(base, model), 1)
    write_run(config, params)
    export.export_role(tmp_path, "generator", tmp_path / "out")
    again = load_config(tmp_path, tmp_path / "out", f"--config.model.dtype={dtype}")
    assert model_of(again) == model
    found = hf_io.read_params(tmp_path / "out", model)
    rounded = jax.tree.map(lambda x: x.astype(hf_io.DTYPES[dtype]).astype(np.float32), params)
    np.testing.assert_array_equal(score(found, model), score(rounded, model))


def test_exported_adapters_score_as_the_run(base, tmp_path):
    config = load_config(tmp_path, base, *LORA)
    model = model_of(config)
    whole = hf_io.read_params(base, model)
    lora = draw(
        unbox(init_lora_boxed(jax.random.key(0), model, rank=2, targets=("q", "k", "v", "down"))), 2
    )
    write_run(config, lora)
    trained = export.read_role(str(tmp_path), "generator", None)
    export.export_role(tmp_path, "generator", tmp_path / "out")
    found = score(hf_io.read_params(tmp_path / "out", model), model)
    np.testing.assert_array_equal(found, score(jax.device_get(trained.params), model))
    joined = join_adapters(whole, jax.tree.map(jnp.asarray, lora), scale=3.0)
    np.testing.assert_allclose(found, score(joined, model), atol=1e-4)
    assert np.abs(found - score(whole, model)).max() > 0.1
    named = json.loads((tmp_path / "out-adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(base)
    assert named["revision"] is None


def test_the_base_of_an_adapter_is_named_for_all_folders(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    config = load_config(tmp_path, "base", *LORA)
    write_run(
        config,
        draw(
            unbox(init_lora_boxed(jax.random.key(0), model_of(config), rank=2, targets=("q",))), 3
        ),
    )
    export.export_role(tmp_path, "inference", tmp_path / "out")
    named = json.loads((tmp_path / "out-adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(base)


def test_a_run_and_its_exports_keep_to_the_commit_of_the_hub(base, served, tmp_path):
    commit = served.push_folder("org/tiny", base)
    own = {
        "model.checkpoint": "org/tiny",
        "warmup.steps": 0,
        "generator.lora.rank": 2,
        "inference.lora.rank": 2,
    }
    config = tiny_run.config_of(
        tmp_path / "run", *(f"--config.{name}={value}" for name, value in own.items())
    )
    with tiny_run.on_devices(1):
        run = runs.open_run(config)
        assert run.config.model.checkpoint.endswith(commit)
        assert json.loads(run.config_json)["model"]["checkpoint"] == "org/tiny"
        assert json.loads(run.config_json)["base"] == {"commit": commit}
        lora = init_lora_boxed(jax.random.key(0), run.inference.model, rank=2, targets=("q", "v"))
        write_run(config, draw(unbox(lora), 4), commit=commit)
        run.inference.tokenizer.save(tmp_path / "run" / "tokenizer")
        stored = json.loads(run.config_json)
        checkpoint = tmp_path / "run" / "checkpoints" / "7" / "config" / "metadata"
        checkpoint.write_text(json.dumps(stored))
        served.push("org/tiny", {"config.json": b"{}", "model.safetensors": b"another model"})
        again = runs.open_run(config, must_exist=True)
        assert again.config.model == run.config.model
        assert again.config_json == run.config_json
    export.export_role(tmp_path / "run", "generator", tmp_path / "out" / "generator")
    folder = tmp_path / "out" / "generator-adapter"
    named = json.loads((folder / "adapter_config.json").read_text())
    assert (named["base_model_name_or_path"], named["revision"]) == ("org/tiny", commit)
    for part, library in (("generator", "transformers"), ("generator-adapter", "peft")):
        _, header, card = (tmp_path / "out" / part / "README.md").read_text().split("---\n", 2)
        assert f"library_name: {library}\n" in header
        assert "base_model: org/tiny\n" in header
        assert f"| base weights | org/tiny at commit {commit} |" in card
        assert ('from_pretrained("generator-adapter")' in card) == (library == "peft")


def test_what_an_export_says_of_licences_and_ends(base, tmp_path):
    config = load_config(tmp_path, base)
    write_run(config, draw(hf_io.read_params(base, model_of(config)), 1))
    export.export_role(tmp_path, "generator", tmp_path / "out")
    _, header, card = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert 'license: "llama3.1"\nlicense_link: "LICENSE"\n' in header
    assert "base_model" not in header  # a path is no name on the hub
    assert "its licence: llama3.1 (LICENSE)." in card and "Built with Llama" in card
    assert (tmp_path / "out" / "LICENSE").read_text() == "the terms"
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert ends == {
        "bos_token_id": WORDS.bos_id,
        "eos_token_id": [WORDS.eos_id, 5],
        "pad_token_id": WORDS.pad_id,
    }


def test_data_that_forbid_commerce_narrow_the_licence(base, tmp_path):
    for checkpoint, expected in (
        (base, 'license: "other"\nlicense_name: "llama3.1-and-cc-by-nc-4.0"\nlicense_link:'),
        ("", 'license: "cc-by-nc-4.0"\ntags'),
    ):
        config = load_config(tmp_path / f"run{bool(checkpoint)}", checkpoint)
        write_run(config, hf_io.read_params(base, model_of(config)), data="published")
        export.export_role(config.workdir, "generator", tmp_path / "out")
        assert expected in (tmp_path / "out" / "README.md").read_text().split("---\n")[1]
    # an export of such an export says it once
    facts = model_card.Facts("generator", 1, 1, "", "published", "CC-BY-NC-4.0", BASE)
    assert 'license_name: "mit-and-cc-by-nc-4.0"' in model_card.render(config, facts, [])


def test_a_card_that_cannot_be_read_leaves_the_licence_open(tmp_path):
    for card in ("no header", "---\n- a\n---\n", "---\na: [\n---\n", "---\nlicense: [a]\n---\n"):
        (tmp_path / "README.md").write_text(card)
        assert model_card.read_licence(tmp_path) == model_card.Licence()


def test_shards_have_the_size_asked_for_and_the_mode_of_any_file(base, tmp_path):
    config = load_config(tmp_path, base)
    write_run(config, draw(hf_io.read_params(base, model_of(config)), 1))
    with tiny_run.flags_set(f"--out={tmp_path}/out", "--role=generator", "--max_shard_size=5e-5"):
        export.main(config)
    files = sorted((tmp_path / "out" / "generator").glob("*.safetensors"))
    assert len(files) > 1
    assert all(file.stat().st_size < 6e4 for file in files)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out/generator").iterdir()}
    assert modes == {stat.S_IMODE((tmp_path / "out/generator/config.json").stat().st_mode)}
    params = hf_io.read_params(tmp_path / "out" / "generator", model_of(config))
    whole = manager.restore_params(str(tmp_path), "generator")[1]
    jax.tree.map(np.testing.assert_array_equal, params, whole)


def test_an_older_step_is_described_by_its_own_settings(base, tmp_path):
    config = load_config(tmp_path, base, "--config.name=first")
    params = draw(hf_io.read_params(base, model_of(config)), 1)
    write_run(config, params, step=3)
    write_run(dataclasses.replace(config, name="second"), params, step=4)
    for step, name in ((3, "first"), (4, "second"), (None, "second")):
        export.export_role(tmp_path, "generator", tmp_path / "out", step)
        assert f"# {name}: generator" in (tmp_path / "out" / "README.md").read_text()


def test_a_base_that_is_gone_is_told(base, tmp_path):
    config = load_config(tmp_path, base)
    write_run(config, draw(hf_io.read_params(base, model_of(config)), 1))
    base.rename(base.with_name("moved"))
    try:
        with pytest.raises(UserError, match=r"base\": there is no such folder"):
            export.export_role(tmp_path, "generator", tmp_path / "out")
    finally:
        base.with_name("moved").rename(base)
