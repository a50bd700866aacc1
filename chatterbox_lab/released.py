"""What the released package needs around it before it can be imported; every room that imports it imports this first.

Importing ``chatterbox_lab`` alone does none of this. Without a Chatterbox, importing this raises `NotInstalledError`.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, distributions
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit
from urllib.request import url2pathname

from .files import NotInstalledError

DISTRIBUTIONS = ("chatterbox-streaming", "chatterbox-tts", "chatterbox-light")
"""Who release a package that is imported as ``chatterbox``."""


@dataclass(frozen=True)
class Release:
    """The installed distribution that a package comes from: its name as pip spells it, and its version."""

    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


def release() -> Release:
    """Which Chatterbox is imported here: of several on ``sys.path`` the first, as for Python.

    Raises:
        NotInstalledError: there is none.
        RuntimeError: two distributions were installed into one folder, the later over files of the earlier.
        LookupError: no installed distribution has it, as with a checkout that is on ``sys.path`` by itself.
    """
    return _owner(folder())


def folder() -> Path:
    """The folder of the ``chatterbox`` that is imported, or would be. Raises `NotInstalledError` without one."""
    spec = find_spec("chatterbox")
    found = Path(spec.origin).absolute().parent if spec and spec.origin else None
    if found is not None and (found / "tts.py").is_file():  # else it is a namesake
        return found
    text = 'no Chatterbox is installed, this needs one: pip install "chatterbox-lab[streaming]" (or [tts] or [light])'
    installed = (_release(one) for one in distributions() if found is None and _has(one))
    if gone := [one for one in installed if one.distribution in DISTRIBUTIONS]:
        again = f"pip install --force-reinstall --no-deps {gone[0].distribution}=={gone[0].version}"
        text = f"{gone[0]} is installed, but its files are gone, perhaps with another Chatterbox: {again}"
    raise NotInstalledError(text, name="chatterbox")


@cache
def _owner(package: Path) -> Release:
    owners = sorted({_release(one) for one in distributions(path=[str(package.parent)]) if _has(one)}, key=str)
    owners = owners or [_release(one) for one in distributions() if _edited(one, package)]
    if not owners:
        raise LookupError(f"{package} belongs to no installed distribution: install what it came with by pip")
    if len(owners) > 1:
        names = sorted({owner.distribution for owner in owners})
        raise RuntimeError(
            f"{' and '.join(map(str, owners))} share the folder {package}, where one has overwritten files of the "
            f"other. To repair: pip uninstall -y {' '.join(names)} (where pip's --target made {package.parent.name!r}: "
            f"delete it), then pip install the one that is wanted"
        )
    return owners[0]


def _release(one: Distribution) -> Release:
    return Release(re.sub(r"[-_.]+", "-", one.metadata["Name"] or "").lower(), one.version)


def _has(one: Distribution) -> bool:
    """Whether a distribution has files in a folder ``chatterbox`` beside its own metadata."""
    record = one.read_text("RECORD")  # unparsed: some list ten thousand files
    if record is None:
        return "chatterbox" in (one.read_text("top_level.txt") or "").split()
    return re.search(r'^"?chatterbox/', record, re.MULTILINE) is not None


def _edited(one: Distribution, package: Path) -> bool:
    """Whether a package lies in the source tree of an editable installation."""
    origin = json.loads(one.read_text("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        return False
    return Path(url2pathname(urlsplit(origin["url"]).path)).resolve() in package.resolve().parents


folder()

# Warnings of the pinned stack that its users can do nothing about; each is filtered by its own text.
for _text in (
    r"pkg_resources is deprecated",  # librosa 0.10, perth
    r"Deprecated call to `pkg_resources",
    r"`torch.backends.cuda.sdp_kernel\(\)` is deprecated",  # T3's Perceiver, on every call
    r"`LoRACompatibleLinear` is deprecated",  # diffusers 0.29, when S3Gen's U-Net is built
    r"'(aifc|audioop|sunau)' is deprecated",  # audioread, which librosa 0.10 falls back to
):
    warnings.filterwarnings("ignore", message=_text)

if "perth" not in sys.modules and find_spec("perth") is None:
    # Upstream imports its watermarker unasked. None is what perth itself offers when a part of it is missing.
    sys.modules["perth"] = ModuleType("perth", "Stands in for resemble-perth, which is not installed.")
    sys.modules["perth"].PerthImplicitWatermarker = None
