"""Stages of a stream at work at the same time, each in a thread of its own, a bounded number of items ahead."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from queue import SimpleQueue
from threading import Event, Lock, Thread, current_thread
from typing import Any

import torch

from ..host import apart
from .clock import Chunks, StageClock, synchronize

_PATIENCE = 60.0
"""Seconds. A garbage collection may end a forgotten stream within anything, also while it holds what a thread needs."""
_setting = Lock()
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
        inside: a context for each thread, by number; the source is 0.
        ahead: finished items that may wait to be taken, while every thread works on one more.
    """
    halted = Event()
    # SimpleQueue, because a garbage collection may end a forgotten stream in the midst of a thread's own put or get.
    room, *made = (SimpleQueue() for _ in range(len(stages) + 2))
    for _ in range(len(made) + ahead):
        room.put(None)  # a place for each item that may be under way

    def results(number: int) -> Iterator[Any]:
        if number == 0:
            with closing(source(halted)) as items:
                for _ in iter(room.get, _END):
                    if halted.is_set() or (item := next(items, _END)) is _END:
                        return
                    yield item
        else:
            for item in _items(made[number - 1]):
                if halted.is_set():
                    return
                yield stages[number - 1](item)

    def work(number: int) -> None:
        end: Any = _END
        try:
            with inside(number):
                for item in results(number):
                    made[number].put(item)
        except BaseException as error:
            end = error
        made[number].put(end)

    threads = [Thread(target=work, args=(n,), name=f"chatterbox_lab-{n}", daemon=True) for n in range(len(made))]
    try:
        for thread in threads:
            thread.start()
        for item in _items(made[-1]):
            room.put(None)
            yield item
    finally:
        halted.set()
        for queue in (room, *made):
            queue.put(_END)
        if current_thread() not in threads:  # a forgotten stream may be collected in a thread of its own
            for thread in (thread for thread in threads if thread.ident is not None):
                thread.join(_PATIENCE)


def _items(queue: SimpleQueue) -> Iterator[Any]:
    while (item := queue.get()) is not _END:
        if isinstance(item, BaseException):  # the end of a stage that failed
            raise item
        yield item


@contextmanager
def own_share(device: torch.device, threads: int) -> Iterator[None]:
    """For a thread: on a GPU a CUDA stream of its own, on a CPU this many of PyTorch's threads; no autocast and such.

    All threads of all stages on the same cores would wait for one another. PyTorch counts by thread, but the number set
    last also holds for threads that begin later: one that begins now says which that was, another sets it again.
    """
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
        else:
            with _setting:
                before = _in_a_new_thread(torch.get_num_threads)
                torch.get_num_threads()  # before a thread's first look, what is set here would give way
                torch.set_num_threads(threads)
                _in_a_new_thread(torch.set_num_threads, before)
        stack.enter_context(apart(device))
        yield


def _in_a_new_thread(function: Callable[..., Any], *args: Any) -> Any:
    found: list[Any] = []
    thread = Thread(target=lambda: found.append(function(*args)))
    thread.start()
    thread.join()
    return found[0]


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
    device = torch.device(clock.device)
    with _setting:  # a thread's first look is at the number set last
        threads = torch.get_num_threads()
    shares = 2 * [max(1, threads // 2)] + [1]  # of a CPU's cores: T3 and S3Gen share them, the watermark gets one
    synchronize(device)  # what the stages share is there
    made = pipelined(
        source,
        lambda chunk: (len(chunk[0]), rendered(*chunk)),
        lambda made: (made[0], marked(made[1])),
        inside=lambda number: own_share(device, shares[number]),
    )
    with closing(made):
        for count, audio in made:
            clock.calls["token"] += count
            if audio.shape[1]:
                yield audio
