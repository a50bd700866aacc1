"""A backend is one file and one row; ``"auto"`` takes the fastest that says upstream's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TEXT

import chatterbox_lab as lab
from chatterbox_lab.engine.t3.backends import ANALYZERS, AUTO, BACKENDS, Backend, Setup, backend_of

FIXED = {"seed": 0, "max_new_tokens": 12, "ignore_eos": True}


class Counting:
    """Says 1, 2, 3, ..."""

    rows = None

    def __init__(self, setup: Setup) -> None:
        self.logits, self.said = torch.zeros(2, setup.t3.hp.speech_tokens_dict_size), 0

    def prefill(self, embeds: torch.Tensor, voice: int) -> torch.Tensor:
        return self.logits

    def step(self, position: int) -> torch.Tensor:
        return self.logits

    def pick(self, logits: torch.Tensor) -> torch.Tensor:
        self.said += 1
        return torch.tensor([[self.said]])


@contextmanager
def counting(setup: Setup) -> Iterator[Counting]:
    yield Counting(setup)


def test_a_new_backend_is_a_row_and_streams(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend='counting': must be one of 'auto', 'hf', 'static'"):
        lab.StreamSettings(backend="counting")
    monkeypatch.setitem(BACKENDS, "counting", Backend(counting, analyzers=("off",), exact=False))
    settings = lab.BASELINE.replace(backend="counting", chunk_size=5)
    assert lab.speech_tokens(tts, TEXT, settings, max_new_tokens=12).tolist() == list(range(1, 13))
    audio = [audio for audio, _ in lab.generate_stream(tts, TEXT, settings, max_new_tokens=12)]
    assert len(audio) == 3
    assert sum(chunk.shape[1] for chunk in audio) == 12 * 960
    with pytest.raises(ValueError, match="analyzer='probe' with backend='counting'"):
        settings.replace(analyzer="probe")


def test_a_backend_that_the_device_lacks_is_refused(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "counting", Backend(counting, devices=("mps",)))
    message = "backend='counting': needs a MPS device, the model is on cpu; choose one of 'hf', 'static', 'compile'"
    with pytest.raises(ValueError, match=message):
        lab.generate_stream(tts, TEXT, backend="counting")


@pytest.mark.parametrize("analyzer", ANALYZERS)
def test_auto_says_upstreams_tokens_in_every_mode(tts: Any, analyzer: str) -> None:
    settings = lab.StreamSettings(analyzer=analyzer)
    assert settings.backend == AUTO
    assert backend_of(settings, tts.t3) == ("static" if analyzer in ("off", "probe") else "hf")
    assert torch.equal(lab.speech_tokens(tts, TEXT, settings, **FIXED), lab.upstream_tokens(tts, TEXT, **FIXED))


def test_auto_leaves_layers_that_are_hooked_into_to_transformers(tts: Any) -> None:
    layer, head = tts.t3.tfmr.layers[3], tts.t3.speech_head
    settings = lab.StreamSettings()
    lab.upstream_tokens(tts, TEXT, max_new_tokens=1, leave_spies=True)  # which does not count
    assert backend_of(settings, tts.t3) == "static"
    for module in (layer, layer.mlp.up_proj, head):
        handle = module.register_forward_hook(lambda *_: None)
        assert backend_of(settings, tts.t3) == "hf"
        handle.remove()
    layer.mlp.forward = layer.mlp.forward
    assert backend_of(settings, tts.t3) == "hf"
    del layer.mlp.forward
    plain, layer.mlp.up_proj = layer.mlp.up_proj, torch.nn.Sequential(layer.mlp.up_proj)  # as an adapter does
    assert backend_of(settings, tts.t3) == "hf"
    assert len(lab.speech_tokens(tts, TEXT, settings, **FIXED)) == 12
    layer.mlp.up_proj = plain
    assert backend_of(settings, tts.t3) == "static"
    from chatterbox_lab.engine.t3.spies import remove_spies

    remove_spies(tts.t3.tfmr)


def test_auto_takes_graphs_on_cuda_alone(tts: Any) -> None:
    elsewhere = SimpleNamespace(device=torch.device("mps"), tfmr=tts.t3.tfmr, speech_head=tts.t3.speech_head)
    assert backend_of(lab.StreamSettings(), elsewhere) == "hf"
    on_cuda = SimpleNamespace(device=torch.device("cuda", 0), tfmr=tts.t3.tfmr, speech_head=tts.t3.speech_head)
    assert backend_of(lab.StreamSettings(), on_cuda) == "graph"
    assert backend_of(lab.StreamSettings(analyzer="stock"), on_cuda) == "hf"
    assert backend_of(lab.StreamSettings(backend="static"), on_cuda) == "static"


def test_auto_does_not_run_rounded_weights_past_hooks(tts: Any) -> None:
    handle = tts.t3.tfmr.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="weights='int8': only 'hf' runs layers with adapters or hooks"):
        lab.speech_tokens(tts, TEXT, weights="int8", max_new_tokens=2)
    handle.remove()


def test_auto_sees_a_bias(tts: Any) -> None:
    projection = tts.t3.tfmr.layers[0].self_attn.q_proj
    projection.bias = torch.nn.Parameter(torch.zeros(projection.out_features))
    assert backend_of(lab.StreamSettings(), tts.t3) == "hf"
    projection.bias = None


def test_auto_takes_the_backend_that_has_the_weights(tts: Any) -> None:
    assert backend_of(lab.StreamSettings(weights="int8"), tts.t3) == "static"
    with pytest.raises(ValueError, match="analyzer='stock' with backend='auto' and weights='int8': only 'hf' can"):
        lab.StreamSettings(weights="int8", analyzer="stock")
