"""Who may import whom, as docs/design.md says; and the environment that conftest.py promises to
every test."""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "popi_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
ENTRY_POINTS = ("train", "evaluate", "summarize", "generate", "export", "prepare", "fit")

# part of the package -> parts that it may import; a part is a folder or a file of the top level
ALLOWED = {
    "errors": set(),
    "flops": set(),
    "planning": {
        *(
            "arrays",
            "build",
            "config",
            "config_check",
            "errors",
            "flops",
            "models",
            "sharding",
            "training",
        )
    },
    "arrays": set(),
    "config": set(),
    "config_check": {"config", "errors"},
    "objectives": {"config", "losses"},
    "cli": {"config", "config_check", "errors"},
    "metric_writer": set(),
    "programs": set(),
    "progress": set(),
    "distributed": {"errors"},
    "build": {
        *(
            "arrays",
            "checkpoints",
            "config",
            "config_check",
            "data",
            "distributed",
            "errors",
            "models",
            "sharding",
        ),
        "training",
    },
    "sharding": {"arrays", "config", "errors"},
    "losses": {"arrays"},
    "data": {"arrays", "config", "errors"},
    "models": {"arrays", "sharding", "losses"},
    "checkpoints": {"arrays", "errors", "sharding", "models", "config"},
    "training": {"arrays", "config", "errors", "sharding", "models", "losses", "objectives"},
    "finished_run": {
        *(
            "arrays",
            "build",
            "checkpoints",
            "config",
            "config_check",
            "data",
            "errors",
            "evals",
            "models",
            "progress",
        ),
        *("sharding", "training"),
    },
    "evals": {"arrays", "config", "errors", "sharding", "models", "losses", "data", "objectives"},
}
# single files that may import more than their folder
ALSO = {
    "training/loop.py": {
        "build",
        "checkpoints",
        "config_check",
        "data",
        "distributed",
        "evals",
        "metric_writer",
        "programs",
        "progress",
    },
    "training/budgets.py": {"data"},
    "evals/report.py": {"build", "progress"},
}
FLAX = {"models/transformer.py", "sharding.py"}
HEAVY = {
    "jax",
    "numpy",
    "flax",
    "optax",
    "orbax",
    "grain",
    "tensorflow_datasets",
    "tokenizers",
    "safetensors",
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


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_are_short_and_named_after_what_they_hold(path: pathlib.Path) -> None:
    assert path.stem not in ("utils", "util", "helpers", "common", "types", "logging")
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


@pytest.mark.parametrize(
    "name", (*ENTRY_POINTS, "cli", "config", "config_check", "errors", "__init__")
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
    assert ours <= {"cli", "config", "config_check", "errors"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name
)
def test_configs_import_no_package_of_ours_and_no_jax(path: pathlib.Path) -> None:
    roots = {module.split(".")[0] for module in imports(path)}
    assert not roots & {"popi_jax", *HEAVY}


def test_no_cycles() -> None:
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in MODULES
        if path.stem != "__init__"
    }

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
