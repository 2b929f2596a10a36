"""The house rules: imports run one way, the README knows every file, nothing is left out."""

import ast
import doctest
import fnmatch
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("pathways", "lab", "tests", "notebooks")
FILES = [*ROOT.glob("*.py")]
for folder in FOLDERS:
    FILES += (ROOT / folder).rglob("*.py")
FILES = sorted(path.relative_to(ROOT) for path in FILES)
MODULES = [path for path in FILES if path.parts[0] not in ("tests", "notebooks")]

MODELS = {"moe", "checks", "cartesian", "data", "pathways", "remix", "hf"}
EXPERIMENTS = MODELS | {"lab.tools", "lab.scores"}
ALLOWED = {  # what a file, or the files of a folder, may import of the project's own
    "checks.py": set(),
    "moe.py": {"checks"},
    "cartesian.py": {"moe", "checks"},
    "data.py": {"moe", "checks", "lab.tools.texts", "lab.tools.cli", "lab.tools.files"},
    "pathways": {"moe", "checks", "pathways", "lab.tools.files"},
    "remix.py": {"moe", "checks", "pathways"},
    "hf.py": {"moe", "checks", "lab.checkpoints.untrusted"},
    "lab/tools": MODELS | {"lab.tools", "lab.composing.presets"},
    "lab/tools/cli.py": set(),
    "lab/tools/files.py": {"checks"},
    "lab/tools/texts.py": {"checks", "lab.tools.cli", "lab.tools.files"},
    "lab/scores": EXPERIMENTS,
    "lab/composing": EXPERIMENTS | {"lab.composing"},
    "lab/composing/layers.py": {"moe", "cartesian"},
    "lab/composing/presets.py": {"moe", "cartesian", "lab.composing.layers"},
    "lab/remixing": EXPERIMENTS | {"lab.remixing"},
    "lab/checkpoints": EXPERIMENTS | {"lab.remixing", "lab.checkpoints"},
    "lab/checkpoints/untrusted.py": {"moe", "checks"},
    "lab/playground": EXPERIMENTS | {"lab.remixing", "lab.playground"},
    "lab/speed": EXPERIMENTS | {"lab.remixing", "lab.composing", "lab.speed"},
    "lab/pages": EXPERIMENTS | {"lab.remixing", "lab.composing", "lab.pages", "notebooks.pictures"},
}


def imported(path: Path) -> set[str]:
    """The full names of all that a file imports, such as lab.tools.cli."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_run_one_way(room):
    """The models know nothing of data, and neither of them knows the experiments around them."""
    own = {path.stem for path in ROOT.glob("*.py")} | {*FOLDERS}
    for path in MODULES:
        rules = [rule for rule in ALLOWED if path.is_relative_to(rule)]
        if rules and max(rules, key=len) == room:  # the narrowest rule counts
            for name in imported(ROOT / path):
                foreign = name.split(".")[0] not in own
                allowed = any(f"{name}.".startswith(f"{prefix}.") for prefix in ALLOWED[room])
                assert foreign or allowed, f"{path} imports {name}"


def test_every_module_has_a_rule():
    """A new file has a place in the order of imports; train_toy.py and eval.py stand on top."""
    free = {"train_toy.py", "eval.py", "lab/__init__.py"}
    ruled = [path for path in MODULES if any(path.is_relative_to(rule) for rule in ALLOWED)]
    assert {path.as_posix() for path in MODULES} - free == {path.as_posix() for path in ruled}


def test_readme_names_what_is_there():
    """The README names every module, and every folder of lab."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in MODULES} - {"__init__.py", "__main__.py"}
    names |= {f"{path.parent.name}/" for path in MODULES if path.parent.name}
    assert {name for name in names if name not in readme} == set()


def test_readme_quotes_to_the_letter():
    """A class or function of the README that a root file defines stands there just so."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    sources = [path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")]
    for block in re.findall(r"```python\n(.*?)```", readme, re.S):
        start = block.split("\n")[0]
        if start.lstrip().startswith(("class ", "def ")):
            named = [source for source in sources if f"{start}\n" in source]
            assert not named or any(block.strip() in source for source in named), start


def test_lines_fit_on_a_page():
    """No line has more than 100 columns."""
    wide = []
    for path in FILES:
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        wide += [f"{path}: {line}" for line in lines if len(line) > 100]
    assert wide == []


def modules_with_examples():
    """The names of all modules whose docstrings show examples."""
    paths = [path for path in MODULES if ">>> " in (ROOT / path).read_text(encoding="utf-8")]
    return [".".join(path.with_suffix("").parts) for path in paths]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings(name):
    """What docstrings show is what one gets."""
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0


def test_every_module_is_packaged():
    """An installed copy holds every module: setuptools silently leaves out what is not listed."""
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = ast.literal_eval(re.search(r"py-modules = (\[.*\])", settings)[1])
    assert {*listed} == {path.stem for path in ROOT.glob("*.py")}
    patterns = ast.literal_eval(re.search(r"include = (\[.*\])", settings)[1])
    for path in MODULES:
        if path.parent.name:
            package = ".".join(path.parent.parts)
            assert any(fnmatch.fnmatch(package, pattern) for pattern in patterns)
            assert (ROOT / path.parent / "__init__.py").exists()
