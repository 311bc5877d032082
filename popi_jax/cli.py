"""What all commands share: the flags of the configuration, the help text and errors in one line.

A command is a module with `main(config)` that ends with `cli.run(main, description=__doc__)`.
Further flags are plain absl flags at the top of that module. Imports no jax and no numpy: `--help`
and a mistyped field must answer at once."""

import ast
import importlib.util
import logging
import os
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from popi_jax.config import Config
from popi_jax.config_check import from_config_dict, to_json
from popi_jax.errors import UserError, did_you_mean, disk_is_full

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
DEFAULT = "prism"

flags.DEFINE_string(
    "config",
    DEFAULT,
    "configuration: a name or a file, then options, e.g. prism:model=small,schedule=short",
)
flags.DEFINE_bool("print_config", False, "print the resolved configuration as JSON and exit")


class Field(NamedTuple):
    """A field of configs/base.py."""

    name: str  # e.g. "inference.group_size"
    default: str  # as Python source
    comment: str


def run(main: Callable[[Config], None], *, description: str, example: str = "") -> None:
    """Parses the command line and calls `main`; returns when all went well.

    Exit status otherwise: 1 for a full disk, 2 for a mistake of the user, 130 for Ctrl-C. A defect
    of ours keeps its traceback."""
    argv = sys.argv
    try:
        if any(re.fullmatch(r"--?(h|help|helpfull|helpshort)", arg) for arg in argv[1:]):
            print(help_text(argv[0], description, example))
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
        broken file.
    """
    spec, overrides, rest = _split(argv[1:])
    try:
        unexpected = flags.FLAGS([argv[0], f"--config={spec}", *rest])[1:]
    except flags.UnrecognizedFlagError as e:
        fields = [f"config.{field.name}" for field in base_fields()]
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
        UserError: one line.
    """
    c = _load_file(spec)
    c.lock()
    leaves = dict(_leaves(c.to_dict(), ""))
    overrides = [_checked_override(text, leaves) for text in overrides]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", c, flag_values=values, sys_argv=["", *overrides])
        values(["", *overrides])
    except flags.Error as e:
        raise UserError(_bad_value(str(e), overrides, leaves)) from None
    return from_config_dict(values.config)


def scales_of(chip: str) -> list[str]:
    """Returns the rows of configs/scales.py for slices of a chip, e.g. v5e, the smallest first."""
    scales = runpy.run_path(str(CONFIGS / "scales.py"))["SCALES"]
    return [
        name for name, row in scales.items() if row.get("mesh.topology", "").startswith(f"{chip}:")
    ]


def base_fields() -> list[Field]:
    """Returns the fields of configs/base.py in order, read from its source."""
    source = (CONFIGS / "base.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    function = next(
        n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "base"
    )
    sections: dict[str, str] = {}  # variable -> prefix of its fields
    fields = []
    for node in function.body:
        if not isinstance(node, ast.Assign):
            continue
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        prefix, attribute = "", ""
        for target in node.targets:
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                prefix, attribute = sections[target.value.id], target.attr
        if names:
            sections |= dict.fromkeys(names, f"{prefix}{attribute}." if attribute else "")
        else:
            comment = _comment(lines, node.lineno - 1, node.end_col_offset or 0)
            fields.append(Field(prefix + attribute, ast.unparse(node.value), comment))
    return fields


def help_text(program: str, description: str, example: str = "") -> str:
    """Returns what `--help` prints: purpose, flags, and all fields with their defaults."""
    command = f"python -m popi_jax.{pathlib.Path(program).stem}"
    own = [
        flag
        for flag in flags.FLAGS.get_key_flags_for_module(program)
        if flag.name not in ("config", "print_config")
    ]
    shown = [flags.FLAGS["config"], *own, flags.FLAGS["print_config"]]
    fields = [(f"  {field.name} = {field.default}", field.comment) for field in base_fields()]
    return "\n".join(
        [
            f"usage: {command} [--config=NAME[:OPTIONS]] [--config.FIELD=VALUE ...] [flags]",
            "",
            description.strip(),
            "",
            f"example: {example or f'{command} --config=prism:schedule=short --config.seed=1'}",
            "",
            "flags:",
            *_columns(
                [
                    (f"  --{flag.name}={'' if flag.value is None else flag.value}", flag.help)
                    for flag in shown
                ],
                36,
            ),
            "",
            f"configurations: {', '.join(_config_names())} (configs/NAME.py), or a file of your own.",
            "options: model, scale, schedule: the rows of configs/models.py, configs/scales.py, configs/schedules.py.",
            "",
            "fields of configs/base.py with their defaults; --print_config shows the values of a configuration:",
            *_columns(fields, 48),
        ]
    )


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
    booleans = {field.name for field in base_fields() if field.default in ("True", "False")}
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
    """Runs `get_config(arg)` of the file that `spec` names."""
    name, _, arg = spec.partition(":")
    path = pathlib.Path(name) if name.endswith(".py") or "/" in name else CONFIGS / f"{name}.py"
    if not path.is_file() and not path.is_absolute() and (ROOT / path).is_file():
        path = ROOT / path
    if not path.is_file():
        names = _config_names()
        hint = did_you_mean(path.stem, names)
        raise UserError(
            f"--config={spec}: there is no file {name}; configurations are {', '.join(names)}.{hint}"
        )
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is None:
            names = _config_names()
            raise UserError(
                f"--config={spec}: {path} defines no get_config(arg); configurations are {', '.join(names)}"
            )
        c = get_config(arg)
    except UserError:
        raise
    except Exception as e:
        if type(e) is LookupError:  # of configs.base.parse_arg, already one clear line
            raise UserError(f"--config={spec}: {e}") from None
        raise UserError(_broken_file(path, e)) from None
    if not isinstance(c, ConfigDict):
        raise UserError(
            f"--config={spec}: get_config of {path} returns {type(c).__name__}, not a ConfigDict"
        )
    c.name = c.get("name") or path.stem
    return c


