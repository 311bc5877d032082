"""What a user sees who mistypes something: one line, exit status 2, no traceback. And `--help`:
useful and quick."""

import json
import os
import pathlib
import re
import resource
import subprocess
import sys

import pytest

from configs.base import compose
from configs.schedules import SCHEDULES
from popi_jax import cli, config_rules
from popi_jax.config import Config, from_json, to_json
from popi_jax.errors import UserError

BASE = compose("scale=laptop")
PHASES, BETA = BASE.schedule.phases, BASE.generator.beta
INFERENCE_ONLY = SCHEDULES["inference_only"]["schedule.phases"]
ROOT = pathlib.Path(__file__).parents[1]
COMMAND = '''
"""Prints what it was given."""
import errno, os, sys
from absl import flags
from popi_jax import cli

_USERS = flags.DEFINE_string("users", "", "file of users")
_RAISE = flags.DEFINE_string("raise", "", "what to raise")

def main(config):
    if _RAISE.value == "full":
        raise ValueError("could not save") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if _RAISE.value == "interrupt":
        raise KeyboardInterrupt
    if _RAISE.value == "defect":
        raise ValueError("ours")
    if _RAISE.value == "log":
        from absl import logging
        logging.set_verbosity(logging.INFO)
        log = 'logging.info("info of {0}"); logging.warning("warning of {0}")'
        ours = os.path.join(os.path.dirname(cli.__file__), "x.py")
        for name, file in (("us", ours), ("a library", "library.py")):
            exec(compile(log.format(name), file, "exec"))
        return
    print(config.name, config.seed, config.data.download, config.schedule.phases, _USERS.value)

if __name__ == "__main__":
    cli.run(main, description=__doc__)
'''
COMMANDS = "train evaluate sweep compare summarize generate export prepare fit".split()


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("command") / "show.py"
    path.write_text(COMMAND)
    return path


