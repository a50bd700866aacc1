"""A CPU that multiplies bfloat16 and one that emulates it: what each is given, warned of and recommended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import TEXT

import chatterbox_lab as lab
from chatterbox_lab import cpu
from chatterbox_lab.engine.s3gen.flow import FlowPlan
from chatterbox_lab.engine.schedule import Costs
from chatterbox_lab.engine.settings import StreamSettings
from chatterbox_lab.files import REPOSITORY
from chatterbox_lab.study import costs, machine

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ASKED = lab.FAST.replace(flow_dtype="bfloat16")
COSTS = Costs(token=0.007, prefill=0.04, chunk=0.02, window_token=0.0005)
Pretend = Callable[..., list[torch.dtype]]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    """Makes this CPU one that multiplies bfloat16 or emulates it, with products of one dtype slow; returns them."""
    products: list[torch.dtype] = []
    linear = F.linear

    def made(bfloat16: bool, slow: torch.dtype = torch.bfloat16) -> list[torch.dtype]:
        def slowed(states: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
            products.append(states.dtype)
            time.sleep(0.02 * (states.dtype == slow))
            return linear(states, *weight)

        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bfloat16)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16, raising=False)
        monkeypatch.setattr(cpu, "F", type("F", (), {"linear": staticmethod(slowed)}))
        monkeypatch.setattr(cpu, "_warned", set())
        cpu._timed.cache_clear()
        return products

    yield made
    cpu._timed.cache_clear()


def told(make: Callable[[], Any]) -> list[str]:
    """What a call warns of that is about bfloat16."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    return [str(it.message) for it in caught if it.category is UserWarning and "emulates bfloat16" in str(it.message)]


def test_a_cpu_that_emulates_bfloat16_warns_once_of_a_flow_that_asks_for_it(pretend: Pretend) -> None:
    products = pretend(bfloat16=False)
    assert FlowPlan.of(lab.FAST, CPU).dtype == torch.float32
    assert not products
    said = told(lambda: FlowPlan.of(ASKED, CPU))
    assert len(said) == 1
    assert said[0].startswith("flow_dtype='bfloat16': this CPU emulates bfloat16; ")
    assert said[0].endswith("flow_dtype='auto' takes float32 here.")
    assert set(products) == {torch.float32, torch.bfloat16}
    measured = cpu.emulation(CPU)
    for rows, ratio in measured.items():
        assert ratio > 1
        assert f"{ratio:.2g} times as long with {rows} rows" in said[0]
    timed = len(products)
    assert not told(lambda: FlowPlan.of(ASKED, CPU))
    assert cpu.emulation("cpu") == measured
    assert len(products) == timed  # once a process
    assert FlowPlan.of(ASKED, CPU).dtype == torch.bfloat16  # as asked


def test_the_warning_comes_with_a_stream_and_before_its_first_chunk(tts: Any, pretend: Pretend) -> None:
    pretend(bfloat16=False)
    fixed = {"seed": 0, "max_new_tokens": 8, "ignore_eos": True, "chunk_size": 4, "prompt_tokens": 5}
    assert not told(lambda: list(lab.generate_stream(tts, TEXT, lab.FAST, **fixed)))
    assert len(told(lambda: next(lab.generate_stream(tts, TEXT, ASKED, **fixed)))) == 1
    assert not told(lambda: lab.generate(tts, TEXT, ASKED, seed=0, max_new_tokens=4))


def test_a_t3_in_bfloat16_is_warned_of_when_it_is_loaded(pretend: Pretend) -> None:
    pretend(bfloat16=False)

    def load(dtype: str) -> Callable[[], Any]:
        return lambda: lab.load("tiny", device="cpu", dtype=dtype, watermark=False)

    assert not told(load("float32"))
    said = told(load("bfloat16"))
    assert len(said) == 1
    assert said[0].startswith("load(dtype='bfloat16'): this CPU emulates bfloat16; ")
    assert "dtype='float32'" in said[0]
    assert not told(load("bfloat16"))
    assert len(told(lambda: FlowPlan.of(ASKED, CPU))) == 1  # another setting


def test_a_cpu_that_multiplies_bfloat16_gets_it_without_a_word(pretend: Pretend) -> None:
    products = pretend(bfloat16=True)
    assert FlowPlan.of(lab.FAST, CPU).dtype == torch.bfloat16
    assert not told(lambda: FlowPlan.of(ASKED, CPU))
    assert not told(lambda: lab.load("tiny", device="cpu", dtype="bfloat16", watermark=False))
    assert not products


