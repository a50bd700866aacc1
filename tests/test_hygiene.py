"""What is in git: light enough to travel, and free of any one machine's paths."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from chatterbox_lab.files import REPOSITORY

BINARY = (".png", ".flac", ".safetensors", ".pt")


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "-C", str(REPOSITORY), "ls-files"], capture_output=True, text=True, check=True)
    return [file for name in listed.stdout.splitlines() if (file := REPOSITORY / name).exists()]


def test_the_repository_stays_light() -> None:
    sizes = {file: file.stat().st_size for file in tracked()}
    assert sum(sizes.values()) <= 39 * 2**20
    assert max(sizes.values()) <= 20 * 2**20


def test_no_file_knows_one_machine_or_a_registry() -> None:
    place = re.compile(r"(?<![\w.])/" + r"(?:work|root|home)/|py" + r"pi\.org|python" + r"hosted|npm" + r"js\.org")
    for file in tracked():
        assert file.suffix in BINARY or not place.search(file.read_text()), file.name
