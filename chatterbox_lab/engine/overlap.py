"""Stages of a stream at work at the same time, each in a thread of its own, a bounded number of items ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from threading import Event, current_thread
from typing import Any

import torch

from .clock import Chunks, StageClock, synchronize

Source = Callable[[Event], Generator[Any, None, None]]
_END = object()


def pipelined(
    source: Source, *stages: Callable[[Any], Any], inside: Callable[[int], AbstractContextManager[Any]], ahead: int = 1
) -> Generator[Any, None, None]:
    """Items of the source after every stage, in order; the first is there as soon as it is through.

    An error of any thread is raised here once what came before it was delivered. However this ends, all threads have
    ended then: at the latest with the item that each was working on.

    Args:
        source: makes a generator, run and closed in a thread of its own. It is given an event that is set when no more
            items are wanted, to look at within long work.
        *stages: what is done to each item, one after the other, each in its thread.
        inside: a context for the work of each thread, by number; the source is 0.
        ahead: finished items that may wait to be taken, while every thread works on one more.
    """
    halted, workers = Event(), {}
    items = source(halted)
    contexts = [ExitStack() for _ in range(len(stages) + 1)]

    def enter(number: int) -> None:
        workers[current_thread()] = pools  # held by every thread, else a garbage collection would end it too early
        contexts[number].enter_context(inside(number))
        if number == 0:
            contexts[0].callback(items.close)  # in the thread that ran it

    pools = [ThreadPoolExecutor(1, f"chatterbox_lab-{n}", enter, (n,)) for n in range(len(contexts))]

    def begun() -> Future:
        made = pools[0].submit(lambda: _END if halted.is_set() else next(items, _END))
        for pool, stage in zip(pools[1:], stages, strict=True):
            made = pool.submit(_done, stage, made)
        return made

    waiting = deque(begun() for _ in range(len(pools) + ahead))
    try:
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(begun())
            yield item
    finally:
        halted.set()
        for pool, context in zip(pools, contexts, strict=True):
            pool.submit(context.close)
            # A forgotten generator may be collected in a thread of its own, which cannot wait for itself.
            pool.shutdown(wait=current_thread() not in workers)


def _done(stage: Callable[[Any], Any], before: Future) -> Any:
    item = before.result()
    return item if item is _END else stage(item)


@contextmanager
def own_share(device: torch.device, threads: int, otherwise: int) -> Iterator[None]:
    """For a thread: on a GPU a CUDA stream of its own, on a CPU this many of PyTorch's threads.

    All threads of all stages on the same cores would wait for one another. PyTorch counts by thread, but the number set
    last also holds for threads that begin later: in the end that is ``otherwise`` again.
    """
    if device.type == "cuda":
        with torch.cuda.stream(torch.cuda.Stream(device)):
            yield
        return
    torch.get_num_threads()  # before a thread's first look, what is set here would give way to the number set last
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(otherwise)


def overlapped(
    source: Source,
    rendered: Callable[[torch.Tensor, bool], torch.Tensor],
    marked: Callable[[torch.Tensor], torch.Tensor],
    clock: StageClock,
) -> Chunks:
    """The audio of a stream's chunks, with T3, S3Gen and the watermark at work on three chunks at once.

    Args:
        source: gives new tokens (n,) of each chunk, and whether it is the last.
        rendered: audio (1, samples) of such a chunk.
        marked: the same audio with its watermark.
        clock: of the stream; counts tokens when they are heard.
    """
    device, threads = torch.device(clock.device), torch.get_num_threads()
    half = max(1, threads // 2)  # of a CPU's cores for T3, the same for S3Gen; the watermark gets one
    shares = half, half, 1
    synchronize(device)  # what the stages share is there
    made = pipelined(
        source,
        lambda chunk: (len(chunk[0]), rendered(*chunk)),
        lambda made: (made[0], marked(made[1])),
        inside=lambda number: own_share(device, shares[number], threads),
    )
    with closing(made):
        for count, audio in made:
            clock.calls["token"] += count
            if audio.shape[1]:
                yield audio
