"""What the released package needs around it before it can be imported; every room that imports it imports this first.

Importing ``chatterbox_lab`` alone does none of this.
"""

from __future__ import annotations

import sys
import warnings
from importlib.util import find_spec
from types import ModuleType

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
