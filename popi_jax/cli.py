"""What all commands share: the flags of the configuration, the help text and errors in one line.

A command is a module with `main(config)` that ends with `cli.run(main, description=__doc__)`.
Further flags are plain absl flags at the top of that module, paths by `define_path`. Imports no jax
and no numpy: `--help` and a mistyped field must answer at once."""

import ast
import importlib.util
import logging
import os
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from popi_jax import config_rules
from popi_jax.config import Config, from_config_dict, to_json
from popi_jax.errors import UserError, did_you_mean, disk_is_full

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
DEFAULT = "prism"
_BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}

flags.DEFINE_string(
    "config",
    DEFAULT,
    "configuration: a name or a file, then options, e.g. prism:model=small,schedule=short",
)
flags.DEFINE_bool("print_config", False, "print the resolved configuration as JSON and exit")
flags.disclaim_key_flags()  # what `define_path` defines is a flag of the module that calls it


def define_path(name: str, default: str, meaning: str) -> flags.FlagHolder[str]:
    """Defines a flag that is a path; "~" at its beginning is a home folder."""

    class Parser(flags.ArgumentParser[str]):
        def parse(self, argument: str) -> str:
            return config_rules.expand_home(argument, f"--{name}")

    return flags.DEFINE(Parser(), name, default, meaning, serializer=flags.ArgumentSerializer())


def run(main: Callable[[Config], None], *, description: str, example: str = "") -> None:
    """Parses the command line and calls `main`; returns when all went well.

    Exit status otherwise: 1 for a full disk, 2 for a mistake of the user, 130 for Ctrl-C. A defect
    of ours keeps its traceback."""
    argv = sys.argv
    try:
        if any(re.fullmatch(r"--?(h|help|helpfull|helpshort)", arg) for arg in argv[1:]):
            print(format_help(argv[0], description, example))
        else:
            config = parse(argv)
            _log_plainly()
            if flags.FLAGS.print_config:
                print(to_json(config), end="")
            else:
                main(config)
        sys.stdout.flush()
    except UserError as e:
        _exit(2, f"error: {e}")
    except KeyboardInterrupt:
        _exit(130, "interrupted")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit(1, "")
    except Exception as e:
        if disk_is_full(e):
            _exit(1, f"error: no space left on the disk: {' '.join(str(e).split())[:300]}")
        traceback.print_exc()
        _exit(1, "")


def parse(argv: Sequence[str]) -> Config:
    """Parses a command line; flags other than those of the configuration go to absl's FLAGS.

    Raises:
        UserError: one line for an unknown flag or field, a value that does not fit, a missing or
        broken file."""
    spec, overrides, rest = _split(argv[1:])
    try:
        unexpected = flags.FLAGS([argv[0], f"--config={spec}", *rest])[1:]
    except flags.UnrecognizedFlagError as e:
        fields = [f"config.{field.name}" for field in config_rules.list_settings(Config)]
        hint = did_you_mean(e.flagname, [*flags.FLAGS, *fields]) or " --help lists all."
        raise UserError(f"--{e.flagname}: there is no such flag.{hint}") from None
    except flags.Error as e:
        raise UserError(" ".join(str(e).split())) from None
    if unexpected:
        hint = "fields are set with --config.section.field=value"
        raise UserError(f'unexpected argument "{unexpected[0]}"; {hint}')
    config = load_config(spec, overrides)
    _check_workdir(config.workdir)
    return config


def load_config(spec: str = DEFAULT, overrides: Sequence[str] = ()) -> Config:
    """Returns the checked configuration of e.g. "prism:model=small" with overrides like
    "--config.seed=3".

    Raises:
        UserError: one line."""
    c = _load_file(spec)
    values = config_rules.flatten(c.to_dict())
    for text in overrides:
        name, _, value = text.removeprefix("--config.").partition("=")
        _check_name(name, values)
        c.update_from_flattened_dict({name: _parse_value(name, value, values[name])})
    return from_config_dict(c)


