"""Who may import whom and how large a part may be, as docs/design.md says; and the environment that
conftest.py promises to every test."""

import ast
import functools
import graphlib
import pathlib
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "popi_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
ENTRY_POINTS = (
    *("train", "evaluate", "sweep", "compare", "summarize", "generate", "export", "prepare", "fit"),
)

# part of the package -> parts that it may import; a part is a folder or a file of the top level
ALLOWED = {
    "errors": set(),
    "files": set(),
    "flops": set(),
    "arrays": set(),
    "metric_writer": set(),
    "progress": set(),
    "config_rules": {"errors"},
    "phases": {"errors"},
    "signals": {"errors"},
    "templates": {"config_rules", "errors"},
    "config_data": {"config_rules"},
    "config": {"config_data", "config_rules", "errors", "phases", "signals", "templates"},
    "cli": {"config", "config_rules", "errors"},
    "distributed": {"errors"},
    "losses": {"arrays"},
    "data": {
        *("arrays", "config_data", "config_rules", "errors", "files", "progress", "signals"),
        "templates",
    },
    "models": {"arrays", "losses"},
    "popi": {"arrays", "losses", "models"},
    "sharding": {"config", "errors", "models"},
    "checkpoints": {
        *("arrays", "config", "config_rules", "errors", "models", "phases", "templates")
    },
    "run": {
        *("checkpoints", "config", "config_rules", "data", "distributed", "errors", "files"),
        *("models", "popi", "sharding"),
    },
    "dealt": {"arrays", "data", "models", "sharding"},
    "generators": {
        *("arrays", "config", "data", "dealt", "distributed", "models", "popi", "progress", "run"),
        "sharding",
    },
    "diagnostics": {*("arrays", "config", "data", "dealt", "generators", "losses", "popi", "run")},
    "training": {"arrays", "config", "data", "losses", "models", "phases", "popi", "sharding"},
    "evals": {
        *("baselines", "dealt", "diagnostics", "generators"),
        *("arrays", "config", "data", "distributed", "errors", "files", "losses"),
        *("progress", "run", "training", "checkpoints"),
    },
    "baselines": {
        *("arrays", "data", "distributed", "errors", "losses", "models", "popi", "progress", "run"),
        *("sharding", "training"),
    },
    "planning": {"config", "config_rules", "errors", "flops", "phases", "sharding"},
}
# single files that may import more than their folder
ALSO = {
    "checkpoints/hub.py": {"distributed"},
    "training/loop.py": {
        *("checkpoints", "diagnostics", "distributed", "errors", "metric_writer", "run")
    },
    "training/stage.py": {"diagnostics", "distributed", "metric_writer", "progress"},
    "training/choices.py": {"checkpoints", "distributed", "files", "run"},
    "training/longer.py": {"checkpoints", "run"},
    "training/reference.py": {"checkpoints", "distributed", "errors", "progress", "run"},
    "training/restore.py": {"checkpoints", "errors", "run"},
    "training/stored.py": {"distributed", "errors", "files", "progress", "run"},
    "planning/plan.py": {"arrays", "checkpoints", "models", "popi", "run", "training"},
    "planning/evaluation.py": {"arrays", "models", "popi", "training"},
}
FLAX = {"models/transformer.py"}
HEAVY = {
    *("jax", "numpy", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "tokenizers"),
    *("safetensors", "huggingface_hub"),
}