def test_what_costs_nothing_is_not_warned_of(pretend: Pretend) -> None:
    products = pretend(bfloat16=False)
    assert not told(lambda: FlowPlan.of(ASKED, CUDA))
    assert not products
    pretend(bfloat16=False, slow=torch.float32)
    assert not told(lambda: FlowPlan.of(ASKED, CPU))
    assert cpu.emulation(CPU) == {}
    assert set(products) == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize(
    ("bfloat16", "slow", "asked", "given"),
    [
        (False, torch.bfloat16, "bfloat16", "auto"),
        (False, torch.float32, "bfloat16", "bfloat16"),  # emulated, and yet no slower
        (False, torch.bfloat16, "auto", "auto"),
        (False, torch.bfloat16, "float32", "float32"),
        (True, torch.bfloat16, "bfloat16", "bfloat16"),
        (True, torch.bfloat16, "auto", "auto"),
        (True, torch.bfloat16, "float32", "float32"),  # the sound that was asked for
    ],
)
def test_no_recommendation_is_slower_here_than_what_was_asked_for(
    bfloat16: bool, slow: torch.dtype, asked: str, given: str, tts: Any, pretend: Pretend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pretend(bfloat16=bfloat16, slow=slow)
    measured: list[str] = []

    def calibrate(_: Any, settings: StreamSettings, **__: Any) -> costs.Fit:
        measured.append(settings.flow_dtype)
        return costs.Fit(COSTS, pd.DataFrame(), {}, 5)

    monkeypatch.setattr(costs, "calibrate", calibrate)
    monkeypatch.setattr(costs, "token_seconds", lambda *_: {"hf": 0.1, "static": 0.2})
    said = lab.recommend(tts, settings=lab.FAST.replace(flow_dtype=asked))
    assert [said.flow_dtype, *measured] == [given, given]
    assert ("emulates bfloat16" in said.reason) == (given != asked)
    pasted = eval(said.call, {"StreamSettings": StreamSettings, "Costs": Costs})
    assert pasted.flow_dtype == given
    assert said.reason.startswith(f"On {machine.in_words(machine.machine_facts())}: Backend 'hf'")


SPEAK = """
import json, sys, warnings
import torch
import chatterbox_lab as lab
from chatterbox_lab import cpu
from chatterbox_lab.engine.s3gen.flow import FlowPlan
from chatterbox_lab.study import machine

caught = []
warnings.showwarning = lambda message, *_, **__: caught.append(str(message))
fixed = {"seed": 0, "max_new_tokens": 12, "ignore_eos": True, "chunk_size": 4, "prompt_tokens": 10}

def audio(**chosen):
    return torch.cat([it for it, _ in lab.generate_stream(tts, sys.argv[1], lab.FAST, **fixed, **chosen)], dim=1)

tts = lab.load("tiny", device="cpu", watermark=False)
fast = audio()
quiet = not [it for it in caught if "emulates" in it]
audio(flow_dtype="bfloat16")
found = {
    "flow": str(FlowPlan.of(lab.FAST, torch.device("cpu")).dtype),
    "samples": fast.shape[1],
    "as float32": torch.equal(fast, audio(flow_dtype="float32")),
    "tokens": lab.speech_tokens(tts, sys.argv[1], lab.FAST, **fixed).tolist(),
    "upstream": lab.upstream_tokens(tts, sys.argv[1], seed=0, max_new_tokens=12, ignore_eos=True).tolist(),
    "quiet": quiet,
    "warned": [it for it in caught if "emulates" in it],
    "costs": cpu.emulation("cpu"),
    "facts": machine.machine_facts(),
    "words": machine.in_words(machine.machine_facts()),
}
print(json.dumps(found))
"""
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def test_a_cpu_with_avx2_alone_speaks_as_this_one_does_and_says_which_kind_it_is(tts: Any) -> None:
    command = [sys.executable, "-c", SPEAK, TEXT]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | AVX2, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["flow"] == "torch.float32"
    assert found["as float32"]
    assert found["samples"] == 12 * 960
    here = lab.speech_tokens(tts, TEXT, lab.FAST, seed=0, max_new_tokens=12, ignore_eos=True)
    assert found["tokens"] == found["upstream"] == here.tolist()
    assert found["quiet"]
    assert len(found["warned"]) == 1
    assert found["warned"][0].startswith("flow_dtype='bfloat16': this CPU emulates bfloat16; ")
    assert found["costs"]["64"] > 1
    assert found["facts"]["cpu_capability"] == "AVX2"
    assert found["facts"]["bfloat16"] is False
    assert " with AVX2, " in found["words"]
    facts = machine.machine_facts()
    same = ("machine", "cpu_family", "cpu_model", "cores")
    assert [found["facts"][name] for name in same] == [facts[name] for name in same]
    assert facts["cpu_capability"] in machine.in_words(facts)
    assert facts["bfloat16"] == (FlowPlan.of(lab.FAST, CPU).dtype == torch.bfloat16)
    assert not (facts["bfloat16"] and cpu.emulation(CPU))


@pytest.mark.parametrize(("machine_name", "native"), [("x86_64", False), ("AMD64", False), ("aarch64", True)])
def test_avx512_without_bfloat16_is_no_cpu_that_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, machine_name: str, native: bool
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)  # as oneDNN says there
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine_name)
    assert cpu.onednn(torch.bfloat16) is native
    assert cpu.onednn(torch.float32) is True


def test_a_vocoder_in_bfloat16_is_weighed_as_well(pretend: Pretend) -> None:
    pretend(bfloat16=False)
    asked = lab.FAST.replace(flow_dtype="float32", vocoder_dtype="bfloat16")
    settings, why = costs._multiplied(asked, CPU)
    assert (settings.flow_dtype, settings.vocoder_dtype) == ("float32", "auto")
    assert "vocoder_dtype='auto', since" in why
