"""The notebooks are what their sources say, small, and ran without an error; that they still run, CI finds out."""

import json

import pytest

from lab import notebooks

SOURCES = sorted(notebooks.FOLDER.glob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_is_its_source_run_top_to_bottom(path):
    """What people open has the cells of the source, with outputs; nobody edited one and forgot the other."""
    made = json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))
    source = notebooks.read(path)
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in made["cells"]] == [
        (cell.cell_type, cell.source) for cell in source.cells
    ]
    code = [cell for cell in made["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = [out["output_type"] for cell in code for out in cell["outputs"]]
    assert {"display_data", "execute_result"} & {*kinds} and "error" not in kinds
    assert path.with_suffix(".ipynb").stat().st_size <= notebooks.BYTES


def test_there_are_five_notebooks():
    """Five, in the order in which they are read."""
    assert [path.name[0] for path in SOURCES] == list("12345")


def test_a_cell_that_fails_is_named(tmp_path):
    """A broken notebook stops with its name and the error, and nothing is written."""
    broken = tmp_path / "9_broken.py"
    broken.write_text("# %%\n1 / 0\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"9_broken\.py.*\n?[\s\S]*ZeroDivisionError"):
        notebooks.execute(broken)


def test_numbering_is_the_same_every_time(tmp_path):
    """The same text gives the same cells, so that a notebook made anew differs only where its content does."""
    path = tmp_path / "9_same.py"
    path.write_text("# %% [markdown]\n# # Title\n\n# %%\n1\n", encoding="utf-8")
    assert notebooks.read(path) == notebooks.read(path)
    with pytest.raises(notebooks.cli.Usage, match="no notebook begins with 9"):
        notebooks.main(["9", "--check"])
