"""Any number of threads and suspended streams share one model; each gets what it would get alone."""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import TEXT

import chatterbox_lab as lab
from chatterbox_lab import kept
from chatterbox_lab.study import fallback

WAYS: dict[str, dict[str, Any]] = {
    "static": {},
    "maps": {"backend": "hf", "analyzer": "stock"},
    "one map": {"analyzer": "layer", "guard": True},
    "probe": {"backend": "hf", "analyzer": "probe", "guard": True},
    "transformers": {"backend": "hf"},
    "int8": {"weights": "int8", "analyzer": "probe"},
    "cached": {"flow": "cached"},
    "short prompt": {"flow": "cached", "prompt_tokens": 4},
    "overlapped": {"overlap": True},
    "greedy": {"temperature": 0},
}
FIXED = {"ignore_eos": True, "flow_steps": 1, "chunk_size": 4, "max_new_tokens": 11}
LONG = 120.0
"""Seconds in which a thread has ended, else it waits for ever."""


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads that give way to one another a thousand times more often than usual, with one core each."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-6)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def stream(tts: Any, way: str, seed: int) -> Iterator[tuple[torch.Tensor, lab.StreamMetrics]]:
    text = f"{TEXT} {'Again. ' * (seed % 3)}"
    return lab.generate_stream(tts, text, **FIXED, **WAYS[way], seed=seed, exaggeration=0.5 + seed % 2)


def joined(chunks: Iterator[tuple[torch.Tensor, Any]]) -> torch.Tensor:
    return torch.cat([audio for audio, _ in chunks], dim=1)


@pytest.fixture(scope="module")
def alone(voice: Any) -> dict[tuple[str, int], torch.Tensor]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {(way, seed): joined(stream(voice, way, seed)) for way in WAYS for seed in range(2)}
    torch.set_num_threads(threads)
    return found


def together(*works: Any) -> list[BaseException]:
    """Runs each function in a thread; what they raised. Fails if one of them does not end."""
    errors: list[BaseException] = []

    def guarded(work: Any) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    return errors


@pytest.mark.parametrize("ways", [[*WAYS], ["cached"]], ids=["all", "cached"])
def test_threads_in_a_hurry_each_get_what_they_would_get_alone(
    tts: Any, hurried: None, no_thread_is_left: None, alone: dict[tuple[str, int], torch.Tensor], ways: list[str]
) -> None:
    wrong: list[tuple[str, int]] = []
    kept._kept.clear()  # whoever comes first makes what is kept, while others ask for it

    def speaks(order: int) -> None:
        turns = [key for key in alone if key[0] in ways] * (10 // len(ways))
        random.Random(order).shuffle(turns)
        for way, seed in turns[:10]:
            if not torch.equal(joined(stream(tts, way, seed)), alone[way, seed]):
                wrong.append((way, seed))

    def forgets() -> None:
        for _ in range(10):
            time.sleep(0.2)
            lab.forget(tts)
            gc.collect()

    others = [forgets] if len(ways) > 1 else []
    assert together(*(lambda order=order: speaks(order) for order in range(4)), *others) == []
    assert wrong == []
    assert fallback.count_spies(tts.t3.tfmr) == {"hooks": 0, "wrapped forwards": 0}


def test_streams_that_take_turns_each_get_what_they_would_get_alone(
    tts: Any, hurried: None, no_thread_is_left: None, alone: dict[tuple[str, int], torch.Tensor]
) -> None:
    """Suspended in any order, in whatever thread comes next, some of them closed or forgotten halfway."""
    chance = random.Random(0)
    running = {key: (stream(tts, *key), []) for key in alone}
    dropped = set(chance.sample(sorted(alone), 6))
    while running:
        key = chance.choice(sorted(running))
        chunks, parts = running[key]
        found: list[Any] = []
        assert together(lambda chunks=chunks, found=found: found.append(next(chunks, None))) == []
        if found[0] is not None:
            parts.append(found[0][0])
        if found[0] is None:
            assert torch.equal(torch.cat(parts, dim=1), alone[key]), key
            del running[key]
        elif key in dropped and len(parts) == 2:
            if chance.random() < 0.5:
                chunks.close()
            del running[key]
        del chunks, parts, found


def test_an_executor_whose_callers_leave_goes_on_serving(
    tts: Any, hurried: None, alone: dict[tuple[str, int], torch.Tensor]
) -> None:
    async def listens(way: str, seed: int, patience: int | None) -> torch.Tensor | None:
        chunks, parts = stream(tts, way, seed), []
        for heard in itertools.count():
            if heard == patience:
                return None  # the stream is forgotten where it is
            found = await asyncio.to_thread(next, chunks, None)
            if found is None:
                return torch.cat(parts, dim=1)
            parts.append(found[0])

    async def serves() -> list[Any]:
        calls = [listens(way, seed, None if seed % 2 else seed) for way, seed in alone]
        tasks = [asyncio.create_task(call) for call in calls]
        await asyncio.sleep(0.05)
        for task in tasks[::5]:
            task.cancel()  # while a thread is in the midst of a chunk
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), LONG)

    found = asyncio.run(serves())
    for key, audio in zip(alone, found, strict=True):
        if isinstance(audio, torch.Tensor):
            assert torch.equal(audio, alone[key]), key
        else:
            assert audio is None or isinstance(audio, asyncio.CancelledError)
    assert sum(isinstance(audio, torch.Tensor) for audio in found) >= len(alone) // 3
    gc.collect()
    assert together(lambda: joined(stream(tts, "maps", 0))) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("chatterbox_lab")]


