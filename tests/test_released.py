"""Which Chatterbox is imported, by what is on the disk: real folders, real importlib.metadata."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import chatterbox
import pytest

from chatterbox_lab.files import REPOSITORY, NotInstalledError
from chatterbox_lab.released import Release, release

Place = Callable[..., Path]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Makes a folder with distributions as pip leaves them, and has Python look there before anywhere else."""
    monkeypatch.delitem(sys.modules, "chatterbox", raising=False)  # else its own place is asked, not sys.path

    def make(folder: str, *installed: str, record: bool = True, package: bool = True) -> Path:
        path = tmp_path / folder
        (path / "chatterbox").mkdir(parents=True)
        for name in ("__init__.py", "tts.py") if package else ():
            (path / "chatterbox" / name).touch()
        for one in installed:
            name, version = one.split("==")
            beside = path / f"{name.replace('-', '_')}-{version}.dist-info"
            beside.mkdir()
            (beside / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            (beside / "top_level.txt").write_text("chatterbox\n")
            if record:
                files = ["chatterbox/__init__.py,sha256=x,0", "chatterbox/tts.py,sha256=x,0", f"{beside.name}/RECORD,,"]
                (beside / "RECORD").write_text("\n".join(files))
        monkeypatch.syspath_prepend(path)
        return path

    return make


def test_here_it_is_the_one_of_the_constraints() -> None:
    assert release() == Release("chatterbox-streaming", "0.1.2")
    assert str(release()) == "chatterbox-streaming 0.1.2"


@pytest.mark.parametrize("record", [True, False])
def test_an_overlay_wins_over_what_is_installed_and_is_no_conflict(place: Place, record: bool) -> None:
    place("first", "chatterbox-streaming==0.1.2", record=record)
    place("overlay", "Chatterbox_TTS==0.1.7", record=record)
    assert release() == Release("chatterbox-tts", "0.1.7")


def test_what_is_imported_counts_not_what_would_be(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place("overlay", "chatterbox-tts==0.1.7")
    monkeypatch.setitem(sys.modules, "chatterbox", chatterbox)
    assert release() == Release("chatterbox-streaming", "0.1.2")


def test_two_in_one_folder_are_named_with_the_repair(place: Place) -> None:
    folder = place("both", "chatterbox-tts==0.1.7", "chatterbox-streaming==0.1.2")
    with pytest.raises(RuntimeError) as raised:
        release()
    said = str(raised.value)
    assert f"chatterbox-streaming 0.1.2 and chatterbox-tts 0.1.7 share the folder {folder / 'chatterbox'}" in said
    assert "pip uninstall -y chatterbox-streaming chatterbox-tts" in said


def test_a_source_tree_belongs_to_its_editable_installation(place: Place) -> None:
    source = place("clone/src")
    with pytest.raises(LookupError, match="belongs to no installed distribution"):
        release()
    beside = place("site", "chatterbox-tts==0.1.8.dev0", package=False) / "chatterbox_tts-0.1.8.dev0.dist-info"
    origin = {"url": source.parent.as_uri(), "dir_info": {"editable": True}}
    (beside / "direct_url.json").write_text(json.dumps(origin))
    assert release() == Release("chatterbox-tts", "0.1.8.dev0")


def test_files_lost_with_another_chatterbox_are_said_to_be(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place("site", "chatterbox-streaming==0.1.2", package=False)
    monkeypatch.setattr(sys, "path", [str(folder)])
    with pytest.raises(NotInstalledError, match="its files are gone") as raised:
        release()
    assert "pip install --force-reinstall --no-deps chatterbox-streaming==0.1.2" in str(raised.value)


def run_bare(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with the package and without anything that is installed."""
    bare = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, "-S", *command], capture_output=True, text=True, cwd=folder, env=bare)


USES = ("lab.load('tiny')", "lab.generate", "lab.StreamSettings", "lab.forget", "from chatterbox_lab.study import logs")


@pytest.mark.parametrize("use", USES)
def test_the_first_use_without_a_chatterbox_says_how_to_get_one(use: str, tmp_path: Path) -> None:
    last = run_bare(tmp_path, "-c", f"import chatterbox_lab as lab\n{use}").stderr.splitlines()[-1]
    assert last.startswith("chatterbox_lab.files.NotInstalledError: no Chatterbox is installed")
    assert 'pip install "chatterbox-lab[streaming]" (or [tts] or [light])' in last


def test_without_a_chatterbox_the_commands_are_listed_and_each_says_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "chatterbox").mkdir()  # a folder of this name, such as the application's own, is none
    listed = run_bare(tmp_path, "-m", "chatterbox_lab", "--help")
    assert "say a text" in listed.stdout, listed.stderr
    refused = run_bare(tmp_path, "-m", "chatterbox_lab", "speak", "Hi.")
    assert refused.returncode == 2
    assert "error: no Chatterbox is installed" in refused.stderr
    assert "Traceback" not in refused.stderr
