from __future__ import annotations

import logging
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT
from torch._dynamo.utils import counters

import chatterbox_lab as lab
from chatterbox_lab import kept
from chatterbox_lab.engine.t3 import compiled


@pytest.fixture
def afresh() -> Iterator[None]:
    kept._kept.clear()
    torch._dynamo.reset()
    counters.clear()
    yield
    kept._kept.clear()
    torch._dynamo.reset()


@pytest.mark.skipif(
    shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="nothing can be compiled here: g++ or Python's headers are missing",
)
def test_one_compilation_serves_every_layer_length_text_and_call(tts: Any, afresh: None) -> None:
    for text, mode, tokens in ((TEXT, "off", 30), ("No.", "probe", 12), (TEXT * 3, "off", 12)):
        for seed in (0,) if mode == "off" else (0, 1):
            fixed = {"seed": seed, "max_new_tokens": tokens, "ignore_eos": True}
            said = lab.speech_tokens(tts, text, backend="compile", analyzer=mode, **fixed)
            assert torch.equal(said, lab.upstream_tokens(tts, text, **fixed))
    assert counters["stats"]["unique_graphs"] == 2  # before attention, and after it
    assert kept.kept(tts.t3.tfmr, "compiled", compiled.Compilation).works


def test_without_a_compiler_one_line_says_so_and_the_plain_step_runs(
    tts: Any, afresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    fixed = {"seed": 0, "max_new_tokens": 5, "ignore_eos": True}
    with caplog.at_level(logging.WARNING, "chatterbox_lab"):
        said = [lab.speech_tokens(tts, TEXT, backend="compile", **fixed) for _ in range(2)]
    assert torch.equal(said[0], lab.speech_tokens(tts, TEXT, backend="static", **fixed))
    assert torch.equal(*said)
    ours = [record.getMessage() for record in caplog.records if record.name == "chatterbox_lab"]
    assert len(ours) == 1
    assert ours[0].startswith("backend='compile': not possible here, the plain step runs instead")


def test_a_step_that_cannot_be_compiled_later_runs_as_it_is(
    tts: Any, afresh: None, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("recompile limit reached")

    made = kept.kept(tts.t3.tfmr, "compiled", compiled.Compilation)
    made.functions = {"enter": compiled.enter, "leave": broken}
    fixed = {"seed": 0, "max_new_tokens": 5, "ignore_eos": True}
    with torch.inference_mode(), caplog.at_level(logging.WARNING, "chatterbox_lab"):
        said = lab.speech_tokens(tts, TEXT, backend="compile", **fixed)
    assert torch.equal(said, lab.speech_tokens(tts, TEXT, backend="static", **fixed))
    assert "recompile limit reached" in caplog.text