@pytest.mark.parametrize("way", ["static", "overlapped", "maps"])
@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("how", ["another", "in place"])
@pytest.mark.parametrize("patched", [False, True])
def test_a_stream_keeps_the_voice_it_was_called_with(
    tts: Any, hurried: None, way: str, when: str, how: str, patched: bool
) -> None:
    def made() -> Iterator[tuple[torch.Tensor, Any]]:
        if not patched:
            return lab.generate_stream(tts, TEXT, **FIXED, **WAYS[way], seed=0)
        fields = {name: value for name, value in FIXED.items() if name not in ("chunk_size", "max_new_tokens")}
        with lab.patch(tts, **fields, **WAYS[way]):
            return tts.generate_stream(TEXT, chunk_size=4, max_new_tokens=11, print_metrics=False, seed=0)

    expected, chunks = joined(made()), made()
    parts = [next(chunks)[0]] if when == "between" else []
    own = tts.conds
    tensors = [value for value in (*vars(own.t3).values(), *own.gen.values()) if torch.is_tensor(value)]
    before = [tensor.clone() for tensor in tensors]
    try:
        if how == "another":
            tts.conds = None
        else:
            for tensor in tensors:
                tensor.zero_()
        found = torch.cat([*parts, *(audio for audio, _ in chunks)], dim=1)
    finally:
        tts.conds = own
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("overlap", [False, True])
def test_any_thread_stops_a_stream_with_the_token_that_it_is_at(
    tts: Any, monkeypatch: pytest.MonkeyPatch, no_thread_is_left: None, overlap: bool
) -> None:
    from chatterbox_lab.engine.t3 import eager

    stop, steps, sample = threading.Event(), [], eager.sample

    def counted(*args: Any) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 30:
            stop.set()
        return sample(*args)

    monkeypatch.setattr(eager, "sample", counted)
    arguments = {"chunk_size": 20, "max_new_tokens": 200, "ignore_eos": True, "seed": 0, "flow_steps": 1}
    chunks = list(lab.generate_stream(tts, TEXT, **arguments, overlap=overlap, stop=stop))
    assert len(steps) == 30
    assert len(chunks) <= 1
    steps.clear()
    stop.clear()
    assert lab.speech_tokens(tts, TEXT, max_new_tokens=99, ignore_eos=True, seed=0, stop=stop).shape == (29,)
    with pytest.raises(ValueError, match="stop=True"):
        lab.generate_stream(tts, TEXT, stop=True)
