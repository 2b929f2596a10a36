"""The notebooks, from their text to what people see:

python -m lab.notebooks             run notebooks/*.py top to bottom, two side by side, and write the .ipynb beside each
python -m lab.notebooks --check     the same, but write nothing: do they still run, and in time?
python -m lab.notebooks 1 4         only those whose names begin so

The source of a notebook is a script in jupytext's percent format; edit that, never the .ipynb.
"""

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

from lab import cli

FOLDER = Path(__file__).parent.parent / "notebooks"
SECONDS, BYTES = 60, 300_000  # of one thread's time, and of the file with all that was printed and drawn


def main(argv=None) -> int:
    """Run notebooks -> the exit code."""
    parser = cli.Parser("lab.notebooks", usage="%(prog)s [NUMBER ...] [--check]", description=__doc__)
    parser.add_argument("names", nargs="*", help="how their names begin (none: all)")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args, slow = parser.parse(argv), []
    known = sorted(FOLDER.glob("*.py"))
    chosen = [path for path in known if path.name.startswith(tuple(args["names"]) or "")]
    if not chosen:
        there = ", ".join(path.stem for path in known)
        raise cli.Usage(f"no notebook begins with {' or '.join(args['names'])}; there are {there}")
    with ProcessPoolExecutor(2) as pool:
        for path, (text, seconds) in zip(chosen, pool.map(execute, chosen), strict=True):
            size = len(text.encode())
            cost = f"{seconds:3.0f} s of {SECONDS}, {size / 1000:4.0f} kB of {BYTES / 1000:.0f}"
            print(f"{path.name:32} {cost}", flush=True)
            slow += [path.name] if seconds > SECONDS or size > BYTES else []
            if not args["check"]:
                path.with_suffix(".ipynb").write_text(text, encoding="utf-8")
    if slow:
        raise ValueError(f"too slow, or too large: {', '.join(slow)}; shorten it")
    return 0


def execute(path: Path) -> tuple[str, float]:
    """Run a notebook on one thread -> (its JSON, seconds of CPU time). ValueError: a cell that fails, and how."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    notebook = read(path)
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        quiet = {"extra_arguments": ["--log-level=ERROR"], "coalesce_streams": True, "kernel_name": "python3"}
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": FOLDER}}, **quiet).execute()
    except Exception as error:
        raise ValueError(f"{path.name}: {error}") from None
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return tidy(notebook), end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime


def read(path: Path):
    """A script as a notebook without outputs; its cells are numbered, so that the same text gives the same file."""
    notebook = jupytext.read(path)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def light(png: str) -> str:
    """A picture in base64 again, in 128 colours, rare ones among them: a third of the bytes."""
    image, made = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    image.quantize(128, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE).save(made, "png", optimize=True)
    return base64.b64encode(made.getvalue()).decode()


def tidy(notebook) -> str:
    """JSON without what changes from run to run: times, and progress bars; and with light pictures."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        cell.outputs = [out for out in cell.get("outputs", []) if out.get("name") != "stderr"]
        for data in (out["data"] for out in cell.outputs if "image/png" in out.get("data", {})):
            data["image/png"] = light(data["image/png"])
        if cell.cell_type != "code":
            del cell["outputs"]
    notebook.metadata.pop("language_info", None)
    return nbformat.writes(notebook)


if __name__ == "__main__":
    cli.run(main)
