"""The notebooks, from their text to what people see:

python -m lab.pages.notebooks           run notebooks/*.py top to bottom, two side by side, and
                                        write the .ipynb beside each
python -m lab.pages.notebooks --check   the same, but write nothing: do they still run, and in time?
python -m lab.pages.notebooks 1 4       only those whose names begin so

The source of a notebook is a script in jupytext's percent format; edit that, never the .ipynb.
"""

from lab.tools import cli, flags

if __name__ == "__main__":
    cli.read_first(flags.notebooks, __doc__)

import base64
import io
import os
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SECONDS = 75  # of one thread's time: a minute, and a margin for a busy machine
BYTES = 300_000  # of the file, with all that was printed and drawn


def main(argv=None) -> int:
    """Run notebooks -> the exit code."""
    given = flags.notebooks(argv, __doc__)
    paths = chosen_sources(given["names"])

    # Run two at a time; write each, and remember those that took too much.
    too_large = []
    with ProcessPoolExecutor(2) as pool:
        for path, (text, seconds) in zip(paths, pool.map(execute, paths), strict=True):
            size = len(text.encode())
            cost = f"{seconds:3.0f} s of {SECONDS}, {size / 1000:4.0f} kB of {BYTES / 1000:.0f}"
            print(f"{path.name:32} {cost}", flush=True)
            if seconds > SECONDS or size > BYTES:
                too_large.append(path.name)
            if not given["check"]:
                path.with_suffix(".ipynb").write_text(text, encoding="utf-8")
    if too_large:
        raise ValueError(f"too slow, or too large: {', '.join(too_large)}; shorten it")
    return 0


def sources() -> list[Path]:
    """The sources of all notebooks: their names begin with a number."""
    return sorted(NOTEBOOKS.glob("[0-9]*.py"))


def chosen_sources(names: list[str]) -> list[Path]:
    """Those whose names begin with one of `names`; all of them where none is given."""
    paths = [path for path in sources() if not names or path.name.startswith(tuple(names))]
    if not paths:
        stems = ", ".join(path.stem for path in sources())
        raise cli.Usage(f"no notebook begins with {' or '.join(names)}; there are {stems}")
    return paths


def read(path: Path):
    """A script as a notebook without outputs.

    Its cells are numbered, so that the same text gives the same file.
    """
    notebook = jupytext.read(path)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def execute(path: Path) -> tuple[str, float]:
    """Run a notebook on one thread -> its JSON, and its seconds of CPU time.

    ValueError names the notebook and the error of a cell that fails.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(NOTEBOOKS.parent)}
    notebook = read(path)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        coalesce_streams=True,
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": NOTEBOOKS}},
    )
    start = children_seconds()
    try:
        client.execute()
    except Exception as error:
        raise ValueError(f"{path.name}: {error}") from None
    return tidy(notebook), children_seconds() - start


def children_seconds() -> float:
    """The CPU time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def tidy(notebook) -> str:
    """JSON without versions and progress bars, which change from run to run; light pictures."""
    notebook.metadata.pop("language_info", None)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = light(data["image/png"])
    return nbformat.writes(notebook)


def light(png: str) -> str:
    """A picture in base64, again with 128 colours: a third of the bytes."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    method = Image.Quantize.MAXCOVERAGE  # keeps rare colours too
    image = image.quantize(128, method, kmeans=1, dither=Image.Dither.NONE)
    file = io.BytesIO()
    image.save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    cli.program(main)
