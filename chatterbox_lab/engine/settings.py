"""What a stream is asked to do: one validated, frozen record, and the presets the report names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from operator import index
from typing import Any

from .schedule import SCHEDULES, TOKEN_SECONDS, UNMEASURED, Costs
from .t3.backends import ANALYZERS, AUTO, BACKENDS
from .t3.rules import Rules

WEIGHTS = ("loaded", "int8")
FLOWS = ("window", "cached")
FLOW_DTYPES = ("auto", "float32", "bfloat16")
"""Also of the vocoder."""

_CHOICES = {"analyzer": ANALYZERS, "weights": WEIGHTS, "flow": FLOWS, "flow_dtype": FLOW_DTYPES}
_CHOICES |= {"vocoder_dtype": FLOW_DTYPES}
_COUNTS = {"chunk_size": 1, "context_window": 0, "max_chunk_size": 1}
_COUNTS |= {"flow_steps": 1, "prompt_tokens": 0}
_AMOUNTS = ("temperature", "cfg_weight", "exaggeration", "fade_duration")
_MOST = 100.0  # far beyond any use; keeps logits within the range of every dtype
_COLDEST = 1e-3  # below it logits over temperature leave the range of float16
_FLAGS = ("guard", "overlap", "ignore_eos")
_SHARES = {"top_p": (0.0, 1.0), "min_p": (0.0, 1.0), "repetition_penalty": (0.01, _MOST)}
"""Least and most of what may be None."""


@dataclass(frozen=True)
class StreamSettings:
    """How text becomes a stream of audio chunks. Values are checked when the record is made.

    Args:
        chunk_size: new speech tokens per chunk (25 tokens are one second of audio), at least 1.
        context_window: tokens before the chunk that S3Gen synthesises again with it, at least 0. The tokens that
            the cross-fade needs are always included.
        temperature: of the sampling: 0 takes the most likely token (after repetition penalty), else 0.001 to 100.
        cfg_weight: classifier-free guidance, ``cond + weight * (cond - uncond)``, 0 to 100; Turbo has none.
        exaggeration: Chatterbox's emotion control, 0 to 100; 0.5 is neutral, and nothing to Turbo.
        fade_duration: seconds of the cross-fade between chunks, 0 to 100; at most half a chunk is used.
        analyzer: how T3's alignment is read. ``"stock"``: as released, every layer returns its attention map.
            ``"layer"``: only the analyzer's own layer falls back to manual attention, with a causal mask.
            ``"off"``: not read. ``"probe"``: SDPA in every layer, the one wanted row computed beside it.
        guard: lets the alignment lead the speech to its end, by ``rules``; needs an analyzer other than ``"off"``.
            None is as the model's release does: Multilingual of chatterbox-tts is guarded (read as ``"probe"``).
        backend: what runs T3. ``"hf"``: the transformers model, with a cache that grows. ``"static"``: the same weights
            by plain operations, with a cache that is there from the start. ``"compile"``: these compiled by PyTorch,
            which takes half a minute once. ``"graph"``: these captured as CUDA graphs. All but the first take the
            analyzers ``"off"`` and ``"probe"``. ``"auto"``: the fastest that says upstream's tokens on the model's
            device: ``"static"``, or ``"hf"`` where the analyzer needs attention maps or T3's layers are hooked into.
        weights: of T3's decode steps: ``"loaded"`` as the model has them, ``"int8"`` rounded to 8 bits (backend
            ``"static"`` on a CPU; kept beside the model's own, with which the prefill goes on; other tokens).
        schedule: how chunk sizes follow one another (`schedule.SCHEDULES`). ``"fixed"`` repeats ``chunk_size``.
            ``"grow"`` begins with it, and makes each next chunk as large as the listener's buffer allows, by ``costs``
            and not by the clock, so that a stream can be repeated.
        max_chunk_size: the most tokens of a chunk that has grown, at least ``chunk_size``.
        costs: what the machine takes for a token and a chunk, for ``"grow"``; `recommend` measures it.
        flow: what S3Gen's flow does about the past. ``"window"``: makes the mel of the context again with the chunk, as
            upstream. ``"cached"``: computes each frame once; the past, which does not see what follows, is remembered
            as keys and values (other sound).
        flow_dtype: of the flow's products: ``"float32"``, ``"bfloat16"`` (other rounding), or ``"auto"``: bfloat16
            where the device multiplies it, float32 on a CPU that emulates it, where bfloat16 is several times slower.
        flow_steps: the most Euler steps from noise to mel, at least 1; upstream takes 10 (fewer: other sound), and with
            Turbo 2.
        vocoder_dtype: of the vocoder's residual blocks on a CPU, as ``flow_dtype``; elsewhere they stay float32.
        prompt_tokens: the most tokens of the voice prompt that the flow is given, its last ones; at least 0. The
            released voice has 250, ten seconds, which are part of every window.
        overlap: lets T3 decode the next chunk while S3Gen renders this one and the watermark runs on the one before,
            each in its thread; the same result. For a GPU, or a CPU of many cores, whose threads the stages
            share (other rounding, as with any other number of threads).
        ignore_eos: never samples the stop token, so that ``max_new_tokens`` fixes the length (for measurements); the
            guard then looks on without acting.
        repetition_penalty: what the logits of tokens said before are divided by (multiplied, below 0), 0.01 to 100.
        top_p: of the likeliest tokens, those are sampled whose probabilities add up to this, 0 to 1 (all).
        min_p: tokens less likely than this share of the likeliest are not sampled, 0 (all) to 1.
        top_k: only so many of the likeliest tokens are sampled; 0 is all.
            These four are None as in the model's release (`variants`).
        language: a code such as ``"fr"``, for models that speak several; ``""`` is none in particular.
        rules: thresholds of the guard (`t3.rules`); None are the model's own (`variants`).

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    chunk_size: int = 50
    context_window: int = 100
    temperature: float = 0.8
    cfg_weight: float = 0.5
    exaggeration: float = 0.5
    fade_duration: float = 0.02
    analyzer: str = "off"
    guard: bool | None = None
    backend: str = AUTO
    weights: str = "loaded"
    schedule: str = "fixed"
    max_chunk_size: int = 250
    costs: Costs = UNMEASURED
    flow: str = "window"
    flow_dtype: str = "float32"
    flow_steps: int = 10
    vocoder_dtype: str = "float32"
    prompt_tokens: int = 250
    overlap: bool = False
    ignore_eos: bool = False
    repetition_penalty: float | None = None
    top_p: float | None = None
    min_p: float | None = None
    top_k: int | None = None
    language: str | None = None
    rules: Rules | None = None

    def __post_init__(self) -> None:
        for name, least in _COUNTS.items():
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        for name in _AMOUNTS:
            object.__setattr__(self, name, _amount(name, getattr(self, name)))
        if 0 < self.temperature < _COLDEST:
            raise ValueError(f"temperature={self.temperature!r}: must be 0 (greedy) or at least {_COLDEST}")
        for name, allowed in (_CHOICES | {"backend": (AUTO, *BACKENDS), "schedule": tuple(SCHEDULES)}).items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {_words(allowed)}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool) and (name, self.guard) != ("guard", None):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be True or False")
        self._check_sampling()
        self._check_backend()
        if not isinstance(self.costs, Costs):
            raise ValueError(f"costs={self.costs!r}: must be a Costs, such as costs.calibrate measures")
        if self.schedule != "fixed" and self.max_chunk_size < self.chunk_size:
            raise ValueError(f"max_chunk_size={self.max_chunk_size!r}: must be at least chunk_size={self.chunk_size}")
        if self.guard and self.analyzer == "off":
            raise ValueError("guard=True with analyzer='off': the guard acts on alignment, choose 'probe' to read it")

    def _check_sampling(self) -> None:
        for name, (least, most) in _SHARES.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _amount(name, getattr(self, name), least, most))
        if self.top_k is not None:
            object.__setattr__(self, "top_k", whole_number("top_k", self.top_k, 0))
        if not isinstance(self.language, (str, type(None))):
            raise ValueError(f"language={self.language!r}: must be a code such as 'en', or None")
        if not isinstance(self.rules, (Rules, type(None))):
            raise ValueError(f"rules={self.rules!r}: must be a Rules, or None for the model's own")

    def _check_backend(self) -> None:
        rows = list(BACKENDS.values()) if self.backend == AUTO else [BACKENDS[self.backend]]
        asked = f"backend={self.backend!r}"
        for name, offered in (("weights", "weights"), ("analyzer", "analyzers")):
            value, allowed = getattr(self, name), dict.fromkeys(v for row in rows for v in getattr(row, offered))
            if value not in allowed:
                having = [other for other, row in BACKENDS.items() if value in getattr(row, offered)]
                words = f"only {_words(having)} can; choose one of {_words(allowed)}"
                raise ValueError(f"{name}={value!r} with {asked}: {words}")
            rows = [row for row in rows if value in getattr(row, offered)]
            asked += f" and {name}={value!r}" * (value != "loaded")

    @property
    def fade(self) -> float:
        """Seconds of the cross-fade that are used: at most half a chunk."""
        return min(self.fade_duration, self.chunk_size * TOKEN_SECONDS / 2)

    @property
    def context(self) -> int:
        """Tokens of context that a chunk gets once as many were said: at least those of the cross-fade."""
        return max(self.context_window, math.ceil(self.fade / TOKEN_SECONDS))

    @property
    def largest_chunk(self) -> int:
        """The most new tokens that a chunk may have, besides the silence after Turbo's last."""
        return self.chunk_size if self.schedule == "fixed" else self.max_chunk_size

    def chunk_sizes(self) -> Iterator[int]:
        """New tokens of each chunk in turn, without end; the last chunk of an utterance has what is left."""
        return SCHEDULES[self.schedule](self)

    def replace(self, **overrides: Any) -> StreamSettings:
        """A copy with some fields changed and checked again. Raises ValueError for a name that is no field."""
        names = [field.name for field in fields(self)]
        for name in overrides:
            if name not in names:
                raise ValueError(f"{name}={overrides[name]!r}: no such setting; there are {', '.join(names)}")
        return replace(self, **overrides)


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """``value`` as an int within [least, most]. Raises ValueError naming the argument otherwise."""
    allowed = f"a whole number, at least {least}" + (f" and at most {most}" if most is not None else "")
    try:
        number = index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least or (most is not None and number > most):
        raise ValueError(f"{name}={value!r}: must be {allowed}")
    return number


def _words(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _amount(name: str, value: Any, least: float = 0.0, most: float = _MOST) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, (bool, str)) or not least <= number <= most:  # nan is outside, too
        raise ValueError(f"{name}={value!r}: must be a number from {least:g} to {most:g}")
    return number


BASELINE = StreamSettings(chunk_size=25, context_window=50)
"""Upstream's defaults: where the report starts."""
BALANCED = StreamSettings(chunk_size=50, context_window=100)
"""The report's recommendation."""
BEST_RTF = StreamSettings(chunk_size=75, context_window=150)
"""The report's setting for the lowest RTF."""
ADAPTIVE = StreamSettings(chunk_size=25, context_window=50, schedule="grow")
"""An early first chunk, and then ever larger ones; `recommend` fits it to a machine."""
FAST = StreamSettings(
    chunk_size=50, context_window=50, flow="cached", flow_dtype="auto", flow_steps=5, prompt_tokens=75,
    vocoder_dtype="auto",
)  # fmt: skip
"""S3Gen at its cheapest, with another sound: each frame once, half the Euler steps, 3 s of the voice prompt."""
