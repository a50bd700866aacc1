from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from chatterbox_lab.voices import build
from chatterbox_lab.voices import load as models

settings.register_profile("lab", database=None, deadline=None, derandomize=True)  # the same examples everywhere
settings.load_profile("lab")

TEXT = "Hello there, this is a test."


def trace(tts: build.LabTTS) -> list[object]:
    """What is patched on the model: forwards and hooks of every layer, and the object's own attributes."""
    layers = [layer.self_attn for layer in tts.t3.tfmr.layers]
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in (*layers, tts.t3.speech_head)]
    owners = (tts, tts.watermarker, tts.s3gen, tts.t3, *layers)
    functions = [{name: value for name, value in vars(owner).items() if callable(value)} for owner in owners]
    voice = [(name, id(value)) for name, value in vars(tts.conds.t3).items()]
    return [type(tts), hooks, functions, voice, id(tts.conds.t3), tts.t3.compiled, list(tts.t3._modules)]


@pytest.fixture(scope="session")
def voice() -> build.LabTTS:
    """The tiny model, built once; its voice prompt is cut short to make S3Gen quick."""
    tts = models.load("tiny", device="cpu", seed=0)
    gen = tts.conds.gen
    gen.update(prompt_token=gen["prompt_token"][:, :10], prompt_feat=gen["prompt_feat"][:, :20])
    gen["prompt_token_len"] = torch.tensor([10])
    return tts


@pytest.fixture
def tts(voice: build.LabTTS) -> Iterator[build.LabTTS]:
    """The shared model; the test fails if it leaves anything behind on it."""
    before, conds = trace(voice), voice.conds
    yield voice
    voice.conds = conds
    assert trace(voice) == before


@pytest.fixture
def one_thread_each() -> Iterator[None]:
    """A share of one is one, too: with more, sums are cut elsewhere in an overlapped stage, and round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