def list_scales(chip: str) -> list[str]:
    """Returns the rows of configs/scales.py for slices of a chip, e.g. v5e, the smallest first."""
    scales = runpy.run_path(str(CONFIGS / "scales.py"))["SCALES"]
    return [
        name for name, row in scales.items() if row.get("mesh.topology", "").startswith(f"{chip}:")
    ]


def format_help(program: str, description: str, example: str = "") -> str:
    """Returns what `--help` prints: purpose, flags, and all fields with their defaults."""
    command = f"python -m popi_jax.{pathlib.Path(program).stem}"
    given = [
        flags.FLAGS["config"],
        *flags.FLAGS.get_key_flags_for_module(program),
        flags.FLAGS["print_config"],
    ]
    shown = {flag.name: flag for flag in given}.values()
    values = [f"  --{flag.name}={'' if flag.value is None else flag.value}" for flag in shown]
    lines = [f"{left:<36}  {flag.help}" for left, flag in zip(values, shown, strict=True)]
    fields = []
    for field in config_rules.list_settings(Config):
        words = " | ".join(word for allowed in field.allowed for word in allowed.words)
        text = "; ".join(filter(None, (field.meaning, words)))
        fields.append(f"{f'  {field.name} = {field.default!r}':<48}  {text}")
    return f"""\
usage: {command} [--config=NAME[:OPTIONS]] [--config.FIELD=VALUE ...] [flags]

{description.strip()}

example: {example or f"{command} --config=prism:schedule=short --config.seed=1"}

flags:
{chr(10).join(lines)}

configurations: {", ".join(_list_configs())} (configs/NAME.py), or a file of your own.
options: model, scale, schedule: the rows of configs/models.py, configs/scales.py and
configs/schedules.py. They and the configuration overwrite some defaults below, which are those of
a released model: model=tiny, if no other is named, has its own learning rates and lengths.

fields with their defaults (popi_jax/config.py); --print_config shows the values of a configuration:
{chr(10).join(fields)}"""


def _log_plainly() -> None:
    """Log lines go to stderr without prefix: ours, and of the libraries only warnings and
    errors."""
    handler = logging.StreamHandler()
    ours = str(ROOT / "popi_jax") + os.sep
    handler.addFilter(
        lambda record: record.levelno > logging.INFO or record.pathname.startswith(ours)
    )
    logging.basicConfig(format="%(message)s", handlers=[handler])


