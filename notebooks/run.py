"""Runs the notebooks with papermill and prints what they conclude: ``python notebooks/run.py --help``.

Whatever a run writes goes to build/: the executed notebooks, their figures and their measurements. With ``--in-place``
the notebooks themselves, figures/ and data/ are written again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from papermill.cli import papermill
from papermill.exceptions import PapermillExecutionError
from tabulate import tabulate

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "build" / "notebooks"


def run(notebook: Path, parameters: Sequence[tuple[str, str]]) -> Path:
    """Executes a copy of a notebook under build/notebooks, by papermill's own command, and returns its path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    chosen = [word for pair in parameters for word in ("-p", *pair)]
    papermill([str(notebook), str(RESULTS / notebook.name), "--cwd", str(HERE), *chosen], standalone_mode=False)
    return RESULTS / notebook.name


def refresh(notebook: Path) -> Path:
    """Executes a notebook as it stands, from top to bottom, and writes it back with its outputs."""
    node = nbformat.read(notebook, as_version=4)
    # Times of day would differ with every run.
    client = NotebookClient(node, record_timing=False, kernel_name="python3", resources={"metadata": {"path": HERE}})
    client.execute()
    part = notebook.with_suffix(".part")
    nbformat.write(node, part)
    part.replace(notebook)
    return notebook


def conclusions(notebook: Path) -> list[str]:
    """The plain text that cells tagged ``verdict`` printed."""
    cells = [cell for cell in nbformat.read(notebook, 4).cells if "verdict" in cell.metadata.get("tags", [])]
    return [output.text for cell in cells for output in cell.outputs if output.output_type == "stream"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the number of notebooks that failed."""
    parser = argparse.ArgumentParser(description="Run the notebooks and print their verdicts.")
    parser.add_argument("names", nargs="*", help="notebooks by the beginning of their name, such as 01; default: all")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    parser.add_argument("--in-place", action="store_true", help="write the notebooks themselves, figures/ and data/")
    options = parser.parse_args(arguments)
    known = sorted(HERE.glob("[0-9]*.ipynb"))
    chosen = [file for file in known if file.name.startswith(tuple(options.names) or "")]
    for name in options.names:
        if not any(file.name.startswith(name) for file in known):
            parser.error(f"no notebook begins with {name}; there are {', '.join(file.stem for file in known)}")
    if options.in_place:
        if options.p:
            parser.error("--in-place runs the notebooks as they stand: no -p")
        os.environ["CHATTERBOX_LAB_OUTPUT"] = str(HERE.parent)
    rows = []
    for notebook in chosen:
        start, end = time.perf_counter(), "done"
        try:
            result = refresh(notebook) if options.in_place else run(notebook, options.p)
            print(f"\n{notebook.stem}", *conclusions(result), sep="\n")
        except PapermillExecutionError as error:
            end = f"failed in cell {error.exec_count}: {error.ename}: {error.evalue}"
        except CellExecutionError as error:
            end = f"failed: {error.ename}: {error.evalue}"
        rows.append((notebook.stem, f"{time.perf_counter() - start:.0f}", end))
    print("\n" + tabulate(rows, headers=("notebook", "seconds", "ended")))
    return sum(end != "done" for *_, end in rows)


if __name__ == "__main__":
    sys.exit(main())
