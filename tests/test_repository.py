"""The repository as a whole: dependency files, layout, README."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from chatterbox_lab.records import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "notebooks"))
import readme

# The order in which data passes through the package; a module imports only from those above it.
ORDER = [
    "pacing",
    "settings",
    "patching",
    "files",
    "measure",
    "pipeline",
    "models",
    "attention",
    "alignment",
    "sampling",
    "linears",
    "static",
    "compiled",
    "graph",
    "decode",
    "encoder",
    "unet",
    "flow",
    "vocoder",
    "render",
    "stream",
]
ORDER += [
    "records",
    "upstream",
    "profiler",
    "ladder",
    "prices",
    "bench",
    "sweep",
    "advice",
    "figures",
    "player",
    "explorer",
]


def constraints() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().split()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+", line) for line in lines)
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_the_three_dependency_files_agree() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pinned = constraints()
    for text in (*project["dependencies"], *project["optional-dependencies"]["test"]):
        requirement = Requirement(text)
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, text
    conda = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    assert conda["dependencies"] == ["python=3.11", "pip", {"pip": ["-c constraints.txt", "-e .[test]"]}]
    assert "3.11" in Requirement(f"python{project['requires-python']}").specifier


def test_the_constraints_are_those_of_the_problem() -> None:
    pinned = constraints()
    wanted = {"chatterbox-streaming": "0.1.2", "torch": "2.6.0", "transformers": "4.46.3"}
    assert {name: pinned[name] for name in wanted} == wanted


def test_modules_import_only_from_those_above_them() -> None:
    files = {file.stem: file for file in (REPOSITORY / "chatterbox_lab").glob("*.py") if file.stem != "__init__"}
    assert sorted(files) == sorted(ORDER)
    for name, file in files.items():
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        used = {node.module for node in nodes if node.level == 1}
        assert used <= set(ORDER[: ORDER.index(name)]), name


def code_lines(file: Path) -> int:
    """Lines that hold code: no docstrings, comments or blanks."""
    text = file.read_text()
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in ignored]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    texts = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    return len(lines - {line for node in texts for line in range(node.lineno, node.end_lineno + 1)})


def test_the_package_stays_small() -> None:
    lines = {file.stem: code_lines(file) for file in (REPOSITORY / "chatterbox_lab").glob("*.py")}
    assert sum(lines[name] for name in ORDER[: ORDER.index("stream") + 1]) < 2500  # what an application runs
    assert max(lines.values()) < 400  # its instruments are beside it, each of a size to be read


def test_the_repository_stays_light_and_knows_no_machine() -> None:
    listed = subprocess.run(["git", "-C", str(REPOSITORY), "ls-files"], capture_output=True, text=True, check=True)
    files = [REPOSITORY / name for name in listed.stdout.splitlines()]
    sizes = [file.stat().st_size for file in files if file.exists()]
    assert sum(sizes) < 60 * 2**20
    assert all(size < 20 * 2**20 for size in sizes)
    place = re.compile(r"(?<![\w.])/" + r"(?:work|root|home)/|py" + r"pi\.org|python" + r"hosted")
    for file in files:
        if file.suffix not in (".png", ".safetensors", ".pt") and file.exists():
            assert not place.search(file.read_text()), file.name


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)


def test_every_python_example_of_the_readme_runs(
    tts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("chatterbox_lab.models.load", lambda *_, **__: tts)
    scope: dict[str, Any] = {}
    examples = blocks("python")
    assert len(examples) >= 3
    try:
        for example in examples:
            exec(example, scope)
    finally:
        tts.generate_stream.__self__.undo()  # the first example leaves its patch in place, as it says
    assert "RTF" in capsys.readouterr().out


def test_every_command_of_the_readme_is_a_target() -> None:
    targets = re.findall(r"^([a-z.]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    text = (REPOSITORY / "README.md").read_text()
    commands = re.findall(r"(?:`|^)make ([a-z.]+)", text, re.MULTILINE)
    assert {"run", "test", "lab"} <= set(commands) <= set(targets)


def test_the_readme_is_finished() -> None:
    assert not re.findall(r"TIME_\w+|TODO|FIXME", readme.README.read_text())


def test_the_readmes_table_is_the_recorded_one() -> None:
    text = readme.README.read_text()
    assert readme.filled(text) == text
