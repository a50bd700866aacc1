"""The laws of the house: which room may use which, how large each may grow, what an import may change."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatterbox_lab.files import REPOSITORY

PACKAGE = REPOSITORY / "chatterbox_lab"
GROUND = ("files", "released", "host", "cpu", "kept", "recordings")
FLOORS = (GROUND, ("engine", "voices"), ("speech",), ("study",), ("show", "training"))
"""From the ground up. A room uses those below it; rooms on one floor do not know each other."""
FACE = ("__init__", "__main__")
"""They use every room, and nothing uses them."""


def modules() -> dict[str, Path]:
    """Every module of the package by its name, without ``chatterbox_lab.`` in front."""
    names = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


MODULES = modules()


def imported(name: str, *, typing_too: bool = False) -> set[str]:
    """What a module imports: own modules by their short name, others by their full one, with a dot in front."""
    file = MODULES[name]
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in nodes(ast.parse(file.read_text()), typing_too):
        if isinstance(node, ast.Import):
            found |= {f".{item.name}" for item in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            path = ".".join([*base, *([node.module] if node.module else [])])
            whole = [f"{path}.{item.name}".strip(".") for item in node.names]
            own = node.level > 0 or (node.module or "").split(".")[0] == "chatterbox_lab"
            whole = [item.removeprefix("chatterbox_lab.") for item in whole]
            found |= {nearest(item) for item in whole} if own else {f".{path}"}
    return found


def nodes(tree: ast.AST, typing_too: bool) -> Iterator[ast.AST]:
    """All nodes, without what stands under ``if TYPE_CHECKING`` unless it is wanted."""
    for node in ast.iter_child_nodes(tree):
        hidden = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        if not hidden or typing_too:
            yield node
            yield from nodes(node, typing_too)


def nearest(name: str) -> str:
    """The module of this name, or the one in which it is defined."""
    while name not in MODULES and "." in name:
        name = name.rpartition(".")[0]
    return name if name in MODULES else "__init__"


def room(name: str) -> str:
    return name.split(".")[0]


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(name) in rooms)


INSIDE = [name for name in MODULES if room(name) not in FACE]


def test_every_module_is_in_a_room() -> None:
    assert {room(name) for name in INSIDE} <= {name for rooms in FLOORS for name in rooms}


@pytest.mark.parametrize("name", INSIDE)
def test_imports_go_down(name: str) -> None:
    for other in imported(name, typing_too=True):
        if other.startswith("."):
            continue
        assert room(other) not in FACE, f"{name} imports the face of the package: {other}"
        same = room(other) == room(name)
        ground = room(name) in GROUND and room(other) in GROUND
        assert same or ground or floor(other) < floor(name), f"{name} imports {other}"


def test_no_module_needs_itself_to_be_imported() -> None:
    uses = {name: {other for other in imported(name) if other in MODULES and other != name} for name in INSIDE}
    while uses:
        free = [name for name, others in uses.items() if not others & uses.keys()]
        assert free, f"a circle among {', '.join(sorted(uses))}"
        for name in free:
            del uses[name]


FORBIDDEN = ("pandas", "matplotlib", "ipywidgets", "IPython", "huggingface_hub", "soundfile")


def test_the_engine_needs_no_instruments() -> None:
    for name in (name for name in INSIDE if room(name) == "engine"):
        used = {other.split(".")[1] for other in imported(name) if other.startswith(".")}
        assert not used & set(FORBIDDEN), name


def code_lines(file: Path) -> set[int]:
    """Numbers of the lines that hold code: no docstrings, comments or blanks."""
    text = file.read_text()
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in ignored]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    texts = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    return lines - {line for node in texts for line in range(node.lineno, node.end_lineno + 1)}


def test_the_engine_stays_small() -> None:
    sizes = {name: len(code_lines(MODULES[name])) for name in INSIDE if room(name) == "engine"}
    assert sum(sizes.values()) <= 2750  # with all variants, the vocoder by plain operations, the guard and word times
    assert max(sizes.values()) <= 220, max(sizes, key=sizes.get)


@pytest.mark.parametrize("name", [name for name in INSIDE if room(name) in ("study", "show")])
def test_instruments_are_of_a_size_to_be_read(name: str) -> None:
    lines = code_lines(MODULES[name])
    assert len(lines) <= 300
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ClassDef):
            assert len(lines & set(range(node.lineno, node.end_lineno + 1))) <= 150, node.name


LOOK = """
import os, sys, warnings
filters, environment, before = list(warnings.filters), dict(os.environ), dict(sys.modules)
import chatterbox_lab
assert warnings.filters == filters, "warning filters"
assert dict(os.environ) == environment, "environment"
new = {name for name in sys.modules if sys.modules[name] is not before.get(name)}
others = {name.split(".")[0] for name in new} - set(sys.stdlib_module_names) - {"chatterbox_lab"}
assert not others, others
"""


def test_importing_the_package_changes_nothing() -> None:
    clean = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, cwd=REPOSITORY, env=clean)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_and_known_to_editors() -> None:
    import chatterbox_lab as lab

    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    guarded = [node for node in tree.body if isinstance(node, ast.If)]
    known = {item.name for block in guarded for node in block.body for item in node.names}
    assert known == set(lab.__all__) == set(dir(lab))
    assert all(getattr(lab, name) is not None for name in lab.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lab.nothing


def folders(root: Path) -> set[str]:
    return {str(file.parent.relative_to(root)) for file in root.rglob("*.py")}


def test_the_tests_mirror_the_package() -> None:
    tests, rooms = folders(REPOSITORY / "tests"), folders(PACKAGE)
    assert tests - {"living", "living/inner"} <= rooms  # other releases, in processes of their own
    assert {name for name in rooms if "/" not in name} <= tests
