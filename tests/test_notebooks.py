"""The notebooks' rules, and the program that runs them."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

import nbformat
import pytest
import run
from nbformat.v4 import new_code_cell, new_notebook

FOLDER = Path(run.__file__).parent
NOTEBOOKS = {file.stem: nbformat.read(file, as_version=4) for file in sorted(FOLDER.glob("[0-9]*.ipynb"))}
EXEMPT = "# NBVAL_IGNORE_OUTPUT"
every_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def code(name: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in NOTEBOOKS[name].cells if cell.cell_type == "code"]


def tagged(name: str, tag: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in code(name) if tag in cell.metadata.get("tags", [])]


@every_notebook
def test_a_notebook_has_parameters_a_setup_and_a_verdict(name: str) -> None:
    assert [len(tagged(name, tag)) for tag in ("parameters", "setup", "verdict")] == [1, 1, 1]
    opening = NOTEBOOKS[name].cells[0].source
    assert all(f"**{part}**" in opening for part in ("Question.", "Method.", "How to read it."))


@every_notebook
def test_most_cells_of_a_notebook_are_compared(name: str) -> None:
    exempt = [cell for cell in code(name) if EXEMPT in cell.source]
    assert len(exempt) <= len(code(name)) / 3
    assert all(cell.source.startswith(EXEMPT) for cell in exempt)


@every_notebook
def test_what_is_not_compared_is_followed_by_what_is(name: str) -> None:
    cells = code(name)
    heard = ("player.play", "explorer.Explorer")  # nothing is measured
    measured = [
        n for n, cell in enumerate(cells) if EXEMPT in cell.source and not any(by in cell.source for by in heard)
    ]
    for place in measured:
        after = [cell for cell in cells[place + 1 :] if EXEMPT not in cell.source and cell.outputs]
        assert after or "verdict" in cells[place].metadata.get("tags", []), cells[place].source


@every_notebook
def test_a_notebook_reads_as_text_with_short_cells(name: str) -> None:
    cells = NOTEBOOKS[name].cells
    assert sum(cell.cell_type == "markdown" for cell in cells) >= 0.7 * len(code(name))
    assert statistics.median(len(cell.source.splitlines()) for cell in code(name)) < 8


@every_notebook
def test_a_notebook_was_committed_after_one_clean_run(name: str) -> None:
    counts = [cell.execution_count for cell in code(name)]
    assert counts == list(range(1, len(counts) + 1))
    assert all(output.output_type != "error" for cell in code(name) for output in cell.outputs)
    assert not any("execution" in cell.metadata for cell in code(name))  # times of day


@every_notebook
def test_a_notebook_calls_modules_by_their_own_names(name: str) -> None:
    source = "\n".join(cell.source for cell in code(name))
    for statement in ast.walk(ast.parse(source)):
        if isinstance(statement, ast.ImportFrom) and statement.module.startswith("chatterbox_lab"):
            assert all(alias.asname is None for alias in statement.names), ast.unparse(statement)


SAYS = 'import os\n\nprint("N + 1 is", N + 1, os.environ.get("CHATTERBOX_LAB_OUTPUT"))'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of notebooks with one that has a parameter and a verdict."""
    monkeypatch.setattr(run, "HERE", tmp_path / "notebooks")
    monkeypatch.setattr(run, "RESULTS", tmp_path / "build" / "notebooks")
    monkeypatch.setenv("CHATTERBOX_LAB_OUTPUT", "elsewhere")
    (tmp_path / "notebooks").mkdir()
    parameters = new_code_cell("N = 1", metadata={"tags": ["parameters"]})
    write(tmp_path / "notebooks" / "01_one.ipynb", parameters, new_code_cell(SAYS, metadata={"tags": ["verdict"]}))
    return tmp_path / "notebooks"


def write(path: Path, *cells: nbformat.NotebookNode) -> None:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=list(cells), metadata=kernel), path)


def test_a_run_with_a_parameter_prints_the_verdict_and_leaves_the_notebook_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "01_one.ipynb").read_bytes()
    assert run.main(["01", "-p", "N", "41"]) == 0
    told = capsys.readouterr().out
    assert "N + 1 is 42 elsewhere" in told
    assert "01_one" in told.splitlines()[-1]
    assert "done" in told.splitlines()[-1]
    assert (folder / "01_one.ipynb").read_bytes() == before
    assert [file.name for file in folder.iterdir()] == ["01_one.ipynb"]
    assert (run.RESULTS / "01_one.ipynb").exists()


def test_a_run_in_place_writes_outputs_into_the_notebook_and_to_the_repository(folder: Path) -> None:
    assert run.main(["--in-place"]) == 0
    cell = nbformat.read(folder / "01_one.ipynb", as_version=4).cells[1]
    assert cell.outputs[0].text == f"N + 1 is 2 {folder.parent}\n"
    assert "execution" not in cell.metadata
    assert not run.RESULTS.exists()


@pytest.mark.parametrize("more", [(), ("--in-place",)])
def test_a_notebook_that_fails_is_told_and_the_others_run(
    folder: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    write(folder / "00_fails.ipynb", new_code_cell('raise ValueError("no such thing")'))
    before = (folder / "00_fails.ipynb").read_bytes()
    assert run.main(more) == 1
    table = capsys.readouterr().out.splitlines()[-2:]
    assert "ValueError: no such thing" in table[0]
    assert "done" in table[1]
    assert (folder / "00_fails.ipynb").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["01", "77"], "no notebook begins with 77; there are 01_one"),
        (["--in-place", "-p", "N", "2"], "--in-place runs the notebooks as they stand: no -p"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(words)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err
    assert not run.RESULTS.exists()