def run(
    command: pathlib.Path, *args: str, cwd: pathlib.Path = ROOT
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(command), *args], cwd=cwd, env=env, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("args", "printed"),
    [
        ([], f"prism 0 True {PHASES} "),
        (["--config=jsonl"], f"jsonl 0 False {PHASES} "),
        (
            ["--config.seed=3", "--config=configs/prism.py:schedule=inference_only"],
            f"prism 3 True {INFERENCE_ONLY} ",
        ),
        (
            ["--config", "jsonl:", "--config.seed", "5", "--config.data.download"],
            "jsonl 5 True ('inf",
        ),
        (
            [
                "--noconfig.data.download",
                "--users=a.jsonl",
                "--config.schedule.phases=('joint 2',)",
            ],
            "prism 0 False ('joint 2',) a.js",
        ),
        (
            ["--config.schedule.phases=inference 2, joint 1"],
            "prism 0 True ('inference 2', 'joint 1')",
        ),
    ],
)
def test_flags_reach_the_command(command: pathlib.Path, args: list[str], printed: str) -> None:
    done = run(command, *args)
    assert done.stdout.startswith(printed), done.stderr
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config.sed=3"], '--config.sed: there is no such field. Did you mean "seed"?'),
        (
            ["--config.group_size=4"],
            '--config.group_size: there is no such field. Did you mean "inference.group_size"?',
        ),
        (
            ["--config.inference=4"],
            "--config.inference is a section; set one of its fields, e.g. --config.inference.",
        ),
        (["--config.seed=1.5"], 'config.seed = "1.5": must be a whole number, like its default 0'),
        (["--config.seed=true"], 'config.seed = "true": must be a whole number'),
        (
            ["--config.generator.beta=big"],
            f'config.generator.beta = "big": must be a number, like its default {BETA}',
        ),
        (["--config.generator.beta=nan"], "config.generator.beta = NaN: must be a finite number"),
        (["--config.data.download=maybe"], 'config.data.download = "maybe": must be true or false'),
        (
            ["--config.schedule.phases=(1,)"],
            "config.schedule.phases = [1]: must be a tuple of strings",
        ),
        (
            ["--config.inference.group_size=1"],
            "config.inference.group_size = 1: must be at least 2",
        ),
        (["--config=prims"], "--config=prims: there is no file prims; configurations are"),
        (
            ["--config=configs/none.py"],
            "--config=configs/none.py: there is no file configs/none.py",
        ),
        (["--config=models"], "defines no get_config(arg); configurations are "),
        (
            ["--config=prism:modle=tiny"],
            '--config=prism:modle=tiny: unknown name "modle", allowed are model, scale',
        ),
        (["--config=prism:model=tini"], 'gemma3-12b, lora. Did you mean "tiny"?'),
        (["--confg=prism"], '--confg: there is no such flag. Did you mean "config"?'),
        (["--confg.seed=3"], '--confg.seed: there is no such flag. Did you mean "config.seed"?'),
        (["--user=x"], '--user: there is no such flag. Did you mean "users"?'),
        (
            ["seed=3"],
            'unexpected argument "seed=3"; fields are set with --config.section.field=value',
        ),
        (["--config"], "--config needs a value"),
        (["--users"], "Missing value for flag --users"),
        (
            ["--config.workdir=Makefile/run"],
            'config.workdir = "Makefile/run": Makefile is a file, a folder is needed',
        ),
    ],
)
def test_mistake_is_one_line(command: pathlib.Path, args: list[str], message: str) -> None:
    done = run(command, *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "c.inference.group_sice = 3",
            'line 4: there is no field "group_sice". Did you mean "group_size"?',
        ),
        ("c.seed = 'x'", "line 4: TypeError"),
        ("c.seed = 1 / 0", "line 4: ZeroDivisionError: division by zero"),
        ("c.seed = = 1", "line 4: SyntaxError"),
        ("import no_such_module", "line 4: ModuleNotFoundError: No module named 'no_such_module'"),
        ("c = None", "returns NoneType, not a ConfigDict"),
        ("c.data.path = ''", 'config.data.path = "": must name'),
    ],
)
def test_mistake_in_own_config_file_names_file_and_line(
    tmp_path: pathlib.Path, line: str, message: str
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs.base import compose\ndef get_config(arg=''):\n"
        f"    c = compose(arg)\n    {line}\n    return c\n"
    )
    with pytest.raises(UserError) as error:
        cli.load_config(str(path))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "mine.py" in str(error.value) or message.startswith("config.")


def test_own_config_file_from_another_folder(command: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from configs.base import compose\ndef get_config(arg=''):\n"
        "    c = compose(arg)\n    return c\n"
    )
    assert run(command, "--config=mine.py", cwd=tmp_path).stdout.startswith("mine 0")
    assert run(command, "--config=smoke", cwd=tmp_path).stdout.startswith("smoke 0")


@pytest.mark.parametrize("home", ["~", "~ann"])
def test_a_home_folder_is_known_wherever_a_path_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, home: str
) -> None:
    expand = os.path.expanduser
    monkeypatch.setattr(os.path, "expanduser", lambda x: expand(x.replace("~ann", "~", 1)))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("from configs.smoke import get_config\n")
    given = ["data.path", "data.prepared", "workdir", "model.checkpoint", "warmup.steps"]
    values = [f"{home}/{name}" for name in given[:-1]] + ["0"]
    overrides = [f"--config.{n}={value}" for n, value in zip(given, values, strict=True)]
    config = cli.load_config(f"{home}/mine.py:", overrides)
    found = (config.data.path, config.data.prepared, config.workdir, config.model.checkpoint)
    assert found == tuple(f"{tmp_path}/{name}" for name in given[:-1])
    paths = {field.name for field in config_rules.list_settings(Config) if field.path}
    assert paths >= set(given[:-1])
    assert from_json(to_json(config)) == config
    # what only looks like one
    config = cli.load_config("smoke", ["--config.data.path=a/~/b", "--config.workdir=b~"])
    assert (config.data.path, config.workdir) == ("a/~/b", "b~")


def test_the_home_folder_of_nobody() -> None:
    told = 'config.data.path = "~nobody at all/x": there is no home folder ~nobody at all; write ./'
    with pytest.raises(UserError, match=re.escape(told)):
        cli.load_config("smoke", ["--config.data.path=~nobody at all/x"])


