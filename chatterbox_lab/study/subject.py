"""What is diagnosed: a model, how much is measured of it, and how it is left as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from chatterbox.tts import ChatterboxTTS

from ..engine.settings import BASELINE, FAST, StreamSettings

Row = dict[str, Any]
UPSTREAM, EXACT, FASTEST, TUNED = "upstream", "exact", "fastest", "upstream, tuned"
"""Streams: as released; the fastest that says upstream's tokens and makes its mel; the fastest; with flags."""
TEXT = "The quick brown fox reads a long sentence to the lazy dog."
SHAPE = {"chunk_size": BASELINE.chunk_size, "context_window": BASELINE.context_window}
CLEAR = 0.85
"""The highest RTF of a stream that keeps up with its listener with some to spare."""
SLOW = 4.0
"""An RTF of upstream's first chunk above which everything is measured on less speech."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Args:
        tokens: of each stream; 25 are a second.
        rounds: in which all streams take turns.
        sizes: by stream, the chunk sizes to compare; 0 is all of it as one piece.
        size_rounds: rounds of these.
        decoded: tokens of T3 alone.
        repeats: of a step, a window.
        warm_up: whether a round comes before that is not kept.
        chunks: that a stream in chunks of another size has at least.
    """

    tokens: int
    rounds: int
    sizes: Mapping[str, tuple[int, ...]]
    size_rounds: int
    decoded: int
    repeats: int
    warm_up: bool
    chunks: int


_SIZES = (10, 25, 50, 100)
FULL = Plan(100, 4, {UPSTREAM: _SIZES, EXACT: (0, *_SIZES), FASTEST: _SIZES}, 2, 25, 5, True, 2)
QUICK = Plan(50, 2, {UPSTREAM: (10, 25, 50), EXACT: (10, 25, 50), FASTEST: (10, 25, 50)}, 1, 12, 2, True, 1)
LARGE = Plan(50, 2, {UPSTREAM: (50,), EXACT: (100,), FASTEST: _SIZES}, 1, 10, 2, False, 1)
LARGE_QUICK = Plan(50, 1, {UPSTREAM: (50,), FASTEST: (25, 50)}, 1, 5, 1, False, 1)


@dataclass
class Subject:
    """A model on this machine, and what has been measured of it so far.

    Args:
        tts: the model.
        quick: half of everything.
        seed: of every stream.
        keep: is given one stream of each kind to listen to, (1, samples) at ``tts.sr``, float32.
        rows: of the parts before.
    """

    tts: ChatterboxTTS
    quick: bool = False
    seed: int = 0
    keep: Callable[[str, torch.Tensor], None] = lambda name, audio: None
    rows: Sequence[Row] = field(default_factory=list)

    @property
    def tfmr(self) -> torch.nn.Module:
        """T3's transformer."""
        return self.tts.t3.tfmr

    @property
    def plan(self) -> Plan:
        """How much there is time for, by how long the first chunk took, the second time where there was one."""
        first = next((row for row in reversed(self.rows) if row["part"] == "first"), {})
        slow = first.get("total_generation_time", 0.0) > SLOW * first.get("total_audio_duration", 1.0)
        return (LARGE_QUICK if slow else QUICK) if self.quick else (LARGE if slow else FULL)

    def of(self, tokens: int) -> dict[str, Any]:
        """The arguments that all streams of a length share."""
        return {"seed": self.seed, "max_new_tokens": tokens, "ignore_eos": True}


def fastest(device: str | torch.device) -> StreamSettings:
    """`FAST` with the fastest T3: weights of 8 bits on a CPU, CUDA graphs on a GPU of Nvidia's."""
    kind = torch.device(device).type
    changes = {"cpu": {"backend": "static", "weights": "int8"}, "cuda": {"backend": "graph"}}
    return FAST.replace(**SHAPE, **changes.get(kind, {}))


@contextmanager
def as_found(tts: ChatterboxTTS) -> Iterator[None]:
    """Whatever runs inside, T3's layers, their configuration and the voice are afterwards as they were."""
    layers = [layer.self_attn for layer in tts.t3.tfmr.layers]
    before = [(layer, layer.__dict__.get("forward"), dict(layer._forward_hooks)) for layer in layers]
    config, compiled = dict(vars(tts.t3.tfmr.config)), tts.t3.compiled
    conds, voice = tts.conds, dict(vars(tts.conds.t3))
    patched = tts.t3._modules.get("patched_model")
    try:
        yield
    finally:
        for layer, forward, hooks in before:
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward
            layer._forward_hooks.clear()
            layer._forward_hooks.update(hooks)
        vars(tts.t3.tfmr.config).clear()
        vars(tts.t3.tfmr.config).update(config)
        tts.conds, tts.t3.compiled = conds, compiled
        vars(tts.conds.t3).update(voice)  # upstream keeps the prompt's embedding there
        tts.t3._modules.pop("patched_model", None)
        if patched is not None:
            tts.t3.patched_model = patched
