import pytest

from popi_jax.errors import UserError
from popi_jax.evals.conditions import list_reads
from popi_jax.evals.sweep_plan import (
    Cell,
    list_cells,
    parse_model,
    read_sweep,
    split_name,
    take_share,
)

FILE = """
def get_sweep(arg=""):
    return {
        "models": ["work/a", "work/a@5"],
        "data": ["own", "prefeval@validation"],
        "conditions": ["no_signals", "raw_signals", "summary"],
        "signals": ["all", "shots:2"],
        "decodings": ["greedy", "sampled"],
        "max_users": 3,
    }
"""


def write(tmp_path, text: str) -> str:
    (tmp_path / "sweep.py").write_text(text)
    return str(tmp_path / "sweep.py")


def plan(path: str, **changed: list[str]) -> list[Cell]:
    return list_cells(read_sweep(path, changed), list_reads())


def test_the_product_without_what_changes_nothing(tmp_path):
    cells = plan(write(tmp_path, FILE))
    own = [c for c in cells if (c.model, c.data) == ("work/a", "own")]
    assert len(cells) == 4 * len(own)
    assert [(c.condition, c.signals, c.decoding) for c in own] == [
        ("no_signals", "none", "none"),
        ("raw_signals", "all", "none"),
        ("raw_signals", "shots:2", "none"),
        ("summary", "all", "greedy"),
        ("summary", "all", "sampled"),
        ("summary", "shots:2", "greedy"),
        ("summary", "shots:2", "sampled"),
    ]
    assert cells[-1].labels()["data"] == "prefeval" and cells[-1].labels()["split"] == "validation"


def test_flags_replace_lists_of_the_file(tmp_path):
    path = write(tmp_path, FILE)
    cells = plan(path, models=["x@7"], data=["own"], signals=["all"], decodings=["greedy"])
    assert {c.model for c in cells} == {"x@7"} and len(cells) == 3
    assert read_sweep(path, {}).max_users == 3
    assert read_sweep(path, {}, 0).max_users == 0


def test_base_models_as_generators_come_last(tmp_path):
    cells = plan(write(tmp_path, FILE), generators=["org/other", "trained"])
    foreign = [c.generator == "org/other" for c in cells]
    assert foreign == sorted(foreign) and sum(foreign) * 2 == len(cells)


def test_shares_are_disjoint_whole_and_whole_models(tmp_path):
    cells = plan(write(tmp_path, FILE))
    for count in (1, 2, 3, 4, 7):
        shares = [take_share(cells, f"{n}/{count}") for n in range(1, count + 1)]
        assert sorted(c for share in shares for c in share) == sorted(cells)
        if count <= 4:
            groups = [{(c.model, c.data) for c in share} for share in shares]
            assert sum(map(len, groups)) == 4
    for bad in ("0/2", "3/2", "2", "a/b", "1/0"):
        with pytest.raises(UserError, match="must be I/N with I from 1 to N"):
            take_share(cells, bad)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('def get_sweep(a): return {"model": ["x"]}', 'no field "model".*Did you mean "models"'),
        ('def get_sweep(a): return {"models": "x"}', "models = 'x': must be a list"),
        ('def get_sweep(a): return {"models": []}', "models is empty"),
        ("def get_sweep(a): return {}", "name the WORKDIR of a run"),
        ('def get_sweep(a): return {"models": ["x", "x"]}', '"x" twice'),
        (
            'def get_sweep(a): return {"models": ["x"], "decodings": ["greddy"]}',
            'decodings has "greddy".*Did you mean "greedy"',
        ),
        ('def get_sweep(a): return {"models": ["x"], "max_users": -1}', "max_users = -1"),
        ('def get_sweep(a): return {"grids": [{"modells": []}]}', r"grids\[0\]: there is no field"),
        ("def get_sweep(a): return 5", "returns a dict"),
        ("x = 1", "must define get_sweep"),
        ("def get_sweep(a): return 1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_broken_file_is_told_in_one_line(tmp_path, text, told):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=told) as e:
        read_sweep(path, {})
    assert "sweep.py" in str(e.value) and "\n" not in str(e.value)


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, FILE)
    with pytest.raises(UserError, match=r"there is no file .*swep.py.*Did you mean \"sweep.py\""):
        read_sweep(str(tmp_path / "swep.py"), {}, None)


def test_the_run_in_workdir_is_meant_where_none_is_named(tmp_path):
    path = write(tmp_path, "def get_sweep(a): return {}")
    assert {c.model for c in list_cells(read_sweep(path, {}, workdir="work/x"), list_reads())} == {
        "work/x"
    }


def test_labels():
    cell = Cell("work/a@5", "prism@validation", "all", "summary", "greedy", "trained")
    labels = {"model": "work/a", "step": 5, "data": "prism", "split": "validation"}
    rest = {"condition": "summary", "decoding": "greedy", "generator": "trained"}
    assert cell.labels() == labels | {"signals": "all"} | rest
    newest = cell._replace(model="work/a")
    assert newest.labels()["step"] == "" and newest.labels(9)["step"] == 9


def test_names():
    assert parse_model("gs://b/run@750") == ("gs://b/run", 750)
    assert parse_model("work/a@b") == ("work/a@b", None)
    assert split_name("prism:schedule=short@validation") == ("prism:schedule=short", "validation")
    assert split_name("own") == ("own", "test")
