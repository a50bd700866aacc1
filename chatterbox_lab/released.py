"""What the released package needs around it before it can be imported; every room that imports it imports this first.

Importing ``chatterbox_lab`` alone does none of this.
"""

from __future__ import annotations

import logging
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
    r"PySoundFile failed. Trying audioread instead",  # librosa 0.10, for what ffmpeg decodes
    r"librosa.core.audio.__audioread_load",
):
    warnings.filterwarnings("ignore", message=_text)

# Upstream's line for every recording that is no multiple of 40 ms, about which nothing needs to be done.
logging.getLogger().addFilter(lambda record: "Reference mel length is not equal" not in str(record.msg))

if "perth" not in sys.modules and find_spec("perth") is None:
    # Upstream imports its watermarker unasked. None is what perth itself offers when a part of it is missing.
    sys.modules["perth"] = ModuleType("perth", "Stands in for resemble-perth, which is not installed.")
    sys.modules["perth"].PerthImplicitWatermarker = None
