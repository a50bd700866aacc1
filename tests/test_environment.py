"""The dependency files: they agree, and pin the stack on which the problem was reported."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from chatterbox_lab.files import EXTRAS, REPOSITORY
from chatterbox_lab.released import DISTRIBUTIONS


def constraints() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().split()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+", line) for line in lines)
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def needed(*extras: str) -> dict[str, Requirement]:
    """What the package asks for with these extras, by name; an extra may include others."""
    texts = list(project()["project"]["dependencies"])
    for extra in extras:
        texts += project()["project"]["optional-dependencies"][extra]
    found = {canonicalize_name(one.name): one for one in map(Requirement, texts)}
    own = found.pop("chatterbox-lab", None)
    return found | needed(*own.extras) if own else found


def test_the_three_dependency_files_agree() -> None:
    pinned = constraints()
    wanted = needed("streaming", "notebooks", "test")
    assert wanted.keys() >= needed("train").keys()  # what the tests run is installed with them
    for name, requirement in wanted.items():
        assert pinned[name] in requirement.specifier, name
    conda = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    whole = "-e .[streaming,notebooks,test]"
    assert conda["dependencies"] == ["python=3.11", "pip", {"pip": ["-c constraints.txt", whole]}]
    assert (REPOSITORY / "Makefile").read_text().count(whole.replace(".[", "'.[")) == 2  # by uv, by pip
    assert "3.11" in Requirement(f"python{project()['project']['requires-python']}").specifier


def test_beside_a_chatterbox_the_package_asks_for_little_and_pins_nothing() -> None:
    base = needed()
    assert len(base) <= 5
    assert not any(one.specifier for one in base.values())
    assert not base.keys() & {*DISTRIBUTIONS, "torch", "transformers", "numpy"}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_chatterbox_is_an_extra_and_no_other_extra_brings_one(name: str) -> None:
    extras = project()["project"]["optional-dependencies"]
    assert [extra for extra in extras if name in needed(extra)] == [name.removeprefix("chatterbox-")]


@pytest.mark.parametrize("name", EXTRAS)
def test_a_missing_package_is_told_by_the_extra_that_brings_it(name: str) -> None:
    theirs = {canonicalize_name(one) for one in packages_distributions()[name]}
    metadata = {one: distribution(one) for one in needed(EXTRAS[name])}
    beneath = {canonicalize_name(Requirement(text).name) for one in metadata.values() for text in one.requires or ()}
    assert theirs & (metadata.keys() | beneath)


def test_every_import_beyond_the_base_is_in_an_extra() -> None:
    base = {canonicalize_name(name) for name in ("numpy", "torch", "torchaudio", "transformers", "tokenizers")}
    base |= needed().keys() | {"chatterbox-streaming", "chatterbox-lab", "librosa", "audioread", "s3tokenizer"}
    base |= {"pillow"}  # diffusers needs it
    owners = packages_distributions()
    for file in (REPOSITORY / "chatterbox_lab").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - EXTRAS.keys():
                assert {canonicalize_name(owner) for owner in owners[name]} & base or name == "perth", (file.name, name)


def test_the_constraints_are_those_of_the_problem() -> None:
    pinned = constraints()
    wanted = {"chatterbox-streaming": "0.1.2", "torch": "2.6.0", "transformers": "4.46.3"}
    assert {name: pinned[name] for name in wanted} == wanted


def test_every_package_is_installed() -> None:
    package = REPOSITORY / "chatterbox_lab"
    folders = {str(file.parent.relative_to(REPOSITORY)).replace("/", ".") for file in package.rglob("*.py")}
    setuptools = project()["tool"]["setuptools"]
    assert set(setuptools["packages"]) - setuptools["package-dir"].keys() == folders
