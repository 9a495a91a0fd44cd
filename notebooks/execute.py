"""Executes every notebook from start to end. A failing cell, or a stored output, is an error.

    python notebooks/execute.py                  # all of them
    python notebooks/execute.py --to FOLDER      # keeps the executed notebooks there
    python notebooks/execute.py 03               # only those whose name begins so

Each runs in an empty folder, as it would in Colab.
"""

import argparse
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def check_is_clean(path, notebook):
    """Raises if the notebook is stored with outputs, which would change with every commit."""
    for cell in notebook.cells:
        if cell.cell_type == "code" and (cell.outputs or cell.execution_count is not None):
            raise SystemExit(
                f"{path.name} must be stored without outputs, got some\n"
                "  fix: choose 'Clear all outputs' in Jupyter before you save it"
            )


def execute(notebook):
    """Executes a notebook in an empty folder."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        where = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="the beginnings of names")
    parser.add_argument("--to", type=Path, help="where to keep the executed notebooks")
    arguments = parser.parse_args()
    for path in sorted(Path(__file__).parent.glob("*.ipynb")):
        if arguments.names and not path.name.startswith(tuple(arguments.names)):
            continue
        notebook = nbformat.read(path, as_version=4)
        check_is_clean(path, notebook)
        began = time.perf_counter()
        execute(notebook)
        seconds = time.perf_counter() - began
        print(f"{path.name}: {len(notebook.cells)} cells ran in {seconds:.0f} s", flush=True)
        if arguments.to is not None:
            arguments.to.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, arguments.to / path.name)


if __name__ == "__main__":
    main()
