"""Other releases of Chatterbox beside the environment's own: each in a folder that ``PYTHONPATH`` puts first.

They are a megabyte or two each (transformers 20): the classes of a release without torch and all else, which the
environment has. Its own packages stay as they are.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..files import REPOSITORY
from .releases import installed

OVERLAYS = {
    "tts": ("chatterbox-tts==0.1.7", "pyloudnorm==0.2.0"),
    "tts-own": (
        *("chatterbox-tts==0.1.7", "pyloudnorm==0.2.0", "transformers==5.2.0", "tokenizers==0.22.2"),
        *("huggingface_hub==1.3.7", "safetensors==0.5.3"),
    ),
    "light": ("chatterbox-light==1.0.2", "pyloudnorm==0.2.0"),
}
"""By name: the official release on the environment's transformers and on the one that it pins itself, and its kin."""
CACHE = REPOSITORY / "build" / "living"


def environment(name: str, cache: Path = CACHE) -> dict[str, str]:
    """The variables of a process that imports this overlay, which is installed first if it is not there yet.

    What ``PYTHONPATH`` names already comes after it.

    Raises:
        RuntimeError: it cannot be installed, with the last line of the complaint.
    """
    folder = installed(name, OVERLAYS[name], cache)
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join([*(str(part.resolve()) for part in (folder, REPOSITORY)), *filter(None, before)])
    return dict(os.environ, PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1")