def _broken_file(path: pathlib.Path, e: Exception) -> str:
    """One line for an error inside a configuration file: where and what."""
    frames = [
        frame.lineno
        for frame in traceback.extract_tb(e.__traceback__)
        if frame.filename == str(path)
    ]
    if isinstance(e, SyntaxError) and e.filename == str(path):
        frames.append(e.lineno)
    line = f", line {frames[-1]}" if frames else ""
    text = " ".join(str(e.args[0] if e.args else e).split())
    if match := re.search(r'Key "(\w+)" does not exist', text):
        leaves = [field.name.rpartition(".")[2] for field in base_fields()]
        return f'{path}{line}: there is no field "{match[1]}".{did_you_mean(match[1], leaves)}'
    return f"{path}{line}: {type(e).__name__}: {text}"


def _checked_override(text: str, leaves: Mapping[str, Any]) -> str:
    """Checks the name in "--config.name=value"; writes a bare list for a tuple as Python does."""
    name, _, value = text.removeprefix("--config.").partition("=")
    inside = [leaf for leaf in leaves if leaf.startswith(name + ".")]
    if inside:
        raise UserError(
            f"--config.{name} is a section; set one of its fields, e.g. --config.{inside[0]}=..."
        )
    if name not in leaves:
        same = [leaf for leaf in leaves if leaf.rpartition(".")[2] == name.rpartition(".")[2]]
        hint = f' Did you mean "{same[0]}"?' if same else did_you_mean(name, leaves)
        raise UserError(f"--config.{name}: there is no such field.{hint or ' --help lists all.'}")
    if isinstance(leaves[name], tuple) and not value.lstrip().startswith(("(", "[", "'", '"')):
        value = repr(tuple(part.strip() for part in value.split(",") if part.strip()))
    return f"--config.{name}={value}"


def _bad_value(message: str, overrides: Sequence[str], leaves: Mapping[str, Any]) -> str:
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    for text in overrides:
        name, _, value = text.removeprefix("--config.").partition("=")
        if f"--config.{name}={value}" in message:
            kind = kinds.get(type(leaves[name]), "words separated by commas")
            return f'config.{name} = "{value}": must be {kind}, like its default {leaves[name]!r}'
    return " ".join(message.split())


def _check_workdir(workdir: str) -> None:
    if workdir.startswith("gs://") and importlib.util.find_spec("gcsfs") is None:
        raise UserError(
            f'config.workdir = "{workdir}": buckets need gcsfs: .venv/bin/python -m pip install gcsfs'
        )
    path = pathlib.Path(workdir)
    for folder in () if "://" in workdir else (path, *path.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f'config.workdir = "{workdir}": {folder} is a file, a folder is needed')


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _config_names() -> list[str]:
    files = sorted(CONFIGS.glob("*.py"))
    return [file.stem for file in files if "\ndef get_config(" in file.read_text(encoding="utf-8")]


def _comment(lines: Sequence[str], line: int, column: int) -> str:
    """The comment behind a statement, or else the comment lines before it."""
    behind = lines[line][column:].partition("#")[2].strip()
    above: list[str] = []
    while not behind and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        above.insert(0, lines[line].lstrip(" #"))
    return behind or " ".join(above)


def _columns(rows: Sequence[tuple[str, str]], width: int) -> list[str]:
    return [f"{left:<{width}}  {right}".rstrip() for left, right in rows]


def _exit(status: int, message: str) -> None:
    if message:
        print(message, file=sys.stderr)
    if distributed := sys.modules.get("popi_jax.distributed"):  # else jax was not needed yet
        distributed.leave(status)
    sys.exit(status)
