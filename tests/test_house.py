"""The house rules: files stay readable in one sitting, the README knows them all, and imports run one way."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Lines, blank ones not counted.
BUDGETS = {
    "moe.py": 402,
    "cartesian.py": 212,
    "remix.py": 546,
    "data.py": 255,
    "hf.py": 303,
    "train_toy.py": 310,
    "eval.py": 350,
    "lab": 3_015,
    "tests": 2_850,
}
# What a module may import of the project's own.
ALLOWED = {"moe": set(), "data": {"moe"}, "cartesian": {"moe"}, "remix": {"moe"}, "hf": {"moe"}}
ALLOWED |= {"lab": {"moe", "data", "cartesian", "remix", "hf", "lab"}}


def sources(name):
    return sorted((ROOT / name).rglob("*.py")) if (ROOT / name).is_dir() else [ROOT / name]


@pytest.mark.parametrize(("name", "budget"), BUDGETS.items(), ids=BUDGETS)
def test_line_budget(name, budget):
    """A file reads from top to bottom in one sitting: whoever adds lines finds others to take away."""
    lines = [line for path in sources(name) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) <= budget


def test_every_file_has_a_budget():
    """A new top-level module comes with a budget."""
    assert {path.name for path in ROOT.glob("*.py")} <= BUDGETS.keys()


@pytest.mark.parametrize(("name", "allowed"), ALLOWED.items(), ids=ALLOWED)
def test_imports_run_one_way(name, allowed):
    """The models know nothing of data and checkpoints, and none of these knows the experiments around them."""
    own = {path.stem for path in ROOT.glob("*.py")} | {"lab"}
    for path in sources(name if name == "lab" else f"{name}.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {n.split(".")[0] for n in names} & own <= allowed, f"{path}: {names}"


def test_readme_shows_what_is_there():
    """The README names every module, and prints the layers of moe.py and cartesian.py to the letter."""
    readme, *models = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "moe.py", "cartesian.py"))
    modules = [*ROOT.glob("*.py"), *(ROOT / "lab").glob("*.py")]
    assert [path.name for path in modules if path.name not in readme and path.name != "__init__.py"] == []
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert blocks and all(any(block.strip() in model for model in models) for block in blocks)


@pytest.mark.parametrize("name", ["moe", "cartesian", "remix", "data", "lab.cli", "lab.stats"])
def test_examples_in_docstrings(name):
    """What docstrings show is what one gets."""
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0 and found.failed == 0


def test_readme_counts_lines():
    """The line counts of the README's file tree are right, to a tenth."""
    tree = re.findall(r"^(\S+)  +(\d+)   ", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert {"moe.py", "data.py", "train_toy.py", "eval.py", "lab/cli.py", "tests/"} <= {name for name, _ in tree}
    for name, count in tree:
        files = (ROOT / name).glob("*.py") if name.endswith("/") else [ROOT / name]
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
        assert abs(lines - int(count)) <= lines / 10, f"{name} has {lines} lines, the README says {count}"


def test_every_module_is_packaged():
    """An installed copy holds every top-level module: setuptools would silently leave out what is not listed."""
    listed = re.search(r"py-modules = (\[.*\])", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
    assert set(ast.literal_eval(listed)) == {path.stem for path in ROOT.glob("*.py")}
