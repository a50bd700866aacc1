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

from chatterbox_lab.study.records import REPOSITORY

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
    "quality",
    "trials",
    "figures",
    "player",
    "explorer",
]
# The recipe of the lab voice is beside all that: it may use the package, and nothing of the package uses it.
TRAINING = ["phones", "text", "corpus", "tokens", "loop", "t3", "flow", "vocoder", "voice", "evaluate", "card"]
TRAINING += ["__main__"]
PACKAGE = REPOSITORY / "chatterbox_lab"


def constraints() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().split()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+", line) for line in lines)
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_the_three_dependency_files_agree() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pinned = constraints()
    extras = project["optional-dependencies"]
    assert set(extras["train"]) <= set(extras["test"])  # what the tests run is installed with them
    for text in (*project["dependencies"], *extras["test"]):
        requirement = Requirement(text)
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, text
    conda = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    assert conda["dependencies"] == ["python=3.11", "pip", {"pip": ["-c constraints.txt", "-e .[test]"]}]
    assert "3.11" in Requirement(f"python{project['requires-python']}").specifier


def test_the_constraints_are_those_of_the_problem() -> None:
    pinned = constraints()
    wanted = {"chatterbox-streaming": "0.1.2", "torch": "2.6.0", "transformers": "4.46.3"}
    assert {name: pinned[name] for name in wanted} == wanted


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {file.parent.relative_to(REPOSITORY) for file in PACKAGE.rglob("*.py")}
    assert sorted(listed) == sorted(".".join(folder.parts) for folder in folders)


def imported(file: Path, level: int) -> set[str]:
    """Modules that a file imports with so many leading dots."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    nodes = [node for node in nodes if node.level == level]
    return {name for node in nodes for name in ([node.module] if node.module else [item.name for item in node.names])}


def modules(folder: Path) -> dict[str, Path]:
    return {file.stem: file for file in folder.glob("*.py") if file.stem != "__init__"}


@pytest.mark.parametrize(("folder", "order"), [(PACKAGE, ORDER), (PACKAGE / "training", TRAINING)])
def test_modules_import_only_from_those_above_them(folder: Path, order: list[str]) -> None:
    files = modules(folder)
    assert sorted(files) == sorted(order)
    for name, file in files.items():
        assert imported(file, 1) <= set(order[: order.index(name)]), name


def test_training_uses_the_package_and_is_used_by_nothing() -> None:
    used = {name for file in modules(PACKAGE / "training").values() for name in imported(file, 2)}
    assert {"models", "files"} <= used <= set(ORDER)
    for file in PACKAGE.glob("*.py"):
        names = imported(file, 0) | imported(file, 1)
        assert not any("training" in name for name in names), file.name


def code_lines(file: Path) -> int:
    """Lines that hold code: no docstrings, comments or blanks."""
    text = file.read_text()
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in ignored]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    texts = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    return len(lines - {line for node in texts for line in range(node.lineno, node.end_lineno + 1)})


def test_the_package_stays_small() -> None:
    lines = {file: code_lines(file) for file in PACKAGE.rglob("*.py")}
    application = ORDER[: ORDER.index("stream") + 1]
    assert sum(lines[PACKAGE / f"{name}.py"] for name in application) < 2500  # what an application runs
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
    monkeypatch.setattr("chatterbox_lab.voices.load.load", lambda *_, **__: tts)
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
