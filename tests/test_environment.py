"""The dependency files: they agree, and pin the stack on which the problem was reported."""

from __future__ import annotations

import re
import tomllib

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages

from chatterbox_lab.files import REPOSITORY


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
    package = REPOSITORY / "chatterbox_lab"
    folders = {str(file.parent.relative_to(REPOSITORY)).replace("/", ".") for file in package.rglob("*.py")}
    assert set(find_packages(str(REPOSITORY), include=["chatterbox_lab*"])) == folders
