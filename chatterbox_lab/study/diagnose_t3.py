"""T3's part of a diagnosis: which attention runs and who asked for it, what a token takes, a step taken apart."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..engine.clock import StageClock
from ..engine.request import checked
from ..engine.settings import BASELINE, StreamSettings
from ..engine.stream import speech_tokens
from ..engine.t3.backends import backend_of
from ..engine.t3.decode import conditioning, prompt
from ..engine.t3.decode import tokens as decoded
from .fallback import count_spies, measure_half_fix, watch_layers, without_spies
from .machine import machine_facts, read_seconds, step_bytes
from .streams import failure
from .subject import EXACT, FASTEST, TEXT, UPSTREAM, Row, Subject, as_found, fastest
from .turns import to_and_fro
from .upstream import upstream_tokens

LENGTH = 256
"""Positions at which a decode step is taken apart."""
_STEPS = 4  # of a call whose layers are watched


def attention(subject: Subject) -> Iterator[Row]:
    """Which attention each layer runs, in upstream's call and in ours, and who asks for the maps."""
    tts, fixed = subject.tts, subject.of(_STEPS)
    calls = {
        UPSTREAM: lambda: upstream_tokens(tts, TEXT, **fixed),
        EXACT: lambda: speech_tokens(tts, TEXT, backend="hf", **fixed),
    }
    for name, call in calls.items():
        with as_found(tts), watch_layers(subject.tfmr) as counts, _asked(subject.tfmr) as asked:
            call()
        for layer, count in enumerate(counts):
            yield {"name": "layer", "variant": name, "layer": layer} | {
                kind: count[kind] for kind in ("manual", "sdpa")
            }
        for who in sorted(asked):
            yield {"name": "asked", "variant": name, "text": who}
        if name == UPSTREAM:
            yield {"name": "cache", "text": ", ".join(sorted(asked.caches))}
    if any(count_spies(subject.tfmr).values()):
        request = checked(tts, TEXT)
        with torch.inference_mode():
            embeds, text = prompt(tts.t3, conditioning(tts, BASELINE.exaggeration), request.text_tokens)
        fix = measure_half_fix(subject.tfmr, tts.t3.speech_head, embeds, text)
        yield {"name": "half_fix_future_mass", "layer": fix.layer, "value": fix.future_mass}
        yield {"name": "half_fix_logits_change", "layer": fix.layer, "value": fix.logits_change}


class _Asked(set):
    """Lines that asked all layers for maps; ``caches``: the types of the caches that came back."""

    def __init__(self) -> None:
        super().__init__()
        self.caches: set[str] = set()


