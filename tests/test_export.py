import dataclasses
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

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
        mark = config["popi_jax"]
        wording = mark.pop("wording")
        assert mark == {"role": role, "step": 7, "run": "smoke", "data": "sample"}
        assert wording["summary_instruction"] == " summary ?" and not wording["answer_instruction"]
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


def read_code(card: Path) -> Any:
    code = re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)[1]
    return compile(code, os.fspath(card), "exec")


def list_expected(config: Config, signals: str, summary: str) -> list[list[int]]:
    """What training showed to both models."""
    words = tokenizer.load(
        Path(config.workdir) / "tokenizer", system_role=config.model.summary_place == "system"
    )
    m = config.model
    context = prompts.render_inference_context(
        words, signals, m.summary_instruction, m.summary_system
    )
    prompt = [{"role": "user", "content": "how do magnets work"}]
    return [
        context + prompts.render_summary_turn(words, config),
        [
            *prompts.render_generator_prefix(words, config),
            *prompts.encode_summary(words, summary, config),
            *prompts.render_generator_turn(words, prompt, prompts.get_wording(config)),
        ],
    ]


OURS = "@popi_jax/data/templates"
OFFICIAL = {
    "summary_system": "Sum up.",
    "signals_template": f"{OURS}/official_signals.jinja",
    "answer_template": f"{OURS}/official_answer.jinja",
}
FRAMED = "{{ instruction }} [{{ summary }}]"
ASKED = pytest.mark.parametrize(
    ("instruction", "place", "own"),
    [
        ("", "system", {}),
        ("Be brief.", "system", {}),
        ("Be brief.", "user", {}),
        ("Be brief.", "user", OFFICIAL),
        ("Be brief.", "system", {"summary_system": "Sum up.", "answer_template": FRAMED}),
    ],
)


def make_asked_run(workdir: Path, instruction: str, place: str, own: dict[str, str]) -> Config:
    own = own | {
        "summary_instruction": instruction,
        "answer_instruction": instruction,
        "summary_place": place,
    }
    config = make_config(workdir, *(f"--config.model.{k}={v}" for k, v in own.items()))
    make_run(workdir, config, None)
    return config


@ASKED
def test_the_code_of_the_card_asks_what_training_asked(
    tmp_path, instruction, place, own, monkeypatch
):
    """With a stand-in for transformers, whose model says the same to all."""
    config = make_asked_run(tmp_path, instruction, place, own)
    export.main(config)
    asked = []

    class Words:
        @classmethod
        def from_pretrained(cls, folder: str) -> "Words":
            return cls(tokenizer.load(folder))

        def __init__(self, words: tokenizer.Tokenizer) -> None:
            self.words = words

        def apply_chat_template(self, messages: list, **options: object) -> dict:
            asked.append(self.words.render(messages, cut="never")[0])
            return {"input_ids": np.zeros((1, 3), np.int32)}

        def decode(self, ids: np.ndarray, **options: object) -> str:
            return " short answers "

    class Model(Words):
        def generate(self, ids: np.ndarray, **options: object) -> np.ndarray:
            return ids

    stand_in = types.ModuleType("transformers")
    stand_in.AutoTokenizer, stand_in.AutoModelForCausalLM = Words, Model
    monkeypatch.setitem(sys.modules, "transformers", stand_in)
    monkeypatch.chdir(tmp_path / "export")
    values: dict = {}
    exec(read_code(Path("generator/README.md")), values)
    assert asked == list_expected(config, values["signals"], "short answers")
    prompt = Path("generator/README.md").read_text()
    assert ('"role": "system"' in prompt) == (place == "system")


@ASKED
def test_transformers_runs_the_code_of_the_card(
    tmp_path, instruction, place, own, monkeypatch, capsys
):
    transformers = pytest.importorskip("transformers")
    config = make_asked_run(tmp_path, instruction, place, own)
    export.main(config)
    asked = []
    generate = transformers.LlamaForCausalLM.generate

    def spy(self, ids, **options):
        asked.append(ids[0].tolist())
        return generate(self, ids, **options)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", spy)
    monkeypatch.chdir(tmp_path / "export")
    values: dict = {}
    exec(read_code(Path("generator/README.md")), values)
    assert f"summary: {values['summary']}\nanswer: {values['answer']}\n" in capsys.readouterr().out
    assert asked == list_expected(config, values["signals"], values["summary"])
