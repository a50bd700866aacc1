"""Other releases of Chatterbox, each in a process of its own that imports it: `inner` is what is tested there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from chatterbox_lab.files import REPOSITORY
from chatterbox_lab.study.overlays import OVERLAYS, environment

INNER = Path(__file__).parent / "inner"


@pytest.mark.parametrize("part", sorted(file.stem for file in INNER.glob("living_*.py")))
@pytest.mark.parametrize("name", OVERLAYS)
def test_a_release_streams(name: str, part: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "--timeout=800", str(INNER / f"{part}.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment(name))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