def imports(path: pathlib.Path, *, top_level_only: bool = False) -> set[str]:
    """The dotted names that a file imports, with those behind `from x import`, without those for
    type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif not (top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            pending += ast.iter_child_nodes(node)
    return found


def name_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def name_modules() -> dict[str, pathlib.Path]:
    """Dotted name -> file, of all modules that hold something."""
    files = [path for path in MODULES if path.stem != "__init__"]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


def part_of(name: str) -> str:
    """ "training/loop.py" -> "training", "config.py" -> "config"."""
    return name.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_import_directions(path: pathlib.Path) -> None:
    name = name_of(path)
    found = imports(path)
    roots = {module.split(".")[0] for module in found}
    assert "configs" not in roots, "the package reads configurations through cli.py only"
    assert name in FLAX or "flax" not in roots, f"only {sorted(FLAX)} may import flax"
    if part_of(name) == "data":
        assert "jax" not in roots, "data is prepared by processes that must not start a device"
    ours = {part_of(module.split(".")[1]) for module in found if module.startswith("popi_jax.")}
    if part_of(name) in (*ENTRY_POINTS, "__init__"):
        return
    allowed = ALLOWED[part_of(name)] | ALSO.get(name, set()) | {part_of(name)}
    assert ours <= allowed, f"{name} may not import {sorted(ours - allowed)}"


def test_every_permission_is_used() -> None:
    used: dict[str, set[str]] = {part: set() for part in ALLOWED} | {name: set() for name in ALSO}
    for path in MODULES:
        name = name_of(path)
        ours = {module.split(".")[1] for module in imports(path) if module.startswith("popi_jax.")}
        part = part_of(name)
        if part in ALLOWED:
            used[part] |= ours
        if name in ALSO:
            used[name] |= ours
    for table in (ALLOWED, ALSO):
        for name, allowed in table.items():
            assert not allowed - used[name], f"{name} never imports {sorted(allowed - used[name])}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_and_functions_are_short(path: pathlib.Path) -> None:
    """Nested functions count among the lines of theirs; planning reads compilers' output."""
    assert path.stem not in ("utils", "util", "helpers", "common", "types", "logging")
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and part_of(name_of(path)) != "planning":
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            given = [arg for arg in given if arg.arg not in ("self", "cls")]
            assert len(given) <= 8, f"{node.name}: {len(given)} parameters"
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 80, f"{node.name}: {lines} lines"


class Load(NamedTuple):
    """What one must load to understand a module: modules of ours, lines, the longest chain."""

    modules: int
    lines: int
    chain: int


def measure_load(start: str) -> Load:
    """Imports inside functions count; data sets (data/sources) do not."""

    @functools.cache
    def uses(name: str) -> frozenset[str]:
        found = imports(named[name])
        used = {o for o in named if o in found or any(i.startswith(f"{o}.") for i in found)}
        return frozenset(other for other in used - {name} if ".sources." not in other)

    @functools.cache
    def measure_chain(name: str) -> int:
        return 1 + max(map(measure_chain, uses(name)), default=0)

    named = name_modules()
    seen, pending = set[str](), [start]
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += uses(name)
    lines = sum(len(named[name].read_text(encoding="utf-8").splitlines()) for name in seen)
    return Load(len(seen), lines, measure_chain(start))


@pytest.mark.parametrize(
    ("start", "most"),
    [
        ("popi_jax.popi.update", Load(20, 3500, 7)),
        ("popi_jax.training.loop", Load(85, 15200, 14)),
        ("popi_jax.train", Load(99, 17500, 18)),  # it ends with a sweep of its run
    ],
)
def test_what_one_must_load_stays_small(start: str, most: Load) -> None:
    found = measure_load(start)
    assert all(n <= bound for n, bound in zip(found, most, strict=True)), found


@pytest.mark.parametrize(
    "name",
    (
        *ENTRY_POINTS,
        *("cli", "config", "config_data", "config_rules", "errors", "phases", "signals"),
        "__init__",
    ),
)
def test_what_runs_before_main_imports_nothing_heavy(name: str) -> None:
    path = PACKAGE / f"{name}.py"
    roots = {module.split(".")[0] for module in imports(path, top_level_only=True)}
    assert not roots & HEAVY
    ours = {
        module.split(".")[1]
        for module in imports(path, top_level_only=True)
        if module.startswith("popi_jax.")
    }
    assert ours <= {"cli", "config", "config_data", "config_rules", "errors", "phases", "signals"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name
)
def test_configs_import_the_declared_settings_alone(path: pathlib.Path) -> None:
    found = imports(path)
    assert not {module.split(".")[0] for module in found} & HEAVY
    ours = {module.split(".")[1] for module in found if module.startswith("popi_jax.")}
    assert ours <= {"config", "config_rules", "errors"}


def test_no_cycles() -> None:
    names = name_modules()

    def uses(name: str) -> set[str]:
        found = imports(names[name])
        return {
            other
            for other in names
            if other in found or any(i.startswith(f"{other}.") for i in found)
        }

    graphlib.TopologicalSorter({name: uses(name) for name in names}).prepare()  # raises CycleError


def test_packages_do_not_export() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        assert not imports(path), f"{path} imports"


def test_environment_of_the_tests() -> None:
    import jax
    import jax.numpy as jnp

    from popi_jax.losses.masked import masked_mean_last

    assert (jax.default_backend(), jax.device_count()) == ("cpu", 8)
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)
    with pytest.raises(Exception, match="Type-check error"):
        masked_mean_last(jnp.ones((2, 3)), jnp.ones(3, bool))
