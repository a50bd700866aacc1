"""The READMEs: what they promise is there, what they show runs, and their tables are what was recorded."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import readme
from matplotlib import pyplot as plt

from chatterbox_lab.__main__ import COMMANDS
from chatterbox_lab.engine.schedule import SCHEDULES
from chatterbox_lab.engine.t3.backends import BACKENDS
from chatterbox_lab.files import REPOSITORY
from chatterbox_lab.show.figures import result
from chatterbox_lab.training import card

PLACES = (".", "chatterbox_lab/engine", "chatterbox_lab/speech", "notebooks", "data", "data/lab")
READMES = [REPOSITORY / place / "README.md" for place in PLACES]


def place(path: Path) -> str:
    return str(path.parent.relative_to(REPOSITORY))


each_readme = pytest.mark.parametrize("path", READMES, ids=place)


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def test_the_readme_is_read_in_minutes() -> None:
    text = readme.README.read_text()
    assert len(text.encode()) <= 9 * 1024
    assert len(text.split()) <= 1100  # as `wc -w` counts


def test_the_readme_defines_its_terms_before_it_uses_them() -> None:
    text = readme.README.read_text()
    first = text[: text.index("## ")]
    assert {"T3", "S3Gen", "Chunk", "RTF", "Seam"} <= set(re.findall(r"^- \*\*(\w+)\*\*", first, re.MULTILINE))


@pytest.fixture
def no_new_rows() -> Iterator[None]:
    """What an example registers is gone after it."""
    before = [(table, dict(table)) for table in (BACKENDS, SCHEDULES)]
    yield
    for table, rows in before:
        table.clear()
        table.update(rows)


@pytest.mark.usefixtures("no_new_rows")
@each_readme
def test_every_python_example_of_a_readme_runs(
    path: Path, tts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("chatterbox_lab.voices.load.load", lambda *_, **__: tts)
    scope: dict[str, Any] = {}
    examples = blocks(path, "python")
    try:
        for example in examples:
            exec(example, scope)
    finally:
        if hasattr(tts.generate_stream, "patch"):
            tts.generate_stream.patch.undo()  # an example leaves its patch in place, as it says
    assert bool(capsys.readouterr().out) == bool(examples)


def test_the_readmes_show_how_to_use_and_how_to_change_it() -> None:
    assert len(blocks(readme.README, "python")) >= 2
    assert len(blocks(readme.ENGINE, "python")) >= 4


@each_readme
def test_examples_that_do_not_run_here_name_what_there_is(path: Path) -> None:
    for example in blocks(path, "py"):
        tree = ast.parse(example)
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        ours = {
            item.asname or item.name: importlib.import_module(f"{node.module}.{item.name}")
            for node in imports
            if node.module.startswith("chatterbox_lab")
            for item in node.names
        }
        whole = [item for node in ast.walk(tree) if isinstance(node, ast.Import) for item in node.names]
        ours |= {item.asname: importlib.import_module(item.name) for item in whole if item.name == "chatterbox_lab"}
        uses = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
        named = {(node.value.id, node.attr) for node in uses if node.value.id in ours}
        assert named
        assert not [f"{module}.{name}" for module, name in named if not hasattr(ours[module], name)]


@each_readme
def test_every_make_target_of_a_readme_exists(path: Path) -> None:
    targets = re.findall(r"^([a-z.]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"(?:`|^)make ([a-z.]+)", path.read_text(), re.MULTILINE))
    assert named <= set(targets)
    if path == readme.README:
        assert {"hear", "run", "test", "lab"} <= named


@each_readme
def test_every_command_of_a_readme_exists_and_takes_its_options(path: Path) -> None:
    lines = re.sub(r"\\\n\s*", "", path.read_text()).replace("$dtype", "float32")
    called = re.findall(r"(?:-m chatterbox_lab|\$lab|chatterbox-lab) ([a-z0-9-]+)((?: +[^\n`;]*)?)", lines)
    assert called or path.parent.name in ("engine", "notebooks")
    for name, rest in called:
        parser = argparse.ArgumentParser(name)
        importlib.import_module(f"chatterbox_lab.{COMMANDS[name].module}").add_options(parser)
        parser.parse_args(shlex.split(rest, comments=True))  # ends the test where an option or a choice is wrong


@each_readme
def test_every_link_and_picture_of_a_readme_is_there(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not target.startswith("https://"):
            file, _, heading = target.partition("#")
            there = (path.parent / file).resolve() if file else path
            assert there.exists(), target
            if heading:
                titles = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
                assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_every_folder_of_the_tree_is_there_and_named() -> None:
    tree = next(text for text in blocks(readme.README, "text") if text.startswith("chatterbox_lab/"))
    inside = set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))
    packages = {file.parent.name for file in (REPOSITORY / "chatterbox_lab").glob("*/__init__.py")}
    assert inside == packages
    assert all((REPOSITORY / folder).is_dir() for folder in re.findall(r"^(\w+)/", tree, re.MULTILINE))


@each_readme
def test_a_readme_is_finished(path: Path) -> None:
    assert not re.findall(r"TIME_\w+|TODO|FIXME|XXX", path.read_text())


def test_every_record_has_a_line_in_the_table_of_records() -> None:
    named = re.findall(r"^\| (`[^|]+) \|", (REPOSITORY / "data" / "README.md").read_text(), re.MULTILINE)
    kinds = {name.removesuffix("_*") for names in named for name in re.findall(r"`(\w+(?:_\*)?)`", names)}
    for file in (REPOSITORY / "data").glob("*.csv"):
        assert file.stem in kinds or file.stem.split("_")[0] in kinds | {f"{n:02}" for n in range(100)}, file.name


@pytest.mark.parametrize("path", readme.TABLES, ids=place)
def test_the_tables_of_a_readme_are_the_recorded_ones(path: Path) -> None:
    assert readme.filled(path) == path.read_text()


@pytest.mark.parametrize(("kind", "made"), [("ladder", readme.t3_table), ("prices", readme.s3gen_table)])
def test_one_machine_of_each_kind_has_a_table_and_the_others_a_line(kind: str, made: Any) -> None:
    rows = readme.full_size(kind, leave_out=["dtype"] if kind == "ladder" else [])
    first = rows.groupby("record", sort=False)[["device", "machine"]].first()
    records = first["device"].where(first["device"] != "cpu", first["machine"])  # CPUs differ, GPUs little
    told = made()
    assert told.count("| stock ") == records.nunique()
    for name in records.index[records.duplicated()]:
        assert f"{name}: every `to stock` within " in told
    assert all(name in told for name in records.index)


def test_every_table_names_the_kind_of_cpu() -> None:
    told = [made() for tables in readme.TABLES.values() for made in tables.values()]
    assert all("AMD EPYC with AVX512 and bfloat16, 2 cores" in table for table in told)
    assert not any("AMD EPYC, " in table for table in told)
    new = {"device": "cpu", "cpu_capability": "AVX2", "bfloat16": False}
    assert readme.with_kind(new) == new


def test_what_a_second_machine_says_otherwise_is_told() -> None:
    shown = pd.DataFrame({"to stock": [1.0, 2.0], "same tokens": ["9 of 9", "9 of 9"]}, index=["stock", "graph"])
    other = shown.assign(**{"to stock": [1.0, 2.2], "same tokens": ["9 of 9", "7 of 9"]})
    assert readme._beside("GPU", other, shown) == (
        "GPU: every `to stock` within 10% of these; graph: 7 of 9 tokens the same."
    )


def test_the_lab_voices_card_is_what_its_training_writes(tmp_path: Path) -> None:
    voice = REPOSITORY / "data" / "lab"
    for file in voice.iterdir():
        if file.name != "README.md":
            (tmp_path / file.name).symlink_to(file)
    card.write(tmp_path)
    assert (tmp_path / "README.md").read_text() == (voice / "README.md").read_text()


def test_a_lost_marker_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(readme, "REPOSITORY", tmp_path)
    (tmp_path / "README.md").write_text("no marker here")
    monkeypatch.setitem(readme.TABLES, tmp_path / "README.md", {"result": str})
    with pytest.raises(ValueError, match=r"README.md: the marker <!-- result --> is gone"):
        readme.filled(tmp_path / "README.md")


def test_the_result_compares_upstream_and_ours_in_the_same_rounds() -> None:
    for board in readme.boards().values():
        assert board.index[0] in ("upstream", "its own call")
        assert len(board) >= 2
        assert board["faster"].iloc[0] == "1.0x"
        assert set(board["sound"]) <= set(result.STREAM_STYLES)


def test_the_title_figure_shows_the_recorded_numbers() -> None:
    drawn = (REPOSITORY / "figures" / f"{readme.FIGURE}.svg").read_text()
    for title, board in readme.boards().items():
        assert title.replace("'", "&#39;") in drawn or title in drawn
        for _, row in board.iterrows():
            assert f"RTF {row['RTF']:.2f}, first chunk after {row['first chunk (s)']:.2f} s" in drawn
    assert "AMD EPYC with AVX512 and bfloat16, 2 cores" in drawn


def test_the_title_figure_marks_real_time_and_tells_the_sounds_apart() -> None:
    figure = result.stream_bars(readme.boards())
    for ax, board in zip(figure.axes, readme.boards().values(), strict=True):
        assert [line.get_xdata()[0] for line in ax.lines] == [1]
        assert [bar.get_width() for bar in ax.patches] == list(board["RTF"])
        drawn = {(bar.get_facecolor(), bar.get_hatch()) for bar in ax.patches}
        assert len(drawn) == len(set(board["sound"]))
        assert ax.get_xlim()[1] > board["RTF"].max()
    plt.close(figure)