def test_path_flags_know_the_home_folder(command: pathlib.Path) -> None:
    text = command.read_text().replace('flags.DEFINE_string("users"', 'cli.define_path("users"')
    other = command.with_name("paths.py")
    other.write_text(text)
    done = run(other, "--users=~/people.jsonl")
    assert done.stdout.split()[-1] == os.path.expanduser("~/people.jsonl"), done.stderr
    done = run(other, "--users=~no_such_user/people.jsonl")
    assert done.stderr.startswith('error: --users = "~no_such_user/people.jsonl": there is no home')
    assert "  --users=  " in run(other, "--help").stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_a_flag_that_is_a_path_is_defined_as_one(name: str) -> None:
    text = (ROOT / "popi_jax" / f"{name}.py").read_text()
    words = r'flags\.DEFINE_string\(\s*"(\w+)", [^)]*?(file|folder|WORKDIR)'
    found = {match[1] for match in re.finditer(words, text)}
    assert found <= {"share"}


@pytest.mark.parametrize(
    ("what", "status", "last"),
    [
        ("full", 1, "error: no space left on the disk: could not save"),
        ("interrupt", 130, "interrupted"),
    ],
)
def test_full_disk_and_interrupt_are_told_in_one_line(
    command: pathlib.Path, what: str, status: int, last: str
) -> None:
    done = run(command, f"--raise={what}")
    assert (done.returncode, done.stderr) == (status, last + "\n")


def test_defects_keep_their_traceback(command: pathlib.Path) -> None:
    done = run(command, "--raise=defect")
    assert done.returncode == 1 and "Traceback" in done.stderr and "ValueError: ours" in done.stderr


def test_log_is_plain_and_leaves_out_the_chatter_of_libraries(command: pathlib.Path) -> None:
    done = run(command, "--raise=log")
    assert done.stderr.splitlines() == ["info of us", "warning of us", "warning of a library"]


def test_help_is_complete_and_quick(command: pathlib.Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(command, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    for part in (
        "Prints what it was given.",
        "--users=",
        "example: python -m popi_jax.show",
        "popi_jax/config.py",
        "model=tiny",
        "roleplay, smoke",
    ):
        assert part in done.stdout
    assert (
        "  inference.group_size = 8 " in done.stdout
        and "summaries sampled per user (G)" in done.stdout
    )
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 0.5


def test_help_lists_every_field_with_its_default() -> None:
    found = cli.format_help("show", "Shows.")
    values = json.loads(cli.to_json(cli.load_config("prism:scale=laptop")))
    declared = {field.name: field for field in config_rules.list_settings(Config)}
    assert declared.keys() == config_rules.flatten(values).keys()
    for name, field in declared.items():
        assert f"\n  {name} = {field.default!r} " in found and field.meaning in found
    assert "docs/objectives.md; dpo | robust | ipo" in found


def test_print_config_can_be_read_back_and_closed_pipe_is_quiet(command: pathlib.Path) -> None:
    done = run(command, "--config=smoke", "--print_config", "--config.seed=9")
    assert json.loads(done.stdout)["seed"] == 9
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    piped = subprocess.run(
        ["bash", "-c", f"{sys.executable} {command} --help | true"],
        env=env,
        cwd=ROOT,
        capture_output=True,
    )
    assert piped.stderr == b""


@pytest.mark.parametrize(
    "name", ["train", "evaluate", "summarize", "generate", "export", "prepare"]
)
def test_help_of_every_command(name: str) -> None:
    code = (
        f"import atexit, runpy, sys; sys.argv = ['{name}', '--help'];"
        "heavy = lambda: ['jax' in sys.modules, 'numpy' in sys.modules];"
        "atexit.register(lambda: print(*heavy(), file=sys.stderr));"
        f"runpy.run_module('popi_jax.{name}', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: python -m popi_jax.{name}" in done.stdout
    assert done.stderr.split() == ["False", "False"]


def test_a_bucket_needs_gcsfs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gcsfs"):
        cli._check_workdir("gs://bucket/run")
