"""The house rules: imports run one way, a page names every file, every module is packaged."""

import ast
import doctest
import fnmatch
import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("pathways", "lab", "notebooks", "tests")
PATHS = [*ROOT.glob("*.py"), *ROOT.glob("pathways/*.py"), *ROOT.glob("lab/**/*.py")]
MODULES = sorted(path.relative_to(ROOT) for path in PATHS)

CHECKS = {"lab.tools.checks", "lab.tools.configs", "lab.tools.kinds"}
MODELS = {"moe", "cartesian", "data", "pathways", "remix", "hf"} | CHECKS
EXPERIMENTS = MODELS | {"lab.tools", "lab.scores"}
ALLOWED = {  # what a file, or the files of a folder, may import of the project's own
    "moe.py": CHECKS | {"lab.tools.compiled"},
    "cartesian.py": CHECKS | {"moe"},
    "data.py": CHECKS | {"moe", "lab.tools.texts", "lab.tools.cli", "lab.tools.files"},
    "pathways": CHECKS | {"moe", "pathways", "lab.tools.files", "lab.tools.processes"},
    "remix.py": CHECKS | {"moe", "pathways"},
    "hf.py": CHECKS
    | {f"lab.tools.{name}" for name in ("cli", "files", "flags")}
    | {"moe"}
    | {f"lab.checkpoints.{name}" for name in ("families", "tokenizer", "untrusted")},
    "lab/tools": MODELS | {"lab.tools", "lab.composing.presets"},
    "lab/tools/kinds.py": set(),
    "lab/tools/configs.py": {"lab.tools.kinds"},
    "lab/tools/checks.py": {"lab.tools.kinds"},
    "lab/tools/compiled.py": set(),
    "lab/tools/cli.py": {"lab.tools.kinds"},
    "lab/tools/flags.py": {"lab.tools.cli", "lab.tools.configs"},
    "lab/tools/processes.py": set(),
    "lab/tools/files.py": {"lab.tools.checks"},
    "lab/tools/memory.py": {"lab.tools.checks", "lab.checkpoints.untrusted"},
    "lab/tools/texts.py": {f"lab.tools.{name}" for name in ("checks", "cli", "files", "flags")},
    "lab/scores": EXPERIMENTS,
    "lab/composing": EXPERIMENTS | {"lab.composing"},
    "lab/composing/layers.py": {"moe", "cartesian"},
    "lab/composing/presets.py": {"moe", "cartesian", "lab.composing.layers"}
    | {"lab.tools.cli", "lab.tools.flags"},
    "lab/remixing": EXPERIMENTS | {"lab.remixing"},
    "lab/checkpoints": EXPERIMENTS | {"lab.remixing", "lab.checkpoints"},
    "lab/checkpoints/untrusted.py": {"lab.tools.checks", "lab.tools.files"},
    "lab/checkpoints/families.py": {"moe", "lab.tools.checks", "lab.tools.cli"},
    "lab/checkpoints/tokenizer.py": {"lab.tools.checks", "lab.tools.cli", "lab.tools.files"}
    | {"lab.checkpoints.untrusted"},
    "lab/playground": EXPERIMENTS | {"lab.remixing", "lab.composing.presets", "lab.playground"},
    "lab/speed": EXPERIMENTS | {"lab.remixing", "lab.composing", "lab.speed"},
    "lab/pages": EXPERIMENTS
    | {"lab.remixing", "lab.composing", "lab.speed.report", "lab.pages", "notebooks.pictures"},
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


def test_imports_run_one_way():
    """The models know nothing of data, and neither of them knows the experiments around them."""
    own = {path.stem for path in ROOT.glob("*.py")} | {*FOLDERS}
    wrong = []
    for path in MODULES:
        rules = [rule for rule in ALLOWED if path.is_relative_to(rule)]
        if rules:
            allowed = ALLOWED[max(rules, key=len)]  # the narrowest rule counts
            for name in imported(ROOT / path):
                within = any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed)
                if name.split(".")[0] in own and not within:
                    wrong.append(f"{path} imports {name}")
    assert wrong == []


def test_every_module_has_a_rule():
    """A new file has a place in the order of imports; train_toy.py and eval.py stand on top."""
    free = {"train_toy.py", "eval.py", "lab/__init__.py"}
    ruled = [path for path in MODULES if any(path.is_relative_to(rule) for rule in ALLOWED)]
    assert {path.as_posix() for path in MODULES} - free == {path.as_posix() for path in ruled}


def top_level_names(path: Path) -> set[str]:
    """What a file defines: classes, functions and constants."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.Assign):
            targets = [each for target in node.targets for each in ast.walk(target)]
            names |= {each.id for each in targets if isinstance(each, ast.Name)}
    return names


def test_one_name_has_one_meaning():
    """No two files define the same name, but for the `main` of a command."""
    places = {}
    for path in MODULES:
        for name in top_level_names(ROOT / path) - {"main"}:
            places.setdefault(name, []).append(path.as_posix())
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_the_page_of_files_names_what_is_there():
    """docs/files.md names every module, and every folder of lab."""
    page = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    names = {path.name for path in MODULES} - {"__init__.py", "__main__.py"}
    names |= {f"{path.parent.name}/" for path in MODULES if path.parent.name}
    assert {name for name in names if name not in page} == set()


def test_links_lead_somewhere():
    """Every relative link of a page leads to a file, and to a heading of it where it names one."""
    missing = []
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if link.startswith("http"):
                continue
            if not target.exists() or (anchor and anchor not in anchors(target)):
                missing.append(f"{page.name}: {link}")
    assert missing == []


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_examples_in_docstrings():
    """What docstrings show is what one gets."""
    n_modules = 0
    for path in MODULES:
        if ">>> " in (ROOT / path).read_text(encoding="utf-8"):
            module = importlib.import_module(".".join(path.with_suffix("").parts))
            result = doctest.testmod(module)
            assert result.attempted > 0 and result.failed == 0, path
            n_modules += 1
    assert n_modules > 0


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
