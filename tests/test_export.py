import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from popi_jax import cli
from popi_jax import run as runs
from popi_jax.arrays import RoleState, TrainState
from popi_jax.checkpoints import hf_config, hf_io, manager
from popi_jax.config import Config, to_json
from popi_jax.data import prompts, tokenizer
from popi_jax.errors import UserError
from popi_jax.models.layout import UNSPLIT
from popi_jax.models.transformer import init_boxed, unbox
from tests import tiny_run

export = tiny_run.command("export")
TEXTS = [
    "short answers please",
    "how do magnets work",
    "I teach physics at a school",
    "profile: asked: liked: disliked:",
]
TOKENIZER = tokenizer.train(TEXTS, 300)


def make_config(workdir: Path, *overrides: str) -> Config:
    return cli.load_config("smoke", [f"--config.workdir={workdir}", *overrides])


def make_run(workdir: Path, config: Config, dataset: dict | None) -> dict:
    """A workdir as training leaves it, with random weights; returns the parameters of the roles."""
    cfg = runs.make_model(config, TOKENIZER.vocab_size)
    init = jax.jit(lambda key: unbox(init_boxed(key, cfg)))
    params = {role: init(jax.random.key(i)) for i, role in enumerate(manager.ROLES)}
    zero = np.int32(0)
    roles = {role: RoleState(zero, params[role], ()) for role in params}
    stored = json.loads(to_json(config)) | ({"dataset": dataset} if dataset else {})
    m = manager.open_manager(str(workdir), 1, json.dumps(stored))
    manager.save(
        m, 7, TrainState(**roles, step=zero, key=jax.random.key(0)), None, json.dumps(stored)
    )
    manager.close(m)
    TOKENIZER.save(workdir / "tokenizer")
    return params


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict]:
    workdir = tmp_path_factory.mktemp("run")
    params = make_run(workdir, make_config(workdir), {"data": "sample", "prepared": "abc"})
    rows = [
        {"condition": "summary", "accuracy": 0.71234567, "n": 90},
        {"condition": "a|b", "note": "x"},
    ]
    (workdir / "results.json").write_text(json.dumps(rows))
    return workdir, params


@pytest.fixture(autouse=True)
def parsed_flags():
    flags.FLAGS(["export"])
    yield
    flags.FLAGS.unparse_flags()
    flags.FLAGS["out"].unparse()
    flags.FLAGS["role"].unparse()


def test_exports_both_roles(run):
    workdir, params = run
    export.main(make_config(workdir))
    for role in manager.ROLES:
        folder = workdir / "export" / role
        cfg = hf_config.read_config(folder)
        expected = runs.make_model(make_config(workdir), TOKENIZER.vocab_size)
        assert cfg == dataclasses.replace(expected, rules=UNSPLIT, rollout_rules=UNSPLIT)
        jax.tree.map(np.testing.assert_array_equal, hf_io.read_params(folder, cfg), params[role])
        config = json.loads((folder / "config.json").read_text())
        assert config["popi_jax"] == {"role": role, "step": 7, "run": "smoke", "data": "sample"}
        assert (config["bos_token_id"], config["eos_token_id"]) == (
            TOKENIZER.bos_id,
            TOKENIZER.eos_id,
        )
        ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        assert ends == TOKENIZER.eos_id
        assert tokenizer.load(folder).encode("how do") == TOKENIZER.encode("how do")


def test_one_role_elsewhere_and_again(run, tmp_path):
    workdir, _ = run
    flags.FLAGS(["export", f"--out={tmp_path}/deep/out", "--role=generator"])
    for _ in range(2):
        export.main(make_config(workdir))
    assert [p.name for p in (tmp_path / "deep/out").iterdir()] == ["generator"]


