"""Stages of a stream at work at the same time, each in a thread of its own and a bounded amount ahead of the next."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread, current_thread
from typing import Any

import torch

_PATIENCE = 0.05
"""Seconds after which a waiting stage looks whether it is still wanted."""

Source = Callable[[Event], Generator[Any, None, None]]


class _HaltedError(Exception):
    """Ends a stage that nobody waits for any more."""


@dataclass
class _End:
    """The last item of a queue; with the error that was its reason, if any."""

    error: BaseException | None = None


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
        ahead: finished items that may wait before each stage.
    """
    halted = Event()
    queues: list[Queue] = [Queue(ahead) for _ in range(len(stages) + 1)]

    def work(number: int) -> None:
        end = _End()
        try:
            with inside(number):
                if number == 0:
                    with closing(source(halted)) as items:
                        for item in items:
                            _put(queues[0], item, halted)
                else:
                    for item in _items(queues[number - 1], halted):
                        _put(queues[number], stages[number - 1](item), halted)
        except _HaltedError:
            return
        except BaseException as error:
            end.error = error
        with suppress(_HaltedError):
            _put(queues[number], end, halted)

    threads = [Thread(target=work, args=(n,), name=f"chatterbox_lab-{n}", daemon=True) for n in range(len(queues))]
    try:
        for thread in threads:
            thread.start()
        yield from _items(queues[-1], halted)
    finally:
        halted.set()
        if current_thread() not in threads:  # a forgotten generator may be collected in a thread of its own
            for thread in threads:
                if thread.ident is not None:
                    thread.join()


def _items(queue: Queue, halted: Event) -> Iterator[Any]:
    while True:
        try:
            item = queue.get(timeout=_PATIENCE)
        except Empty:
            if halted.is_set():
                raise _HaltedError from None
            continue
        if not isinstance(item, _End):
            yield item
        elif item.error is None:
            return
        else:
            raise item.error


def _put(queue: Queue, item: Any, halted: Event) -> None:
    while not halted.is_set():
        try:
            return queue.put(item, timeout=_PATIENCE)
        except Full:
            continue
    raise _HaltedError


def in_turn(source: Source, *stages: Callable[[Any], Any]) -> Generator[Any, None, None]:
    """The same items as from `pipelined`, each through all stages before the next one is begun."""
    with closing(source(Event())) as items:
        for item in items:
            for stage in stages:
                item = stage(item)
            yield item


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
