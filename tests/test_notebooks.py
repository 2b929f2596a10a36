"""The notebooks are what their sources say, small, and ran without an error.

That they still run, .ci/run finds out.
"""

import json

import pytest

from lab.pages import notebooks


@pytest.mark.parametrize("path", notebooks.sources(), ids=lambda path: path.stem)
def test_a_notebook_is_its_source_run_top_to_bottom(path):
    """What people open has the cells of the source, with outputs, run in their order."""
    file = path.with_suffix(".ipynb")
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    shown = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    assert shown == [(cell.cell_type, cell.source) for cell in notebooks.read(path).cells]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert outputs & {"display_data", "execute_result"} and "error" not in outputs
    assert file.stat().st_size <= notebooks.BYTES


@pytest.mark.full
def test_a_cell_that_fails_is_named(tmp_path):
    """A broken notebook stops with its name and the error."""
    broken = tmp_path / "9_broken.py"
    broken.write_text("# %%\n1 / 0\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"9_broken\.py[\s\S]*ZeroDivisionError"):
        notebooks.execute(broken)


@pytest.mark.full
def test_numbering_is_the_same_every_time(tmp_path):
    """The same text gives the same cells: a notebook made anew differs where its content does."""
    path = tmp_path / "9_same.py"
    path.write_text("# %% [markdown]\n# # Title\n\n# %%\n1\n", encoding="utf-8")
    assert notebooks.read(path) == notebooks.read(path)