def test_the_card_says_loudly_that_the_data_were_made(run, tmp_path):
    workdir, _ = run
    export.export_role(workdir, "generator", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "# smoke: generator model" in card
    assert "SAMPLE DATA" in card.split("\n## ")[0]
    assert "sample-data" in card.split("---")[1]
    assert "| condition | accuracy | n | note |" in card
    assert "| summary | 0.7123 | 90 |  |" in card
    assert "| a\\|b |  |  | x |" in card
    assert "| checkpoint | update 7 of all stages |" in card
    assert "non-commercial" not in card
    assert "@" not in card


def test_the_results_on_the_card_are_those_of_its_step(tmp_path):
    make_run(tmp_path, make_config(tmp_path), None)
    rows = [{"condition": "summary", "accuracy": 0.9}]
    (tmp_path / "results.json").write_text(json.dumps({"step": 9, "rows": rows}))
    export.export_role(tmp_path, "inference", tmp_path / "out")
    assert "This run was not evaluated." in (tmp_path / "out/README.md").read_text()
    kept = tmp_path / "results" / "test-7"
    kept.mkdir(parents=True)
    rows[0]["accuracy"] = 0.6
    (kept / "results.json").write_text(json.dumps({"step": 7, "rows": rows}))
    export.export_role(tmp_path, "inference", tmp_path / "out")
    assert "| summary | 0.6 |" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(UserError, match=r"--step=9: not in .*that are there: 7$"):
        export.export_role(tmp_path, "inference", tmp_path / "out", 9)


def test_the_card_of_published_and_of_unknown_data(tmp_path):
    for name, dataset, expected in (
        ("a", {"data": "published"}, "published files of prism"),
        ("b", None, "not recorded"),
    ):
        workdir = tmp_path / name
        make_run(workdir, make_config(workdir), dataset)
        export.export_role(workdir, "inference", workdir / "out")
        card = (workdir / "out/README.md").read_text()
        assert expected in card
        assert "SAMPLE" not in card
        assert "non-commercial use" in card
        assert "This run was not evaluated." in card


def test_the_model_is_that_of_the_run_whatever_the_flags_say(run, tmp_path):
    workdir, _ = run
    flags.FLAGS(["export", f"--out={tmp_path}", "--role=generator"])
    export.main(
        make_config(workdir, "--config.model.rope_theta=77.0", "--config.model.dtype=bfloat16")
    )
    config = json.loads((tmp_path / "generator/config.json").read_text())
    assert (config["rope_theta"], config["dtype"]) == (10000.0, "float32")


def test_a_workdir_without_a_run_is_told(tmp_path, run):
    with pytest.raises(UserError, match="train first"):
        export.main(make_config(tmp_path))
    workdir = tmp_path / "run"
    make_run(workdir, make_config(workdir), None)
    (workdir / "results.json").write_text("[1")
    with pytest.raises(UserError, match=r"results.json: not valid JSON"):
        export.main(make_config(workdir))
    (workdir / "results.json").unlink()
    (workdir / "tokenizer").rename(workdir / "t")
    with pytest.raises(UserError, match=r"tokenizer: not found"):
        export.main(make_config(workdir))
    assert not list((workdir / "export").glob("*"))


def test_importing_the_command_does_not_import_jax():
    code = "import sys, popi_jax.export; sys.exit('jax' in sys.modules)"
    root = Path(export.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


@pytest.mark.parametrize("instruction", ["", "Be brief."])
def test_the_code_of_the_card_runs_and_asks_what_training_asked(
    tmp_path, instruction, monkeypatch, capsys
):
    transformers = pytest.importorskip("transformers")
    workdir = tmp_path / "run"
    config = make_config(
        workdir,
        f"--config.model.summary_instruction={instruction}",
        f"--config.model.answer_instruction={instruction}",
    )
    make_run(workdir, config, None)
    export.main(config)
    asked = []
    generate = transformers.LlamaForCausalLM.generate

    def spy(self, ids, **options):
        asked.append(ids[0].tolist())
        return generate(self, ids, **options)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", spy)
    monkeypatch.chdir(workdir / "export")
    code = re.search(r"```python\n(.*?)```", Path("generator/README.md").read_text(), re.DOTALL)[1]
    values: dict = {}
    exec(compile(code, os.fspath("card"), "exec"), values)
    assert f"summary: {values['summary']}\nanswer: {values['answer']}\n" in capsys.readouterr().out
    context = prompts.render_inference_context(TOKENIZER, values["signals"])
    expected = context + prompts.render_summary_turn(TOKENIZER, config)
    if not instruction:
        assert asked[0] == expected
    assert TOKENIZER.decode(asked[0]).split() == TOKENIZER.decode(expected).split()
    prompt = [{"role": "user", "content": "how do magnets work"}]
    summary = TOKENIZER.encode(values["summary"])
    expected = (
        prompts.render_generator_prefix(TOKENIZER, config)
        + summary
        + prompts.render_generator_turn(TOKENIZER, prompt)
    )
    if (
        not instruction
    ):  # behind an instruction, the spaces at the seam may be cut into other tokens
        assert asked[1] == expected
    assert TOKENIZER.decode(asked[1]).split() == TOKENIZER.decode(expected).split()