@contextmanager
def _asked(tfmr: torch.nn.Module) -> Iterator[_Asked]:
    """Who calls this transformer for attention maps, innermost line first, and what keeps its keys and values."""
    asked = _Asked()

    def before(module: Any, inputs: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("output_attentions"):
            asked.add(_callers())
        elif module.config.output_attentions:
            asked.add("config.output_attentions")

    def after(module: Any, inputs: Any, output: Any) -> None:
        asked.caches.add(type(output.past_key_values).__name__)

    handles = tfmr.register_forward_pre_hook(before, with_kwargs=True), tfmr.register_forward_hook(after)
    try:
        yield asked
    finally:
        for handle in handles:
            handle.remove()


def _callers() -> str:
    """The lines of chatterbox that are running, as ``file function``, the innermost first."""
    frame, lines = sys._getframe(1), []
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("chatterbox."):
            lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(lines)


def t3(subject: Subject) -> Iterator[Row]:
    """Seconds a token of T3 after the first, in whole loops that take turns."""
    tts, plan = subject.tts, subject.plan
    best = {"backend": fastest(tts.device).backend, "weights": fastest(tts.device).weights}
    ways: dict[str, Callable[[], list[float]]] = {
        UPSTREAM: partial(_upstream_marks, subject, without_spies),
        "maps": partial(_our_marks, subject, backend="hf", analyzer="stock"),
        "no maps": partial(_our_marks, subject, backend="hf"),
        EXACT: partial(_our_marks, subject),
        FASTEST: partial(_our_marks, subject, **best),
    }
    if any(count_spies(subject.tfmr).values()):
        ways["as found"] = partial(_upstream_marks, subject, None)
    yield {"name": "backend", "variant": EXACT, "text": backend_of(BASELINE, tts.t3)}
    for number in range(-1, plan.rounds):
        for name in to_and_fro(ways, max(number, 0)):
            try:
                with as_found(tts):
                    marks = ways[name]()
                row = {"seconds": (marks[-1] - marks[0]) / (len(marks) - 1), "error": None}
            except Exception as error:  # the other ways are still worth measuring
                row = {"error": failure(error)["error"]}
            if number >= 0:
                yield {"name": "token", "variant": name, "round": number} | row


def _upstream_marks(subject: Subject, around: Callable[[torch.nn.Module], Any] | None) -> list[float]:
    marks: list[float] = []
    handle = subject.tts.t3.speech_head.register_forward_hook(lambda *_: marks.append(time.perf_counter()))
    try:
        with around(subject.tfmr) if around else as_found(subject.tts):
            upstream_tokens(subject.tts, TEXT, **subject.of(subject.plan.decoded))
    finally:
        handle.remove()
    return marks


def _our_marks(subject: Subject, **settings: Any) -> list[float]:
    request = checked(subject.tts, TEXT, StreamSettings(ignore_eos=True, **settings), seed=subject.seed)
    marks, stream = [], decoded(subject.tts, request)
    try:
        for _ in range(subject.plan.decoded + 1):
            int(next(stream))
            marks.append(time.perf_counter())
    finally:
        stream.close()
    return marks


def step(subject: Subject) -> Iterator[Row]:
    """One decode step of T3 taken apart: maps, spy, mask, cache, operators or launches, threads, the memory's speed."""
    from .layers import Step, launches  # needs upstream's analyzer, which not every release has

    tts, t3, repeats = subject.tts, subject.tts.t3, subject.plan.repeats
    with without_spies(subject.tfmr):
        one = Step(t3, "decode", LENGTH, subject.seed)
    modes = ["released", "stock", "off"] + ["as found"] * any(count_spies(subject.tfmr).values())
    for number in range(-1, 2 * repeats):
        for mode in to_and_fro(modes, max(number, 0)):
            with as_found(tts) if mode == "as found" else without_spies(subject.tfmr):
                taken = one.seconds("released" if mode == "as found" else mode, layers=False)
            if number >= 0:
                yield {"name": "step", "variant": mode, "round": number, "seconds": max(taken.values())}
    with without_spies(subject.tfmr):
        for mode in ("stock", "off"):
            asked = launches(one, mode, repeats=1)
            for name in ("operators", "kernels", "busy_share", "mask_bytes"):
                if name in asked:
                    yield {"name": name, "variant": mode, "value": float(asked[name])}
        yield from _threads(one)
    yield from _pieces(subject)


def _threads(one: Any) -> Iterator[Row]:
    """A step with the threads that PyTorch has and with one a core, where that differs, on a CPU."""
    facts = machine_facts(one.t3.device)
    if facts["device"] != "cpu" or facts["threads"] == facts["cores"]:
        return
    try:
        for number in range(4):
            for threads in to_and_fro((facts["threads"], facts["cores"]), number):
                torch.set_num_threads(threads)
                taken = max(one.seconds("off", layers=False).values())
                if number:
                    yield {"name": "threads", "at": threads, "round": number - 1, "seconds": taken}
    finally:
        torch.set_num_threads(facts["threads"])


@torch.inference_mode()
def _pieces(subject: Subject) -> Iterator[Row]:
    """What a step does besides its products: the cache copied, the mask added, operators called; what it must read."""
    config, device, dtype = subject.tfmr.config, subject.tts.device, subject.tts.t3.speech_head.weight.dtype
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    made = partial(torch.zeros, device=device, dtype=dtype)
    past, new = (made(2, heads, length, config.hidden_size // config.num_attention_heads) for length in (LENGTH, 1))
    scores, mask, one = made(2, config.num_attention_heads, 1, LENGTH), made(2, 1, 1, LENGTH), made(1)
    work = {
        "cache_copy": (2 * layers, lambda: torch.cat([past, new], dim=-2)),
        "mask_add": (layers, lambda: scores + mask),
        "operator": (1000, lambda: one.add_(1)),
    }
    clock = StageClock(device)
    for name, (times, do) in work.items():
        taken = []
        for _ in range(5):
            start = clock.now()
            for _ in range(times):
                do()
            taken.append(clock.now() - start)
        yield {"name": name, "seconds": median(taken) / (times if name == "operator" else 1)}
    yield {"name": "cache_bytes", "value": 2 * layers * past.numel() * past.element_size()}
    size = step_bytes(subject.tts.t3)
    for name, read in (("loaded", size), ("int8", size // dtype.itemsize)):
        yield {"name": "limit", "variant": name, "value": read, "seconds": read_seconds(read, device)}
