"""Executes every notebook from start to end. A failing cell is an error."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

for path in sorted(Path(__file__).parent.glob("*.ipynb")):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    if "--save" in sys.argv:
        nbformat.write(notebook, path)
    print(f"{path.name}: {len(notebook.cells)} cells ran")
