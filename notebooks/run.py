"""Runs the notebooks with papermill and prints what they conclude: ``python notebooks/run.py --help``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbclient import NotebookClient
from papermill.exceptions import PapermillExecutionError
from tabulate import tabulate

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "build" / "notebooks"


def run(notebook: Path, parameters: dict[str, Any]) -> tuple[nbformat.NotebookNode | None, str]:
    """The executed notebook, kept under build/notebooks, and how it ended."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    output = RESULTS / notebook.name
    try:
        papermill.execute_notebook(notebook, output, parameters, cwd=HERE, progress_bar={"desc": notebook.stem})
    except PapermillExecutionError as error:
        return None, f"failed in cell {error.exec_count}: {error.ename}: {error.evalue}"
    return nbformat.read(output, as_version=4), "done"


def refresh(notebook: Path) -> None:
    """Executes a notebook as it stands, from top to bottom, and writes it back with its outputs."""
    node = nbformat.read(notebook, as_version=4)
    NotebookClient(node, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in node.cells:
        cell.metadata.pop("execution", None)  # times of day, different with every run
    part = notebook.with_suffix(".part")
    nbformat.write(node, part)
    part.replace(notebook)


def conclusions(node: nbformat.NotebookNode) -> list[str]:
    """The plain text that cells tagged ``verdict`` printed."""
    cells = [cell for cell in node.cells if "verdict" in cell.metadata.get("tags", [])]
    return [output.text for cell in cells for output in cell.outputs if output.output_type == "stream"]


def main() -> int:
    """The command line; returns the number of notebooks that failed."""
    parser = argparse.ArgumentParser(description="Run the notebooks and print their verdicts.")
    parser.add_argument("names", nargs="*", help="notebooks by the beginning of their name, such as 01; default: all")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    parser.add_argument("--in-place", action="store_true", help="write outputs into the notebooks themselves")
    arguments = parser.parse_args()
    chosen = [file for file in sorted(HERE.glob("[0-9]*.ipynb")) if file.name.startswith(tuple(arguments.names) or "")]
    if not chosen:
        parser.error(f"no notebook begins with {' or '.join(arguments.names)}; there are {', '.join(all_names())}")
    if arguments.in_place and arguments.p:
        parser.error("--in-place runs the notebooks as they stand: no -p")
    rows, failures = [], 0
    for notebook in chosen:
        start = time.perf_counter()
        if arguments.in_place:
            os.environ["CHATTERBOX_LAB_OUTPUT"] = str(HERE.parent)  # its measurements are the recorded ones
            refresh(notebook)
            continue
        node, end = run(notebook, {name: parse(value) for name, value in arguments.p})
        failures += node is None
        rows.append((notebook.stem, f"{time.perf_counter() - start:.0f}", end))
        for text in conclusions(node) if node else ():
            print(f"\n{notebook.stem}\n{text}")
    if rows:
        print("\n" + tabulate(rows, headers=("notebook", "seconds", "ended")))
    return failures


def all_names() -> list[str]:
    """The notebooks there are."""
    return [file.stem for file in sorted(HERE.glob("[0-9]*.ipynb"))]


def parse(value: str) -> Any:
    """A parameter's value: a number, True, False or None where it reads as one, else the text itself."""
    words = {"True": True, "False": False, "None": None}
    if value in words:
        return words[value]
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return value


if __name__ == "__main__":
    sys.exit(main())
