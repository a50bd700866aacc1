from __future__ import annotations

from typing import Any

import pytest
import torch

import chatterbox_lab as lab


def lively(tts: Any) -> Any:
    """The model with weights so large that text, language and guidance show in what it says."""
    with torch.no_grad():
        for weight in (weight for weight in tts.t3.tfmr.parameters() if weight.ndim == 2):
            weight.mul_(5)
        tts.t3.text_emb.weight.mul_(5)
    return tts


@pytest.fixture(scope="session")
def english() -> Any:
    return lively(lab.load("tiny", device="cpu", seed=0))


@pytest.fixture(scope="session")
def multilingual() -> Any:
    return lively(lab.load("tiny", variant="multilingual", device="cpu", seed=0))


@pytest.fixture(scope="session")
def turbo() -> Any:
    return lively(lab.load("tiny", variant="turbo", device="cpu", seed=0))


@pytest.fixture(scope="session")
def nano() -> Any:
    return lively(lab.load("tiny", variant="nano", device="cpu", seed=0))