def _split(args: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """Splits the arguments into the value of --config, the overrides "--config.name=value", and the
    rest."""
    spec, overrides, rest = DEFAULT, [], []
    booleans = {field.name for field in config_rules.list_settings(Config) if field.kind is bool}
    queue = list(args)
    while queue:
        arg = queue.pop(0)
        match = re.fullmatch(r"--?(no)?config(?:\.([^=]*))?(?:=(.*))?", arg, re.DOTALL)
        if match is None or (match[1] and match[2] is None):
            rest.append(arg)
            continue
        negated, name, value = match.groups()
        if value is None and (negated or name in booleans):
            value = "false" if negated else "true"
        elif value is None:
            if not queue:
                raise UserError(f"{arg} needs a value: {arg}=...")
            value = queue.pop(0)
        if name is None:
            spec = value
        else:
            overrides.append(f"--config.{name}={value}")
    return spec or DEFAULT, overrides, rest


def _load_file(spec: str) -> ConfigDict:
    """Runs `get_config(arg)` of the file that `spec` names; what it returns gets locked."""
    name, _, arg = spec.partition(":")
    name = config_rules.expand_home(name, "--config")
    path = pathlib.Path(name) if name.endswith(".py") or "/" in name else CONFIGS / f"{name}.py"
    if not path.is_file() and not path.is_absolute() and (ROOT / path).is_file():
        path = ROOT / path
    known = f"configurations are {', '.join(_list_configs())}"
    if not path.is_file():
        hint = did_you_mean(path.stem, _list_configs())
        raise UserError(f"--config={spec}: there is no file {name}; {known}.{hint}")
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        c = get_config(arg) if get_config else None
    except UserError as e:
        raise UserError(f"--config={spec}: {e}") from None
    except Exception as e:
        raise UserError(_explain(path, e)) from None
    if get_config is None:
        raise UserError(f"--config={spec}: {path} defines no get_config(arg); {known}")
    if not isinstance(c, ConfigDict):
        found = type(c).__name__
        raise UserError(f"--config={spec}: get_config of {path} returns {found}, not a ConfigDict")
    c.name = c.get("name") or path.stem
    return c.lock()


def _explain(path: pathlib.Path, e: Exception) -> str:
    """One line for an error inside a configuration file: where and what."""
    frames = traceback.extract_tb(e.__traceback__)
    numbers = [frame.lineno for frame in frames if frame.filename == str(path)]
    if isinstance(e, SyntaxError) and e.filename == str(path):
        numbers.append(e.lineno)
    line = f", line {numbers[-1]}" if numbers else ""
    text = " ".join(str(e.args[0] if e.args else e).split())
    if match := re.search(r'Key "(\w+)" does not exist', text):
        names = [field.name.rpartition(".")[2] for field in config_rules.list_settings(Config)]
        return f'{path}{line}: there is no field "{match[1]}".{did_you_mean(match[1], names)}'
    return f"{path}{line}: {type(e).__name__}: {text}"


def _check_name(name: str, values: Mapping[str, Any]) -> None:
    """Checks that `name` is one of the fields, not a section."""
    inside = [field for field in values if field.startswith(f"{name}.")]
    if inside:
        example = f"--config.{inside[0]}=..."
        raise UserError(f"--config.{name} is a section; set one of its fields, e.g. {example}")
    if name not in values:
        same = [field for field in values if field.rpartition(".")[2] == name.rpartition(".")[2]]
        hint = f' Did you mean "{same[0]}"?' if same else did_you_mean(name, values)
        raise UserError(f"--config.{name}: there is no such field.{hint or ' --help lists all.'}")


def _parse_value(name: str, text: str, default: Any) -> Any:
    """Reads a value of the type of `default`. A tuple is written as in Python or as words with
    commas between."""
    kind = type(default)
    try:
        if kind is bool:
            return _BOOLEANS[text.lower()]
        if kind is not tuple:
            return kind(text)
        if not text.lstrip().startswith(("(", "[", "'", '"')):
            return tuple(part.strip() for part in text.split(",") if part.strip())
        value = ast.literal_eval(text.strip())
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)
    except (KeyError, ValueError, SyntaxError):
        what = "words separated by commas" if kind is tuple else config_rules.KINDS[kind]
        rule = f"must be {what}, like its default {default!r}"
        raise UserError(f'config.{name} = "{text}": {rule}') from None


def _check_workdir(workdir: str) -> None:
    if workdir.startswith("gs://") and importlib.util.find_spec("gcsfs") is None:
        rule = "buckets need gcsfs: .venv/bin/python -m pip install gcsfs"
        raise UserError(f'config.workdir = "{workdir}": {rule}')
    path = pathlib.Path(workdir)
    for folder in () if "://" in workdir else (path, *path.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f'config.workdir = "{workdir}": {folder} is a file, a folder is needed')


def _list_configs() -> list[str]:
    files = sorted(CONFIGS.glob("*.py"))
    return [file.stem for file in files if "\ndef get_config(" in file.read_text(encoding="utf-8")]


def _exit(status: int, message: str) -> None:
    if message:
        print(message, file=sys.stderr)
    if distributed := sys.modules.get("popi_jax.distributed"):  # else jax was not needed yet
        distributed.leave(status)
    sys.exit(status)
