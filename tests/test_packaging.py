"""What a user installs: the wheel has the lab voice and speaks by itself, and speaking needs no instruments."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PathDistribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from chatterbox_lab.files import EXTRAS, REPOSITORY


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder; Python finds this package in the checkout unless told otherwise."""
    found = os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=found)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's wheel, built from a copy: setuptools builds inside the tree, and keeps what it built."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("chatterbox_lab", "data"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    built = run(folder, sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('dist')")
    assert built.returncode == 0, built.stderr
    (found,) = (folder / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has the wheel's files as pip would put them there, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    ZipFile(wheel).extractall(folder)
    assert not list(folder.glob("*.data"))  # which pip would spread over other folders
    return folder


def tracked(*places: str) -> set[str]:
    listed = run(REPOSITORY, "git", "ls-files", *places)
    return {name for name in listed.stdout.splitlines() if (REPOSITORY / name).exists()}


def test_the_wheel_has_the_package_and_what_it_reads_and_stays_small(wheel: Path) -> None:
    names = {name for name in ZipFile(wheel).namelist() if name.startswith("chatterbox_lab/")}
    code = {name for name in tracked("chatterbox_lab") if not name.endswith(".md")}
    data = {f"chatterbox_lab/{name}" for name in tracked("data/lab", "data/*.json", "data/*.txt")}
    assert code | data <= names
    known = re.compile(r"chatterbox_lab/(data/lab/[^/]+|data/\w+\.(json|txt)|(?!data/).+\.(py|js|css))")
    assert not [name for name in names if not known.fullmatch(name)]
    assert wheel.stat().st_size <= 40 * 10**6


def test_the_wheel_asks_for_no_chatterbox_and_offers_three(installed: Path) -> None:
    (metadata,) = map(PathDistribution, installed.glob("*.dist-info"))
    requirements = [Requirement(text) for text in metadata.requires]
    assert not [one for one in requirements if one.marker is None and one.name.startswith("chatterbox")]
    assert {"streaming", "tts", "light", "notebooks", "train", "test"} <= set(
        metadata.metadata.get_all("Provides-Extra")
    )


SPEAK = """
from pathlib import Path
import chatterbox_lab as lab
from chatterbox_lab import __main__, files
assert Path(lab.__file__).is_relative_to({folder!r}), lab.__file__
assert files.LAB_VOICE.is_relative_to({folder!r}), files.LAB_VOICE
print(lab.generate(lab.load("lab"), "Hi.", max_new_tokens=10).shape)
__main__.main(["speak", "Hi.", "-o", "hi.wav", "--most", "0.4"])
"""


def test_the_wheel_speaks_outside_of_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = SPEAK.format(folder=str(installed))
    done = run(tmp_path, sys.executable, "-c", code, PYTHONPATH=str(installed))
    assert re.search(r"^torch.Size\(\[1, \d+\]\)$", done.stdout, re.MULTILINE), done.stderr
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hi.wav").stat().st_size > 1000


HIDDEN = sorted(EXTRAS.keys() - {"joblib", "tqdm"})  # librosa and transformers need these two
BLOCKED = f"import sys; sys.modules |= dict.fromkeys({HIDDEN})\n"


def test_speaking_needs_nothing_of_the_notebooks(tmp_path: Path) -> None:
    code = """
import chatterbox_lab as lab
from chatterbox_lab.__main__ import main
tts = lab.load("tiny", device="cpu")
short = dict(max_new_tokens=2, ignore_eos=True)
list(lab.generate_stream(tts, "Hi.", **short))
lab.generate(tts, "Hi.", **short), lab.speech_tokens(tts, "Hi.", **short), lab.warm_up(tts)
with lab.patch(tts):
    for _ in tts.generate_stream("Hi.", chunk_size=2):  # upstream's signature: neither seed nor limit
        break
lab.tune_torch, lab.upstream_stream
assert main(["speak", "Hi.", "--model", "tiny", "--most", "0.2"]) in (0, 1)  # random weights may say nothing
main(["speak", "--help"])
"""
    done = run(tmp_path, sys.executable, "-c", BLOCKED + code)
    assert "--reference" in done.stdout, done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["streams", "layers", "t3", "s3gen", "sweep", "trials", "measure", "train"])
def test_a_command_that_needs_an_extra_says_so_in_a_line(command: str, tmp_path: Path) -> None:
    code = BLOCKED + f"from chatterbox_lab.__main__ import main\nmain([{command!r}])"
    done = run(tmp_path, sys.executable, "-c", code)
    assert done.returncode == 2
    assert 'pip install "chatterbox-lab[notebooks]"' in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_package_that_a_command_misses_late_is_told_as_well(tmp_path: Path) -> None:
    code = "import sys; sys.modules['wordfreq'] = None\nfrom chatterbox_lab.__main__ import main\n"
    code += f"main(['train', 'text', '--smoke', '--folder', {str(tmp_path)!r}])"
    done = run(tmp_path, sys.executable, "-c", code)
    assert done.returncode == 2
    assert 'pip install "chatterbox-lab[train]"' in done.stderr.splitlines()[-1]


def test_a_public_name_that_needs_an_extra_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, sys.executable, "-c", BLOCKED + "import chatterbox_lab as lab; lab.recommend")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("chatterbox_lab.files.NotInstalledError: ")
    assert 'pip install "chatterbox-lab[notebooks]"' in last
